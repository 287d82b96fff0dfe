"""Layers of equivariant networks, from fields to fields. `SymmetricConv*d` with a shared bias lifts images to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tritonsym import fold, functional, groups, plan
from tritonsym._compat import BatchNorm
from tritonsym.fold import GroupSpec
from tritonsym.nn.conv import (
    INITS,
    Checkpoints,
    Init,
    _hyperparameters,
    _SharedConv,
    check_normalized,
    learns,
    with_activation,
)
from tritonsym.packing import gathered
from tritonsym.reference import REDUCTIONS
from tritonsym.symmetry import Symmetry

if TYPE_CHECKING:
    from typing_extensions import Self


def _order(where: str, symmetry: str) -> int:
    """The number of elements of the group of this name."""
    value = Symmetry(symmetry)
    if value.is_radial:
        raise ValueError(f"{where}: {symmetry!r} has no elements; use a group such as 'hv' or 'd4'")
    return value.order


def _fields(where: str, name: str, channels: int, symmetry: str) -> int:
    order = _order(where, symmetry)
    if channels % order:
        raise ValueError(
            f"{where}: {name}={channels} channels are no whole fields of {order} elements of {symmetry!r}; the nearest "
            f"are {channels // order * order} and {(channels // order + 1) * order}"
        )
    return channels // order


def _check_stored(layer: Any) -> None:
    """Refuse a normalized weight, and one for other numbers of fields than the layer's."""
    if layer._modules or layer._forward_pre_hooks:
        check_normalized(layer)
    expected = (layer.out_fields, layer.in_fields // getattr(layer, "groups", 1))
    if tuple(layer.weight.shape[:2]) != expected:
        raise ValueError(
            f"{type(layer).__name__}: weight has shape {tuple(layer.weight.shape)}, expected {expected} in front: "
            "(out_fields, in_fields / groups, elements, *kernel)"
        )


class _Fields:
    """Base class of the convolutions and the linear layer of fields."""

    weight: Any
    bias: Any
    train: Any
    _spec: Any

    @property
    def spec(self) -> Any:
        """The group, its action on the kernels and the geometry."""
        return GroupSpec.of(self._spec())

    def expanded_bias(self) -> Tensor | None:
        """One bias per filter of `expanded_weight`."""
        return None if self.bias is None else fold.expand_bias(self.bias, self.spec)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        *,
        symmetry: str,
        activation: functional.Activation | None = None,
        init: Init = "project",
    ) -> Self:
        """Convert a plain torch layer of fields, whose weight is projected, rescaled, kept or reset as `init` says.

        Its channels are ordered as in `expanded_weight`. 'project' takes the nearest equivariant weight in the
        Frobenius norm; 'rescale' then scales filters back to their norms (root mean square over a field); 'keep' keeps
        the filters of the identity.
        """
        where = f"{cls.__name__}.from_dense"
        functional.check_choice(where, "init", init, INITS)
        modules = "torch.nn.modules.conv", "torch.nn.modules.linear"
        kind: Any = next(c for c in cls.__mro__ if c.__module__ in modules)
        if not isinstance(layer, kind) or isinstance(layer, Checkpoints):
            raise TypeError(f"{where}: expected torch.nn.{kind.__name__}, got {type(layer).__name__}")
        dense: Any = layer
        make: Any = cls
        names = ("in_features", "out_features") if kind is nn.Linear else ("in_channels", "out_channels")
        options = {"bias": layer.bias is not None} if kind is nn.Linear else _hyperparameters(layer)
        number = options.get("groups", 1)
        label = " / groups" * (number > 1)
        into, out = (number * _fields(where, name + label, getattr(layer, name) // number, symmetry) for name in names)
        options = {name: value for name, value in options.items() if name not in names}
        options |= {"device": dense.weight.device, "dtype": dense.weight.dtype}
        self: Self = make(into, out, symmetry=symmetry, activation=activation, **options)
        with torch.no_grad():
            if init != "reset":
                self._adopt(dense.weight, dense.bias, init)
        self.weight.requires_grad_(dense.weight.requires_grad)
        if dense.bias is not None:
            self.bias.requires_grad_(dense.bias.requires_grad)
        return self.train(layer.training)

    def _adopt(self, weight: Tensor, bias: Tensor | None, init: str) -> None:
        """Copy a dense weight and bias, as `init` says."""
        spec = self.spec
        parts = weight.reshape(spec.groups, spec.order, -1, *weight.shape[1:2], *spec.geometry.kernel_size)
        if init == "keep":
            psi = parts[:, 0].flatten(0, 1).unflatten(1, (spec.order, -1)).transpose(1, 2)
        else:
            psi = fold.project(parts.flatten(0, 2), spec)
        if init == "rescale":
            now = psi.flatten(1).norm(dim=1) * math.sqrt(spec.order)
            norms = parts.transpose(1, 2).flatten(0, 1).flatten(1).norm(dim=1)
            psi *= (norms / now).where(now > 0, 1).view(-1, *[1] * (psi.ndim - 1))
        self.weight.copy_(psi.reshape(self.weight.shape))
        if bias is not None:
            fields = bias.view(spec.groups, spec.order, -1)
            self.bias.copy_((fields[:, 0] if init == "keep" else fields.mean(1)).flatten())


class _GroupConv(_Fields, _SharedConv):
    """Group convolution: y[g, o] = act(sum_{h, c} conv(x[h, c], g w[o, c, g^-1 h]) + b[o]), fields to fields.

    Moving x by an element of the group moves y by it (Cohen and Welling 2016, arXiv 1602.07576). Channels are ordered
    as in a symmetric convolution: channel = element * fields + field. See `functional.group_conv2d`. The stored
    weight is (out_fields, in_fields / groups, elements, *kernel), the bias (out_fields,).

    Args:
        in_fields, out_fields: numbers of fields (channels / elements).
        kernel_size .. padding_mode, device, dtype: as in the torch layer; `groups` counts groups of fields.
        symmetry: the name of a group ('h' ... 'hvz', 'c2', 'c4', 'd4').
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.

    Raises:
        ValueError: a symmetry that does not act on this kernel, or `groups` does not divide the fields.

    >>> lift = nn.SymmetricConv2d(3, 8, 3, symmetry="hv", share_bias=True)  # to 2 fields of 4 elements
    >>> layer = nn.GroupConv2d(2, 5, 3, symmetry="hv")
    >>> layer.weight.shape, layer(lift(torch.randn(2, 3, 9, 9))).shape
    (torch.Size([5, 2, 4, 3, 3]), torch.Size([2, 20, 5, 5]))
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "__signature__"):
            names = {"in_channels": "in_fields", "out_channels": "out_fields"}
            parameters = cls.__signature__.parameters.values()
            renamed = [p.replace(name=names.get(p.name, p.name)) for p in parameters]
            cls.__signature__ = cls.__signature__.replace(parameters=renamed)

    def __init__(
        self,
        in_fields: int,
        out_fields: int,
        *args: Any,
        symmetry: str,
        activation: functional.Activation | None = None,
        **kwargs: Any,
    ) -> None:
        where, order = type(self).__name__, _order(type(self).__name__, symmetry)
        into, out = functional.check_counts(where, 0, in_fields=in_fields, out_fields=out_fields)
        super().__init__(order * into, order * out, *args, activation=activation, **kwargs)
        if into % self.groups or out % self.groups:
            raise ValueError(f"{where}: groups={self.groups} must divide in_fields={into} and out_fields={out}")
        self.in_fields, self.out_fields, self.symmetry = into, out, Symmetry(symmetry)
        self._spec()  # raises an error if there is none
        self._store((out, into // self.groups, order, *self.kernel_size), out)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Hide the fifth axis of a 2-D weight from ``to(memory_format=torch.channels_last)``, which refuses it."""
        return super()._apply(lambda t: fn(t.flatten(2)).view(t.shape) if t.ndim == 5 else fn(t), recurse)

    def _spec(self, output_padding: Any = None) -> str:
        return functional.group_text(type(self).__name__, self.symmetry.name, self.groups, *self._sizes())

    def _run(self, input: Tensor, spec: str) -> Tensor:
        _check_stored(self)
        x = input if self.padding_mode == "zeros" else self._padded(input)
        return groups.group_conv(type(self).__name__, spec, x, self.weight, self.bias, self.activation)

    def problem(self, x: Tensor, target: str, training: bool) -> Any:
        """The problem to plan for a call on x; only the shape and dtype of x matter."""
        bias = None if self.bias is None else self.bias.shape
        form = (self.weight.shape, bias, target, plan.dtype_name(x), training)
        return groups.problem(type(self).__name__, self._spec(), self._padded_shape(x), *form)

    def _options(self) -> str:
        return f"symmetry={self.symmetry.name!r}"

    def expanded_weight(self) -> Tensor:
        """The dense filters that define the layer, differentiable.

        They are for channels sorted by group of fields (if there are several), then by element, then by field.
        """
        return fold.expand(gathered(self.weight), self.spec)

    def to_dense(self) -> nn.Module:
        """The plain torch layer with equal outputs; with groups, between two re-orderings of the channels."""
        layer = self._dense(self.expanded_weight(), self.expanded_bias())
        if self.groups > 1:
            layer = torch.fx.symbolic_trace(_Regrouped(layer, self.symmetry.order)).train(self.training)
        return with_activation(layer, self.activation)


class _Regrouped(nn.Module):
    """A dense convolution between two re-orderings of the channels, for `torch.fx` to trace."""

    def __init__(self, conv: Any, order: int) -> None:
        super().__init__()
        self.conv = conv
        self.order = order
        self.channel = -1 - len(conv.kernel_size)

    def forward(self, x):  # type: ignore[no-untyped-def]  # torch.fx cannot pickle annotations that are strings
        at, groups = self.channel, self.conv.groups
        x = x.unflatten(at, (self.order, groups, -1)).transpose(at - 2, at - 1).flatten(at - 2, at)
        y = self.conv(x).unflatten(at, (groups, self.order, -1))
        return y.transpose(at - 2, at - 1).flatten(at - 2, at)


class GroupConv1d(_GroupConv, nn.Conv1d):
    pass


class GroupConv2d(_GroupConv, nn.Conv2d):
    pass


class GroupConv3d(_GroupConv, nn.Conv3d):
    pass


class GroupLinear(_Fields, Checkpoints, nn.Linear):
    """Group convolution without space, on the last axis: y[g, o] = act(sum_{h, c} w[o, c, g^-1 h] x[h, c] + b[o]).

    The stored weight is (out_fields, in_fields, elements), the bias (out_fields,). See `GroupConv2d`.

    >>> nn.GroupLinear(2, 5, symmetry="hv")(torch.randn(3, 8)).shape
    torch.Size([3, 20])
    """

    def __init__(
        self,
        in_fields: int,
        out_fields: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        symmetry: str,
        activation: functional.Activation | None = None,
    ) -> None:
        where = "GroupLinear"
        into, out = functional.check_counts(where, 1, in_fields=in_fields, out_fields=out_fields)
        functional.check_activation(where, activation)
        order = _order(where, symmetry)
        super().__init__(order * into, order * out, bias, device="meta", dtype=dtype)
        self.in_fields, self.out_fields = into, out
        self.symmetry = Symmetry(symmetry)
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out, into, order, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-a, a) with a = 1 / sqrt(in_features), as `torch.nn.Linear` initialises."""
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    def _spec(self) -> str:
        return functional.linear_text("GroupLinear", self.symmetry.name)

    def forward(self, input: Tensor) -> Tensor:
        _check_stored(self)
        return groups.group_linear("GroupLinear", self._spec(), input, self.weight, self.bias, self.activation)

    def problem(self, x: Tensor, target: str, training: bool) -> plan.GroupProblem:
        """The problem to plan for a call on x."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"GroupLinear: expected an input (..., {self.in_features}), got {tuple(x.shape)}")
        ones = (1,) * len(self.spec.geometry.kernel_size)
        bias = None if self.bias is None else self.bias.shape
        form = ((*self.weight.shape, *ones), bias, target, plan.dtype_name(x), training)
        return groups.problem("GroupLinear", self._spec(), (math.prod(x.shape[:-1]), x.shape[-1], *ones), *form)

    def _dense_shapes(self) -> Mapping[str, Sequence[int]]:
        return {"weight": (self.out_features, self.in_features), "bias": (self.out_features,)}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, symmetry={self.symmetry.name!r}"
        return text + (f", activation={self.activation!r}" if self.activation else "")

    def expanded_weight(self) -> Tensor:
        """The dense matrix (out_features, in_features), differentiable."""
        spec = self.spec
        ones = (1,) * len(spec.geometry.kernel_size)
        return fold.expand(gathered(self.weight).reshape(*self.weight.shape, *ones), spec).flatten(1)

    def to_dense(self) -> nn.Module:
        """The plain `torch.nn.Linear` with equal outputs (followed by the activation's module, if there is one)."""
        bias = self.expanded_bias()
        layer = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(self.expanded_weight().detach().clone(), learns(self))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), learns(self, bias=True))
        return with_activation(layer.train(self.training), self.activation)


# --- normalisation, pooling, dropout ----------------------------------------------------------------------------------


def _check_fields(where: str, x: Tensor, order: int, fields: int | None) -> None:
    if x.ndim < 2 or x.shape[1] % order or fields not in (None, x.shape[1] // order):
        expected = f"{order * fields}" if fields is not None else f"a multiple of {order}"
        raise ValueError(f"{where}: expected x (N, C, ...) with {expected} channels, got {tuple(x.shape)}")


class _GroupBatchNorm(BatchNorm):
    """Batch normalisation of fields: the elements of a field share their statistics, weight and bias.

    Args:
        fields: the number of fields (channels / elements), `num_features` of the torch layer.
        symmetry: the name of the group; the other arguments of the torch layer follow.

    >>> nn.GroupBatchNorm2d(2, "hv").weight.shape  # of 2 fields, 8 channels
    torch.Size([2])
    """

    def __init__(
        self,
        fields: int,
        symmetry: str,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        where = type(self).__name__
        (fields,) = functional.check_counts(where, 1, fields=fields)
        order = _order(where, symmetry)
        super().__init__(fields, eps, momentum, affine, track_running_stats, device, dtype)
        self.symmetry, self.order = Symmetry(symmetry), order

    def _check_input_dim(self, input: Tensor) -> None:
        """Checked in `forward`, which calls the torch layer with fields in place of channels."""

    def forward(self, input: Tensor) -> Tensor:
        _check_fields(type(self).__name__, input, self.order, self.num_features)
        if input.is_contiguous():  # elements become samples
            x = input.view(-1, self.num_features, *input.shape[2:])
            return super().forward(x).view(input.shape)
        rows = input.movedim(1, -1)
        return super().forward(rows.reshape(-1, self.num_features)).view(rows.shape).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, symmetry={self.symmetry.name!r}"

    def to_dense(self) -> nn.Module:
        """The plain torch layer with equal outputs in evaluation; in training it could not share statistics."""
        cls: Any = next(c for c in type(self).__mro__ if c.__module__ == "torch.nn.modules.batchnorm")
        if self.training or not self.track_running_stats:
            raise ValueError(
                f"{type(self).__name__}.to_dense: a plain {cls.__name__} does not share statistics between the "
                "elements of a field; call eval() first, on a layer with track_running_stats=True"
            )
        layer: nn.Module = cls(self.order * self.num_features, self.eps, self.momentum, self.affine)
        own = self.state_dict()
        layer.load_state_dict({k: v.repeat(self.order) if v.ndim else v for k, v in own.items()}, assign=True)
        return layer.requires_grad_(learns(self)).eval()


class GroupBatchNorm1d(_GroupBatchNorm, nn.BatchNorm1d):
    __doc__ = _GroupBatchNorm.__doc__ or ""


class GroupBatchNorm2d(_GroupBatchNorm, nn.BatchNorm2d):
    __doc__ = _GroupBatchNorm.__doc__ or ""


class GroupBatchNorm3d(_GroupBatchNorm, nn.BatchNorm3d):
    __doc__ = _GroupBatchNorm.__doc__ or ""


class GroupPool(nn.Module):
    """Reduce every field to one channel, (N, |G| F, ...) -> (N, F, ...): moving x moves only the positions of y.

    Args:
        symmetry: the name of the group.
        reduce: 'max', 'mean' or 'sum'.

    >>> nn.GroupPool("hv")(torch.randn(3, 8, 5, 5)).shape
    torch.Size([3, 2, 5, 5])
    """

    def __init__(self, symmetry: str, reduce: Literal["max", "mean", "sum"] = "max") -> None:
        super().__init__()
        self.order = _order("GroupPool", symmetry)
        functional.check_choice("GroupPool", "reduce", reduce, ("max", "mean", "sum"))
        self.symmetry, self.reduce = Symmetry(symmetry), reduce

    def forward(self, input: Tensor) -> Tensor:
        _check_fields("GroupPool", input, self.order, None)
        return self.plain(input)

    def plain(self, x: Tensor) -> Tensor:
        """The computation without checks, for `torch.fx`."""
        return REDUCTIONS[self.reduce](x.unflatten(1, (self.order, -1)).movedim(1, 0))

    def extra_repr(self) -> str:
        return f"symmetry={self.symmetry.name!r}, reduce={self.reduce!r}"


class GroupDropout(nn.Module):
    """In training, set whole fields of a sample to zero with probability p, and divide the others by 1 - p.

    All elements and positions of a field share one random choice, so that with equal random numbers moving x moves y.

    Args:
        p: the probability.
        symmetry: the name of the group.

    >>> y = nn.GroupDropout(symmetry="hv")(torch.ones(1, 8, 1, 1)).view(4, 2)  # 4 elements, 2 fields
    >>> bool((y == y[0]).all())
    True
    """

    def __init__(self, p: float = 0.5, *, symmetry: str) -> None:
        super().__init__()
        self.order = _order("GroupDropout", symmetry)
        self.drop = nn.Dropout(p)
        self.symmetry = Symmetry(symmetry)

    def forward(self, input: Tensor) -> Tensor:
        _check_fields("GroupDropout", input, self.order, None)
        return self.plain(input) if self.training else input

    def plain(self, x: Tensor) -> Tensor:
        """The computation without checks, for `torch.fx`."""
        one = x.unflatten(1, (self.order, -1))[:, 0, ..., None].flatten(2)[..., 0]  # one value per field
        return torch.einsum("nc...,nc->nc...", x, self.drop(torch.ones_like(one)).repeat(1, self.order))

    def extra_repr(self) -> str:
        return f"symmetry={self.symmetry.name!r}"


#: The layers of this file that are not convolutions.
GROUP_LAYERS = (GroupLinear, _GroupBatchNorm, GroupPool, GroupDropout)

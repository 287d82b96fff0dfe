"""Convolution modules with shared weights. Each subclasses the torch layer it replaces and stores fewer weights."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonsym import functional, ops, plan, reference, shift
from tritonsym._compat import ConvNd
from tritonsym.packing import gathered
from tritonsym.spec import ConvSpec
from tritonsym.symmetry import FilterLayout, Symmetry, parity_axes, tap_orbits

if TYPE_CHECKING:
    from typing_extensions import Self

Init = Literal["rescale", "project", "keep", "reset"]
INITS: tuple[str, ...] = get_args(Init)
ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


#: Torch modules that read the weight and bias of a layer to fuse or convert it.
DENSE_READERS = ("torch.nn.utils.fusion", "torch.utils.mkldnn")


def with_activation(layer: nn.Module, activation: str | None) -> nn.Module:
    """`layer`, followed by the torch module of the activation if there is one."""
    if activation is None:
        return layer
    return nn.Sequential(layer, ACTIVATION_MODULES[activation]()).train(layer.training)


def learns(module: nn.Module, bias: bool = False) -> bool:
    """Whether a weight of a layer (or its bias), or a parameter of its parametrization, requires a gradient."""
    parameters = module.named_parameters()
    return any(p.requires_grad for name, p in parameters if ("bias" in name.split(".")) == bias)


def in_format_of(dense: Tensor, stored: Tensor) -> Tensor:
    """The stored weight, channels-last if the dense weight is."""
    return shift.channels_last(stored) if dense.ndim == stored.ndim and shift.is_last(dense) else stored


def check_normalized(module: nn.Module) -> None:
    """Refuse to normalize a stored weight as if it were the dense one, whose norm counts all images and ties."""
    lists = module._modules.get("parametrizations")
    held = [p for tensor in (lists.children() if lists is not None else ()) for p in tensor.children()]
    for normalizer in (*held, *module._forward_pre_hooks.values()):
        if (kind := type(normalizer).__name__.strip("_")) in ("SpectralNorm", "Orthogonal"):
            name = type(module).__mro__[1 if held else 0].__name__
            raise ValueError(
                f"{name}: {kind} acts on the stored weight, not on the filters it "
                "stands for, expanded_weight(), whose norm differs; remove it, or use it on a plain layer"
            )


class Checkpoints(nn.Module):
    """A layer whose stored weight is not the dense one.

    If a shape in a checkpoint differs, `load_state_dict` leaves the layer unchanged, and its error names every key and
    a fix. Tools that mistake the stored parameters for those of a plain layer get an error.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and not torch.compiler.is_compiling():
            reader = sys._getframe(1).f_globals.get("__name__")
            if reader in DENSE_READERS:
                raise ValueError(
                    f"{type(self).__name__}: {reader} takes the stored weight for that of a plain layer, and would "
                    "compute something else; pass it tritonsym.materialize(model) instead"
                )
        return super().__getattr__(name)

    def _dense_shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of the torch layer's parameters, by name."""
        return {}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        cls, errors = type(self).__name__, []
        for name, parameter in self.named_parameters(recurse=False):
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or value.shape == parameter.shape:
                continue
            fix = "the checkpoint was saved by a layer with other sizes or another symmetry"
            if tuple(value.shape) == self._dense_shapes().get(name):
                fix = (
                    f"that is the dense shape: load it into the plain model, then convert with {cls}.from_dense(layer, "
                    "...) or replace_layers"
                )
            errors.append(
                f"size mismatch for {prefix}{name}: {cls} expected {tuple(parameter.shape)}, got {tuple(value.shape)}; "
                + fix
            )
        if errors:
            args[-1].extend(errors)
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)


@cache
def _arguments(torch_class: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(torch_class)


def _hyperparameters(layer: Any) -> dict[str, Any]:
    """The arguments that construct a convolution like this one."""
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    options = {name: getattr(layer, name) for name in [*names, *["output_padding"] * layer.transposed]}
    return {**options, "bias": layer.bias is not None}


_MINIMUM = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0, "output_padding": 0}


class _SharedConv(Checkpoints, ConvNd):
    """Base class of the convolutions. The bias has one value per output channel unless a subclass says otherwise."""

    __signature__: inspect.Signature

    def __init_subclass__(cls) -> None:
        """Give a subclass of a torch layer the arguments of that layer, then its own keywords, and our docstring."""
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if "__init__" in vars(cls):
            cls.__signature__ = inspect.Signature(own)
        elif len(cls.__bases__) > 1:
            torchs = _arguments(cls._dense_class()).parameters.values()
            cls.__signature__ = inspect.Signature([*torchs, *(p for p in own if p.kind is p.KEYWORD_ONLY)])
            cls.__doc__ = cls.__doc__ or cls.__base__.__doc__

    def __init__(self, *args: Any, activation: str | None, **kwargs: Any) -> None:
        where, ndim = type(self).__name__, int(self._dense_class().__name__[-2])
        try:
            given = _arguments(self._dense_class()).bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{where}: {error}") from None
        functional.check_counts(where, 0, in_channels=given["in_channels"], out_channels=given["out_channels"])
        functional.check_counts(where, 1, groups=given.get("groups", 1))
        self.__dict__["_device"] = given.pop("device", None)
        # on the meta device torch checks and stores its arguments, but its dense weight takes no memory
        super().__init__(**{name: functional.as_ints(value) for name, value in given.items()}, device="meta")
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if self.transposed or not isinstance(value, str):
                functional.check_sizes(where, name, value, ndim, minimum)
        functional.check_activation(where, activation)
        self.activation = activation

    def _store(self, weight: Sequence[int], bias: int, free: Sequence[int] | None = None) -> None:
        """Replace torch's parameters by ones of these shapes."""
        made = {"device": self.__dict__.pop("_device"), "dtype": self.weight.dtype}
        self.weight = nn.Parameter(torch.empty(weight, **made))
        if self.bias is not None:
            self.bias = nn.Parameter(torch.empty(bias, **made))
        if free is not None:
            self.free_weight = nn.Parameter(torch.empty(free, **made)) if free[0] else None
        self.reset_parameters()

    def _fan_in(self) -> int:
        """Fan-in of the dense filter, as torch counts it."""
        return (self.out_channels if self.transposed else self.in_channels) // self.groups * math.prod(self.kernel_size)

    def reset_parameters(self) -> None:
        """U(-a, a) with a = 1 / sqrt(fan-in of the dense filter): the variance that the torch layer starts with."""
        fan_in = self._fan_in()
        for parameter in self.parameters(recurse=False):
            if fan_in > 0:
                nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _spec(self) -> str:
        """`ConvSpec.text` from the current attributes, without padding other than by zeros, which is applied before."""
        raise NotImplementedError

    @property
    def spec(self) -> ConvSpec:
        """Which stored weight, with which sign, stands at every tap of every dense filter."""
        return ConvSpec.of(self._spec())

    def _sizes(self, output_padding: Any = None) -> tuple[Any, ...]:
        """The arguments of `functional._geometry`; padding other than by zeros is applied before."""
        padding = self.padding if self.padding_mode == "zeros" else 0
        sizes = self.kernel_size, self.stride, padding, self.dilation
        return (*sizes, output_padding or self.output_padding) if self.transposed else sizes

    def _stored(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def _scale(self) -> int | None:
        """The factor of the orbit mean, if the layer convolves with that mean of a stored filter; else None."""
        return None

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input, self._spec())

    def _run(self, input: Tensor, spec: str) -> Tensor:
        if self._modules or self._forward_pre_hooks:
            check_normalized(self)
        x = input if self.padding_mode == "zeros" else self._padded(input)
        return ops.conv(type(self).__name__, spec, x, self._stored(), self.bias, self.activation, self._scale())

    def _padded(self, x: Tensor) -> Tensor:
        """x with padding other than by zeros applied."""
        functional.check_input(type(self).__name__, x, self.in_channels, len(self.kernel_size))
        padded = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        channels = -len(self.kernel_size) - 1
        if shift.is_last(x if x.ndim == 1 - channels else x[None]):  # stay channels-last
            padded = padded.movedim(channels, -1).contiguous().movedim(-1, channels)
        return padded

    def problem(self, x: Tensor, target: str, training: bool) -> plan.ConvProblem:
        """The problem to plan for a call on x; only the shape, dtype and memory format of x matter."""
        where, sizes, spec, scale = type(self).__name__, self._padded_shape(x), self.spec, self._scale()
        shapes = [ops.orbit_mean(where, w, spec, scale).shape for w in self._stored()]
        form = (shapes, None if self.bias is None else self.bias.shape, target, plan.dtype_name(x))
        is_last = shift.is_last(x[None] if x.ndim == len(self.kernel_size) + 1 else x)
        return plan.conv_problem(where, self._spec(), sizes, *form, training, is_last, self._dense_factor())

    def _padded_shape(self, x: Tensor) -> list[int]:
        """The shape of x, batched and padded."""
        ndim = len(self.kernel_size)
        sizes = [1, *x.shape] if x.ndim == ndim + 1 else [*x.shape]
        if self.padding_mode != "zeros":
            sides = self._reversed_padding_repeated_twice
            for axis in range(min(ndim, len(sizes) - 2)):
                sizes[-1 - axis] += sides[2 * axis] + sides[2 * axis + 1]
        return sizes

    def _dense_shape(self) -> tuple[int, ...]:
        out, into = self.out_channels, self.in_channels
        ends = (into, out // self.groups) if self.transposed else (out, into // self.groups)
        return (*ends, *self.kernel_size)

    def _dense_shapes(self) -> Mapping[str, Sequence[int]]:
        return {"weight": self._dense_shape(), "bias": (self.out_channels,)}

    def _options(self) -> str:
        """What `extra_repr` adds to that of torch."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), self._options()]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(part for part in parts if part)

    def expanded_weight(self) -> Tensor:
        """The dense filters that define the layer, differentiable; gathered if the weight is sharded (DTensor)."""
        spec = self.spec
        return reference.expand(spec, [reference.orbit_mean(gathered(w), spec, self._scale()) for w in self._stored()])

    def expanded_bias(self) -> Tensor | None:
        """One bias per filter of `expanded_weight`."""
        return self.bias

    def _dense_factor(self) -> int:
        """How many dense kernels the reference merges into one before it convolves."""
        return 1

    @classmethod
    def _dense_class(cls) -> Any:
        """The torch layer this class subclasses."""
        return next(c for c in cls.__mro__ if c.__module__ == "torch.nn.modules.conv")

    def to_dense(self) -> nn.Module:
        """The plain torch layer with equal outputs (followed by the activation's module, if there is one)."""
        return with_activation(self._dense(self.expanded_weight(), self.expanded_bias()), self.activation)

    def _dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The torch layer this class subclasses, with these parameters."""
        out = weight.shape[1] * self.groups if self.transposed else weight.shape[0]
        options = {**_hyperparameters(self), "out_channels": out, "bias": bias is not None, "device": "meta"}
        layer: nn.Module = self._dense_class()(**options)
        layer.weight = nn.Parameter(in_format_of(self._stored()[-1], weight.detach().clone()), learns(self))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), learns(self, bias=True))
        return layer.train(self.training)

    @classmethod
    def _from_dense(cls, layer: Any, init: Init, options: Mapping[str, Any]) -> Self:
        """A layer of this class with the hyper-parameters of `layer` and, unless init is 'reset', its weights."""
        functional.check_choice(f"{cls.__name__}.from_dense", "init", init, INITS)
        if not isinstance(layer, cls._dense_class()) or isinstance(layer, _SharedConv):
            expected = f"torch.nn.{cls._dense_class().__name__}"
            raise TypeError(f"{cls.__name__}.from_dense: expected {expected}, got {type(layer).__name__}")
        self = cls(**_hyperparameters(layer), device=layer.weight.device, dtype=layer.weight.dtype, **options)
        with torch.no_grad():
            if init != "reset":
                self._adopt(layer.weight, layer.bias, init)
            for parameter in self.parameters():
                parameter.data = in_format_of(layer.weight, parameter)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.requires_grad and layer.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)
        return self.train(layer.training)

    def _adopt(self, weight: Tensor, bias: Tensor | None, init: str) -> None:
        """Copy a dense weight and bias: the weight projected, or ('keep') its values at the stored filters and taps."""
        found = (reference.keep if init == "keep" else reference.project)(self.spec, weight)
        if init == "rescale":
            found = reference.rescale(self.spec, weight, found)
        for stored, value in zip(self._stored(), found, strict=True):
            stored.copy_(value)
        if bias is not None:
            self.bias.copy_(bias)  # type: ignore[union-attr]


class _OrbitConv(_SharedConv):
    """Base class of convolutions, direct and transposed, whose filters come in orbits."""

    layout: FilterLayout
    share_bias: bool

    def __init__(
        self,
        *args: Any,
        symmetry: str | Mapping[str, int | str] | None,
        share_bias: bool = False,
        activation: functional.Activation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, activation=activation, **kwargs)
        where = type(self).__name__
        self.symmetry = dict(symmetry) if isinstance(symmetry, Mapping) else symmetry
        self.layout = FilterLayout.parse(symmetry, self.out_channels, self.groups, where)
        self.layout.check_kernel(self.kernel_size, where)
        for key, _ in self.layout.orbits:
            if idle := key.idle_axes(self.kernel_size):
                warnings.warn(
                    f"{where}: kernel_size={self.kernel_size} is 1 along axis {idle!r} of symmetry {key.name!r}, so "
                    "images of a filter are identical copies",
                    stacklevel=2,
                )
        self.share_bias = share_bias
        stored = self.layout.stored_channels
        ends = (
            (self.in_channels, stored // self.groups) if self.transposed else (stored, self.in_channels // self.groups)
        )
        self._store((*ends, *self.kernel_size), stored if share_bias else self.out_channels)

    def _spec(self, output_padding: tuple[int, ...] | None = None) -> str:
        where, stored, sizes = type(self).__name__, self.layout.stored_channels, self._sizes(output_padding)
        return functional.orbit_text(where, self.layout.text, stored, self.groups, *sizes)

    def expanded_bias(self) -> Tensor | None:
        """One bias per output channel."""
        if self.bias is None or not self.share_bias:
            return self.bias
        return reference.expand_bias(self.bias, self.spec)

    def _adopt(self, weight: Tensor, bias: Tensor | None, init: str) -> None:
        shared = bias is not None and self.share_bias
        super()._adopt(weight, reference.project_bias(bias, self.spec) if shared else bias, init)  # type: ignore[arg-type]

    def _options(self) -> str:
        text = f"symmetry={str(self.layout)!r}"
        return text + ", share_bias=True" if self.share_bias and self.bias is not None else text

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        *,
        symmetry: str | Mapping[str, int | str] | None,
        share_bias: bool = False,
        activation: functional.Activation | None = None,
        init: Init = "rescale",
        order: Literal["element", "field"] = "element",
    ) -> Self:
        """Convert a plain torch layer, whose weight is projected, rescaled, kept or reset as `init` says.

        'project' takes the nearest symmetric weight in the Frobenius norm, which averages filters; 'rescale' then
        scales filters back to their norms; 'keep' keeps the first filters of every group as base and free filters.
        ``order="field"``: the dense layer has every orbit in one piece (field * elements + element). The outputs of the
        new layer keep the order of `FilterLayout`; ``y[:, layer.layout.by_field]`` has that of the dense layer.
        """
        functional.check_choice(f"{cls.__name__}.from_dense", "order", order, ("element", "field"))
        options = {"symmetry": symmetry, "share_bias": share_bias, "activation": activation}
        self = cls._from_dense(layer, init, options)
        if order == "field" and init != "reset":
            dense: Any = layer
            by_element = torch.tensor(self.layout.by_field, device=dense.weight.device).argsort()
            with torch.no_grad():
                inside = by_element[: self.out_channels // self.groups]
                weight = dense.weight[:, inside] if self.transposed else dense.weight[by_element]
                self._adopt(weight, None if dense.bias is None else dense.bias[by_element], init)
        return self


class _SymmetricConv(_OrbitConv):
    """Convolution whose filters come in orbits: base filters and their mirrored or rotated images, and free filters.

    y = act(conv(x, expanded_weight()) + expanded_bias()); the stored weight is (stored filters, in/groups, *kernel).

    Args:
        in_channels .. padding_mode, device, dtype: as in the torch layer.
        symmetry: a name (every filter), a mapping from names to counts of OUTPUT filters or percents, e.g.
            ``{'h': 2, 'v': 4, 'hv': '50%'}``, or None; the remaining filters are free. See `FilterLayout` for the
            order of the output channels and `Symmetry` for the names.
        share_bias: one bias per stored filter, shared by its images.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.

    Raises:
        ValueError: unknown key, a count that does not fill whole orbits, more filters than `out_channels`, or a
            symmetry that does not act on this kernel size.

    Warns when a flip along a kernel axis of size 1 makes identical copies.

    By default depthwise layers and narrow groups use the reference, as do float64 and complex numbers on the CPU. In
    training the activation is not fused, since its gradient needs its input. With stride 2 and an even input size, one
    end of the input is left over, so the output for a mirrored image is not the mirrored output; with odd sizes it is.
    Tools that take `weight` for the dense one, or trace into the layer, need ``to_dense()``.

    >>> layer = nn.SymmetricConv2d(3, 8, 3, padding=1, symmetry="hv")
    >>> layer.weight.shape, layer.expanded_weight().shape, layer(torch.randn(2, 3, 9, 9)).shape
    (torch.Size([2, 3, 3, 3]), torch.Size([8, 3, 3, 3]), torch.Size([2, 8, 9, 9]))
    """


class SymmetricConv1d(_SymmetricConv, nn.Conv1d):
    pass


class SymmetricConv2d(_SymmetricConv, nn.Conv2d):
    pass


class SymmetricConv3d(_SymmetricConv, nn.Conv3d):
    pass


class _SymmetricConvTranspose(_OrbitConv):
    """Transposed convolution whose filters come in orbits; the stored weight is (in, stored filters/groups, *kernel).

    y = act(conv_transpose(x, expanded_weight()) + expanded_bias()); the arguments are those of the torch layer,
    then those of `SymmetricConv2d`. ``forward`` takes `output_size` like the torch layer.

    >>> layer = nn.SymmetricConvTranspose2d(3, 8, 4, stride=2, padding=1, symmetry="hv")
    >>> layer.weight.shape, layer(torch.randn(2, 3, 9, 9)).shape
    (torch.Size([3, 2, 4, 4]), torch.Size([2, 8, 18, 18]))
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is None:
            return self._run(input, self._spec())
        functional.check_input(type(self).__name__, input, self.in_channels, len(self.kernel_size))
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        return self._run(input, self._spec(tuple(output_padding)))


class SymmetricConvTranspose1d(_SymmetricConvTranspose, nn.ConvTranspose1d):
    pass


class SymmetricConvTranspose2d(_SymmetricConvTranspose, nn.ConvTranspose2d):
    pass


class SymmetricConvTranspose3d(_SymmetricConvTranspose, nn.ConvTranspose3d):
    pass


class _TiedConv(_SharedConv):
    """Convolution whose filters equal their own image (even) or its negative (odd), with `free` ordinary ones.

    expanded_weight()[u, c, k] = sign[k] weight[u, c, slot[k]] with the tap orbits of `tritonsym.symmetry.tap_orbits`;
    `weight` is (out - free, in/groups, orbits), and `free_weight` is (free, in/groups, *kernel) or None. Inside
    every group the tied filters come first.

    Args:
        in_channels .. padding_mode, device, dtype: as in the torch layer.
        symmetry: one name, incl. 'radial' (taps at equal distance from the centre share a value) and 'radial:WIDTH'.
        parity: 'even' (w = its image), 'odd' (-1 under every reflection, so 1 under a product of two and under
            rotations), or one per axis: ``{'h': 'odd', 'v': 'even'}``. Taps that the sign forces to zero are not
            stored.
        free: the number of ordinary filters.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.

    Raises:
        ValueError: a symmetry that does not act on this kernel, a parity that leaves no tap, a bad `free`.

    >>> layer = nn.TiedConv2d(1, 2, 3, symmetry="hv", parity={"h": "odd"}, bias=False)  # derivatives along a row
    >>> layer.weight.shape, bool((layer.expanded_weight() == -layer.expanded_weight().flip(-1)).all())
    (torch.Size([2, 1, 2]), True)
    """

    free_weight: nn.Parameter | None

    def __init__(
        self,
        *args: Any,
        symmetry: str,
        parity: str | Mapping[str, str] = "even",
        free: int = 0,
        activation: functional.Activation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, activation=activation, **kwargs)
        where = type(self).__name__
        self.symmetry = Symmetry(symmetry)
        self.symmetry.check_kernel(self.kernel_size, where)
        self.odd = parity_axes(self.symmetry, parity, where)
        self.parity = dict(parity) if isinstance(parity, Mapping) else parity
        self.orbits = tap_orbits(self.symmetry, self.kernel_size, self.odd, where)
        if parity == "odd" and not self.odd:
            warnings.warn(
                f"{where}: {symmetry!r} has no reflections, so parity='odd' is the same as 'even'", stacklevel=2
            )
        (free,) = functional.check_counts(where, 0, free=free)
        out, into = self.out_channels, self.in_channels // self.groups
        if not 0 <= free <= out or free % self.groups:
            raise ValueError(
                f"{where}: free={free} must be a multiple of groups={self.groups} from 0 to out_channels={out}"
            )
        self.free = free
        self._store((out - free, into, len(self.orbits)), out, (free, into, *self.kernel_size))
        self.weight.requires_grad_(free < out)  # empty, it never gets a gradient, which DDP waits for

    def _spec(self) -> str:
        where, name, tied = type(self).__name__, self.symmetry.name, self.out_channels - self.free
        parity: Any = tuple(self.parity.items()) if isinstance(self.parity, dict) else self.parity
        return functional.tied_text(where, name, parity, tied, self.free, self.groups, *self._sizes())

    def _stored(self) -> tuple[Tensor, ...]:
        return functional.stored_tensors(self.weight, self.free_weight)

    def _options(self) -> str:
        text = f"symmetry={self.symmetry.name!r}"
        if self.parity != "even":
            text += f", parity={self.parity!r}"
        return text + (f", free={self.free}" if self.free else "")

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        *,
        symmetry: str,
        parity: str | Mapping[str, str] = "even",
        free: int = 0,
        activation: functional.Activation | None = None,
        init: Init = "rescale",
    ) -> Self:
        """Convert a plain torch layer, whose weight is projected, rescaled, kept or reset as `init` says.

        'project' takes the signed mean over every tap orbit; 'rescale' then scales filters back to their norms; 'keep'
        keeps the first tap of every orbit. The last filters of every group become the free ones, unchanged.
        """
        options = {"symmetry": symmetry, "parity": parity, "free": free, "activation": activation}
        return cls._from_dense(layer, init, options)


class TiedConv1d(_TiedConv, nn.Conv1d):
    pass


class TiedConv2d(_TiedConv, nn.Conv2d):
    pass


class TiedConv3d(_TiedConv, nn.Conv3d):
    pass


class _OrbitPoolConv(_SharedConv):
    """Convolve with every filter and all its images, then reduce over the orbit: y = act(reduce_g conv(x, g w) + b).

    With an odd kernel, stride 1 and 'same' padding the response to a flipped image is the flipped response.
    The stored weight is (out, in/groups, *kernel).

    Args:
        in_channels .. padding_mode, device, dtype: as in the torch layer.
        symmetry: the name of a group ('h' ... 'hvz', 'c2', 'c4', 'd4').
        reduce: 'max', 'min', 'sum' or 'mean'. 'sum' and 'mean' are one convolution with the symmetrized kernel. Where
            several images share the maximum, the gradient is divided equally among them (as in ``torch.amax``).
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.

    Raises:
        ValueError: a symmetry that does not act on this kernel, an unknown reduction.

    >>> layer, x = nn.OrbitPoolConv2d(3, 8, 3, symmetry="h"), torch.randn(2, 3, 9, 9)
    >>> torch.testing.assert_close(layer(x.flip(-1)), layer(x).flip(-1))
    """

    def __init__(
        self,
        *args: Any,
        symmetry: str,
        reduce: functional.PoolReduction = "max",
        activation: functional.Activation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, activation=activation, **kwargs)
        where = type(self).__name__
        self.reduce = reduce
        functional.pool_text(where, symmetry, reduce, self.out_channels, self.groups, self.kernel_size, 1, 0, 1)
        self.symmetry = Symmetry(symmetry)
        self._store(self._dense_shape(), self.out_channels)

    def _spec(self) -> str:
        name, filters = self.symmetry.name, self.out_channels
        return functional.pool_text(type(self).__name__, name, self.reduce, filters, self.groups, *self._sizes())

    def _scale(self) -> int | None:
        return functional.orbit_scale(self.symmetry.name, self.reduce)

    def expanded_weight(self) -> Tensor:
        """The dense filters, differentiable.

        'sum' and 'mean': (out, ...), the symmetrized kernels. 'max' and 'min': (out * order, ...), the images of a
        filter next to each other, so that y reduces every `order` consecutive channels.
        """
        dense = super().expanded_weight()
        if self.reduce in ("sum", "mean"):
            return dense
        return dense.unflatten(0, (self.groups, self.symmetry.order, -1)).transpose(1, 2).flatten(0, 2)

    def expanded_bias(self) -> Tensor | None:
        """One bias per filter of `expanded_weight`."""
        if self.bias is None or self.reduce in ("sum", "mean"):
            return self.bias
        return self.bias.repeat_interleave(self.symmetry.order)

    def _dense_factor(self) -> int:
        return self.symmetry.order if self.reduce in ("sum", "mean") else 1

    def to_dense(self) -> nn.Module:
        """The plain torch layers with equal outputs: one convolution, followed by a reduction for 'max' and 'min'."""
        layer = self._dense(self.expanded_weight(), self.expanded_bias())
        if self.reduce in ("max", "min"):
            pooled = _PooledDense(layer, self.symmetry.order, self.reduce)
            layer = torch.fx.symbolic_trace(pooled).train(self.training)
        return with_activation(layer, self.activation)

    def _adopt(self, weight: Tensor, bias: Tensor | None, init: str) -> None:
        if init != "keep" and self.reduce in ("sum", "mean"):
            found = reference.project(self.spec, weight)
            if init == "rescale":
                found = reference.rescale(self.spec, weight, found)
            weight = reference.expand(self.spec, found)
            if self.reduce == "sum":
                weight = weight / self.symmetry.order
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)  # type: ignore[union-attr]

    def _options(self) -> str:
        return f"symmetry={self.symmetry.name!r}, reduce={self.reduce!r}"

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        *,
        symmetry: str,
        reduce: functional.PoolReduction = "max",
        activation: functional.Activation | None = None,
        init: Init = "rescale",
    ) -> Self:
        """Convert a plain torch layer, whose weight is projected, rescaled, kept or reset as `init` says.

        For 'sum' and 'mean', 'project' makes the symmetrized kernel the nearest symmetric one, and 'rescale' also gives
        it the norms of the filters. No dense layer equals 'max' or 'min': there both keep the filters, as 'keep' does.
        """
        options = {"symmetry": symmetry, "reduce": reduce, "activation": activation}
        return cls._from_dense(layer, init, options)


class _PooledDense(nn.Module):
    """A dense convolution and the reduction of every `order` consecutive channels, for `torch.fx` to trace."""

    def __init__(self, conv: Any, order: int, reduce: str) -> None:
        super().__init__()
        self.conv = conv
        self.order = order
        self.reduce = reduce
        self.channel = -1 - len(conv.kernel_size)

    def forward(self, x):  # type: ignore[no-untyped-def]  # torch.fx cannot pickle annotations that are strings
        y = self.conv(x).unflatten(self.channel, (-1, self.order))
        return y.amax(self.channel) if self.reduce == "max" else y.amin(self.channel)


class OrbitPoolConv1d(_OrbitPoolConv, nn.Conv1d):
    pass


class OrbitPoolConv2d(_OrbitPoolConv, nn.Conv2d):
    pass


class OrbitPoolConv3d(_OrbitPoolConv, nn.Conv3d):
    pass

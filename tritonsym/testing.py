"""Checks for your own test suite: does a layer, or a model built of layers, compute what its symmetry promises?

`assert_matches_reference` compares outputs and gradients with the dense torch layers, `assert_symmetric` the weights
with their own images, `assert_equivariant` the output for a moved input with the moved output. All three raise
AssertionError with a message that names the tensor and the place. They leave a module's parameters, gradients,
buffers and training flag, and the global random numbers, as they were.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tritonsym import dispatch, functional, reference
from tritonsym.nn.conv import (
    _OrbitConv,
    _OrbitPoolConv,
    _SharedConv,
    _SymmetricConv,
    _SymmetricConvTranspose,
    _TiedConv,
)
from tritonsym.nn.linear import SymmetricLinear
from tritonsym.nn.pool import GlobalConv1d, TopKPool1d
from tritonsym.nn.symmetrize import Symmetrize
from tritonsym.symmetry import AXES, Element, Symmetry

__all__ = ["assert_equivariant", "assert_matches_reference", "assert_symmetric"]

Named = list[tuple[str, Tensor]]


# --- the dense formulation of every layer -----------------------------------------------------------------------------

_REDUCE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "max": torch.amax,
    "min": torch.amin,
    "sum": torch.sum,
    "mean": torch.mean,
    "logsumexp": torch.logsumexp,
}


def _image(w: Tensor, g: Element, ndim: int) -> Tensor:
    """g w for filters w (..., *kernel), read tap by tap from the table of the element."""
    kernel_size = tuple(w.shape[-ndim:])
    index = torch.tensor(g.slots(kernel_size), device=w.device)
    return w.flatten(-ndim).index_select(-1, index).unflatten(-1, kernel_size)


def _elements(symmetry: Symmetry, kernel_size: Sequence[int]) -> tuple[Element, ...]:
    """The group; for rings the largest one that moves the kernel onto itself."""
    if not symmetry.is_radial:
        return symmetry.elements
    is_square = len(kernel_size) == 2 and len(set(kernel_size)) == 1
    return Symmetry("d4" if is_square else "hvz"[: len(kernel_size)]).elements


def _dense_conv(layer: Any, x: Tensor) -> Tensor:
    y = layer._conv_forward(x, layer.expanded_weight(), layer.expanded_bias())
    return reference.activate(y, layer.activation)


def _dense_conv_transpose(layer: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    ndim = len(layer.kernel_size)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[ndim - 1]
    sizes = (layer.stride, layer.padding, layer.kernel_size, ndim, layer.dilation)
    extra = layer._output_padding(x, output_size, *sizes)
    weight, bias = layer.expanded_weight(), layer.expanded_bias()
    y = conv(x, weight, bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)
    return reference.activate(y, layer.activation)


def _dense_orbit_pool(layer: Any, x: Tensor) -> Tensor:
    ndim, elements = len(layer.kernel_size), layer.symmetry.elements
    images = torch.stack([_image(layer.weight, g, ndim) for g in elements], 1)
    reduce = _REDUCE[layer.reduce]
    if layer.reduce in ("sum", "mean"):  # of the convolutions is the convolution with that of the images
        y = layer._conv_forward(x, reduce(images, 1), None)
    else:
        y = layer._conv_forward(x, images.flatten(0, 1), None)
        y = reduce(y.unflatten(-1 - ndim, (-1, len(elements))), -1 - ndim)
    if layer.bias is not None:
        y = y + layer.bias.view(-1, *[1] * ndim)
    return reference.activate(y, layer.activation)


def _dense_linear(layer: Any, x: Tensor) -> Tensor:
    return reference.activate(F.linear(x, layer.expanded_weight(), layer.bias), layer.activation)


def _dense_global_conv(layer: Any, x: Tensor) -> Tensor:
    """y_i = sum_j W[L + j - i] x_j + b with the wrap-around kernel W of width 2 L + 1."""
    length = x.shape[-1]
    place = torch.arange(length, device=x.device)
    kernel = layer.expanded_weight(length)[..., length + place - place[:, None]]
    y = torch.einsum("ocij,...cj->...oi", kernel, x)
    if layer.bias is not None:
        y = y + layer.bias[:, None]
    return reference.activate(y, layer.activation)


def _dense_topk(layer: Any, x: Tensor) -> Tensor:
    return x.sort(-1, descending=True).values[..., : layer.k]


def _dense_symmetrize(layer: Any, x: Tensor) -> Tensor:
    """One call on all re-orderings, as in the layer: an inner batch norm sees the same batch."""
    orders = functional.orders_of(layer.over, x.shape[layer.dim], "Symmetrize")
    y = layer.inner(torch.cat([x.index_select(layer.dim, torch.tensor(o, device=x.device)) for o in orders]))
    return _REDUCE[layer.reduce](y.unflatten(0, (len(orders), x.shape[0])), 0)


_DENSE: dict[type[nn.Module], Callable[..., Tensor]] = {
    _SymmetricConv: _dense_conv,
    _TiedConv: _dense_conv,
    _SymmetricConvTranspose: _dense_conv_transpose,
    _OrbitPoolConv: _dense_orbit_pool,
    SymmetricLinear: _dense_linear,
    GlobalConv1d: _dense_global_conv,
    TopKPool1d: _dense_topk,
    Symmetrize: _dense_symmetrize,
}


def _dense_twin(module: nn.Module) -> nn.Module:
    """A copy in which every tritonsym layer computes its dense formulation from the same stored parameters."""
    twin = copy.deepcopy(module)
    for layer in twin.modules():
        for kind, forward in _DENSE.items():
            if isinstance(layer, kind):
                layer.forward = MethodType(forward, layer)
    return twin


# --- running modules without a trace ----------------------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    """A copy with the same strides, which a module may change, as it could not a leaf."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        if type(t) is not Tensor or t.layout != torch.strided or t.numel() == 0 or t.is_neg() or t.is_conj():
            return t.clone()
        length = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        memory = t.as_strided((length,), (1,)).clone().untyped_storage()
        return torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, 0, t.shape, t.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _DrawnAs(TorchDispatchMode):
    """Random numbers of `dtype` are those that the dtype `own` gives: from one state every dtype draws others."""

    def __init__(self, own: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.there, self.back = {dtype: own}, {own: dtype}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_place, draws = function._schema.name.endswith("_"), torch.Tag.nondeterministic_seeded in function.tags
        if not draws or (function._schema.is_mutable and not in_place):
            return function(*args, **kwargs)
        there, back = (partial(self._cast, to) for to in (self.there, self.back))
        drawn = function(*tree_map(there, args), **tree_map(there, kwargs))
        return args[0].copy_(drawn) if in_place else tree_map(back, drawn)

    @staticmethod
    def _cast(to: dict[torch.dtype, torch.dtype], value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(to.get(value.dtype, value.dtype))
        return to.get(value, value) if isinstance(value, torch.dtype) else value


def _call(module: nn.Module, args: Sequence[Any]) -> Any:
    """module(*args) on copies of its buffers and inputs; random numbers go on from the same state in every call."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    tensors = [*module.parameters(), *buffers.values(), *(a for a in args if isinstance(a, Tensor))]
    devices = sorted({t.device.index for t in tensors if t.is_cuda})
    copies = [_Copy.apply(a) if isinstance(a, Tensor) else a for a in args]
    with torch.random.fork_rng(devices):
        return functional_call(module, buffers, tuple(copies))


def _is_inexact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _outputs(value: Any, name: str = "output") -> Named:
    """The floating and complex tensors of an output, however nested, with their names."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _outputs(item, f"{name}[{key!r}]")]
    if isinstance(value, list | tuple):
        return [pair for i, item in enumerate(value) for pair in _outputs(item, f"{name}[{i}]")]
    return [(name, value)] if _is_inexact(value) else []


def _argument_names(module: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names[:count] + [f"input {i}" for i in range(len(names), count)]


def _upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed random multiples of 1/8 in [-2, 2], which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randint(-16, 17, tuple(shape), generator=generator) / 8

    parts = [torch.complex(draw(y.shape), draw(y.shape)) if y.is_complex() else draw(y.shape) for y in outputs]
    return [part.to(y) for part, y in zip(parts, outputs, strict=True)]


def _outputs_and_gradients(module: nn.Module, inputs: Sequence[Any]) -> Named:
    args = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
    leaves = [
        (name, arg.requires_grad_())
        for name, arg in zip(_argument_names(module, len(args)), args, strict=True)
        if _is_inexact(arg)
    ]
    leaves += [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        outputs = _outputs(_call(module, args))
    roots = [y for _, y in outputs if y.requires_grad]
    tensors = [t for _, t in leaves]
    if roots and tensors:
        gradients = torch.autograd.grad(roots, tensors, _upstream(roots), materialize_grads=True)
    else:
        gradients = tuple(map(torch.zeros_like, tensors))
    named = [(f"gradient of {name}", gradient) for (name, _), gradient in zip(leaves, gradients, strict=True)]
    return [(name, y.detach()) for name, y in outputs] + named


def _only_outputs(module: nn.Module, inputs: Sequence[Any]) -> Named:
    with torch.no_grad():
        return _outputs(_call(module, inputs))


def _in(dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """A cast of real tensors to `dtype` and of complex ones to its complex twin; None leaves all as they are."""

    def cast(t: Tensor) -> Tensor:
        if dtype is None or not _is_inexact(t):
            return t
        return t.to(dtype.to_complex() if t.is_complex() else dtype)

    return cast


def _truth_and_dense(
    run: Callable[[nn.Module, Sequence[Any]], Named], module: nn.Module, inputs: Sequence[Any]
) -> tuple[Named, Named, float]:
    """Results of the dense formulation in float64 and in the dtype of the module, and a factor for the latter's error.

    No dtype is wider than float64: there the error of the dense layer is estimated as its error in float32, times the
    ratio of the two roundings, times 8, since the truth is as wrong and since libraries sum the two dtypes differently.
    """
    tensors: list[Tensor] = list(module.parameters()) or [value for value in inputs if isinstance(value, Tensor)]
    is_wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    own = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def dense(dtype: torch.dtype | None) -> Named:
        cast = _in(dtype)
        twin = _dense_twin(module)._apply(cast)
        with _DrawnAs(own, dtype) if dtype else nullcontext():
            return run(twin, [cast(value) if isinstance(value, Tensor) else value for value in inputs])

    with dispatch.backend("reference"), dispatch.path("reference"):
        truth = dense(torch.float64)
        naive = dense(torch.float32 if is_wide else None)
    return truth, naive, 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if is_wide else 1.0


# --- comparing --------------------------------------------------------------------------------------------------------


def _largest(t: Tensor) -> float:
    return t.abs().amax().item() if t.numel() else 0.0


def _rms(t: Tensor) -> float:
    return t.abs().square().mean().sqrt().item() if t.numel() else 0.0


def _worst(got: Tensor, expected: Tensor, error: Tensor) -> str:
    """Where, and which two values."""
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return f"worst at index {index}: got {got[index].item()}, expected {expected[index].item()}"


def _assert_exact(where: str, got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape:
        raise AssertionError(f"{where}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    wrong = (got != expected) & ~(got.isnan() & expected.isnan())
    if wrong.any():
        raise AssertionError(
            f"{where}: {int(wrong.sum())} of {wrong.numel()} values differ, allowed none; "
            f"{_worst(got, expected, torch.where(wrong, (got - expected).abs(), 0))}"
        )


def assert_matches_reference(module: nn.Module, *inputs: Any) -> None:
    """Outputs and all gradients of `module` are as right as those of the dense torch layers with the same weights.

    The module runs as it is: mode, dtype, device, and whatever path `tritonsym.explain` would name, with gradients and
    under no_grad. A copy runs the dense torch operation of every tritonsym layer on its expanded weight (for
    `OrbitPoolConv*d` on every image of the filter, or their sum or mean; for `Symmetrize` on every re-ordering), once
    in the same dtype and once in float64, or complex128; both draw the random numbers that the dtype of the module
    gives. Then

        max |got - truth| <= 2 max |dense - truth| + eps max |truth|

    and the same for the root mean square, with eps of the dtype: at most twice as wrong as torch, plus one rounding.
    For a float64 module the error of the dense layer is estimated: 8 eps(float64) / eps(float32) of that in float32.

    Args:
        module: a layer of `tritonsym.nn`, or any model, with or without such layers inside.
        inputs: what to call it with. Gradients are compared for every floating or complex tensor among them and every
            parameter that requires one; the upstream gradient is fixed random numbers. Where values are tied within
            rounding (max, top-k, ReLU at 0) the gradient is not unique: choose other inputs, or a wider dtype.

    Raises:
        AssertionError: a result is wrong; the message names the tensor, its error, what is allowed and the worst index.
        ValueError: nothing can be compared: the dense layers overflow, or the output holds no floating tensor.
    """
    where = "assert_matches_reference"
    got = _outputs_and_gradients(module, inputs)
    truth, naive, factor = _truth_and_dense(_outputs_and_gradients, module, inputs)
    if not any(name.startswith("output") for name, _ in truth):
        raise ValueError(f"{where}: {type(module).__name__} returned no floating or complex tensor to compare")
    _assert_as_right(where, got, truth, naive, factor)
    # inference may take another path, and kernels apply the activation there
    outputs = sum(name.startswith("output") for name, _ in truth)
    inference = _only_outputs(module, inputs)
    _assert_as_right(f"{where} under no_grad", inference, truth[:outputs], naive[:outputs], factor)


def _assert_as_right(where: str, got: Named, truth: Named, naive: Named, factor: float) -> None:
    if len(got) != len(truth):
        raise AssertionError(f"{where}: {len(got)} outputs and gradients, expected {len(truth)}")
    for (_, a), (name, exact), (_, b) in zip(got, truth, naive, strict=True):
        if a.shape != exact.shape:
            raise AssertionError(f"{where}: {name} has shape {tuple(a.shape)}, expected {tuple(exact.shape)}")
        dtype = b.dtype if factor == 1 else exact.dtype
        if a.dtype != dtype:
            raise AssertionError(f"{where}: {name} is {a.dtype}, expected {dtype}")
        if not b.isfinite().all():
            raise ValueError(f"{where}: the dense torch layer itself gives inf or NaN in the {name}; use other inputs")
        error, dense_error = a.to(exact) - exact, b.to(exact) - exact
        for kind, norm in (("max", _largest), ("RMS", _rms)):
            allowed = 2 * factor * norm(dense_error) + torch.finfo(a.dtype).eps * norm(exact)
            if not norm(error) <= allowed:
                raise AssertionError(
                    f"{where}: {name} is wrong: {kind} error {norm(error):.3e} > allowed {allowed:.3e} (twice the "
                    f"error of the dense torch layer, plus one rounding); {_worst(a, exact, error.abs())}"
                )


# --- symmetry of the weights ------------------------------------------------------------------------------------------

Pairs = Iterator[tuple[str, Tensor, Tensor]]


def _orbit_pairs(layer: Any) -> Pairs:
    ndim = len(layer.kernel_size)

    def by_group(w: Tensor) -> Tensor:
        return w if layer.transposed else w.unflatten(0, (layer.groups, -1))

    dense, stored = by_group(layer.expanded_weight()), by_group(layer.weight)
    made_by: dict[Element, list[tuple[int, int]]] = {}
    for o, (u, g) in enumerate(layer.layout.filters):
        made_by.setdefault(g, []).append((o, u))
    for g, pairs in made_by.items():
        outs, bases = ([pair[i] for pair in pairs] for i in (0, 1))
        yield f"expanded_weight() under {g}", dense[:, outs], _image(stored[:, bases], g, ndim)
    if layer.share_bias and layer.bias is not None:
        bias = layer.expanded_bias().unflatten(0, (layer.groups, -1))
        yield "expanded_bias()", bias, bias[:, [u for u, _ in layer.layout.filters]]


def _tied_pairs(layer: Any) -> Pairs:
    ndim = len(layer.kernel_size)
    dense = layer.expanded_weight().unflatten(0, (layer.groups, -1))
    tied, free = dense.split([(layer.out_channels - layer.free) // layer.groups, layer.free // layer.groups], 1)
    if layer.symmetry.is_radial:
        taps = tied.flatten(-ndim)
        first = torch.tensor([layer.orbits.slot.index(s) for s in layer.orbits.slot], device=taps.device)
        yield "rings of expanded_weight()", taps, taps.index_select(-1, first)
    for g in _elements(layer.symmetry, layer.kernel_size):
        yield f"expanded_weight() under {g}", tied, g.character(layer.odd) * _image(tied, g, ndim)
    if layer.free_weight is not None:
        yield "free filters of expanded_weight()", free.flatten(0, 1), layer.free_weight


def _orbit_pool_pairs(layer: Any) -> Pairs:
    ndim, dense = len(layer.kernel_size), layer.expanded_weight()
    for i, g in enumerate(layer.symmetry.elements):
        if layer.reduce in ("sum", "mean"):
            yield f"expanded_weight() under {g}", dense, _image(dense, g, ndim)
        else:
            yield f"expanded_weight() under {g}", dense[i :: layer.symmetry.order], _image(layer.weight, g, ndim)


def _linear_pairs(layer: Any) -> Pairs:
    matrix = layer.expanded_weight()
    yield "expanded_weight() transposed", matrix, matrix.mT


def _global_pairs(layer: Any) -> Pairs:
    kernel = layer.expanded_weight(2)
    yield "expanded_weight() in the centre", kernel[..., 2], layer.center
    for i in (0, 1, 3, 4):
        yield "expanded_weight() beside the centre", kernel[..., i], layer.surround


_PAIRS: dict[type[nn.Module], Callable[[Any], Pairs]] = {
    _OrbitConv: _orbit_pairs,
    _TiedConv: _tied_pairs,
    _OrbitPoolConv: _orbit_pool_pairs,
    SymmetricLinear: _linear_pairs,
    GlobalConv1d: _global_pairs,
}


def assert_symmetric(module: nn.Module) -> None:
    """The expanded weight of every tritonsym layer in `module` is its own image under its symmetry, to the bit.

    Filters in orbits are the images of the stored filter at its place in the output; tied filters equal their images,
    up to the sign of their parity, and all taps of a ring are equal; the kernel of a 'sum' or 'mean' pool equals its
    images; the matrix of `SymmetricLinear` its transpose; the kernel of `GlobalConv1d` has two values.

    Raises:
        AssertionError: a layer is not symmetric; the message names the layer, the element and the place.
        ValueError: there is no such layer in the module.
    """
    found = False
    with torch.no_grad():
        for name, layer in module.named_modules():
            for kind, pairs in _PAIRS.items():
                if isinstance(layer, kind):
                    found = True
                    label = " ".join(part for part in (type(layer).__name__, name) if part)
                    for what, got, expected in pairs(layer):
                        _assert_exact(f"assert_symmetric: {label}: {what}", got, expected)
    if not found:
        raise ValueError(f"assert_symmetric: no tritonsym layer with weights in this {type(module).__name__}")


# --- equivariance -----------------------------------------------------------------------------------------------------


def _action(g: Element, ndim: int) -> tuple[int, ...]:
    """What g does to a 3 x ... x 3 grid; it tells all elements apart."""
    return g.slots((3,) * ndim)


def _blocks(layer: Any) -> Iterator[tuple[Symmetry, list[list[int]]]]:
    """(symmetry, output channels) of all filters but free ones; a row per element where images are output channels."""
    if isinstance(layer, _OrbitConv):
        filters = layer.layout.filters
        starts = range(0, layer.out_channels, len(filters))  # of the conv groups
        for symmetry, bases in layer.layout.bases:
            yield symmetry, [[n + filters.index((u, g)) for n in starts for u in bases] for g in symmetry.elements]
    else:
        size, free = layer.out_channels // layer.groups, getattr(layer, "free", 0) // layer.groups
        if size > free:
            yield layer.symmetry, [[n + o for n in range(0, layer.out_channels, size) for o in range(size - free)]]


def _check_geometry(layer: Any, x: Tensor, elements: Sequence[Element]) -> None:
    """Raise ValueError unless moving x by these elements moves the grid of output positions onto itself."""
    where, cls = "assert_equivariant", type(layer).__name__
    turned = any(g.turns for g in elements)
    letters = {letter for g in elements for letter in g.flips}
    for axis in {AXES[letter] for letter in letters} | ({-1, -2} if turned else set()):
        if layer.transposed:
            if layer.output_padding[axis]:
                raise ValueError(f"{where}: output_padding adds positions on one side only; {cls} is not equivariant")
            continue
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        if layer.padding == "same":
            if reach % 2:
                raise ValueError(
                    f"{where}: padding='same' pads an even kernel more on one side, so {cls} is not equivariant; "
                    "use an odd kernel, or padding as integers"
                )
            continue
        pad = 0 if layer.padding == "valid" else layer.padding[axis]
        rest = (x.shape[axis] + 2 * pad - reach - 1) % layer.stride[axis]
        if rest:
            raise ValueError(
                f"{where}: with stride {layer.stride[axis]} the kernel leaves {rest} positions at one end of axis "
                f"{axis} of x {tuple(x.shape)}, so {cls} is not equivariant; use stride 1, or another input size"
            )
    if any(g.turns % 2 for g in elements):
        for name in ("kernel_size", "stride", "padding", "dilation"):
            value = getattr(layer, name)
            if not isinstance(value, str) and len(set(value)) > 1:
                raise ValueError(f"{where}: {name}={value} differs between the axes, so {cls} is not equivariant")


def _check_bias(layer: Any, rows: list[list[int]], signs: set[int]) -> None:
    """Raise ValueError if bias or activation make the outputs of one orbit, or of an odd filter, behave unequally."""
    where, bias = "assert_equivariant", layer.expanded_bias()
    if isinstance(layer, _OrbitConv) and bias is not None and any((bias[r] != bias[rows[0]]).any() for r in rows):
        raise ValueError(
            f"{where}: the images of a filter have biases of their own, so {type(layer).__name__} is not equivariant; "
            "use share_bias=True or bias=False"
        )
    if -1 in signs and (layer.activation not in (None, "tanh") or (bias is not None and bias[rows[0]].any())):
        raise ValueError(
            f"{where}: an odd filter's output changes its sign, which a bias or activation does not follow; "
            "use bias=False and activation=None"
        )


def _conv_motions(
    layer: Any, x: Tensor, y: Tensor, symmetry: str | None
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(g, g x, what y(g x) has to be in some channels, those channels) for every element and block."""
    where, ndim = "assert_equivariant", len(layer.kernel_size)
    blocks = list(_blocks(layer))
    if not blocks:
        raise ValueError(f"{where}: {type(layer).__name__} has free filters only, which have no symmetry")
    if symmetry is not None:
        Symmetry(symmetry).check_kernel(layer.kernel_size, where)
    for own, rows in blocks:
        group = {_action(g, ndim): g for g in _elements(own, layer.kernel_size)}
        moves = _elements(own if symmetry is None else Symmetry(symmetry), layer.kernel_size)
        if outside := [str(g) for g in moves if _action(g, ndim) not in group]:
            raise ValueError(f"{where}: filters of symmetry {own.name!r} are not symmetric under {', '.join(outside)}")
        signs = [group[_action(g, ndim)].character(getattr(layer, "odd", "")) for g in moves]
        _check_geometry(layer, x, moves)
        _check_bias(layer, rows, set(signs))
        to = torch.tensor(rows, device=y.device)
        for g, sign in zip(moves, signs, strict=True):
            of = to
            if len(rows) > 1:  # the response of image h = g k to g x is the moved response of image k to x
                step = _action(g, ndim)
                products = [tuple(k[i] for i in step) for k in group]
                of = to[[products.index(h) for h in group]]
            expected = sign * reference.image(y.index_select(-1 - ndim, of.flatten()), g)
            yield str(g), reference.image(x, g), expected, to.flatten()


def assert_equivariant(module: nn.Module, x: Tensor, symmetry: str | None = None) -> None:
    """Moving the input of a layer moves its output: y(g x) = g y(x) for every element g of its symmetry.

    - `SymmetricConv*d`, `SymmetricConvTranspose*d`: up to the order of the channels within every orbit, since the image
      g k w of a filter answers to g x as its image k w answers to x. Needs a shared bias, or none.
    - `TiedConv*d`: up to the sign of the parity. `OrbitPoolConv*d`: as it stands. Free filters are left out.
    - `GlobalConv1d`: for permutations g of the positions. `TopKPool1d`, `Symmetrize`: y(g x) = y(x), exactly.

    Convolutions and `GlobalConv1d` may differ by what `assert_matches_reference` allows two results; where the dense
    layer is exact, as on integers, not at all.

    Args:
        module: one of those layers.
        x: its input.
        symmetry: of a convolution: check this group instead of the layer's own; it must be part of that.

    Raises:
        AssertionError: the outputs differ; the message names the element, the error and the worst index.
        ValueError: the layer cannot be equivariant: its stride leaves positions at one end, its padding or bias are
            not symmetric, or the symmetry is not its own.
        TypeError: the module is no such layer.
    """
    where = "assert_equivariant"
    known = (_SharedConv, GlobalConv1d, TopKPool1d, Symmetrize)
    if not isinstance(module, known):
        raise TypeError(
            f"{where}: expected a convolution of tritonsym.nn, GlobalConv1d, TopKPool1d or Symmetrize, got "
            f"{type(module).__name__}; check a model part by part, the matrix of SymmetricLinear with assert_symmetric"
        )
    if symmetry is not None and not isinstance(module, _SharedConv):
        raise ValueError(f"{where}: symmetry={symmetry!r} is for convolutions; {type(module).__name__} has its own")
    with torch.no_grad():
        y = _call(module, [x])
        if isinstance(module, TopKPool1d | Symmetrize):
            for order in _some_orders(module, x):
                dim = module.dim if isinstance(module, Symmetrize) else -1
                moved = _call(module, [x.index_select(dim, order)])
                _assert_exact(f"{where}: {type(module).__name__}, re-ordered by {order.tolist()}", moved, y)
            return
        allowed = _allowed_between(module, x)
        if isinstance(module, GlobalConv1d):
            for order in _some_orders(module, x):
                moved, expected = _call(module, [x[..., order]]), y[..., order]
                _assert_close(f"{where}: GlobalConv1d, re-ordered by {order.tolist()}", moved, expected, allowed)
        else:
            channel = -1 - len(module.kernel_size)
            for name, moved, expected, channels in _conv_motions(module, x, y, symmetry):
                got = _call(module, [moved]).index_select(channel, channels)
                _assert_close(f"{where}: {type(module).__name__}, g = {name}", got, expected, allowed)


def _some_orders(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The re-orderings to try: at most 24 of those that Symmetrize knows; else a reversal, a rotation, a shuffle."""
    if isinstance(module, Symmetrize):
        orders = functional.orders_of(module.over, x.shape[module.dim], "assert_equivariant")
        orders = orders[:: math.ceil(len(orders) / 24)]
        return [torch.tensor(order, device=x.device) for order in orders]
    place = torch.arange(x.shape[-1])
    shuffled = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(0))
    return [order.to(x.device) for order in (place.flip(0), place.roll(1), shuffled)]


def _allowed_between(module: nn.Module, x: Tensor) -> float:
    """How far two results may lie apart, each as wrong as `assert_matches_reference` allows; 0 if torch is exact."""
    truth, naive, factor = _truth_and_dense(_only_outputs, module, [x])
    (_, exact), (_, dense) = truth[0], naive[0]
    error = factor * _largest(dense.to(exact) - exact)
    eps = torch.finfo(exact.dtype if factor != 1 else dense.dtype).eps
    return 4 * error + 2 * eps * _largest(exact) if error else 0.0


def _assert_close(where: str, got: Tensor, expected: Tensor, allowed: float) -> None:
    if got.shape != expected.shape:
        raise AssertionError(f"{where}: y(g x) has shape {tuple(got.shape)}, g y(x) {tuple(expected.shape)}")
    difference = (got - expected).abs()
    if not _largest(difference) <= allowed:
        raise AssertionError(
            f"{where}: y(g x) is not g y(x): error {_largest(difference):.3e} > allowed {allowed:.3e}; "
            f"{_worst(got, expected, difference)}"
        )

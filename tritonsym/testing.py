"""Checks for your own test suite: does a layer, or a model built from layers, compute what its symmetry promises?

All raise AssertionError with a message that names the tensor and the place. They leave parameters, gradients, buffers,
training flags and the global random state as they were.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from tritonsym import fold, functional, plan, reference
from tritonsym._compat import BatchNorm, ConvNd
from tritonsym.nn.conv import _OrbitConv, _OrbitPoolConv, _SharedConv
from tritonsym.nn.group import GroupDropout, GroupLinear, _GroupBatchNorm, _GroupConv
from tritonsym.nn.linear import SkewLinear, SymmetricLinear
from tritonsym.nn.pool import GlobalConv1d, TopKPool1d
from tritonsym.nn.symmetrize import Symmetrize
from tritonsym.shift import channels_last, is_last
from tritonsym.symmetry import AXES, Element, Symmetry

__all__ = ["assert_equivariant", "assert_matches_reference", "assert_symmetric"]

Named = list[tuple[str, Tensor]]
Forwards = Mapping[type[nn.Module], Callable[..., Tensor]]


# --- the dense formulation of every layer -----------------------------------------------------------------------------


def _by_torch(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, extra: Sequence[int]) -> Tensor:
    if not layer.transposed:
        y: Tensor = layer._conv_forward(x, weight, bias)
        return y
    conv: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
    return conv(x, weight, bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)


def _by_torch_last(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, extra: Sequence[int]) -> Tensor:
    """With the channels innermost, where torch sums in another order; the result has the memory format of x."""
    if x.ndim != weight.ndim:
        return _by_torch(layer, x, weight, bias, extra)
    y = _by_torch(layer, channels_last(x), channels_last(weight), bias, extra)
    return y if is_last(x) else y.contiguous()


def _by_products(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, extra: Sequence[int]) -> Tensor:
    """One matrix product per group with the unfolded input, or its adjoint if transposed, which sums in float32."""
    groups, kernel_size, stride, dilation = layer.groups, layer.kernel_size, layer.stride, layer.dilation
    batched, wide = x if x.ndim == weight.ndim else x[None], torch.promote_types(x.dtype, torch.float32)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    like = _by_torch(layer, batched, weight, bias, extra).detach()  # shape, dtype, strides

    def products(t: Tensor, sides: Sequence[int], start: Tensor | None) -> Tensor:
        t = F.pad(t, sides, mode)
        for axis, size in enumerate(kernel_size):
            t = t.unfold(2 + axis, dilation[axis] * (size - 1) + 1, stride[axis])[..., :: dilation[axis]]
        t = t.flatten(-len(kernel_size)).to(x.dtype)  # (N, C, *positions, taps)
        rows = t.unflatten(1, (groups, -1)).movedim((1, 2), (0, -2)).flatten(-2).flatten(1, -2)
        matrix = weight.unflatten(0, (groups, -1)).flatten(2).mT
        y = rows @ matrix if start is None else torch.baddbmm(start.view(groups, 1, -1), rows, matrix)
        return y.unflatten(1, (len(t), *t.shape[2:-1])).movedim(-1, 1).flatten(0, 1).transpose(0, 1)

    if layer.transposed:
        sides = [side for p, e in zip(layer.padding[::-1], extra[::-1], strict=True) for side in (p, p - e)]
        pull: Any = torch.func.vjp(lambda t: products(t, sides, None), torch.zeros_like(like, dtype=wide))[1]
        (y,) = pull(batched.to(like.dtype))
        y = y if bias is None else y + bias.view(-1, *[1] * len(kernel_size))
    else:
        y = products(batched.to(wide), layer._reversed_padding_repeated_twice, bias)
    y = torch.empty_like(like).copy_(y)
    return y if batched is x else y[0]


def _dense_conv(convolve: Callable[..., Tensor], layer: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    ndim, extra = len(layer.kernel_size), []
    if layer.transposed:
        sizes = (layer.stride, layer.padding, layer.kernel_size, ndim, layer.dilation)
        extra = layer._output_padding(x, output_size, *sizes)
    if getattr(layer, "reduce", None) in ("max", "min"):
        images = convolve(layer, x, layer.expanded_weight(), None, extra)
        images = images.unflatten(-1 - ndim, (-1, layer.symmetry.order)).movedim(-1 - ndim, 0)
        y = reference.REDUCTIONS[layer.reduce](images)
        y = y if layer.bias is None else y + layer.bias.view(-1, *[1] * ndim)
    else:
        y = convolve(layer, x, layer.expanded_weight(), layer.expanded_bias(), extra)
    return reference.activate(y, layer.activation)


def _dense_linear(layer: Any, x: Tensor) -> Tensor:
    return reference.activate(F.linear(x, layer.expanded_weight(), layer.expanded_bias()), layer.activation)


def _linear_by_products(layer: Any, x: Tensor) -> Tensor:
    """x W^T with a contiguous W^T, which sums in the order of another memory format."""
    y = x @ layer.expanded_weight().mT.contiguous()
    return reference.activate(y if layer.bias is None else y + layer.bias, layer.activation)


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
    """One call on all re-orderings, as in the layer, so that an inner batch norm sees the same batch."""
    orders = functional.orders_of(layer.over, x.shape[layer.dim], "Symmetrize")
    y = layer.inner(torch.cat([x.index_select(layer.dim, torch.tensor(o, device=x.device)) for o in orders]))
    return reference.REDUCTIONS[layer.reduce](y.unflatten(0, (len(orders), x.shape[0])))


def _dense_group_conv(convolve: Callable[..., Tensor], layer: Any, x: Tensor) -> Tensor:
    batched = x if x.ndim == len(layer.kernel_size) + 2 else x[None]
    order = layer.symmetry.order, layer.groups
    y = fold.regrouped(_dense_conv(convolve, layer, fold.regrouped(batched, *order)), *order, back=True)
    return y if batched is x else y[0]


def _forwards(convolve: Callable[..., Tensor], linear: Callable[..., Tensor] = _dense_linear) -> Forwards:
    """The dense formulations, by class, with this way to convolve."""

    def conv(layer: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _dense_conv(convolve, layer, x, output_size)

    def group_conv(layer: Any, x: Tensor) -> Tensor:
        return _dense_group_conv(convolve, layer, x)

    return {
        _SharedConv: conv,
        _GroupConv: group_conv,
        GroupLinear: _dense_linear,
        SymmetricLinear: linear,
        GlobalConv1d: _dense_global_conv,
        TopKPool1d: _dense_topk,
        Symmetrize: _dense_symmetrize,
    }


_DENSE, _LAST = _forwards(_by_torch), _forwards(_by_torch_last)
#: By `torch.matmul`: convolutions as products with the unfolded input.
_PRODUCTS = _forwards(_by_products, _linear_by_products)


def _dense_twin(module: nn.Module, forwards: Forwards) -> nn.Module:
    """A copy in which every tritonsym layer computes its dense formulation from the same stored parameters."""
    twin = copy.deepcopy(module)
    for layer in twin.modules():
        for kind, forward in forwards.items():
            if isinstance(layer, kind):
                layer.forward = MethodType(forward, layer)
    return twin


# --- running modules without side effects -----------------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    """A copy with the same strides, which a module may change in place, unlike a leaf."""

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
    """Draw random numbers of `dtype` in `own` and cast them: from one state, every dtype draws other numbers."""

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
    """module(*args) on copies of its buffers and inputs; every call draws random numbers from the same state."""
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


def _upstream(y: Tensor, generator: torch.Generator) -> Tensor:
    """Random multiples of 1/8 in [-2, 2], which every dtype holds exactly."""
    shape = torch.view_as_real(y).shape if y.is_complex() else y.shape
    numbers = torch.randint(-16, 17, shape, generator=generator) / 8
    return (torch.view_as_complex(numbers) if y.is_complex() else numbers).to(y)


def _results(module: nn.Module, inputs: Sequence[Any], gradients: bool = False) -> Named:
    """The outputs, and on request the gradients with respect to inputs and parameters."""
    if not gradients:
        with torch.no_grad():
            return _outputs(_call(module, inputs))
    args = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
    arguments = inspect.signature(module.forward).parameters.values()
    names = [a.name for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    names += [f"input {i}" for i in range(len(names), len(args))]
    leaves = [(n, arg.requires_grad_()) for n, arg in zip(names, args, strict=False) if _is_inexact(arg)]
    leaves += [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        outputs = _outputs(_call(module, args))
    roots, tensors = [y for _, y in outputs if y.requires_grad], [t for _, t in leaves]
    found = [torch.zeros_like(t) for t in tensors]
    if roots and tensors:
        generator = torch.Generator().manual_seed(0)
        upstream = [_upstream(y, generator) for y in roots]
        found = [*torch.autograd.grad(roots, tensors, upstream, materialize_grads=True)]
    named = [(f"gradient of {name}", gradient) for (name, _), gradient in zip(leaves, found, strict=True)]
    return [(name, y.detach()) for name, y in outputs] + named


def _in(dtype: torch.dtype | None) -> Callable[[Any], Any]:
    """A function that casts real tensors to `dtype`, complex ones to its complex twin, and leaves everything else."""

    def cast(value: Any) -> Any:
        if dtype is None or not _is_inexact(value):
            return value
        return value.to(dtype.to_complex() if value.is_complex() else dtype)

    return cast


def _truth_and_dense(
    module: nn.Module, inputs: Sequence[Any], gradients: bool = False
) -> tuple[Named, list[Named], list[Callable[[], Named]], float]:
    """`_results` of the dense formulation in float64, those in the dtype of the module, how to compute them in other
    ways, and a factor for their errors.

    The other ways are channels-last convolutions and matrix products; complex numbers have none. No dtype is wider than
    float64: there the error of the dense layer is estimated as its error in float32, times the ratio of the two
    roundings, times 8, since the truth has such errors too, and libraries sum the two dtypes differently.
    """
    tensors: list[Tensor] = list(module.parameters()) or [value for value in inputs if isinstance(value, Tensor)]
    is_wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    own = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def dense(dtype: torch.dtype | None, forwards: Forwards = _DENSE) -> Named:
        cast = _in(dtype)
        twin = _dense_twin(module, forwards)._apply(cast)
        with plan.backend("reference"), plan.path("reference"), _DrawnAs(own, dtype) if dtype else nullcontext():
            return _results(twin, [*map(cast, inputs)], gradients)

    narrow = torch.float32 if is_wide else None
    more: list[Callable[[], Named]] = []
    has_products = any(isinstance(m, (_SharedConv, SymmetricLinear)) for m in module.modules())
    if has_products and not any(t.is_complex() for t in tensors):
        more = [partial(dense, narrow, way) for way in (_LAST, _PRODUCTS)]
    factor = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if is_wide else 1.0
    return dense(torch.float64), [dense(narrow)], more, factor


# --- comparing --------------------------------------------------------------------------------------------------------


def _largest(t: Tensor) -> float:
    return t.abs().amax().item() if t.numel() else 0.0


def _rms(t: Tensor) -> float:
    return t.abs().square().mean().sqrt().item() if t.numel() else 0.0


def _worst(got: Tensor, expected: Tensor, error: Tensor) -> str:
    """Where the error is largest, and the two values there."""
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


def _error(norm: Callable[[Tensor], float], exact: Tensor, naive: Sequence[Tensor]) -> float:
    """The largest error of the dense results that are finite."""
    return max((norm(b.to(exact) - exact) for b in naive if b.isfinite().all()), default=math.nan)


def assert_matches_reference(module: nn.Module, *inputs: Any) -> None:
    """Assert that outputs and all gradients of `module` are as accurate as those of equivalent dense layers.

    The module runs as it is, on the path that `tritonsym.explain` names, with gradients and under no_grad. In copies
    of it every tritonsym layer is the dense torch operation on its expanded weight (`Symmetrize` on every re-ordering),
    with the same random numbers. "truth" is computed in float64 or complex128. "dense" is computed in the dtype of the
    input, by torch's convolutions in its memory format, and (except for complex numbers) also channels-last, and by
    `torch.matmul` of the unfolded input; the largest error counts. Then

        max |got - truth| <= 2 max |dense - truth| + eps max |truth|

    with eps of the dtype, and the same for the root mean square: at most twice the error of torch, plus one rounding.
    For a float64 module the error of the dense layer is estimated as 8 eps(float64) / eps(float32) of that in float32.

    Args:
        module: a layer of `tritonsym.nn`, or any model, with or without such layers inside.
        inputs: the arguments of the call. Gradients are compared for every floating or complex tensor among them and
            every parameter that requires one; the upstream gradient is random but fixed. Where values are equal up to
            rounding (max, top-k, ReLU at 0) the gradient is not unique: choose other inputs, or a wider dtype.
    Raises:
        AssertionError: a result is wrong; the message names the tensor, its error, what is allowed and the worst index.
        ValueError: nothing can be compared: the dense layers overflow, or the output holds no floating tensor.

    >>> testing.assert_matches_reference(nn.SymmetricConv2d(2, 4, 3, symmetry="h"), torch.randn(1, 2, 5, 5))
    """
    where = "assert_matches_reference"
    got = _results(module, inputs, gradients=True)
    truth, naive, more, factor = _truth_and_dense(module, inputs, gradients=True)
    outputs = sum(name.startswith("output") for name, _ in truth)
    if not outputs:
        raise ValueError(f"{where}: {type(module).__name__} returned no floating or complex tensor to compare")
    _assert_as_right(where, got, truth, naive, more, factor)
    # inference may take another path, whose kernels apply the activation
    _assert_as_right(f"{where} under no_grad", _results(module, inputs), truth[:outputs], naive, more, factor)


def _assert_as_right(
    where: str, got: Named, truth: Named, naive: list[Named], more: list[Callable[[], Named]], factor: float
) -> None:
    """Compare by the errors of `naive`, to which `more` adds only if these do not allow the error."""
    while True:
        try:
            return _assert_within(where, got, truth, [named[: len(truth)] for named in naive], factor)
        except AssertionError:
            if not more:
                raise
            naive.append(more.pop(0)())


def _assert_within(where: str, got: Named, truth: Named, naive: Sequence[Named], factor: float) -> None:
    if len(got) != len(truth):
        raise AssertionError(f"{where}: {len(got)} outputs and gradients, expected {len(truth)}")
    for (_, a), (name, exact), *others in zip(got, truth, *naive, strict=True):
        dense = [t for _, t in others]
        if a.shape != exact.shape:
            raise AssertionError(f"{where}: {name} has shape {tuple(a.shape)}, expected {tuple(exact.shape)}")
        dtype = dense[0].dtype if factor == 1 else exact.dtype
        if a.dtype != dtype:
            raise AssertionError(f"{where}: {name} is {a.dtype}, expected {dtype}")
        if not dense[0].isfinite().all():
            raise ValueError(f"{where}: the dense torch layer itself gives inf or NaN in the {name}; use other inputs")
        error = a.to(exact) - exact
        for kind, norm in (("max", _largest), ("RMS", _rms)):
            allowed = 2 * factor * _error(norm, exact, dense) + torch.finfo(a.dtype).eps * norm(exact)
            if not norm(error) <= allowed:
                raise AssertionError(
                    f"{where}: {name} is wrong: {kind} error {norm(error):.3e} > allowed {allowed:.3e} (twice the "
                    f"error of the dense torch layer, plus one rounding); {_worst(a, exact, error.abs())}"
                )


# --- symmetry of the weights ------------------------------------------------------------------------------------------


def _image(w: Tensor, g: Element, ndim: int) -> Tensor:
    """g w for filters w (..., *kernel), read tap by tap from the table of the element."""
    kernel_size = tuple(w.shape[-ndim:])
    index = torch.tensor(g.slots(kernel_size), device=w.device)
    return w.flatten(-ndim).index_select(-1, index).unflatten(-1, kernel_size)


def _elements(symmetry: Symmetry, kernel_size: Sequence[int]) -> tuple[Element, ...]:
    """The elements of the group; for rings, of the largest group that maps the kernel onto itself."""
    if not symmetry.is_radial:
        return symmetry.elements
    is_square = len(kernel_size) == 2 and len(set(kernel_size)) == 1
    return Symmetry("d4" if is_square else "hvz"[: len(kernel_size)]).elements


def _pairs(layer: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The pairs that must be equal to the bit: name, value, expected value."""
    if isinstance(layer, SymmetricLinear):
        matrix = layer.expanded_weight()
        yield "expanded_weight() transposed", matrix, -matrix.mT if isinstance(layer, SkewLinear) else matrix.mT
    elif isinstance(layer, GlobalConv1d):
        kernel = layer.expanded_weight(2)
        yield "expanded_weight() in the center", kernel[..., 2], layer.center
        for i in (0, 1, 3, 4):
            yield "expanded_weight() beside the center", kernel[..., i], layer.surround
    elif isinstance(layer, _OrbitConv):
        yield from _orbit_pairs(layer)
    elif isinstance(layer, _GroupConv | GroupLinear):
        yield from _group_pairs(layer)
    elif isinstance(layer, _OrbitPoolConv) and layer.reduce in ("max", "min"):
        images = layer.expanded_weight().unflatten(0, (layer.out_channels, -1)).unbind(1)
        for g, image in zip(layer.symmetry.elements, images, strict=True):
            yield f"expanded_weight() under {g}", image, _image(layer.weight, g, len(layer.kernel_size))
    elif isinstance(layer, _SharedConv):
        yield from _tied_pairs(layer)


def _orbit_pairs(layer: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    def by_group(w: Tensor) -> Tensor:
        return w if layer.transposed else w.unflatten(0, (layer.groups, -1))

    dense, stored, start = by_group(layer.expanded_weight()), by_group(layer.weight), 0
    for block in layer.spec.blocks:
        base = stored.narrow(1, start, block.filters)
        start += block.filters
        for first, g in block.images:
            image = _image(base, g, len(layer.kernel_size))
            yield f"expanded_weight() under {g}", dense.narrow(1, first, block.filters), image
    if layer.share_bias and layer.bias is not None:
        bias = layer.expanded_bias().unflatten(0, (layer.groups, -1))
        yield "expanded_bias()", bias, bias[:, [u for u, _ in layer.layout.filters]]


def _group_pairs(layer: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """W[a g, a h] = a W[g, h]."""
    groups, order, kernel = getattr(layer, "groups", 1), layer.symmetry.order, getattr(layer, "kernel_size", ())
    dense = layer.expanded_weight().unflatten(1, (order, -1)).unflatten(0, (groups, order, -1))
    for a, to in zip(layer.symmetry.elements, layer.symmetry.products, strict=True):
        moved = dense[:, list(to)][:, :, :, list(to)]
        yield f"expanded_weight() under {a}", moved, _image(dense, a, len(kernel)) if kernel else dense


def _tied_pairs(layer: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    ndim, free = len(layer.kernel_size), getattr(layer, "free", 0) // layer.groups
    dense = layer.expanded_weight().unflatten(0, (layer.groups, -1))
    tied, rest = dense.split([dense.shape[1] - free, free], 1)
    if layer.symmetry.is_radial:
        taps = tied.flatten(-ndim)
        first = torch.tensor([layer.orbits.slot.index(s) for s in layer.orbits.slot], device=taps.device)
        yield "rings of expanded_weight()", taps, taps.index_select(-1, first)
    for g in _elements(layer.symmetry, layer.kernel_size):
        yield f"expanded_weight() under {g}", tied, g.character(getattr(layer, "odd", "")) * _image(tied, g, ndim)
    if free:
        yield "free filters of expanded_weight()", rest.flatten(0, 1), layer.free_weight


def assert_symmetric(module: nn.Module) -> None:
    """Assert that the expanded weight of every tritonsym layer in `module` is symmetric, to the bit.

    Filters in orbits are images of their stored filters, in output order; tied filters equal their images, up to the
    sign of their parity, and all taps of a ring are equal; the kernel of a 'sum' or 'mean' pool equals its images; the
    matrix of `SymmetricLinear` equals its transpose; the kernel of `GlobalConv1d` has two values.

    Raises:
        AssertionError: a layer is not symmetric; the message names the layer, the element and the place.
        ValueError: there is no such layer in the module.

    >>> testing.assert_symmetric(torch.nn.Sequential(nn.SymmetricLinear(3, 3), nn.SkewLinear(3, 3)))
    """
    found = False
    with torch.no_grad():
        for name, layer in module.named_modules():
            label = " ".join(part for part in (type(layer).__name__, name) if part)
            for what, got, expected in _pairs(layer):
                found = True
                _assert_exact(f"assert_symmetric: {label}: {what}", got, expected)
    if not found:
        raise ValueError(f"assert_symmetric: no tritonsym layer with weights in this {type(module).__name__}")


# --- equivariance -----------------------------------------------------------------------------------------------------


def _action(g: Element, ndim: int) -> tuple[int, ...]:
    """How g permutes a 3 x ... x 3 grid, which is different for every element."""
    return g.slots((3,) * ndim)


def _blocks(layer: Any) -> Iterator[tuple[Symmetry, list[list[int]]]]:
    """(symmetry, output channels) of all but free filters, with a row per element where images are output channels."""
    size = layer.out_channels // layer.groups
    starts = range(0, layer.out_channels, size)
    if isinstance(layer, _OrbitConv):
        for (symmetry, _), block in zip(layer.layout.orbits, layer.spec.blocks, strict=False):
            yield symmetry, [[n + o for n in starts for o in range(i, i + block.filters)] for i, _ in block.images]
    elif tied := size - getattr(layer, "free", 0) // layer.groups:
        yield layer.symmetry, [[n + o for n in starts for o in range(tied)]]


def _obstacles(layer: Any, x: Tensor, elements: Sequence[Element], rows: list[list[int]], odd: bool) -> Iterator[str]:
    """Why moving x by these elements cannot move the outputs of these channels: positions or biases differ."""
    cls, bias = type(layer).__name__, layer.expanded_bias()
    for axis in {AXES[letter] for g in elements for letter in g.flips + "hv" * bool(g.turns)}:
        if layer.transposed:
            if layer.output_padding[axis]:
                yield f"output_padding adds positions on one side only; {cls} is not equivariant"
            continue
        reach, stride = layer.dilation[axis] * (layer.kernel_size[axis] - 1), layer.stride[axis]
        pad = 0 if isinstance(layer.padding, str) else layer.padding[axis]
        if layer.padding == "same":
            if reach % 2:
                yield (
                    f"padding='same' pads an even kernel more on one side, so {cls} is not equivariant; "
                    "use an odd kernel, or padding as integers"
                )
        elif rest := (x.shape[axis] + 2 * pad - reach - 1) % stride:
            yield (
                f"with stride {stride} the kernel leaves {rest} positions at one end of axis {axis} of x "
                f"{tuple(x.shape)}, so {cls} is not equivariant; use stride 1, or another input size"
            )
    for name in ("kernel_size", "stride", "padding", "dilation"):
        value = getattr(layer, name)
        if any(g.turns % 2 for g in elements) and not isinstance(value, str) and len(set(value)) > 1:
            yield f"{name}={value} differs between the axes, so {cls} is not equivariant"
    if isinstance(layer, _OrbitConv) and bias is not None and any((bias[r] != bias[rows[0]]).any() for r in rows):
        yield (
            f"the images of a filter have biases of their own, so {cls} is not equivariant; "
            "use share_bias=True or bias=False"
        )
    if odd and (layer.activation not in (None, "tanh") or (bias is not None and bias[rows[0]].any())):
        yield (
            "an odd filter's output changes its sign, which a bias or activation does not follow; "
            "use bias=False and activation=None"
        )


def _conv_motions(
    layer: Any, x: Tensor, y: Tensor, symmetry: str | None
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(g, g x, the expected y(g x) in some channels, those channels) for every element and block."""
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
        for obstacle in _obstacles(layer, x, moves, rows, -1 in signs):
            raise ValueError(f"{where}: {obstacle}")
        to = torch.tensor(rows, device=y.device)
        for g, sign in zip(moves, signs, strict=True):
            of = to
            if len(rows) > 1:  # the response of image h = g k to g x is the moved response of image k to x
                step = _action(g, ndim)
                products = [tuple(k[i] for i in step) for k in group]
                of = to[[products.index(h) for h in group]]
            expected = sign * reference.image(y.index_select(-1 - ndim, of.flatten()), g)
            yield f"g = {g}", reference.image(x, g), expected, to.flatten()


def _order_motions(module: Any, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor, Tensor, None]]:
    """The same for re-orderings: at most 24 of those of a Symmetrize; else a reversal, a rotation and a shuffle."""
    dim, follows = getattr(module, "dim", -1), isinstance(module, GlobalConv1d)
    orders: Any
    if isinstance(module, Symmetrize):
        orders = functional.orders_of(module.over, x.shape[dim], "assert_equivariant")
        orders = orders[:: math.ceil(len(orders) / 24)]
    else:
        place = torch.arange(x.shape[-1])
        shuffled = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(0))
        orders = [order.tolist() for order in (place.flip(0), place.roll(1), shuffled)]
    for order in orders:
        index = torch.tensor(order, device=x.device)
        yield f"re-ordered by {list(order)}", x.index_select(dim, index), y[..., index] if follows else y, None


def _allowed_between(module: nn.Module, x: Tensor) -> float:
    """How far apart two results may be, each as wrong as `assert_matches_reference` allows; 0 if torch is exact."""
    truth, naive, more, factor = _truth_and_dense(module, [x])
    exact, dense = truth[0][1], [named[0][1] for named in (*naive, *(way() for way in more))]
    error = factor * _error(_largest, exact, dense)
    eps = torch.finfo(exact.dtype if factor != 1 else dense[0].dtype).eps
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


FIELDS = ("scalar", "regular")


def _moved(x: Tensor, symmetry: Symmetry, number: int, fields: str) -> Tensor:
    """Move images (N, C, *sizes) or vectors (N, C) by element `number`, for regular fields (g x)[h] = g (x[g^-1 h])."""
    x = reference.image(x, symmetry.elements[number]) if x.ndim > 2 else x
    if fields == "scalar":
        return x
    back = [symmetry.products[number].index(h) for h in range(symmetry.order)]
    return x.unflatten(1, (symmetry.order, -1))[:, back].flatten(1, 2)


def _follows(got: Tensor, y: Tensor, symmetry: Symmetry, number: int) -> list[str]:
    """The kinds of fields as which a layer's output y is moved to `got` when the model's input is moved."""
    close = math.sqrt(torch.finfo(y.dtype).eps) * _largest(y)
    kinds = [fields for fields in FIELDS if fields == "scalar" or (y.ndim > 1 and y.shape[1] % symmetry.order == 0)]
    images = ((fields, _moved(y, symmetry, number, fields)) for fields in kinds)
    return [fields for fields, image in images if image.shape == got.shape and _largest(image - got) <= close]


def _recorded(module: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[str, Any, Tensor, Tensor]]]:
    """The output, and (name, layer, input, output) of every layer that maps one tensor to one, in calling order."""
    found: list[tuple[str, Any, Tensor, Tensor]] = []

    def record(name: str, layer: nn.Module, args: Any, y: Any) -> None:
        if args and all(isinstance(t, Tensor) and t.is_floating_point() for t in (args[0], y)):
            found.append((name, layer, args[0].clone(), y.clone()))

    leaves = [(n, m) for n, m in module.named_modules() if not any(m.children()) or isinstance(m, GroupDropout)]
    hooks = [m.register_forward_hook(partial(record, name)) for name, m in leaves]
    try:
        return _call(module, [x]), found
    finally:
        for hook in hooks:
            hook.remove()


def _hint(layer: Any, x: Tensor, symmetry: Symmetry) -> str:
    """What is probably wrong with a layer, and how to fix it."""
    if isinstance(layer, _OrbitConv):
        if str(layer.layout) != f"{symmetry}:{layer.out_channels}":
            return f"its filters are {layer.layout}; lift with symmetry={symmetry.name!r} for all of them"
        if layer.bias is not None and not layer.share_bias:
            return "the images of a filter have biases of their own; use share_bias=True or bias=False"
    if isinstance(layer, BatchNorm):
        return "it normalises the elements of a field apart; use GroupBatchNorm"
    if isinstance(layer, nn.Flatten):
        return "it turns positions into channels; pool over the positions before"
    sizes = [getattr(layer, name, 0) for name in ("kernel_size", "stride", "padding", "dilation")]
    if not any(isinstance(value, str | None) for value in sizes):
        ndim = x.ndim - 2
        kernel, stride, pad, dilation = ([v] * ndim if isinstance(v, int) else v for v in sizes)
        for axis in range(ndim):
            reach = (dilation[axis] or 1) * (kernel[axis] - 1)
            if (stride[axis] or 1) > 1 and (rest := (x.shape[2 + axis] + 2 * pad[axis] - reach - 1) % stride[axis]):
                return f"with stride {stride[axis]} it leaves {rest} positions at one end of x {tuple(x.shape)}"
    if isinstance(layer, ConvNd | nn.Linear) and not isinstance(layer, _SharedConv | GroupLinear):
        return "its weights are not tied; use SymmetricConv with share_bias=True on images, GroupConv on fields"
    return "it has no part that follows the group"


def _assert_model_equivariant(module: nn.Module, x: Tensor, name: str, in_type: str, out_type: str) -> None:
    where, symmetry = "assert_equivariant", Symmetry(name)
    for label, value in (("in_type", in_type), ("out_type", out_type)):
        functional.check_choice(where, label, value, FIELDS)
    if x.ndim > 2:
        symmetry.check_kernel((1,) * (x.ndim - 2), where)
    if in_type == "regular" and x.shape[1] % symmetry.order:
        raise ValueError(f"{where}: x {tuple(x.shape)} has no whole fields of {symmetry.order} elements of {name!r}")
    with torch.no_grad():
        y, before = _recorded(module, x)
        allowed = _allowed_between(module, x)
        for number, g in enumerate(symmetry.elements):
            got, after = _recorded(module, _moved(x, symmetry, number, in_type))
            for (at, layer, into, a), (*_, moved, b) in zip(before, after, strict=True):
                kinds, ours = _follows(moved, into, symmetry, number), _follows(b, a, symmetry, number)
                plain = isinstance(layer, BatchNorm) and not isinstance(layer, _GroupBatchNorm)
                if not ours or (plain and kinds == ["regular"]):
                    raise AssertionError(
                        f"{where}: {type(module).__name__}, g = {g}: the first layer that breaks {name!r} is "
                        f"{at or '(model)'} ({type(layer).__name__}): {_hint(layer, into, symmetry)}"
                    )
            if y.ndim < 2 or (out_type == "regular" and y.shape[1] % symmetry.order):
                raise ValueError(f"{where}: the output {tuple(y.shape)} has no {out_type} fields of {name!r}")
            _assert_close(
                f"{where}: {type(module).__name__}, g = {g}", got, _moved(y, symmetry, number, out_type), allowed
            )


def assert_equivariant(
    module: nn.Module,
    x: Tensor,
    symmetry: str | None = None,
    in_type: str | None = None,
    out_type: str | None = None,
) -> None:
    """Assert that moving the input of a layer or model moves its output: y(g x) = g y(x) for every element g.

    With a `symmetry`, any model: its input and output are of kind `in_type` and `out_type`, either 'scalar' (the
    default: images, or vectors, which g leaves as they are) or 'regular' (fields of `GroupConv*d`, whose elements g
    permutes too). The message of a failure names the first layer that is not equivariant. Group layers need no
    arguments.

    Other layers, without types:

    - `SymmetricConv*d`, `SymmetricConvTranspose*d`: up to the order of the channels within every orbit, since the image
      g k w of a filter responds to g x as its image k w responds to x. The bias must be shared, or None.
    - `TiedConv*d`: up to the sign of the parity. `OrbitPoolConv*d`: y(g x) = g y(x). Free filters are not checked.
    - `GlobalConv1d`: for permutations g of the positions. `TopKPool1d`, `Symmetrize`: y(g x) = y(x), exactly.

    All but the exact ones may differ by what `assert_matches_reference` allows two results, unless the dense layer is
    exact.

    Args:
        module: a model, or one of those layers.
        x: its input, (N, C, ...).
        symmetry: the group; for a single convolution, by default its own, else a subgroup of that.
        in_type, out_type: 'scalar' or 'regular', for a model.
    Raises:
        AssertionError: the outputs differ; the message names the element, the error and the worst index.
        ValueError: the layer cannot be equivariant: its stride leaves positions at one end, its padding or bias is
            not symmetric, or its filters do not have this symmetry.
        TypeError: the module is none of these layers, and no symmetry is given.

    >>> testing.assert_equivariant(nn.GroupConv2d(2, 3, 3, symmetry="d4"), torch.randn(1, 16, 7, 7))
    """
    where = "assert_equivariant"
    if isinstance(module, _GroupConv | GroupLinear):
        own = module.symmetry.name if symmetry is None else symmetry
        return _assert_model_equivariant(module, x, own, in_type or "regular", out_type or "regular")
    known = (_SharedConv, GlobalConv1d, TopKPool1d, Symmetrize)
    is_model = in_type or out_type or not isinstance(module, known)
    if symmetry is not None and is_model:
        return _assert_model_equivariant(module, x, symmetry, in_type or "scalar", out_type or "scalar")
    if not isinstance(module, known):
        raise TypeError(
            f"{where}: expected a convolution of tritonsym.nn, GlobalConv1d, TopKPool1d or Symmetrize, got "
            f"{type(module).__name__}; name the symmetry of a model; check a SymmetricLinear with assert_symmetric"
        )
    if symmetry is not None and not isinstance(module, _SharedConv):
        raise ValueError(f"{where}: symmetry={symmetry!r} is for convolutions; {type(module).__name__} has its own")
    is_exact = isinstance(module, TopKPool1d | Symmetrize)
    with torch.no_grad():
        y = _call(module, [x])
        allowed = 0.0 if is_exact else _allowed_between(module, x)
        motions: Any = _order_motions(module, x, y)
        if isinstance(module, _SharedConv):
            motions, channel = _conv_motions(module, x, y, symmetry), -1 - len(module.kernel_size)
        for motion, moved, expected, channels in motions:
            got, label = _call(module, [moved]), f"{where}: {type(module).__name__}, {motion}"
            if is_exact:
                _assert_exact(label, got, expected)
            else:
                got = got if channels is None else got.index_select(channel, channels)
                _assert_close(label, got, expected, allowed)

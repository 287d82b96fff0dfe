"""The layers as functions: they check their arguments and call the ops.

Every convolution exists for one, two and three spatial axes (``symmetric_conv1d``, ``symmetric_conv2d``, ...).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from numbers import Integral
from operator import index
from typing import Any, Concatenate, Literal, ParamSpec, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from tritonsym import groups as group_ops
from tritonsym import matrices, ops, reference
from tritonsym._compat import constant
from tritonsym.fold import GroupSpec
from tritonsym.packing import check_inexact, check_tensor, order_of
from tritonsym.reference import ACTIVATIONS, REDUCTIONS
from tritonsym.spec import Geometry, orbit_spec, pool_spec, tied_spec
from tritonsym.symmetry import FilterLayout, Symmetry, parity_axes, tap_orbits

P = ParamSpec("P")
Ints = int | Sequence[int]
Spec = str | Mapping[str, int] | FilterLayout | None
Parity = str | Mapping[str, str]
Activation = Literal["relu", "gelu", "silu", "sigmoid", "tanh"]
PoolReduction = Literal["max", "min", "sum", "mean"]
POOL_REDUCTIONS: tuple[str, ...] = get_args(PoolReduction)
#: The named groups of re-orderings.
ORDERS = ("swap", "cyclic", "permutations", "flip")

__all__ = [
    "global_conv1d",
    "gram",
    "group_conv1d",
    "group_conv2d",
    "group_conv3d",
    "group_linear",
    "newton_schulz",
    "orbit_pool_conv1d",
    "orbit_pool_conv2d",
    "orbit_pool_conv3d",
    "quadratic_form",
    "symmetric_conv1d",
    "symmetric_conv2d",
    "symmetric_conv3d",
    "symmetric_conv_transpose1d",
    "symmetric_conv_transpose2d",
    "symmetric_conv_transpose3d",
    "symmetric_linear",
    "symmetric_matmul",
    "symmetric_mm",
    "symmetrize",
    "tied_conv1d",
    "tied_conv2d",
    "tied_conv3d",
    "topk_pool1d",
]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_choice(where: str, name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_module(where: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{where}: expected a torch.nn.Module, got {type(model).__name__}")


def check_activation(where: str, activation: object) -> None:
    if activation is not None:
        check_choice(where, "activation", activation, tuple(ACTIVATIONS))


def is_count(value: object) -> bool:
    """Whether this is an integer or a symbolic size of a trace, but not a bool."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def as_ints(value: Any) -> Any:
    """Convert integers of any type, such as NumPy's, to int, also inside tuples and lists; leave anything else."""
    if isinstance(value, tuple | list):
        return tuple(map(as_ints, value))
    return index(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def check_counts(where: str, minimum: int, **values: Any) -> list[int]:
    """Check that the values are integers >= `minimum`, and return them as ints."""
    for name, value in values.items():
        if not is_count(as_ints(value)):
            raise TypeError(f"{where}: {name} must be an integer, got {value!r}")
        if value < minimum:
            raise ValueError(f"{where}: {name} must be at least {minimum}, got {value}")
    return [*map(as_ints, values.values())]


def check_sizes(where: str, name: str, value: Ints, ndim: int, minimum: int) -> list[int]:
    """Check sizes, and return one integer per axis."""
    converted = as_ints(value)
    sizes: list[Any] = list(converted) if isinstance(converted, tuple) else [converted]
    if len(sizes) == 1:
        sizes = sizes * ndim
    are_counts = all(map(is_count, sizes))
    if are_counts and len(sizes) == ndim and all(size >= minimum for size in sizes):
        return sizes
    error = ValueError if are_counts else TypeError
    raise error(f"{where}: {name} must be {ndim} integers >= {minimum} (or one for all axes), got {value!r}")


def check_input(where: str, x: Tensor, channels: int, ndim: int) -> Tensor:
    """Check x, and return it with a batch axis."""
    check_tensor(where, "x", x)
    if x.ndim not in (ndim + 1, ndim + 2):
        raise ValueError(
            f"{where}: x must have shape (N, C_in, {_axes(ndim)}) or (C_in, {_axes(ndim)}), got {tuple(x.shape)}"
        )
    if x.shape[-ndim - 1] != channels:
        raise ValueError(
            f"{where}: x has {x.shape[-ndim - 1]} channels (shape {tuple(x.shape)}) but the weight expects {channels}"
        )
    return x if x.ndim == ndim + 2 else x[None]


def _axes(ndim: int) -> str:
    return ", ".join(("D", "H", "W")[-ndim:]) if ndim > 1 else "L"


def _check_weight(where: str, name: str, weight: Tensor, ndim: int, shape: str) -> None:
    check_tensor(where, name, weight)
    if weight.ndim != ndim:
        raise ValueError(f"{where}: {name} must have shape {shape}, got {tuple(weight.shape)}")


def _check_groups(where: str, groups: int, parts: int, noun: str = "stored filters") -> int:
    (count,) = check_counts(where, 1, groups=groups)
    if parts % count:
        raise ValueError(f"{where}: groups={groups} must divide {parts} {noun}")
    return count


def check_bias(where: str, bias: Tensor | None, length: int) -> None:
    if bias is not None:
        check_tensor(where, "bias", bias)
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != length):
        raise ValueError(f"{where}: bias must have shape ({length},), got {tuple(bias.shape)}")


# --- arguments to specs: plain values, cached; compilers treat the results as constants -------------------------------


def _padding(
    where: str, padding: str | Ints, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The zero padding on both sides, and what an uneven 'same' adds on the far side, as in torch."""
    ndim = len(kernel_size)
    if not isinstance(padding, str):
        return check_sizes(where, "padding", padding, ndim, 0), [0] * ndim
    if padding == "valid":
        return [0] * ndim, [0] * ndim
    if padding != "same":
        raise ValueError(f"{where}: padding must be ints, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError(f"{where}: padding='same' needs stride 1, got stride={tuple(stride)}; pass padding as ints")
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    return [t // 2 for t in total], [t % 2 for t in total]


def _geometry(
    where: str, kernel_size: Ints, stride: Ints, padding: Any, dilation: Ints, output_padding: Ints | None = None
) -> Geometry:
    """The geometry of a convolution, which is transposed if there is an `output_padding`."""
    size = tuple(map(index, kernel_size))  # type: ignore[arg-type]
    ndim = len(size)
    strides = check_sizes(where, "stride", stride, ndim, 1)
    dilations = check_sizes(where, "dilation", dilation, ndim, 1)
    if output_padding is None:
        pads, extra = _padding(where, padding, size, strides, dilations)
    else:
        pads = check_sizes(where, "padding", padding, ndim, 0)
        extra = check_sizes(where, "output_padding", output_padding, ndim, 0)
        if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
            raise ValueError(
                f"{where}: output_padding={tuple(extra)} must be smaller than stride or dilation on every axis"
            )
    transposed = output_padding is not None
    return Geometry(size, tuple(strides), tuple(pads), tuple(dilations), tuple(extra), transposed)


def _remembered(function: Callable[P, str]) -> Callable[P, str]:
    """Cache the results of a function; lists are hashed as tuples, mappings as their items."""
    remember = functools.lru_cache(maxsize=4096, typed=True)(lambda *args: function(*map(_thawed, args)))  # type: ignore[call-arg]

    @constant
    @functools.wraps(function)
    def call(*args: Any) -> str:
        for key in (args, map(_frozen, args)):
            try:
                return remember(*key)
            except TypeError:  # an argument is unhashable or wrong
                pass
        return function(*args)  # type: ignore[call-arg]

    return call  # type: ignore[return-value]


class _Items(tuple[Any, ...]):
    """The items of a mapping, so that `_thawed` can tell them from a tuple."""


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _Items(value.items())
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return dict(value) if isinstance(value, _Items) else value


@_remembered
def orbit_text(where: str, symmetry: Any, stored: int, groups: int, *sizes: Any) -> str:
    """`ConvSpec.text` of filters in orbits; `sizes` are the arguments of `_geometry`."""
    layout, geometry = FilterLayout.from_stored(symmetry, stored, groups, where), _geometry(where, *sizes)
    layout.check_kernel(geometry.kernel_size, where)
    return orbit_spec(layout, geometry).text


@_remembered
def tied_text(where: str, symmetry: str, parity: Parity, tied: int, free: int, groups: int, *sizes: Any) -> str:
    """`ConvSpec.text` of filters with tied taps, followed by free filters."""
    value, geometry = Symmetry(symmetry), _geometry(where, *sizes)
    value.check_kernel(geometry.kernel_size, where)
    odd = parity_axes(value, dict(parity) if isinstance(parity, tuple) else parity, where)
    orbits = tap_orbits(value, geometry.kernel_size, odd, where)
    return tied_spec(orbits, tied // groups, free // groups, groups, geometry).text


@_remembered
def pool_text(where: str, symmetry: str, reduce: str, filters: int, groups: int, *sizes: Any) -> str:
    """`ConvSpec.text` of filters with a reduction over their images."""
    value, geometry = Symmetry(symmetry), _geometry(where, *sizes)
    if value.is_radial:
        raise ValueError(f"{where}: {symmetry!r} has no images to pool over; use a group such as 'hv' or 'd4'")
    value.check_kernel(geometry.kernel_size, where)
    check_choice(where, "reduce", reduce, POOL_REDUCTIONS)
    return pool_spec(value, reduce, filters // groups, groups, geometry).text


def _for_axes(ndim: int, generic: Callable[Concatenate[int, str, P], Tensor]) -> Callable[P, Tensor]:
    """The public function for `ndim` spatial axes, made from a generic one."""
    name = f"{generic.__name__.lstrip('_')}{ndim}d"

    def function(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return generic(ndim, name, *args, **kwargs)

    functools.update_wrapper(function, generic)
    del function.__wrapped__  # type: ignore[attr-defined]
    signature = inspect.signature(generic)
    function.__signature__ = signature.replace(parameters=list(signature.parameters.values())[2:])  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = name
    assert generic.__doc__ is not None
    function.__doc__ = generic.__doc__.replace("{axes}", _axes(ndim)).replace("{n}", str(ndim))
    return function


# --- convolutions -----------------------------------------------------------------------------------------------------


def _symmetric_conv(
    ndim: int,
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    symmetry: Spec,
    activation: Activation | None = None,
) -> Tensor:
    """Convolve with stored filters and their mirrored or rotated images: y = act(conv(x, expand(weight)) + b).

    Equals ``F.conv{n}d(x, expanded, ...)``, where expanded[o] = g(o) weight[u(o)]: filter o is the image under g(o) of
    stored filter u(o), in the output order of `FilterLayout`.

    Args:
        x: (N, C_in, {axes}) or (C_in, {axes}); its memory format is kept.
        weight: (stored filters, C_in / groups, *kernel).
        bias: (C_out,), or (stored filters,) to share each value among the images of a filter.
        stride, padding, dilation, groups: as in ``F.conv{n}d``, incl. padding='same' and 'valid'.
        symmetry: a name (every stored filter is a base filter), a mapping from names to counts of OUTPUT filters (the
            stored filters left over are free), a `FilterLayout`, or None.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.
    Returns:
        (N, C_out, *out) in the dtype of x (the autocast dtype under autocast).
    Raises:
        ValueError: shapes or options disagree, or the symmetry does not act on this kernel.
        TypeError: dtypes differ.

    >>> x, weight = torch.randn(2, 3, *[8] * {n}), torch.randn(4, 3, *[3] * {n})
    >>> functional.symmetric_conv{n}d(x, weight, symmetry="h").shape[1]
    8
    """
    _check_weight(where, "weight", weight, ndim + 2, "(stored filters, C_in / groups, *kernel)")
    groups = _check_groups(where, groups, weight.shape[0])
    check_activation(where, activation)
    kernel_size, stored = tuple(map(index, weight.shape[2:])), index(weight.shape[0])
    spec = orbit_text(where, symmetry, stored, groups, kernel_size, stride, padding, dilation)
    return ops.conv(where, spec, x, (weight,), bias, activation)


def _symmetric_conv_transpose(
    ndim: int,
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    symmetry: Spec,
    activation: Activation | None = None,
) -> Tensor:
    """Transposed convolution with stored filters and their images: y = act(conv_transpose(x, expand(weight)) + b).

    Args:
        x: (N, C_in, {axes}) or (C_in, {axes}).
        weight: (C_in, stored filters / groups, *kernel).
        bias: (C_out,), or (stored filters,) to share each value among the images of a filter.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose{n}d``.
        symmetry, activation: as in ``symmetric_conv{n}d``.
    Returns:
        (N, C_out, *out) in the dtype of x (the autocast dtype under autocast).
    Raises:
        ValueError: shapes or options disagree, or the symmetry does not act on this kernel.
        TypeError: dtypes differ.

    >>> x, weight = torch.randn(2, 3, *[8] * {n}), torch.randn(3, 4, *[3] * {n})
    >>> functional.symmetric_conv_transpose{n}d(x, weight, symmetry="h").shape[1]
    8
    """
    _check_weight(where, "weight", weight, ndim + 2, "(C_in, stored filters / groups, *kernel)")
    groups = _check_groups(where, groups, weight.shape[0], "input channels")
    check_activation(where, activation)
    kernel_size, stored = tuple(map(index, weight.shape[2:])), index(weight.shape[1]) * groups
    spec = orbit_text(where, symmetry, stored, groups, kernel_size, stride, padding, dilation, output_padding)
    return ops.conv(where, spec, x, (weight,), bias, activation)


def _tied_conv(
    ndim: int,
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    symmetry: str,
    kernel_size: Ints,
    parity: Parity = "even",
    free_weight: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """Convolve with filters that are their own images, up to sign, and with free filters.

    dense[u, c, k] = sign[k] weight[u, c, slot[k]] with slot and sign from ``tap_orbits(symmetry, kernel_size, odd)``.

    Args:
        x: (N, C_in, {axes}) or (C_in, {axes}).
        weight: (tied filters, C_in / groups, orbits), one value per tap orbit, in the order of the orbits' first taps.
        bias: (C_out,) with C_out = tied + free filters.
        stride, padding, dilation, groups: as in ``F.conv{n}d``, incl. padding='same' and 'valid'.
        symmetry: one name, incl. 'radial' and 'radial:WIDTH'.
        kernel_size: the size of the dense kernel.
        parity: 'even' (w = its image), 'odd' (-1 per reflection), or one per axis: {'h': 'odd', 'v': 'even'}.
        free_weight: (free filters, C_in / groups, *kernel); inside every group the tied filters come first.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.
    Returns:
        (N, C_out, *out) in the dtype of x (the autocast dtype under autocast).
    Raises:
        ValueError: shapes or options disagree, or the symmetry does not act on this kernel.
        TypeError: dtypes differ.

    >>> x, weight = torch.randn(2, 3, *[8] * {n}), torch.randn(4, 3, 2 * 3 ** ({n} - 1))  # 2 values for 3 taps of a row
    >>> functional.tied_conv{n}d(x, weight, symmetry="h", kernel_size=3).shape[1]
    4
    """
    check_tensor(where, "weight", weight)
    size = tuple(check_sizes(where, "kernel_size", kernel_size, ndim, 1))
    groups = _check_groups(where, groups, weight.shape[0])
    free = 0
    if free_weight is not None:
        check_tensor(where, "free_weight", free_weight)
        free = index(free_weight.shape[0])
        _check_groups(where, groups, free, "free filters")
    check_activation(where, activation)
    spec = tied_text(where, symmetry, parity, index(weight.shape[0]), free, groups, size, stride, padding, dilation)
    return ops.conv(where, spec, x, stored_tensors(weight, free_weight), bias, activation)


def stored_tensors(weight: Tensor, free_weight: Tensor | None) -> tuple[Tensor, ...]:
    """The weights of a tied layer, without empty ones."""
    if free_weight is None:
        return (weight,)
    return (weight, free_weight) if weight.shape[0] else (free_weight,)


def _orbit_pool_conv(
    ndim: int,
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    symmetry: str,
    reduce: PoolReduction = "max",
    activation: Activation | None = None,
) -> Tensor:
    """Convolve with a filter and all its images and reduce over the orbit: y = act(reduce_g conv(x, g weight) + b).

    'sum' and 'mean' equal one convolution with the symmetrized kernel, and are computed that way.

    Args:
        x: (N, C_in, {axes}) or (C_in, {axes}).
        weight: (C_out, C_in / groups, *kernel).
        bias: (C_out,), added once, after the reduction.
        stride, padding, dilation, groups: as in ``F.conv{n}d``, incl. padding='same' and 'valid'.
        symmetry: the name of a group.
        reduce: 'max', 'min', 'sum' or 'mean'. 'max' and 'min' are undefined for complex x.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.
    Returns:
        (N, C_out, *out) in the dtype of x (the autocast dtype under autocast).
    Raises:
        ValueError: shapes or options disagree, or the symmetry does not act on this kernel.
        TypeError: dtypes differ.

    >>> x, weight = torch.randn(2, 3, *[8] * {n}), torch.randn(4, 3, *[3] * {n})
    >>> functional.orbit_pool_conv{n}d(x, weight, symmetry="h", reduce="max").shape[1]
    4
    """
    _check_weight(where, "weight", weight, ndim + 2, "(C_out, C_in / groups, *kernel)")
    groups = _check_groups(where, groups, weight.shape[0], "filters")
    check_activation(where, activation)
    kernel_size, filters = tuple(map(index, weight.shape[2:])), index(weight.shape[0])
    spec = pool_text(where, symmetry, reduce, filters, groups, kernel_size, stride, padding, dilation)
    return ops.conv(where, spec, x, (weight,), bias, activation, orbit_scale(symmetry, reduce))


@_remembered
def group_text(where: str, symmetry: str, groups: int, *sizes: Any) -> str:
    """`GroupSpec.text` of a group convolution."""
    value, geometry = Symmetry(symmetry), _geometry(where, *sizes)
    if value.is_radial:
        raise ValueError(f"{where}: {symmetry!r} has no elements; use a group such as 'hv' or 'd4'")
    value.check_kernel(geometry.kernel_size, where)
    return GroupSpec(value, groups, geometry).text


def linear_text(where: str, symmetry: str) -> str:
    """`GroupSpec.text` of a group linear layer: kernels of size 1, on which every group acts."""
    ones = (1,) * (3 if Symmetry(symmetry).only_flips else 2)
    return group_text(where, symmetry, 1, ones, 1, 0, 1)


def _group_conv(
    ndim: int,
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    symmetry: str,
    activation: Activation | None = None,
) -> Tensor:
    """Convolve fields of a group: y[g, o] = act(sum_{h, c} conv(x[h, c], g w[o, c, g^-1 h]) + b[o]).

    A field has one channel per element, in the output order of a symmetric convolution (the identity, then the images):
    channel = element * fields + field. Moving x by an element moves y by it. The path `fold` takes 1 / |G| of the dense
    multiply-adds for flips and 'c2', 1/4 for 'd4', 1/2 for 'c4' (`tritonsym.fold`).

    Args:
        x: (N, |G| C, {axes}) or (|G| C, {axes}); its memory format is kept.
        weight: (fields out, C / groups, |G|, *kernel).
        bias: (fields out,) or None.
        stride, padding, dilation: as in ``F.conv{n}d``, incl. padding='same' and 'valid'.
        groups: the number of groups of fields.
        symmetry: the name of a group.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.
    Returns:
        (N, |G| fields out, *out) in the dtype of x (the autocast dtype under autocast).
    Raises:
        ValueError: shapes or options disagree, or the symmetry does not act on this kernel.
        TypeError: dtypes differ.

    >>> x, weight = torch.randn(2, 3 * 2, *[8] * {n}), torch.randn(4, 3, 2, *[3] * {n})  # 3 fields to 4
    >>> functional.group_conv{n}d(x, weight, symmetry="h").shape[1]
    8
    """
    _check_weight(where, "weight", weight, ndim + 3, "(fields out, fields in / groups, elements, *kernel)")
    groups = _check_groups(where, groups, weight.shape[0], "fields")
    check_activation(where, activation)
    kernel_size = tuple(map(index, weight.shape[3:]))
    text = group_text(where, symmetry, groups, kernel_size, stride, padding, dilation)
    return group_ops.group_conv(where, text, x, weight, bias, activation)


def group_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, symmetry: str, activation: Activation | None = None
) -> Tensor:
    """Multiply fields of a group: y[g, o] = act(sum_{h, c} w[o, c, g^-1 h] x[h, c] + b[o]).

    Args:
        x: (..., |G| C).
        weight: (fields out, C, |G|).
        bias, symmetry, activation: as in ``group_conv1d``.
    Returns:
        (..., |G| fields out).
    Raises:
        ValueError: shapes disagree, or an unknown symmetry.
        TypeError: dtypes differ.

    >>> functional.group_linear(torch.randn(2, 3 * 4), torch.randn(5, 3, 4), symmetry="hv").shape  # 3 fields to 5
    torch.Size([2, 20])
    """
    where = "group_linear"
    _check_weight(where, "weight", weight, 3, "(fields out, fields in, elements)")
    check_activation(where, activation)
    return group_ops.group_linear(where, linear_text(where, symmetry), x, weight, bias, activation)


@constant
def orbit_scale(symmetry: str, reduce: str) -> int | None:
    """The factor s by which 'sum' or 'mean' pooling equals a convolution with s times the orbit mean; else None."""
    return {"sum": Symmetry(symmetry).order, "mean": 1}.get(reduce)


symmetric_conv1d = _for_axes(1, _symmetric_conv)
symmetric_conv2d = _for_axes(2, _symmetric_conv)
symmetric_conv3d = _for_axes(3, _symmetric_conv)
symmetric_conv_transpose1d = _for_axes(1, _symmetric_conv_transpose)
symmetric_conv_transpose2d = _for_axes(2, _symmetric_conv_transpose)
symmetric_conv_transpose3d = _for_axes(3, _symmetric_conv_transpose)
tied_conv1d = _for_axes(1, _tied_conv)
tied_conv2d = _for_axes(2, _tied_conv)
tied_conv3d = _for_axes(3, _tied_conv)
group_conv1d = _for_axes(1, _group_conv)
group_conv2d = _for_axes(2, _group_conv)
group_conv3d = _for_axes(3, _group_conv)
orbit_pool_conv1d = _for_axes(1, _orbit_pool_conv)
orbit_pool_conv2d = _for_axes(2, _orbit_pool_conv)
orbit_pool_conv3d = _for_axes(3, _orbit_pool_conv)


# --- symmetric matrices -----------------------------------------------------------------------------------------------


def symmetric_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    never_unpack: bool = False,
    skew: bool = False,
) -> Tensor:
    """y = act(x S^T + b), as in `torch.nn.functional.linear`, with the symmetric matrix S = S^T stored packed.

    Args:
        x: (..., n).
        weight: S in rectangular full packed storage (`tritonsym.packing`), of shape `packed_shape(n)`.
        bias: (n,) or None.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.
        never_unpack: use Triton kernels or blocks, which never build S or its gradient, even where they are slower.
        skew: S = -S^T instead, of shape `packed_shape(n - 1)`.
    Returns:
        (..., n) in the dtype of x (the autocast dtype under autocast).
    Raises:
        ValueError: the weight is not a packed rectangle (the message names the n that would fit), or shapes disagree.
        TypeError: dtypes differ.
        NotImplementedError: `never_unpack` where only the reference works: under `torch.func`, or with symbolic sizes.

    >>> packed = tritonsym.pack(torch.eye(3))
    >>> functional.symmetric_linear(torch.tensor([1.0, 2.0, 3.0]), packed)
    tensor([1., 2., 3.])
    """
    where = "symmetric_linear"
    n = order_of(weight, where) + skew
    if weight.ndim > 2:
        raise ValueError(f"{where}: weight must be one packed matrix, got {tuple(weight.shape)}; see symmetric_matmul")
    check_tensor(where, "x", x)
    if x.ndim == 0 or x.shape[-1] != n:
        raise ValueError(f"{where}: x must have shape (..., {n}) for a packed {n} x {n} weight, got {tuple(x.shape)}")
    check_bias(where, bias, n)
    check_activation(where, activation)
    ops.check_beside(where, x, weight=weight, bias=bias)
    return matrices.linear(-x if skew else x, weight, bias, activation, never_unpack, skew)


def symmetric_matmul(
    packed: Tensor, x: Tensor, left: bool = False, *, never_unpack: bool = False, skew: bool = False
) -> Tensor:
    """x S, or S x with `left`, for a packed symmetric matrix S; x is (..., n), with `left` (..., n, m).

    For packed matrices with batch axes in front, x is (..., m, n), with `left` (..., n, m), and batch axes broadcast as
    in `torch.matmul`. `never_unpack`, `skew` and errors are as in `symmetric_linear`.

    >>> functional.symmetric_matmul(tritonsym.pack(2 * torch.eye(3)), torch.ones(3, 2), left=True)
    tensor([[2., 2.],
            [2., 2.],
            [2., 2.]])
    """
    where = "symmetric_matmul"
    check_tensor(where, "x", x)
    if left:
        if x.ndim < 2:
            raise ValueError(f"{where}: with left=True x must have shape (..., n, m), got {tuple(x.shape)}")
        x = -x.mT if skew else x.mT
        return symmetric_matmul(packed, x, never_unpack=never_unpack, skew=skew).mT
    check_tensor(where, "packed", packed)
    if packed.ndim <= 2:
        return symmetric_linear(-x if skew else x, packed, never_unpack=never_unpack, skew=skew)
    _check_batch(where, packed, x, order_of(packed, where) + skew)
    return matrices.matmul(x, packed, never_unpack, skew)


def _check_batch(where: str, packed: Tensor, x: Tensor, n: int) -> None:
    """Check a batch of packed n x n matrices against x (..., m, n)."""
    pairs = zip(reversed(packed.shape[:-2]), reversed(x.shape[:-2]), strict=False)
    if x.ndim < 2 or x.shape[-1] != n or any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError(
            f"{where}: x must have shape (..., m, {n}) with axes in front that broadcast with those of packed "
            f"{tuple(packed.shape)}, got {tuple(x.shape)}"
        )
    ops.check_beside(where, x, packed=packed)


def quadratic_form(packed: Tensor, x: Tensor) -> Tensor:
    """x S x^T for every row of x and a packed symmetric matrix S; computed by blocks, it takes half the multiply-adds.

    Args:
        packed: of shape `tritonsym.packing.packed_shape(n)`, with batch axes in front for several matrices.
        x: (..., n), or (..., m, n) for several matrices. Complex numbers are not conjugated.
    Returns:
        (...): the shape of x without its last axis, in the dtype of x (the autocast dtype under autocast).
    Raises:
        ValueError: `packed` is not a packed rectangle, or shapes disagree.
        TypeError: dtypes differ.

    >>> functional.quadratic_form(tritonsym.pack(torch.eye(2)), torch.tensor([[3.0, 4.0]]))
    tensor([25.])
    """
    where = "quadratic_form"
    n = order_of(packed, where)
    check_tensor(where, "x", x)
    if packed.ndim > 2:
        _check_batch(where, packed, x, n)
    elif x.ndim == 0 or x.shape[-1] != n:
        raise ValueError(f"{where}: x must have shape (..., {n}) for a packed {n} x {n} matrix, got {tuple(x.shape)}")
    ops.check_beside(where, x, packed=packed)
    return matrices.quadratic_form(x, packed)


def gram(x: Tensor) -> Tensor:
    """X X^T, equal to its transpose to the bit. (X^T X is ``gram(x.mT)``.)

    Args:
        x: (..., m, k), of any strides. Complex numbers are not conjugated.
    Returns:
        (..., m, m) in the dtype of x (the autocast dtype under autocast).
    Raises:
        ValueError: x has fewer than two axes.
        TypeError: x holds integers.

    >>> c = functional.gram(torch.randn(3, 5))
    >>> c.shape, torch.equal(c, c.T)
    (torch.Size([3, 3]), True)
    """
    check_inexact("gram", "x", x)
    if x.ndim < 2:
        raise ValueError(f"gram: x must have shape (..., m, k), got {tuple(x.shape)}")
    return matrices.gram(x, None, 1.0, 0.0)


def symmetric_mm(matrix: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """beta A + alpha A A for a symmetric matrix A, equal to its transpose to the bit.

    Computes the lower triangle of beta A + alpha A A^T, which also defines the result if A is not exactly symmetric.

    Args:
        matrix: A, (..., n, n).
        alpha, beta: numbers; the term beta A is left out if beta = 0.
    Returns:
        (..., n, n) in the dtype of A (the autocast dtype under autocast).
    Raises:
        ValueError: A is not square.
        TypeError: A holds integers, or alpha or beta is not a number.

    >>> functional.symmetric_mm(torch.eye(2), alpha=0.5, beta=2.0)
    tensor([[2.5000, 0.0000],
            [0.0000, 2.5000]])
    """
    where = "symmetric_mm"
    check_inexact(where, "matrix", matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{where}: matrix must have shape (..., n, n), got {tuple(matrix.shape)}")
    for name, value in (("alpha", alpha), ("beta", beta)):
        _check_number(where, name, value)
    return matrices.gram(matrix, matrix if beta else None, alpha, beta)


def _check_number(where: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}")


Triple = tuple[float, float, float]


def newton_schulz(
    gradient: Tensor | Sequence[Tensor],
    steps: int | None = None,
    coefficients: Triple | Sequence[Triple] = (3.4445, -4.7750, 2.0315),
    *,
    eps: float = 1e-7,
) -> Any:
    """Orthogonalise: approximate U V^T of the singular value decomposition G = U diag(s) V^T.

    X = G / max(|G|, eps), then in every step X <- a X + (b A + c A A) X with A = X X^T. A G with more rows than columns
    is transposed first, so that A is the smaller Gram matrix. A and b A + c A A are symmetric, so only half of each is
    computed. This is the iteration of the Muon optimiser (Keller Jordan 2024,
    https://kellerjordan.github.io/posts/muon/). `torch.optim.Muon` runs it in bfloat16: pass ``G.bfloat16()`` to do the
    same. The default coefficients bring singular values near 1, within about 0.7 to 1.2, in 5 steps; one triple per
    step gives Polar Express (Amsel et al. 2025, arXiv 2505.16932). `tests/examples/muon.py` is an optimiser.

    Args:
        gradient: G, (..., m, k), real; its dtype is used throughout. Or a list of such tensors of any shapes: small
            matrices are padded with zeros, which stay zeros, so that similar shapes run as one batch.
        steps: the number of iterations; by default 5, or the number of triples.
        coefficients: (a, b, c) for all steps, or a list with one triple per step.
        eps: the smallest norm to divide by.
    Returns:
        (..., m, k) in the dtype of G; a list for a list.
    Raises:
        ValueError: G has fewer than two axes, steps < 0, not three coefficients, or not as many triples as steps.
        TypeError: the dtype of G is not real and floating, or another argument is not a number.

    >>> u = functional.newton_schulz(torch.randn(4, 9))
    >>> bool((torch.linalg.svdvals(u) - 1).abs().max() < 0.5)
    True
    """
    where = "newton_schulz"
    triples = _triples(where, steps, coefficients)
    _check_number(where, "eps", eps)
    if isinstance(gradient, list | tuple):
        for i, g in enumerate(gradient):
            _check_gradient(where, f"gradient[{i}]", g)
        return _in_buckets(list(gradient), lambda x: _iterate(x, triples, eps))
    _check_gradient(where, "gradient", gradient)
    return _in_buckets([gradient], lambda x: _iterate(x, triples, eps))[0]  # type: ignore[list-item]


def _check_gradient(where: str, name: str, value: Any) -> None:
    check_tensor(where, name, value)
    if not value.is_floating_point():
        raise TypeError(f"{where}: {name} must be real and floating, got {value.dtype}; convert it")
    if value.ndim < 2:
        raise ValueError(f"{where}: {name} must have shape (..., m, k), got {tuple(value.shape)}")


def _triples(where: str, steps: int | None, coefficients: Any) -> list[Triple]:
    """Check the coefficients, and return one triple per step."""
    is_list = isinstance(coefficients, list | tuple) and all(isinstance(t, list | tuple) for t in coefficients)
    triples = list(coefficients) if is_list else [coefficients]
    for triple in triples:
        if not isinstance(triple, tuple | list) or len(triple) != 3:
            raise ValueError(
                f"{where}: coefficients must be three numbers (a, b, c), or a list of triples, got {triple!r}"
            )
        for value in triple:
            _check_number(where, "coefficients", value)
    if steps is None:
        return triples if is_list else triples * 5
    (steps,) = check_counts(where, 0, steps=steps)
    if is_list and len(triples) != steps:
        raise ValueError(f"{where}: steps={steps} but {len(triples)} triples of coefficients; leave steps out")
    return triples if is_list else triples * steps


#: In a list, matrices whose smaller size is at most `PADDED_UP_TO` are padded to multiples of `PADDED_TO` on both axes.
PADDED_UP_TO, PADDED_TO = 128, 32


def _in_buckets(matrices: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply `function` to batches (count, m, k), m <= k, that hold all the matrices (..., m, k) or (..., k, m)."""
    wide = [g.mT if g.shape[-2] > g.shape[-1] else g for g in matrices]
    flat = [g.reshape(math.prod(g.shape[:-2]), *g.shape[-2:]) for g in wide]
    buckets: dict[Any, list[int]] = {}
    for i, g in enumerate(flat):
        small = len(flat) > 1 and g.shape[1] <= PADDED_UP_TO
        m, k = (-(-size // PADDED_TO) * PADDED_TO if small else size for size in g.shape[1:])
        buckets.setdefault((m, k, g.dtype, g.device), []).append(i)
    results = list(flat)
    for (m, k, *_), members in buckets.items():
        padded = [
            pad(g, (0, k - g.shape[2], 0, m - g.shape[1])) if (m, k) != g.shape[1:] else g
            for g in (flat[i] for i in members)
        ]
        y = function(torch.cat(padded) if len(padded) > 1 else padded[0])
        for i, part in zip(members, y.split([flat[i].shape[0] for i in members]), strict=True):
            results[i] = part[:, : flat[i].shape[1], : flat[i].shape[2]]
    return [(y.mT if w is not g else y).reshape(g.shape) for y, w, g in zip(results, wide, matrices, strict=True)]


def _iterate(x: Tensor, triples: Sequence[Triple], eps: float) -> Tensor:
    """Run the steps of `newton_schulz` on x (batch, m, k), m <= k."""
    wide = torch.float32 if x.dtype == torch.float16 else None  # in float16 the norm of ordinary gradients overflows
    x = (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide).clamp(min=eps)).to(x.dtype)
    for a, b, c in triples:
        square = matrices.gram(x, None, 1.0, 0.0, mirrored=False)
        x = torch.baddbmm(x, matrices.gram(square, square if b else None, c, b, mirrored=False), x, beta=a)
    return x


# --- sequences and sets -----------------------------------------------------------------------------------------------


def global_conv1d(
    x: Tensor,
    center: Tensor,
    surround: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """Permutation-equivariant layer: y_i = act(W_c x_i + W_s sum_{j != i} x_j + b), in O(L) for L positions.

    Equals the convolution whose kernel of width 2 L + 1 is W_c in the centre and W_s elsewhere. The two-matrix form is
    that of Zaheer et al. 2017, "Deep Sets", lemma 3, and of GlobalConv1D in the CNN-Symmetry package.

    Args:
        x: (N, C_in, L) or (C_in, L).
        center, surround: (C_out, C_in).
        bias: (C_out,) or None.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.
    Returns:
        (N, C_out, L) or (C_out, L). Equivariant up to rounding: positions are summed in order.
    Raises:
        ValueError: shapes disagree.
        TypeError: dtypes differ.

    >>> functional.global_conv1d(torch.ones(1, 1, 4), torch.ones(1, 1), 10 * torch.ones(1, 1))
    tensor([[[31., 31., 31., 31.]]])
    """
    where = "global_conv1d"
    _check_weight(where, "center", center, 2, "(C_out, C_in)")
    check_tensor(where, "surround", surround)
    if surround.shape != center.shape:
        raise ValueError(
            f"{where}: center has shape {tuple(center.shape)} but surround {tuple(surround.shape)}; they must be equal"
        )
    batched = check_input(where, x, center.shape[1], 1)
    check_bias(where, bias, center.shape[0])
    check_activation(where, activation)
    ops.check_beside(where, batched, center=center, surround=surround, bias=bias)
    y = reference.global_conv1d(batched, center, surround, bias, activation)
    return y if batched is x else y[0]


def topk_pool1d(x: Tensor, k: int) -> Tensor:
    """The k largest values of every channel in descending order: (..., L) -> (..., k); k = 1 is global max pooling.

    Raises:
        ValueError: k is not between 1 and L.
        TypeError: k is not an integer, or x is complex.

    >>> functional.topk_pool1d(torch.tensor([[3.0, 1.0, 2.0]]), 2)
    tensor([[3., 2.]])
    """
    (k,) = check_counts("topk_pool1d", 1, k=k)
    check_tensor("topk_pool1d", "x", x)
    if x.is_complex():
        raise TypeError(f"topk_pool1d: complex numbers have no order, x is {x.dtype}")
    if x.ndim == 0 or k > x.shape[-1]:
        raise ValueError(f"topk_pool1d: k={k} must be between 1 and the length of the last axis of x {tuple(x.shape)}")
    return reference.topk_pool1d(x, k)


Orders = str | Sequence[Sequence[int]]


def order_length(over: object) -> int:
    """The length of the first permutation in a list; 0 if `over` is not one."""
    return len(over[0]) if isinstance(over, Sequence) and over and isinstance(over[0], Sequence) else 0


@constant
def orders_of(over: Any, n: int, where: str) -> tuple[tuple[int, ...], ...]:
    """The group of re-orderings of n entries that `over` names: order[i] is the entry that moves to place i."""
    identity = tuple(range(n))
    if isinstance(over, str):
        check_choice(where, "over", over, ORDERS)
        if over == "swap":
            if n % 2:
                raise ValueError(f"{where}: 'swap' exchanges two halves, but the axis has odd size {n}")
            return (identity, identity[n // 2 :] + identity[: n // 2])
        if over == "cyclic":
            return tuple(identity[i:] + identity[:i] for i in range(max(n, 1)))
        if over == "flip":
            return (identity, identity[::-1])
        if math.factorial(n) > 5040:
            raise ValueError(
                f"{where}: {n} entries have {math.factorial(n)} permutations; 7 entries (5040) are the most"
            )
        return tuple(permutations(identity))
    if not isinstance(over, Sequence) or not all(isinstance(order, Sequence) for order in over):
        raise TypeError(f"{where}: over must be a name such as 'swap' or a list of permutations, got {over!r}")
    try:
        orders: tuple[tuple[int, ...], ...] = tuple(dict.fromkeys(tuple(map(index, order)) for order in over))
    except TypeError:
        raise TypeError(f"{where}: permutations must be of integers, got {over!r}") from None
    for order in orders:
        if sorted(order) != list(identity):
            raise ValueError(f"{where}: {order} is not a permutation of 0..{n - 1}, the entries of the axis")
    for a in orders:
        for b in orders:
            ab = tuple(a[i] for i in b)
            if ab not in orders:
                raise ValueError(
                    f"{where}: the permutations are not closed: {a} after {b} gives {ab}, which is missing; "
                    "add it, or the result would still depend on the order of the inputs"
                )
    if not orders:
        raise ValueError(f"{where}: the list of permutations is empty")
    return orders


def symmetrize(
    inner: Callable[[Tensor], Tensor], x: Tensor, over: Orders = "swap", dim: int = 1, reduce: str = "max"
) -> Tensor:
    """f(x) = reduce over the re-orderings p of inner(p x): the same for every re-ordering of x.

    `inner` is called once, on all re-orderings stacked along the batch. Every sample is first brought to a canonical
    order, so that re-ordered samples give `inner` the very same batch: the result is bitwise equal for EVERY reduction,
    as long as `inner` is deterministic. (Averaging over a group: Murphy et al. 2019, "Janossy pooling".)

    Args:
        inner: maps a batch (B, ...) to a batch (B, ...).
        x: (B, ...), the batch first.
        over: 'swap' (the two halves of `dim`), 'cyclic', 'permutations', 'flip' (reversal), or a list of permutations
            of the entries of `dim` that is closed under composition.
        dim: the axis whose entries are re-ordered; not the batch axis 0.
        reduce: 'max', 'min', 'mean', 'sum' or 'logsumexp'.
    Raises:
        ValueError: the axis or the permutations do not fit.
        TypeError: `inner` does not return one tensor with the batch first.

    >>> x = torch.randn(5, 4)
    >>> f = lambda x: functional.symmetrize(lambda x: x.tanh().cumsum(1), x, over="cyclic", reduce="mean")
    >>> torch.equal(f(x), f(x.roll(1, 1)))
    True
    """
    where = "symmetrize"
    check_choice(where, "reduce", reduce, tuple(REDUCTIONS))
    check_tensor(where, "x", x)
    if not callable(inner):
        raise TypeError(f"{where}: inner must be callable, got {type(inner).__name__}")
    if x.is_complex() and reduce in ("max", "min"):
        raise TypeError(f"{where}: reduce={reduce!r} needs real numbers, x is {x.dtype}; use 'sum' or 'mean'")
    if not is_count(dim):
        raise TypeError(f"{where}: dim must be an integer, got {dim!r}")
    if not -x.ndim <= dim < x.ndim or dim % x.ndim == 0:
        raise ValueError(f"{where}: dim={dim} must name an axis of x {tuple(x.shape)} other than the batch axis 0")
    orders = orders_of(over, index(x.shape[dim]), where)
    y = inner(reference.reorder(x, torch.tensor(orders, dtype=torch.int64, device=x.device), dim % x.ndim))
    if not isinstance(y, Tensor) or y.ndim == 0 or y.shape[0] != x.shape[0] * len(orders):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"{where}: inner must return one tensor with its batch of {x.shape[0] * len(orders)} first, got {got}"
        )
    return reference.reduce_orders(y, len(orders), reduce)

"""The `torch.library` ops behind every layer: ``torch.ops.tritonsym.*``.

One op per layer. Each is composite: its body is made of torch ops (the reference) or, where `dispatch` chooses a
kernel, of opaque kernel ops. Autograd of every order, `torch.func` transforms (grad, vmap, jvp), fake tensors,
complex dtypes, `torch.compile` and `torch.export` therefore follow from the body, and Inductor sees and fuses it.
Ops take batched inputs and checked arguments; the public functions are in `tritonsym.functional`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from tritonsym import calls, dispatch, reference, symm, tuned
from tritonsym.dispatch import needs_gradient
from tritonsym.shift import Conv, Geometry
from tritonsym.symmetry import FilterLayout, Symmetry, TapOrbits, tap_orbits, tied_blocks

Ints = tuple[int, ...]

_library = torch.library.Library("tritonsym", "DEF")


def _op(schema: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Define a composite op; the decorated function is its body.

    Compilers keep what they made of a call on disk, by its arguments: `state` is all else that the body depends on.
    """

    def define(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = _library.define(schema.replace(") ->", ', *, str state="") ->'), tags=(torch.Tag.pt2_compliant_tag,))

        def kernel(*args: Any, state: str = "", **kwargs: Any) -> Tensor:
            return body(*args, **kwargs)

        _library.impl(name, kernel, "CompositeImplicitAutograd")
        # the same body under vmap: without it functorch runs a composite op sample by sample
        _library.impl(name, kernel, "FuncTorchBatchedDecomposition")
        op = getattr(torch.ops.tritonsym, name)

        def call(*args: Any) -> Tensor:
            if torch.compiler.is_compiling() and not _is_exporting():
                return op(*args, state=_state())
            return op(*args)

        return call

    return define


@calls.constant
def _is_exporting() -> bool:
    return torch.compiler._is_exporting_flag  # Dynamo of torch 2.11 takes `is_exporting` for true


@calls.constant
def _state() -> str:
    return f"{_sources()} {dispatch.switches()} {tuned.stamp()}"


@cache
def _sources() -> str:
    """A digest of the library's own code."""
    folder = Path(__file__).parent
    files = [*folder.rglob("*.py"), *tuned.shipped_file("").parent.parent.glob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def _takes_reference(*tensors: Tensor | None) -> bool:
    """Whether no plan can be made: sizes are symbolic, or transforms are at work that an autograd.Function inside a
    composite op would stop."""
    if torch._C._are_functorch_transforms_active() or fwAD._current_level >= 0:
        return True
    return any(isinstance(size, torch.SymInt) for t in tensors if t is not None for size in t.shape)


@lru_cache(maxsize=4096)
def _orbit_conv(
    layout: str, groups: int, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, *transposed: Any
) -> tuple[FilterLayout, Conv]:
    """The same objects for the same arguments: they keep their hashes and tables."""
    filters = FilterLayout.from_text(layout, groups)
    geometry = Geometry(kernel_size, stride, padding, dilation, *transposed)
    return filters, Conv(filters.blocks(kernel_size), groups, geometry)


@lru_cache(maxsize=4096)
def _tied_conv(
    symmetry: str, odd: str, tied: int, free: int, groups: int, kernel_size: Ints, *geometry: Any
) -> tuple[TapOrbits, Conv]:
    orbits = tap_orbits(Symmetry(symmetry), kernel_size, odd)
    return orbits, Conv(tied_blocks(orbits, tied, free), groups, Geometry(kernel_size, *geometry))


@lru_cache(maxsize=4096)
def _pooled_conv(
    symmetry: str, reduce: str, filters: int, groups: int, kernel_size: Ints, *geometry: Any
) -> tuple[Symmetry, Conv]:
    group, spatial = Symmetry(symmetry), Geometry(kernel_size, *geometry)
    if reduce in ("sum", "mean"):  # one convolution with a kernel that is its own image
        return group, Conv(tied_blocks(tap_orbits(group, kernel_size), filters, 0), groups, spatial)
    layout = FilterLayout(((group, filters),), 0, groups)
    return group, Conv(layout.blocks(kernel_size), groups, spatial, reduce)


def _ints(*sizes: Sequence[int]) -> tuple[Ints, ...]:
    return tuple(tuple(map(int, axes)) for axes in sizes)


def _plan(layer: str, x: Tensor, *args: Any, **options: Any) -> calls.Call | None:
    """`calls.plan`; None where the reference has to do."""
    if _takes_reference(x):
        return None
    call = calls.plan(layer, x, *args, **options)
    return call if call.runs else None


@_op(
    "symmetric_conv(Tensor x, Tensor weight, Tensor? bias, str layout, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, int groups, str? activation=None) -> Tensor"
)
def symmetric_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    filters, conv = _orbit_conv(layout, groups, *_ints(weight.shape[2:], stride, padding, dilation))
    if call := _plan("SymmetricConv", x, [weight], bias, conv, activation=activation, shared=filters):
        return call.run(x, [weight], bias)
    return reference.symmetric_conv(x, weight, bias, filters, stride, padding, dilation, activation)


@_op(
    "symmetric_conv_transpose(Tensor x, Tensor weight, Tensor? bias, str layout, SymInt[] stride, SymInt[] padding, "
    "SymInt[] output_padding, SymInt[] dilation, int groups, str? activation=None) -> Tensor"
)
def symmetric_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    sizes = _ints(weight.shape[2:], stride, padding, dilation)
    filters, conv = _orbit_conv(layout, groups, *sizes, True, *_ints(output_padding))
    if call := _plan("SymmetricConvTranspose", x, [weight], bias, conv, activation=activation, shared=filters):
        return call.run(x, [weight], bias)
    return reference.symmetric_conv_transpose(
        x, weight, bias, filters, stride, padding, output_padding, dilation, activation
    )


@_op(
    "tied_conv(Tensor x, Tensor weight, Tensor? free_weight, Tensor? bias, str symmetry, str odd, int[] kernel_size, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, int groups, str? activation=None) -> Tensor"
)
def tied_conv(
    x: Tensor,
    weight: Tensor,
    free_weight: Tensor | None,
    bias: Tensor | None,
    symmetry: str,
    odd: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    counts = (int(w.shape[0]) // groups if w is not None else 0 for w in (weight, free_weight))
    orbits, conv = _tied_conv(symmetry, odd, *counts, groups, *_ints(kernel_size, stride, padding, dilation))
    stored = [w for w in (weight, free_weight) if w is not None and w.shape[0]]
    if call := _plan("TiedConv", x, stored, bias, conv, activation=activation):
        return call.run(x, stored, bias)
    return reference.tied_conv(
        x, weight, free_weight, bias, orbits, kernel_size, stride, padding, dilation, groups, activation
    )


@_op(
    "orbit_pool_conv(Tensor x, Tensor weight, Tensor? bias, str symmetry, str reduce, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, int groups, str? activation=None) -> Tensor"
)
def orbit_pool_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symmetry: str,
    reduce: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    filters = int(weight.shape[0]) // groups
    sizes = _ints(weight.shape[2:], stride, padding, dilation)
    group, conv = _pooled_conv(symmetry, reduce, filters, groups, *sizes)
    prepare = None if conv.pool else partial(reference.orbit_mean, symmetry=group, reduce=reduce)
    if call := _plan("OrbitPoolConv", x, [weight], bias, conv, activation=activation, prepare=prepare):
        return call.run(x, [weight], bias)
    return reference.orbit_pool_conv(x, weight, bias, group, reduce, stride, padding, dilation, groups, activation)


def _cast(t: Tensor) -> Tensor:
    """As torch.autocast does."""
    return t.to(dispatch.computing_dtype(t))


@_op("symmetric_linear(Tensor x, Tensor packed, Tensor? bias, str? activation=None, bool never_unpack=False) -> Tensor")
def symmetric_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None = None, never_unpack: bool = False
) -> Tensor:
    if not _takes_reference(x, packed):
        training = needs_gradient(x, packed, bias)
        dtype = dispatch.dtype_name(x)
        plan = dispatch.plan(dispatch.linear_problem(x.shape, x.device.type, dtype, never_unpack, training))
        if plan.tiles:
            fused = None if training else activation
            y = symm.linear(_cast(x), _cast(packed), None if bias is None else _cast(bias), fused, *plan.tiles)
            return y if fused else reference.activate(y, activation)
    elif never_unpack:
        raise dispatch.cannot_stay_packed("symbolic sizes or torch.func transforms")
    dense = calls.kept("unpacked", lambda weights: reference.unpack(*weights), packed)
    return reference.symmetric_linear(x, packed, bias, activation, dense)


@_op("gram(Tensor x, Tensor? a, float alpha, float beta) -> Tensor")
def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float) -> Tensor:
    if not _takes_reference(x, a):
        plan = dispatch.plan(dispatch.gram_problem(x.shape, x.device.type, dispatch.dtype_name(x)))
        if plan.tiles:
            return symm.gram(_cast(x), None if a is None else _cast(a), alpha, beta, *plan.tiles)
    return reference.gram(x, a, alpha, beta)


global_conv1d = _op(
    "global_conv1d(Tensor x, Tensor center, Tensor surround, Tensor? bias, str? activation=None) -> Tensor"
)(reference.global_conv1d)
topk_pool1d = _op("topk_pool1d(Tensor x, int k) -> Tensor")(reference.topk_pool1d)


reorder = _op("reorder(Tensor x, Tensor orders, int dim) -> Tensor")(reference.reorder)
reduce_orders = _op("reduce_orders(Tensor y, int count, str reduce) -> Tensor")(reference.reduce_orders)

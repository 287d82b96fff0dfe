"""The `torch.library` ops behind every layer: ``torch.ops.tritonsym.*``.

One op per layer. Each is composite: its body is made of torch ops (the reference) or, where `dispatch` chooses a
kernel, of opaque kernel ops. Autograd of every order, `torch.func` transforms (grad, vmap, jvp), fake tensors,
complex dtypes, `torch.compile` and `torch.export` therefore follow from the body, and Inductor sees and fuses it.
Ops take batched inputs and checked arguments; the public functions are in `tritonsym.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from tritonsym import dispatch, reference, shift, symm
from tritonsym.shift import Geometry
from tritonsym.symmetry import Block, FilterLayout, Symmetry, tap_orbits, tied_blocks

_library = torch.library.Library("tritonsym", "DEF")


def _op(schema: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Define a composite op; the decorated function is its body."""

    def define(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, body, "CompositeImplicitAutograd")
        # the same body under vmap: without it functorch runs a composite op sample by sample
        _library.impl(name, body, "FuncTorchBatchedDecomposition")
        return getattr(torch.ops.tritonsym, name)

    return define


_layout = cache(FilterLayout.from_string)


def _shift_plan(
    layer: str, tensors: Sequence[Tensor | None], blocks: tuple[Block, ...], groups: int, geometry: Geometry
) -> dispatch.Plan | None:
    """The plan for this convolution if it is the shift path. Symbolic sizes and `torch.func` take the reference."""
    x = tensors[0]
    assert x is not None
    if any(isinstance(size, torch.SymInt) for size in x.shape):
        return None
    if torch._C._are_functorch_transforms_active():  # no autograd.Function inside a composite op there
        return None
    problem = dispatch.conv_problem(
        layer,
        x.device.type,
        dispatch.dtype_name(x),
        x.shape[0],
        x.shape[1] // groups,
        tuple(x.shape[2:]),
        blocks,
        groups,
        geometry,
        training=dispatch.needs_gradient(*tensors),
    )
    plan = dispatch.plan(problem)
    return plan if plan.path == "shift" else None


def _geometry(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None = None,
) -> Geometry:
    kernel, strides, pads, dilations = (tuple(map(int, sizes)) for sizes in (kernel_size, stride, padding, dilation))
    if output_padding is None:
        return Geometry(kernel, strides, pads, dilations)
    return Geometry(kernel, strides, pads, dilations, True, tuple(map(int, output_padding)))


def _finish(y: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(y + b)."""
    if bias is not None:
        y = y + bias.to(y.dtype)[(...,) + (None,) * (y.ndim - 2)]  # under autocast the bias is still float32
    return reference.activate(y, activation)


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
    filters = _layout(layout, groups)
    geometry = _geometry(weight.shape[2:], stride, padding, dilation)
    if plan := _shift_plan("SymmetricConv", (x, weight, bias), filters.blocks(geometry.kernel_size), groups, geometry):
        y = shift.symmetric_conv(x, weight, filters, geometry, plan.tile)
        return _finish(y, reference.full_bias(bias, filters), activation)
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
    filters = _layout(layout, groups)
    geometry = _geometry(weight.shape[2:], stride, padding, dilation, output_padding)
    if plan := _shift_plan(
        "SymmetricConvTranspose", (x, weight, bias), filters.blocks(geometry.kernel_size), groups, geometry
    ):
        y = shift.symmetric_conv(x, weight, filters, geometry, plan.tile)
        return _finish(y, reference.full_bias(bias, filters), activation)
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
    orbits = tap_orbits(Symmetry(symmetry), tuple(map(int, kernel_size)), odd)
    geometry = _geometry(kernel_size, stride, padding, dilation)
    blocks = tied_blocks(
        orbits, int(weight.shape[0]) // groups, 0 if free_weight is None else int(free_weight.shape[0]) // groups
    )
    if plan := _shift_plan("TiedConv", (x, weight, free_weight, bias), blocks, groups, geometry):
        return _finish(shift.tied_conv(x, weight, free_weight, blocks, geometry, groups, plan.tile), bias, activation)
    return reference.tied_conv(
        x, weight, free_weight, bias, orbits, geometry.kernel_size, stride, padding, dilation, groups, activation
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
    group = Symmetry(symmetry)
    geometry = _geometry(weight.shape[2:], stride, padding, dilation)
    filters = int(weight.shape[0]) // groups
    if reduce in ("sum", "mean"):
        orbits = tap_orbits(group, geometry.kernel_size)
        blocks = tied_blocks(orbits, filters, 0)
        if plan := _shift_plan("OrbitPoolConv", (x, weight, bias), blocks, groups, geometry):
            tied = reference.orbit_mean(weight, group, reduce)
            return _finish(shift.tied_conv(x, tied, None, blocks, geometry, groups, plan.tile), bias, activation)
    else:
        layout = FilterLayout(((group, filters),), 0, groups)
        if plan := _shift_plan(
            "OrbitPoolConv", (x, weight, bias), layout.blocks(geometry.kernel_size), groups, geometry
        ):
            y = shift.symmetric_conv(x, weight, layout, geometry, plan.tile)
            y = reference.reduce_images(y, (groups, group.order, filters), reduce)
            return _finish(y, bias, activation)
    return reference.orbit_pool_conv(x, weight, bias, group, reduce, stride, padding, dilation, groups, activation)


def _cast(t: Tensor) -> Tensor:
    """As torch.autocast does."""
    return t.to(dispatch.computing_dtype(t))


def _takes_reference(*tensors: Tensor | None) -> bool:
    """Whether no plan can be made: sizes are symbolic, or `torch.func` is at work."""
    is_symbolic = any(isinstance(size, torch.SymInt) for t in tensors if t is not None for size in t.shape)
    return is_symbolic or torch._C._are_functorch_transforms_active()


@_op("symmetric_linear(Tensor x, Tensor packed, Tensor? bias, str? activation=None, bool never_unpack=False) -> Tensor")
def symmetric_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None = None, never_unpack: bool = False
) -> Tensor:
    if not _takes_reference(x, packed):
        problem = dispatch.linear_problem(x.shape, x.device.type, dispatch.dtype_name(x), never_unpack)
        plan = dispatch.linear_plan(problem)
        if plan.tiles is not None:
            fused = None if dispatch.needs_gradient(x, packed, bias) else activation
            y = symm.linear(_cast(x), _cast(packed), None if bias is None else _cast(bias), fused, *plan.tiles)
            return y if fused else reference.activate(y, activation)
    elif never_unpack:
        raise dispatch.cannot_stay_packed("symbolic sizes or torch.func transforms")
    return reference.symmetric_linear(x, packed, bias, activation)


@_op("gram(Tensor x, Tensor? a, float alpha, float beta) -> Tensor")
def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float) -> Tensor:
    if not _takes_reference(x, a):
        plan = dispatch.gram_plan(dispatch.gram_problem(x.shape, x.device.type, dispatch.dtype_name(x)))
        if plan.tiles is not None:
            return symm.gram(_cast(x), None if a is None else _cast(a), alpha, beta, *plan.tiles)
    return reference.gram(x, a, alpha, beta)


global_conv1d = _op(
    "global_conv1d(Tensor x, Tensor center, Tensor surround, Tensor? bias, str? activation=None) -> Tensor"
)(reference.global_conv1d)
topk_pool1d = _op("topk_pool1d(Tensor x, int k) -> Tensor")(reference.topk_pool1d)


reorder = _op("reorder(Tensor x, Tensor orders, int dim) -> Tensor")(reference.reorder)
reduce_orders = _op("reduce_orders(Tensor y, int count, str reduce) -> Tensor")(reference.reduce_orders)

"""The `torch.library` ops behind every layer: ``torch.ops.tritonsym.*``.

One op per layer. Each is composite: its body is made of torch ops (the reference) or, where `dispatch` chooses a
kernel, of opaque kernel ops. Autograd of every order, `torch.func` transforms (grad, vmap, jvp), fake tensors,
complex dtypes, `torch.compile` and `torch.export` therefore follow from the body, and Inductor sees and fuses it.
Ops take batched inputs and checked arguments; the public functions are in `tritonsym.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tritonsym import dispatch, reference
from tritonsym.symmetry import FilterLayout, Symmetry, tap_orbits

_library = torch.library.Library("tritonsym", "DEF")


def _op(schema: str) -> Callable[[Callable], Callable]:
    """Define a composite op; the decorated function is its body."""

    def define(body: Callable) -> Callable:
        def run(*args: object) -> Tensor:
            dispatch.require_reference()
            return body(*args)

        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeImplicitAutograd")
        # the same body under vmap: without it functorch runs a composite op sample by sample
        _library.impl(name, run, "FuncTorchBatchedDecomposition")
        return getattr(torch.ops.tritonsym, name)

    return define


_layout = lru_cache(maxsize=None)(FilterLayout.from_string)


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
    return reference.symmetric_conv(x, weight, bias, _layout(layout, groups), stride, padding, dilation, activation)


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
    return reference.symmetric_conv_transpose(
        x, weight, bias, _layout(layout, groups), stride, padding, output_padding, dilation, activation
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
    orbits = tap_orbits(Symmetry(symmetry), tuple(kernel_size), odd)
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
    return reference.orbit_pool_conv(
        x, weight, bias, Symmetry(symmetry), reduce, stride, padding, dilation, groups, activation
    )


symmetric_linear = _op("symmetric_linear(Tensor x, Tensor packed, Tensor? bias, str? activation=None) -> Tensor")(
    reference.symmetric_linear
)
global_conv1d = _op(
    "global_conv1d(Tensor x, Tensor center, Tensor surround, Tensor? bias, str? activation=None) -> Tensor"
)(reference.global_conv1d)
topk_pool1d = _op("topk_pool1d(Tensor x, int k) -> Tensor")(reference.topk_pool1d)


@_op("reorder(Tensor x, int[] orders, int count, int dim) -> Tensor")
def reorder(x: Tensor, orders: Sequence[int], count: int, dim: int) -> Tensor:
    """`orders` holds `count` re-orderings, one after the other."""
    n = len(orders) // count
    return reference.reorder(x, [orders[g * n : (g + 1) * n] for g in range(count)], dim)


reduce_orders = _op("reduce_orders(Tensor y, int count, str reduce) -> Tensor")(reference.reduce_orders)

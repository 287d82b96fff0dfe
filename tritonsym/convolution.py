"""y = act(conv(x, images of the stored weights) + b) with derivatives of every order, by the path that a plan names.

The rows of the stored weights, (groups, R, C), are ordered as `shift.Conv` says. For the backward pass only x and the
rows are saved; d, the additions of dy, is computed once for both gradients. Derivatives of derivatives go through the
dense convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsym import launch, reference, shift
from tritonsym.dispatch import computing_dtype, needs_gradient
from tritonsym.shift import Conv
from tritonsym.symmetry import Block, FilterLayout

if TYPE_CHECKING:
    from tritonsym.dispatch import Plan


def conv(
    x: Tensor, rows: Tensor, bias: Tensor | None, layer: Conv, plan: Plan, activation: str | None = None
) -> Tensor:
    """x (N, groups C, *sizes), rows (groups, R, C), a bias of every output filter -> y.

    Kernels apply the activation if nothing will be differentiated; else torch does, which keeps what it needs.
    """
    dtype = computing_dtype(x)  # as autocast would
    x, rows, bias = x.to(dtype), rows.to(dtype), None if bias is None else bias.to(dtype)
    if layer.pool and not (plan.path == "shift" and plan.tiles):
        sizes = (layer.groups, len(layer.blocks[0].images), -1)
        y = reference.reduce_images(conv(x, rows, None, replace(layer, pool=None), plan), sizes, layer.pool)
        y = y if bias is None else y + bias[(...,) + (None,) * (y.ndim - 2)]
    elif plan.tiles and not needs_gradient(x, rows, bias):
        return launch.forward(x, rows, bias, layer.text, plan.path, plan.flat_tiles, activation, False)[0]
    else:
        y, _ = _Conv.apply(x, rows, bias, layer, plan.path, plan.flat_tiles)
    return reference.activate(y, activation)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, rows: Tensor, bias: Tensor | None, layer: Conv, path: str, tiles: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        if tiles:
            return launch.forward(x, rows, bias, layer.text, path, tiles, None, layer.pool is not None)
        return shift.forward(x, rows, bias, layer), x.new_empty(0, dtype=torch.uint8)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, rows, _, *ctx.options = inputs
        _, winners = output
        ctx.mark_non_differentiable(winners)
        ctx.save_for_backward(x, rows, winners)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> Any:
        x, rows, winners = ctx.saved_tensors
        layer, path, tiles = ctx.options
        need_x, need_rows, need_bias, *_ = ctx.needs_input_grad
        dbias = dy.sum((0, *range(2, dy.ndim))) if need_bias else None
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            dx, drows = _differentiable(dy, x, rows, layer, need_x, need_rows)
        elif not tiles:
            dx, drows = shift.backward(dy, x, rows, layer, need_x, need_rows)
        else:
            dx, drows = launch.backward(dy, x, rows, winners, layer.text, path, tiles, need_x, need_rows)
        return dx if need_x else None, drows if need_rows else None, dbias, None, None, None


def _differentiable(
    dy: Tensor, x: Tensor, rows: Tensor, layer: Conv, need_x: bool, need_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and rows, themselves differentiable."""
    inputs = [t for t, need in ((x, need_x), (rows, need_rows)) if need]
    if not inputs:
        return None, None
    with torch.enable_grad():
        found = iter(torch.autograd.grad(_dense_conv(x, rows, layer), inputs, dy, create_graph=True))
    return next(found) if need_x else None, next(found) if need_rows else None


def _dense_conv(x: Tensor, rows: Tensor, layer: Conv) -> Tensor:
    """What `_Conv` computes, without bias, by torch's convolution with the expanded weight."""
    entries = torch.tensor(layer.table, device=rows.device)
    sign = entries.sign().to(rows.dtype)[..., None]
    weight = rows[:, (entries.abs() - 1).clamp(min=0)] * sign  # [G, O, K, C]
    weight = weight.mT.unflatten(-1, layer.geometry.kernel_size)  # [G, O, C, *k]
    g = layer.geometry
    if g.transposed:
        transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
        weight = weight.transpose(1, 2).flatten(0, 1)
        return transposed(x, weight, None, g.stride, g.padding, g.output_padding, layer.groups, g.dilation)
    plain: Any = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    y = plain(x, weight.flatten(0, 1), None, g.stride, g.padding, g.dilation, layer.groups)
    if layer.pool:
        y = reference.reduce_images(y, (layer.groups, len(layer.blocks[0].images), -1), layer.pool)
    return y


# --- stored weights as rows -------------------------------------------------------------------------------------------


def orbit_rows(weight: Tensor, layout: FilterLayout, blocks: tuple[Block, ...], transposed: bool) -> Tensor:
    """The rows of (stored, C/groups, *k), or transposed (C, stored/groups, *k)."""
    if transposed:
        weight = weight.unflatten(0, (layout.groups, -1)).transpose(1, 2).flatten(0, 1)
    taps_last = weight.flatten(2).unflatten(0, (layout.groups, -1))
    return _rows(taps_last.split([block.filters for block in blocks], 1))


def tied_rows(weight: Tensor, free_weight: Tensor | None, groups: int) -> Tensor:
    """The rows of tied filters (U, C/groups, orbits) with free ones (V, C/groups, *k) beside them."""
    weights = [weight] if weight.shape[0] else []
    if free_weight is not None and free_weight.shape[0]:
        weights.append(free_weight.flatten(2))
    return _rows([w.unflatten(0, (groups, -1)) for w in weights])


def _rows(weights: Sequence[Tensor]) -> Tensor:
    """(G, U, C, S) of every block -> (G, all S U, C)."""
    rows = [w.permute(0, 3, 1, 2).flatten(1, 2) for w in weights]
    return torch.cat(rows, 1) if len(rows) > 1 else rows[0].contiguous()

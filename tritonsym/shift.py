"""Multiply once, shift and add many: convolutions whose multiply-adds are one per position and stored weight.

A layer with stored weights w[u, c, s] (u: stored filter, s: stored tap or tap orbit) and images g described by a table
slot[g][k] (which stored tap stands at position k of image g, with which sign) is

    z[q, s, u] = sum_c w[u, c, s] x[q, c]                                              one 1x1 convolution
    y[p, g, u] = sum_k sign[g][k] z[stride p + dilation k - pad, slot[g][k], u]        additions only

and, with d[q, s, u] = sum of sign[g][k] dy[p, g, u] over all (p, g, k) that read z[q, s, u], its gradients are

    dx[q, c] = sum_{s, u} d[q, s, u] w[u, c, s]         dw[u, c, s] = sum_q d[q, s, u] x[q, c].

GEMM plus shifted additions is kn2row (Anderson, Vasudevan, Keane, Gregg 2017, arXiv 1709.03395); sharing z between the
images of a filter makes it the algorithm of a symmetric layer. Everything here is torch ops: any device, and Inductor
fuses the additions. x, w and nothing else is kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsym.symmetry import Block, FilterLayout, taps

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

#: Most bytes that z may take at a time; it is computed for as many images as fit, at least one.
SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Geometry:
    """The spatial part of a convolution: y position p reads x at stride p + dilation k - padding.

    With `transposed`, x position q adds to y at stride q + dilation k - padding.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def out_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        reach = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        if self.transposed:
            axes = zip(sizes, self.stride, self.padding, reach, self.output_padding, strict=True)
            return tuple((n - 1) * s - 2 * p + r + 1 + extra for n, s, p, r, extra in axes)
        axes4 = zip(sizes, self.stride, self.padding, reach, strict=True)
        return tuple((n + 2 * p - r - 1) // s + 1 for n, s, p, r in axes4)


@dataclass(frozen=True)
class Term:
    """``y[:, :, to][y_at] += sign * z[:, :, of][z_at]``; the places start with an ellipsis."""

    of: slice
    to: slice
    z_at: tuple[Any, ...]
    y_at: tuple[Any, ...]
    sign: int

    @property
    def count(self) -> int:
        """Additions per image of the batch."""
        return (self.of.stop - self.of.start) * math.prod(at.stop - at.start for at in self.z_at[1:])


@dataclass(frozen=True)
class Pass:
    """One GEMM and its additions: one residue class of positions of x modulo the stride, and the rows it needs."""

    x_at: tuple[Any, ...]  # starts with an ellipsis
    sizes: tuple[int, ...]
    rows: tuple[int, ...] | None  # of one group, None for all
    width: int  # number of rows
    terms: tuple[Term, ...]


@lru_cache(maxsize=256)
def schedule(blocks: tuple[Block, ...], geometry: Geometry, sizes: tuple[int, ...]) -> tuple[Pass, ...]:
    """All passes of a layer on inputs of these spatial sizes.

    The rows of w are ordered block by block, slot by slot, filter by filter. With a stride, tap k reads residue
    (dilation k - pad) mod stride: every residue class is a pass over 1/stride of the positions along each axis with the
    rows that some image needs there.
    """
    out_sizes = geometry.out_sizes(sizes)
    ones = (1,) * len(sizes)
    moduli = ones if geometry.transposed else geometry.stride
    passes = []
    for residue in product(*map(range, moduli)):
        x_at = (..., *(slice(r, None, m) for r, m in zip(residue, moduli, strict=True)))
        class_sizes = tuple(len(range(r, n, m)) for r, n, m in zip(residue, sizes, moduli, strict=True))
        reads = []  # (block, slot, y channels, z_at, y_at, sign)
        for b, block in enumerate(blocks):
            for first, slots, signs in block.images:
                to = slice(first, first + block.filters)
                for k, slot, sign in zip(taps(geometry.kernel_size), slots, signs, strict=True):
                    at = _overlap(k, geometry, residue, class_sizes, out_sizes) if sign else None
                    if at is not None:
                        reads.append((b, slot, to, *at, sign))
        used = {(b, slot) for b, slot, *_ in reads}
        rows: list[int] = []
        of: dict[tuple[int, int], slice] = {}
        row = 0
        for b, block in enumerate(blocks):
            for slot in range(block.slots):
                if (b, slot) in used:
                    of[b, slot] = slice(len(rows), len(rows) + block.filters)
                    rows += range(row, row + block.filters)
                row += block.filters
        terms = tuple(Term(of[b, slot], to, z_at, y_at, sign) for b, slot, to, z_at, y_at, sign in reads)
        if terms:
            passes.append(Pass(x_at, class_sizes, None if len(rows) == row else tuple(rows), len(rows), terms))
    return tuple(passes)


def _overlap(
    k: tuple[int, ...],
    geometry: Geometry,
    residue: tuple[int, ...],
    sizes: tuple[int, ...],
    out_sizes: tuple[int, ...],
) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Where z (of one residue class) and y meet under tap k; None where they do not."""
    z_at: list[Any] = [...]
    y_at: list[Any] = [...]
    for axis, size in enumerate(sizes):
        stride = geometry.stride[axis]
        offset = geometry.dilation[axis] * k[axis] - geometry.padding[axis]
        if geometry.transposed:  # y[stride q + offset] += z[q]
            low = max(0, -(offset // stride))
            high = min(size, (out_sizes[axis] - 1 - offset) // stride + 1)
            z = slice(low, high)
            y = slice(stride * low + offset, stride * (high - 1) + offset + 1, stride)
        else:  # y[p] += z[p + shift], x position stride (p + shift) + residue
            if (offset - residue[axis]) % stride:
                return None
            shift = (offset - residue[axis]) // stride
            low, high = max(0, -shift), min(out_sizes[axis], size - shift)
            z, y = slice(low + shift, high + shift), slice(low, high)
        if low >= high:
            return None
        z_at.append(z)
        y_at.append(y)
    return tuple(z_at), tuple(y_at)


def stack_weights(weights: Sequence[Tensor], blocks: tuple[Block, ...], groups: int) -> Tensor:
    """Stored weights, one (groups * filters, C, slots) per block, as the rows of the GEMM: (groups, rows, C)."""
    rows = [
        w.unflatten(0, (groups, block.filters)).permute(0, 3, 1, 2).flatten(1, 2)
        for w, block in zip(weights, blocks, strict=True)
    ]
    return torch.cat(rows, 1) if len(rows) > 1 else rows[0].contiguous()


def conv(x: Tensor, rows: Tensor, blocks: tuple[Block, ...], geometry: Geometry, out_channels: int) -> Tensor:
    """y of the module docstring, without bias.  x (N, groups C, *sizes), rows (groups, rows, C)."""
    return _Shift.apply(x, rows, blocks, geometry, out_channels)


class _Shift(torch.autograd.Function):
    """Bilinear in (x, rows); its derivative is `_ShiftBackward`, whose derivative is made of these two again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rows: Tensor, blocks: Any, geometry: Geometry, out_channels: int) -> Tensor:
        return _forward(x, rows, blocks, geometry, out_channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, rows, *ctx.layer = inputs
        ctx.save_for_backward(x, rows)
        ctx.save_for_forward(x, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, rows = ctx.saved_tensors
        dx, drows = _ShiftBackward.apply(dy, x, rows, *ctx.layer)
        return dx, drows, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, drows: Tensor | None, *_: None) -> Tensor:
        x, rows = ctx.saved_tensors
        parts = []
        if dx is not None:
            parts.append(_Shift.apply(dx, rows, *ctx.layer))
        if drows is not None:
            parts.append(_Shift.apply(x, drows, *ctx.layer))
        return sum(parts)


class _ShiftBackward(torch.autograd.Function):
    """(dx, drows) of `_Shift`; d is computed once for both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, rows: Tensor, blocks: Any, geometry: Geometry, out_channels: int
    ) -> tuple[Tensor, Tensor]:
        return _backward(dy, x, rows, blocks, geometry, out_channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        dy, x, rows, *ctx.layer = inputs
        ctx.save_for_backward(dy, x, rows)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor, ddrows: Tensor) -> Any:
        dy, x, rows = ctx.saved_tensors
        ddy = _Shift.apply(ddx, rows, *ctx.layer) + _Shift.apply(x, ddrows, *ctx.layer)
        return ddy, *_ShiftBackward.apply(dy, ddx, ddrows, *ctx.layer), None, None, None


def _zeros(like: Tensor, dtype: torch.dtype, last: bool, batch: int, channels: int, sizes: Sequence[int]) -> Tensor:
    """Zeros (batch, channels, *sizes); with `last` the channels are innermost in memory."""
    if last:
        return like.new_zeros(batch, *sizes, channels, dtype=dtype).movedim(-1, 1)
    return like.new_zeros(batch, channels, *sizes, dtype=dtype)


def _is_last(x: Tensor) -> bool:
    return x.ndim > 3 and x.stride(1) == 1 and x.stride(-1) >= x.shape[1] > 1  # strides also answer under vmap


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _chunks(x: Tensor, passes: Sequence[Pass], groups: int) -> list[slice]:
    """Slices of the batch whose z fits the scratch."""
    batch = x.shape[0]
    image = max((math.prod(p.sizes) * p.width for p in passes), default=1) * groups * x.element_size()
    if isinstance(batch, torch.SymInt):  # traced with a dynamic batch: one chunk
        return [slice(0, batch)]
    count = max(1, min(batch, SCRATCH_BYTES // max(image, 1)))
    return [slice(n, min(n + count, batch)) for n in range(0, batch, count)]


def _pointwise(p: Pass, rows: Tensor, ndim: int) -> Tensor:
    """The rows a pass needs as the weight of a grouped 1x1 convolution."""
    if p.rows is not None:
        rows = rows[:, list(p.rows)]
    return rows.flatten(0, 1)[(...,) + (None,) * ndim]


def _forward(x: Tensor, rows: Tensor, blocks: Any, geometry: Geometry, out_channels: int) -> Tensor:
    ndim, groups, sizes = x.ndim - 2, rows.shape[0], tuple(map(int, x.shape[2:]))
    passes = schedule(blocks, geometry, sizes)
    weights = [_pointwise(p, rows, ndim) for p in passes]
    like = x[:0, :1].flatten()[:0] + rows[:0, 0, 0]  # knows dtype, device and, under vmap, that it is mapped
    y = _zeros(like, _sum_dtype(x.dtype), _is_last(x), x.shape[0], out_channels, geometry.out_sizes(sizes))
    for n in _chunks(x, passes, groups):
        grouped = y[n].unflatten(1, (groups, -1))
        for p, w in zip(passes, weights, strict=True):
            z = _CONV[ndim](x[n][p.x_at], w, groups=groups).unflatten(1, (groups, -1))
            for t in p.terms:
                grouped[:, :, t.to][t.y_at].add_(z[:, :, t.of][t.z_at], alpha=t.sign)
    return y.to(x.dtype)


def _backward(
    dy: Tensor, x: Tensor, rows: Tensor, blocks: Any, geometry: Geometry, out_channels: int
) -> tuple[Tensor, Tensor]:
    ndim, groups, sizes = x.ndim - 2, rows.shape[0], tuple(map(int, x.shape[2:]))
    passes = schedule(blocks, geometry, sizes)
    weights = [_pointwise(p, rows, ndim) for p in passes]
    one, zero = [1] * ndim, [0] * ndim
    last = _is_last(x)
    dx_chunks: list[Tensor] = []
    drows = torch.zeros_like(rows)
    for n in _chunks(x, passes, groups):
        dx: Tensor | None = None
        for p, w in zip(passes, weights, strict=True):
            x_n = x[n][p.x_at]
            dy_n = dy[n].unflatten(1, (groups, -1))
            d = _zeros(dy, _sum_dtype(dy.dtype), last, x_n.shape[0], groups * p.width, p.sizes)
            grouped = d.unflatten(1, (groups, -1))
            for t in p.terms:
                grouped[:, :, t.of][t.z_at].add_(dy_n[:, :, t.to][t.y_at], alpha=t.sign)
            dx_p, dw, _ = torch.ops.aten.convolution_backward(
                d.to(x.dtype), x_n, w, None, one, zero, one, False, zero, groups, [True, True, False]
            )
            dw = dw.unflatten(0, (groups, -1)).flatten(2)
            index = slice(None) if p.rows is None else list(p.rows)
            drows[:, index] += dw
            if len(passes) == 1 and p.sizes == sizes:
                dx = dx_p
            else:
                if dx is None:
                    dx = _zeros(dx_p, dx_p.dtype, last, x_n.shape[0], x.shape[1], sizes)
                dx[p.x_at] = dx_p
        if dx is not None:
            dx_chunks.append(dx)
    if not dx_chunks:
        return torch.zeros_like(x), drows
    return (torch.cat(dx_chunks) if len(dx_chunks) > 1 else dx_chunks[0]), drows


# --- layers -----------------------------------------------------------------------------------------------------------


def symmetric_conv(x: Tensor, weight: Tensor, layout: FilterLayout, geometry: Geometry) -> Tensor:
    """conv(x, expand(weight)), or its transposed twin, without ever building expand(weight)."""
    blocks = layout.blocks(geometry.kernel_size)
    if geometry.transposed:  # (C, stored/groups, *k) -> (stored, C/groups, *k)
        weight = weight.unflatten(0, (layout.groups, -1)).transpose(1, 2).flatten(0, 1)
    taps_last = weight.flatten(2).unflatten(0, (layout.groups, -1))
    parts = taps_last.split([block.filters for block in blocks], 1)
    rows = stack_weights([part.flatten(0, 1) for part in parts], blocks, layout.groups)
    return conv(x, rows, blocks, geometry, layout.out_channels)


def tied_conv(
    x: Tensor,
    weight: Tensor,
    free_weight: Tensor | None,
    blocks: tuple[Block, ...],
    geometry: Geometry,
    groups: int,
) -> Tensor:
    """conv(x, [expand(weight), free_weight]) without ever building expand(weight); `blocks` from `tied_blocks`."""
    weights = [weight] if weight.shape[0] else []
    if free_weight is not None and free_weight.shape[0]:
        weights.append(free_weight.flatten(2))
    rows = stack_weights(weights, blocks, groups)
    return conv(x, rows, blocks, geometry, sum(block.filters for block in blocks) * groups)

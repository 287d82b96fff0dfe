"""Multiply once, shift and add many: convolutions whose multiply-adds are one per position and stored weight.

A layer with stored weights w[u, c, s] (u: stored filter, s: stored tap or tap orbit) and images g described by a table
slot[g][k] (which stored tap stands at position k of image g, with which sign) is

    z[q, s, u] = sum_c w[u, c, s] x[q, c]                                              one 1x1 convolution
    y[p, g, u] = sum_k sign[g][k] z[stride p + dilation k - pad, slot[g][k], u]        additions only

and, with d[q, s, u] = sum of sign[g][k] dy[p, g, u] over all (p, g, k) that read z[q, s, u], its gradients are

    dx[q, c] = sum_{s, u} d[q, s, u] w[u, c, s]         dw[u, c, s] = sum_q d[q, s, u] x[q, c].

GEMM plus shifted additions is kn2row (Anderson, Vasudevan, Keane, Gregg 2017, arXiv 1709.03395); sharing z between the
images of a filter makes it the algorithm of a symmetric layer. The additions are linear: they keep nothing for the
backward pass, their derivative is their adjoint, and autograd finds d once for both gradients. Everything here is torch
ops: any device, and Inductor fuses the additions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, product
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
class Move:
    """``target[:, :, to][to_at] += sign * source[:, :, of][of_at]`` on (N, groups, channels, *sizes).

    The places start with an ellipsis.
    """

    source: int
    of: slice
    of_at: tuple[Any, ...]
    target: int
    to: slice
    to_at: tuple[Any, ...]
    sign: int

    @property
    def count(self) -> int:
        """Additions per group and image of the batch."""
        return (self.of.stop - self.of.start) * math.prod(
            len(range(at.start, at.stop, at.step or 1)) for at in self.of_at[1:]
        )

    def reversed(self) -> Move:
        return Move(self.target, self.to, self.to_at, self.source, self.of, self.of_at, self.sign)


@dataclass(frozen=True)
class Additions:
    """A linear map from tensors to tensors, given as moves; every tensor by (channels per group, sizes)."""

    sources: tuple[tuple[int, tuple[int, ...]], ...]
    targets: tuple[tuple[int, tuple[int, ...]], ...]
    moves: tuple[Move, ...]

    @cached_property
    def adjoint(self) -> Additions:
        adjoint = Additions(self.targets, self.sources, tuple(move.reversed() for move in self.moves))
        adjoint.__dict__["adjoint"] = self
        return adjoint

    @cached_property
    def text(self) -> str:
        """As a string, for an op that takes no objects; `from_text` is the inverse."""

        def places(at: tuple[Any, ...]) -> list[list[int]]:
            return [[s.start, s.stop, s.step or 1] for s in at[1:]]

        moves = [
            [m.source, m.of.start, m.of.stop, places(m.of_at), m.target, m.to.start, m.to.stop, places(m.to_at), m.sign]
            for m in self.moves
        ]
        return json.dumps([self.sources, self.targets, moves], separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_text(text: str) -> Additions:
        sources, targets, moves = json.loads(text)

        def places(at: list[list[int]]) -> tuple[Any, ...]:
            return (..., *(slice(*s) for s in at))

        return Additions(
            tuple((channels, tuple(sizes)) for channels, sizes in sources),
            tuple((channels, tuple(sizes)) for channels, sizes in targets),
            tuple(
                Move(source, slice(of, of_end), places(of_at), target, slice(to, to_end), places(to_at), sign)
                for source, of, of_end, of_at, target, to, to_end, to_at, sign in moves
            ),
        )


@dataclass(frozen=True)
class Gemm:
    """z of one residue class of positions modulo the stride, for the rows of w that some image needs there."""

    x_at: tuple[Any, ...]  # starts with an ellipsis
    rows: tuple[int, ...]  # of one group


@lru_cache(maxsize=256)
def schedule(
    blocks: tuple[Block, ...], geometry: Geometry, sizes: tuple[int, ...]
) -> tuple[tuple[Gemm, ...], Additions]:
    """The GEMMs of a layer on inputs of these spatial sizes, and the additions from their results to y.

    The rows of w are ordered block by block, slot by slot, filter by filter. With a stride, tap k reads residue
    (dilation k - pad) mod stride: every residue class is a GEMM over 1/stride of the positions along each axis with the
    rows that some image needs there.
    """
    out_sizes = geometry.out_sizes(sizes)
    moduli = (1,) * len(sizes) if geometry.transposed else geometry.stride
    gemms: list[Gemm] = []
    sources = []
    moves = []
    for residue in product(*map(range, moduli)):
        class_sizes = tuple(len(range(r, n, m)) for r, n, m in zip(residue, sizes, moduli, strict=True))
        reads = []  # (block, slot, y channels, z_at, y_at, sign)
        for b, block in enumerate(blocks):
            for first, slots, signs in block.images:
                to = slice(first, first + block.filters)
                for k, slot, sign in zip(taps(geometry.kernel_size), slots, signs, strict=True):
                    at = _overlap(k, geometry, residue, class_sizes, out_sizes) if sign else None
                    if at is not None:
                        reads.append((b, slot, to, *at, sign))
        if not reads:
            continue
        x_at = (..., *(slice(r, None, m) for r, m in zip(residue, moduli, strict=True)))
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
        moves += [Move(len(gemms), of[b, slot], z_at, 0, to, y_at, sign) for b, slot, to, z_at, y_at, sign in reads]
        gemms.append(Gemm(x_at, tuple(rows)))
        sources.append((len(rows), class_sizes))
    channels = sum(block.filters * len(block.images) for block in blocks)
    return tuple(gemms), Additions(tuple(sources), ((channels, out_sizes),), tuple(moves))


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


def conv(
    x: Tensor, rows: Tensor, blocks: tuple[Block, ...], geometry: Geometry, tile: tuple[int, int, int] | None
) -> Tensor:
    """y of the module docstring, without bias.  x (N, groups C, *sizes), rows (groups, rows, C).

    The additions are a Triton kernel if it is given a tile, else torch ops.
    """
    ndim, groups = x.ndim - 2, rows.shape[0]
    gemms, additions = schedule(blocks, geometry, tuple(map(int, x.shape[2:])))
    weights = [_pick(rows, g.rows).flatten(0, 1)[(...,) + (None,) * ndim] for g in gemms]
    if not gemms:  # every tap falls beside the image
        [(channels, sizes)] = additions.targets
        zeros = x.new_zeros(x.shape[0], groups * channels, *sizes)
        return zeros + (x[:0].sum() + rows[:0].sum())  # 0 that still depends on both, for autograd
    as_given = _is_last(x)
    x = _channels_last(x)
    parts = []
    for n in _chunks(x, additions, groups):
        z = [_CONV[ndim](x[n][g.x_at], w, groups=groups) for g, w in zip(gemms, weights, strict=True)]
        parts += _Add.apply(additions, groups, tile, *z)
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if as_given else y.contiguous()


def _pick(rows: Tensor, picked: tuple[int, ...]) -> Tensor:
    """rows[:, picked], as slices: an index would be a constant, which `ExportedProgram.run_decompositions` loses."""
    runs, start = [], 0
    for end in range(1, len(picked) + 1):
        if end == len(picked) or picked[end] != picked[end - 1] + 1:
            runs.append(rows[:, picked[start] : picked[end - 1] + 1])
            start = end
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def _is_last(x: Tensor) -> bool:
    return x.ndim > 3 and x.stride(1) == 1 and x.stride(-1) > 1


def _channels_last(x: Tensor) -> Tensor:
    """x with the channels innermost: long runs under one shift, and the GEMMs that round best on the CPU."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _chunks(x: Tensor, additions: Additions, groups: int) -> list[slice]:
    """Slices of the batch whose z fits the scratch."""
    batch = x.shape[0]
    if isinstance(batch, torch.SymInt):  # traced with a dynamic batch: one chunk
        return [slice(0, batch)]
    image = sum(channels * math.prod(sizes) for channels, sizes in additions.sources) * groups * x.element_size()
    count = max(1, min(batch, SCRATCH_BYTES // max(image, 1)))
    return [slice(n, min(n + count, batch)) for n in range(0, max(batch, 1), count)]


class _Add(torch.autograd.Function):
    """The additions; linear, so that every derivative is the additions or their adjoint again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(additions: Additions, groups: int, tile: Any, *sources: Tensor) -> tuple[Tensor, ...]:
        if tile is not None:
            return tuple(torch.ops.tritonsym.additions(sources, additions.text, groups, tile))
        grouped = [_channels_last(source).unflatten(1, (groups, -1)) for source in sources]
        add = _fused if torch.compiler.is_compiling() and not _has_steps(additions) else _in_place
        return tuple(target.flatten(1, 2).to(sources[0].dtype) for target in add(additions, grouped))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.additions, *ctx.options = inputs[:3]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, None, *_Add.apply(ctx.additions.adjoint, *ctx.options, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Add.apply(ctx.additions, *ctx.options, *tangents[3:])


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _in_place(additions: Additions, sources: Sequence[Tensor]) -> list[Tensor]:
    """Eager mode: one addition into a slice of the target per move."""
    like = sources[0]
    batch, groups = like.shape[:2]
    targets = [
        like.new_zeros(batch, *sizes, groups, channels, dtype=_sum_dtype(like.dtype)).movedim((-2, -1), (1, 2))
        for channels, sizes in additions.targets
    ]
    for m in additions.moves:
        targets[m.target][:, :, m.to][m.to_at].add_(sources[m.source][:, :, m.of][m.of_at], alpha=m.sign)
    return targets


def _has_steps(additions: Additions) -> bool:
    """Whether some places are not contiguous, as in a transposed convolution with a stride."""
    return any(at.step not in (None, 1) for m in additions.moves for at in (*m.of_at[1:], *m.to_at[1:]))


def _fused(additions: Additions, sources: Sequence[Tensor]) -> list[Tensor]:
    """The same as sums of padded tensors: what Inductor fuses into one pass, unlike additions to slices."""
    sums: list[dict[int, Tensor]] = [{} for _ in additions.targets]  # per target: first channel -> sum
    for m in additions.moves:
        sizes = additions.targets[m.target][1]
        sides = [side for at, n in zip(m.to_at[:0:-1], sizes[::-1], strict=True) for side in (at.start, n - at.stop)]
        piece = F.pad(sources[m.source][:, :, m.of][m.of_at].to(_sum_dtype(sources[0].dtype)), sides)
        found = sums[m.target].get(m.to.start)
        if found is None:
            sums[m.target][m.to.start] = piece if m.sign > 0 else -piece
        else:
            sums[m.target][m.to.start] = found + piece if m.sign > 0 else found - piece
    targets = []
    for (channels, sizes), parts in zip(additions.targets, sums, strict=True):
        done, filled = 0, []
        for start in sorted({*parts, channels}):
            if start > done:  # no move reaches these channels
                filled.append(sources[0].new_zeros(*sources[0].shape[:2], start - done, *sizes))
                done = start
            if start in parts:
                filled.append(parts[start])
                done = start + parts[start].shape[2]
        targets.append(torch.cat(filled, 2))
    return targets


# --- the additions as a Triton kernel ---------------------------------------------------------------------------------


@torch.library.custom_op("tritonsym::additions", mutates_args=())
def _additions(sources: Sequence[Tensor], additions: str, groups: int, tile: Sequence[int]) -> list[Tensor]:
    """`Additions` by the kernel, for tensors on a GPU or in Triton's interpreter.

    The kernel works channels-last: with channels first its loads would be single values. Other formats are copied.
    """
    if not sources[0].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"tritonsym: Triton kernels cannot run on {sources[0].device} tensors; move them to a GPU, set "
            "TRITON_INTERPRET=1 before Python starts (slow, for tests), or use tritonsym.backend('auto')"
        )
    from tritonsym.kernels import shift as kernel
    from tritonsym.kernels.tiles import Tile

    plan = Additions.from_text(additions)
    source = _channels_last(_side_by_side(plan, sources, groups))
    targets = []
    for i, (channels, sizes) in enumerate(plan.targets):
        target = source.new_empty(source.shape[0], *sizes, groups * channels).movedim(-1, 1)
        table = kernel.Table(*_table(additions, i))
        if sum(table.filters) < channels:
            target.zero_()
        with torch.cuda.device_of(source):  # the launch follows the tensor
            kernel.add(_to_3d(source), table, _to_3d(target), groups, Tile(*tile))
        targets.append(target if _is_last(sources[0]) else target.contiguous())
    return targets


@_additions.register_fake
def _(sources: Sequence[Tensor], additions: str, groups: int, tile: Sequence[int]) -> list[Tensor]:
    plan = Additions.from_text(additions)
    return [_like(sources[0], groups * channels, sizes) for channels, sizes in plan.targets]


def _like(source: Tensor, channels: int, sizes: Sequence[int]) -> Tensor:
    """An empty tensor (N, channels, *sizes), channels-last if the source is."""
    if _is_last(source):
        return source.new_empty(source.shape[0], *sizes, channels).movedim(-1, 1)
    return source.new_empty(source.shape[0], channels, *sizes)


def _side_by_side(plan: Additions, sources: Sequence[Tensor], groups: int) -> Tensor:
    """All sources in one tensor, their channels one after the other in every group, 0 beyond the smaller ones."""
    if len(sources) == 1:
        return sources[0]
    most = [max(sizes) for sizes in zip(*(sizes for _, sizes in plan.sources), strict=True)]
    joined = _like(sources[0], groups * sum(channels for channels, _ in plan.sources), most).zero_()
    parts = joined.unflatten(1, (groups, -1)).split([channels for channels, _ in plan.sources], 2)
    for part, source in zip(parts, sources, strict=True):
        inside = (..., *map(slice, source.shape[2:]))
        part[inside] = source.unflatten(1, (groups, -1))
    return joined


@lru_cache(maxsize=1024)
def _table(additions: str, target: int) -> tuple[Any, ...]:
    """The fields of the kernel's `Table` for one target: position p of an axis reads (mul p + shift) / div."""
    plan = Additions.from_text(additions)
    rows = [0, *accumulate(channels for channels, _ in plan.sources)]
    mul, div = [1, 1, 1], [1, 1, 1]
    sums: dict[tuple[int, int], list[Any]] = {}
    for m in plan.moves:
        if m.target != target:
            continue
        shift = [0, 0, 0]
        for axis, (of, to) in enumerate(zip(m.of_at[:0:-1], m.to_at[:0:-1], strict=True), start=1):
            mul[-axis], div[-axis] = of.step or 1, to.step or 1
            shift[-axis] = div[-axis] * of.start - mul[-axis] * to.start
        key = (m.to.start, m.to.stop - m.to.start)
        sums.setdefault(key, []).append((rows[m.source] + m.of.start, tuple(shift), m.sign))
    ordered = sorted(sums)
    first, filters = zip(*ordered, strict=True)
    return first, filters, tuple(tuple(sums[key]) for key in ordered), tuple(mul), tuple(div)


def _to_3d(x: Tensor) -> Tensor:
    """(N, C, *sizes) with axes of size 1 put in front of the spatial ones."""
    for _ in range(5 - x.ndim):
        x = x.unsqueeze(2)
    return x


# --- layers -----------------------------------------------------------------------------------------------------------


def symmetric_conv(
    x: Tensor, weight: Tensor, layout: FilterLayout, geometry: Geometry, tile: tuple[int, int, int] | None = None
) -> Tensor:
    """conv(x, expand(weight)), or its transposed twin, without ever building expand(weight)."""
    blocks = layout.blocks(geometry.kernel_size)
    if geometry.transposed:  # (C, stored/groups, *k) -> (stored, C/groups, *k)
        weight = weight.unflatten(0, (layout.groups, -1)).transpose(1, 2).flatten(0, 1)
    taps_last = weight.flatten(2).unflatten(0, (layout.groups, -1))
    parts = taps_last.split([block.filters for block in blocks], 1)
    rows = stack_weights([part.flatten(0, 1) for part in parts], blocks, layout.groups)
    return conv(x, rows, blocks, geometry, tile)


def tied_conv(
    x: Tensor,
    weight: Tensor,
    free_weight: Tensor | None,
    blocks: tuple[Block, ...],
    geometry: Geometry,
    groups: int,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """conv(x, [expand(weight), free_weight]) without ever building expand(weight); `blocks` from `tied_blocks`."""
    weights = [weight] if weight.shape[0] else []
    if free_weight is not None and free_weight.shape[0]:
        weights.append(free_weight.flatten(2))
    rows = stack_weights(weights, blocks, groups)
    return conv(x, rows, blocks, geometry, tile)

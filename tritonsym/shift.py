"""Multiply once, shift and add many: convolutions whose multiply-adds are one per position and stored weight.

A layer with stored weights w[u, c, s] (u: stored filter, s: stored tap or tap orbit) and images g described by a table
slot[g][k] (which stored tap stands at position k of image g, with which sign) is

    z[q, s, u] = sum_c w[u, c, s] x[q, c]                                              one 1x1 convolution
    y[p, g, u] = sum_k sign[g][k] z[stride p + dilation k - pad, slot[g][k], u]        additions only

and, with d[q, s, u] = sum of sign[g][k] dy[p, g, u] over all (p, g, k) that read z[q, s, u], its gradients are

    dx[q, c] = sum_{s, u} d[q, s, u] w[u, c, s]         dw[u, c, s] = sum_q d[q, s, u] x[q, c].

GEMM plus shifted additions is kn2row (Anderson, Vasudevan, Keane, Gregg 2017, arXiv 1709.03395); sharing z between the
images of a filter makes it the algorithm of a symmetric layer. The additions are linear, so their derivative is their
adjoint. Everything here is torch ops: any device, and Inductor fuses the additions; `launch` is the same with kernels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext

from tritonsym.symmetry import Block, taps

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

#: Most bytes that z and other temporary tensors may take at a time: the batch is computed in chunks of as many images
#: as fit, at least one. ``tritonsym.shift.SCRATCH_BYTES = ...`` changes it.
SCRATCH_BYTES = 64 << 20

#: On the CPU the GEMMs add their terms one after the other, which in float32 rounds more than torch's convolutions do.
#: Sums of at most so many terms, added up, keep twice the error of torch's convolution of the same memory format
#: (perf/results/*-rounding.json): rows in dx and channels in z if x is channels-first, positions in dw if it is last.
MOST_ROWS, MOST_CHANNELS, MOST_POSITIONS = 256, 512, 128


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
class Conv:
    """Everything about a convolution over stored weights but its tensors.

    The rows of a group are its stored weights: block by block, slot by slot, filter by filter. With `pool`, 'max' or
    'min', the only block's images are reduced to one.
    """

    blocks: tuple[Block, ...]  # of one group
    groups: int
    geometry: Geometry
    pool: str | None = None

    def __hash__(self) -> int:
        return self._hash  # of the plan of every call

    @cached_property
    def _hash(self) -> int:
        return hash((self.blocks, self.groups, self.geometry, self.pool))

    @cached_property
    def text(self) -> str:
        """As a string, for an op that takes no objects; `from_text` is the inverse."""
        blocks = [(b.filters, b.slots, b.images) for b in self.blocks]
        return json.dumps([blocks, self.groups, astuple(self.geometry), self.pool], separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_text(text: str) -> Conv:
        blocks, groups, geometry, pool = json.loads(text)

        def freeze(value: Any) -> Any:
            return tuple(map(freeze, value)) if isinstance(value, list) else value

        return Conv(tuple(Block(*freeze(block)) for block in blocks), groups, Geometry(*freeze(geometry)), pool)

    @cached_property
    def rows(self) -> int:
        """Stored rows of a group."""
        return sum(block.filters * block.slots for block in self.blocks)

    @cached_property
    def table(self) -> tuple[tuple[int, ...], ...]:
        """Of every filter of a group and tap: sign * (row + 1), and 0 where the sign forces zero."""
        taps_of: dict[int, tuple[int, ...]] = {}
        row = 1
        for block in self.blocks:
            for first, slots, signs in block.images:
                for u in range(block.filters):
                    taps_of[first + u] = tuple(
                        sign * (row + slot * block.filters + u) for slot, sign in zip(slots, signs, strict=True)
                    )
            row += block.filters * block.slots
        return tuple(taps_of[o] for o in sorted(taps_of))

    @property
    def filters(self) -> int:
        """Of the dense weight."""
        return self.groups * len(self.table)

    @property
    def out_channels(self) -> int:
        return self.groups * self.blocks[0].filters if self.pool else self.filters

    def out_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of y."""
        return (x.shape[0], self.out_channels, *self.geometry.out_sizes(x.shape[2:]))


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


@dataclass(frozen=True)
class Gemm:
    """z of one residue class of positions modulo the stride, for the rows of w that some image needs there."""

    x_at: tuple[Any, ...]  # starts with an ellipsis
    rows: tuple[int, ...]  # of one group

    @property
    def whole(self) -> bool:
        """Whether it takes every position of x."""
        return all(at.step == 1 for at in self.x_at[1:])


@lru_cache(maxsize=256)
def schedule(conv: Conv, sizes: tuple[int, ...], most_rows: int | None = None) -> tuple[tuple[Gemm, ...], Additions]:
    """The GEMMs of a convolution of inputs of these spatial sizes, and the additions from their results to y.

    Without pooling: y holds all images. With a stride, tap k reads residue (dilation k - pad) mod stride: every residue
    class has its own GEMMs over 1/stride of the positions along each axis, with the rows that some image needs there.
    With `most_rows` they have about so many at most.
    """
    blocks, geometry = conv.blocks, conv.geometry
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
        parts: list[list[int]] = [[]]  # rows of every GEMM
        of: dict[tuple[int, int], list[tuple[int, slice, int]]] = {}  # GEMM, its rows, first filter
        count = sum(blocks[b].filters for b, _ in used)
        enough = -(-count // -(-count // (most_rows or count)))  # of equal parts
        row = 0
        for b, block in enumerate(blocks):
            width = min(block.filters, enough)
            for slot in range(block.slots):
                for u in range(0, block.filters, width) if (b, slot) in used else ():
                    count = min(width, block.filters - u)
                    if len(parts[-1]) >= enough:
                        parts.append([])
                    at_rows = slice(len(parts[-1]), len(parts[-1]) + count)
                    of.setdefault((b, slot), []).append((len(gemms) + len(parts) - 1, at_rows, u))
                    parts[-1] += range(row + u, row + u + count)
                row += block.filters
        for b, slot, to, z_at, y_at, sign in reads:
            for gemm, at_rows, u in of[b, slot]:
                to_u = slice(to.start + u, to.start + u + at_rows.stop - at_rows.start)
                moves.append(Move(gemm, at_rows, z_at, 0, to_u, y_at, sign))
        gemms += [Gemm(x_at, tuple(rows)) for rows in parts]
        sources += [(len(rows), class_sizes) for rows in parts]
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


# --- the path in torch ops --------------------------------------------------------------------------------------------


def forward(x: Tensor, rows: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """y = conv(x) + bias for x (N, groups C, *sizes), rows (groups, R, C) and a bias of every filter; no pooling."""
    most_rows, most_channels, _ = _limits(x)
    gemms, additions = schedule(conv, tuple(map(int, x.shape[2:])), most_rows)
    weights = [as_1x1(rows, g, x.ndim - 2) for g in gemms]

    def images(n: slice) -> Tensor:
        z = multiply(channels_last(x[n]), gemms, weights, conv.groups, most_channels)
        return add(additions, z, conv.groups, bias)[0]

    return over_images(chunks(x, additions, conv.groups), images, is_last(x))


def backward(
    dy: Tensor, x: Tensor, rows: Tensor, conv: Conv, need_x: bool, need_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `forward` with respect to x and rows; d is computed once for both."""
    most_rows, _, most_positions = _limits(x)
    gemms, additions = schedule(conv, tuple(map(int, x.shape[2:])), most_rows)
    weights = [as_1x1(rows, g, x.ndim - 2) for g in gemms]
    drows = torch.zeros_like(rows, dtype=sum_dtype(rows.dtype)) if need_rows else None

    def images(n: slice) -> Tensor:
        d = add(additions.adjoint, [dy[n]], conv.groups)
        x_n = channels_last(x[n])
        return multiply_backward(d, x_n, gemms, weights, conv.groups, need_x, drows, most_positions)

    dx = over_images(chunks(x, additions, conv.groups), images, is_last(x))
    return dx if need_x else None, None if drows is None else drows.to(rows.dtype)


def _limits(x: Tensor) -> tuple[int | None, int | None, int | None]:
    """MOST_ROWS, MOST_CHANNELS and MOST_POSITIONS where they matter."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return None, None, None
    return (None, None, MOST_POSITIONS) if is_last(x) else (MOST_ROWS, MOST_CHANNELS, None)


def as_1x1(rows: Tensor, gemm: Gemm, ndim: int) -> Tensor:
    """The rows of a GEMM as the weight of a 1x1 convolution."""
    return pick(rows, gemm.rows).flatten(0, 1)[(...,) + (None,) * ndim]


def multiply(
    x: Tensor, gemms: Sequence[Gemm], weights: Sequence[Tensor], groups: int, most_channels: int | None = None
) -> list[Tensor]:
    """z of every GEMM, by 1x1 convolutions: torch's switches for the precision of a convolution hold.

    With `most_channels` (and one group) they are sums of sums over so many channels.
    """
    conv = _CONV[x.ndim - 2]
    if most_channels is None or groups > 1 or x.shape[1] <= most_channels:
        return [conv(x[g.x_at], w, groups=groups) for g, w in zip(gemms, weights, strict=True)]
    z: list[Tensor] = []
    for at in range(0, x.shape[1], most_channels):
        part = slice(at, at + most_channels)
        found = multiply(channels_last(x[:, part]), gemms, [w[:, part] for w in weights], 1)
        z = [total.add_(more) for total, more in zip(z, found, strict=True)] if z else found
    return z


def multiply_backward(
    d: Sequence[Tensor],
    x: Tensor,
    gemms: Sequence[Gemm],
    weights: Sequence[Tensor],
    groups: int,
    need_x: bool,
    drows: Tensor | None,
    most_positions: int | None = None,
) -> Tensor:
    """dx of `multiply` (without channels if not needed); the gradients of the rows are added to `drows`.

    With `most_positions`, these are sums of sums over at most so many positions (or a place of the first axis).
    """
    ndim = x.ndim - 2
    one, zero = [1] * ndim, [0] * ndim
    whole = all(g.whole for g in gemms)
    dx = torch.zeros_like(x) if need_x and not whole else x[:, :0]

    def gradients(d: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor]:
        needs = [need_x, need_w, False]
        found = torch.ops.aten.convolution_backward(d, x, w, None, one, zero, one, False, zero, groups, needs)
        return found[0], found[1]

    for d_g, g, w in zip(d, gemms, weights, strict=True):
        x_g = x[g.x_at]
        pieces = _pieces(x_g, most_positions)
        dx_g, dw = gradients(d_g, x_g, w, need_x, drows is not None and len(pieces) == 1)
        if drows is not None:
            for at in pieces:
                if len(pieces) > 1:
                    _, dw = gradients(d_g[at], x_g[at], w, False, True)
                add_rows(drows, dw.flatten(1).unflatten(0, (groups, -1)), g.rows)
        if need_x and whole:
            dx = dx_g if g is gemms[0] else dx.add_(dx_g)
        elif need_x:
            dx[g.x_at] += dx_g
    return dx


def _pieces(x: Tensor, most_positions: int | None) -> list[tuple[slice, ...]]:
    """x in pieces of at most so many positions, or of one place of the first axis."""
    batch, positions = x.shape[0], math.prod(x.shape[2:])
    if not most_positions or batch * positions <= most_positions:
        return [(slice(None),)]
    images = max(1, most_positions // max(positions, 1))
    most_places = max(1, most_positions // max(math.prod(x.shape[3:]), 1))
    step = -(-x.shape[2] // max(-(-x.shape[2] // most_places), 1))
    return [
        (slice(n, n + images), slice(None), slice(at, at + step))
        for n in range(0, batch, images)
        for at in range(0, x.shape[2], step)
    ]


def corner(sizes: Sequence[int]) -> tuple[Any, ...]:
    """The first so many places of every spatial axis."""
    return (..., *map(slice, sizes))


def over_images(slices: Sequence[slice], images: Callable[[slice], Tensor], last: bool) -> Tensor:
    """images(n) for all slices of the batch, one after the other; channels-last or not."""
    first = images(slices[0])
    if len(slices) == 1 or is_compiling():
        whole = torch.cat([first, *map(images, slices[1:])]) if len(slices) > 1 else first
        return whole if last else whole.contiguous()
    shape = (slices[-1].stop, *first.shape[1:])
    whole = like(first, shape) if last else first.new_empty(shape)
    whole[slices[0]] = first
    for n in slices[1:]:  # no second copy of the whole
        whole[n] = images(n)
    return whole


def _runs(picked: tuple[int, ...]) -> list[tuple[int, int]]:
    """Maximal runs [first, end) of consecutive numbers."""
    runs, start = [], 0
    for end in range(1, len(picked) + 1):
        if end == len(picked) or picked[end] != picked[end - 1] + 1:
            runs.append((picked[start], picked[end - 1] + 1))
            start = end
    return runs


def pick(rows: Tensor, picked: tuple[int, ...]) -> Tensor:
    """rows[:, picked], as slices: an index would be a constant, which `ExportedProgram.run_decompositions` loses."""
    runs = [rows[:, first:end] for first, end in _runs(picked)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def add_rows(drows: Tensor, part: Tensor, picked: tuple[int, ...]) -> None:
    """drows[:, picked] += part."""
    done = 0
    for first, end in _runs(picked):
        drows[:, first:end] += part[:, done : done + end - first]
        done += end - first


def is_compiling() -> bool:
    """Whether a compiler traces this: torch 2.11's own function says so to Dynamo only."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def is_last(x: Tensor) -> bool:
    """Whether x is channels-last."""
    return bool(x.ndim > 3 and x.stride(1) == 1 and x.stride(-1) > 1)  # of symbols, too


def channels_last(x: Tensor) -> Tensor:
    """x with the channels innermost: long runs under one shift, and the GEMMs that round best on the CPU."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty channels-last tensor (N, C, *sizes)."""
    return x.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def chunks(x: Tensor, additions: Additions, groups: int) -> list[slice]:
    """Slices of the batch whose z, and copies of x and y in another memory format, fit the scratch."""
    batch = x.shape[0]
    values = sum(channels * math.prod(sizes) for channels, sizes in (*additions.sources, *additions.targets)) * groups
    image = (values + math.prod(x.shape[1:])) * x.element_size()
    count = max(1, min(batch, SCRATCH_BYTES // max(image, 1)))
    return [slice(n, min(n + count, batch)) for n in range(0, max(batch, 1), count)]


def add(additions: Additions, sources: Sequence[Tensor], groups: int, bias: Tensor | None = None) -> list[Tensor]:
    """The targets of the additions, plus the bias of every channel."""
    grouped = [channels_last(source).unflatten(1, (groups, -1)) for source in sources]
    add = _fused if is_compiling() and not has_steps(additions) else _in_place
    return [target.flatten(1, 2).to(sources[0].dtype) for target in add(additions, grouped, bias)]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _in_place(additions: Additions, sources: Sequence[Tensor], bias: Tensor | None = None) -> list[Tensor]:
    """Eager mode: one addition into a slice of the target per move."""
    batch, groups = sources[0].shape[:2]
    dtype = sum_dtype(sources[0].dtype)
    targets = []
    for channels, sizes in additions.targets:
        target = sources[0].new_empty(batch, *sizes, groups, channels, dtype=dtype)
        target = target.zero_() if bias is None else target.copy_(bias.view(groups, channels))
        targets.append(target.movedim((-2, -1), (1, 2)))
    for m in additions.moves:
        targets[m.target][:, :, m.to][m.to_at].add_(sources[m.source][:, :, m.of][m.of_at], alpha=m.sign)
    return targets


def has_steps(additions: Additions) -> bool:
    """Whether some places are not contiguous, as in a transposed convolution with a stride."""
    return any(at.step not in (None, 1) for m in additions.moves for at in (*m.of_at[1:], *m.to_at[1:]))


def _fused(additions: Additions, sources: Sequence[Tensor], bias: Tensor | None = None) -> list[Tensor]:
    """The same as sums of padded tensors: what Inductor fuses into one pass, unlike additions to slices."""
    sums: list[dict[int, Tensor]] = [{} for _ in additions.targets]  # per target: first channel -> sum
    for m in additions.moves:
        sizes = additions.targets[m.target][1]
        sides = [side for at, n in zip(m.to_at[:0:-1], sizes[::-1], strict=True) for side in (at.start, n - at.stop)]
        piece = F.pad(sources[m.source][:, :, m.of][m.of_at].to(sum_dtype(sources[0].dtype)), sides)
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
        target = torch.cat(filled, 2)
        if bias is not None:
            target = target + bias.view(*target.shape[1:3], *[1] * len(sizes))
        targets.append(target)
    return targets

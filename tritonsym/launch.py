"""Convolutions by Triton kernels: how tensors lie for them, what they are told, and the bound of their workspace.

Two paths. `shift`: products by the vendor's library, and the sums of `spec.schedule` by `kernels.shift`, which also
adds the bias, applies the activation and pools. `implicit_gemm`: one kernel that reads the stored rows through
`ConvSpec.row_table`, `kernels.conv` or, with one input channel per group, `kernels.depthwise`. The backward pass needs
nothing but x and the rows (and one byte per value of a pooled orbit).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tritonsym.shift import channels_last, is_last, like
from tritonsym.spec import ConvSpec, Geometry, schedule

#: Most bytes that z and other temporary tensors may take at a time: the batch is computed in chunks of as many images
#: as fit, at least one.
SCRATCH_BYTES = 64 << 20


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def check_device(x: Tensor) -> None:
    """Raise RuntimeError unless Triton kernels run on x."""
    if not runs_on(x.device):
        raise RuntimeError(
            f"tritonsym: Triton kernels cannot run on {x.device} tensors; move them to a GPU, set "
            "TRITON_INTERPRET=1 before Python starts (slow, for tests), or use tritonsym.backend('auto')"
        )


@contextmanager
def launching(path: str, tiles: Sequence[int], *operands: Tensor) -> Iterator[None]:
    """Launch on the device of the operands, and say what was launched if that fails."""
    x = operands[0]
    check_device(x)
    try:
        with torch.cuda.device_of(x):
            yield
    except Exception as error:
        raise RuntimeError(
            f"tritonsym: the kernels of path {path!r} with tiles {list(tiles)} failed for {x.dtype} tensors "
            f"{', '.join(str(tuple(t.shape)) for t in operands)} on {x.device}: {error}; "
            "tritonsym.backend('reference') does without"
        ) from error


def fprop(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    spec: ConvSpec,
    path: str,
    tiles: Sequence[int],
    activation: str | None,
    y: Tensor,
    winners: Tensor | None,
) -> None:
    """Fill y with act(conv(x) + bias), and `winners` with the images that won: bit i of a byte stands for image i.

    `tiles`: those of the path's kernels (`kernels.tiles.as_tiles`).
    """
    epilogue: dict[str, Any] = {"bias": None if bias is None else bias.contiguous(), "activation": activation}
    with launching(path, tiles, x, rows):
        from tritonsym.kernels import shift
        from tritonsym.kernels.tiles import as_tiles

        tile = as_tiles(tiles)[0]
        if path == "shift":
            ready = prepared(spec, x.device)
            for n in _chunks(x, y, ready):
                z = _multiply(x[n], rows, ready)
                won = None if winners is None else winners[n]
                shift.shift_sum(_to_3d(z), ready.shift_sum, _to_3d(y[n]), tile, winners=won, **epilogue)
        else:
            kernel, *weights, options = _gemm(rows, spec)
            where = grid(spec.geometry)
            where = where.reversed if spec.geometry.transposed else where
            kernel.fprop(_to_3d(x), *weights, _to_3d(y), where, tile, **options, **epilogue)


def backward(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    winners: Tensor | None,
    spec: ConvSpec,
    path: str,
    tiles: Sequence[int],
    dx: Tensor | None,
    drows: Tensor | None,
) -> None:
    """Fill dx and drows, of those that are given."""
    with launching(path, tiles, x, rows):
        from tritonsym.kernels import shift
        from tritonsym.kernels.tiles import as_tiles

        tile = as_tiles(tiles)[1:]
        if path == "shift":
            ready = prepared(spec, x.device)
            total = None if drows is None else torch.zeros_like(rows, dtype=torch.float32)
            for n in _chunks(x, dy, ready):
                d, dy_n, won = like(x, ready.z_shape(x[n])), dy[n], None
                if winners is not None:  # the gradient is shared by all winners, as that of torch.amax
                    won = channels_last(winners[n])
                    dy_n = torch.div(dy_n, _bits(won), out=torch.empty_like(won, dtype=dy.dtype))
                shift.gather_sum(_to_3d(dy_n), ready.gather_sum, _to_3d(d), tile[0], winners=won)
                _multiply_backward(d, x[n], rows, ready, None if dx is None else dx[n], total)
            if drows is not None and total is not None:
                drows.copy_(total)
            return
        kernel, *weights, options = _gemm(rows, spec)
        where, transposed = grid(spec.geometry), spec.geometry.transposed
        dy, x = _to_3d(dy), _to_3d(x)
        if dx is not None:
            kernel.dgrad(dy, *weights, _to_3d(dx), where if transposed else where.reversed, tile[0], **options)
        if drows is not None:
            is_product = rows.shape[2] > 1
            images, align = _device_images(spec, tile[1].block_m if is_product else 1, x.device)
            options = options | {"align": align} if is_product else {}
            options |= {"transposed": transposed, "most_bytes": SCRATCH_BYTES}
            kernel.wgrad(dy, x, images, drows, where, tile[1], **options)


# --- how tensors lie --------------------------------------------------------------------------------------------------


def _to_3d(x: Tensor) -> Tensor:
    """(N, C, *sizes) with axes of size 1 put in front of the spatial ones."""
    return x[(slice(None),) * 2 + (None,) * (5 - x.ndim)]


def _three(values: Sequence[int], fill: int) -> Any:
    """Of every axis of a kernel."""
    return (fill,) * (3 - len(values)) + tuple(values)


# --- shift ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What the shift path needs to know of a spec. The z of all phases lie side by side: (N, groups rows, *sizes)."""

    groups: int
    steps: tuple[int, ...]  # from one position of a phase to the next
    phases: list[tuple[tuple[Any, ...], Any, int]]  # positions of x; rows, as an index, and how many these are
    shift_sum: Any  # `kernels.shift.Table` of the sums from z to y
    gather_sum: Any  # and of their adjoint from dy to d

    @property
    def is_whole(self) -> bool:
        """Whether there is one phase only, of every position."""
        return all(step == 1 for step in self.steps)

    def z_shape(self, x: Tensor) -> tuple[int, ...]:
        """With the sizes of the largest phase; not 0, of which torch makes no convolution."""
        sizes = (max(1, -(-n // step)) for n, step in zip(x.shape[2:], self.steps, strict=True))
        return (x.shape[0], self.groups * sum(rows for *_, rows in self.phases), *sizes)

    def parts(self, z: Tensor) -> Sequence[Tensor]:
        """The z of every phase: (N, groups, rows, *sizes)."""
        return z.unflatten(1, (self.groups, -1)).split([rows for *_, rows in self.phases], 2)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def prepared(spec: ConvSpec, device: torch.device) -> Prepared:
    from tritonsym.kernels.shift import Table

    phases, terms = schedule(spec)
    to_y: dict[tuple[int, int], list[Any]] = {(first, b.filters): [] for b in spec.blocks for first, _ in b.images}
    to_d: dict[tuple[int, int], list[Any]] = {}
    for t in terms:
        image, channel = (t.first // t.filters, 0) if spec.pool else (0, t.first)
        to_y[t.first, t.filters].append((t.row, _three(t.shift, 0), t.sign, image))
        back = _three([-shift for shift in t.shift], 0)
        to_d.setdefault((t.row, t.filters), []).append((channel, back, t.sign, image))
    sums_y, sums_d = (tuple((*key, tuple(sums[key])) for key in sorted(sums)) for sums in (to_y, to_d))
    stride, one = spec.geometry.stride, (1, 1, 1)
    steps, div = (one[: len(stride)], _three(stride, 1)) if spec.geometry.transposed else (stride, one)
    parts = []
    for phase in phases:
        at = (..., *(slice(r, None, step) for r, step in zip(phase.residue, steps, strict=True)))
        all_rows = len(phase.rows) == spec.rows
        parts.append((at, slice(None) if all_rows else torch.tensor(phase.rows, device=device), len(phase.rows)))
    rows, channels = sum(len(phase.rows) for phase in phases), spec.out_channels // spec.groups
    to = Table(rows, channels, sums_y, one, div, spec.pool or "")
    return Prepared(spec.groups, steps, parts, to, Table(channels, rows, sums_d, div, one))


def _chunks(x: Tensor, y: Tensor, ready: Prepared) -> Iterator[slice]:
    """Slices of the batch whose z, and copies of x and y in another memory format, fit the workspace."""
    values = sum(math.prod(shape[1:]) for shape in (x.shape, y.shape, ready.z_shape(x)))
    count = max(1, SCRATCH_BYTES // max(values * x.element_size(), 1))
    return (slice(n, n + count) for n in range(0, x.shape[0], count))


def _multiply(x: Tensor, rows: Tensor, ready: Prepared) -> Tensor:
    """z of all phases, 0 beyond the smaller ones."""
    shape, groups = ready.z_shape(x), ready.groups

    def convolved(at: tuple[Any, ...], w: Tensor) -> Tensor:  # so that torch's switches for float32 hold
        return torch.convolution(_phase(x, at, shape), _as_1x1(w, x.ndim), None, *_plain(x, groups))

    if x.dtype == torch.float32 and len(ready.phases) == 1:
        return channels_last(convolved(ready.phases[0][0], rows))
    z = like(x, shape)
    for (at, picked, _), part in zip(ready.phases, ready.parts(z), strict=True):
        w = rows[:, picked]  # [G, R, C]
        if x.dtype == torch.float32:
            part.copy_(convolved(at, w).unflatten(1, (groups, -1)))
        elif _by_image(x, ready):
            torch.bmm(x.flatten(2).mT, w.mT.expand(x.shape[0], -1, -1), out=part[:, 0].flatten(2).mT)
        else:
            torch.bmm(_matrices(_phase(x, at, shape), groups), w.mT, out=_matrices(part))
    return z


def _multiply_backward(
    d: Tensor, x: Tensor, rows: Tensor, ready: Prepared, dx: Tensor | None, drows: Tensor | None
) -> None:
    """Fill dx and add to drows, from d of all phases."""
    groups, needs = ready.groups, [dx is not None, drows is not None, False]
    if dx is not None and not ready.is_whole:
        dx.zero_()
    for (at, picked, count), part in zip(ready.phases, ready.parts(d), strict=True):
        w, matrices = rows[:, picked], _matrices(part)  # [G, R, C], [G, P, R]
        found, dw = None, None  # dx of the phase (N, groups C, *sizes), [G, R, C]
        if x.dtype == torch.float32:
            operands = part.flatten(1, 2), _phase(x, at, d.shape), _as_1x1(w, x.ndim), None
            found, dw, _ = torch.ops.aten.convolution_backward(*operands, *_plain(x, groups), needs)
        elif dx is not None and ready.is_whole and is_last(dx) and dx.movedim(1, -1).is_contiguous():
            torch.bmm(matrices, w, out=_matrices(dx, groups))
        elif dx is not None and _by_image(dx, ready):
            torch.bmm(w.mT.expand(x.shape[0], -1, -1), part[:, 0].flatten(2), out=dx.flatten(2))
        elif dx is not None:
            found = torch.bmm(matrices, w).transpose(0, 1)  # [P, G, C]
            found = found.reshape(x.shape[0], *d.shape[2:], -1).movedim(-1, 1)
        if dx is not None and found is not None:
            dx[at] = found[_corner(dx[at])]
        if drows is None:
            continue
        if dw is None and _by_image(x, ready) and math.prod(x.shape[2:]) >= 2 * count:
            # an R x C matrix is written and read for every image, or else a channels-first x is copied
            dw = _products(part[:, 0].flatten(2), x.flatten(2).mT).sum(0, keepdim=True)
        elif dw is None:
            dw = _products(matrices.mT, _matrices(_phase(x, at, d.shape), groups))
        drows[:, picked] += dw.view(groups, count, -1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices, in float32."""
    if a.is_cuda and not torch.version.hip:
        return torch.bmm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a.float(), b.float())


def _phase(x: Tensor, at: tuple[Any, ...], shape: Sequence[int]) -> Tensor:
    """The positions of one phase, channels-last, 0 where z of this shape is larger."""
    there = x[at]
    if there.shape[2:] == tuple(shape[2:]):
        return channels_last(there)
    padded = like(x, (*x.shape[:2], *shape[2:])).zero_()
    padded[_corner(there)] = there
    return padded


def _corner(x: Tensor) -> tuple[Any, ...]:
    """As many places of every spatial axis as x has."""
    return (..., *map(slice, x.shape[2:]))


def _matrices(z: Tensor, groups: int = 0) -> Tensor:
    """(N, G, C, *sizes), or (N, groups C, *sizes), channels-last -> a view (G, positions, C)."""
    z = z.unflatten(1, (groups, -1)) if groups else z
    return z.movedim((1, 2), (-2, -1)).flatten(0, -3).movedim(-2, 0)


def _by_image(x: Tensor, ready: Prepared) -> bool:
    """Whether x is channels-first, so that one product per image reads, or writes, it as it lies."""
    return ready.groups == 1 and ready.is_whole and not is_last(x) and x.is_contiguous()


def _as_1x1(w: Tensor, ndim: int) -> Tensor:
    """As the weight of a 1x1 convolution."""
    return w.flatten(0, 1)[(...,) + (None,) * (ndim - 2)]


def _plain(x: Tensor, groups: int) -> tuple[Any, ...]:
    """Its stride, padding and so on."""
    one, zero = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    return one, zero, one, False, zero, groups


def _bits(winners: Tensor) -> Tensor:
    """How many bits of every byte are set."""
    pairs = winners - (winners >> 1 & 0x55)
    quads = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return quads + (quads >> 4) & 0x0F


# --- implicit_gemm ----------------------------------------------------------------------------------------------------


def _gemm(rows: Tensor, spec: ConvSpec) -> tuple[Any, Tensor, Tensor, dict[str, Any]]:
    """The kernels, the rows as they read them, the table of the rows, and options of theirs."""
    table, signed = _device_table(spec, rows.device)
    if rows.shape[2] == 1:
        from tritonsym.kernels import depthwise

        return depthwise, rows[..., 0].mT.contiguous(), table, {"signed": signed}
    from tritonsym.kernels import conv

    # torch's switch for convolutions in float32
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return conv, rows, table, {"signed": signed, "precision": "tf32" if tf32 else "ieee"}


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _device_table(spec: ConvSpec, device: torch.device) -> tuple[Tensor, bool]:
    """`ConvSpec.row_table` on the device, and whether it has a negative sign."""
    signed = any(entry < 0 for taps in spec.row_table for entry in taps)
    return torch.tensor(spec.row_table, dtype=torch.int32, device=device), signed


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _device_images(spec: ConvSpec, height: int, device: torch.device) -> tuple[Tensor, int]:
    """Of every tile of stored rows with equal taps: first row, rows, then (first filter, tap, sign) of every image.

    And what divides the rows of every tile and the first filter of every image.
    """
    tiles = []
    row = 0
    for block, table in zip(spec.blocks, spec.slot_table, strict=True):
        for slot in range(spec.slots(block)):
            images = [
                (first, tap, sign)
                for first, slots, signs in table
                for tap, (s, sign) in enumerate(zip(slots, signs, strict=True))
                if s == slot and sign
            ]
            for u in range(0, block.filters, height):
                shifted = [number for first, tap, sign in images for number in (first + u, tap, sign)]
                tiles.append([row + u, min(height, block.filters - u), *shifted])
            row += block.filters
    most = max(map(len, tiles))
    align = math.gcd(16, *(n for block in spec.blocks for n in (block.filters, *(first for first, _ in block.images))))
    return torch.tensor([t + [0] * (most - len(t)) for t in tiles], dtype=torch.int32, device=device), align


def grid(geometry: Geometry) -> Any:
    """Where positions of a convolution that is not transposed read: at stride p + dilation k - padding."""
    from tritonsym.kernels.address import Grid

    kernel, stride, dilation = (_three(v, 1) for v in (geometry.kernel_size, geometry.stride, geometry.dilation))
    return Grid(kernel, stride, dilation, _three([-p for p in geometry.padding], 0), (1, 1, 1))

"""The shift path as one kernel, for few channels: z of a patch of an image never leaves the multiprocessor.

For one axis or two and stride 1. A program multiplies a patch, with the halo that its results read, by the rows of one
stored tap after the other (tensor cores), and reads these products at shifted places of the patch (`tl.gather`, through
shared memory), as `kernels.shift` reads z. Outside the image x is 0, so z is 0, too, and the sums need no masks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonsym.kernels.address import read_at, strides, strides_of, wide
from tritonsym.kernels.prepared import Launch
from tritonsym.kernels.shift import Table, combine, constants, store_sums
from tritonsym.kernels.tiles import Patch, padded_channels

#: Dtypes of x for which z is rounded to bfloat16, as in `shift`, and two values share a register; else z is float32.
PACKED = (torch.bfloat16,)


@triton.jit
def _pack(z, P: tl.constexpr, U: tl.constexpr):
    """Values 2 v and 2 v + 1 of a row [U] as the halves of one integer v."""
    low, high = tl.split(tl.reshape(z, (P, U // 2, 2)))
    low = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (high << 16) | low


@triton.jit
def _unpack(pairs, P: tl.constexpr, U: tl.constexpr):
    low = (pairs << 16).to(tl.float32, bitcast=True)
    high = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), (P, U))


@triton.jit(
    do_not_specialize=[
        "TH", "TW", "SH", "SW",
        "source_n", "source_c", "source_d", "source_h", "source_w",
        "target_n", "target_c", "target_d", "target_h", "target_w",
    ]
)  # fmt: skip
def _fused_kernel(
    x_ptr,  # [N, groups * C, 1, SH, SW], any strides
    rows_ptr,  # [groups, ROWS, C]
    y_ptr,  # [N, groups * TARGET_C, 1, TH, TW], any strides
    bias_ptr,  # [groups * TARGET_C] or None
    winners_ptr,  # bits of the images that won, strides of y; None if not kept
    TH, TW, SH, SW,
    source_n, source_c, source_d, source_h, source_w, target_n, target_c, target_d, target_h, target_w,
    SOURCE_ALIGN: tl.constexpr, SOURCE_UNIT: tl.constexpr, TARGET_ALIGN: tl.constexpr, TARGET_UNIT: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, TARGET_C: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,  # filter tiles of one group
    TILE_AT: tl.constexpr,  # per run of sums of the same rows: its first tile
    FILTERS: tl.constexpr,  # per run
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,  # per run and position
    OP: tl.constexpr, A: tl.constexpr, B: tl.constexpr,  # per run and instruction
    SLOT: tl.constexpr,  # per run and instruction: which of the run's taps it loads, in the order of first use
    TOTAL: tl.constexpr, FIRST: tl.constexpr,  # per run and sum: its value, its first channel
    LOW_H: tl.constexpr, LOW_W: tl.constexpr,  # the least shifts
    REACH_H: tl.constexpr, REACH_W: tl.constexpr,  # the largest, relative to these
    AXES: tl.constexpr,
    POOL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PACK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within an image need 64 bits
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[n, first[o] + u, p] = act(bias + sum_t sign[o, t] z[n, row[o, t] + u, p + shift[o, t]]),
    z[n, r, q] = sum_c rows[r, c] x[n, c, q], which is 0 for q outside the image.

    A program computes BLOCK_U of the u of a run, at p in a patch of (BLOCK_H - REACH_H) x (BLOCK_W - REACH_W), from q
    in BLOCK_H x BLOCK_W. POOL: the extremum over o, and winners[n, u, p] = sum of 2^o over the o that attain it.
    """
    P: tl.constexpr = BLOCK_H * BLOCK_W
    HEIGHT: tl.constexpr = BLOCK_H - REACH_H
    WIDTH: tl.constexpr = BLOCK_W - REACH_W
    source_n, source_c, source_d, source_h, source_w = strides(
        source_n, source_c, source_d, source_h, source_w, SOURCE_ALIGN, SOURCE_UNIT
    )
    target_n, target_c, target_d, target_h, target_w = strides(
        target_n, target_c, target_d, target_h, target_w, TARGET_ALIGN, TARGET_UNIT
    )
    tile = tl.program_id(0) % (GROUPS * TILES)  # neighbours read the same patch
    patch = tl.program_id(0) // (GROUPS * TILES)
    group = (tile // TILES).to(tl.int64)
    tile = tile % TILES
    across = tl.cdiv(TW, WIDTH)
    down = tl.cdiv(TH, HEIGHT)
    n = (patch // (across * down)).to(tl.int64)
    p = tl.arange(0, P)
    h = patch // across % down * HEIGHT + p // BLOCK_W  # [P]
    w = patch % across * WIDTH + p % BLOCK_W
    live = (p // BLOCK_W < HEIGHT) & (p % BLOCK_W < WIDTH) & (h < TH) & (w < TW)
    if WIDE:
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    target = n * target_n + group * TARGET_C * target_c + h * target_h + w * target_w  # [P]
    place, inside = read_at(
        h, h, w, 0, LOW_H, LOW_W, p >= 0, 1, SH, SW, source_d, source_h, source_w, (1, 1, 1), (1, 1, 1), AXES
    )
    place += n * source_n + group * C * source_c
    c = tl.arange(0, BLOCK_C)
    has_c = c < C
    of_c = c * source_c
    if WIDE:
        of_c = c.to(tl.int64) * source_c
    x = tl.load(x_ptr + place[:, None] + of_c[None, :], mask=inside[:, None] & has_c[None, :], other=0.0)  # [P, C]
    rows_ptr += group * ROWS * C
    for run in tl.static_range(len(FILTERS)):
        if (tile >= TILE_AT[run]) & (tile < TILE_AT[run + 1]):
            u = (tile - TILE_AT[run]) * BLOCK_U + tl.arange(0, BLOCK_U)  # [U]
            has = u < FILTERS[run]
            z = ()  # one per tap so far: [P, U], or packed in pairs [P, U / 2]
            values = ()  # [U, P]
            for i in tl.static_range(len(OP[run])):
                if OP[run][i] == 0:
                    if SLOT[run][i] == len(z):
                        row = ((u + B[run][i]) * C)[None, :] + c[:, None]
                        weight = tl.load(rows_ptr + row, mask=has_c[:, None] & has[None, :], other=0.0)  # [C, U]
                        product = tl.dot(x, weight, input_precision=PRECISION)
                        if PACK:
                            z = z + (_pack(product, P, BLOCK_U),)
                        else:
                            z = z + (product,)
                    at = p + (SHIFT_H[run][A[run][i]] - LOW_H) * BLOCK_W + (SHIFT_W[run][A[run][i]] - LOW_W)
                    at = (at & (P - 1))[:, None]  # only results that are not stored wrap around
                    if PACK:
                        value = tl.gather(z[SLOT[run][i]], tl.broadcast_to(at, (P, BLOCK_U // 2)), 0)
                        value = _unpack(value, P, BLOCK_U)
                    else:
                        value = tl.gather(z[SLOT[run][i]], tl.broadcast_to(at, (P, BLOCK_U)), 0)
                    value = tl.trans(value)
                else:
                    value = combine(values, OP[run][i], A[run][i], B[run][i])
                values = values + (value,)
            if WIDE:
                u = u.to(tl.int64)
            store_sums(
                values, y_ptr, bias_ptr, winners_ptr, target, target_c, group * TARGET_C, u, has, live,
                run, TOTAL, FIRST, POOL, 1, ACTIVATION, P, BLOCK_U,
            )  # fmt: skip


def conv(
    x: Tensor, rows: tuple[int, int, int], y: Tensor, table: Table, patch: Patch, activation: str | None, precision: str
) -> Launch:
    """A launch that fills y (N, groups * channels, 1, H, W) with the sums of `table` over z; any strides of x and y.

    Call it with x, the contiguous rows (groups, R, C), y, a bias or None, and None or the winners of a pooled orbit, in
    the strides of y.
    """
    groups, count, channels = rows
    fixed: dict[str, Any] = {**constants(table, patch.block_u, by_source=True)}
    for name in ("SOURCE_C", "SHIFT_D", "MUL", "DIV", "WON"):
        del fixed[name]
    slots = []
    for ops, of_rows in zip(fixed["OP"], fixed["B"], strict=True):
        order = list(dict.fromkeys(row for op, row in zip(ops, of_rows, strict=True) if op == 0))
        slots.append(tuple(order.index(row) if op == 0 else -1 for op, row in zip(ops, of_rows, strict=True)))
    useful = []
    for axis, block in (("H", patch.block_h), ("W", patch.block_w)):
        shifts = [shift for run in fixed[f"SHIFT_{axis}"] for shift in run]
        fixed |= {f"LOW_{axis}": min(shifts), f"REACH_{axis}": max(shifts) - min(shifts)}
        useful.append(block - fixed[f"REACH_{axis}"])
    batch, _, _, *sizes = y.shape
    programs = batch * groups * fixed["TILES"]
    for size, of_patch in zip(sizes, useful, strict=True):
        programs *= triton.cdiv(size, of_patch)
    (of_x, x_fixed), (of_y, y_fixed) = strides_of(x, "SOURCE"), strides_of(y, "TARGET")
    more = {"ROWS": count, "C": channels, "GROUPS": groups, "SLOT": tuple(slots), "PACK": x.dtype in PACKED}
    more |= {"BLOCK_C": padded_channels(channels), "ACTIVATION": activation or ""}
    return Launch(
        _fused_kernel,
        (programs,) if programs else (),
        (*sizes, *x.shape[3:], *of_x, *of_y),
        fixed | x_fixed | y_fixed | more | patch.constants | {"PRECISION": precision, "WIDE": wide(x, y)},
        patch.options,
    )

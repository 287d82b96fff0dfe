"""Convolutions with one input channel per group: shifted images, weighted and summed.

    y[n, g, o, p] = act(b[g, o] + sum_k sign[o, k] rows[g, row[o, k]] x[n, g, at(p, k)])
    dx[n, g, q]   = sum_{o, k} sign[o, k] rows[g, row[o, k]] dy[n, g, o, at'(q, k)]
    dw[g, r]      = sum_{n, p} sum_{(o, k): row[o, k] = r} sign[o, k] dy[n, g, o, p] x[n, g, at(p, k)]

As in `kernels.conv` the first two are one kernel, and the last splits the positions over programs, whose partial
results are added afterwards in a fixed order. Tiles are groups x positions, so that loads are contiguous for x both
channels-last and channels-first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tritonsym.kernels.address import Grid, positions, read_tap, strides, strides_of, wide
from tritonsym.kernels.epilogue import activate
from tritonsym.kernels.prepared import Launch
from tritonsym.kernels.tiles import Tile, most_splits


@triton.jit(
    do_not_specialize=[
        "M", "GROUPS", "TD", "TH", "TW", "SD", "SH", "SW",
        "source_n", "source_c", "source_d", "source_h", "source_w",
        "target_n", "target_c", "target_d", "target_h", "target_w",
    ]
)  # fmt: skip
def _depthwise_kernel(
    source_ptr,  # [N, GROUPS * SOURCE_F, SD, SH, SW], any strides
    rows_ptr,  # [R, GROUPS]
    table_ptr,  # [F, taps]: sign * (row + 1), 0 where there is no weight
    bias_ptr,  # [GROUPS * TARGET_F] or None
    target_ptr,  # [N, GROUPS * TARGET_F, TD, TH, TW], any strides
    M,  # N * TD * TH * TW
    TD, TH, TW, SD, SH, SW, GROUPS,
    source_n, source_c, source_d, source_h, source_w,
    target_n, target_c, target_d, target_h, target_w,
    SOURCE_ALIGN: tl.constexpr, SOURCE_UNIT: tl.constexpr, TARGET_ALIGN: tl.constexpr, TARGET_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,  # the unit of GROUPS
    SOURCE_F: tl.constexpr,
    TARGET_F: tl.constexpr,
    KERNEL: tl.constexpr, MUL: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, DIV: tl.constexpr,
    AXES: tl.constexpr,
    SIGNED: tl.constexpr,  # some sign is negative
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within an image need 64 bits
    BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """target[n, g, j, p] = act(bias[g, j] + sum_{i, k} W[g, i + j, k] source[n, g, i, at(p, k)]).

    W[g, o, k] = sign[o, k] rows[g, row[o, k]]; at(p, k) as in `kernels.conv`. The source or the target has one channel
    per group: i or j is 0.
    """
    source_n, source_c, source_d, source_h, source_w = strides(
        source_n, source_c, source_d, source_h, source_w, SOURCE_ALIGN, SOURCE_UNIT
    )
    target_n, target_c, target_d, target_h, target_w = strides(
        target_n, target_c, target_d, target_h, target_w, TARGET_ALIGN, TARGET_UNIT
    )
    GROUPS *= CHANNELS
    j = tl.program_id(0) % TARGET_F if TARGET_F > 1 else 0
    block = tl.program_id(0) // TARGET_F
    tiles_u = tl.cdiv(GROUPS, BLOCK_U)
    n, d, h, w, live = positions(block // tiles_u, M, TD, TH, TW, BLOCK_P, WIDE, AXES)  # [P]
    g = block % tiles_u * BLOCK_U + tl.arange(0, BLOCK_U)  # [U]
    has = g < GROUPS
    if WIDE:
        g = g.to(tl.int64)
    source = source_ptr + n * source_n  # [P]
    total = tl.zeros((BLOCK_U, BLOCK_P), tl.float32)
    for i in range(SOURCE_F):
        channel = (g * SOURCE_F + i) * source_c  # [U]
        for k in range(KERNEL[0] * KERNEL[1] * KERNEL[2]):
            place, inside = read_tap(
                d, h, w, k, live, SD, SH, SW, source_d, source_h, source_w, KERNEL, MUL, STEP, SHIFT, DIV, AXES
            )
            x = tl.load(
                source[None, :] + (channel[:, None] + place[None, :]), mask=has[:, None] & inside[None, :], other=0.0
            )  # [U, P]
            entry = tl.load(table_ptr + (i + j) * (KERNEL[0] * KERNEL[1] * KERNEL[2]) + k)
            weight = tl.load(rows_ptr + tl.maximum(tl.abs(entry) - 1, 0) * GROUPS + g, mask=has, other=0.0)  # [U]
            weight = tl.where(entry == 0, 0.0, weight)
            if SIGNED:
                weight = tl.where(entry < 0, -weight, weight)
            total += weight.to(tl.float32)[:, None] * x.to(tl.float32)
    channel = g * TARGET_F + j
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=has, other=0.0).to(tl.float32)[:, None]
    target = target_ptr + n * target_n  # [P]
    place = d * target_d + h * target_h + w * target_w
    tl.store(
        target[None, :] + ((channel * target_c)[:, None] + place[None, :]),
        activate(total, ACTIVATION).to(target_ptr.dtype.element_ty),
        mask=has[:, None] & live[None, :],
    )


@triton.jit(
    do_not_specialize=[
        "M", "STEPS", "PD", "PH", "PW", "SD", "SH", "SW", "GROUPS", "R",
        "dy_n", "dy_c", "dy_d", "dy_h", "dy_w", "x_n", "x_c", "x_d", "x_h", "x_w",
    ]
)  # fmt: skip
def _depthwise_wgrad_kernel(
    dy_ptr,  # [N, GROUPS * F, YD, YH, YW], any strides
    x_ptr,  # [N, GROUPS, XD, XH, XW], any strides
    images_ptr,  # [R, 2 + 3 IMAGES]: row, 1, then per image filter, tap, sign (0: none)
    workspace_ptr,  # [splits, GROUPS, R]
    M,  # positions of all images of the tensor that is read in place
    STEPS,  # blocks of positions per split
    PD, PH, PW, SD, SH, SW, GROUPS, R,
    dy_n, dy_c, dy_d, dy_h, dy_w,
    x_n, x_c, x_d, x_h, x_w,
    DY_ALIGN: tl.constexpr, DY_UNIT: tl.constexpr, X_ALIGN: tl.constexpr, X_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,  # the unit of GROUPS
    F: tl.constexpr,
    KERNEL: tl.constexpr, MUL: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, DIV: tl.constexpr,
    AXES: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # x is read at p and dy at at(p, k), not the other way round
    IMAGES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """workspace[split, g, r] = sum_{n, p, (o, k, sign)} sign dy[n, g, o, p] x[n, g, at(p, k)].

    (n, p) is in the split of the positions, (o, k, sign) in the images of row r.
    """
    dy_n, dy_c, dy_d, dy_h, dy_w = strides(dy_n, dy_c, dy_d, dy_h, dy_w, DY_ALIGN, DY_UNIT)
    x_n, x_c, x_d, x_h, x_w = strides(x_n, x_c, x_d, x_h, x_w, X_ALIGN, X_UNIT)
    GROUPS *= CHANNELS
    images_ptr += tl.program_id(0) % R * (2 + 3 * IMAGES)  # neighbours read the same positions
    g = tl.program_id(0) // R * BLOCK_U + tl.arange(0, BLOCK_U)  # [U]
    has = g < GROUPS
    if WIDE:
        g = g.to(tl.int64)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_U, BLOCK_P), tl.float32)
    for step in range(split * STEPS, split * STEPS + STEPS):
        n, d, h, w, live = positions(step, M, PD, PH, PW, BLOCK_P, WIDE, AXES)  # [P]
        for image in range(IMAGES):
            o = tl.load(images_ptr + 2 + 3 * image)
            k = tl.load(images_ptr + 3 + 3 * image)
            sign = tl.load(images_ptr + 4 + 3 * image)
            if TRANSPOSED:
                x_at = d * x_d + h * x_h + w * x_w
                dy_at, there = read_tap(
                    d, h, w, k, live, SD, SH, SW, dy_d, dy_h, dy_w, KERNEL, MUL, STEP, SHIFT, DIV, AXES
                )
            else:
                dy_at = d * dy_d + h * dy_h + w * dy_w
                x_at, there = read_tap(d, h, w, k, live, SD, SH, SW, x_d, x_h, x_w, KERNEL, MUL, STEP, SHIFT, DIV, AXES)
            mask = has[:, None] & there[None, :]
            filters = ((g * F + o if F > 1 else g) * dy_c)[:, None]
            dy = tl.load((dy_ptr + n * dy_n)[None, :] + (filters + dy_at[None, :]), mask=mask, other=0.0)  # [U, P]
            x = tl.load((x_ptr + n * x_n)[None, :] + ((g * x_c)[:, None] + x_at[None, :]), mask=mask, other=0.0)
            product = dy.to(tl.float32) * x.to(tl.float32)
            total += tl.where(sign < 0, -product, tl.where(sign == 0, 0.0, product))
    place = (split.to(tl.int64) * GROUPS + g) * R + tl.load(images_ptr)
    tl.store(workspace_ptr + place, tl.sum(total, 1), mask=has)


def fprop(
    x: Tensor,
    rows: Sequence[int],
    y: Tensor,
    grid: Grid,
    tile: Tile,
    *,
    signed: bool,
    activation: str | None = None,
) -> Launch:
    """A launch that fills y (N, groups * J, D, H, W) from x (N, groups * I, D, H, W) and rows (groups, R, 1).

    I or J is 1. Call it with x, the rows as (R, groups), contiguous, their table, a bias or None, and y.
    """
    groups = rows[0]
    batch, channels, *sizes = y.shape
    count = batch * math.prod(sizes)
    programs = triton.cdiv(count, tile.block_p) * triton.cdiv(groups, tile.block_u) * (channels // groups)
    (of_x, x_fixed), (of_y, y_fixed) = strides_of(x, "SOURCE"), strides_of(y, "TARGET")
    unit = math.gcd(16, groups)
    more = {"SOURCE_F": x.shape[1] // groups, "TARGET_F": channels // groups, "SIGNED": signed}
    return Launch(
        _depthwise_kernel,
        (programs,) if y.numel() else (),
        (count, *sizes, *x.shape[2:], groups // unit, *of_x, *of_y),
        {
            **x_fixed, **y_fixed, **grid.constants, **tile.constants, **more,
            "CHANNELS": unit, "ACTIVATION": activation or "", "WIDE": wide(x, y),
        },
        tile.options,
    )  # fmt: skip


#: dx from dy: the same kernel, with a `Grid` that says where dx reads dy.
dgrad = fprop


def wgrad(
    dy: Tensor,
    x: Tensor,
    images: Sequence[Sequence[int]],
    rows: Sequence[int],
    grid: Grid,
    tile: Tile,
    *,
    transposed: bool,
    most_bytes: int,
) -> tuple[Launch, tuple[int, ...]]:
    """A launch that fills partial gradients of the rows (groups, R, 1), and the shape of these partial gradients.

    Each covers a part of the positions; their sum along the first axis is the gradient. Call it with dy, x, the table
    `images` of the single rows, and float32 zeros of that shape.
    """
    groups, stored, _ = rows
    read, mapped = (x, dy) if transposed else (dy, x)
    count = read.shape[0] * math.prod(read.shape[2:])
    programs = stored * triton.cdiv(groups, tile.block_u)
    splits = most_splits(programs, count // tile.block_p, math.prod(rows), most_bytes)
    (of_dy, dy_fixed), (of_x, x_fixed) = strides_of(dy, "DY"), strides_of(x, "X")
    unit = math.gcd(16, groups)
    more = {"F": dy.shape[1] // groups, "TRANSPOSED": transposed, "IMAGES": (len(images[0]) - 2) // 3}
    launch = Launch(
        _depthwise_wgrad_kernel,
        (programs, splits),
        (
            count, triton.cdiv(triton.cdiv(count, tile.block_p), splits), *read.shape[2:], *mapped.shape[2:],
            groups // unit, stored, *of_dy, *of_x,
        ),
        {
            **dy_fixed, **x_fixed, **grid.constants, **tile.constants, **more,
            "CHANNELS": unit, "WIDE": wide(dy, x),
        },
        tile.options,
    )  # fmt: skip
    return launch, (splits, *rows)

"""Implicit GEMM over stored weights: a table says which stored row is at every tap of every filter.

    y[p, o]  = act(b[o] + sum_{k, c} sign[o, k] rows[row[o, k], c] x[at(p, k), c])
    dx[q, c] = sum_{k, o} sign[o, k] rows[row[o, k], c] dy[at'(q, k), o]
    dw[r, c] = sum_{p} sum_{(o, k): row[o, k] = r} sign[o, k] dy[p, o] x[at(p, k), c]

The first two are one kernel; no expanded weight exists in memory. The last adds the images of a stored row in a fixed
order and splits the positions over programs, whose partial results are added afterwards in a fixed order too.
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
from tritonsym.kernels.tiles import GemmTile, most_splits


@triton.jit(
    do_not_specialize=[
        "M", "SOURCE_C", "TARGET_C", "R", "C", "TD", "TH", "TW", "SD", "SH", "SW",
        "source_n", "source_c", "source_d", "source_h", "source_w",
        "target_n", "target_c", "target_d", "target_h", "target_w",
    ]
)  # fmt: skip
def _implicit_gemm_kernel(
    source_ptr,  # [N, groups * SOURCE_C, SD, SH, SW], any strides
    rows_ptr,  # [groups, R, C]
    table_ptr,  # [O, TAPS]: sign * (row + 1), 0 where there is no weight
    bias_ptr,  # [groups * TARGET_C] or None
    target_ptr,  # [N, groups * TARGET_C, TD, TH, TW], any strides
    M,  # N * TD * TH * TW
    TD, TH, TW, SD, SH, SW, SOURCE_C, TARGET_C, R, C,
    source_n, source_c, source_d, source_h, source_w,
    target_n, target_c, target_d, target_h, target_w,
    SOURCE_ALIGN: tl.constexpr, SOURCE_UNIT: tl.constexpr, TARGET_ALIGN: tl.constexpr, TARGET_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,  # the unit of SOURCE_C, TARGET_C and C
    KERNEL: tl.constexpr, MUL: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, DIV: tl.constexpr,
    AXES: tl.constexpr,
    GRADIENT: tl.constexpr,  # the source channels are filters, the target channels those of the weight
    SIGNED: tl.constexpr,  # some sign is negative
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32: 'tf32' or 'ieee'
    WIDE: tl.constexpr,  # offsets within an image need 64 bits
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """target[p, j] = act(bias[j] + sum_{k, i} source[at(p, k), i] W[k, i, j]).

    at(p, k) = (MUL p + STEP k + SHIFT) / DIV; the source is 0 outside the image and where DIV does not divide.
    W[k, i, j] = sign[j, k] rows[row[j, k], i], or with GRADIENT sign[i, k] rows[row[i, k], j].
    """
    source_n, source_c, source_d, source_h, source_w = strides(
        source_n, source_c, source_d, source_h, source_w, SOURCE_ALIGN, SOURCE_UNIT
    )
    target_n, target_c, target_d, target_h, target_w = strides(
        target_n, target_c, target_d, target_h, target_w, TARGET_ALIGN, TARGET_UNIT
    )
    SOURCE_C *= CHANNELS
    TARGET_C *= CHANNELS
    C *= CHANNELS
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    tiles_n = tl.cdiv(TARGET_C, BLOCK_N)
    group = tl.program_id(1).to(tl.int64)
    n, d, h, w, live = positions(tl.program_id(0) // tiles_n, M, TD, TH, TW, BLOCK_M, WIDE, AXES)  # [M]
    j = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    has = j < TARGET_C
    if WIDE:
        j = j.to(tl.int64)
    source = source_ptr + group * SOURCE_C * source_c + n * source_n  # [M]
    rows_ptr += group * R * C
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(SOURCE_C, BLOCK_K)
    for step in range(TAPS * blocks):  # at most 4 warps: pytorch issue 173068
        k = step // blocks
        i = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)  # [K]
        i_has = i < SOURCE_C
        if WIDE:
            i = i.to(tl.int64)
        place, inside = read_tap(
            d, h, w, k, live, SD, SH, SW, source_d, source_h, source_w, KERNEL, MUL, STEP, SHIFT, DIV, AXES
        )  # [M]
        x = tl.load(
            source[None, :] + ((i * source_c)[:, None] + place[None, :]),
            mask=i_has[:, None] & inside[None, :],
            other=0.0,
        )  # [K, M]
        if GRADIENT:
            entry = tl.load(table_ptr + i * TAPS + k, mask=i_has, other=0)  # [K]
            row = (tl.abs(entry) - 1).to(tl.int64) * C
            weight = tl.load(
                rows_ptr + row[:, None] + j[None, :], mask=(entry != 0)[:, None] & has[None, :], other=0.0
            )  # [K, N]
            if SIGNED:
                weight = tl.where((entry < 0)[:, None], -weight, weight)
        else:
            entry = tl.load(table_ptr + j * TAPS + k, mask=has, other=0)  # [N]
            row = (tl.abs(entry) - 1).to(tl.int64) * C
            weight = tl.load(
                rows_ptr + i[:, None] + row[None, :], mask=i_has[:, None] & (entry != 0)[None, :], other=0.0
            )  # [K, N]
            if SIGNED:
                weight = tl.where((entry < 0)[None, :], -weight, weight)
        total = tl.dot(tl.trans(x), weight, total, input_precision=PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + group * TARGET_C + j, mask=has, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    target = target_ptr + group * TARGET_C * target_c + n * target_n  # [M]
    place = d * target_d + h * target_h + w * target_w
    tl.store(
        target[None, :] + ((j * target_c)[:, None] + place[None, :]),
        tl.trans(total.to(target_ptr.dtype.element_ty)),
        mask=has[:, None] & live[None, :],
    )


@triton.jit(
    do_not_specialize=[
        "M", "BATCH", "STEPS", "SPLITS", "PART", "PD", "PH", "PW", "SD", "SH", "SW", "O", "C", "R", "GROUPS",
        "dy_n", "dy_c", "dy_d", "dy_h", "dy_w", "x_n", "x_c", "x_d", "x_h", "x_w",
    ]
)  # fmt: skip
def _wgrad_kernel(
    dy_ptr,  # [N, groups * O, YD, YH, YW], any strides
    x_ptr,  # [N, groups * C, XD, XH, XW], any strides
    images_ptr,  # [row tiles, 2 + 3 IMAGES]: first row, count, then per image first filter, tap, sign (0: none)
    workspace_ptr,  # [batches, splits, groups, R, C]
    M,  # positions of one image of the tensor that is read in place
    BATCH,  # images
    STEPS,  # blocks of positions per split
    SPLITS,  # splits of the positions
    PART,  # images per part of the batch
    PD, PH, PW, SD, SH, SW, O, C, R, GROUPS,
    dy_n, dy_c, dy_d, dy_h, dy_w, x_n, x_c, x_d, x_h, x_w,
    DY_ALIGN: tl.constexpr, DY_UNIT: tl.constexpr, X_ALIGN: tl.constexpr, X_UNIT: tl.constexpr,
    FILTERS: tl.constexpr, CHANNELS: tl.constexpr,  # the units of O and C
    KERNEL: tl.constexpr, MUL: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, DIV: tl.constexpr,
    AXES: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # x is read at p and dy at at(p, k), not the other way round
    IMAGES: tl.constexpr,
    SIGNED: tl.constexpr,  # some sign is negative
    ALIGN: tl.constexpr,  # divides the count of every tile and every first filter, so that loads are wide
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """workspace[b, s, group, r, c] = sum_{n, p, (o, k, sign)} sign dy[n, p, o] x[n, at(p, k), c].

    n is in part b of the batch, p in split s of the positions, (o, k, sign) in the images of row r; at(p, k) as in
    `_implicit_gemm_kernel`. The innermost loop is over n, so that offsets are computed once for all of its values.
    """
    dy_n, dy_c, dy_d, dy_h, dy_w = strides(dy_n, dy_c, dy_d, dy_h, dy_w, DY_ALIGN, DY_UNIT)
    x_n, x_c, x_d, x_h, x_w = strides(x_n, x_c, x_d, x_h, x_w, X_ALIGN, X_UNIT)
    O *= FILTERS
    C *= CHANNELS
    tiles_c = tl.cdiv(C, BLOCK_N)
    tile = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    c_has = c < C
    group = (tl.program_id(1) % GROUPS).to(tl.int64)
    split = tl.program_id(1) // GROUPS
    images_ptr += tile * (2 + 3 * IMAGES)
    first = tl.load(images_ptr)
    count = tl.multiple_of(tl.load(images_ptr + 1), ALIGN)
    r = tl.arange(0, BLOCK_M)  # [M]
    r_has = r < count
    if WIDE:
        c = c.to(tl.int64)
        r = r.to(tl.int64)
    first_n = split // SPLITS * PART
    last_n = tl.minimum(first_n + PART, BATCH)
    low = split % SPLITS * STEPS
    high = tl.minimum(low + STEPS, tl.cdiv(M, BLOCK_K))
    dy_ptr += group * O * dy_c
    x_ptr += group * C * x_c
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(low, high):
        _, d, h, w, live = positions(step, M, PD, PH, PW, BLOCK_K, WIDE, AXES)  # [K]
        for image in range(IMAGES):
            o = tl.multiple_of(tl.load(images_ptr + 2 + 3 * image), ALIGN)
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
            dy_at = ((o + r) * dy_c)[:, None] + dy_at[None, :]  # [M, K]
            dy_there = r_has[:, None] & there[None, :]
            x_at = (c * x_c)[:, None] + x_at[None, :]  # [N, K]
            x_there = c_has[:, None] & there[None, :]
            if SIGNED:  # total + sign * products = sign * (sign * total + products)
                total *= tl.where(sign < 0, -1.0, 1.0)
            for n in range(first_n, tl.where(sign == 0, first_n, last_n)):
                n64 = tl.zeros((), tl.int64) + n
                dy = tl.load(dy_ptr + n64 * dy_n + dy_at, mask=dy_there, other=0.0)
                x = tl.load(x_ptr + n64 * x_n + x_at, mask=x_there, other=0.0)
                total = tl.dot(dy, tl.trans(x), total, input_precision=PRECISION)
            if SIGNED:
                total *= tl.where(sign < 0, -1.0, 1.0)
    place = ((split.to(tl.int64) * GROUPS + group) * R + first + r) * C  # [M]
    tl.store(workspace_ptr + place[:, None] + c[None, :], total, mask=r_has[:, None] & c_has[None, :])


def fprop(
    x: Tensor,
    rows: Sequence[int],
    y: Tensor,
    grid: Grid,
    tile: GemmTile,
    *,
    signed: bool,
    precision: str,
    activation: str | None = None,
    gradient: bool = False,
) -> Launch:
    """A launch that fills y (N, groups * O, D, H, W) from x (N, groups * C, D, H, W) and rows of shape (groups, R, C).

    Call it with x, the contiguous rows, their table, a bias or None, and y.
    """
    groups, stored, channels = rows
    batch, target_c, *sizes = y.shape
    source_c, target_c = x.shape[1] // groups, target_c // groups
    count = batch * math.prod(sizes)
    programs = triton.cdiv(count, tile.block_m) * triton.cdiv(target_c, tile.block_n)
    (of_x, x_fixed), (of_y, y_fixed) = strides_of(x, "SOURCE"), strides_of(y, "TARGET")
    unit = math.gcd(16, source_c, target_c)
    more = {"GRADIENT": gradient, "SIGNED": signed, "ACTIVATION": activation or "", "PRECISION": precision}
    return Launch(
        _implicit_gemm_kernel,
        (programs, groups) if y.numel() else (),
        (count, *sizes, *x.shape[2:], source_c // unit, target_c // unit, stored, channels // unit, *of_x, *of_y),
        {
            **x_fixed, **y_fixed, **grid.constants, **tile.constants, **more,
            "CHANNELS": unit, "WIDE": wide(x, y),
        },
        tile.options,
    )  # fmt: skip


def dgrad(
    dy: Tensor, rows: Sequence[int], dx: Tensor, grid: Grid, tile: GemmTile, *, signed: bool, precision: str
) -> Launch:
    """A launch that fills dx from dy and the rows; `grid` says where dx reads dy."""
    return fprop(dy, rows, dx, grid, tile, signed=signed, precision=precision, gradient=True)


def wgrad(
    dy: Tensor,
    x: Tensor,
    images: Sequence[Sequence[int]],
    rows: Sequence[int],
    grid: Grid,
    tile: GemmTile,
    *,
    transposed: bool,
    signed: bool,
    align: int,
    precision: str,
    most_bytes: int,
) -> tuple[Launch, tuple[int, ...]]:
    """A launch that fills partial gradients of the rows (groups, R, C), and the shape of these partial gradients.

    Each covers a part of the batch and of the positions; their sum along the first axis is the gradient. Call it with
    dy, x, the table `images` of the row tiles of `tile.block_m`, and float32 zeros of that shape. `align` divides the
    count of every tile and the first filter of every image.
    """
    groups, stored, channels = rows
    read, mapped = (x, dy) if transposed else (dy, x)
    batch, count = read.shape[0], math.prod(read.shape[2:])
    blocks = triton.cdiv(count, tile.block_k)
    programs = len(images) * triton.cdiv(channels, tile.block_n)
    splits = most_splits(programs * groups, batch * blocks, math.prod(rows), most_bytes)
    batches = max(1, min(splits, batch // 16))
    splits = max(1, min(splits // batches, blocks))
    (of_dy, dy_fixed), (of_x, x_fixed) = strides_of(dy, "DY"), strides_of(x, "X")
    filters, unit = math.gcd(16, dy.shape[1] // groups), math.gcd(16, channels)
    more = {"TRANSPOSED": transposed, "IMAGES": (len(images[0]) - 2) // 3, "SIGNED": signed, "ALIGN": align}
    launch = Launch(
        _wgrad_kernel,
        (programs, groups * splits * batches),
        (
            count, batch, triton.cdiv(blocks, splits), splits, triton.cdiv(batch, batches),
            *read.shape[2:], *mapped.shape[2:], dy.shape[1] // groups // filters, channels // unit, stored, groups,
            *of_dy, *of_x,
        ),
        {
            **dy_fixed, **x_fixed, **grid.constants, **tile.constants, **more,
            "PRECISION": precision, "FILTERS": filters, "CHANNELS": unit, "WIDE": wide(dy, x),
        },
        tile.options,
    )  # fmt: skip
    return launch, (batches * splits, *rows)

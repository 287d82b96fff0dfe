"""Products with a symmetric matrix S that is stored packed, and their gradient, as Triton kernels.

With K = ceil(n / 2), N = n - K and even = 1 - n mod 2, the packed rectangle P of K columns (`tritonsym.packing`) holds

    left:   S[r, c]         = P[r + even, c]          c < K, c <= r < n
    right:  S[K + r, K + c] = P[r, c + 1 - even]      r <= c < N

so that each triangle is P[r K + c + base] with base = even K on the left and 1 - even on the right.

For a skew-symmetric S (SKEW) the rectangle is that of n - 1: K = ceil((n - 1) / 2), even = n mod 2, and base is
(even - 1) K on the left, for r > c, and -even on the right, for r < c, where P holds S[K + c, K + r], the negative of
S[K + r, K + c].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonsym.kernels.epilogue import activate
from tritonsym.kernels.gram import accumulate
from tritonsym.kernels.prepared import Form, Launch, form
from tritonsym.kernels.tiles import GROUP, SEGMENT_STEPS, STRIP_ROWS, GemmTile


@triton.jit
def _product_kernel(
    x_ptr,  # [B, K + N], any strides
    packed_ptr,  # [2 N + 1, K], contiguous
    bias_ptr,  # [K + N]
    y_ptr,  # [B, K + N], contiguous
    B, K, N, x_b, x_k,
    EVEN: tl.constexpr, SKEW: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m, j] = act(bias[j] + sum_k x[m, k] S[k, j]): one program per tile of y, whose columns lie in one half."""
    left_tiles = tl.cdiv(K, BLOCK_N)
    columns = left_tiles + tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(B, BLOCK_M) - group, GROUP)
    at = tl.program_id(0) % (GROUP * columns)
    tile = at // height
    m = (group + at % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_left = tile < left_tiles
    first = tl.where(is_left, tile, tile - left_tiles) * BLOCK_N
    size = tl.where(is_left, K, N)  # columns of the half
    end = tl.where(is_left, K + N, N)  # rows of its triangle; the left one goes on below the half
    half = tl.where(is_left, 0, K)  # where its columns and the rows of its triangle begin
    base = packed_ptr + tl.where(is_left, (EVEN - SKEW) * K, 1 - EVEN - SKEW)
    j = first + tl.arange(0, BLOCK_N)
    live, inside = (m < B)[:, None], (j < size)[None, :]
    x = x_ptr + m[:, None] * x_b
    x_half = x + half.to(tl.int64) * x_k
    row = j.to(tl.int64)[None, :] * K  # offset in P where S[k, j] is read as S[j, k]
    after = first + BLOCK_N

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # S[j, k], k < K <= j: the lower rows of the left triangle
    below = packed_ptr + tl.cast(K + EVEN - SKEW, tl.int64) * K + row
    total = accumulate(total, x, below, 0, tl.where(is_left, 0, K), x_k, 1, live, inside, BLOCK_K, PRECISION)
    # S[k, j] and S[j, k] on either side of the diagonal: as stored, and transposed
    k_from, k_to = tl.where(is_left, after, 0), tl.where(is_left, end, first)
    total = accumulate(total, x_half, base + j[None, :], k_from, k_to, x_k, K, live, inside, BLOCK_K, PRECISION)
    if SKEW:  # on the right all this was read with the wrong sign; on the left the sign is undone below
        total = -total
    k_from, k_to = tl.where(is_left, 0, after), tl.where(is_left, first, end)
    total = accumulate(total, x_half, base + row, k_from, k_to, x_k, 1, live, inside, BLOCK_K, PRECISION)
    if SKEW:
        total = tl.where(is_left, -total, total)
    for k_first in tl.range(first, tl.minimum(after, end), BLOCK_K, num_stages=1):
        k = k_first + tl.arange(0, BLOCK_K)
        x_k_ptr = x_half + k.to(tl.int64)[None, :] * x_k
        a = tl.load(x_k_ptr, mask=live & (k < end)[None, :], other=0.0)
        stored = base + k.to(tl.int64)[:, None] * K + j[None, :]
        is_s, is_mirrored = (k < end)[:, None] & inside, (k < size)[:, None] & inside
        if SKEW:  # the first row and column begin outside the rectangle
            is_s &= tl.where(is_left, k[:, None], j[None, :]) > 0
            is_mirrored &= tl.where(is_left, j[None, :], k[:, None]) > 0
        s = tl.load(stored, mask=is_s, other=0.0)
        mirrored = tl.load(base + row + k[:, None], mask=is_mirrored, other=0.0)
        s = tl.where((k[:, None] >= j[None, :]) == is_left, s, mirrored)
        if SKEW:
            s = tl.where(k[:, None] > j[None, :], s, tl.where(k[:, None] == j[None, :], 0.0, -s))
        total = tl.dot(a, s, total, input_precision=PRECISION)

    place = half + j
    if HAS_BIAS:
        total += tl.load(bias_ptr + place, mask=j < size, other=0.0).to(tl.float32)[None, :]
    y = activate(total, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None] * (K + N) + place[None, :], y, mask=live & inside)


@triton.jit
def _strip(
    total,  # [R, B], the sums over c
    base,
    x,  # [1, B] pointers to x[m, half]
    x_rows,  # [R, B]
    partial,  # [1, B] pointers to the sums over r for c = 0
    r,
    rows,  # of the triangle
    columns,
    begin, end, K, B, x_k,
    live,  # [1, B]
    IS_LEFT: tl.constexpr, DIAGONAL: tl.constexpr, SKEW: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total[r, m] += sum_c S[r, c] x[m, c] and partial[c, m] = sum_r S[r, c] x[m, r], c != r, over stored entries.

    Every entry is loaded once for both.
    """
    for first in tl.range(begin, end, BLOCK_C, num_stages=1 if DIAGONAL else None):
        c = first + tl.arange(0, BLOCK_C)
        inside = (c < columns)[:, None]
        stored = base + r.to(tl.int64)[:, None] * K + c[None, :]
        is_inside = (r < rows)[:, None] & (c < columns)[None, :]
        if SKEW and DIAGONAL:  # the first row and column begin outside the rectangle
            is_inside &= (r > 0)[:, None] if IS_LEFT else (c > 0)[None, :]
        s = tl.load(stored, mask=is_inside, other=0.0)  # [R, C]
        x_c = tl.load(x + c.to(tl.int64)[:, None] * x_k, mask=inside & live, other=0.0)  # [C, B]
        mirrored = s
        if DIAGONAL:
            is_stored = r[:, None] > c[None, :] if IS_LEFT else r[:, None] < c[None, :]
            mirrored = tl.where(is_stored, s, 0.0)
            s = mirrored if SKEW else tl.where(is_stored | (r[:, None] == c[None, :]), s, 0.0)
        total = tl.dot(s, x_c, total, input_precision=PRECISION)
        sums = tl.dot(tl.trans(mirrored), x_rows, input_precision=PRECISION)  # [C, B]
        if SKEW and not IS_LEFT:
            sums = -sums
        tl.store(partial + c.to(tl.int64)[:, None] * B, sums, mask=inside & live)
    return total


@triton.jit
def _strips_kernel(
    x_ptr,  # [B, K + N], any strides
    packed_ptr,  # [2 N + 1, K], contiguous
    partial_ptr,  # [strips + 2 segments, K + N, B] float32
    B, K, N, x_b, x_k, strips, segments,
    EVEN: tl.constexpr, SKEW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
    SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of y[m, j] over strips of rows i, and of y[m, i] over segments of columns j, of the stored S[i, j].

    partial[strip, j, m] = sum_i S[i, j] x[m, i], i != j, and partial[strips + segment, i, m] = sum_j S[i, j] x[m, j] on
    the left, partial[strips + segments + segment, i, m] on the right. A program takes one strip by one segment of the
    left triangle, then of the right one.
    """
    strip, segment = tl.program_id(0), tl.program_id(1)
    r_first, c_first = strip * BLOCK_R, segment * SEGMENT
    r = r_first + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_B)
    live = (m < B)[None, :]
    x = x_ptr + m.to(tl.int64)[None, :] * x_b
    slot = tl.cast(K + N, tl.int64) * B
    sums = partial_ptr + m[None, :]

    c_end = tl.minimum(tl.minimum(c_first + SEGMENT, r_first + BLOCK_R), K)
    if c_first < c_end:
        rows = (r < K + N)[:, None] & live
        x_rows = tl.load(x + r.to(tl.int64)[:, None] * x_k, mask=rows, other=0.0)
        total = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
        base = packed_ptr + (EVEN - SKEW) * K
        of_strip = sums + strip * slot
        cut = tl.minimum(r_first, c_end)
        total = _strip(total, base, x, x_rows, of_strip, r, K + N, K, c_first, cut, K, B, x_k, live,
                       True, False, SKEW, BLOCK_C, PRECISION)  # fmt: skip
        cut = tl.maximum(r_first, c_first)
        total = _strip(total, base, x, x_rows, of_strip, r, K + N, K, cut, c_end, K, B, x_k, live,
                       True, True, SKEW, BLOCK_C, PRECISION)  # fmt: skip
        if SKEW:
            total = -total
        tl.store(sums + (strips + segment) * slot + r.to(tl.int64)[:, None] * B, total, mask=rows)

    c_end = tl.minimum(c_first + SEGMENT, N)
    c_first = tl.maximum(c_first, r_first)
    if c_first < c_end:
        x += tl.cast(K, tl.int64) * x_k
        sums += tl.cast(K, tl.int64) * B
        rows = (r < N)[:, None] & live
        x_rows = tl.load(x + r.to(tl.int64)[:, None] * x_k, mask=rows, other=0.0)
        total = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
        base = packed_ptr + (1 - EVEN - SKEW)
        of_strip = sums + strip * slot
        cut = tl.minimum(r_first + BLOCK_R, c_end)
        total = _strip(total, base, x, x_rows, of_strip, r, N, N, c_first, cut, K, B, x_k, live,
                       False, True, SKEW, BLOCK_C, PRECISION)  # fmt: skip
        cut = tl.maximum(r_first + BLOCK_R, c_first)
        total = _strip(total, base, x, x_rows, of_strip, r, N, N, cut, c_end, K, B, x_k, live,
                       False, False, SKEW, BLOCK_C, PRECISION)  # fmt: skip
        tl.store(sums + (strips + segments + segment) * slot + r.to(tl.int64)[:, None] * B, total, mask=rows)


@triton.jit
def _sum_kernel(
    partial_ptr,  # as `_strips_kernel` leaves it: not all slots are written
    bias_ptr,  # [K + N]
    y_ptr,  # [B, K + N], contiguous
    B, K, N, strips, segments,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """y[m, q] = act(bias[q] + sum_s partial[s, q, m]), in the order of s, over the slots that hold entries of row q."""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m = tl.arange(0, BLOCK_B)
    mask = (q < K + N)[:, None] & (m < B)[None, :]
    sums = partial_ptr + q.to(tl.int64)[:, None] * B + m[None, :]
    slot = tl.cast(K + N, tl.int64) * B
    total = tl.zeros((BLOCK_Q, BLOCK_B), tl.float32)
    for strip in range(strips):
        written = tl.where(q < K, (strip + 1) * BLOCK_R > q, strip * BLOCK_R <= q - K)
        total += tl.load(sums + strip * slot, mask=mask & written[:, None], other=0.0)
    for segment in range(segments):
        written = (segment * SEGMENT <= q) & (q * 0 + segment * SEGMENT < K)
        sums_left = sums + (strips + segment) * slot
        total += tl.load(sums_left, mask=mask & written[:, None], other=0.0)
    for segment in range(segments):
        written = (q >= K) & (q * 0 + segment * SEGMENT < N) & ((segment + 1) * SEGMENT > q - K)
        sums_right = sums + (strips + segments + segment) * slot
        total += tl.load(sums_right, mask=mask & written[:, None], other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + q, mask=q < K + N, other=0.0).to(tl.float32)[:, None]
    y = activate(total, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m.to(tl.int64)[None, :] * (K + N) + q[:, None], y, mask=mask)


@triton.jit
def _gradient_kernel(
    x_ptr,  # [B, K + N], any strides
    dy_ptr,  # [B, K + N], any strides
    d_ptr,  # [2 N + 1, K], contiguous
    B, K, N, x_b, x_k, dy_b, dy_k,
    EVEN: tl.constexpr, SKEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d[i, j] = sum_m x[m, i] dy[m, j] + dy[m, i] x[m, j] for stored S[i, j], i != j; d[i, i] = sum_m x[m, i] dy[m, i].

    SKEW: a minus between the products, and no d[i, i]. One program per tile of the rectangle, which on or below its
    diagonal is of the left triangle, else of the right one; and one more per diagonal tile of the right triangle.
    """
    tiles = tl.cdiv(tl.maximum(K, N), BLOCK_M)  # per row
    pairs = tl.cdiv(K + N, BLOCK_M) * tiles
    p = tl.program_id(0)
    tile_r = tl.where(p < pairs, p // tiles, p - pairs)
    tile_c = tl.where(p < pairs, p % tiles, p - pairs)
    is_left = (p < pairs) & (tile_c <= tile_r)
    height, width = tl.where(is_left, K + N, N), tl.where(is_left, K, N)
    half = tl.where(is_left, 0, K)
    r = tile_r * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile_c * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, columns = (r < height)[:, None], (c < width)[None, :]
    i, j = (half + r).to(tl.int64)[:, None], (half + c).to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    x_i, dy_i, x_j, dy_j = x_ptr + i * x_k, dy_ptr + i * dy_k, x_ptr + j * x_k, dy_ptr + j * dy_k
    total = accumulate(total, x_i, dy_j, 0, B, x_b, dy_b, rows, columns, BLOCK_K, PRECISION)
    if SKEW:
        total = -total
    total = accumulate(total, dy_i, x_j, 0, B, dy_b, x_b, rows, columns, BLOCK_K, PRECISION)
    if SKEW:
        total *= tl.where(is_left, -1.0, 1.0)
    base = d_ptr + tl.where(is_left, (EVEN - SKEW) * K, 1 - EVEN - SKEW)
    place = base + r.to(tl.int64)[:, None] * K + c[None, :]
    if tile_r == tile_c:
        d = tl.where(r[:, None] == c[None, :], total * 0.5, total).to(d_ptr.dtype.element_ty)
        sign = tl.where(is_left, 1, -1)
        is_stored = (sign * r)[:, None] >= (sign * c)[None, :] + SKEW
        tl.store(place, d, mask=rows & columns & is_stored)
    else:
        tl.store(place, total.to(d_ptr.dtype.element_ty), mask=rows & columns)


@lru_cache(maxsize=4096)
def _by_tiles(x: Form, activation: str | None, with_bias: bool, tile: GemmTile, precision: str, skew: bool) -> Launch:
    """The launch for x, packed, bias (x if there is none) and y."""
    (batch, n), strides, *_ = x
    k, n_right = halves(n, skew)
    columns = triton.cdiv(k, tile.block_n) + triton.cdiv(n_right, tile.block_n)
    more = {"HAS_BIAS": with_bias, "ACTIVATION": activation or "", "GROUP": GROUP, "PRECISION": precision}
    return Launch(
        _product_kernel,
        (triton.cdiv(batch, tile.block_m) * columns,) if batch * n else (),
        (batch, k, n_right, *strides),
        {**parity(n, skew), **more, **tile.constants},
        tile.options,
    )


@lru_cache(maxsize=4096)
def _by_strips(
    x: Form, activation: str | None, with_bias: bool, tile: GemmTile, precision: str, skew: bool
) -> tuple[Launch, Launch, tuple[int, ...]]:
    """Launches for (x, packed, partial sums) and (partial sums, bias or x, y), and the shape of the partial sums."""
    (batch, n), strides, *_ = x
    k, n_right = halves(n, skew)
    segment = SEGMENT_STEPS * tile.block_k
    count = triton.cdiv(n, tile.block_m), triton.cdiv(max(k, n_right), segment)
    shape = {"BLOCK_R": tile.block_m, "BLOCK_B": tile.block_n, "SEGMENT": segment}
    block_q = 1024 // tile.block_n
    of_y = {"HAS_BIAS": with_bias, "ACTIVATION": activation or "", "BLOCK_Q": block_q}
    of_strips = {**parity(n, skew), "BLOCK_C": tile.block_k, "PRECISION": precision}
    grids: Any = (count, (triton.cdiv(n, block_q),)) if batch * n else ((), ())
    sizes = batch, k, n_right
    return (
        Launch(_strips_kernel, grids[0], (*sizes, *strides, *count), shape | of_strips, tile.options),
        Launch(_sum_kernel, grids[1], (*sizes, *count), shape | of_y, {"num_warps": 4}),
        (count[0] + 2 * count[1], n, batch),
    )


@lru_cache(maxsize=4096)
def _of_gradient(x: Form, dy: Form, tile: GemmTile, precision: str, skew: bool) -> tuple[Launch, tuple[int, int]]:
    """The launch for x, dy and the gradient, and the shape of the gradient."""
    (batch, n), strides, *_ = x
    k, n_right = halves(n, skew)
    rows, *tiles = (triton.cdiv(size, tile.block_m) for size in (n, k, n_right))
    launch = Launch(
        _gradient_kernel,
        (rows * max(tiles) + tiles[1],) if n > skew else (),
        (batch, k, n_right, *strides, *dy[1]),
        {**parity(n, skew), "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "PRECISION": precision},
        tile.options,
    )
    return launch, (2 * ((n - skew) // 2) + 1, k)


def halves(n: int, skew: bool) -> tuple[int, int]:
    """K and N."""
    k = (n - skew + 1) // 2
    return k, n - k


def parity(n: int, skew: bool) -> dict[str, int]:
    return {"EVEN": 1 - (n - skew) % 2, "SKEW": int(skew)}


def product_by_tiles(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    activation: str | None,
    tile: GemmTile,
    precision: str,
    skew: bool = False,
) -> Tensor:
    """act(x S + bias) for x (B, n) of any strides; S is read once per `tile.block_m` rows of x."""
    y = x.new_empty(*x.shape)
    launch = _by_tiles(form(x), activation, bias is not None, tile, precision, skew)
    launch(x, packed, x if bias is None else bias, y)
    return y


def product_by_strips(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    activation: str | None,
    tile: GemmTile,
    precision: str,
    skew: bool = False,
) -> Tensor:
    """act(x S + bias) for x (B, n) of any strides, B <= tile.block_n; every entry of S is read once."""
    strips, sums, shape = _by_strips(form(x), activation, bias is not None, tile, precision, skew)
    y, partial = x.new_empty(*x.shape), x.new_empty(shape, dtype=torch.float32)
    strips(x, packed, partial)
    sums(partial, x if bias is None else bias, y)
    return y


def product(x: Tensor, *others: Any) -> Tensor:
    """By strips up to `STRIP_ROWS` rows of x, else by tiles, with a tile such as `pick_product` gives."""
    return (product_by_strips if x.shape[0] <= STRIP_ROWS else product_by_tiles)(x, *others)


def gradient(x: Tensor, dy: Tensor, tile: GemmTile, precision: str, skew: bool = False) -> Tensor:
    """The gradient of the packed S for y = x S, from x and dy (B, n) of any strides."""
    launch, shape = _of_gradient(form(x), form(dy), tile, precision, skew)
    d = x.new_empty(shape)
    launch(x, dy, d)
    return d

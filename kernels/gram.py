"""beta A + alpha X X^T as one Triton kernel: half the multiply-adds of a product, symmetric to the bit."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from tritonsym.kernels.prepared import Form, Launch, form
from tritonsym.kernels.tiles import GROUP, GemmTile


@triton.jit
def accumulate(
    total,  # [I, J] float32
    a,  # [I, 1] pointers to k = 0
    b,  # [1, J] pointers to k = 0
    begin, end, a_k, b_k,
    rows,  # [I, 1] which rows of a may be read
    columns,  # [1, J] which columns of b
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total[i, j] + sum of a[i, k] b[k, j] over begin <= k < end."""
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_row, k_column = k[None, :], k[:, None]
        left = tl.load(a + k_row.to(tl.int64) * a_k, mask=rows & (k_row < end), other=0.0)
        right = tl.load(b + k_column.to(tl.int64) * b_k, mask=columns & (k_column < end), other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _row_of(p):
    """The row r of entry p of a lower triangle read row by row: r (r + 1) / 2 <= p < (r + 1) (r + 2) / 2."""
    r = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    r = tl.where(r * (r + 1) // 2 > p, r - 1, r)
    return tl.where((r + 1) * (r + 2) // 2 <= p, r + 1, r)


@triton.jit
def _gram_kernel(
    x_ptr,  # [batch, M, K], any strides
    a_ptr,  # [batch, M, M], any strides; read where i >= j, and in all of the tiles on the diagonal
    c_ptr,  # [batch, M, M], contiguous
    M, K, x_batch, x_m, x_k, a_batch, a_m, a_n, alpha, beta,
    HAS_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # tile rows that are computed together, to share the cache
    PRECISION: tl.constexpr,
):  # fmt: skip
    """c[i, j] = c[j, i] = beta a[i, j] + alpha sum_k x[i, k] x[j, k] for i >= j, one program per such tile."""
    tile_rows = tl.cdiv(M, BLOCK_M)
    tiles = tile_rows * (tile_rows + 1) // 2
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles
    # tile rows top to top + height: first a rectangle of `top` columns, column by column, then a triangle
    top = _row_of(p) // GROUP * GROUP
    height = tl.minimum(tile_rows - top, GROUP)
    p -= top * (top + 1) // 2
    u = tl.maximum(p - height * top, 0)
    r = _row_of(u)
    in_rectangle = p < height * top
    tile_i = top + tl.where(in_rectangle, p % height, r)
    tile_j = tl.where(in_rectangle, p // height, top + u - r * (r + 1) // 2)

    i = tile_i * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_j * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, columns = (i < M)[:, None], (j < M)[None, :]
    x_ptr += batch * x_batch
    x_i = x_ptr + i.to(tl.int64)[:, None] * x_m
    x_j = x_ptr + j.to(tl.int64)[None, :] * x_m
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    total = accumulate(total, x_i, x_j, 0, K, x_k, x_k, rows, columns, BLOCK_K, PRECISION) * alpha
    if HAS_A:
        a = a_ptr + batch * a_batch + i.to(tl.int64)[:, None] * a_m + j.to(tl.int64)[None, :] * a_n
        total += beta * tl.load(a, mask=rows & columns, other=0.0).to(tl.float32)
    c = total.to(c_ptr.dtype.element_ty)
    c_ptr += batch * M * M
    if tile_i == tile_j:
        c = tl.where(i[:, None] >= j[None, :], c, tl.trans(c))
    else:
        mirrored = c_ptr + j.to(tl.int64)[:, None] * M + i[None, :]
        tl.store(mirrored, tl.trans(c), mask=(j < M)[:, None] & (i < M)[None, :])
    tl.store(c_ptr + i.to(tl.int64)[:, None] * M + j[None, :], c, mask=rows & columns)


@lru_cache(maxsize=4096)
def _of_gram(x: Form, a: Form | None, alpha: float, beta: float, tile: GemmTile, precision: str) -> Launch:
    """The launch for x, a (x if there is none) and c."""
    (batch, m, k), strides, *_ = x
    tile_rows = triton.cdiv(m, tile.block_m)
    return Launch(
        _gram_kernel,
        (tile_rows * (tile_rows + 1) // 2 * batch,) if batch * m else (),
        (m, k, *strides, *((0, 0, 0) if a is None else a[1]), alpha, beta),
        {
            "HAS_A": a is not None, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "GROUP": GROUP,
            "PRECISION": precision,
        },
        tile.options,
    )  # fmt: skip


def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: GemmTile, precision: str) -> Tensor:
    """beta a + alpha x x^T for x (batch, M, K) and a (batch, M, M) or None, of any strides; only a[i >= j] counts."""
    batch, m, _ = x.shape
    c = x.new_empty(batch, m, m)
    launch = _of_gram(form(x), None if a is None else form(a), alpha, beta, tile, precision)
    launch(x, x if a is None else a, c)
    return c

"""Products with symmetric matrices in torch ops, by blocks: half of the bytes, or half of the multiply-adds.

A packed matrix (`tritonsym.packing`) is read as views of its rectangle. With A = S[r, c] a block below the diagonal,

    y[:, c] += x[:, r] A          y[:, r] += x[:, c] A^T          dA = [x[:, r]; dy[:, r]]^T [dy[:, c]; x[:, c]]

so that A comes from memory once and is used twice, and no n x n matrix is built. Products with a symmetric result are
computed by rows of blocks up to the diagonal, and mirrored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonsym.packing import mirror, order_of, packed_shape, widens_float16

#: Rows and columns of the blocks on the diagonal, of which copies are made.
EDGE = 128
#: Rows of the blocks in the square below the two triangles.
STRIP = 256

Diagonal = list[tuple[Tensor, int]]


def _diagonal(square: Tensor, edge: int, start: int = 0) -> Diagonal:
    """The blocks (count, edge, edge) on the diagonal of a square view, and the smaller one that is left, with the place
    of the first."""
    order, (s, t) = square.shape[0], square.stride()
    whole = order // edge * edge
    blocks = square.as_strided((whole // edge, edge, edge), (edge * (s + t), s, t), square.storage_offset())
    found = [(blocks, start), (square[None, whole:, whole:], start + whole)]
    return [(blocks, place) for blocks, place in found if blocks.numel()]


def _parts(packed: Tensor) -> tuple[list[tuple[Tensor, int, int]], Diagonal]:
    """Views of a packed matrix: blocks S[r:, c:] below the diagonal, with r and c, and those on it, of which the lower
    triangles count."""
    n = order_of(packed)
    columns, even = (n + 1) // 2, 1 - n % 2
    left, right = packed[even : even + columns], packed[: n // 2, 1 - even :].mT
    below = [(left[r : r + EDGE, :r], r, 0) for r in range(EDGE, columns, EDGE)]
    below += [(right[c + EDGE :, c : c + EDGE], columns + c + EDGE, columns + c) for c in range(0, n // 2 - EDGE, EDGE)]
    below += [(s, columns + i * STRIP, 0) for i, s in enumerate(packed[even + columns :].split(STRIP)) if s.numel()]
    return below, _diagonal(left, EDGE) + _diagonal(right, EDGE, columns)


def _batched(x: Tensor, start: int, blocks: Tensor) -> Tensor:
    """The columns of x (B, n) that belong to blocks (count, edge, edge), as (count, B, edge)."""
    count, edge, _ = blocks.shape
    return x[:, start : start + count * edge].unflatten(1, (count, edge)).transpose(0, 1)


@widens_float16
def product(x: Tensor, packed: Tensor, bias: Tensor | None = None, skew: bool = False) -> Tensor:
    """x S + bias for x (B, n); sums over blocks are kept in float32 at least.

    A skew-symmetric S has its lower triangle one row further down than the rectangle, and the upper one negated.
    """
    below, diagonal = _parts(packed)
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if bias is not None:
        y += bias
    end, sign = x.shape[1] - skew, -1 if skew else 1
    (x_r, x_c), (y_r, y_c) = ((t[:, skew:], t[:, :end]) for t in (x, y))
    for blocks, at in diagonal:
        lower = blocks.clone().tril_()
        _batched(y_c, at, blocks).add_(torch.bmm(_batched(x_r, at, blocks), lower))
        if not skew:
            lower.diagonal(dim1=1, dim2=2).zero_()
        _batched(y_r, at, blocks).add_(torch.bmm(_batched(x_c, at, blocks), lower.mT), alpha=sign)
    for block, r, c in below:
        rows, columns = slice(r, r + block.shape[0]), slice(c, c + block.shape[1])
        for left, right, out, alpha in (
            (x_r[:, rows], block, y_c[:, columns], 1),
            (x_c[:, columns], block.mT, y_r[:, rows], sign),
        ):
            if y.dtype == x.dtype:
                torch.addmm(out, left, right, alpha=alpha, out=out)
            else:
                out.add_(left @ right, alpha=alpha)
    return y.to(x.dtype)


@widens_float16
def quadratic_form(x: Tensor, packed: Tensor) -> Tensor:
    """x S x^T for every row of x (B, n): half of the multiply-adds of a product; in float32 at least."""
    below, diagonal = _parts(packed)
    q = torch.zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for blocks, at in diagonal:
        x_blocks, lower = _batched(x, at, blocks), blocks.clone().tril_(-1)
        y = torch.bmm(x_blocks, lower.mul_(2)) + x_blocks * blocks.diagonal(dim1=1, dim2=2)[:, None]
        q += (x_blocks * y).sum((0, 2), dtype=q.dtype)
    for block, r, c in below:
        y = x[:, r : r + block.shape[0]] @ block
        q += 2 * (x[:, c : c + block.shape[1]] * y).sum(1, dtype=q.dtype)
    return q.to(x.dtype)


def product_work(n: int) -> int:
    """Multiply-adds of `product` by row of x: both triangles of a block on the diagonal are multiplied as a square."""
    squares = sum(order // EDGE * EDGE**2 + (order % EDGE) ** 2 for order in ((n + 1) // 2, n // 2))
    return n * n + squares


@widens_float16
def gradient(x: Tensor, dy: Tensor, skew: bool = False) -> Tensor:
    """The gradient of the packed S for y = x S, from x and dy (B, n)."""
    end = x.shape[1] - skew
    d = x.new_empty(packed_shape(end))
    left = torch.cat([x[:, skew:], dy[:, skew:]])
    right = torch.cat([dy[:, :end], -x[:, :end] if skew else x])
    below, diagonal = _parts(d)
    for block, r, c in below:
        torch.mm(left[:, r : r + block.shape[0]].mT, right[:, c : c + block.shape[1]], out=block)
    for blocks, start in diagonal:
        full = torch.bmm(_batched(left, start, blocks).mT, _batched(right, start, blocks))
        if not skew:
            full.diagonal(dim1=1, dim2=2).mul_(0.5)
        is_lower = torch.ones(full.shape[1:], dtype=torch.bool, device=x.device).tril_()
        blocks.copy_(torch.where(is_lower, full, blocks))
    return d


def gram_height(m: int) -> int:
    """Of the rows of blocks of an m x m result."""
    return max(128, -(-m // 512) * 64)


def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float) -> Tensor:
    """beta a + alpha x x^T for x (batch, m, k) and a (batch, m, m) or None, of which the lower triangle counts."""
    m, height = x.shape[1], gram_height(x.shape[1])
    c = x.new_empty(x.shape[0], m, m)
    for i, (rows, result) in enumerate(zip(x, c, strict=True)):
        for top in range(0, m, height):
            end = top + height
            out = result[top:end, :end]
            if a is None:
                torch.mm(rows[top:end], rows[:end].mT, out=out)
                if alpha != 1:
                    out *= alpha
            else:
                torch.addmm(a[i, top:end, :end], rows[top:end], rows[:end].mT, alpha=alpha, beta=beta, out=out)
            result[:top, top:end] = result[top:end, :top].mT
        for blocks, _ in _diagonal(result, height):
            blocks.copy_(mirror(blocks))
    return c

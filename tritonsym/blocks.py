"""Blocked products with symmetric matrices in torch ops: half the memory traffic, or half the multiply-adds.

A packed matrix (`tritonsym.packing`) is read as views of its rectangle. For a block A = S[r, c] below the diagonal,

    y[:, c] += x[:, r] A          y[:, r] += x[:, c] A^T          dA = [x[:, r]; dy[:, r]]^T [dy[:, c]; x[:, c]]

so A is read from memory once and used twice, and no n x n matrix is built. The two triangles of the rectangle are
halved recursively; squares of one size lie at equal distances and form one batch. For products with a symmetric result
the lower half is computed in the same way, and mirrored.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tritonsym.packing import mirror, order_of, packed_shape, widens_float16
from tritonsym.shift import apart, keep_pages

#: Most rows of a block on the diagonal; these blocks are copied.
EDGE = 128
#: Bytes of a block that stays in the last cache between its two uses, and the most columns of a block. Measured:
#: perf/results/2026-11-26-cpu-matrices-cache.json.
CACHE, WIDTH = 4 << 20, 1024

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Piece(NamedTuple):
    """A batch of blocks of the rectangle: `size` is (count, height, width), and the first block begins at `place`.

    Block k holds S[i, j], or S[j, i] if `flipped`, from i = row + k * down and j = column + k * right on. In blocks on
    the diagonal only the lower triangle counts, or the upper one if `flipped`.
    """

    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    place: int
    row: int
    down: int
    column: int
    right: int
    flipped: bool


def _halvings(order: int) -> tuple[int, int]:
    """How often a triangle is halved, and the rows of its diagonal blocks; fewer rows than blocks are left over."""
    times = (order // (EDGE + 1)).bit_length()
    return times, order >> times


@lru_cache(maxsize=256)
def _pieces(n: int, itemsize: int, threads: int) -> list[Piece]:
    """The pieces of a packed n x n matrix; together they hold each of its values once."""
    pitch, half, even = (n + 1) // 2, n // 2, 1 - n % 2
    found: list[Piece] = []

    def batch(count: int, height: int, width: int, row: int, down: int, column: int, right: int, flipped: bool) -> None:
        place = (row - pitch) * pitch + column - pitch + 1 - even if flipped else (row + even) * pitch + column
        if count * height * width:
            size, stride = (count, height, width), (down * pitch + right, pitch, 1)
            found.append(Piece(size, stride, place, row, down, column, right, flipped))

    def tiles(height: int, width: int, row: int, column: int, flipped: bool) -> None:
        """Split a block into batches of tiles, one tile per thread; a small block stays whole."""
        for left in range(0, width if height else 0, WIDTH):
            w = min(WIDTH, width - left)
            most = max(1, CACHE // (itemsize * w))
            count = threads * -(-height // (threads * most)) if 8 * height > most else 1
            count = min(count, height)
            h = height // count
            for i in range(0, count, threads):
                batch(min(count - i, threads), h, w, row + i * h, h, column + left, 0, flipped)
            batch(1, height - count * h, w, row + count * h, 0, column + left, 0, flipped)

    tiles(half, pitch, pitch, 0, False)
    for order, start, flipped in ((pitch, 0, False), (half, pitch, True)):
        times, edge = _halvings(order)
        whole = edge << times
        for size in (edge << i for i in reversed(range(times))):
            count, row, column = whole // size // 2, start + size * (not flipped), start + size * flipped
            most = CACHE // (itemsize * size * size) * threads
            if min(most, count) < threads:
                for k in range(count):
                    tiles(size, size, row + 2 * k * size, column + 2 * k * size, flipped)
                continue
            for k in range(0, count, most):
                at, some = 2 * k * size, min(most, count - k)
                batch(some, size, size, row + at, 2 * size, column + at, 2 * size, flipped)
        batch(1 << times, edge, edge, start, edge, start, edge, flipped)
        rest, end = order - whole, start + whole
        tiles(*((whole, rest, start, end) if flipped else (rest, whole, end, start)), flipped)
        batch(1, rest, rest, end, 0, end, 0, flipped)
    return found


def _in_memory(x: Tensor) -> Tensor:
    """x, contiguous, with any lazy conjugation and negation carried out."""
    return x.resolve_conj().resolve_neg().contiguous()


def _views(packed: Tensor) -> list[tuple[Tensor, Piece]]:
    """The blocks of a contiguous packed matrix, as views, with their pieces."""
    keep_pages()
    pieces = _pieces(order_of(packed), packed.element_size(), torch.get_num_threads())
    start = packed.storage_offset()
    return [(packed.as_strided(piece.size, piece.stride, start + piece.place), piece) for piece in pieces]


def _blocks(t: Tensor, size: tuple[int, int, int], row: int, down: int, column: int, right: int) -> Tensor:
    """A batch of this size (count, height, width) of blocks of a matrix t: block k begins at row + k * down and
    column + k * right."""
    rows, columns = t.stride()
    strides = (down * rows + right * columns, rows, columns)
    return t.as_strided(size, strides, t.storage_offset() + row * rows + column * columns)


def _columns(x: Tensor, start: int, step: int, count: int, width: int) -> Tensor:
    """The `width` columns of x (B, n) for every block, from start + k * step on: (count, B, width)."""
    return _blocks(x, (count, x.shape[0], width), 0, 0, start, step)


def _add(y: Tensor, start: int, step: int, values: Tensor, sign: int) -> None:
    """Add sign * values (count, B, width) to the `_columns` of y."""
    if step == 0 and values.shape[0] > 1:
        values = values.sum(0, keepdim=True, dtype=y.dtype)
    _columns(y, start, step, values.shape[0], values.shape[2]).add_(values, alpha=sign)


@lru_cache(maxsize=32)
def _mask(order: int, dtype: torch.dtype, device: torch.device, upper: bool) -> Tensor:
    """All bits set in one triangle, none outside it."""
    bits = torch.full((order, order), -1, dtype=dtype, device=device)
    return bits.triu_() if upper else bits.tril_()


def _triangles(blocks: Tensor, upper: bool) -> Tensor:
    """A copy with zeros outside one triangle, where the other triangle of the rectangle may hold infinities."""
    if (dtype := _INTEGERS.get(blocks.element_size())) is None:
        return blocks.triu() if upper else blocks.tril()
    return (blocks.view(dtype) & _mask(blocks.shape[1], dtype, blocks.device, upper)).view(blocks.dtype)


@widens_float16
def product(x: Tensor, packed: Tensor, bias: Tensor | None = None, skew: bool = False) -> Tensor:
    """x S + bias for x (B, n); blocks are summed in float32 or wider.

    The lower triangle of a skew-symmetric S lies one row below that of the rectangle; the upper one is negated.
    """
    x = _in_memory(x)
    y = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        y += bias
    for blocks, (size, _, _, row, down, column, right, flipped) in _views(_in_memory(packed)):
        count, height, width = size
        straight, turned = (1, 1) if not skew else (-1, 1) if flipped else (1, -1)
        is_diagonal = row == column
        if is_diagonal:
            blocks = _triangles(blocks, flipped)
        if skew:
            row, column = row + (not flipped), column + flipped
        _add(y, column, right, torch.bmm(_columns(x, row, down, count, height), blocks), straight)
        if is_diagonal and not skew:
            blocks.diagonal(dim1=1, dim2=2).zero_()
        _add(y, row, down, torch.bmm(_columns(x, column, right, count, width), blocks.mT), turned)
    return y.to(x.dtype)


@widens_float16
def quadratic_form(x: Tensor, packed: Tensor) -> Tensor:
    """x S x^T for every row of x (B, n): half the multiply-adds of a product, summed in float32 or wider."""
    x = _in_memory(x)
    y = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for blocks, (size, _, _, row, down, column, right, flipped) in _views(_in_memory(packed)):
        if row == column:
            blocks = _triangles(blocks, flipped)
            blocks.diagonal(dim1=1, dim2=2).mul_(0.5)
        _add(y, column, right, torch.bmm(_columns(x, row, down, *size[:2]), blocks), 2)
    return (x * y).sum(1).to(x.dtype)


def product_work(n: int) -> int:
    """Multiply-adds of `product` per row of x; blocks on the diagonal are multiplied twice, as whole squares."""
    squares = 0
    for order in ((n + 1) // 2, n // 2):
        times, edge = _halvings(order)
        squares += (edge**2 << times) + (order - (edge << times)) ** 2
    return n * n + squares


@widens_float16
def gradient(x: Tensor, dy: Tensor, skew: bool = False) -> Tensor:
    """The gradient of the packed S for y = x S, from x and dy (B, n)."""
    end = x.shape[1] - skew
    d = x.new_empty(packed_shape(end))
    below = torch.cat([x[:, skew:], dy[:, skew:]])
    above = torch.cat([dy[:, :end], -x[:, :end] if skew else x])
    views = _views(d)
    for blocks, piece in views:
        if piece.row == piece.column:  # where the two triangles meet
            blocks.zero_()
    for blocks, ((count, height, width), _, _, row, down, column, right, flipped) in views:
        left, other = (above, below) if flipped else (below, above)
        factors = _columns(left, row, down, count, height).mT, _columns(other, column, right, count, width)
        if row != column:
            torch.bmm(*factors, out=blocks)
            continue
        squares = torch.bmm(*factors)
        if not skew:
            squares.diagonal(dim1=1, dim2=2).mul_(0.5)
        blocks.add_(_triangles(squares, flipped))
    return d


def gram_work(m: int) -> int:
    """Multiply-adds of `gram` for one column of x (m, k)."""
    times, edge = _halvings(m)
    whole = edge << times
    return whole * (whole + edge) // 2 + (m - whole) * m


def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float) -> Tensor:
    """beta a + alpha x x^T for x (batch, m, k) and a (batch, m, m) or None; only the lower triangle of a counts."""
    keep_pages()
    _, m, k = x.shape
    times, edge = _halvings(m)
    whole = edge << times
    c = x.new_empty(x.shape[0], m, m)

    def multiply(i: int, row: int, column: int, step: int, size: tuple[int, int, int]) -> None:
        """A batch of blocks of c[i], each `step` rows and columns from the one before."""
        count, height, width = size
        left = _blocks(x[i], (count, height, k), row, step, 0, 0)
        right = _blocks(x[i], (count, width, k), column, step, 0, 0).mT
        out = _blocks(c[i], size, row, step, column, step)
        if a is not None:
            torch.baddbmm(_blocks(a[i], size, row, step, column, step), left, right, alpha=alpha, beta=beta, out=out)
            return
        torch.bmm(left, right, out=out)
        if alpha != 1:
            out *= alpha

    for i, result in enumerate(c):
        for size in (edge << j for j in range(times)):
            multiply(i, size, 0, 2 * size, (whole // size // 2, size, size))
        multiply(i, 0, 0, edge, (1 << times, edge, edge))
        multiply(i, whole, 0, 0, (1, m - whole, m))
        for top in range(0, m, EDGE):
            bottom = top + EDGE
            strip = apart(result[top:bottom, :bottom])
            result[:top, top:bottom] = strip[:, :top].mT
            result[top:bottom, top:bottom] = mirror(strip[:, top:])
    return c

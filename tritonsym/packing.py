"""Rectangular full packed storage of an exactly symmetric n x n matrix: n(n+1)/2 values in one dense rectangle.

LAPACK's RFP format (Gustavson, Wasniewski, Dongarra, Langou 2010, "Rectangular full packed format for Cholesky's
algorithm", ACM TOMS 37(2)), lower triangle, row-major. With K = ceil(n/2) columns, N = floor(n/2), odd = n mod 2 and
2N + 1 rows, the entry S[i, j], i >= j, stands at

    P[i + 1 - odd, j]             if j < K      (left K columns, below the diagonal)
    P[j - K, i - K + odd]         otherwise     (bottom right triangle, transposed into the free corner)

so the leading dimension is constant, the block S[K:, :K] is a plain view, and every conversion copies bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import index
from typing import Literal

import torch
from torch import Tensor


def packed_shape(n: int) -> tuple[int, int]:
    """(rows, columns) of the rectangle that stores a symmetric n x n matrix."""
    return 2 * (n // 2) + 1, (n + 1) // 2


def check_tensor(where: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_inexact(where: str, name: str, value: Tensor) -> None:
    check_tensor(where, name, value)
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{where}: {name} must be floating or complex, got {value.dtype}; convert it")


def order_of(packed: Tensor, where: str = "unpack") -> int:
    """The n for which `packed` has the shape `packed_shape(n)`.

    Raises:
        ValueError: no n fits; the message computes the n that the number of values would fit.
    """
    check_tensor(where, "packed", packed)
    n = _triangle_order(index(packed.numel()))
    if packed.ndim == 2 and n is not None and tuple(packed.shape) == packed_shape(n):
        return n
    if packed.ndim == 2 and packed.shape[0] == packed.shape[1]:
        fix = "pack a full matrix first: tritonsym.pack(S)"
    elif n is not None and n > 0:
        rows, columns = packed_shape(n)
        fix = f"{packed.numel()} values fit n = {n}, which is stored as ({rows}, {columns})"
        if packed.ndim == 1:
            fix += "; convert a triangle vector with pack_tril or pack_triu"
    else:
        below = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
        fix = f"nearest: n = {below} as {packed_shape(below)}, n = {below + 1} as {packed_shape(below + 1)}"
    raise ValueError(
        f"{where}: packed has shape {tuple(packed.shape)}, which is not (2*(n//2)+1, (n+1)//2) for any n; {fix}"
    )


def _triangle_order(length: int) -> int | None:
    n = (math.isqrt(8 * length + 1) - 1) // 2
    return n if n * (n + 1) // 2 == length else None


def pack(
    matrix: Tensor, symmetrize: Literal["average", "lower", "upper"] | None = None, *, tolerance: float = 0.0
) -> Tensor:
    """Store a symmetric matrix (n, n) as the rectangle `packed_shape(n)`; the bits of the lower triangle are kept.

    Args:
        matrix: (n, n), symmetric within `tolerance` (largest |S - S^T|) unless `symmetrize` says what to do.
        symmetrize: 'average' stores (S + S^T) / 2, the nearest symmetric matrix in the Frobenius norm; 'lower' and
            'upper' take that triangle and ignore the other.

    Raises:
        ValueError: not square, or not symmetric within `tolerance` while `symmetrize` is None.
        TypeError: no tensor, or integers to average.
    """
    check_tensor("pack", "matrix", matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"pack: expected a square matrix (n, n), got shape {tuple(matrix.shape)}")
    if symmetrize == "average":
        check_inexact("pack", "matrix", matrix)
        mean = (matrix + matrix.mT) / 2
        matrix = torch.where(mean.isfinite(), mean, matrix / 2 + matrix.mT / 2)  # the sum may overflow
    elif symmetrize == "upper":
        matrix = matrix.mT
    elif symmetrize is None:
        differs = (matrix != matrix.mT) & ~(matrix.isnan() & matrix.mT.isnan())
        wide = matrix if matrix.is_floating_point() or matrix.is_complex() else matrix.double()  # signed
        difference = (wide - wide.mT)[differs].abs().amax().item() if differs.any() else 0.0
        if not difference <= tolerance:
            raise ValueError(
                f"pack: the matrix is not symmetric: |S - S^T| reaches {difference:.3g}, tolerance {tolerance:.3g}; "
                "pass symmetrize='average', 'lower' or 'upper', or a larger tolerance"
            )
    elif symmetrize != "lower":
        raise ValueError(f"pack: symmetrize must be 'average', 'lower', 'upper' or None, got {symmetrize!r}")
    n = matrix.shape[0]
    columns, odd = (n + 1) // 2, n % 2
    left = matrix[:, :columns].tril()
    corner = matrix[columns:, columns:].tril().mT  # upper triangular, N x N
    # the two triangles share the rectangle's top rows and never overlap
    left = torch.nn.functional.pad(left, (0, 0, 1 - odd, 0))
    corner = torch.nn.functional.pad(corner, (odd, 0, 0, left.shape[0] - corner.shape[0]))
    held = _left_mask(n, matrix.device)
    return torch.where(held, left, corner)


def _left_mask(n: int, device: torch.device) -> Tensor:
    """True where the rectangle holds an entry of the left columns, False where it holds the bottom right triangle."""
    rows, columns = packed_shape(n)
    i = torch.arange(rows, device=device)[:, None] - (1 - n % 2)
    return i >= torch.arange(columns, device=device)


def unpack(packed: Tensor) -> Tensor:
    """The full matrix (n, n), equal to its transpose to the bit. Differentiable.

    The gradient of a stored off-diagonal value is the sum of the gradients of its two places.
    """
    n = order_of(packed)
    columns, odd = (n + 1) // 2, n % 2
    left, corner = packed[1 - odd :], packed[: n // 2, odd:]
    top, block = left[:columns], left[columns:]
    top, bottom = mirror(top), mirror(corner.mT)
    return torch.cat([torch.cat([top, block.mT], 1), torch.cat([block, bottom], 1)], 0)


def mirror(matrix: Tensor) -> Tensor:
    """(..., n, n) with the lower triangle copied to the upper one, to the bit: a -0.0 keeps its sign."""
    is_lower = torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).tril()
    return torch.where(is_lower, matrix, matrix.mT)


def _tril_index(n: int, device: torch.device) -> Tensor:
    """Flat place in the rectangle of every entry of a row-wise lower triangle vector (`torch.tril_indices` order)."""
    columns, odd = (n + 1) // 2, n % 2
    i, j = torch.tril_indices(n, n, device=device)
    return torch.where(j < columns, (i + 1 - odd) * columns + j, (j - columns) * columns + i - columns + odd)


def _triu_index(n: int, device: torch.device) -> Tensor:
    """The same for a row-wise upper triangle vector (`torch.triu_indices` order)."""
    i, j = torch.triu_indices(n, n, device=device)
    columns, odd = (n + 1) // 2, n % 2
    return torch.where(i < columns, (j + 1 - odd) * columns + i, (i - columns) * columns + j - columns + odd)


def _from_vector(vector: Tensor, index: Callable[[int, torch.device], Tensor], where: str) -> Tensor:
    check_tensor(where, "vector", vector)
    n = _triangle_order(vector.numel()) if vector.ndim == 1 else None
    if n is None:
        below = (math.isqrt(8 * vector.numel() + 1) - 1) // 2
        raise ValueError(
            f"{where}: expected a vector of n(n+1)/2 values, got shape {tuple(vector.shape)}; nearest lengths: "
            f"{below * (below + 1) // 2} (n = {below}) and {(below + 1) * (below + 2) // 2} (n = {below + 1})"
        )
    place = index(n, vector.device)
    order = torch.empty_like(place)
    order[place] = torch.arange(place.numel(), device=vector.device)
    return vector[order].view(packed_shape(n))


def pack_tril(vector: Tensor) -> Tensor:
    """Packed rectangle from a row-wise lower triangle vector, ``S[torch.tril_indices(n, n)]``."""
    return _from_vector(vector, _tril_index, "pack_tril")


def pack_triu(vector: Tensor) -> Tensor:
    """Packed rectangle from a row-wise upper triangle vector, ``S[torch.triu_indices(n, n)]``."""
    return _from_vector(vector, _triu_index, "pack_triu")


def unpack_tril(packed: Tensor) -> Tensor:
    """Inverse of `pack_tril`, to the bit."""
    n = order_of(packed, "unpack_tril")
    return packed.reshape(-1)[_tril_index(n, packed.device)]


def unpack_triu(packed: Tensor) -> Tensor:
    """Inverse of `pack_triu`, to the bit."""
    n = order_of(packed, "unpack_triu")
    return packed.reshape(-1)[_triu_index(n, packed.device)]

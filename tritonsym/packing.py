"""Rectangular full packed storage of an exactly symmetric n x n matrix: n(n+1)/2 values in one dense rectangle.

LAPACK's RFP format (Gustavson, Wasniewski, Dongarra, Langou 2010, "Rectangular full packed format for Cholesky's
algorithm", ACM TOMS 37(2)), lower triangle, row-major. With K = ceil(n/2) columns, N = floor(n/2), odd = n mod 2 and
2N + 1 rows, the entry S[i, j], i >= j, is stored at

    P[i + 1 - odd, j]             if j < K      (left K columns, below the diagonal)
    P[j - K, i - K + odd]         otherwise     (bottom right triangle, transposed into the free corner)

so the leading dimension is constant, the block S[K:, :K] is a plain view, and every conversion copies bits.

A skew-symmetric matrix, S = -S^T, is stored as the rectangle of the matrix T of order n - 1 with T[i - 1, j] = S[i, j]
for i > j: n(n-1)/2 values. Axes of a batch come first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor


def packed_shape(n: int) -> tuple[int, int]:
    """(rows, columns) of the rectangle that stores a symmetric n x n matrix."""
    return 2 * (n // 2) + 1, (n + 1) // 2


def widens_float16(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute in float32 where x is float16, since partial sums may overflow where the result does not."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(cast(v, dtype) for v in value)
        return value.to(dtype) if isinstance(value, Tensor) else value

    @wraps(function)
    def wrapped(x: Tensor, *others: Any, **options: Any) -> Any:
        if x.dtype != torch.float16:
            return function(x, *others, **options)
        return cast(function(*cast((x, *others), torch.float32), **options), torch.float16)

    return wrapped


def check_tensor(where: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        raise TypeError(f"{where}: {name} is a DTensor; gather it first: {name}.full_tensor()")


def gathered(value: Tensor) -> Tensor:
    """The full tensor of a DTensor, differentiable; any other tensor unchanged."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def check_inexact(where: str, name: str, value: Tensor) -> None:
    check_tensor(where, name, value)
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{where}: {name} must be floating or complex, got {value.dtype}; convert it")


def order_of(packed: Tensor, where: str = "unpack") -> int:
    """The n for which the last two axes of `packed` have the shape `packed_shape(n)`.

    Raises:
        ValueError: no n fits; the message names the n that fits the number of values.
    """
    check_tensor(where, "packed", packed)
    n = _triangle_order(index(math.prod(packed.shape[-2:])))
    if packed.ndim >= 2 and n is not None and tuple(packed.shape[-2:]) == packed_shape(n):
        return n
    if packed.ndim >= 2 and packed.shape[-2] == packed.shape[-1]:
        fix = "pack a full matrix first: tritonsym.pack(S)"
    elif n is not None and n > 0:
        rows, columns = packed_shape(n)
        fix = f"{math.prod(packed.shape[-2:])} values fit n = {n}, which is stored as ({rows}, {columns})"
        if packed.ndim == 1:
            fix += "; convert a triangle vector with pack_tril or pack_triu"
    else:
        below = (math.isqrt(8 * math.prod(packed.shape[-2:]) + 1) - 1) // 2
        fix = f"nearest: n = {below} as {packed_shape(below)}, n = {below + 1} as {packed_shape(below + 1)}"
    raise ValueError(
        f"{where}: packed has shape {tuple(packed.shape)}, which is not (2*(n//2)+1, (n+1)//2) for any n; {fix}"
    )


def _triangle_order(length: int) -> int | None:
    n = (math.isqrt(8 * length + 1) - 1) // 2
    return n if n * (n + 1) // 2 == length else None


def pack(
    matrix: Tensor,
    symmetrize: Literal["average", "lower", "upper"] | None = None,
    *,
    tolerance: float = 0.0,
    skew: bool = False,
) -> Tensor:
    """Store symmetric matrices (..., n, n) as rectangles `packed_shape(n)`; the lower triangle keeps its bits.

    Args:
        matrix: (..., n, n), symmetric within `tolerance` (largest |S - S^T|) unless `symmetrize` is given.
        symmetrize: 'average' stores (S + S^T) / 2, the nearest symmetric matrix in the Frobenius norm; 'lower' and
            'upper' take that triangle and ignore the other.
        skew: the matrices are skew-symmetric, S = -S^T, stored as `packed_shape(n - 1)`; read S^T as -S^T above.

    Raises:
        ValueError: not square, or not symmetric within `tolerance` while `symmetrize` is None; no rows with `skew`.
        TypeError: not a tensor, or an integer matrix to average.

    >>> tritonsym.pack(torch.tensor([[1.0, 2.0], [2.0, 3.0]])).tolist()
    [[3.0], [1.0], [2.0]]
    """
    check_tensor("pack", "matrix", matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or (skew and not matrix.shape[-1]):
        raise ValueError(f"pack: expected a square matrix (n, n), got shape {tuple(matrix.shape)}")
    mirrored = -matrix.mT if skew else matrix.mT
    if symmetrize == "average":
        check_inexact("pack", "matrix", matrix)
        mean = (matrix + mirrored) / 2
        matrix = torch.where(mean.isfinite(), mean, matrix / 2 + mirrored / 2)  # the sum may overflow
    elif symmetrize == "upper":
        matrix = mirrored
    elif symmetrize is None:
        differs = (matrix != mirrored) & ~(matrix.isnan() & mirrored.isnan())
        wide = matrix if matrix.is_floating_point() or matrix.is_complex() else matrix.double()  # unsigned would wrap
        difference = (wide - (-wide.mT if skew else wide.mT))[differs].abs().amax().item() if differs.any() else 0.0
        if not difference <= tolerance:
            word, sign = ("skew-symmetric", "+") if skew else ("symmetric", "-")
            raise ValueError(
                f"pack: the matrix is not {word}: |S {sign} S^T| reaches {difference:.3g}, tolerance {tolerance:.3g}; "
                "pass symmetrize='average', 'lower' or 'upper', or a larger tolerance"
            )
    elif symmetrize != "lower":
        raise ValueError(f"pack: symmetrize must be 'average', 'lower', 'upper' or None, got {symmetrize!r}")
    if skew:
        matrix = matrix[..., 1:, :-1]
    n = matrix.shape[-1]
    columns, odd = (n + 1) // 2, n % 2
    left = matrix[..., :columns].tril()
    corner = matrix[..., columns:, columns:].tril().mT  # upper triangular, N x N
    # the two triangles share the rectangle's top rows and never overlap
    left = torch.nn.functional.pad(left, (0, 0, 1 - odd, 0))
    corner = torch.nn.functional.pad(corner, (odd, 0, 0, left.shape[-2] - corner.shape[-2]))
    held = _left_mask(n, matrix.device)
    return torch.where(held, left, corner)


def _left_mask(n: int, device: torch.device) -> Tensor:
    """True where the rectangle holds an entry of the left columns, False where it holds the bottom right triangle."""
    rows, columns = packed_shape(n)
    i = torch.arange(rows, device=device)[:, None] - (1 - n % 2)
    return i >= torch.arange(columns, device=device)


def unpack(packed: Tensor, *, skew: bool = False) -> Tensor:
    """The full matrices (..., n, n), equal to their transposes (`skew`: negated) to the bit. Differentiable.

    The gradient of a stored off-diagonal value is the sum of the gradients at its two places.

    >>> tritonsym.unpack(torch.tensor([[3.0], [1.0], [2.0]])).tolist()
    [[1.0, 2.0], [2.0, 3.0]]
    """
    n = order_of(packed)
    columns, odd = (n + 1) // 2, n % 2
    left, corner = packed[..., 1 - odd :, :], packed[..., : n // 2, odd:]
    top, block = left[..., :columns, :], left[..., columns:, :]
    top, bottom = mirror(top), mirror(corner.mT)
    full = torch.cat([torch.cat([top, block.mT], -1), torch.cat([block, bottom], -1)], -2)
    if not skew:
        return full
    lower = torch.nn.functional.pad(full.tril(), (0, 1, 1, 0))
    return lower - lower.mT


def mirror(matrix: Tensor) -> Tensor:
    """(..., n, n) with the lower triangle copied to the upper one, to the bit: a -0.0 keeps its sign."""
    is_lower = torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).tril()
    return torch.where(is_lower, matrix, matrix.mT)


def _places(n: int, device: torch.device, upper: bool) -> Tensor:
    """Flat index in the rectangle of every entry of a row-wise vector of the lower triangle, in the order of
    `torch.tril_indices`, or of the upper one, in that of `torch.triu_indices`."""
    columns, odd = (n + 1) // 2, n % 2
    i, j = torch.triu_indices(n, n, device=device).flip(0) if upper else torch.tril_indices(n, n, device=device)
    return torch.where(j < columns, (i + 1 - odd) * columns + j, (j - columns) * columns + i - columns + odd)


def _from_vector(vector: Tensor, upper: bool, where: str) -> Tensor:
    check_tensor(where, "vector", vector)
    length = vector.shape[-1] if vector.ndim else 0
    n = _triangle_order(length) if vector.ndim else None
    if n is None:
        below = (math.isqrt(8 * length + 1) - 1) // 2
        raise ValueError(
            f"{where}: expected a vector of n(n+1)/2 values, or a batch of such, got shape "
            f"{tuple(vector.shape)}; nearest lengths: {below * (below + 1) // 2} (n = {below}) and "
            f"{(below + 1) * (below + 2) // 2} (n = {below + 1})"
        )
    place = _places(n, vector.device, upper)
    order = torch.empty_like(place)
    order[place] = torch.arange(place.numel(), device=vector.device)
    return vector[..., order].view(*vector.shape[:-1], *packed_shape(n))


def pack_tril(vector: Tensor) -> Tensor:
    """Packed rectangle from a row-wise lower triangle vector, ``S[torch.tril_indices(n, n)]``.

    For a skew-symmetric S the vector is ``S[torch.tril_indices(n, n, -1)]``. Here and in the other conversions a batch
    (..., length) gives a batch.

    >>> tritonsym.pack_tril(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [[3.0], [1.0], [2.0]]
    """
    return _from_vector(vector, False, "pack_tril")


def pack_triu(vector: Tensor) -> Tensor:
    """Packed rectangle from a row-wise upper triangle vector, ``S[torch.triu_indices(n, n)]``.

    >>> tritonsym.pack_triu(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [[3.0], [1.0], [2.0]]
    """
    return _from_vector(vector, True, "pack_triu")


def unpack_tril(packed: Tensor) -> Tensor:
    """Inverse of `pack_tril`, to the bit.

    >>> tritonsym.unpack_tril(torch.tensor([[3.0], [1.0], [2.0]])).tolist()
    [1.0, 2.0, 3.0]
    """
    n = order_of(packed, "unpack_tril")
    return packed.flatten(-2)[..., _places(n, packed.device, False)]


def unpack_triu(packed: Tensor) -> Tensor:
    """Inverse of `pack_triu`, to the bit.

    >>> tritonsym.unpack_triu(torch.tensor([[3.0], [1.0], [2.0]])).tolist()
    [1.0, 2.0, 3.0]
    """
    n = order_of(packed, "unpack_triu")
    return packed.flatten(-2)[..., _places(n, packed.device, True)]

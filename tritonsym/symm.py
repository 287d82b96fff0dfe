"""Products with symmetric matrices by the Triton kernels: opaque ops, and how they differentiate.

Every derivative is made of the same ops, so that derivatives of every order are. With U = `packing.unpack`, U* its
adjoint and P packed,

    y = x U(P)              dx = dy U(P)             dP = U*(x^T dy)
    G = U*(x^T dy)          dx = dy U(dG)            d(dy) = x U(dG)
    C = alpha X X^T         dX = alpha (dC + dC^T) X
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonsym import launch
from tritonsym.packing import packed_shape

Tile = Sequence[int]


def _precision() -> str:
    """Of float32 products: what torch's own are set to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@torch.library.custom_op("tritonsym::packed_product", mutates_args=())
def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, tile: Tile) -> Tensor:
    """act(x U(packed) + bias) for x (B, n)."""
    with launch.launching("expand", tile, x, packed):
        from tritonsym.kernels import symm, tiles

        bias = None if bias is None else bias.contiguous()
        return symm.product(x, packed.contiguous(), bias, activation, tiles.GemmTile(*tile), _precision())


@packed_product.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, tile: Tile) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("tritonsym::packed_gradient", mutates_args=())
def packed_gradient(x: Tensor, dy: Tensor, tile: Tile) -> Tensor:
    """U*(x^T dy) for x, dy (B, n)."""
    with launch.launching("expand", tile, x, dy):
        from tritonsym.kernels import symm, tiles

        return symm.gradient(x, dy, tiles.GemmTile(*tile), _precision())


@packed_gradient.register_fake
def _(x: Tensor, dy: Tensor, tile: Tile) -> Tensor:
    return x.new_empty(packed_shape(x.shape[1]))


@torch.library.custom_op("tritonsym::half_gram", mutates_args=())
def half_gram(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
    """beta a + alpha x x^T for x (batch, M, K) and a (batch, M, M), of which the lower triangle counts."""
    with launch.launching("expand", tile, x):
        from tritonsym.kernels import gram, tiles

        return gram.gram(x, a, alpha, beta, tiles.GemmTile(*tile), _precision())


@half_gram.register_fake
def _(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


class _Product(torch.autograd.Function):
    """act(x U(packed) + bias); where it is differentiated there is no activation."""

    @staticmethod
    def forward(
        x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, tile: Tile, gradient_tile: Tile
    ) -> Tensor:
        return torch.ops.tritonsym.packed_product(x, packed, bias, activation, tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, packed, _, _, *ctx.tiles = inputs
        ctx.save_for_backward(x, packed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, packed = ctx.saved_tensors
        needs_x, needs_packed, needs_bias, *_ = ctx.needs_input_grad
        dx = _Product.apply(dy, packed, None, None, *ctx.tiles) if needs_x else None
        dpacked = _Gradient.apply(x, dy, *ctx.tiles) if needs_packed else None
        return dx, dpacked, dy.sum(0) if needs_bias else None, None, None, None


class _Gradient(torch.autograd.Function):
    """U*(x^T dy)."""

    @staticmethod
    def forward(x: Tensor, dy: Tensor, tile: Tile, gradient_tile: Tile) -> Tensor:
        return torch.ops.tritonsym.packed_gradient(x, dy, gradient_tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, dy, *ctx.tiles = inputs
        ctx.save_for_backward(x, dy)

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor) -> Any:
        x, dy = ctx.saved_tensors
        needs_x, needs_dy, *_ = ctx.needs_input_grad
        dx = _Product.apply(dy, dpacked, None, None, *ctx.tiles) if needs_x else None
        ddy = _Product.apply(x, dpacked, None, None, *ctx.tiles) if needs_dy else None
        return dx, ddy, None, None


class _Gram(torch.autograd.Function):
    """L(beta a + alpha x x^T), L the copy of the lower triangle to the upper one."""

    @staticmethod
    def forward(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
        return torch.ops.tritonsym.half_gram(x, a, alpha, beta, tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.alpha, ctx.beta, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        needs_x, needs_a, *_ = ctx.needs_input_grad
        dx = ctx.alpha * ((dc + dc.mT) @ x) if needs_x else None
        da = ctx.beta * (dc.tril() + dc.mT.tril(-1)) if needs_a else None
        return dx, da, None, None, None


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, tile: Tile, gradient_tile: Tile
) -> Tensor:
    """act(x U(packed) + bias) for x (..., n); the activation only where nothing is differentiated."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _Product.apply(rows, packed, bias, activation, tile, gradient_tile).view(x.shape)


def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
    """L(beta a + alpha x x^T) for x (..., m, k) and a (..., m, m) or None."""
    *batch, m, k = x.shape
    flat = math.prod(batch)
    a = None if a is None else a.reshape(flat, m, m)
    return _Gram.apply(x.reshape(flat, m, k), a, alpha, beta, tile).view(*batch, m, m)

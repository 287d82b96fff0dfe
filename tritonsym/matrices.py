"""How products with symmetric matrices are computed and differentiated.

The reference is plain torch ops. Blocks and kernels are autograd functions over opaque ops (``torch.ops.tritonsym.*``),
which compilers take as they are; an op without tiles works by blocks. With U = `packing.unpack`, U* its adjoint and P
packed,

    y = x U(P)              dx = dy U(P)             dP = U*(x^T dy)
    G = U*(x^T dy)          dx = dy U(dG)            d(dy) = x U(dG)
    C = alpha X X^T         dX = alpha (dC + dC^T) X

with conjugates in the gradients of complex numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonsym import blocks, launch, plan, reference
from tritonsym._compat import is_exporting, transforms_are_active
from tritonsym.ops import _are_plain, _has_static_sizes
from tritonsym.packing import packed_shape
from tritonsym.plan import computing_dtype, needs_gradient

Tile = Sequence[int]


def _precision() -> str:
    """Of float32 products: what torch's own are set to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, tile: Tile) -> Tensor:
    """act(x U(packed) + bias) for x (B, n)."""
    if not tile:
        return reference.activate(blocks.product(x, packed, bias), activation)
    with launch.launching("implicit_gemm", tile, x, packed):
        from tritonsym.kernels import symm, tiles

        bias = None if bias is None else bias.contiguous()
        return symm.product(x, packed.contiguous(), bias, activation, tiles.GemmTile(*tile), _precision())


def _gradient(x: Tensor, dy: Tensor, tile: Tile) -> Tensor:
    """U*(x^T dy) for x, dy (B, n)."""
    if not tile:
        return blocks.gradient(x, dy)
    with launch.launching("implicit_gemm", tile, x, dy):
        from tritonsym.kernels import symm, tiles

        return symm.gradient(x, dy, tiles.GemmTile(*tile), _precision())


def _gram(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
    """beta a + alpha x x^T for x (batch, M, K) and a (batch, M, M), of which the lower triangle counts."""
    if not tile:
        return blocks.gram(x, a, alpha, beta)
    with launch.launching("implicit_gemm", tile, x):
        from tritonsym.kernels import gram, tiles

        return gram.gram(x, a, alpha, beta, tiles.GemmTile(*tile), _precision())


packed_product = torch.library.custom_op("tritonsym::packed_product", _product, mutates_args=())
packed_gradient = torch.library.custom_op("tritonsym::packed_gradient", _gradient, mutates_args=())
half_gram = torch.library.custom_op("tritonsym::half_gram", _gram, mutates_args=())


@packed_product.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, tile: Tile) -> Tensor:
    return x.new_empty(x.shape)


@packed_gradient.register_fake
def _(x: Tensor, dy: Tensor, tile: Tile) -> Tensor:
    return x.new_empty(packed_shape(x.shape[1]))


@half_gram.register_fake
def _(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


def _run(function: Any, op: Any, *args: Any) -> Any:
    """Blocks without the dispatcher's detours, but where a compiler traces."""
    return op(*args) if args[-1] or torch.compiler.is_compiling() else function(*args)


def _conj(x: Tensor) -> Tensor:
    return x.conj().resolve_conj()


class _Product(torch.autograd.Function):
    """act(x U(packed) + bias); where it is differentiated there is no activation."""

    @staticmethod
    def forward(
        x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, tile: Tile, gradient_tile: Tile
    ) -> Tensor:
        return _run(_product, packed_product, x, packed, bias, activation, tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, packed, _, _, *ctx.tiles = inputs
        ctx.save_for_backward(x, packed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, packed = ctx.saved_tensors
        needs_x, needs_packed, needs_bias, *_ = ctx.needs_input_grad
        dx = _Product.apply(dy, _conj(packed), None, None, *ctx.tiles) if needs_x else None
        dpacked = _Gradient.apply(_conj(x), dy, *ctx.tiles) if needs_packed else None
        return dx, dpacked, dy.sum(0) if needs_bias else None, None, None, None


class _Gradient(torch.autograd.Function):
    """U*(x^T dy)."""

    @staticmethod
    def forward(x: Tensor, dy: Tensor, tile: Tile, gradient_tile: Tile) -> Tensor:
        return _run(_gradient, packed_gradient, x, dy, gradient_tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, dy, *ctx.tiles = inputs
        ctx.save_for_backward(x, dy)

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor) -> Any:
        x, dy = ctx.saved_tensors
        needs_x, needs_dy, *_ = ctx.needs_input_grad
        dx = _Product.apply(_conj(dy), dpacked, None, None, *ctx.tiles) if needs_x else None
        ddy = _Product.apply(_conj(x), dpacked, None, None, *ctx.tiles) if needs_dy else None
        return dx, ddy, None, None


class _Gram(torch.autograd.Function):
    """L(beta a + alpha x x^T), L the copy of the lower triangle to the upper one."""

    @staticmethod
    def forward(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
        return _run(_gram, half_gram, x, a, alpha, beta, tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.alpha, ctx.beta, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        needs_x, needs_a, *_ = ctx.needs_input_grad
        dx = ctx.alpha * ((dc + dc.mT) @ x.conj()) if needs_x else None
        da = ctx.beta * (dc.tril() + dc.mT.tril(-1)) if needs_a else None
        return dx, da, None, None, None


def _may_plan(*tensors: Tensor) -> bool:
    """Whether kernels may compute it: of sizes that are known, plain tensors, and nothing but plain autograd."""
    if torch.compiler.is_compiling():
        return not is_exporting() and all(_has_static_sizes(t) for t in tensors)
    return _are_plain(*tensors) and not torch.jit.is_tracing() and not transforms_are_active()


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, never_unpack: bool) -> Tensor:
    """act(x U(packed) + bias) for x (..., n)."""
    training, path = needs_gradient(x, packed, bias), "reference"
    if _may_plan(x, packed):
        problem = (tuple(x.shape), x.device.type, plan.dtype_name(x), never_unpack, training)
        path, tiles = plan.matrix_route("linear", *problem)
    elif never_unpack:
        raise plan.cannot_stay_packed("symbolic sizes, subclasses of tensors and torch.func transforms")
    if path == "reference":
        return reference.symmetric_linear(x, packed, bias, activation)
    dtype = computing_dtype(x)
    rows = x.to(dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    fused = None if training else activation
    bias = None if bias is None else bias.to(dtype)
    y = _Product.apply(rows, packed.to(dtype), bias, fused, *(tiles or ((), ()))).view(x.shape)
    return y if fused else reference.activate(y, activation)


def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float, mirrored: bool = True) -> Tensor:
    """L(beta a + alpha x x^T) for x (..., m, k) and a (..., m, m) or None; symmetric up to rounding if not mirrored."""
    path = "reference"
    if _may_plan(x):
        path, tiles = plan.matrix_route("gram", tuple(x.shape), x.device.type, plan.dtype_name(x))
    if path == "reference":
        return reference.gram(x, a, alpha, beta, mirrored)
    *batch, m, k = x.shape
    flat, dtype = math.prod(batch), computing_dtype(x)
    a = None if a is None else a.to(dtype).reshape(flat, m, m)
    return _Gram.apply(x.to(dtype).reshape(flat, m, k), a, alpha, beta, *(tiles or ((),))).view(*batch, m, m)

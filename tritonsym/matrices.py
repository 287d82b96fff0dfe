"""How products with symmetric matrices are computed and differentiated.

The reference is plain torch ops. Blocks and kernels are autograd functions over opaque ops (``torch.ops.tritonsym.*``),
which compilers do not look into; an op without tiles runs `blocks`. With U = `packing.unpack`, U* its adjoint and P
packed,

    y = x U(P)              dx = dy U(P)^T           dP = U*(x^T dy)
    G = U*(x^T dy)          dx = dy U(dG)^T          d(dy) = x U(dG)
    C = alpha X X^T         dX = alpha (dC + dC^T) X
    q = x U(P) x^T          dx = 2 dq x U(P)         dP = U*(x^T dq x)

with conjugates in the gradients of complex numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonsym import blocks, launch, plan, reference
from tritonsym._compat import is_mapped
from tritonsym.ops import are_plain, cast, may_plan, takes_positions
from tritonsym.packing import packed_shape, unpack
from tritonsym.plan import computing_dtype, needs_gradient

Tile = Sequence[int]


def _precision() -> str:
    """The precision of float32 products: torch's own switch."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, skew: bool, tile: Tile) -> Tensor:
    """act(x U(packed) + bias) for x (B, n)."""
    if not tile:
        return reference.activate(blocks.product(x, packed, bias, skew), activation)
    with launch.launching("implicit_gemm", tile, x, packed):
        from tritonsym.kernels import symm, tiles

        bias = None if bias is None else bias.contiguous()
        return symm.product(x, packed.contiguous(), bias, activation, tiles.GemmTile(*tile), _precision(), skew)


def _gradient(x: Tensor, dy: Tensor, skew: bool, tile: Tile) -> Tensor:
    """U*(x^T dy) for x, dy (B, n)."""
    if not tile:
        return blocks.gradient(x, dy, skew)
    with launch.launching("implicit_gemm", tile, x, dy):
        from tritonsym.kernels import symm, tiles

        return symm.gradient(x, dy, tiles.GemmTile(*tile), _precision(), skew)


def _gram(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
    """beta a + alpha x x^T for x (batch, M, K) and a (batch, M, M) or None; only the lower triangle of a counts."""
    if not tile:
        return blocks.gram(x, a, alpha, beta)
    with launch.launching("implicit_gemm", tile, x):
        from tritonsym.kernels import gram, tiles

        return gram.gram(x, a, alpha, beta, tiles.GemmTile(*tile), _precision())


packed_product = torch.library.custom_op("tritonsym::packed_product", _product, mutates_args=())
packed_gradient = torch.library.custom_op("tritonsym::packed_gradient", _gradient, mutates_args=())
half_gram = torch.library.custom_op("tritonsym::half_gram", _gram, mutates_args=())


@packed_product.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None, skew: bool, tile: Tile) -> Tensor:
    return x.new_empty(x.shape)


@packed_gradient.register_fake
def _(x: Tensor, dy: Tensor, skew: bool, tile: Tile) -> Tensor:
    return x.new_empty(packed_shape(x.shape[1] - skew))


@half_gram.register_fake
def _(x: Tensor, a: Tensor | None, alpha: float, beta: float, tile: Tile) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


def _run(function: Any, op: Any, *args: Any) -> Any:
    """Call the function, or the op where a compiler traces or a kernel would get mapped tensors or subclasses."""
    is_plain = not args[-1] or all(are_plain(t) and not is_mapped(t) for t in args[:2] if t is not None)
    return function(*args) if is_plain and not torch.compiler.is_compiling() else op(*args)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Record a graph only where a compiler traces or the result may be differentiated."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    traced = torch.compiler.is_compiling() or needs_gradient(*tensors)
    return function.apply(*args) if traced else function.forward(*args)


def _conj(x: Tensor) -> Tensor:
    return x.conj().resolve_conj()


class _Product(torch.autograd.Function):
    """act(x U(packed) + bias); no activation where gradients are needed."""

    @staticmethod
    def forward(
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        activation: str | None,
        skew: bool,
        tile: Tile,
        gradient_tile: Tile,
    ) -> Tensor:
        return _run(_product, packed_product, x, packed, bias, activation, skew, tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, packed, _, _, *ctx.options = inputs
        ctx.save_for_backward(x, packed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, packed = ctx.saved_tensors
        needs_x, needs_packed, needs_bias, *_ = ctx.needs_input_grad
        dx = _transposed(dy, _conj(packed), *ctx.options) if needs_x else None
        dpacked = _apply(_Gradient, _conj(x), dy, *ctx.options) if needs_packed else None
        return dx, dpacked, dy.sum(0) if needs_bias else None, None, None, None, None


class _Gradient(torch.autograd.Function):
    """U*(x^T dy)."""

    @staticmethod
    def forward(x: Tensor, dy: Tensor, skew: bool, tile: Tile, gradient_tile: Tile) -> Tensor:
        return _run(_gradient, packed_gradient, x, dy, skew, gradient_tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, dy, *ctx.options = inputs
        ctx.save_for_backward(x, dy)

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor) -> Any:
        x, dy = ctx.saved_tensors
        needs_x, needs_dy, *_ = ctx.needs_input_grad
        dx = _transposed(_conj(dy), dpacked, *ctx.options) if needs_x else None
        ddy = _apply(_Product, _conj(x), dpacked, None, None, *ctx.options) if needs_dy else None
        return dx, ddy, None, None, None


def _transposed(x: Tensor, packed: Tensor, skew: bool, *tiles: Tile) -> Tensor:
    """x U(packed)^T."""
    return _apply(_Product, -x if skew else x, packed, None, None, skew, *tiles)


class _QuadraticForm(torch.autograd.Function):
    """x U(packed) x^T for every row of x, by blocks."""

    @staticmethod
    def forward(x: Tensor, packed: Tensor) -> Tensor:
        return blocks.quadratic_form(x, packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dq: Tensor) -> Any:
        x, packed = map(_conj, ctx.saved_tensors)
        needs_x, needs_packed = ctx.needs_input_grad
        dx = 2 * dq[:, None] * _Product.apply(x, packed, None, None, False, (), ()) if needs_x else None
        return dx, _Gradient.apply(x, dq[:, None] * x, False, (), ()) if needs_packed else None


class _Gram(torch.autograd.Function):
    """L(beta a + alpha x x^T), where L copies the lower triangle to the upper one."""

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


for _function in (_Product, _Gradient, _QuadraticForm, _Gram):
    takes_positions(_function.forward)


def _route(x: Tensor, packed: Tensor, never_unpack: bool, skew: bool, training: bool) -> tuple[str, plan.Tiles]:
    """The path and the tiles for x (..., n) and one packed matrix."""
    if may_plan(x, packed):
        problem = (tuple(x.shape), plan.target_of(x), plan.dtype_name(x), never_unpack, training, skew)
        return plan.matrix_route("linear", *problem)
    if never_unpack:
        raise plan.cannot_stay_packed("symbolic sizes, subclasses of tensors and torch.func transforms")
    return "reference", ()


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    activation: str | None,
    never_unpack: bool,
    skew: bool = False,
) -> Tensor:
    """act(x U(packed) + bias) for x (..., n)."""
    training = needs_gradient(x, packed, bias)
    path, tiles = _route(x, packed, never_unpack, skew, training)
    if path == "reference":
        return reference.symmetric_linear(x, packed, bias, activation, skew)
    rows, packed, bias = cast(computing_dtype(x), x, packed, bias)
    if x.ndim != 2:
        rows = rows.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    fused = None if training else activation
    y = _apply(_Product, rows, packed, bias, fused, skew, *(tiles or ((), ())))
    y = y if x.ndim == 2 else y.view(x.shape)
    return y if fused else reference.activate(y, activation)


def matmul(x: Tensor, packed: Tensor, never_unpack: bool, skew: bool) -> Tensor:
    """x U(packed) for batches x (..., m, n) and packed (..., rows, columns), whose batch axes broadcast."""
    batch = torch.broadcast_shapes(x.shape[:-2], packed.shape[:-2])
    some = x.new_empty(0).expand(0) if not math.prod(batch) else x[(0,) * (x.ndim - 2)]
    if not math.prod(batch) or _route(some, packed, never_unpack, skew, needs_gradient(x, packed))[0] == "reference":
        return x @ unpack(packed, skew=skew)
    matrices = packed.expand(*batch, *packed.shape[-2:]).flatten(0, -3)
    rows = x.expand(*batch, *x.shape[-2:]).flatten(0, -3)
    y = [linear(a, p, None, None, never_unpack, skew) for a, p in zip(rows, matrices, strict=True)]
    return torch.stack(y).view(*batch, *x.shape[-2:])


def quadratic_form(x: Tensor, packed: Tensor) -> Tensor:
    """x U(packed) x^T for every row of x (..., n), or (..., m, n) for a batch of packed matrices."""
    if packed.ndim == 2 and not torch.compiler.is_compiling():
        if _route(x, packed, False, False, needs_gradient(x, packed))[0] == "blocks":
            dtype = computing_dtype(x)
            rows = x.to(dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])
            return _apply(_QuadraticForm, rows, packed.to(dtype)).view(x.shape[:-1])
    y = linear(x, packed, None, None, False) if packed.ndim == 2 else matmul(x, packed, False, False)
    return (x * y).sum(-1)


def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float, mirrored: bool = True) -> Tensor:
    """L(beta a + alpha x x^T) for x (..., m, k) and a (..., m, m) or None; symmetric up to rounding if not mirrored."""
    path = "reference"
    if may_plan(x):
        path, tiles = plan.matrix_route("gram", tuple(x.shape), plan.target_of(x), plan.dtype_name(x))
    if path == "reference":
        return reference.gram(x, a, alpha, beta, mirrored)
    *batch, m, k = x.shape
    flat, dtype = math.prod(batch), computing_dtype(x)
    a = None if a is None else a.to(dtype).reshape(flat, m, m)
    return _apply(_Gram, x.to(dtype).reshape(flat, m, k), a, alpha, beta, *(tiles or ((),))).view(*batch, m, m)

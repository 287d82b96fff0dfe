"""How convolutions of all kinds are computed and differentiated, by one function, `conv`.

The reference is plain torch ops. The other paths are autograd functions over opaque ops (``torch.ops.tritonsym.*``),
which compilers do not look into; higher derivatives, `torch.vmap` and forward-mode differentiation take the reference.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from operator import index
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonsym import launch, plan, reference, shift
from tritonsym._compat import constant, is_exporting, is_mapped, transforms_are_active
from tritonsym.packing import check_tensor
from tritonsym.plan import computing_dtype, needs_gradient
from tritonsym.spec import ConvSpec, check

# --- convolutions -----------------------------------------------------------------------------------------------------


def conv(
    where: str,
    spec: str,
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None = None,
    scale: int | None = None,
) -> Tensor:
    """y = act(conv(x) + bias), by the path that the plan names.

    Args:
        where: the function or layer that errors name.
        spec: `ConvSpec.text`.
        x: (N, C, *sizes) or (C, *sizes).
        weights: of the shapes `ConvSpec.weight_shapes`; with `scale`, whole filters, whose orbit mean is taken.
        bias: one value per output filter or per stored filter, or None.
    """
    check_tensor(where, "x", x)
    check_beside(where, x, **dict(zip(("weight", "free_weight"), weights, strict=False)), bias=bias)
    conv_spec = spec_of(spec)
    if scale is not None:
        weights = [orbit_mean(where, w, conv_spec, scale) for w in weights]
    batched = x[None] if x.ndim == len(conv_spec.geometry.kernel_size) + 1 else x
    dtype = computing_dtype(x)  # autocast's, where it is on
    path, tiles, inner = _route(where, spec, batched, weights, bias, dtype)
    if bias is not None and bias.shape[0] != conv_spec.out_channels:
        bias = reference.expand_bias(bias, conv_spec)
    if path == "reference":
        dense = reference.look_up(spec, weights) if _is_eager(x, *weights) else reference.expand(conv_spec, weights)
        y = reference.conv(batched, dense, bias, conv_spec)
        return reference.activate(y if batched is x else y[0], activation)
    if any(t is not None and t.dtype != dtype for t in (batched, bias, *weights)):
        batched, weights = batched.to(dtype), [w.to(dtype) for w in weights]
        bias = None if bias is None else bias.to(dtype)
    pooled = None
    if conv_spec.pool and not (path in ("shift", "fused") and tiles):  # torch pools the images afterwards
        pooled, spec = conv_spec, _without_pool(spec)
    own = bias if pooled is None else None
    needed = needs_gradient(batched, bias, *weights)
    fused = activation if tiles and pooled is None and not needed else None
    call = call_text(spec, path, tiles, inner, fused, bool(conv_spec.pool) and pooled is None)
    args = batched, weights[0], weights[1] if len(weights) > 1 else None, own, call
    if torch.compiler.is_compiling():
        y, _ = torch.ops.tritonsym.conv(*args)
    elif needed or transforms_are_active():
        y, _ = _Conv.apply(*args)
    else:
        y, _ = _fprop(*args)
    if pooled is not None:
        y = reference.pool(y, bias, pooled)
    y = y if fused else reference.activate(y, activation)
    return y if batched.ndim == x.ndim else y[0]


def cast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    """The tensors in this dtype; None stays None."""
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


class _Positions(inspect.Signature):
    """The signature of a function that gets all its arguments by position."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(args=args, kwargs=kwargs, apply_defaults=lambda: None)


def takes_positions(function: Any) -> None:
    """Spare `torch.autograd.Function` from inspecting and binding the signature of `forward` in every call."""
    function.__signature__ = _Positions.from_callable(function)


def orbit_mean(where: str, w: Tensor, spec: ConvSpec, scale: int | None) -> Tensor:
    """Check the shape of w and return its `reference.orbit_mean`."""
    kernel = spec.geometry.kernel_size
    if scale is not None and tuple(w.shape[2:]) != kernel:
        expected = (spec.out_channels, *w.shape[1:2], *kernel)
        raise ValueError(f"{where}: weight has shape {tuple(w.shape)}, expected {expected}: the filters as they are")
    return reference.orbit_mean(w, spec, scale)


@constant
def spec_of(text: str) -> ConvSpec:
    return ConvSpec.of(text)


@constant
def _without_pool(text: str) -> str:
    return replace(ConvSpec.of(text), pool=None).text


def check_beside(where: str, x: Tensor, **others: Tensor | None) -> None:
    """Check that all tensors share one device and one dtype (under autocast, the dtype they are cast to)."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        check_tensor(where, name, tensor)
        if tensor.dtype != x.dtype and computing_dtype(tensor) != computing_dtype(x):
            raise TypeError(
                f"{where}: x is {x.dtype} but {name} is {tensor.dtype}; convert one, or run under torch.autocast"
            )
        if tensor.device != x.device:
            raise ValueError(f"{where}: x is on {x.device} but {name} is on {tensor.device}; move one of them")


def _route(
    where: str, spec: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
) -> plan.Route:
    """Check these tensors, and choose the path that computes them in this dtype."""
    training = needs_gradient(x, bias, *weights)
    shapes = tuple(tuple(map(index, w.shape)) for w in weights)
    form = (
        shapes,
        None if bias is None else tuple(map(index, bias.shape)),
        plan.target_of(x),
        str(dtype).removeprefix("torch."),
    )
    last = shift.is_last(x)
    if torch.compiler.is_compiling() and not is_exporting():
        if _has_static_sizes(x):
            return plan.traced_route(where, spec, tuple(x.shape), *form, training, last)
        check(spec_of(spec), where, x.shape, *form[:2])
        return plan.traced_open_route(where, spec, *form, training)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not are_plain(x, *weights):
        check(spec_of(spec), where, x.shape, *form[:2])
        return "reference", (), False
    return plan.route((where, spec, tuple(x.shape), *form, training, last), *plan.switches())


def _has_static_sizes(x: Tensor) -> bool:
    """Whether the compiler knows all sizes of x."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(map(has_static_value, x.shape))


def may_plan(*tensors: Tensor) -> bool:
    """Whether a path other than the reference is possible: known sizes, plain tensors, no transform but autograd."""
    if torch.compiler.is_compiling():
        return not is_exporting() and all(map(_has_static_sizes, tensors))
    return _is_eager(*tensors)


def _is_eager(*tensors: Tensor) -> bool:
    """Whether the tensors are plain, and nothing traces or transforms the call."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active():
        return False
    return are_plain(*tensors)


def are_plain(*tensors: Tensor) -> bool:
    """Whether these are torch's own tensors, not subclasses, which may behave in any way."""
    return all(type(t) in (Tensor, Parameter) for t in tensors)


# --- the op: (x, weight, free_weight, bias, call) -> y, winners -------------------------------------------------------


class Call(NamedTuple):
    """What an op is told besides its tensors; `tiles` are the numbers of its kernels' tiles in a row (`Plan.tiles`).

    If `path` is a backend, 'auto' or 'triton', the op itself makes the plan, when all sizes are known.
    """

    spec: str
    path: str
    tiles: tuple[int, ...]
    inner: bool
    activation: str | None
    keep: bool  # also return the images that won: bit i of a byte per value of y for image i


@constant
def call_text(*call: Any) -> str:
    """`Call` as a string, since torch ops take no objects."""
    return _dumped(call)


_dumped = lru_cache(maxsize=8192)(json.dumps)


@lru_cache(maxsize=8192)
def _called(text: str) -> Call:
    spec, path, tiles, *rest = json.loads(text)
    return Call(spec, path, tuple(tiles), *rest)


def _decided(call: str, x: Tensor, weights: Sequence[Tensor], training: bool) -> Call:
    """The call, with its plan made now if it has none."""
    found = _called(call)
    if found.path not in plan.BACKENDS or found.path == "reference":
        return found
    shapes = tuple(tuple(w.shape) for w in weights)
    problem = (
        "SymmetricConv",
        found.spec,
        tuple(x.shape),
        shapes,
        None,
        plan.target_of(x),
        plan.dtype_name(x),
        training,
    )
    with plan.backend(found.path):
        path, tiles, inner = plan.route((*problem, shift.is_last(x)), *plan.switches())
    return found._replace(path=path, tiles=tiles, inner=inner)


def _stored(weight: Tensor, free_weight: Tensor | None) -> list[Tensor]:
    return [weight] if free_weight is None else [weight, free_weight]


def _in_format(y: Tensor, last: bool) -> Tensor:
    return shift.channels_last(y) if last else y.contiguous()


def _is_last_output(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether y is channels-last: as in torch, if x or a stored kernel is."""
    return shift.is_last(x) or any(w.ndim == x.ndim and shift.is_last(w) for w in weights)


def _fprop(
    x: Tensor, weight: Tensor, free_weight: Tensor | None, bias: Tensor | None, call: str
) -> tuple[Tensor, Tensor]:
    """act(conv(x) + bias), and the images that won."""
    weights = _stored(weight, free_weight)
    spec, path, tiles, inner, activation, keep = _decided(call, x, weights, training=False)
    nothing = x.new_empty(0, dtype=torch.uint8)
    last = _is_last_output(x, weights)
    if path == "shift" and not tiles:
        return shift.fprop(x, weights, bias, spec, inner, last), nothing
    conv = ConvSpec.of(spec)
    if path == "reference":
        return _in_format(reference.conv(x, reference.expand(conv, weights), bias, conv), last), nothing
    y, winners = launch.fprop(x, weights, bias, spec, path, tiles, inner, activation, last, keep)
    return y, nothing if winners is None else winners


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    free_weight: Tensor | None,
    winners: Tensor,
    call: str,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with respect to x and the stored weights; empty where not needed."""
    weights = _stored(weight, free_weight)
    text, path, tiles, inner, *_ = _decided(call, x, weights, training=True)
    conv = ConvSpec.of(text)
    dx: Tensor | None
    dws: list[Tensor] | None
    if path == "reference":
        dx, dws = reference.conv_vjp(dy, x, conv, weights, need_x, need_weights)
    elif not tiles:
        dx, dws = shift.backward(dy, x, weights, text, inner, need_x, need_weights)
    else:
        won = winners if conv.pool else None
        dx, dws = launch.backward(dy, x, weights, won, text, path, tiles, inner, need_x, need_weights)
    nothing = x.new_empty(0)
    dw, dfree, *_ = [*(dws or [nothing]), nothing, nothing]
    return nothing if dx is None else dx if tiles else _in_format(dx, shift.is_last(x)), dw, dfree


def _laid_out(*args: Any) -> tuple[Tensor, ...]:
    """`_backward` with gradients in the strides of the weights, as compilers expect them."""
    dx, *dws = _backward(*args)
    return dx, *(torch.empty_like(w).copy_(d) if d.numel() else d for w, d in zip(args[2:4], dws, strict=True))


takes_positions(_fprop)
_conv_op = torch.library.custom_op("tritonsym::conv", _fprop, mutates_args=())
_schema = torch.library.infer_schema(_backward, mutates_args=())
_backward_op = torch.library.custom_op("tritonsym::conv_backward", _laid_out, mutates_args=(), schema=_schema)


@_conv_op.register_fake
def _(x: Tensor, weight: Tensor, free_weight: Any, bias: Any, call: str) -> tuple[Tensor, Tensor]:
    known = _called(call)
    conv = ConvSpec.of(known.spec)
    shape = (x.shape[0], conv.out_channels, *conv.geometry.out_sizes(x.shape[2:]))
    y = shift.like(x, shape) if _is_last_output(x, _stored(weight, free_weight)) else x.new_empty(shape)
    return y, torch.empty_like(y, dtype=torch.uint8) if known.keep else y.new_empty(0, dtype=torch.uint8)


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, free_weight: Any, winners: Any, call: str, need_x: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = shift.like(x, x.shape) if shift.is_last(x) else x.new_empty(x.shape)
    dw, dfree = (
        torch.empty_like(w) if need_weights and w is not None else x.new_empty(0) for w in (weight, free_weight)
    )
    return dx if need_x else x.new_empty(0), dw, dfree


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, free_weight, _, ctx.call = inputs
    assert _called(ctx.call).activation is None, "an op that is differentiated has no activation"
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, free_weight, output[1])


def _gradients(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, free_weight, winners = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need_weights = needs[1] or needs[2]
    dbias = dy.sum((0, *range(2, dy.ndim))) if needs[3] else None
    if torch.is_grad_enabled():  # for second derivatives
        spec = ConvSpec.of(_called(ctx.call).spec)
        dx, dws = reference.conv_vjp(dy, x, spec, _stored(weight, free_weight), needs[0], need_weights)
        dw, dfree = (*(dws or ()), None, None)[:2]
    else:
        is_plain = are_plain(dy) and not (transforms_are_active() or is_mapped(dy))
        backward = _backward if is_plain else torch.ops.tritonsym.conv_backward
        dx, dw, dfree = backward(dy, x, weight, free_weight, winners, ctx.call, needs[0], need_weights)
    return dx if needs[0] else None, dw if needs[1] else None, dfree if needs[2] else None, dbias, None


_conv_op.register_autograd(_gradients, setup_context=_setup)


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    call = _called(args[4])
    conv = ConvSpec.of(call.spec)

    def function(x: Tensor, weight: Tensor, free_weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return reference.conv(x, reference.expand(conv, _stored(weight, free_weight)), bias, conv)

    y = reference.activate(torch.vmap(function, in_dims[:4])(*args[:4]), call.activation)
    return (y, y.new_empty(info.batch_size, 0, dtype=torch.uint8)), (0, 0)


_conv_op.register_vmap(_vmap)


@_backward_op.register_vmap
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    conv, need_x, need_weights = ConvSpec.of(_called(args[5]).spec), *args[-2:]

    def gradients(dy: Tensor, x: Tensor, weight: Tensor, free_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        dx, dws = reference.conv_vjp(dy, x, conv, _stored(weight, free_weight), need_x, need_weights)
        nothing = dy.new_empty(0)
        dw, dfree, *_ = [*(dws or [nothing]), nothing]
        return nothing if dx is None else dx, dw, dfree

    return torch.vmap(gradients, in_dims[:4])(*args[:4]), (0, 0, 0)


class _Conv(torch.autograd.Function):
    """The op in eager mode, without the dispatcher's overhead and with forward-mode derivatives."""

    forward = staticmethod(_fprop)
    backward = staticmethod(_gradients)
    vmap = staticmethod(_vmap)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _setup(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4], output[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        """dy: y is linear in x, the weights and the bias; a pooled orbit takes the mean over the images that won."""
        x, weight, free_weight, _, winners = ctx.saved_tensors
        spec = ConvSpec.of(_called(ctx.call).spec)
        images = replace(spec, pool=None)
        stored = _stored(weight, free_weight)
        moved = [
            torch.zeros_like(w) if t is None else t
            for w, t in zip((weight, free_weight), tangents[1:3], strict=True)
            if w is not None
        ]
        dy = reference.conv(x, reference.expand(images, moved), None, images)
        if tangents[0] is not None:
            dy = dy + reference.conv(tangents[0], reference.expand(images, stored), None, images)
        if spec.pool:
            count = len(spec.blocks[0].images)
            bits = torch.stack([winners.unflatten(1, (spec.groups, -1)) >> i & 1 for i in range(count)], 2)
            dy = ((dy.unflatten(1, (spec.groups, count, -1)) * bits).sum(2) / bits.sum(2)).flatten(1, 2)
        if tangents[3] is not None:
            dy = dy + tangents[3][(...,) + (None,) * (x.ndim - 2)]
        return dy, None

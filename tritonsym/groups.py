"""How group convolutions are computed and differentiated.

The reference is plain torch ops; the path `fold` is one opaque op (``torch.ops.tritonsym.group_conv``), which compilers
leave as it is. Second derivatives and `torch.func` transforms use the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsym import fold, plan
from tritonsym._compat import constant, is_exporting, is_mapped, transforms_are_active
from tritonsym.fold import GroupSpec
from tritonsym.ops import _has_static_sizes, _is_eager, are_plain, check_beside
from tritonsym.packing import check_tensor
from tritonsym.plan import computing_dtype, needs_gradient
from tritonsym.reference import activate, far_padded
from tritonsym.shift import is_last, like
from tritonsym.spec import out_sizes


def group_conv(
    where: str, text: str, x: Tensor, psi: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """y = act(conv(x) + bias), on the path that the plan chooses.

    Args:
        where: the function or layer that error messages name.
        text: `GroupSpec.text`.
        x: (N, |G| C, *sizes) or (|G| C, *sizes).
        psi: (O, C / groups, |G|, *kernel).
        bias: (O,) or None.
    """
    check_tensor(where, "x", x)
    check_beside(where, x, weight=psi, bias=bias)
    spec = spec_of(text)
    batched = x[None] if x.ndim == len(spec.geometry.kernel_size) + 1 else x
    axes = _axes(where, text, batched, psi, bias)
    if axes == 0:
        y = fold.reference(batched, psi, bias, spec, _is_eager(x, psi))
    else:
        y = _folded(far_padded(batched, spec.geometry.extra), psi, bias, unpadded(text), axes)
    return activate(y if batched is x else y[0], activation)


def group_linear(
    where: str, text: str, x: Tensor, psi: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """`group_conv` without space: x (..., |G| C), psi (O, C, |G|); `text` describes kernels of size 1."""
    check_tensor(where, "x", x)
    check_beside(where, x, weight=psi, bias=bias)
    spec = spec_of(text)
    ones = (1,) * len(spec.geometry.kernel_size)
    if psi.ndim == 3 and (x.ndim == 0 or x.shape[-1] != spec.order * psi.shape[1]):
        raise ValueError(f"{where}: x must have shape (..., {spec.order * psi.shape[1]}), got {tuple(x.shape)}")
    stored = psi.reshape(*psi.shape, *ones)
    rows = x.reshape(-1, x.shape[-1], *ones)
    axes = _axes(where, text, rows, stored, bias)
    if axes == 0:
        dense = fold.expand(stored, spec, eager=_is_eager(x, psi)).flatten(1)
        y = F.linear(x, dense, None if bias is None else fold.expand_bias(bias, spec))
    else:
        y = _folded(rows, stored, bias, text, axes).reshape(*x.shape[:-1], -1)
    return activate(y, activation)


def _folded(x: Tensor, psi: Tensor, bias: Tensor | None, text: str, axes: int) -> Tensor:
    dtype = computing_dtype(x)  # the autocast dtype under autocast
    op: Any = fold.fprop
    if torch.compiler.is_compiling():
        op = _op
    elif needs_gradient(x, psi, bias):
        op = _Folded.apply
    y: Tensor = op(x.to(dtype), psi.to(dtype), None if bias is None else bias.to(dtype), text, axes)
    return y


@constant
def spec_of(text: str) -> GroupSpec:
    return GroupSpec.of(text)


@constant
def unpadded(text: str) -> str:
    return GroupSpec.of(text).unpadded


def check(where: str, spec: GroupSpec, x: Sequence[int], psi: Sequence[int], bias: Sequence[int] | None) -> None:
    """Raise a ValueError that names `where`, unless these shapes fit."""
    kernel, order, groups = spec.geometry.kernel_size, spec.order, spec.groups
    if len(psi) != 3 + len(kernel) or tuple(psi[2:]) != (order, *kernel) or psi[0] % groups:
        expected = f"(fields out, fields in / groups, {', '.join(map(str, (order, *kernel)))})"
        raise ValueError(f"{where}: weight has shape {tuple(psi)}, expected {expected} with groups={groups}")
    channels = order * groups * psi[1]
    if len(x) != len(kernel) + 2 or x[1] != channels:
        raise ValueError(
            f"{where}: x has shape {tuple(x)}, expected {channels} channels ({channels // order} fields of "
            f"{order} elements of {spec.symmetry.name!r}) and {len(kernel)} spatial axes; a SymmetricConv of this "
            "symmetry makes such fields from an image"
        )
    if any(size < 1 for size in out_sizes(spec.geometry, x[2:])):
        raise ValueError(
            f"{where}: the kernel {kernel} (dilation {spec.geometry.dilation}) exceeds the padded input, x "
            f"{tuple(x)}; pad more"
        )
    if bias is not None and tuple(bias) != (psi[0],):
        raise ValueError(f"{where}: bias must have shape ({psi[0]},), one value per field, got {tuple(bias)}")


def problem(
    where: str,
    text: str,
    x: Sequence[int],
    psi: Sequence[int],
    bias: Sequence[int] | None,
    target: str,
    dtype: str,
    training: bool,
) -> plan.GroupProblem:
    """Check the shapes of a call, and return the problem to plan."""
    spec = GroupSpec.of(text)
    check(where, spec, x, psi, bias)
    sizes = tuple(n + e for n, e in zip(x[2:], spec.geometry.extra, strict=True))
    spec, fields = GroupSpec.of(unpadded(text)), x[1] // spec.order
    return plan.GroupProblem(where, target, dtype, spec, x[0], fields, psi[0], sizes, training)


@lru_cache(maxsize=8192)
def _planned(arguments: tuple[Any, ...], *switches: Any) -> int:
    return plan._plan(problem(*arguments), *switches).axes


@constant
def _traced(*arguments: Any) -> int:
    return _planned(arguments, *plan.switches())


def _axes(where: str, text: str, x: Tensor, psi: Tensor, bias: Tensor | None) -> int:
    """How many axes to fold; 0 means the reference."""
    training = needs_gradient(x, psi, bias)
    form = (tuple(map(index, psi.shape)), None if bias is None else tuple(map(index, bias.shape)))
    rest = (x.device.type, plan.dtype_name(x), training)
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    is_static = torch.compiler.is_compiling() and not is_exporting() and _has_static_sizes(x)
    if (is_traced and not is_static) or transforms_are_active() or not are_plain(x, psi):
        check(where, spec_of(text), x.shape, *form)
        return 0
    arguments = (where, text, tuple(map(index, x.shape)), *form, *rest)
    return _traced(*arguments) if is_traced else _planned(arguments, *plan.switches())


@torch.library.custom_op("tritonsym::group_conv", mutates_args=())
def _op(x: Tensor, psi: Tensor, bias: Tensor | None, spec: str, axes: int) -> Tensor:
    return fold.fprop(x, psi, bias, spec, axes)


@_op.register_fake
def _(x: Tensor, psi: Tensor, bias: Tensor | None, spec: str, axes: int) -> Tensor:
    conv = GroupSpec.of(spec)
    shape = (x.shape[0], conv.order * psi.shape[0], *conv.geometry.out_sizes(x.shape[2:]))
    return like(x, shape) if is_last(x) else x.new_empty(shape)


@torch.library.custom_op("tritonsym::group_conv_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, psi: Tensor, spec: str, axes: int, need_x: bool, need_psi: bool
) -> tuple[Tensor, Tensor]:
    return fold.backward(dy, x, psi, spec, axes, need_x, need_psi)


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, psi: Tensor, spec: str, axes: int, need_x: bool, need_psi: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if need_x else x.new_empty(0), psi.new_empty(psi.shape if need_psi else 0)


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, psi, _, spec, axes = inputs
    ctx.options = spec, axes
    ctx.save_for_backward(x, psi)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, psi = ctx.saved_tensors
    need_x, need_psi, need_bias, *_ = ctx.needs_input_grad
    spec, axes = ctx.options
    dbias = None
    if need_bias:
        dbias = dy.sum([0, *range(2, dy.ndim)]).unflatten(0, (GroupSpec.of(spec).order, -1)).sum(0)
    if torch.is_grad_enabled() or is_mapped(dy):
        pull = torch.func.vjp(lambda x, psi: fold.reference(x, psi, None, GroupSpec.of(spec)), x, psi)[1]
        dx, dpsi = pull(dy)
    else:
        backward = fold.backward if are_plain(dy) else _backward_op
        dx, dpsi = backward(dy, x, psi, spec, axes, need_x, need_psi)
    return dx if need_x else None, dpsi if need_psi else None, dbias, None, None


_op.register_autograd(_gradients, setup_context=_setup)


class _Folded(torch.autograd.Function):
    """`_op` with its gradients for eager mode, without the cost of the dispatcher."""

    forward = staticmethod(fold.fprop)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_gradients)

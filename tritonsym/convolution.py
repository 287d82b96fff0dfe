"""y = act(conv(x, images of the stored weights) + b) with derivatives of every order, by the path that a plan names.

The rows of the stored weights, (groups, R, C), are ordered as `shift.Conv` says. For the backward pass only x and the
rows are saved; d, the additions of dy, is computed once for both gradients. Derivatives of derivatives go through the
dense convolution, and so does the path 'reference', whose dense weight is gathered from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

from tritonsym import launch, reference, shift
from tritonsym.dispatch import computing_dtype, needs_gradient
from tritonsym.shift import Conv

if TYPE_CHECKING:
    from tritonsym.dispatch import Plan


def conv(
    x: Tensor, rows: Tensor, bias: Tensor | None, layer: Conv, plan: Plan, activation: str | None = None
) -> Tensor:
    """x (N, groups C, *sizes), rows (groups, R, C), a bias of every output filter -> y.

    Kernels apply the activation if nothing will be differentiated; else torch does, which keeps what it needs.
    """
    dtype = computing_dtype(x)  # as autocast would
    x, rows, bias = x.to(dtype), rows.to(dtype), None if bias is None else bias.to(dtype)
    if layer.pool and not (plan.path == "shift" and plan.tiles):
        sizes = (layer.groups, len(layer.blocks[0].images), -1)
        y = conv(x, rows, None, replace(layer, pool=None), plan)
        y = reference.reduce_images(y, bias, sizes, layer.pool)
    elif plan.tiles and not needs_gradient(x, rows, bias):
        return launch.forward(x, rows, bias, layer.text, plan.path, plan.flat_tiles, activation, False)[0]
    else:
        y, _ = _Conv.apply(x, rows, bias, layer, plan.path, plan.flat_tiles)
    return reference.activate(y, activation)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, rows: Tensor, bias: Tensor | None, layer: Conv, path: str, tiles: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        if tiles:
            return launch.forward(x, rows, bias, layer.text, path, tiles, None, layer.pool is not None)
        return shift.forward(x, rows, bias, layer), x.new_empty(0, dtype=torch.uint8)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, rows, _, *ctx.options = inputs
        _, winners = output
        ctx.mark_non_differentiable(winners)
        ctx.save_for_backward(x, rows, winners)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> Any:
        x, rows, winners = ctx.saved_tensors
        layer, path, tiles = ctx.options
        need_x, need_rows, need_bias, *_ = ctx.needs_input_grad
        dbias = dy.sum((0, *range(2, dy.ndim))) if need_bias else None
        if torch.is_grad_enabled() or _is_mapped(dy):
            dx, drows = _differentiable(dy, x, rows, layer, need_x, need_rows)
        elif not tiles:
            dx, drows = shift.backward(dy, x, rows, layer, need_x, need_rows)
        else:
            dx, drows = launch.backward(dy, x, rows, winners, layer.text, path, tiles, need_x, need_rows)
        return dx if need_x else None, drows if need_rows else None, dbias, None, None, None


def _is_mapped(gradient: Tensor) -> bool:
    """Whether a backward pass is mapped over gradients, by `torch.func` or ``is_grads_batched``, as Jacobians are."""
    return torch._C._are_functorch_transforms_active() or torch._C._dispatch_keys(gradient).has(_MAPPED)


_MAPPED: Any = torch._C._parse_dispatch_key("Batched")


def _differentiable(
    dy: Tensor, x: Tensor, rows: Tensor, layer: Conv, need_x: bool, need_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and rows, themselves differentiable."""
    inputs = [t for t, need in ((x, need_x), (rows, need_rows)) if need]
    if not inputs:
        return None, None
    with torch.enable_grad():
        y = dense_conv(x, expand_rows(rows, layer), None, layer)
        found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return next(found) if need_x else None, next(found) if need_rows else None


# --- the dense weight -------------------------------------------------------------------------------------------------


def dense_conv(x: Tensor, dense: Tensor, bias: Tensor | None, layer: Conv) -> Tensor:
    """conv(x) + bias by torch's convolution with the expanded weight."""
    g = layer.geometry
    if g.transposed:
        transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
        return transposed(x, dense, bias, g.stride, g.padding, g.output_padding, layer.groups, g.dilation)
    own = bias if layer.pool is None else None
    if dense.is_mkldnn:
        packed = _onednn._convolution_pointwise.default
        if own is not None:
            own = own.to(x.dtype).contiguous()  # it ignores strides, and autocast ignores it
        y = packed(x, dense, own, g.padding, g.stride, g.dilation, layer.groups, "none", [], "")
    else:
        plain: Any = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
        y = plain(x, dense, own, g.stride, g.padding, g.dilation, layer.groups)
    if layer.pool is None:
        return y
    return reference.reduce_images(y, bias, (layer.groups, len(layer.blocks[0].images), -1), layer.pool)


def can_pack(x: Tensor, layer: Conv) -> bool:
    """Whether `pack` is of use for x: oneDNN computes the convolution, and in the memory format of x."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and shift.is_last(x)
        and x.is_contiguous(memory_format=formats[x.ndim])
        and not layer.geometry.transposed
        and layer.out_channels > 0
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def pack(dense: Tensor, layer: Conv, shape: Sequence[int]) -> Tensor:
    """The dense weight in the blocks of channels that oneDNN wants for channels-last inputs of this shape, and else
    brings it to in every call. Only for inference (what Inductor's freezing does)."""
    g = layer.geometry
    return _onednn._reorder_convolution_weight.default(dense, g.padding, g.stride, g.dilation, layer.groups, shape)


_onednn: Any = torch.ops.mkldnn


def expand_rows(rows: Tensor, layer: Conv) -> Tensor:
    """The dense weight of rows (groups, R, C), differentiable any number of times."""
    entries = torch.tensor(layer.table, device=rows.device)
    sign = entries.sign().to(rows.dtype)[..., None]
    dense = rows[:, (entries.abs() - 1).clamp(min=0)] * sign  # [G, O, K, C]
    dense = torch.where(sign == 0, 0, dense)  # also where a row is not finite
    return _contiguous(_from_lines(dense.flatten(0, 1).unflatten(1, layer.geometry.kernel_size), layer))


def expand(layer: Conv, last: bool, *weights: Tensor) -> Tensor:
    """The dense weight of the stored ones (see `stored_rows`), channels-last or not; not under `torch.func`."""
    lines = _to_lines(weights[0], layer) if len(weights) == 1 else torch.cat([_to_lines(w, layer) for w in weights])
    there, back, places = _sums(layer, len(weights) > 1, lines.device)
    if places is not None:  # small layers notice every op, and Python in the backward pass
        lines = torch.embedding(lines, places)
    else:
        lines = _AddUp.apply(lines, there, back).unflatten(0, (layer.filters, *layer.geometry.kernel_size))
    dense = _from_lines(lines, layer)
    if not last:
        return _contiguous(dense)
    return shift.channels_last(dense) if layer.geometry.transposed else dense


def _contiguous(dense: Tensor) -> Tensor:
    """A copy with plain strides: of a single channel, those that lines have make torch's convolution channels-last."""
    return dense.clone(memory_format=torch.contiguous_format)


class _AddUp(torch.autograd.Function):
    """Sums of lines, whose gradients are sums of lines: `back` is the adjoint of `there`."""

    @staticmethod
    def forward(ctx: Any, lines: Tensor, there: Sums, back: Sums) -> Tensor:
        ctx.sums = back, there
        return _add_up(lines, *there)

    @staticmethod
    def backward(ctx: Any, dlines: Tensor) -> Any:
        back, there = ctx.sums
        if _is_mapped(dlines) or fwAD._current_level >= 0:
            return _add_up_differentiably(dlines, *back), None, None
        return _AddUp.apply(dlines, back, there), None, None


def _to_lines(w: Tensor, layer: Conv) -> Tensor:
    """(F, C, *taps), or transposed (groups C, F / groups, *taps), as lines (F taps, C)."""
    if layer.geometry.transposed:
        w = w.reshape(layer.groups, w.shape[0] // layer.groups, *w.shape[1:])  # [groups, C, F / groups, *taps]
    return w.permute(0, *range(2, w.ndim), 1).flatten(0, -2)


def _from_lines(lines: Tensor, layer: Conv) -> Tensor:
    """The inverse of `_to_lines`, of lines (F, *taps, C)."""
    if layer.geometry.transposed:
        return lines.unflatten(0, (layer.groups, -1)).movedim(-1, 1).flatten(0, 1)
    return lines.permute(0, -1, *range(1, lines.ndim - 1))


def _add_up(source: Tensor, index: Tensor, starts: Tensor, signs: Tensor | None) -> Tensor:
    """target[o] = sum_i signs[i] source[index[i]], where sum o takes i from starts[o] to starts[o + 1]."""
    if signs is None and index.shape == starts.shape:  # one term each: only with signs a sum may be empty
        return source.index_select(0, index)
    if source.shape[1] == 0:
        return source.new_empty(len(starts), 0)
    signs = None if signs is None else signs.to(source.dtype)
    return torch.embedding_bag(source, index, starts, False, 0, False, signs)[0]


def _add_up_differentiably(source: Tensor, index: Tensor, starts: Tensor, signs: Tensor | None) -> Tensor:
    """The same in ops that can be differentiated again, and mapped by `torch.func`."""
    terms = source[index] if signs is None else source[index] * signs[:, None].to(source.dtype)
    ends = torch.cat([starts[1:], starts.new_tensor([len(index)])])
    into = torch.repeat_interleave(torch.arange(len(starts), device=index.device), ends - starts)
    return terms.new_zeros(len(starts), source.shape[1]).index_add(0, into, terms)


Sums = tuple[Tensor, Tensor, Tensor | None]  # arguments of `_add_up`


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _sums(layer: Conv, one_each: bool, device: torch.device) -> tuple[Sums, Sums, Tensor | None]:
    """From the lines of the stored weights to those of the dense one, and the adjoint.

    On the CPU also, where every sum is one line, which: (filters, *taps).
    """
    stored, base = [], 0  # of every row of a group: its line in the first group, lines from one group to the next
    for block in layer.blocks:
        filters = block.filters if one_each else sum(block.filters for block in layer.blocks)
        for slot, u in product(range(block.slots), range(block.filters)):
            stored.append((base + u * block.slots + slot, filters * block.slots))
        base += block.filters * block.slots * (layer.groups if one_each else 1)
    there: list[list[tuple[int, int]]] = []  # of every line of the dense weight: terms (line, sign)
    for g, filter_ in product(range(layer.groups), layer.table):
        for entry in filter_:
            line, step = stored[abs(entry) - 1]
            there.append([(line + g * step, 1 if entry > 0 else -1)] if entry else [])
    back: list[list[tuple[int, int]]] = [[] for _ in range(layer.groups * layer.rows)]
    for place, terms in enumerate(there):
        for line, sign in terms:
            back[line].append((place, sign))
    is_signed = any(entry <= 0 for filter_ in layer.table for entry in filter_)

    def tensors(sums: list[list[tuple[int, int]]]) -> Sums:
        flat = [term for terms in sums for term in terms]
        index = torch.tensor([line for line, _ in flat], dtype=torch.int64, device=device)
        starts = torch.tensor([0, *accumulate(map(len, sums))][:-1], dtype=torch.int64, device=device)
        signs = torch.tensor([float(sign) for _, sign in flat], device=device)
        return index, starts, signs if is_signed else None

    sums = tensors(there)
    is_simple = device.type == "cpu" and not is_signed
    places = sums[0].unflatten(0, (layer.filters, *layer.geometry.kernel_size)) if is_simple else None
    return sums, tensors(back), places


# --- stored weights as rows -------------------------------------------------------------------------------------------


def stored_rows(layer: Conv, *weights: Tensor) -> Tensor:
    """(groups, R, C) of weights (filters, C, slots or *k), or transposed (groups C, filters / groups, *k).

    One weight holds the filters of all blocks, group by group, or there is one for every block.
    """
    filters = [block.filters for block in layer.blocks]
    parts = []
    for w, of in zip(weights, [filters] if len(weights) == 1 else [[count] for count in filters], strict=True):
        w = w.flatten(2).unflatten(0, (layer.groups, -1))
        w = w.permute(0, 3, 2, 1) if layer.geometry.transposed else w.permute(0, 3, 1, 2)  # [G, S, F, C]
        parts += [part.flatten(1, 2) for part in (w.split(of, 2) if len(of) > 1 else [w])]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()

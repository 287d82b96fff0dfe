"""Every layer in plain PyTorch: what the layers mean, and what every kernel is checked against.

Works on any device and in every dtype of torch's convolution and matmul; everything is differentiable to any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsym._compat import is_exporting_onnx
from tritonsym.packing import mirror, unpack
from tritonsym.spec import Block, ConvSpec, count_of
from tritonsym.symmetry import AXES, Element, TapOrbits

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def activate(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else ACTIVATIONS[activation](y)


# --- stored weights <-> dense weights ---------------------------------------------------------------------------------


def image(w: Tensor, g: Element) -> Tensor:
    """g w: quarter turns of the last two axes, then flips; at most one transposition and one flip."""
    axes = _flipped(g)
    w = w.transpose(-2, -1) if g.turns % 2 else w
    return w.flip(axes) if axes else w


def inverse_image(w: Tensor, g: Element) -> Tensor:
    """g^-1 w."""
    axes = _flipped(g)
    w = w.flip(axes) if axes else w
    return w.transpose(-2, -1) if g.turns % 2 else w


def _flipped(g: Element) -> tuple[int, ...]:
    """The axes that g flips after transposing the last two, which it does if its turns are odd."""
    turned = ((), (-2,), (-2, -1), (-1,))[g.turns]
    flips = [AXES[letter] for letter in g.flips]
    return tuple(axis for axis in (-3, -2, -1) if (axis in turned) != (axis in flips))


def expand(spec: ConvSpec, weights: Sequence[Tensor]) -> Tensor:
    """The dense filters of the stored weights: dense[first + u] = g untied(stored[u]) for all images of all blocks."""
    by_group, axis = zip(*(_by_group(w, spec) for w in weights), strict=True)
    at = axis[0]
    parts: dict[int, Tensor] = {}  # by first filter
    start, tied = 0, 0
    for block in spec.blocks:
        first = block.images[0][0]
        if block.orbits is not None:
            base = untie(by_group[tied], block.orbits, spec.geometry.kernel_size)
            tied += 1
            parts[first] = base
        else:  # stored filters follow one another in every layout
            base = by_group[-1].narrow(at, start, block.filters) if len(spec.blocks) > 1 else by_group[-1]
            if start == 0:
                parts[first] = by_group[-1]
            start += block.filters
        parts.update((there, image(base, g)) for there, g in block.images[1:])
    dense = torch.cat([parts[there] for there in sorted(parts)], at) if len(parts) > 1 else parts[0]
    return dense if spec.geometry.transposed or at == 0 else dense.flatten(0, 1)


#: Dense weights of at most this many values are looked up value by value; for more, the gradient is slow.
LOOKED_UP = 1 << 14


def look_up(text: str, weights: Sequence[Tensor]) -> Tensor:
    """`expand` for eager calls: on the CPU by one look-up in a cached table, where that beats going image by image."""
    w, *others = weights
    by_tap = w.movedim(1, -1)
    is_first = w.is_contiguous()
    last = w.ndim > 3 and not is_first and by_tap.is_contiguous()
    on_cpu = w.device.type == "cpu" and w.is_floating_point() and (last or is_first)
    table = None if others or not on_cpu else _places(text, w.shape, last)
    if table is None:
        return expand(ConvSpec.of(text), weights)
    places, of_rows = table
    if not of_rows:
        return by_tap.take(places).movedim(-1, 1) if last else w.take(places)
    dense = torch.embedding(by_tap.flatten(0, -2), places).movedim(-1, 1)
    return dense if last else dense.contiguous()


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _places(text: str, shape: Sequence[int], last: bool) -> tuple[Tensor, bool] | None:
    """Where in the stored weight each part of the dense one is found; None if a look-up is slower, or signs are needed.

    The parts are values if there are few, else rows of channels (True); a contiguous weight is looked up by rows only
    if its filters have many images.
    """
    spec, axes = ConvSpec.of(text), tuple(shape[2:])
    if 0 in shape or all(len(block.images) == 1 and block.orbits is None for block in spec.blocks):
        return None
    if bool((expand(spec, [torch.ones(shape, dtype=torch.int8)]) != 1).any()):
        return None
    if math.prod(shape) <= LOOKED_UP:
        number = torch.arange(math.prod(shape))
        number = number.view(shape[0], *axes, shape[1]).movedim(-1, 1) if last else number.view(shape)
        values = expand(spec, [number])
        if values.numel() <= LOOKED_UP:
            return (values.movedim(1, -1) if last else values).contiguous(), False
    if spec.geometry.transposed or not (last or spec.filters >= 4 * spec.stored_filters):
        return None
    rows = torch.arange(math.prod(shape) // shape[1]).view(shape[0], 1, *axes)
    return expand(spec, [rows])[:, 0].contiguous(), True


def _by_group(w: Tensor, spec: ConvSpec) -> tuple[Tensor, int]:
    """Weights with an axis for the filters of one group, and that axis; the groups have the axis before it."""
    if spec.geometry.transposed:
        return w, 1
    return (w, 0) if spec.groups == 1 else (w.unflatten(0, (spec.groups, w.shape[0] // spec.groups)), 1)


def project(spec: ConvSpec, dense: Tensor) -> list[Tensor]:
    """The stored weights whose expansion is nearest to `dense` in the Frobenius norm: means over images and tap orbits.

    The mean is one image plus the mean difference from it, so that an expanded weight gives its stored bits back.
    """
    by_group, axis = _by_group(dense, spec)
    stored = []
    for block in spec.blocks:
        base = by_group.narrow(axis, block.images[0][0], block.filters)
        difference = torch.zeros_like(base)
        for first, g in block.images[1:]:
            difference = difference + (inverse_image(by_group.narrow(axis, first, block.filters), g) - base)
        base = base + difference / len(block.images)
        stored.append(
            project_ties(base, block.orbits, len(spec.geometry.kernel_size)) if block.orbits is not None else base
        )
    return _joined(spec, stored, axis)


def rescale(spec: ConvSpec, dense: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The stored weights, scaled so that the images of a filter have the root-mean-square norm of those in `dense`.

    Filters that the symmetry reduces to rounding errors are not scaled.
    """
    before, after = (_norms(spec, w) for w in (dense, expand(spec, weights)))
    factor = (before / after).sqrt()
    rounding = torch.finfo(dense.dtype).eps
    factor = torch.where(after > rounding * before, factor, torch.ones_like(factor)).unflatten(0, (spec.groups, -1))
    factors = _by_weight(spec, factor.split([block.filters for block in spec.blocks], 1), 1)
    scaled = []
    for stored, f in zip(weights, factors, strict=True):
        if spec.geometry.transposed:  # (groups C, filters, *kernel)
            f = f.repeat_interleave(stored.shape[0] // spec.groups, 0)
        else:
            f = f.flatten()
        scaled.append((stored * f.reshape(*f.shape, *[1] * (stored.ndim - f.ndim))).to(stored.dtype))
    return scaled


def _norms(spec: ConvSpec, dense: Tensor) -> Tensor:
    """Squared norms of the dense filters, averaged over the images of every stored filter."""
    wide = dense.abs().to(torch.float64).contiguous().unflatten(0, (spec.groups, -1))
    axes = (1, *range(3, wide.ndim)) if spec.geometry.transposed else tuple(range(2, wide.ndim))
    return project_bias(wide.square().sum(axes).flatten(), spec)


def keep(spec: ConvSpec, dense: Tensor) -> list[Tensor]:
    """The stored weights taken from `dense` as they are: first images, and the first tap of every tap orbit."""
    by_group, axis = _by_group(dense, spec)
    bases = [(b.orbits, by_group.narrow(axis, b.images[0][0], b.filters)) for b in spec.blocks]
    stored = [w.flatten(axis + 2)[..., _first_taps(ties)] if ties is not None else w for ties, w in bases]
    return _joined(spec, stored, axis)


def _joined(spec: ConvSpec, stored: Sequence[Tensor], axis: int) -> list[Tensor]:
    """The stored filters of all blocks, joined into tensors of the shapes `ConvSpec.weight_shapes`."""
    found = _by_weight(spec, stored, axis)
    return found if spec.geometry.transposed or axis == 0 else [w.flatten(0, 1) for w in found]


def _by_weight(spec: ConvSpec, of_block: Sequence[Tensor], axis: int) -> list[Tensor]:
    """A tensor per block as one per stored weight: tied blocks have their own, all others share the last."""
    tied = [t for t, block in zip(of_block, spec.blocks, strict=True) if block.orbits is not None]
    plain = [t for t, block in zip(of_block, spec.blocks, strict=True) if block.orbits is None]
    return [*tied, torch.cat(plain, axis)] if len(plain) > 1 else [*tied, *plain]


def _first_taps(orbits: TapOrbits) -> list[int]:
    return [orbits.slot.index(s) for s in range(count_of(orbits))]


def expand_bias(stored: Tensor, spec: ConvSpec) -> Tensor:
    """One bias per stored filter -> one per output filter."""
    by_group = stored.unflatten(0, (spec.groups, -1))
    parts: dict[int, Tensor] = {}
    start = 0
    for block in spec.blocks:
        base = by_group.narrow(1, start, block.filters)
        parts.update((first, base) for first, _ in block.images)
        start += block.filters
    return torch.cat([parts[at] for at in sorted(parts)], 1).flatten()


def project_bias(bias: Tensor, spec: ConvSpec) -> Tensor:
    """The mean over every orbit: the nearest shared bias."""
    by_group = bias.unflatten(0, (spec.groups, -1))

    def mean(block: Block) -> Tensor:
        images = [by_group.narrow(1, first, block.filters) for first, _ in block.images]
        return images[0] + sum((b - images[0] for b in images[1:]), torch.zeros_like(images[0])) / len(images)

    return torch.cat([mean(block) for block in spec.blocks], 1).flatten()


def untie(stored: Tensor, orbits: TapOrbits, kernel_size: Sequence[int]) -> Tensor:
    """dense[..., k] = sign[k] stored[..., slot[k]], and 0 where the signs force zero.  (..., S) -> (..., *k)"""
    slot = [count_of(orbits) if s < 0 else s for s in orbits.slot]
    if count_of(orbits) in slot:
        stored = F.pad(stored, (0, 1))
    dense = stored.index_select(-1, torch.tensor(slot, device=stored.device))
    if -1 in orbits.sign:
        dense = dense * torch.tensor([s or 1 for s in orbits.sign], dtype=stored.dtype, device=stored.device)
    return dense.unflatten(-1, tuple(kernel_size))


def project_ties(dense: Tensor, orbits: TapOrbits, ndim: int) -> Tensor:
    """The stored values whose expansion is nearest to `dense`: the signed mean over every tap orbit."""
    live = [k for k, s in enumerate(orbits.slot) if s >= 0]
    device = dense.device
    sign = torch.tensor([orbits.sign[k] for k in live], dtype=dense.dtype, device=device)
    slot = torch.tensor([orbits.slot[k] for k in live], device=device)
    taps = dense.flatten(-ndim)
    base = taps.index_select(-1, torch.tensor(_first_taps(orbits), device=device)).detach()
    taps = taps.index_select(-1, torch.tensor(live, device=device)) * sign
    # base is detached because its gradients cancel: it is both added and subtracted
    total = torch.zeros_like(base).index_add(-1, slot, taps - base.index_select(-1, slot))
    return base + total / torch.tensor(orbits.multiplicity, device=device)


def orbit_mean(w: Tensor, spec: ConvSpec, scale: int | None) -> Tensor:
    """scale times the mean over every tap orbit of w, (U, C, *k) -> (U, C, orbits); w itself if scale is None."""
    orbits = spec.blocks[0].orbits
    if scale is None or orbits is None:
        return w
    mean = project_ties(w, orbits, len(spec.geometry.kernel_size))
    return mean if scale == 1 else mean * scale


def block_filters(spec: ConvSpec, weights: Sequence[Tensor]) -> list[Tensor]:
    """The stored filters of every block, as views (groups, filters, C, *kernel), or (.., orbits) where tied."""
    by_group = [w.unflatten(0, (spec.groups, w.shape[0] // spec.groups)) for w in weights]
    plain = [block.filters for block in spec.blocks if block.orbits is None]
    shared: Any = iter(())
    if plain:
        last = by_group[-1].transpose(1, 2) if spec.geometry.transposed else by_group[-1]
        shared = iter(last.split(plain, 1) if len(plain) > 1 else [last])
    tied = iter(by_group)
    return [next(shared if block.orbits is None else tied) for block in spec.blocks]


def block_rows(spec: ConvSpec, weights: Sequence[Tensor]) -> list[Tensor]:
    """`block_filters` as (groups, slots, filters, C)."""
    return [filters.flatten(3).permute(0, 3, 1, 2) for filters in block_filters(spec, weights)]


def block_gradients(spec: ConvSpec, drows: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The adjoint of `block_rows`: the gradients of the weights, in these shapes."""
    of_block = [d.permute(0, 2, 3, 1) for d in drows]  # [G, F, C, S]
    found = _by_weight(spec, of_block, 1)
    if spec.geometry.transposed and any(block.orbits is None for block in spec.blocks):
        found[-1] = found[-1].transpose(1, 2)
    return [d.reshape(tuple(shape)) for d, shape in zip(found, shapes, strict=True)]


# --- layers -----------------------------------------------------------------------------------------------------------


def conv(x: Tensor, dense: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """conv(x) + bias by torch's convolution with the dense filters; with `spec.pool` the extremum over the images."""
    g, n = spec.geometry, x.ndim - 3
    if g.transposed:
        transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n]
        return transposed(x, dense, bias, g.stride, g.padding, g.extra, spec.groups, g.dilation)
    plain: Any = (F.conv1d, F.conv2d, F.conv3d)[n]
    own = None if spec.pool else bias
    y = plain(far_padded(x, g.extra), dense, own, g.stride, g.padding, g.dilation, spec.groups)
    return pool(y, bias, spec) if spec.pool else y


def conv_vjp(
    dy: Tensor, x: Tensor, spec: ConvSpec, weights: Sequence[Tensor], need_x: bool, need_weights: bool
) -> tuple[Tensor | None, list[Tensor] | None]:
    """The gradients of ``conv(x, expand(spec, weights), None, spec)`` with respect to x and the weights."""
    if spec.pool:
        _, pull_all = torch.func.vjp(lambda x, *w: conv(x, expand(spec, w), None, spec), x, *weights)  # type: ignore[misc]
        dx, *dws = pull_all(dy)
        return dx, dws
    dense, pull = torch.func.vjp(lambda *w: expand(spec, w), *weights)  # type: ignore[misc]
    g = spec.geometry
    extra = list(g.extra) if g.transposed else [0] * len(g.extra)
    padded = x if g.transposed else far_padded(x, g.extra)
    sizes = (list(g.stride), list(g.padding), list(g.dilation), g.transposed, extra, spec.groups)
    needs = [need_x, need_weights, False]
    dx, ddense, _ = torch.ops.aten.convolution_backward(dy, padded, dense, None, *sizes, needs)
    if need_x and not g.transposed:
        dx = far_padded(dx, [-e for e in g.extra])
    return dx if need_x else None, list(pull(ddense)) if need_weights else None


def far_padded(x: Tensor, extra: Sequence[int]) -> Tensor:
    """x with `extra` zeros added on the far side of every axis, or cropped there if negative."""
    return F.pad(x, [side for e in reversed(extra) for side in (0, e)]) if any(extra) else x


def pool(y: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """The maximum or minimum over the images of every filter, plus the bias, in the same memory format."""
    channels = y.ndim - 1 if not y.is_contiguous() else 1  # split and reduce the channels where they lie
    images = y.movedim(1, channels).unflatten(channels, (spec.groups, len(spec.blocks[0].images), -1))
    pooled = images.amax(channels + 1) if spec.pool == "max" else images.amin(channels + 1)
    pooled = pooled.flatten(channels, channels + 1).movedim(channels, 1)
    return pooled if bias is None else pooled + bias.to(pooled.dtype)[(...,) + (None,) * (y.ndim - 2)]


def symmetric_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None = None, skew: bool = False
) -> Tensor:
    """y = act(x S + b)."""
    matrix = unpack(packed, skew=skew)
    return activate(F.linear(x, matrix.mT if skew else matrix, bias), activation)


def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float, mirrored: bool = True) -> Tensor:
    """The lower triangle of beta a + alpha x x^T, mirrored.  x (..., m, k), a (..., m, m) or None."""
    if a is None:
        c = x @ x.mT
        c = c if alpha == 1 else alpha * c
    else:
        rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        c = torch.baddbmm(a.reshape(rows.shape[0], *a.shape[-2:]), rows, rows.mT, beta=beta, alpha=alpha)
        c = c.reshape(a.shape)
    return mirror(c) if mirrored else c


def global_conv1d(
    x: Tensor, center: Tensor, surround: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """y[n, :, i] = act(W_c x[n, :, i] + W_s sum_{j != i} x[n, :, j] + b).

    Computed as (W_c - W_s) x[n, :, i] + (W_s sum_j x[n, :, j] + b): one pass over the positions. The sum is
    float32, because over many positions it may overflow 16 bits where y does not.
    """
    y = (center - surround) @ x
    wide = torch.promote_types(y.dtype, torch.float32)
    if y.dtype == wide:
        return add_all_positions(y, x, surround, bias, activation, wide)
    with torch.autocast(x.device.type, enabled=False):
        return add_all_positions(y, x, surround, bias, activation, wide)


def add_all_positions(
    y: Tensor,
    x: Tensor,
    surround: Tensor,
    bias: Tensor | None,
    activation: str | None,
    wide: torch.dtype,
) -> Tensor:
    """act(y + W_s sum_j x[n, :, j] + b), in the dtype of y; the sum is of dtype `wide`."""
    rest = F.linear(x.sum(-1, dtype=wide), surround.to(wide), None if bias is None else bias.to(wide))
    return activate(y + rest.to(y.dtype)[..., None], activation)


def topk_pool1d(x: Tensor, k: int) -> Tensor:
    """The k largest values along the last axis, in descending order."""
    return x.topk(k, dim=-1).values


# --- re-orderings of the inputs ---------------------------------------------------------------------------------------

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def reorder(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """All re-orderings of x along `dim`, stacked along the batch: (B, ...) -> (G B, ...).

    Every sample is first brought to the re-ordering that is smallest in a fixed total order of its bits. Re-ordered
    samples therefore give the very same batch, and any deterministic function of it gives bitwise equal results, even
    where a matrix product rounds a row differently at another place in the batch.
    """
    count, n = order.shape
    batch = x.shape[0]
    rows = x.movedim(dim, 1)  # [B, n, ...]
    if torch.jit.is_tracing() or is_exporting_onnx():  # n is a constant there: reshape raises for any other
        rows = rows.reshape(batch, n, *rows.shape[2:])
        return rows[:, order].transpose(0, 1).flatten(0, 1).movedim(1, dim)
    index = order.expand(batch, count, n)
    if x.numel():
        smallest = order[_smallest(rows.detach(), order)]  # [B, n]
        index = smallest[:, order]  # index[b, g, i] = smallest[b, order[g, i]]
    index = index + n * torch.arange(batch, device=x.device)[:, None, None]
    picked = rows.flatten(0, 1).index_select(0, index.transpose(0, 1).flatten())  # [G B n, ...]
    return picked.unflatten(0, (count * batch, n)).movedim(1, dim)


def _smallest(rows: Tensor, order: Tensor) -> Tensor:
    """For every sample of rows [B, n, ...], the g whose re-ordering is lexicographically smallest.  [B]"""
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    bits = rows.contiguous().view(_BITS[rows.element_size()])  # bits order NaN and -0.0, too
    images = bits[:, order].flatten(2)  # [B, G, M]
    best = torch.arange(order.shape[0], device=rows.device).expand(rows.shape[0], -1)
    while best.shape[1] > 1:  # a tournament; with an odd number one candidate plays twice
        half = (best.shape[1] + 1) // 2
        a, b = best[:, :half], best[:, -half:]
        left, right = (images.gather(1, c[..., None].expand(-1, -1, images.shape[2])) for c in (a, b))
        first = (left != right).to(torch.uint8).argmax(-1, keepdim=True)
        less = left.gather(-1, first) <= right.gather(-1, first)
        best = torch.where(less[..., 0], a, b)
    return best[:, 0]


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda y: y.amax(0),
    "min": lambda y: y.amin(0),
    "mean": lambda y: y.mean(0),
    "sum": lambda y: y.sum(0),
    "logsumexp": lambda y: y.logsumexp(0),
}


def reduce_orders(y: Tensor, count: int, reduce: str) -> Tensor:
    """Reduce the `count` re-orderings that `reorder` stacked along the batch: (G B, ...) -> (B, ...)."""
    return REDUCTIONS[reduce](y.unflatten(0, (count, y.shape[0] // count)))

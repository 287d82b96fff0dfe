"""Every layer in plain PyTorch: what the layers mean, and what every kernel is checked against.

Works on any device and for every dtype the torch convolution or matmul has; everything is differentiable to any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsym.packing import mirror, unpack
from tritonsym.symmetry import AXES, Element, FilterLayout, Symmetry, TapOrbits, tap_orbits

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def activate(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else ACTIVATIONS[activation](y)


def table(values: Sequence[int], like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """`torch.tensor(values)` on the device of `like`.

    Where a trace stands in for `like` it is built from its values one by one: `ExportedProgram.run_decompositions`
    loses tensor constants that an op body makes (pytorch pull 185090).
    """
    if type(like) in (Tensor, torch.nn.Parameter):
        return torch.tensor(values, dtype=dtype, device=like.device)
    return torch.cat([torch.full((1,), value, dtype=dtype, device=like.device) for value in values])


# --- stored weights <-> dense weights ---------------------------------------------------------------------------------


def image(w: Tensor, g: Element) -> Tensor:
    """g w: quarter turns of the last two axes, then flips."""
    if g.turns:
        w = torch.rot90(w, g.turns, (-2, -1))
    return w.flip([AXES[letter] for letter in g.flips]) if g.flips else w


def inverse_image(w: Tensor, g: Element) -> Tensor:
    """g^-1 w."""
    if g.flips:
        w = w.flip([AXES[letter] for letter in g.flips])
    return torch.rot90(w, -g.turns, (-2, -1)) if g.turns else w


def expand_orbits(stored: Tensor, layout: FilterLayout, transposed: bool = False) -> Tensor:
    """dense[o] = g(o) stored[u(o)] for every output filter o of the layout.

    stored is (stored, in/groups, *k) -> (out, in/groups, *k); with `transposed` (in, stored/groups, *k) ->
    (in, out/groups, *k), where every group of the layout has the same filters.
    """
    if not transposed:
        stored = stored.unflatten(0, (layout.groups, layout.stored_per_group))
    parts = [stored]
    for symmetry, u in layout.bases:
        base = stored.narrow(1, u.start, len(u))
        parts += [image(base, g) for g in symmetry.elements[1:]]
    dense = torch.cat(parts, 1)
    return dense if transposed else dense.flatten(0, 1)


def project_orbits(dense: Tensor, layout: FilterLayout, transposed: bool = False) -> Tensor:
    """The stored filters whose expansion is nearest to `dense`: stored[u] = mean_g g^-1 dense[g u].

    Nearest in the Frobenius norm. Taken as the base filter plus the mean difference from it, so that an expanded
    weight gives its stored bits back.
    """
    if not transposed:
        dense = dense.unflatten(0, (layout.groups, -1))
    at = layout.stored_per_group
    stored = []
    for symmetry, u in layout.bases:
        base = dense.narrow(1, u.start, len(u))
        difference = torch.zeros_like(base)
        for g in symmetry.elements[1:]:
            difference = difference + (inverse_image(dense.narrow(1, at, len(u)), g) - base)
            at += len(u)
        stored.append(base + difference / symmetry.order)
    stored.append(dense.narrow(1, layout.stored_per_group - layout.free, layout.free))
    projected = torch.cat(stored, 1)
    return projected if transposed else projected.flatten(0, 1)


def expand_bias(stored: Tensor, layout: FilterLayout) -> Tensor:
    """One bias per stored filter -> one per output filter."""
    stored = stored.unflatten(0, (layout.groups, -1))
    images = [stored.narrow(1, u.start, len(u)) for symmetry, u in layout.bases for _ in symmetry.elements[1:]]
    return torch.cat([stored, *images], 1).flatten()


def project_bias(bias: Tensor, layout: FilterLayout) -> Tensor:
    """The mean over every orbit: the nearest shared bias."""
    index = torch.tensor([u for u, _ in layout.filters], device=bias.device)
    bias = bias.unflatten(0, (layout.groups, -1))
    base = bias[:, : layout.stored_per_group]
    total = torch.zeros_like(base).index_add(1, index, bias - base[:, index])
    return (base + total / torch.bincount(index, minlength=layout.stored_per_group)).flatten()


def expand_ties(stored: Tensor, orbits: TapOrbits, kernel_size: Sequence[int]) -> Tensor:
    """dense[u, c, k] = sign[k] stored[u, c, slot[k]], and 0 where the sign forces zero.  (U, C, S) -> (U, C, *k)"""
    slot = [len(orbits) if s < 0 else s for s in orbits.slot]
    if len(orbits) in slot:
        stored = F.pad(stored, (0, 1))
    dense = stored.index_select(-1, table(slot, stored))
    if -1 in orbits.sign:
        dense = dense * table([s or 1 for s in orbits.sign], stored, stored.dtype)
    return dense.unflatten(-1, tuple(kernel_size))


def project_ties(dense: Tensor, orbits: TapOrbits) -> Tensor:
    """The stored values whose expansion is nearest to `dense`: the signed mean over every tap orbit."""
    live = [k for k, s in enumerate(orbits.slot) if s >= 0]
    sign = table([orbits.sign[k] for k in live], dense, dense.dtype)
    slot = table([orbits.slot[k] for k in live], dense)
    first = table([orbits.slot.index(s) for s in range(len(orbits))], dense)
    multiplicity = table(orbits.multiplicity, dense)
    taps = dense.flatten(2)
    base = taps.index_select(-1, first).detach()  # what is added is subtracted: its gradients would cancel
    taps = taps.index_select(-1, table(live, dense)) * sign
    total = torch.zeros_like(base).index_add(-1, slot, taps - base.index_select(-1, slot))
    return base + total / multiplicity


def beside_free(tied: Tensor, free: Tensor | None, groups: int) -> Tensor:
    """In every group the tied filters, then the free ones."""
    if free is None:
        return tied
    return torch.cat([tied.unflatten(0, (groups, -1)), free.unflatten(0, (groups, -1))], 1).flatten(0, 1)


def orbit_images(w: Tensor, symmetry: Symmetry) -> Tensor:
    """All images of every filter, those of one filter next to each other.  (U, C, *k) -> (U G, C, *k)"""
    return torch.stack([image(w, g) for g in symmetry.elements], 1).flatten(0, 1)


def orbit_mean(w: Tensor, symmetry: Symmetry, reduce: str) -> Tensor:
    """One value per tap orbit of the kernel that 'sum' or 'mean' over the orbit of w amounts to.  (U, C, orbits)"""
    mean = project_ties(w, tap_orbits(symmetry, tuple(map(int, w.shape[2:]))))
    return mean * symmetry.order if reduce == "sum" else mean


def symmetrized(w: Tensor, symmetry: Symmetry, reduce: str) -> Tensor:
    """The kernel that reducing over the orbit of w amounts to: sum_g g w, or its mean; symmetric to the bit."""
    kernel_size = tuple(map(int, w.shape[2:]))
    return expand_ties(orbit_mean(w, symmetry, reduce), tap_orbits(symmetry, kernel_size), kernel_size)


# --- layers -----------------------------------------------------------------------------------------------------------

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def symmetric_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: FilterLayout,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None = None,
) -> Tensor:
    """y = act(conv(x, expand(weight)) + b).  A bias of one value per stored filter is shared by its images."""
    dense = expand_orbits(weight, layout)
    y = _CONV[x.ndim - 2](x, dense, full_bias(bias, layout), stride, padding, dilation, layout.groups)
    return activate(y, activation)


def symmetric_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: FilterLayout,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None = None,
) -> Tensor:
    """y = act(conv_transpose(x, expand(weight)) + b)."""
    dense = expand_orbits(weight, layout, transposed=True)
    conv = _CONV_TRANSPOSE[x.ndim - 2]
    y = conv(x, dense, full_bias(bias, layout), stride, padding, output_padding, layout.groups, dilation)
    return activate(y, activation)


def full_bias(bias: Tensor | None, layout: FilterLayout) -> Tensor | None:
    """One bias per output filter, from one per output filter or per stored filter."""
    if bias is None or bias.shape[0] == layout.out_channels:
        return bias
    return expand_bias(bias, layout)


def tied_conv(
    x: Tensor,
    weight: Tensor,
    free_weight: Tensor | None,
    bias: Tensor | None,
    orbits: TapOrbits,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    """y = act(conv(x, [expand(weight), free_weight]) + b)."""
    dense = beside_free(expand_ties(weight, orbits, kernel_size), free_weight, groups)
    return activate(_CONV[x.ndim - 2](x, dense, bias, stride, padding, dilation, groups), activation)


def orbit_pool_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symmetry: Symmetry,
    reduce: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    """y = act(reduce_g conv(x, g weight) + b).  'sum' and 'mean' are one convolution with the symmetrized kernel."""
    pooled = reduce in ("max", "min")
    dense = orbit_images(weight, symmetry) if pooled else symmetrized(weight, symmetry, reduce)
    y = _CONV[x.ndim - 2](x, dense, None if pooled else bias, stride, padding, dilation, groups)
    return activate(reduce_images(y, bias, (-1, symmetry.order), reduce) if pooled else y, activation)


def reduce_images(y: Tensor, bias: Tensor | None, sizes: tuple[int, ...], reduce: str) -> Tensor:
    """Channels of y as `sizes` = (..., images, ...); the maximum or minimum over axis 1 of these, plus the bias."""
    last = not y.is_contiguous()  # reduce where the channels lie: the memory format stays
    channels = y.ndim - 1 if last else 1
    orbits = y.movedim(1, channels).unflatten(channels, sizes)
    pooled = orbits.amax(channels + 1) if reduce == "max" else orbits.amin(channels + 1)
    if len(sizes) > 2:
        pooled = pooled.flatten(channels, channels + 1)
    pooled = pooled.movedim(channels, 1)
    return pooled if bias is None else pooled + bias.to(pooled.dtype)[(...,) + (None,) * (y.ndim - 2)]


def symmetric_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None = None, dense: Tensor | None = None
) -> Tensor:
    """y = act(x S + b); `dense` is S, if it is known."""
    return activate(F.linear(x, unpack(packed) if dense is None else dense, bias), activation)


def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float) -> Tensor:
    """The lower triangle of beta a + alpha x x^T, mirrored.  x (..., m, k), a (..., m, m) or None."""
    if a is None:
        c = x @ x.mT
        return mirror(c if alpha == 1 else alpha * c)
    rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    c = torch.baddbmm(a.reshape(rows.shape[0], *a.shape[-2:]), rows, rows.mT, beta=beta, alpha=alpha)
    return mirror(c.reshape(a.shape))


def global_conv1d(
    x: Tensor, center: Tensor, surround: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """y[n, :, i] = act(W_c x[n, :, i] + W_s sum_{j != i} x[n, :, j] + b).

    Computed as (W_c - W_s) x[n, :, i] + (W_s sum_j x[n, :, j] + b): one pass over the positions. A sum over many
    positions may overflow 16 bits where y does not: it is float32.
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
    """act(y + W_s sum_j x[n, :, j] + b), in the dtype of y; the sum is `wide`."""
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
    samples therefore give the very same batch, and whatever deterministic function follows gives bitwise equal
    results, even where a matrix product rounds its rows differently by their place in the batch.
    """
    count, n = order.shape
    batch = x.shape[0]
    rows = x.movedim(dim, 1)  # [B, n, ...]
    index = order.expand(batch, count, n)
    if x.numel():
        smallest = order[_smallest(rows.detach(), order)]  # [B, n]
        index = smallest[:, order]  # first to the smallest, then on: index[b, g, i] = smallest[b, order[g, i]]
    index = index + n * torch.arange(batch, device=x.device)[:, None, None]
    picked = rows.flatten(0, 1).index_select(0, index.transpose(0, 1).flatten())  # [G B n, ...]
    return picked.unflatten(0, (count * batch, n)).movedim(1, dim)


def _smallest(rows: Tensor, order: Tensor) -> Tensor:
    """For every sample of rows [B, n, ...] the g whose re-ordering is lexicographically smallest.  [B]"""
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    bits = rows.contiguous().view(_BITS[rows.element_size()])  # NaN and -0.0 have an order too
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

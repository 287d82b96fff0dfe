"""Multiply once, shift and add many, on the CPU: matrix products over the stored weights, and one bag of sums.

A layer with stored weights w[u, c, s] (u: stored filter, s: stored tap or tap orbit) and images g described by a table
slot[g][k] (which stored tap stands at position k of image g, with which sign) is

    z[q, s, u] = sum_c w[u, c, s] x[q, c]                                              one product
    y[p, g, u] = sum_k sign[g][k] z[stride p + dilation k - padding, slot[g][k], u]    additions only

and, with d[q, s, u] = sum of sign[g][k] dy[p, g, u] over all (p, g, k) that read z[q, s, u], its gradients are

    dx[q, c] = sum_{s, u} d[q, s, u] w[u, c, s]         dw[u, c, s] = sum_q d[q, s, u] x[q, c].

A product plus shifted additions is kn2row (Anderson, Vasudevan, Keane, Gregg 2017, arXiv 1709.03395); sharing z between
the images of a filter makes it the algorithm of a symmetric layer.

z is a table of rows (q, s) of U values, channels-last. Every row of y is a sum of some of its rows, so all additions of
a block of filters are one ``embedding_bag`` over an index table that depends on the geometry and the spatial sizes
only; d is the adjoint bag over the rows of dy. Axes that no image of a block moves can stay inside the product, which
is then a convolution over these axes with fewer slots: only w moves under 'h', so there are 3 slots and (3, 1) kernels
instead of 9 slots. Free filters are plain convolutions. z is computed in chunks of images, or of large images in bands
of rows, that stay in the cache. `launch` does the same on a GPU.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsym.packing import widens_float16
from tritonsym.reference import block_gradients, block_rows
from tritonsym.spec import ConvSpec, Geometry, Ints
from tritonsym.tuned import device_name

#: Bytes of z at a time that the caches hold: images, or rows of a large image, are computed in chunks of at most this.
#: ``tritonsym.shift.CHUNK_BYTES = ...`` changes it. Measured: perf/results/2026-11-25-cpu-chunks.json.
CHUNK_BYTES = 16 << 20

#: Axes that no image moves stay inside the product from this many positions per tap on, and in the gradients if there
#: are also this many positions per filter of a group. Below, few large matrix products are faster than convolutions.
#: Measured: perf/results/2026-11-25-cpu-inside.json.
INSIDE = 250, 200

#: Where MKL is slow, float32 products with at least this many multiply-adds run as 1x1 convolutions: on AMD's CPUs
#: oneDNN is twice as fast as MKL. Measured: perf/results/2026-11-26-cpu-products.json; the layout of the operands, and
#: roundings: perf/results/2026-11-26-cpu-layout.json.
CONVOLVED = 1e7

#: Bytes of index tables kept for later calls; the least recently used are dropped first.
TABLE_BYTES = 256 << 20


# --- what does not depend on sizes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One block as it is computed: products over the axes `inside`, then the sums of `images`.

    order[s][j] is the stored slot that stands at slot s of z and tap j of the product's kernel; every stored slot
    occurs once. `images`: as in `ConvSpec.slot_table`, of slots of z at the taps of the axes that are not inside.
    """

    filters: int
    inside: tuple[bool, ...]
    order: tuple[Ints, ...]
    images: tuple[tuple[int, Ints, Ints], ...]

    @property
    def is_plain(self) -> bool:
        """Whether the product is y already."""
        return all(self.inside) and len(self.images) == 1

    @cached_property
    def structure(self) -> str:
        """What its sums depend on, for any number of filters."""
        return str((self.inside, [image[1:] for image in self.images]))


def _planar(geometry: Geometry) -> Geometry:
    """One axis as two, the second of size 1, since torch has no channels-last format for one."""
    if len(geometry.kernel_size) > 1:
        return geometry
    g = geometry
    return Geometry(
        (*g.kernel_size, 1), (*g.stride, 1), (*g.padding, 0), (*g.dilation, 1), (*g.extra, 0), geometry.transposed
    )


@lru_cache(maxsize=1024)
def parts(spec: ConvSpec, inner: bool) -> tuple[Part, ...]:
    """The part of every block; with `inner`, axes that no image moves are inside the product."""
    kernel = _planar(spec.geometry).kernel_size
    return tuple(
        _part(block.filters, images, kernel, inner) for block, images in zip(spec.blocks, spec.slot_table, strict=True)
    )


def _part(filters: int, images: tuple[tuple[int, Ints, Ints], ...], kernel: Ints, inner: bool) -> Part:
    taps = list(product(*map(range, kernel)))
    of = [dict(zip(taps, zip(slots, signs, strict=True), strict=True)) for _, slots, signs in images]

    def stays(axis: int) -> bool:
        """Whether the slots at every place of the axis are those at the first place, renamed."""
        renamed: dict[tuple[int, int], int] = {}  # (slot at place 0, place) -> slot there
        for image in of:
            for tap in taps:
                first = (*tap[:axis], 0, *tap[axis + 1 :])
                at_zero, (slot, sign) = image[first], image[tap]
                if sign != at_zero[1] or (sign and renamed.setdefault((at_zero[0], tap[axis]), slot) != slot):
                    return False
        return len(set(renamed.values())) == len(renamed)

    inside = [size > 1 and stays(axis) for axis, size in enumerate(kernel)]
    if all(size == 1 or stays_in for size, stays_in in zip(kernel, inside, strict=True)) and len(images) == 1:
        inside = [True] * len(kernel)  # nothing is left to add
    elif not inner:
        inside = [False] * len(kernel)
    within = list(product(*(range(size if i else 1) for size, i in zip(kernel, inside, strict=True))))
    outer = list(product(*(range(1 if i else size) for size, i in zip(kernel, inside, strict=True))))
    numbers: dict[int, int] = {}  # of the slots of z, by the stored slot at their first tap inside
    order: list[Ints] = []
    reduced = []
    for image, (first, _, _) in zip(of, images, strict=True):
        slots, signs = [], []
        for k in outer:
            stored, sign = image[k]
            if sign and stored not in numbers:
                numbers[stored] = len(order)
                at = [image[tuple(a + b for a, b in zip(k, j, strict=True))][0] for j in within]
                order.append(tuple(at))
            slots.append(numbers[stored] if sign else 0)
            signs.append(sign)
        reduced.append((first, tuple(slots), tuple(signs)))
    by_slot = sorted(range(len(order)), key=lambda s: order[s])  # in the order in which they are stored
    place = {old: new for new, old in enumerate(by_slot)}
    renumbered = tuple((first, tuple(place.get(s, 0) for s in slots), signs) for first, slots, signs in reduced)
    return Part(filters, tuple(inside), tuple(order[s] for s in by_slot), renumbered)


@dataclass(frozen=True)
class Axis:
    """y position p < out reads x at stride p + dilation k - low, inside [0, size); see `Geometry` for transposed."""

    size: int
    low: int
    out: int


@dataclass(frozen=True)
class Phase:
    """The positions of x that are `residue` modulo the stride along the axes outside the product, and z there."""

    residue: Ints
    slots: Ints  # of z that some image needs
    sizes: Ints  # of z


def phases(part: Part, geometry: Geometry, axes: tuple[Axis, ...]) -> tuple[Phase, ...]:
    """Tap k reads the residue (dilation k - low) mod stride; transposed convolutions have one phase."""
    steps = [1 if stays or geometry.transposed else s for stays, s in zip(part.inside, geometry.stride, strict=True)]
    sizes = [1 if stays else size for stays, size in zip(part.inside, geometry.kernel_size, strict=True)]
    at = zip(geometry.dilation, axes, steps, strict=True)
    offsets = [[(d * k - axis.low) % m for k in range(size)] for size, (d, axis, m) in zip(sizes, at, strict=True)]
    used: dict[Ints, set[int]] = {}
    for _, slots, signs in part.images:
        for residue, slot, sign in zip(product(*offsets), slots, signs, strict=True):
            if sign:
                used.setdefault(residue, set()).add(slot)
    found = []
    for residue, needed in sorted(used.items()):
        each = zip(part.inside, axes, residue, steps, strict=True)
        z_sizes = tuple(axis.out if stays else len(range(r, axis.size, m)) for stays, axis, r, m in each)
        if 0 not in z_sizes:
            found.append(Phase(residue, tuple(sorted(needed)), z_sizes))
    return tuple(found)


def band(geometry: Geometry, axis: Axis, start: int, stop: int) -> tuple[Axis, slice]:
    """The first axis restricted to the positions [start, stop) of y, and which positions of x they read."""
    s, reach = geometry.stride[0], geometry.dilation[0] * (geometry.kernel_size[0] - 1)
    if geometry.transposed:
        low, high = -((reach - start - axis.low) // s), (stop - 1 + axis.low) // s + 1
    else:
        low, high = s * start - axis.low, s * (stop - 1) + reach - axis.low + 1
    low, high = min(max(low, 0), axis.size), max(min(high, axis.size), 0)
    high = max(low, high)
    moved = start - s * low if geometry.transposed else low - s * start
    return Axis(high - low, axis.low + moved, stop - start), slice(low, high)


# --- index tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bags:
    """Row b of the result is the sum of the rows index[offsets[b]], ..., index[offsets[b + 1] - 1] of a table.

    The tables are those of `images` images, one after the other; fewer images take the first entries.
    """

    index: Tensor
    offsets: Tensor
    signs: Tensor | None
    images: int
    terms: int
    bags: int

    def add(self, table: Tensor, images: int) -> Tensor:
        if self.terms == 0 or images == 0 or table.numel() == 0:
            return table.new_zeros(images * self.bags, table.shape[1])
        end = images * self.terms
        signs = None if self.signs is None else self.signs[:end].to(table.dtype)
        offsets = self.offsets[: images * self.bags + 1]
        return torch.embedding_bag(table, self.index[:end], offsets, False, 0, False, signs, True)[0]


@dataclass(frozen=True)
class Sums:
    """The bags from z of all phases, side by side in every image, to y; and from dy to d of every phase."""

    forward: Bags
    adjoint: tuple[Bags, ...]

    @property
    def nbytes(self) -> int:
        tensors = [t for bags in (self.forward, *self.adjoint) for t in (bags.index, bags.offsets, bags.signs)]
        return sum(t.nbytes for t in tensors if t is not None)


class _Tables:
    """The sums that all layers used last, in `TABLE_BYTES`."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Any, Sums] = OrderedDict()
        self.nbytes = 0
        self.lock = threading.Lock()

    def find(self, step: Step, geometry: Geometry, axes: tuple[Axis, ...], groups: int, images: int) -> Sums:
        key = step.part.structure, geometry, axes, groups
        with self.lock:
            found = self.kept.get(key)
            if found is not None and found.forward.images >= images:
                self.kept.move_to_end(key)
                return found
        found = make_sums(step, geometry, axes, groups, images)
        with self.lock:
            if (old := self.kept.pop(key, None)) is not None:
                self.nbytes -= old.nbytes
            if found.nbytes <= TABLE_BYTES:
                self.kept[key] = found
                self.nbytes += found.nbytes
            while self.nbytes > TABLE_BYTES:
                self.nbytes -= self.kept.popitem(last=False)[1].nbytes
        return found


tables = _Tables()


@torch.inference_mode(False)
def make_sums(step: Step, geometry: Geometry, axes: tuple[Axis, ...], groups: int, images: int) -> Sums:
    """Index tables for a number of images of these sizes, by arithmetic on all positions at once."""
    part = step.part
    places, exists, residues = [], [], []  # by axis: position of z that y position p reads at tap k, ... (out, K)
    for a, axis in enumerate(axes):
        p, s = torch.arange(axis.out)[:, None], geometry.stride[a]
        at = geometry.dilation[a] * torch.arange(geometry.kernel_size[a])[None]
        if part.inside[a]:
            q, m, there = p, 1, torch.ones(axis.out, 1, dtype=torch.bool)
        elif geometry.transposed:
            q, m = torch.div(p + axis.low - at, s, rounding_mode="floor"), 1
            there = ((p + axis.low - at) % s == 0) & (q >= 0) & (q < axis.size)
        else:
            q, m = s * p + at - axis.low, s
            there = (q >= 0) & (q < axis.size)
        places.append(torch.div(q, m, rounding_mode="floor"))
        residues.append(q % m)
        exists.append(there)
    slots = torch.tensor([slots for _, slots, _ in part.images])  # [I, K]
    signs = torch.tensor([signs for _, _, signs in part.images])
    group = torch.arange(groups)[:, None, None]
    y_row = torch.arange(math.prod(axis.out for axis in axes))[:, None, None, None] * groups + group
    y_row = y_row * len(slots) + torch.arange(len(slots))[:, None]  # [P, G, I, 1]
    rows, to, sign, lengths = [], [], [], []  # by phase
    for phase, _ in step.products:
        strides = [math.prod(phase.sizes[a + 1 :]) for a in range(len(axes))]
        place = _by_tap([q * stride for q, stride in zip(places, strides, strict=True)], torch.add)  # [P, K]
        of_phase = [e & (r == residue) for e, r, residue in zip(exists, residues, phase.residue, strict=True)]
        live = _by_tap(of_phase, torch.logical_and)[:, None, None] & (signs != 0)  # [P, 1, I, K]
        number = torch.zeros(len(part.order), dtype=torch.int64)
        number[list(phase.slots)] = torch.arange(len(phase.slots))
        row = (place[:, None, None] * groups + group) * len(phase.slots) + number[slots]  # [P, G, I, K]
        live = live.expand_as(row)
        rows.append(row[live])
        to.append(y_row.expand_as(row)[live])
        sign.append(signs.expand_as(row)[live])
        lengths.append(math.prod(phase.sizes) * groups * len(phase.slots))
    is_signed = bool((signs < 0).any())
    of_y = math.prod(axis.out for axis in axes) * groups * len(slots)
    adjoint = [
        _bags(y, z, by if is_signed else None, length, of_y, images)
        for z, y, by, length in zip(rows, to, sign, lengths, strict=True)
    ]
    nothing = torch.empty(0, dtype=torch.int64)
    beside = torch.cat([z + sum(lengths[:i]) for i, z in enumerate(rows)] or [nothing])
    signed = torch.cat(sign or [nothing]) if is_signed else None
    return Sums(_bags(beside, torch.cat(to or [nothing]), signed, of_y, sum(lengths), images), tuple(adjoint))


def _by_tap(by_axis: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Values (out, K) of every axis, combined into (positions, taps)."""
    total = by_axis[0]
    for other in by_axis[1:]:
        total = combine(total[:, None, :, None], other[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return total


def _bags(rows: Tensor, to: Tensor, signs: Tensor | None, bags: int, table: int, images: int) -> Bags:
    """Bags that add `rows` of a table (of `table` rows per image) to the rows `to`."""
    order = torch.argsort(to, stable=True)
    ends = torch.bincount(to, minlength=bags).cumsum(0)
    image = torch.arange(images)[:, None]
    index = (rows[order] + image * table).flatten()
    offsets = torch.cat([ends.new_zeros(1), (ends + image * len(rows)).flatten()])
    dtype = torch.int32 if max(images * table, len(index)) < 2**31 else torch.int64
    weights = None if signs is None else signs[order].float().repeat(images)
    return Bags(index.to(dtype), offsets.to(dtype), weights, images, len(rows), bags)


# --- products ---------------------------------------------------------------------------------------------------------


class Product:
    """z of one phase from a chunk of x, and its derivatives: by matrix products, or by torch's convolution over the
    axes inside, and in groups."""

    def __init__(self, part: Part, phase: Phase, geometry: Geometry, axes: tuple[Axis, ...], groups: int) -> None:
        g = geometry
        self.sizes = phase.sizes
        steps = [1 if stays or g.transposed else s for stays, s in zip(part.inside, g.stride, strict=True)]
        self.at: Any = (..., *(slice(r, None, m) for r, m in zip(phase.residue, steps, strict=True)))
        self.is_whole = all(m == 1 for m in steps)
        self.multiplies = groups == 1 and not any(part.inside)
        self.transposed = g.transposed and not self.multiplies
        #: The stored slot at every slot of z and tap inside, and whether they are stored in that order or tap by tap.
        self.order = [part.order[s] for s in phase.slots]
        stored = list(range(sum(map(len, part.order))))
        self.is_sorted = [s for at in self.order for s in at] == stored
        self.is_by_tap = [s for at in zip(*self.order, strict=True) for s in at] == stored
        self.is_all = len(phase.slots) == len(part.order)
        self.kernel = [k if stays else 1 for k, stays in zip(g.kernel_size, part.inside, strict=True)]
        stride, pads, dilation, extra, around = [], [], [], [], []
        for a, (stays, axis) in enumerate(zip(part.inside, axes, strict=True)):
            stride.append(g.stride[a] if stays else 1)
            dilation.append(g.dilation[a] if stays else 1)
            low, reach = axis.low if stays else 0, g.dilation[a] * (g.kernel_size[a] - 1)
            far = s_far = 0
            if stays and self.transposed:  # positions of the output beyond the last tap
                far = axis.out + low - (axis.size - 1) * g.stride[a] - reach - 1
                s_far = far + low
                fits = low >= 0 and 0 <= s_far < max(stride[a], dilation[a])
                sides = (-low, far)
            else:
                far = stride[a] * (axis.out - 1) + reach + 1 - low - axis.size if stays else 0
                fits = not stays or (low >= 0 and (axis.size + 2 * low - reach - 1) // stride[a] + 1 == axis.out)
                sides = (low, far)
            pads.append(low if fits else 0)
            extra.append(s_far if fits else 0)
            around.append((0, 0) if fits else sides)
        self.options = stride, pads, dilation, self.transposed, extra, groups
        #: For `F.pad`: what the convolution cannot pad or crop itself, around x or, if transposed, around z.
        self.around = [side for pair in reversed(around) for side in pair] if any(map(any, around)) else []

    def _ordered(self, rows: Tensor) -> Tensor:
        """(groups, slots of the part, ...) -> (groups, slots, taps inside, ...): a view if their order allows it."""
        slots, inside = len(self.order), len(self.order[0])
        if self.is_sorted:
            return rows.unflatten(1, (slots, inside))
        if self.is_by_tap:
            return rows.unflatten(1, (inside, slots)).transpose(1, 2)
        return rows[:, torch.tensor(self.order)]

    def weights(self, rows: Tensor) -> Tensor:
        """The block's rows (groups, slots, filters, C) as a matrix (slots filters, C), or for a convolution."""
        taps = self._ordered(rows)  # [G, slots, inside, U, C]
        if self.multiplies:
            return taps.reshape(-1, taps.shape[4])
        if self.transposed:
            kernels = taps.permute(0, 4, 1, 3, 2).reshape(-1, taps.shape[1] * taps.shape[3], *self.kernel)
        else:
            kernels = taps.permute(0, 1, 3, 4, 2).reshape(-1, taps.shape[4], *self.kernel)
        return kernels.contiguous()

    def add_gradient(self, drows: Tensor, dw: Tensor) -> None:
        """The adjoint of `weights`: add dw to the rows of the block."""
        groups, _, filters, channels = drows.shape
        inside = len(self.order[0])
        if self.transposed:
            dw = dw.view(groups, channels, -1, filters, inside).permute(0, 2, 4, 3, 1)
        else:
            dw = dw.view(groups, -1, filters, channels, inside).permute(0, 1, 4, 2, 3)
        if self.is_sorted or self.is_by_tap:
            self._ordered(drows).add_(dw)
        else:
            drows[:, torch.tensor(self.order)] += dw.to(drows.dtype)

    def _input(self, x: Tensor) -> Tensor:
        x = x if self.is_whole else x[self.at]
        return channels_last(_pad(x, self.around) if self.around and not self.transposed else x)

    def _matrices(self, x: Tensor) -> Tensor:
        return _matrices(x if self.is_whole else channels_last(x[self.at]))

    def fprop(self, x: Tensor, w: Tensor) -> Tensor:
        """z as rows: (images positions groups slots, filters), flattened."""
        if self.multiplies:
            a = self._matrices(x)
            if is_convolved(a, w):
                return convolved(a, w, self.sizes).flatten()
            return (torch.mm(a[0], w.mT) if len(a) == 1 else torch.bmm(a, w.mT.expand(len(a), -1, -1))).flatten()
        z = torch.ops.aten.convolution(self._input(x), w, None, *self.options)
        z = _pad(z, self.around) if self.around and self.transposed else z
        return channels_last(z).movedim(1, -1).flatten()

    def backward(self, d: Tensor, x: Tensor, w: Tensor, dx: Tensor | None, adds: bool, drows: Tensor | None) -> None:
        """Fill dx, or add to it, and add the gradient of w to the part's rows; d is as z."""
        if not self.multiplies:
            self._conv_backward(d, x, w, dx, adds, drows)
            return
        a = self._matrices(x)
        d = d.view(*a.shape[:2], -1)
        if is_convolved(a, w):
            found, dw = convolved_adjoint(d, a, w, self.sizes, dx is not None, drows is not None)
            if dx is not None:
                found = (found if is_last(x) else apart(found)).unflatten(0, (x.shape[0], *self.sizes)).movedim(-1, 1)
                dx[self.at] = dx[self.at] + found if adds else found
            if drows is not None:
                self.add_gradient(drows, dw)
            return
        if drows is not None:
            to = drows.view(-1, drows.shape[3])
            for d_image, x_image in zip(d, a, strict=True):
                if self.is_all and drows.dtype == d.dtype:
                    to.addmm_(d_image.mT, x_image)
                else:
                    self.add_gradient(drows, torch.mm(d_image.mT, x_image))
        if dx is not None and self.is_whole:
            to = _matrices(dx)
            operands = d.view(*to.shape[:2], -1), w.expand(len(to), -1, -1)
            if adds:
                to.baddbmm_(*operands)
            else:
                torch.bmm(*operands, out=to)
        elif dx is not None:
            found = torch.bmm(d, w.expand(len(a), -1, -1))
            dx[self.at] += found.view(x.shape[0], *self.sizes, -1).movedim(-1, 1)

    def _conv_backward(
        self, d: Tensor, x: Tensor, w: Tensor, dx: Tensor | None, adds: bool, drows: Tensor | None
    ) -> None:
        d = d.view(x.shape[0], *self.sizes, -1).movedim(-1, 1)
        back = [-side for side in self.around]
        if back and self.transposed:
            d = channels_last(_pad(d, back))
        needs = [dx is not None, drows is not None, False]
        found, dw, _ = torch.ops.aten.convolution_backward(d, self._input(x), w, None, *self.options, needs)
        if dx is not None:
            found = _pad(found, back) if back and not self.transposed else found
            dx[self.at] = dx[self.at] + found if adds else found
        if drows is not None:
            self.add_gradient(drows, dw.contiguous())


def _pad(x: Tensor, sides: Sequence[int]) -> Tensor:
    """`F.pad`, also where it crops more than there is before it pads."""
    x = F.pad(x, [max(side, 0) for side in sides])
    return F.pad(x, [min(side, 0) for side in sides]) if min(sides) < 0 else x


def _matrices(x: Tensor) -> Tensor:
    """(N, C, *sizes) as a view (1, N positions, C), or if channels-first (N, positions, C)."""
    rows = x.movedim(1, -1)
    return rows.reshape(1, -1, x.shape[1]) if rows.is_contiguous() else x.flatten(2).mT


@cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies matrices by MKL on a CPU that is not Intel's."""
    return torch.backends.mkl.is_available() and "intel" not in device_name(torch.device("cpu")).lower()


def is_convolved(a: Tensor, w: Tensor) -> bool:
    """Whether the product of a (N, positions, C) and w (R, C) is faster as a convolution."""
    return a.dtype == torch.float32 and mkl_is_slow() and a.shape[0] * a.shape[1] * w.numel() >= CONVOLVED


def convolved(a: Tensor, w: Tensor, sizes: Ints) -> Tensor:
    """a wᵀ (N positions, R) for images of these sizes, by a 1x1 convolution."""
    return _matrix(torch.conv2d(_images(a, sizes), w[..., None, None]))


def convolved_adjoint(
    d: Tensor, a: Tensor, w: Tensor, sizes: Ints, need_a: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    """d w and dᵀ a, where needed. Of volumes, whose convolution in torch rounds less than that of images, MKL computes
    d w, which is twice as exact."""
    if len(sizes) == 3 and need_a:
        dw = convolved_adjoint(d, a, w, sizes, False, True)[1] if need_w else d
        return torch.mm(d.reshape(-1, len(w)), w), dw
    operands = _images(d, sizes), _images(a, sizes), w[..., None, None]
    options: Any = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [need_a, need_w, False]
    da, dw, _ = torch.ops.aten.convolution_backward(*operands, *options)
    return _matrix(da) if need_a else d, dw[..., 0, 0] if need_w else d


def _images(a: Tensor, sizes: Ints) -> Tensor:
    """Matrices (N, positions, C) as channels-last images that are one row high. Rows of at least 14 positions become
    images of their own: convolutions add up gradients image by image, and shorter sums round less."""
    width = sizes[-1] if sizes[-1] >= 14 else math.prod(sizes)
    return a.contiguous().view(-1, 1, width, a.shape[-1]).movedim(-1, 1)


def _matrix(images: Tensor) -> Tensor:
    """(positions, C) of images."""
    return images.movedim(1, -1).reshape(-1, images.shape[1])


# --- the layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A part of a chunk: its phases and their products."""

    part: Part
    products: tuple[tuple[Phase, Product], ...]


@dataclass(frozen=True)
class Chunk:
    """Some images, or some rows of one: where in x and y, their sizes, and the steps."""

    x: tuple[slice, ...]
    y: tuple[slice, ...]
    images: int
    axes: tuple[Axis, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Program:
    """All chunks of a call. With `bands` they are rows of images, and neighbors read some of the same rows of x."""

    spec: ConvSpec
    geometry: Geometry
    parts: tuple[Part, ...]
    axes: tuple[Axis, ...]
    chunks: tuple[Chunk, ...]
    bands: bool

    @cached_property
    def fills(self) -> bool:
        """Whether every value of dx is the result of one product."""
        products = [of for chunk in self.chunks for step in chunk.steps for _, of in step.products]
        alone = all(len(chunk.steps) == 1 and len(chunk.steps[0].products) == 1 for chunk in self.chunks)
        return not self.bands and alone and all(of.is_whole for of in products)

    def sums(self, chunk: Chunk, step: Step) -> Sums:
        return tables.find(step, self.geometry, chunk.axes, self.spec.groups, chunk.images)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def program(spec: str, inner: bool, shape: Ints, itemsize: int, chunk_bytes: int) -> Program:
    """How x of this shape is computed, in pieces whose z takes about `chunk_bytes` at most."""
    keep_pages()
    conv = ConvSpec.of(spec)
    geometry, blocks, groups = _planar(conv.geometry), parts(conv, inner), conv.groups
    axes = tuple(map(Axis, shape[2:], geometry.padding, geometry.out_sizes(shape[2:])))

    @cache
    def steps(axes: tuple[Axis, ...]) -> tuple[Step, ...]:
        found = []
        for part in blocks:
            each = phases(part, geometry, axes)
            found.append(Step(part, tuple((phase, Product(part, phase, geometry, axes, groups)) for phase in each)))
        return tuple(found)

    image = groups * itemsize * sum(z_values(part, axes) for part in blocks)
    every, batch, rows = slice(None), shape[0], axes[0].out
    chunks = []
    if image <= chunk_bytes or rows < 2:
        most = max(1, chunk_bytes // max(image, 1))
        count = max(1, -(-batch // max(1, -(-batch // most))))  # pieces of equal size
        for n in range(0, batch, count):
            at = (slice(n, min(n + count, batch)), every, every)
            chunks.append(Chunk(at, at, min(count, batch - n), axes, steps(axes)))
        return Program(conv, geometry, blocks, axes, tuple(chunks), False)
    count = -(-rows // min(-(-image // chunk_bytes), rows))
    for n, start in product(range(batch), range(0, rows, count)):
        stop = min(start + count, rows)
        first, read = band(geometry, axes[0], start, stop)
        one, part_axes = slice(n, n + 1), (first, *axes[1:])
        work = steps(part_axes) if first.size else ()  # or there is nothing but padding
        chunks.append(Chunk((one, every, read), (one, every, slice(start, stop)), 1, part_axes, work))
    return Program(conv, geometry, blocks, axes, tuple(chunks), True)


def positions(geometry: Geometry, shape: Sequence[int]) -> int:
    """Positions of y, or of x (N, C, *sizes) if transposed, at which the dense layer multiplies by all its weights."""
    sizes = shape[2 : 2 + len(geometry.kernel_size)]
    return shape[0] * math.prod(sizes if geometry.transposed else geometry.out_sizes(sizes))


@cache
def keep_pages() -> None:
    """Free a block of 32 MB once, glibc's largest threshold: from then on it keeps freed blocks. Before, it gives them
    back to the system, and fresh pages cost as much as the products."""
    torch.empty((32 << 20) - 4096, dtype=torch.uint8)


def z_values(part: Part, axes: Sequence[Axis]) -> int:
    """Values of z of one group of one image, as if every phase needed all slots."""
    sizes = [axis.out if stays else axis.size for stays, axis in zip(part.inside, axes, strict=True)]
    return part.filters * len(part.order) * math.prod(sizes)


@cache
def is_fast() -> bool:
    """Whether torch sums bags by FBGEMM; its general kernel is many times slower."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def work(spec: ConvSpec, inner: bool, sizes: Sequence[int], width: int = 1) -> tuple[int, int, int]:
    """Values of z, multiply-adds per channel of a group, and additions (in rows of at least `width`) of one image."""
    geometry, z, products, sums = _planar(spec.geometry), 0, 0, 0
    sizes = (*sizes, 1)[: len(geometry.kernel_size)]
    axes = tuple(map(Axis, sizes, geometry.padding, geometry.out_sizes(sizes)))
    for part in parts(spec, inner):
        values = spec.groups * part.filters
        for phase in phases(part, geometry, axes):
            each = zip(phase.sizes, part.inside, axes, strict=True)
            places = math.prod(a.size if stays and geometry.transposed else n for n, stays, a in each)
            products += values * len(phase.slots) * len(part.order[0]) * places
            z += 0 if part.is_plain else values * len(phase.slots) * math.prod(phase.sizes)
        if not part.is_plain:
            terms = sum(sign != 0 for _, _, signs in part.images for sign in signs)
            ends = zip(part.inside, axes, strict=True)
            places = math.prod(a.size if geometry.transposed and not stays else a.out for stays, a in ends)
            sums += spec.groups * max(part.filters, width) * terms * places
    return z, products, sums


@widens_float16
def fprop(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, spec: str, inner: bool, last: bool) -> Tensor:
    """y = conv(x) + bias from the stored weights and a bias per filter, without pooling; `last`: channels-last."""
    if x.ndim == 3:
        return fprop(x.unsqueeze(-1), weights, bias, spec, inner, False).squeeze(-1)
    plan = program(spec, inner, x.shape, x.element_size(), CHUNK_BYTES)
    groups, kernels = plan.spec.groups, _Kernels(block_rows(plan.spec, weights))
    shape = (x.shape[0], plan.spec.filters, *(axis.out for axis in plan.axes))
    is_one = last and len(plan.chunks) == len(plan.parts) == 1
    y = x if is_one else like(x, shape) if last else x.new_empty(shape)
    for chunk in plan.chunks:
        x_chunk = arranged(x if is_one else x[chunk.x], plan.spec)
        for number, step in enumerate(chunk.steps):
            part = step.part
            z = [of.fprop(x_chunk, kernels.of(number, phase, of)) for phase, of in step.products]
            rows = z[0] if len(z) == 1 else torch.cat([r.view(chunk.images, -1) for r in z] or [x.new_empty(0)], -1)
            if not part.is_plain:
                rows = plan.sums(chunk, step).forward.add(rows.view(-1, part.filters), chunk.images)
            sizes = (chunk.images, *(axis.out for axis in chunk.axes))
            if is_one:
                y = rows.view(*sizes, plan.spec.filters).movedim(-1, 1)
                continue
            found = rows.view(*sizes, groups, len(part.images), part.filters)
            for channels, images in _runs(part):
                to = y[chunk.y].movedim(1, -1).unflatten(-1, (groups, -1))[..., channels]
                values = found[..., images, :].flatten(-2)
                to.copy_(values if last else apart(values))
        if not chunk.steps:
            y[chunk.y] = 0
        if bias is not None:
            y[chunk.y] += bias.view(-1, *[1] * (x.ndim - 2))
    return y


@widens_float16
def backward(
    dy: Tensor, x: Tensor, weights: Sequence[Tensor], spec: str, inner: bool, need_x: bool, need_weights: bool
) -> tuple[Tensor | None, list[Tensor] | None]:
    """The gradients of `fprop` with respect to x and the stored weights; both use one d."""
    if x.ndim == 3:
        dx, dws = backward(dy.unsqueeze(-1), x.unsqueeze(-1), weights, spec, inner, need_x, need_weights)
        return None if dx is None else dx.squeeze(-1), dws
    conv = ConvSpec.of(spec)
    inner = inner and positions(conv.geometry, x.shape) * conv.groups >= INSIDE[1] * conv.stored_filters
    plan = program(spec, inner, x.shape, x.element_size(), CHUNK_BYTES)
    if inner and plan.bands:
        plan = program(spec, False, x.shape, x.element_size(), CHUNK_BYTES)
    groups, kernels = plan.spec.groups, _Kernels(block_rows(plan.spec, weights))
    wide = torch.promote_types(x.dtype, torch.float32)
    drows = [torch.zeros(r.shape, dtype=wide) if need_weights else None for r in kernels.rows]
    dx = None
    if need_x:
        dx = like(x, x.shape) if is_last(x) else x.new_empty(x.shape)
        dx = dx if plan.fills else dx.zero_()
    for chunk in plan.chunks:
        is_all = len(plan.chunks) == 1
        x_chunk, dy_chunk = (x, dy) if is_all else (x[chunk.x], dy[chunk.y])
        x_chunk, dy_chunk = arranged(x_chunk, conv), channels_last(dy_chunk)
        to = dx if is_all or dx is None else dx[chunk.x]
        dy_chunk = dy_chunk.movedim(1, -1).unflatten(-1, (groups, -1))
        for number, step in enumerate(chunk.steps):
            runs = [dy_chunk[..., channels] for channels, _ in _runs(step.part)]
            table = (runs[0] if len(runs) == 1 else torch.cat(runs, -1)).reshape(-1, step.part.filters)
            table = table.contiguous()  # or an expanded gradient would stay expanded, and bags of it are slow
            sums = None if step.part.is_plain else plan.sums(chunk, step)
            for i, (phase, of) in enumerate(step.products):
                d = table if sums is None else sums.adjoint[i].add(table, chunk.images)
                of.backward(d.flatten(), x_chunk, kernels.of(number, phase, of), to, not plan.fills, drows[number])
    found = [d.to(x.dtype) for d in drows if d is not None]
    return dx, block_gradients(plan.spec, found, [w.shape for w in weights]) if need_weights else None


class _Kernels:
    """The weights of every product; chunks share them."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows
        self.found: dict[tuple[int, Ints], Tensor] = {}

    def of(self, number: int, phase: Phase, product: Product) -> Tensor:
        key = number, phase.slots
        if key not in self.found:
            self.found[key] = product.weights(self.rows[number])
        return self.found[key]


@cache
def _runs(part: Part) -> tuple[tuple[slice, slice], ...]:
    """Runs of adjacent output channels of a group, and the images they belong to."""
    runs: list[tuple[slice, slice]] = []
    for i, (first, _, _) in enumerate(part.images):
        if runs and runs[-1][0].stop == first:
            runs[-1] = slice(runs[-1][0].start, first + part.filters), slice(runs[-1][1].start, i + 1)
        else:
            runs.append((slice(first, first + part.filters), slice(i, i + 1)))
    return tuple(runs)


def is_last(x: Tensor) -> bool:
    """Whether x is channels-last."""
    return bool(x.ndim > 3 and x.stride(1) == 1 and x.stride(-1) > 1)  # of symbols, too


def channels_last(x: Tensor) -> Tensor:
    """x with the channels innermost."""
    if x.stride(-1) == 1 and not x.movedim(1, -1).is_contiguous():
        x = apart(x.flatten(2)).unflatten(2, x.shape[2:])
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def arranged(x: Tensor, spec: ConvSpec) -> Tensor:
    """x as its products read it fastest: MKL takes any order, convolutions channels-last images."""
    return channels_last(x) if mkl_is_slow() and x.numel() * spec.rows >= CONVOLVED else x


def apart(rows: Tensor) -> Tensor:
    """The rows, about to be read column by column, at a distance that is no multiple of 512 bytes: at such multiples
    they would evict one another from the cache."""
    length = rows.shape[-1]
    if rows.stride(-2) * rows.element_size() % 512 or rows.numel() <= length:
        return rows
    return rows.new_empty(*rows.shape[:-1], length + 16)[..., :length].copy_(rows)


def like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty channels-last tensor (N, C, *sizes)."""
    return x.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

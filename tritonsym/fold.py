"""Group convolutions: from fields in the regular representation of a group to such fields. The path `fold`.

A field has one channel per element, channel = element * fields + field, and g moves x by (g x)[h] = g (x[g^-1 h]). With
psi[o, c, e] the stored filters,

    y[g, o](p) = sum_{h, c, t} (g psi[o, c, g^-1 h])[t] x[h, c](p + t)              dense weight: |G|^2 T C O values

commutes with every g (Cohen and Welling 2016, "Group equivariant convolutional networks", arXiv 1602.07576). Let A be a
subgroup of commuting mirrors, every element its own inverse, and r_j representatives of G's right cosets A r_j, each a
regular field of A. With the characters chi of A, which are +-1,

    x^_chi[j]   = sum_a chi(a) x[a r_j]
    y^_chi[i]   = sum_chi' sum_j sum_t K_{chi, chi'}[i, j](t) x^_chi'[j](p + t)
    y[a r_i]    = sum_chi chi(a) y^_chi[i]

and K_{chi, chi'}(a t) = (chi chi')(a) K_{chi, chi'}(t): one value per orbit of taps, none where the sign forces zero.
So x^ is first summed over each orbit, with signs, and multiplied afterwards. The parities chi chi' of all chi' have
together as many orbits as there are taps: the multiply-adds are dense / |A|. Axes that no mirror in A moves stay inside
the product, which is one grouped convolution, a group per character.

All sums are ``embedding_bag`` over rows of channels-last images: sparse matrices of +-1, one row per position, kept as
index tables that depend on the geometry and the spatial sizes only.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsym import shift
from tritonsym._compat import constant
from tritonsym.reference import far_padded
from tritonsym.shift import apart, channels_last, is_last, keep_pages, like
from tritonsym.spec import Geometry, Ints
from tritonsym.symmetry import Symmetry, signed_orbits, taps

#: Bytes of the sums of one chunk of images. A convolution orders its weight for every chunk, so these have `ORDERED`
#: times the bytes of the weight, up to `MOST_BYTES`. Measured: perf/results/2026-11-26-cpu-fold-zen4.json.
CHUNK_BYTES, ORDERED, MOST_BYTES = 6 << 20, 32, 16 << 20
#: With more values than this, the sums of one image do not fit the cache.
MOST_VALUES = 6 << 20
#: With more entries than this, the index tables of one image take too much memory to be kept.
MOST_ENTRIES = 1 << 21
#: Where MKL is slow, matrix products with at least this many terms run as convolutions, whose results are copied.
#: Measured: perf/results/2026-11-26-cpu-layout.json.
CONVOLVED_TERMS = 256
#: From this many channels of a group on, gradients are matrix products: a convolution's would be slower.
GRADIENT_CHANNELS = 192


@dataclass(frozen=True)
class GroupSpec:
    """A group convolution without its tensors; `groups` are of fields, as a convolution's are of channels."""

    symmetry: Symmetry
    groups: int
    geometry: Geometry
    order: int = field(init=False, repr=False, compare=False)  # a field, as Dynamo knows no properties of constants

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", self.symmetry.order)

    @cached_property
    def text(self) -> str:
        """The spec as a string, since torch ops take no objects; `of` gives the object back."""
        return json.dumps([self.symmetry.name, self.groups, astuple(self.geometry)])

    @cached_property
    def unpadded(self) -> str:
        """`text` without the padding that 'same' adds on the far side, for an x that has it already."""
        return replace(self, geometry=replace(self.geometry, extra=(0,) * len(self.geometry.extra))).text

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(text: str) -> GroupSpec:
        name, groups, (*sizes, _) = json.loads(text)
        return GroupSpec(Symmetry(name), groups, Geometry(*map(tuple, sizes)))  # type: ignore[arg-type]


# --- the dense layer --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _sources(symmetry: Symmetry, kernel_size: Ints) -> tuple[Ints, ...]:
    """For every (g, h): which value (element, tap) of a stored filter stands at each tap of the dense one."""
    elements, products = symmetry.elements, symmetry.products
    count, slots = math.prod(kernel_size), [g.slots(kernel_size) for g in elements]
    inverse = [row.index(0) for row in products]
    return tuple(
        tuple(products[inverse[g]][h] * count + slot for slot in slots[g])
        for g, h in product(range(len(elements)), repeat=2)
    )


@constant
def sources(name: str, kernel_size: Ints) -> tuple[Ints, ...]:
    return _sources(Symmetry(name), kernel_size)


def _places(spec: GroupSpec, filters: int, device: torch.device) -> Tensor:
    """For every (g, o, tap, h): which row (o, element, tap) of C stored values stands there in the dense weight."""
    table = torch.tensor(sources(spec.symmetry.name, spec.geometry.kernel_size), device=device)  # [G G, T]
    count = spec.order * table.shape[1]
    first = count * torch.arange(filters, device=device).view(spec.groups, 1, -1, 1, 1)
    return (first + table.view(spec.order, 1, spec.order, -1).mT).flatten()


_kept_places = lru_cache(maxsize=64)(torch.inference_mode(False)(_places))


def expand(psi: Tensor, spec: GroupSpec, last: bool = False, eager: bool = False) -> Tensor:
    """The dense weight (|G| O, |G| C, *kernel) of psi (O, C, |G|, *kernel), group by group.
    `last`: channels innermost; `eager`: nothing traces or transforms the call."""
    filters, channels, order, *kernel = psi.shape
    rows = psi.flatten(2).transpose(1, 2).reshape(-1, channels)
    dense = rows.index_select(0, (_kept_places if eager else _places)(spec, filters, psi.device))
    dense = dense.view(order * filters, *kernel, order * channels).movedim(-1, 1)
    return dense if last else dense.contiguous()


def project(dense: Tensor, spec: GroupSpec) -> Tensor:
    """The psi whose dense weight is nearest in the Frobenius norm: means over all places where a value stands."""
    order, kernel = spec.order, dense.shape[2:]
    parts = dense.flatten(2).unflatten(1, (order, -1)).unflatten(0, (spec.groups, order, -1))  # [groups, G, O, G, C, T]
    parts = parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 1)  # [O, C, G G T]
    psi = parts.new_zeros(*parts.shape[:2], order * math.prod(kernel))
    table = torch.tensor(sources(spec.symmetry.name, spec.geometry.kernel_size), device=dense.device)
    return psi.index_add_(2, table.flatten(), parts).unflatten(2, (order, *kernel)) / order


def expand_bias(bias: Tensor, spec: GroupSpec) -> Tensor:
    """One bias per output channel of a bias per field, in the order of `expand`."""
    return bias.view(spec.groups, 1, -1).expand(-1, spec.order, -1).flatten()


def regrouped(x: Tensor, order: int, groups: int, back: bool = False) -> Tensor:
    """x (N, C, ...) with the channels of every group of fields side by side; with `back`, the inverse."""
    if groups == 1:
        return x
    first, second = (groups, order) if back else (order, groups)
    return x.unflatten(1, (first, second, -1)).transpose(1, 2).flatten(1, 3)


def reference(x: Tensor, psi: Tensor, bias: Tensor | None, spec: GroupSpec, eager: bool = False) -> Tensor:
    """torch's convolution of x (N, |G| C, *sizes) with the dense weight; `eager` as in `expand`."""
    g = spec.geometry
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    x = regrouped(far_padded(x, g.extra), spec.order, spec.groups)
    dense_bias = None if bias is None else expand_bias(bias, spec)
    y = conv(x, expand(psi, spec, is_last(x), eager), dense_bias, g.stride, g.padding, g.dilation, spec.groups)
    return regrouped(y, spec.order, spec.groups, back=True)


# --- characters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Characters:
    """Characters of the subgroup A that the first mirrors of a group generate; bit i of an element or character is
    mirror i's.

    `at[a][j]` is the element a r_j. A plane is a sum over one orbit of the taps on the axes that A moves: its parity
    and its taps with signs. `values[chi]` are the weights of the product with the planes of a position: row by row,
    sums of stored values (element, tap) with signs.
    """

    at: tuple[Ints, ...]
    moved: tuple[bool, ...]
    planes: tuple[tuple[int, tuple[tuple[Ints, int], ...]], ...]

    @property
    def order(self) -> int:
        return len(self.at)


def sign(character: int, element: int) -> int:
    return -1 if bin(character & element).count("1") % 2 else 1


@lru_cache(maxsize=1024)
def characters(symmetry: Symmetry, axes: int, kernel_size: Ints, whole: bool) -> Characters:
    """The characters of the first `axes` mirrors; `whole`: as if A moved all axes."""
    elements, products, ndim = symmetry.elements, symmetry.products, len(kernel_size)
    own = [0]
    for mirror in symmetry.mirrors[:axes]:
        own += [products[elements.index(mirror)][a] for a in own]
    at: list[Ints] = [()] * len(own)
    for r in range(len(elements)):
        if not any(r in row for row in at):
            at = [(*row, products[a][r]) for row, a in zip(at, own, strict=True)]
    square = (2,) * max(ndim, 2)
    moves = [(tap, elements[a].source(tap, square)) for a in own for tap in taps(square)]
    moved = tuple(whole or any(tap[i] != source[i] for tap, source in moves) for i in range(-ndim, 0))
    kernel = tuple(size if moves else 1 for size, moves in zip(kernel_size, moved, strict=True))
    slots, places = [elements[a].slots(kernel) for a in own], list(taps(kernel))
    planes = []
    for parity in range(len(own)):
        orbits = signed_orbits(tuple((s, sign(parity, a)) for a, s in enumerate(slots)))
        for slot in range(max(orbits.slot) + 1):
            terms = [(t, o) for t, s, o in zip(places, orbits.slot, orbits.sign, strict=True) if s == slot]
            planes.append((parity, tuple(terms)))
    return Characters(tuple(at), moved, tuple(planes))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def transform(symmetry: Symmetry, axes: int, kernel_size: Ints, whole: bool) -> Tensor:
    """From the values (element, tap) of a stored filter to those of the product: (character, i, tap on the axes that
    stay, plane, j)."""
    chars, order = characters(symmetry, axes, kernel_size, whole), symmetry.order
    elements, products = symmetry.elements, symmetry.products
    inverse = [row.index(0) for row in products]
    rest = list(taps(tuple(1 if moves else size for size, moves in zip(kernel_size, chars.moved, strict=True))))
    number = {tap: i for i, tap in enumerate(taps(kernel_size))}
    count, cosets = chars.order, range(len(chars.at[0]))
    table = torch.zeros(count, len(cosets), len(rest), len(chars.planes), len(cosets), order * len(number))
    for i, (s, (parity, terms)), (u, other) in product(cosets, enumerate(chars.planes), enumerate(rest)):
        tap, base = tuple(map(sum, zip(terms[0][0], other, strict=True))), chars.at[0][i]
        for k in range(count):
            moved = elements[chars.at[k][0]].source(tap, kernel_size)
            at = number[elements[base].source(moved, kernel_size)]
            for a, j, chi in product(range(count), cosets, range(count)):
                value = products[inverse[base]][chars.at[a][j]] * len(number) + at
                table[chi, i, u, s, j, value] += sign(parity, k) * sign(chi ^ parity, a)
    return table.flatten(0, -2) / count**2


# --- sums -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bags:
    """A sparse matrix of +-1 that adds up rows: its entries for one image, and how many rows an image has in the result
    and in the table. Both are split into `blocks` (characters and groups), and each block holds all images."""

    to: Tensor
    of: Tensor
    signs: Tensor
    rows: int
    table: int
    blocks: tuple[int, int] = (1, 1)

    def add(self, table: Tensor, images: int) -> Tensor:
        """Sum the rows of a table with `images * self.table` rows."""
        index, offsets, signs = _bags(self, images, table.device, table.dtype)
        rows = table.view(images * self.table, -1)
        return torch.embedding_bag(rows, index, offsets, False, 0, False, signs, True)[0]

    @cached_property
    def adjoint(self) -> Bags:
        return Bags(self.of, self.to, self.signs, self.table, self.rows, self.blocks[::-1])


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bags(bags: Bags, images: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Entries, the start and end of every row, and signs."""

    def of_all(numbers: Tensor, rows: int, blocks: int) -> Tensor:
        size, numbers = rows // blocks, numbers.long()
        return ((numbers // size * images + torch.arange(images)[:, None]) * size + numbers % size).flatten()

    to, order = of_all(bags.to, bags.rows, bags.blocks[0]).sort(stable=True)
    index = of_all(bags.of, bags.table, bags.blocks[1])[order]
    offsets = F.pad(to.bincount(minlength=images * bags.rows).cumsum(0), (1, 0))
    signs = bags.signs.repeat(images)[order]
    return index.to(device, torch.int32), offsets.to(device, torch.int32), signs.to(device, dtype)


#: Block and row at a position of the result, block and row at a position of the table, sign.
Entries = list[tuple[int, int, int, int, int]]


@dataclass(frozen=True, eq=False)
class Fold:
    """How a group convolution computes images of one size, with a number of mirrors folded; `whole`: no axes stay
    inside the product."""

    spec: GroupSpec
    axes: int
    sizes: Ints
    whole: bool

    @cached_property
    def chars(self) -> Characters:
        return characters(self.spec.symmetry, self.axes, self.spec.geometry.kernel_size, self.whole)

    @cached_property
    def out(self) -> Ints:
        return self.spec.geometry.out_sizes(self.sizes)

    @cached_property
    def grid(self) -> Ints:
        """Positions of the sums: those of y on axes that A moves, of x on the others."""
        return tuple(o if moves else n for o, n, moves in zip(self.out, self.sizes, self.chars.moved, strict=True))

    @cached_property
    def rest(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Kernel size, stride, padding and dilation of the product."""
        g = self.spec.geometry
        axes = zip(g.kernel_size, g.stride, g.padding, g.dilation, self.chars.moved, strict=True)
        kernel, *others = zip(*((1, 1, 0, 1) if moves else (k, s, p, d) for k, s, p, d, moves in axes), strict=True)
        return kernel, *others  # type: ignore[return-value]

    @cached_property
    def is_flat(self) -> bool:
        """Whether the product is one of matrices."""
        return self.grid == self.out and math.prod(self.rest[0]) == 1

    @cached_property
    def is_direct(self) -> bool:
        """Whether the sums, having few terms, come straight from x, and not from x^."""
        return len(self.chars.planes) <= (3 if len(self.chars.at[0]) == 1 else 1)

    @cached_property
    @torch.inference_mode(False)
    def inward(self) -> tuple[Bags, ...]:
        """From x, rows (position, element, group), to the sums, rows (character, group) (position, plane, coset),
        straight or through x^, rows (position, character, group, coset)."""
        chars, groups, order = self.chars, self.spec.groups, self.spec.order
        cosets, planes, blocks = len(chars.at[0]), len(chars.planes), chars.order * groups
        own, each = range(chars.order), range(groups)
        every: dict[Ints, Entries] = {}  # by tap
        for (s, (parity, terms)), b, n in product(enumerate(chars.planes), own, each):
            for tap, value in terms:
                entries = every.setdefault(tap, [])
                if self.is_direct:
                    for j, a in product(range(cosets), own):
                        of, signs = chars.at[a][j] * groups + n, value * sign(b ^ parity, a)
                        entries.append((*self._at(b * groups + n, s * cosets + j, planes * cosets), 0, of, signs))
                else:
                    entries.append((*self._at(b * groups + n, s, planes), 0, (b ^ parity) * groups + n, value))
        if self.is_direct:
            return (self._sums(every, blocks * planes * cosets, order * groups),)
        hat = [
            (0, (b * groups + n) * cosets + j, 0, chars.at[a][j] * groups + n, sign(b, a))
            for b, n, j, a in product(own, each, range(cosets), own)
        ]
        size = math.prod(self.sizes)
        places, rows = torch.arange(size), (size, order * groups)
        characters = _bags_of([_spread(hat, places, places, rows, rows)], rows, rows)
        return characters, self._sums(every, blocks * planes, blocks)

    @property
    def _blocks(self) -> int:
        """Characters and groups are outermost for matrices; a grouped convolution has them inside its positions."""
        return self.chars.order * self.spec.groups if self.is_flat else 1

    def _at(self, block: int, row: int, rows: int) -> tuple[int, int]:
        return (block, row) if self.is_flat else (0, block * rows + row)

    def _sums(self, every: dict[Ints, Entries], rows: int, table: int) -> Bags:
        """The same entries at all positions, shifted by the taps; none where a tap falls outside x."""
        g, parts = self.spec.geometry, []
        places = torch.arange(math.prod(self.grid))
        sizes = (len(places), rows // self._blocks), (math.prod(self.sizes), table)
        at = torch.unravel_index(places, self.grid)
        for tap, entries in every.items():
            of, inside = torch.zeros_like(places), torch.ones_like(places, dtype=torch.bool)
            for axis, (q, size) in enumerate(zip(at, self.sizes, strict=True)):
                if self.chars.moved[axis]:
                    q = q * g.stride[axis] + tap[axis] * g.dilation[axis] - g.padding[axis]
                    inside = inside & (q >= 0) & (q < size)
                of = of * size + q
            parts.append(_spread(entries, places[inside], of[inside], *sizes))
        return _bags_of(parts, *sizes, (self._blocks, 1))

    @cached_property
    @torch.inference_mode(False)
    def outward(self) -> Bags:
        """From the product, rows (character, group) (position, coset), to y, rows (position, element, group)."""
        chars, groups = self.chars, self.spec.groups
        cosets, own = len(chars.at[0]), range(chars.order)
        back = [
            (0, chars.at[a][i] * groups + n, *self._at(b * groups + n, i, cosets), sign(b, a))
            for a, i, n, b in product(own, range(cosets), range(groups), own)
        ]
        places = torch.arange(math.prod(self.out))
        rows = self.spec.order * groups
        sizes = (len(places), rows), (len(places), rows // self._blocks)
        return _bags_of([_spread(back, places, places, *sizes)], *sizes, (1, self._blocks))

    def _table(self, like: Tensor) -> Tensor:
        kernel = self.spec.geometry.kernel_size
        return transform(self.spec.symmetry, self.axes, kernel, self.whole).to(like.device, like.dtype)

    def weight(self, psi: Tensor) -> Tensor:
        """The product's weight: matrices (character and group, i O, plane j C), or filters (character, group and i O,
        plane j C, *kernel of the axes that stay) with the channels innermost."""
        values = self._table(psi) @ psi.flatten(2).mT  # [group O, values of the product, C]
        values = values.view(self.spec.groups, -1, *self._values[:3], math.prod(self._values[3:]) * psi.shape[1])
        values = values.permute(2, 0, 3, 1, 4, 5)  # [chi, group, i, O, tap, plane j C]
        if self.is_flat:
            return values.flatten(2, 4).flatten(0, 1)
        return values.reshape(-1, *self.rest[0], values.shape[-1]).movedim(-1, 1)

    def weight_adjoint(self, dweight: Tensor, channels: int) -> Tensor:
        """The gradient of psi, which has this many channels, from that of `weight`."""
        count, cosets, rest, *_ = self._values
        dweight = dweight if self.is_flat else _last(dweight)
        values = dweight.reshape(count, self.spec.groups, cosets, -1, rest, dweight.shape[-1])
        values = values.permute(1, 3, 0, 2, 4, 5).reshape(-1, math.prod(self._values), channels)
        return torch.bmm(values.mT, self._table(values).expand(len(values), -1, -1))

    def weight_work(self, channels: int, filters: int) -> int:
        """Multiply-adds that `weight` takes."""
        stored = self.spec.order * math.prod(self.spec.geometry.kernel_size)
        return channels * filters // self.spec.groups * stored * math.prod(self._values)

    @cached_property
    def _values(self) -> Ints:
        """Numbers of characters, of i, of taps on the axes that stay, of planes and of j."""
        cosets = len(self.chars.at[0])
        return self.chars.order, cosets, math.prod(self.rest[0]), len(self.chars.planes), cosets

    def values(self, channels: int) -> int:
        """Values of the sums of an image with this many channels."""
        return math.prod(self.grid) * channels * len(self.chars.planes)

    def fits(self, channels: int) -> bool:
        """Whether the cache holds the sums of an image with this many channels, and memory their index tables."""
        terms = sum(len(terms) for _, terms in self.chars.planes)
        entries = math.prod(self.grid) * terms * self.chars.order * self.spec.groups
        return self.values(channels) <= MOST_VALUES and entries <= MOST_ENTRIES

    def images(self, x: Tensor, weight: Tensor) -> Iterator[slice]:
        """Chunks whose sums stay in the cache, but have at least as many values as the weight."""
        values = max(1, self.values(x.shape[1]))
        is_ordered = not self.is_flat or (weight.shape[2] >= CONVOLVED_TERMS and shift.mkl_is_slow())
        most = max(CHUNK_BYTES, min(ORDERED * weight.nbytes, MOST_BYTES) * is_ordered)
        count = max(1, most // weight.itemsize // values, -(-weight.numel() // values))
        return (slice(n, n + count) for n in range(0, x.shape[0], count))

    def sums(self, x: Tensor) -> Tensor:
        """The sums of all planes, as `multiply` takes them."""
        rows = _last(x).to(_wide(x))
        for bags in self.inward:
            rows = bags.add(rows, len(x))
        return self.shaped(rows, len(x), self.grid)

    def shaped(self, rows: Tensor, batch: int, sizes: Ints) -> Tensor:
        """Rows as matrices (character and group, positions, ...), or as images."""
        if self.is_flat:
            return rows.view(self._blocks, batch * math.prod(sizes), -1)
        return rows.view(batch, *sizes, -1).movedim(-1, 1)

    def multiply(self, sums: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product y^, plus the bias in the trivial character, which every element gets once."""
        groups, cosets = self.spec.groups, len(self.chars.at[0])
        if bias is not None:
            bias = bias.to(weight.dtype).view(groups, 1, -1).expand(-1, cosets, -1).flatten()
            bias = F.pad(bias, (0, len(bias) * (self.chars.order - 1)))
        if self.is_flat:
            if weight.shape[2] >= CONVOLVED_TERMS and shift.is_convolved(sums[:1], weight[0]):
                hat = torch.stack([shift.convolved(a, w, self.out) for a, w in zip(sums, weight, strict=True)])
            else:
                hat = sums @ weight.mT
            return hat if bias is None else hat.add_(bias.view(len(hat), 1, -1))
        conv: Any = (F.conv2d, F.conv3d)[weight.ndim - 4]
        return _last(conv(sums, weight, bias, *self.rest[1:], self.chars.order * groups))

    def multiply_adjoint(
        self, dhat: Tensor, sums: Tensor, weight: Tensor, need_sums: bool, need_weight: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients of `multiply` with respect to the sums and the weight, where needed."""
        if self.is_flat and weight.shape[1] >= CONVOLVED_TERMS and shift.is_convolved(sums[:1], weight[0]):
            each = zip(dhat, sums, weight, strict=True)
            found = [shift.convolved_adjoint(d, a, w, self.out, need_sums, need_weight) for d, a, w in each]
            dsums, dweight = map(torch.stack, zip(*found, strict=True))
            return dsums, dweight
        if self.is_flat:
            return dhat @ weight if need_sums else dhat, dhat.mT @ sums if need_weight else dhat
        sizes = (*map(list, self.rest[1:]), False, [0] * len(self.sizes), self.chars.order * self.spec.groups)
        needs = [need_sums, need_weight, False]
        dsums, dweight, _ = torch.ops.aten.convolution_backward(dhat, sums, weight, None, *sizes, needs)
        return _last(dsums) if need_sums else dhat, dweight

    def work(self, channels: int, filters: int) -> tuple[int, int, int]:
        """Multiply-adds, values of sums and products, and additions of an image with this many fields."""
        chars, groups, order = self.chars, self.spec.groups, self.spec.order
        planes, cosets = len(chars.planes), len(chars.at[0])
        places = math.prod(self.out)
        products = order * cosets * planes * math.prod(self.rest[0]) * places * channels * filters // groups
        terms = sum(len(terms) for _, terms in chars.planes)
        values = math.prod(self.grid) * planes * order * channels + places * order * filters
        additions = order * (terms * (chars.order if self.is_direct else 1) * math.prod(self.grid)) * channels
        additions += order * chars.order * channels * math.prod(self.sizes) * (not self.is_direct)
        return products, values, additions + order * chars.order * filters * places


def _spread(entries: Entries, q: Tensor, p: Tensor, to_size: Ints, of_size: Ints) -> tuple[Tensor, Tensor, Tensor]:
    """The same entries from all positions p of the table to q of the result; sizes: positions and rows at each."""
    to_block, to_row, of_block, of_row, signs = torch.tensor(entries).unbind(1)
    to = (to_block * to_size[0] + q[:, None]) * to_size[1] + to_row
    of = (of_block * of_size[0] + p[:, None]) * of_size[1] + of_row
    return to.flatten(), of.flatten(), signs.expand_as(to).flatten()


def _bags_of(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], to_size: Ints, of_size: Ints, blocks: tuple[int, int] = (1, 1)
) -> Bags:
    to, of, signs = (torch.cat(part).int() for part in zip(*parts, strict=True))
    return Bags(to, of, signs, blocks[0] * math.prod(to_size), blocks[1] * math.prod(of_size), blocks)


@lru_cache(maxsize=64)
def fold(text: str, axes: int, sizes: Ints, whole: bool = False) -> Fold:
    """The `Fold` of a spec, kept for its tables."""
    keep_pages()
    return Fold(GroupSpec.of(text), axes, sizes, whole)


def chosen(x: Tensor, text: str, axes: int, backward: bool) -> Fold:
    """The `Fold`; `whole` where that is faster: for gradients of many channels, and for few positions, where ordering
    the weight for a convolution costs more than the convolution. Never where MKL is slow."""
    sizes, channels = tuple(x.shape[2:]), x.shape[1]
    one, other = fold(text, axes, sizes), fold(text, axes, sizes, True)
    if backward:
        pays = channels >= GRADIENT_CHANNELS * one.spec.groups and other.fits(channels)
    else:
        pays = len(x) * math.prod(one.out) * one.spec.groups < channels
    return other if pays and not one.is_flat and not shift.mkl_is_slow() else one


def fprop(x: Tensor, psi: Tensor, bias: Tensor | None, text: str, axes: int) -> Tensor:
    """y in the memory format of x. 16-bit inputs are computed in float32, since sums would round them."""
    plan = chosen(x, text, axes, False)
    weight = plan.weight(psi.to(_wide(x)))
    chunks = [*plan.images(x, weight)]
    shape = (x.shape[0], plan.spec.order * psi.shape[0], *plan.out)
    is_one = len(chunks) == 1 and is_last(x) and x.dtype == weight.dtype
    y = x if is_one else like(x, shape) if is_last(x) else x.new_empty(shape)
    for n in chunks:
        rows = plan.outward.add(plan.multiply(plan.sums(x[n]), weight, bias), len(x[n]))
        images = rows.view(len(x[n]), *plan.out, -1)
        if is_one:
            return images.movedim(-1, 1)
        y[n].movedim(1, -1).copy_(images if is_last(y) else apart(images))
    return y


fprop.__signature__ = inspect.signature(fprop)  # type: ignore[attr-defined]  # which autograd asks for in every call


def backward(
    dy: Tensor, x: Tensor, psi: Tensor, text: str, axes: int, need_x: bool, need_psi: bool
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to x and psi, empty where not needed. The sums are computed again."""
    plan = chosen(x, text, axes, True)
    weight = plan.weight(psi.to(_wide(x)))
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    dweight = torch.zeros_like(weight) if need_psi else x.new_empty(0)
    for n in plan.images(x, weight):
        images = len(x[n])
        rows = plan.outward.adjoint.add(_last(dy[n]).to(weight.dtype), images)
        dhat = plan.shaped(rows, images, plan.out)
        rows, dw = plan.multiply_adjoint(dhat, plan.sums(x[n]), weight, need_x, need_psi)
        if need_psi:
            dweight += dw
        if need_x:
            for bags in reversed(plan.inward):
                rows = bags.adjoint.add(rows, images)
            rows = rows.view(images, *plan.sizes, -1)
            dx[n].movedim(1, -1).copy_(rows if is_last(dx) else apart(rows))
    if need_psi:
        dweight = plan.weight_adjoint(dweight, psi.shape[1]).view(psi.shape).to(psi.dtype)
    return dx, dweight


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _last(x: Tensor) -> Tensor:
    return channels_last(x).movedim(1, -1)

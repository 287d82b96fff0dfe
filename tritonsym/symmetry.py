"""Symmetries of convolution filters as plain values: how they move taps, tie taps and pair filters.

Pure Python; no torch. Everything a kernel or the reference needs to know about a symmetry is one of three things:

- an `Element` g moves taps: ``(g w)[k] = w[g.source(k)]``;
- `tap_orbits` groups the taps of one filter that a symmetry ties together, with the sign each carries (`TapOrbits`);
- a `FilterLayout` says which output filters of a layer are images of which stored filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from itertools import product
from numbers import Integral

#: Axis letters and the spatial axis each one flips, counted from the last.
AXES = {"h": -1, "v": -2, "z": -3}

#: Groups in the order in which a layer stores their base filters; the images of a filter follow in this order too.
_IMAGES = {
    "h": ("h",),
    "v": ("v",),
    "z": ("z",),
    "hv": ("h", "v", "hv"),
    "hz": ("h", "z", "hz"),
    "vz": ("v", "z", "vz"),
    "hvz": ("h", "v", "z", "vz", "hz", "hv", "hvz"),
    "c2": ("r180",),
    "c4": ("r90", "r180", "r270"),
    "d4": ("r90", "r180", "r270", "h", "h r90", "h r180", "h r270"),
}


@dataclass(frozen=True)
class Element:
    """One group element: `turns` counter-clockwise quarter turns of the last two axes, then flips of the axes `flips`.

    As an operator on filters it is ``torch.rot90(w, turns, (-2, -1))`` followed by ``flip``; "h r90" reads right to
    left, like composed functions: turn first, then flip.
    """

    turns: int = 0
    flips: str = ""

    @classmethod
    def parse(cls, name: str) -> Element:
        turns, flips = 0, ""
        for part in name.split():
            if part.startswith("r"):
                turns = int(part[1:]) // 90
            else:
                flips = part
        return cls(turns, flips)

    def __str__(self) -> str:
        parts = [self.flips] if self.flips else []
        if self.turns:
            parts.append(f"r{90 * self.turns}")
        return " ".join(parts) or "id"

    def source(self, tap: tuple[int, ...], kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """The tap of w that stands at position `tap` of its image: (g w)[tap] = w[source]."""
        at = list(tap)
        for letter in self.flips:
            at[AXES[letter]] = kernel_size[AXES[letter]] - 1 - at[AXES[letter]]
        if self.turns == 2:
            at[-2:] = (kernel_size[-2] - 1 - at[-2], kernel_size[-1] - 1 - at[-1])
        elif self.turns:
            for _ in range(self.turns):  # square: one turn reads (i, j) from (j, size-1-i)
                at[-2:] = (at[-1], kernel_size[-1] - 1 - at[-2])
        return tuple(at)

    def slots(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """`source` for every tap, as flat row-major indices: which stored tap stands at each position of the image."""
        return tuple(_flat(self.source(tap, kernel_size), kernel_size) for tap in taps(kernel_size))

    def character(self, odd: str) -> int:
        """-1 if g flips an odd number of the axes named in `odd`, else 1."""
        return -1 if sum(letter in odd for letter in self.flips) % 2 else 1


def taps(kernel_size: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All tap positions of a kernel in row-major order."""
    return product(*map(range, kernel_size))


def _flat(tap: tuple[int, ...], kernel_size: tuple[int, ...]) -> int:
    index = 0
    for k, size in zip(tap, kernel_size, strict=True):
        index = index * size + k
    return index


@dataclass(frozen=True)
class Symmetry:
    """A symmetry of filters, parsed from and printed as its name.

    Groups: any combination of the axis letters ``h`` (left-right), ``v`` (up-down), ``z`` (depth), which is the group
    those flips generate, and in 2-D ``c2`` (half turn), ``c4`` (quarter turns), ``d4`` (quarter turns and flips).
    Ties only: ``radial`` (taps at equal distance from the centre) and ``radial:WIDTH`` (distances in rings
    [0, WIDTH), [WIDTH, 2 WIDTH), ..., in taps).

    >>> Symmetry("vh"), Symmetry("hv").order, [str(g) for g in Symmetry("c4").elements]
    (Symmetry('hv'), 4, ['id', 'r90', 'r180', 'r270'])

    Raises:
        ValueError: the name is none of these.
        TypeError: the name is not a string.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Symmetry: expected a name such as 'hv' or 'd4', got {self.name!r}")
        name = self.name
        if name and set(name) <= set(AXES) and len(set(name)) == len(name):
            object.__setattr__(self, "name", "".join(letter for letter in AXES if letter in name))
        elif name.startswith("radial:"):
            if not _is_positive_number(name[len("radial:") :]):
                raise ValueError(f"Symmetry: {name!r} needs a positive ring width, e.g. 'radial:0.5'")
        elif name != "radial" and name not in _IMAGES:
            raise ValueError(
                f"Symmetry: unknown name {name!r}; expected letters of 'hvz' (each at most once), 'c2', 'c4', 'd4', "
                "'radial' or 'radial:WIDTH'"
            )

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Symmetry({self.name!r})"

    @property
    def is_radial(self) -> bool:
        return self.name.startswith("radial")

    @cached_property
    def elements(self) -> tuple[Element, ...]:
        """The group: the identity, then the images in the order in which a layer's output lists them."""
        if self.is_radial:
            raise ValueError(f"{self.name!r} ties taps of one filter and has no images; use it with TiedConv")
        return (Element(), *map(Element.parse, _IMAGES[self.name]))

    @property
    def order(self) -> int:
        """Number of group elements = filters in one orbit."""
        return len(self.elements)

    @property
    def letters(self) -> str:
        """The axes that appear in the group's reflections; a parity assigns each a sign."""
        if self.is_radial:
            return "h"  # every ring is its own mirror image, whichever axis is flipped
        return "".join(letter for letter in AXES if any(letter in g.flips for g in self.elements))

    def check_kernel(self, kernel_size: tuple[int, ...], where: str) -> None:
        """Raise ValueError, in the name of the function `where`, unless the symmetry acts on this kernel size."""
        ndim = len(kernel_size)
        if self.is_radial:
            return
        if set(self.name) <= set(AXES):
            if any(-AXES[letter] > ndim for letter in self.name):
                valid = "".join(letter for letter in AXES if -AXES[letter] <= ndim)
                raise ValueError(
                    f"{where}: symmetry {self.name!r} flips an axis that a {ndim}-D layer does not have; "
                    f"its axis letters are {', '.join(map(repr, valid))}"
                )
        elif ndim != 2:
            raise ValueError(
                f"{where}: symmetry {self.name!r} turns a 2-D filter, but this layer is {ndim}-D; "
                "use axis letters of 'hvz'"
            )
        elif self.name != "c2" and kernel_size[0] != kernel_size[1]:
            side = max(kernel_size)
            raise ValueError(
                f"{where}: symmetry {self.name!r} needs a square kernel, got kernel_size "
                f"{_by(kernel_size)}; use {side}x{side}, or a symmetry of flips such as 'hv'"
            )

    def idle_axes(self, kernel_size: tuple[int, ...]) -> str:
        """Letters whose flip changes nothing because the kernel has size 1 along that axis; of turns both, or none."""
        if self.is_radial:
            return ""
        if not set(self.name) <= set(AXES):  # quarter or half turns, in the plane
            return "hv" if max(kernel_size[-2:]) == 1 else ""
        return "".join(letter for letter in self.name if kernel_size[AXES[letter]] == 1)


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _is_positive_number(text: str) -> bool:
    try:
        return Fraction(text) > 0
    except (ValueError, ZeroDivisionError):
        return False


# --- ties within one filter -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TapOrbits:
    """Which stored value, with which sign, stands at every tap of a filter that is its own image.

    ``dense[k] = sign[k] * stored[slot[k]]``, and 0 where ``slot[k] = -1``: there the stabiliser of the tap carries the
    sign -1, so w[k] = -w[k] forces zero and nothing is stored.
    """

    slot: tuple[int, ...]
    sign: tuple[int, ...]

    def __len__(self) -> int:
        return max(self.slot) + 1

    @property
    def multiplicity(self) -> tuple[int, ...]:
        """How many taps share each stored value."""
        return tuple(self.slot.count(s) for s in range(len(self)))


@cache
def tap_orbits(symmetry: Symmetry, kernel_size: tuple[int, ...], odd: str = "", where: str = "tap_orbits") -> TapOrbits:
    """Orbits of the taps of one filter under `symmetry`, numbered by their first tap in row-major order.

    `odd` names the axes whose reflection turns the filter into its negative (see `parity_axes`).

    Raises:
        ValueError: the symmetry does not act on this kernel, or the signs force every tap to zero.
    """
    symmetry.check_kernel(kernel_size, where)
    positions = list(taps(kernel_size))
    if symmetry.is_radial:
        if odd:
            raise ValueError(
                f"{where}: {symmetry.name!r} filters equal their mirror images, so odd parity forces every tap "
                "to zero; use parity='even'"
            )
        keys = [_ring(symmetry, tap, kernel_size) for tap in positions]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return TapOrbits(tuple(number[key] for key in keys), (1,) * len(keys))
    slot: dict[tuple[int, ...], int] = {}
    sign: dict[tuple[int, ...], int] = {}
    count = 0
    for tap in positions:
        if tap in slot:
            continue
        images = [(g.source(tap, kernel_size), g.character(odd)) for g in symmetry.elements]
        forced_zero = any(image == tap and chi < 0 for image, chi in images)
        for image, chi in images:
            slot[image], sign[image] = (-1, 0) if forced_zero else (count, chi)
        count += not forced_zero
    if count == 0:
        raise ValueError(
            f"{where}: odd parity of symmetry {symmetry.name!r} forces every tap of a {_by(kernel_size)} kernel to "
            "zero; use a larger kernel or parity='even'"
        )
    return TapOrbits(tuple(slot[tap] for tap in positions), tuple(sign[tap] for tap in positions))


def _ring(symmetry: Symmetry, tap: tuple[int, ...], kernel_size: tuple[int, ...]) -> int:
    """Four times the squared distance from the centre (an integer), or the number of its ring; exact either way."""
    squared = sum((2 * k - (size - 1)) ** 2 for k, size in zip(tap, kernel_size, strict=True))
    if symmetry.name == "radial":
        return squared
    width = Fraction(symmetry.name[len("radial:") :])
    return math.isqrt(math.floor(squared / (4 * width * width)))  # floor(distance / width)


def parity_axes(symmetry: Symmetry, parity: str | Mapping[str, str], where: str = "parity") -> str:
    """The axes whose reflection negates the filter: '' for 'even', all of them for 'odd', or as a mapping says.

    >>> parity_axes(Symmetry("hv"), {"h": "odd", "v": "even"})
    'h'

    Under 'odd' an element has the sign -1 per reflection it is made of: -1 for ``h``, 1 for ``hv`` and for rotations.
    """
    if isinstance(parity, str):
        if parity not in ("even", "odd"):
            raise ValueError(
                f"{where}: parity must be 'even', 'odd' or a mapping such as {{'h': 'odd'}}, got {parity!r}"
            )
        return symmetry.letters if parity == "odd" else ""
    if not isinstance(parity, Mapping):
        raise TypeError(f"{where}: parity must be 'even', 'odd' or a mapping such as {{'h': 'odd'}}, got {parity!r}")
    axes = symmetry.letters if symmetry.name in _IMAGES and set(symmetry.name) <= set(AXES) else ""
    for letter, value in parity.items():
        if letter not in tuple(axes):
            names = ", ".join(map(repr, axes)) or "none: use 'even' or 'odd'"
            raise ValueError(f"{where}: parity key {letter!r} is not an axis of symmetry {symmetry.name!r} ({names})")
        if value not in ("even", "odd"):
            raise ValueError(f"{where}: parity of {letter!r} must be 'even' or 'odd', got {value!r}")
    return "".join(letter for letter in axes if parity.get(letter) == "odd")


# --- the slot table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Stored filters of one conv group whose images follow one slot table.

    Output filter ``first + u`` of an image is ``dense[k] = sign[k] * stored[u, slot[k]]``, for u < filters.
    """

    filters: int
    slots: int
    images: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]  # (first output filter, slot, sign)


@cache
def tied_blocks(orbits: TapOrbits, tied: int, free: int) -> tuple[Block, ...]:
    """The table of `tied` filters per group that are their own image, followed by `free` ordinary ones."""
    size = len(orbits.slot)
    blocks = (Block(tied, len(orbits), ((0, orbits.slot, orbits.sign),)), _free_block(free, size, tied))
    return tuple(block for block in blocks if block.filters)


def _free_block(filters: int, size: int, first: int) -> Block:
    return Block(filters, size, ((first, tuple(range(size)), (1,) * size),))


# --- orbits of filters ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterLayout:
    """Which output filters of a layer are images of which stored filter, per conv group.

    Output order inside every group: all base filters in key order ``h v z hv hz vz hvz c2 c4 d4``, then the free
    filters, then the images, key by key and element by element, each for all base filters of its key. (The order of
    the CNN-Symmetry package, so its checkpoints load unchanged.) Stored filters are the base and free filters.
    """

    orbits: tuple[tuple[Symmetry, int], ...]  # (symmetry, base filters per group), in key order, none of them 0
    free: int  # free filters per group
    groups: int = 1
    text: str = field(init=False, repr=False, compare=False)  # kept, because Dynamo cannot trace the making of it
    out_channels: int = field(init=False, repr=False, compare=False)
    stored_channels: int = field(init=False, repr=False, compare=False)  # base filters + free filters

    @classmethod
    def parse(
        cls,
        spec: str | Mapping[str, int | str] | None,
        out_channels: int,
        groups: int = 1,
        where: str = "FilterLayout",
    ) -> FilterLayout:
        """The layout of `out_channels` filters in `groups` groups.

        `spec` is one name (every filter), or a mapping from names to counts of OUTPUT filters or to percents
        (``'50%'``: round(out_channels / 2), rounded down to whole orbits in every group), or None (all free).
        What the mapping leaves over is free filters.

        Raises:
            ValueError: an unknown key, a count that does not fill whole orbits, or more filters than `out_channels`;
                the message names the key, the number and the nearest valid ones.
            TypeError: the spec, a key or a count is of the wrong kind.
        """
        if spec is None:
            spec = {}
        if isinstance(spec, str):
            spec = {spec: out_channels}
        if not isinstance(spec, Mapping):
            raise TypeError(
                f"{where}: symmetry must be a name such as 'hv', a mapping such as {{'h': 4, 'hv': '50%'}} or None, "
                f"got {spec!r}"
            )
        for name, count in (("out_channels", out_channels), ("groups", groups)):
            if isinstance(count, bool) or not isinstance(count, Integral):
                raise TypeError(f"{where}: {name} must be an integer, got {count!r}")
        if groups < 1 or out_channels % groups:
            raise ValueError(
                f"{where}: out_channels={out_channels} must be a multiple of groups={groups}, which must be positive"
            )
        out_channels, groups = int(out_channels), int(groups)
        counts: dict[Symmetry, int] = {}
        for key, value in spec.items():
            symmetry = _filter_symmetry(key, where)
            if symmetry in counts:
                raise ValueError(f"{where}: symmetry {symmetry.name!r} is given twice, the second time as {key!r}")
            counts[symmetry] = _count(symmetry, value, out_channels, groups, where)
        total = sum(counts.values())
        if total > out_channels:
            listed = " + ".join(f"{count} ({symmetry})" for symmetry, count in counts.items())
            raise ValueError(
                f"{where}: symmetry asks for {listed} = {total} filters, but out_channels is {out_channels}; "
                f"raise out_channels to {total} or lower the counts"
            )
        return cls._from_counts(counts, out_channels - total, groups)

    @classmethod
    def from_stored(
        cls,
        spec: str | Mapping[str, int] | FilterLayout | None,
        stored: int,
        groups: int = 1,
        where: str = "FilterLayout",
    ) -> FilterLayout:
        """The layout that stores `stored` filters: what a function infers from a weight.

        A name means that every stored filter is a base filter; a mapping holds counts of output filters, and the
        stored filters it leaves over are free. Percents are ambiguous here: pass counts, or a parsed `FilterLayout`.
        """
        if isinstance(spec, FilterLayout):
            if (spec.stored_channels, spec.groups) != (stored, groups):
                raise ValueError(
                    f"{where}: weight holds {stored} filters in {groups} groups, but the layout {str(spec)!r} stores "
                    f"{spec.stored_channels} in {spec.groups}"
                )
            return spec
        if isinstance(spec, str):
            return cls.parse(spec, stored * _filter_symmetry(spec, where).order, groups, where)
        if spec is not None and not isinstance(spec, Mapping):
            raise TypeError(
                f"{where}: symmetry must be a name, a mapping of counts, a FilterLayout or None, got {spec!r}"
            )
        out_channels, bases = stored, 0
        for key, value in (spec or {}).items():
            symmetry = _filter_symmetry(key, where)
            if isinstance(value, str):
                raise ValueError(
                    f"{where}: {key}={value!r} does not say how many filters the weight stands for; pass counts, or "
                    "FilterLayout.parse(symmetry, out_channels, groups)"
                )
            count = _count(symmetry, value, None, groups, where)
            out_channels += count - count // symmetry.order
            bases += count // symmetry.order
        if bases > stored:
            raise ValueError(
                f"{where}: weight holds {stored} filters, too few for the {bases} base filters of symmetry {spec!r}"
            )
        return cls.parse(spec, out_channels, groups, where)

    @classmethod
    def from_text(cls, text: str, groups: int = 1) -> FilterLayout:
        """Inverse of `str`: 'h:2 hv:8 free:2' counts output filters of all groups together."""
        counts = {key: int(count) for key, count in (item.split(":") for item in text.split())}
        free = counts.pop("free", 0)
        return cls._from_counts({Symmetry(key): count for key, count in counts.items()}, free, groups)

    @classmethod
    def _from_counts(cls, counts: Mapping[Symmetry, int], free: int, groups: int) -> FilterLayout:
        ordered = sorted(counts, key=lambda symmetry: list(_IMAGES).index(symmetry.name))
        orbits = tuple((s, counts[s] // (s.order * groups)) for s in ordered if counts[s])
        return cls(orbits, free // groups, groups)

    def __post_init__(self) -> None:
        items = [f"{symmetry}:{count}" for symmetry, count in self.counts.items()]
        if self.free:
            items.append(f"free:{self.free * self.groups}")
        object.__setattr__(self, "text", " ".join(items))
        object.__setattr__(self, "out_channels", sum(self.counts.values()) + self.free * self.groups)
        object.__setattr__(self, "stored_channels", self.stored_per_group * self.groups)

    def __str__(self) -> str:
        return self.text

    @property
    def counts(self) -> dict[Symmetry, int]:
        """Output filters of every symmetry, over all groups."""
        return {symmetry: bases * symmetry.order * self.groups for symmetry, bases in self.orbits}

    @property
    def stored_per_group(self) -> int:
        return sum(bases for _, bases in self.orbits) + self.free

    @cached_property
    def filters(self) -> tuple[tuple[int, Element], ...]:
        """For every output filter of one group, in output order: its stored filter and the element that makes it."""
        stored = [(u, Element()) for u in range(self.stored_per_group)]
        images = [(u, g) for symmetry, bases in self.bases for g in symmetry.elements[1:] for u in bases]
        return tuple(stored + images)

    @property
    def bases(self) -> tuple[tuple[Symmetry, range], ...]:
        """For every symmetry, the range of stored filters (within a group) that are its base filters."""
        ranges, start = [], 0
        for symmetry, count in self.orbits:
            ranges.append((symmetry, range(start, start + count)))
            start += count
        return tuple(ranges)

    def blocks(self, kernel_size: tuple[int, ...]) -> tuple[Block, ...]:
        """The slot table of one group: for every symmetry its base filters and all their images, then the free ones."""
        return _layout_blocks(self, kernel_size)

    def check_kernel(self, kernel_size: tuple[int, ...], where: str) -> None:
        """Raise ValueError unless every symmetry of the layout acts on this kernel size."""
        for symmetry, _ in self.orbits:
            symmetry.check_kernel(kernel_size, where)


@cache
def _layout_blocks(layout: FilterLayout, kernel_size: tuple[int, ...]) -> tuple[Block, ...]:
    size = math.prod(kernel_size)
    first = layout.stored_per_group
    blocks = []
    for symmetry, bases in layout.bases:
        images = [(bases.start, Element().slots(kernel_size), (1,) * size)]
        for g in symmetry.elements[1:]:
            images.append((first, g.slots(kernel_size), (1,) * size))
            first += len(bases)
        blocks.append(Block(len(bases), size, tuple(images)))
    if layout.free:
        blocks.append(_free_block(layout.free, size, layout.stored_per_group - layout.free))
    return tuple(blocks)


def _filter_symmetry(key: object, where: str) -> Symmetry:
    if not isinstance(key, str):
        raise TypeError(f"{where}: symmetry keys are names such as 'hv', got {key!r}")
    try:
        symmetry = Symmetry(key)
    except ValueError:
        raise ValueError(f"{where}: unknown symmetry {key!r}; expected one of {', '.join(_IMAGES)}") from None
    if symmetry.is_radial:
        raise ValueError(f"{where}: {key!r} ties taps of one filter and has no images; use TiedConv for it")
    return symmetry


def _count(symmetry: Symmetry, value: object, out_channels: int | None, groups: int, where: str) -> int:
    """Check one entry of a layout spec and return it as a number of output filters."""
    orbit = symmetry.order * groups
    if isinstance(value, str):
        number = value[:-1].strip()
        if not value.endswith("%") or not (number == "0" or _is_positive_number(number)) or Fraction(number) > 100:
            raise ValueError(
                f"{where}: {symmetry}={value!r} is not a percentage; expected '0%' to '100%', e.g. '50%', or a count"
            )
        assert out_channels is not None
        return round(Fraction(number) * out_channels / 100) // orbit * orbit
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{where}: {symmetry}={value!r} must be a count of output filters or a percentage such as '50%'"
        )
    value = int(value)
    if value < 0 or value % orbit:
        below = max(value // orbit * orbit, 0)
        in_groups = f" in each of {groups} groups" if groups > 1 else ""
        raise ValueError(
            f"{where}: {symmetry}={value} filters do not fill whole orbits of {symmetry.order}{in_groups}; "
            f"nearest valid counts: {below} or {below + orbit}, or a percentage, which is rounded down"
        )
    return value

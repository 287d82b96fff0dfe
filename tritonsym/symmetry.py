"""Symmetries of convolution filters as plain values. Pure Python; no torch.

An `Element` moves the taps of a filter, `tap_orbits` ties them together up to sign, and a `FilterLayout` says which
output filters of a layer are images of which stored filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from itertools import accumulate, product
from numbers import Integral
from typing import Any

#: Axis letters and the spatial axis each one flips, counted from the last.
AXES = {"h": -1, "v": -2, "z": -3}

#: Groups in the order in which a layer stores their base filters, and the images of a filter in output order.
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
#: `Symmetry.mirrors` of the groups that turn filters; flips are their own.
_MIRRORS = {"c2": ("r180",), "c4": ("r180",), "d4": ("h", "h r180")}


@dataclass(frozen=True)
class Element:
    """One group element: `turns` counter-clockwise quarter turns of the last two axes, then flips of the axes `flips`.

    On filters: ``torch.rot90(w, turns, (-2, -1))``, then ``flip``. Its name, such as "h r90", reads right to left.
    """

    turns: int = 0
    flips: str = ""

    @classmethod
    def parse(cls, name: str) -> Element:
        flips, turn, angle = name.removeprefix("id").rpartition("r")
        return cls(int(angle) // 90, flips.strip()) if turn else cls(0, angle)

    def __str__(self) -> str:
        return f"{self.flips} r{90 * self.turns}".strip() if self.turns else self.flips or "id"

    def source(self, tap: tuple[int, ...], kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """The tap of w that stands at position `tap` of its image: (g w)[tap] = w[source]."""
        at = list(tap)
        for letter in self.flips:
            at[AXES[letter]] = kernel_size[AXES[letter]] - 1 - at[AXES[letter]]
        for turn in range(self.turns, 0, -1):  # one turn reads (i, j) from (j, width - 1 - i)
            at[-2:] = (at[-1], kernel_size[-1 if turn % 2 else -2] - 1 - at[-2])
        return tuple(at)

    def slots(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """`source` of every tap, as flat row-major indices."""
        number = {tap: i for i, tap in enumerate(taps(kernel_size))}
        return tuple(number[self.source(tap, kernel_size)] for tap in number)

    def character(self, odd: str) -> int:
        """-1 if g flips an odd number of the axes named in `odd`, else 1."""
        return -1 if sum(letter in odd for letter in self.flips) % 2 else 1


def taps(kernel_size: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All tap positions of a kernel in row-major order."""
    return product(*map(range, kernel_size))


@dataclass(frozen=True)
class Symmetry:
    """A symmetry of filters, parsed from and printed as its name.

    Groups: any combination of the axis letters ``h`` (left-right), ``v`` (up-down), ``z`` (depth), meaning the group
    those flips generate; in 2-D also ``c2`` (half turn), ``c4`` (quarter turns), ``d4`` (quarter turns and flips).
    Ties only: ``radial`` (taps at equal distance from the centre) and ``radial:WIDTH`` (in one ring of
    distances: [0, WIDTH), [WIDTH, 2 WIDTH), ..., in taps).

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
        if name and self.only_flips and len(set(name)) == len(name):
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

    @property
    def only_flips(self) -> bool:
        return set(self.name) <= set(AXES)

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

    @cached_property
    def products(self) -> tuple[tuple[int, ...], ...]:
        """The multiplication table: elements[products[i][j]] is elements[i] after elements[j].

        >>> [row.index(0) for row in Symmetry("c4").products]  # the inverses
        [0, 3, 2, 1]
        """
        moves = [g.slots((3,) * max(map(abs, AXES.values()))) for g in self.elements]  # distinct for all elements
        return tuple(tuple(moves.index(tuple(h[k] for k in g)) for h in moves) for g in moves)

    @property
    def mirrors(self) -> tuple[Element, ...]:
        """Generators of the largest subgroup of commuting involutions.

        >>> [[str(g) for g in Symmetry(name).mirrors] for name in ("hz", "c4", "d4")]
        [['h', 'z'], ['r180'], ['h', 'h r180']]
        """
        return tuple(map(Element.parse, self.name if self.only_flips else _MIRRORS.get(self.name, ())))

    @property
    def letters(self) -> str:
        """The axes that appear in the group's reflections; a parity gives each of them a sign."""
        if self.is_radial:
            return "h"  # every ring is its own mirror image, whichever axis is flipped
        return "".join(letter for letter in AXES if any(letter in g.flips for g in self.elements))

    def check_kernel(self, kernel_size: tuple[int, ...], where: str) -> None:
        """Raise a ValueError that names `where`, unless the symmetry acts on this kernel size."""
        ndim, side = len(kernel_size), max(kernel_size)
        axes = [letter for letter in AXES if -AXES[letter] <= ndim]
        if self.is_radial or (self.only_flips and set(self.name) <= set(axes)):
            return
        if self.only_flips:
            problem = f"flips an axis that a {ndim}-D layer does not have; its axis letters are {str(axes)[1:-1]}"
        elif ndim != 2:
            problem = f"turns a 2-D filter, but this layer is {ndim}-D; use axis letters of 'hvz'"
        elif self.name != "c2" and set(kernel_size) != {side}:
            size = _by(kernel_size)
            problem = (
                f"needs a square kernel, got kernel_size {size}; use {side}x{side}, or a symmetry of flips such as 'hv'"
            )
        else:
            return
        raise ValueError(f"{where}: symmetry {self.name!r} {problem}")

    def idle_axes(self, kernel_size: tuple[int, ...]) -> str:
        """Letters whose flip changes nothing because the kernel has size 1 along that axis; for turns 'hv' or ''."""
        if self.only_flips:
            return "".join(letter for letter in self.name if kernel_size[AXES[letter]] == 1)
        return "hv" if not self.is_radial and max(kernel_size[-2:]) == 1 else ""


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

    ``dense[k] = sign[k] * stored[slot[k]]``, and 0 where ``slot[k] = -1``, because some element maps w[k] to -w[k].
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

    `odd` names the axes whose reflection negates the filter (see `parity_axes`).

    Raises:
        ValueError: the symmetry does not act on this kernel, or the signs force every tap to zero.
    """
    symmetry.check_kernel(kernel_size, where)
    if symmetry.is_radial:
        if odd:
            raise ValueError(
                f"{where}: {symmetry.name!r} filters equal their mirror images, so odd parity forces every tap "
                "to zero; use parity='even'"
            )
        rings = [_ring(symmetry, tap, kernel_size) for tap in taps(kernel_size)]
        number = {ring: i for i, ring in enumerate(dict.fromkeys(rings))}
        return TapOrbits(tuple(number[ring] for ring in rings), (1,) * len(rings))
    orbits = signed_orbits(tuple((g.slots(kernel_size), g.character(odd)) for g in symmetry.elements))
    if len(orbits) == 0:
        raise ValueError(
            f"{where}: odd parity of symmetry {symmetry.name!r} forces every tap of a {_by(kernel_size)} kernel to "
            "zero; use a larger kernel or parity='even'"
        )
    return orbits


def signed_orbits(group: tuple[tuple[tuple[int, ...], int], ...]) -> TapOrbits:
    """Orbits of the taps under elements given by their `Element.slots` and signs, numbered by their first tap."""
    ties: dict[int, tuple[int, int]] = {}  # tap -> (slot, sign)
    count = 0
    for tap in range(len(group[0][0])):
        if tap not in ties:
            images = [(source[tap], sign) for source, sign in group]
            forced_zero = (tap, -1) in images
            ties.update((image, (-1, 0) if forced_zero else (count, sign)) for image, sign in images)
            count += not forced_zero
    slot, sign = zip(*(ties[tap] for tap in sorted(ties)), strict=True)
    return TapOrbits(slot, sign)


def _ring(symmetry: Symmetry, tap: tuple[int, ...], kernel_size: tuple[int, ...]) -> int:
    """Four times the squared distance from the centre (an integer), or the number of its ring; exact either way."""
    squared = sum((2 * k - (size - 1)) ** 2 for k, size in zip(tap, kernel_size, strict=True))
    if symmetry.name == "radial":
        return squared
    width = Fraction(symmetry.name[len("radial:") :])
    return math.isqrt(math.floor(squared / (4 * width * width)))  # floor(distance / width)


def parity_axes(symmetry: Symmetry, parity: str | Mapping[str, str], where: str = "parity") -> str:
    """The axes whose reflection negates the filter: '' for 'even', all of them for 'odd', or the odd ones of a mapping.

    >>> parity_axes(Symmetry("hv"), {"h": "odd", "v": "even"})
    'h'

    Under 'odd' every reflection in an element contributes a factor -1: ``h`` has -1, ``hv`` and rotations have 1.
    """
    if isinstance(parity, Mapping):
        axes = symmetry.letters if symmetry.only_flips else ""
        for letter, value in parity.items():
            if letter not in tuple(axes):
                names = ", ".join(map(repr, axes)) or "none: use 'even' or 'odd'"
                raise ValueError(
                    f"{where}: parity key {letter!r} is not an axis of symmetry {symmetry.name!r} ({names})"
                )
            if value not in ("even", "odd"):
                raise ValueError(f"{where}: parity of {letter!r} must be 'even' or 'odd', got {value!r}")
        return "".join(letter for letter in axes if parity.get(letter) == "odd")
    if not isinstance(parity, str) or parity not in ("even", "odd"):
        error = ValueError if isinstance(parity, str) else TypeError
        raise error(f"{where}: parity must be 'even', 'odd' or a mapping such as {{'h': 'odd'}}, got {parity!r}")
    return symmetry.letters if parity == "odd" else ""


# --- orbits of filters ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterLayout:
    """Which output filters of a layer are images of which stored filter, per conv group.

    Output order inside every group, as in the CNN-Symmetry package: all base filters in key order ``h v z hv hz vz hvz
    c2 c4 d4``, then the free filters (both are stored), then the images, key by key and element by element, each for
    all base filters of its key.

    >>> layout = FilterLayout.parse("h:4 free:1", 5)
    >>> [(stored, str(element)) for stored, element in layout.filters]
    [(0, 'id'), (1, 'id'), (2, 'id'), (0, 'h'), (1, 'h')]
    """

    orbits: tuple[tuple[Symmetry, int], ...]  # (symmetry, base filters per group), in key order, none of them 0
    free: int  # free filters per group
    groups: int = 1
    # stored, because Dynamo cannot trace their computation
    text: str = field(init=False, repr=False, compare=False)
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

        Args:
            spec: a name (for every filter); or a mapping from names to counts of OUTPUT filters or to percents
                (``'50%'``: round(out_channels / 2), rounded down to whole orbits in every group); or that as text,
                ``'h:50% hv:8'``, the form of `str` of a layout; or None. The remaining filters are free.
        Raises:
            ValueError: an unknown key, a count that does not fill whole orbits, or more filters than `out_channels`;
                the message names the key, the number and the nearest valid ones.
            TypeError: the spec, a key or a count is of the wrong kind.
        """
        spec, free = as_mapping({} if spec is None else spec, where)
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
        if free not in (None, out_channels - total):
            raise ValueError(
                f"{where}: free:{free} is asked for, but the symmetries leave {out_channels - total} of {out_channels} "
                "filters; drop it, or change a count"
            )
        ordered = sorted(counts, key=lambda symmetry: list(_IMAGES).index(symmetry.name))
        orbits = tuple((s, counts[s] // (s.order * groups)) for s in ordered if counts[s])
        return cls(orbits, (out_channels - total) // groups, groups)

    @classmethod
    def from_stored(
        cls,
        spec: str | Mapping[str, int] | FilterLayout | None,
        stored: int,
        groups: int = 1,
        where: str = "FilterLayout",
    ) -> FilterLayout:
        """The layout that stores `stored` filters, as a function infers it from a weight.

        With a name, all are base filters; with counts of output filters, the rest is free. Percents are an error.
        """
        if isinstance(spec, FilterLayout):
            if (spec.stored_channels, spec.groups) != (stored, groups):
                raise ValueError(
                    f"{where}: weight holds {stored} filters in {groups} groups, but the layout {str(spec)!r} stores "
                    f"{spec.stored_channels} in {spec.groups}"
                )
            return spec
        counts, _ = as_mapping(spec, where)
        if isinstance(counts, str):
            return cls.parse(counts, stored * _filter_symmetry(counts, where).order, groups, where)
        if counts is not None and not isinstance(counts, Mapping):
            raise TypeError(
                f"{where}: symmetry must be a name, a mapping of counts, a FilterLayout or None, got {counts!r}"
            )
        outputs = bases = 0
        for key, value in (counts or {}).items():
            symmetry = _filter_symmetry(key, where)
            if isinstance(value, str):
                raise ValueError(
                    f"{where}: {key}={value!r} does not say how many filters the weight stands for; pass counts, or "
                    "FilterLayout.parse(symmetry, out_channels, groups)"
                )
            count = _count(symmetry, value, 0, groups, where)
            outputs += count
            bases += count // symmetry.order
        if bases > stored:
            raise ValueError(
                f"{where}: weight holds {stored} filters, too few for the {bases} base filters of symmetry {counts!r}"
            )
        return cls.parse(spec, stored - bases + outputs, groups, where)

    def __post_init__(self) -> None:
        counts: dict[Any, int] = {**self.counts, **({"free": self.free * self.groups} if self.free else {})}
        object.__setattr__(self, "text", " ".join(f"{name}:{count}" for name, count in counts.items()))
        object.__setattr__(self, "out_channels", sum(counts.values()))
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
    def by_field(self) -> tuple[int, ...]:
        """The output channels with every orbit in one piece, in element order: ``y[:, by_field]``."""
        size = len(self.filters)
        order = sorted(range(size), key=lambda channel: self.filters[channel][0])
        return tuple(group * size + channel for group in range(self.groups) for channel in order)

    @property
    def bases(self) -> tuple[tuple[Symmetry, range], ...]:
        """For every symmetry, the range of stored filters (within a group) that are its base filters."""
        ends = accumulate(count for _, count in self.orbits)
        return tuple((s, range(end - count, end)) for (s, count), end in zip(self.orbits, ends, strict=True))

    def check_kernel(self, kernel_size: tuple[int, ...], where: str) -> None:
        """Raise ValueError unless every symmetry of the layout acts on this kernel size."""
        for symmetry, _ in self.orbits:
            symmetry.check_kernel(kernel_size, where)


def as_mapping(spec: object, where: str) -> tuple[Any, int | None]:
    """Parse text such as 'h:50% hv:8 free:2' (or with commas) into a mapping and the count of free filters, if any."""
    if not isinstance(spec, str) or ":" not in spec or spec.startswith("radial"):
        return spec, None
    counts: dict[str, int | str] = {}
    for item in spec.replace(",", " ").split():
        key, _, count = item.partition(":")
        if key in counts or not count:
            raise ValueError(f"{where}: expected names and counts such as 'h:50% hv:8', each name once, got {spec!r}")
        counts[key] = int(count) if count.isdecimal() else count
    free = counts.pop("free", None)
    if isinstance(free, str):
        raise ValueError(f"{where}: free:{free} must be a count of filters; leave it out to free all remaining filters")
    return counts, free


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


def _count(symmetry: Symmetry, value: object, out_channels: int, groups: int, where: str) -> int:
    """Check one entry of a layout spec and return it as a number of output filters."""
    orbit = symmetry.order * groups
    if isinstance(value, str):
        number = value[:-1].strip()
        if not value.endswith("%") or not (number == "0" or _is_positive_number(number)) or Fraction(number) > 100:
            raise ValueError(
                f"{where}: {symmetry}={value!r} is not a percentage; expected '0%' to '100%', e.g. '50%', or a count"
            )
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

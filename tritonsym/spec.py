"""One description of every convolution: which stored weight, with which sign, stands at every tap of every filter.

A `ConvSpec` describes all of a convolution but its tensors. Orbit, tied, pooled and transposed layers parse their
arguments into one, and every path computes from one. Pure Python, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property, lru_cache

from tritonsym.symmetry import Element, FilterLayout, Symmetry, TapOrbits, tap_orbits

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """The spatial part of a convolution: y at position p reads x at stride p + dilation k - padding.

    With `transposed`, x at position q adds to y at stride q + dilation k - padding. `extra` is added on the far side
    only: the additional zeros of an uneven padding='same', or the output_padding of a transposed convolution.
    """

    kernel_size: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    extra: Ints
    transposed: bool = False

    def out_sizes(self, sizes: Sequence[int]) -> Ints:
        return out_sizes(self, sizes)


def out_sizes(geometry: Geometry, sizes: Sequence[int]) -> Ints:
    """The spatial sizes of y, from those of x. A function, because Dynamo cannot trace methods of a constant."""
    reach = [d * (k - 1) for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    axes = zip(sizes, geometry.stride, geometry.padding, reach, geometry.extra, strict=True)
    if geometry.transposed:
        return tuple((n - 1) * s - 2 * p + r + 1 + e for n, s, p, r, e in axes)
    return tuple((n + 2 * p + e - r - 1) // s + 1 for n, s, p, r, e in axes)


@dataclass(frozen=True)
class Block:
    """Stored filters of one group and their images: dense[first + u] = g untied(stored[u]) for every image (first, g).

    The first image is the identity. `orbits` ties the taps of the stored filters; if None, all are stored.
    """

    filters: int
    images: tuple[tuple[int, Element], ...]
    orbits: TapOrbits | None = None


def count_of(orbits: TapOrbits) -> int:
    """`len(orbits)` in a form that Dynamo can trace."""
    return max(orbits.slot) + 1


@dataclass(frozen=True)
class ConvSpec:
    """The blocks, equal in all groups, the geometry and, as `pool`, 'max' or 'min' over the images of the only block.

    Stored weights: a block with tied taps has its own tensor (groups filters, C, orbits), in the order of the blocks;
    all others share one (groups stored, C, *kernel), or if transposed (groups C, stored, *kernel).
    """

    blocks: tuple[Block, ...]
    groups: int
    geometry: Geometry
    pool: str | None = None
    # fields, because Dynamo cannot trace properties of frozen dataclasses
    rows: int = field(init=False, repr=False, compare=False)  # stored values per group and channel
    filters: int = field(init=False, repr=False, compare=False)  # in the dense weight
    stored_filters: int = field(init=False, repr=False, compare=False)
    out_channels: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (
            ("rows", sum(block.filters * self.slots(block) for block in self.blocks)),
            ("filters", self.groups * sum(block.filters * len(block.images) for block in self.blocks)),
            ("stored_filters", self.groups * sum(block.filters for block in self.blocks)),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "out_channels", self.stored_filters if self.pool else self.filters)

    @cached_property
    def text(self) -> str:
        """The spec as a string, since torch ops take no objects; `of` parses it."""
        blocks = [
            (b.filters, [(first, str(g)) for first, g in b.images], b.orbits and astuple(b.orbits)) for b in self.blocks
        ]
        return json.dumps([blocks, self.groups, astuple(self.geometry), self.pool], separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(text: str) -> ConvSpec:
        def frozen(value: object) -> object:
            return tuple(map(frozen, value)) if isinstance(value, list) else value

        blocks, groups, geometry, pool = json.loads(text)
        return ConvSpec(
            tuple(
                Block(
                    filters,
                    tuple((first, Element.parse(g)) for first, g in images),
                    orbits and TapOrbits(*map(tuple, orbits)),
                )
                for filters, images, orbits in blocks
            ),
            groups,
            Geometry(*map(frozen, geometry)),  # type: ignore[arg-type]
            pool,
        )

    def slots(self, block: Block) -> int:
        """Stored values per filter and channel."""
        return count_of(block.orbits) if block.orbits is not None else math.prod(self.geometry.kernel_size)

    @cached_property
    def slot_table(self) -> tuple[tuple[tuple[int, Ints, Ints], ...], ...]:
        """For every block and image: the first output filter, and the stored slot and the sign at each tap.

        ``dense[first + u, c, k] = sign[k] stored[u, c, slot[k]]``; a sign of 0 forces zero.
        """
        kernel = self.geometry.kernel_size
        tables = []
        for block in self.blocks:
            ties = block.orbits or TapOrbits(tuple(range(math.prod(kernel))), (1,) * math.prod(kernel))
            images = []
            for first, g in block.images:
                taps = g.slots(kernel)
                images.append((first, tuple(ties.slot[k] for k in taps), tuple(ties.sign[k] for k in taps)))
            tables.append(tuple(images))
        return tuple(tables)

    @cached_property
    def row_table(self) -> tuple[Ints, ...]:
        """For every filter of a group and every tap: sign * (row + 1), 0 where the sign forces zero.

        The rows of a group are its stored weights: block by block, slot by slot, filter by filter.
        """
        taps_of: dict[int, Ints] = {}
        row = 1
        for block, images in zip(self.blocks, self.slot_table, strict=True):
            for first, slots, signs in images:
                for u in range(block.filters):
                    taps_of[first + u] = tuple(
                        sign * (row + slot * block.filters + u) for slot, sign in zip(slots, signs, strict=True)
                    )
            row += block.filters * self.slots(block)
        return tuple(taps_of[o] for o in sorted(taps_of))

    def weight_shapes(self, channels: int) -> list[Ints]:
        return weight_shapes(self, channels)


def weight_shapes(spec: ConvSpec, channels: int) -> list[Ints]:
    """Shapes of the stored weights for `channels` input channels per group."""
    plain = sum(block.filters for block in spec.blocks if block.orbits is None)
    ends = (spec.groups * channels, plain) if spec.geometry.transposed else (spec.groups * plain, channels)
    tied = [(spec.groups * b.filters, channels, count_of(b.orbits)) for b in spec.blocks if b.orbits is not None]
    return [*tied, *([(*ends, *spec.geometry.kernel_size)] if plain else [])]


def check(
    spec: ConvSpec, where: str, x: Sequence[int], weights: Sequence[Sequence[int]], bias: Sequence[int] | None
) -> None:
    """Raise a ValueError that names `where`, unless these shapes of x (N, C, *sizes), weights and bias fit."""
    geometry, first = spec.geometry, weights[0]
    channels = first[0] // spec.groups if geometry.transposed else first[1] if len(first) > 1 else 0
    names = ["weight", "free_weight"] if spec.blocks[0].orbits is not None else ["weight"]
    for name, got, expected in zip(names, weights, weight_shapes(spec, channels), strict=False):
        if tuple(got) != expected:
            raise ValueError(
                f"{where}: {name} has shape {tuple(got)}, expected {expected} for kernels of size "
                f"{geometry.kernel_size}: one value per tap, or per tap orbit of tied filters; from_dense of the layer "
                "projects dense weights"
            )
    axes = ", ".join(("D", "H", "W")[-len(geometry.kernel_size) :]) if len(geometry.kernel_size) > 1 else "L"
    if len(x) != len(geometry.kernel_size) + 2:
        raise ValueError(f"{where}: x must have shape (N, C_in, {axes}) or (C_in, {axes}), got {tuple(x)}")
    if x[1] != channels * spec.groups:
        raise ValueError(
            f"{where}: x has {x[1]} channels (shape {tuple(x)}) but the weight expects {channels * spec.groups}"
        )
    out = out_sizes(geometry, x[2:])
    if any(size < 1 for size in out):
        if geometry.transposed:
            raise ValueError(f"{where}: padding={geometry.padding} leaves an output of size {out}; pad less")
        each = zip(x[2:], geometry.padding, geometry.extra, strict=True)
        raise ValueError(
            f"{where}: the kernel {geometry.kernel_size} (dilation {geometry.dilation}) exceeds the padded input "
            f"{tuple(n + 2 * p + e for n, p, e in each)}; pad more"
        )
    lengths = [spec.out_channels] if spec.pool else [spec.out_channels, spec.stored_filters]
    if bias is not None and (len(bias) != 1 or bias[0] not in lengths):
        allowed = " or ".join(f"({n},)" for n in dict.fromkeys(lengths))
        raise ValueError(f"{where}: bias must have shape {allowed}, got {tuple(bias)}")


@lru_cache(maxsize=4096)
def orbit_spec(layout: FilterLayout, geometry: Geometry) -> ConvSpec:
    """Filters in orbits, beside free ones, in the output order of the layout."""
    first = layout.stored_per_group
    blocks = []
    for symmetry, bases in layout.bases:
        images = [(bases.start, Element())]
        for g in symmetry.elements[1:]:
            images.append((first, g))
            first += len(bases)
        blocks.append(Block(len(bases), tuple(images)))
    if layout.free:
        blocks.append(Block(layout.free, ((layout.stored_per_group - layout.free, Element()),)))
    return ConvSpec(tuple(blocks), layout.groups, geometry)


@lru_cache(maxsize=4096)
def tied_spec(orbits: TapOrbits, tied: int, free: int, groups: int, geometry: Geometry) -> ConvSpec:
    """`tied` filters per group that are their own images, followed by `free` ordinary ones."""
    blocks = (Block(tied, ((0, Element()),), orbits), Block(free, ((tied, Element()),)))
    return ConvSpec(tuple(block for block in blocks if block.filters) or blocks[:1], groups, geometry)


@lru_cache(maxsize=4096)
def pool_spec(symmetry: Symmetry, reduce: str, filters: int, groups: int, geometry: Geometry) -> ConvSpec:
    """All images of every filter, reduced; for 'sum' and 'mean' one filter with tied taps (`reference.orbit_mean`)."""
    if reduce in ("sum", "mean"):
        return tied_spec(tap_orbits(symmetry, geometry.kernel_size), filters, 0, groups, geometry)
    images = tuple((i * filters, g) for i, g in enumerate(symmetry.elements))
    return ConvSpec((Block(filters, images),), groups, geometry, reduce)

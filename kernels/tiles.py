"""Tiles of the kernels, the predicates that say whether a tile fits a device, and the heuristics that pick one.

Plain Python: imports without triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

#: Shared memory that one program may use, in bytes, by target; unknown targets get the least of their vendor's.
SHARED = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_87": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}


#: Targets whose matrix instructions read their operands from shared memory.
WIDE_TARGETS = ("sm_90", "sm_100", "sm_103")


@dataclass(frozen=True)
class Tile:
    """Positions x filters (or groups) that one program computes, if without matrix products, and its warps."""

    block_p: int
    block_u: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """The constexpr arguments of a kernel."""
        return {"BLOCK_P": self.block_p, "BLOCK_U": self.block_u}

    @property
    def options(self) -> dict[str, int]:
        """Options of Triton's compiler."""
        return {"num_warps": self.warps}


@dataclass(frozen=True)
class GemmTile:
    """Rows x columns of the result that one program of a matrix product computes, in steps of `block_k` terms.

    `stages` steps have their operands in shared memory at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}

    def shared(self, itemsize: int) -> int:
        """The most bytes of shared memory that the operands take."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * itemsize

    @property
    def accumulators(self) -> int:
        """float32 values of the result per thread, at 32 threads per warp."""
        return self.block_m * self.block_n // (32 * self.warps)


@dataclass(frozen=True)
class Patch:
    """Positions of an image x stored filters that one program of the fused kernel multiplies, and its warps.

    The positions include a halo around those whose results it stores.
    """

    block_h: int
    block_w: int
    block_u: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_H": self.block_h, "BLOCK_W": self.block_w, "BLOCK_U": self.block_u}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}

    @property
    def positions(self) -> int:
        return self.block_h * self.block_w

    def shared(self, channels: int, itemsize: int) -> int:
        """The most bytes of shared memory that x, a tap's weights and its float32 products take."""
        operands = (self.positions + self.block_u) * padded_channels(channels)
        return itemsize * operands + 4 * self.positions * self.block_u

    def count(self, sizes: Sequence[int], reach: Sequence[int]) -> int:
        """The number of patches that cover an image of results of `sizes` (H, W), whose reads span `reach`."""
        blocks = zip((self.block_h, self.block_w), sizes, reach, strict=True)
        return math.prod(-(-size // (block - far)) for block, size, far in blocks)


def padded_channels(channels: int) -> int:
    """The channels rounded up to a power of two, at least 16."""
    return max(16, 1 << (channels - 1).bit_length())


def as_tiles(numbers: Sequence[int]) -> list[Any]:
    """The tiles of a path's kernels, from their numbers in a row.

    Two `Tile` for 'shift', a `Patch` and a `Tile` for 'fused', three `GemmTile` for 'implicit_gemm', or three `Tile`
    where that is not a matrix product.
    """
    if len(numbers) == 7:
        return [Patch(*numbers[:4]), Tile(*numbers[4:])]
    kind, size = (GemmTile, 5) if len(numbers) == 15 else (Tile, 3)
    return [kind(*numbers[i : i + size]) for i in range(0, len(numbers), size)]


def fits(tile: Tile | GemmTile, itemsize: int, target: str, taps: bool = False) -> bool:
    """Whether the tile can run on this target with operands of `itemsize` bytes: the rule of the tuner and of the plan.

    The result takes at most half of the 255 registers of a thread, or a quarter where operands and addresses of taps
    are in registers, too; the operands fit the shared memory of one program. A product that loops over taps and
    channels is miscompiled with 8 warps (pytorch issue 173068).
    """
    least = 1 if isinstance(tile, Tile) else 16  # the sides of a tensor core's operands
    *blocks, warps = astuple(tile)[:4]
    if any(n < least or n & (n - 1) for n in blocks) or warps not in (1, 2, 4, 8):
        return False
    if isinstance(tile, Tile):
        return tile.block_p * tile.block_u <= 32 * 32 * tile.warps
    if tile.stages < 1 or (taps and tile.warps == 8):
        return False
    most = 64 if taps and target not in WIDE_TARGETS else 128
    return tile.accumulators <= most and tile.shared(itemsize) <= _limit(target)


def _limit(target: str) -> int:
    return SHARED.get(target, 64 << 10 if target.startswith("gfx") else 99 << 10)


def most_splits(programs: int, blocks: int, values: int, most_bytes: int) -> int:
    """How many programs may share the positions of a sum.

    About 512 in all, with at least 16 blocks each; their partial results, `values` float32 each, fit in `most_bytes`.
    """
    return max(1, min(512 // max(programs, 1), blocks // 16, most_bytes // (4 * max(values, 1))))


#: Every tile that `pick` may return.
TILES = (Tile(32, 32, 4), Tile(64, 16, 4), Tile(32, 16, 4))


def pick(filters: int, taps: int, adjoint: bool = False) -> Tile:
    """The tile for sums of `filters` channels (the most of any block), no wider than needed, and up to `taps` terms.

    `adjoint`: sums from dy to d, which may read channels-first images. A starting point from compiled code (no spills,
    128-bit accesses), not from timings.
    """
    if taps > 9:  # many values are alive at once
        return TILES[2]
    return TILES[0] if filters > 16 and not adjoint else TILES[1]


#: Patches that `pick_patch` may return, by the axes of an image, the larger first.
PATCHES = {1: (Patch(1, 256, 16, 8), Patch(1, 128, 16, 8)), 2: (Patch(16, 16, 16, 8), Patch(8, 16, 16, 8))}

#: Channels up to which the fused kernel multiplies in one step.
FUSED_CHANNELS = 128


def fits_patch(patch: Patch, channels: int, reach: Sequence[int], itemsize: int, target: str) -> bool:
    """Whether the patch can run on this target for this many channels, and results whose reads span `reach` (H, W)."""
    blocks = patch.block_h, patch.block_w, patch.block_u
    return (
        all(n > 0 and n & (n - 1) == 0 for n in blocks)
        and patch.block_u >= 16
        and patch.warps in (1, 2, 4, 8)
        and all(block > far for block, far in zip(blocks[:2], reach, strict=True))
        and 16 * patch.warps <= patch.positions  # a tensor core's instruction has 16 rows
        and patch.positions * patch.block_u <= 32 * 32 * patch.warps
        and channels <= FUSED_CHANNELS
        and patch.shared(channels, itemsize) <= _limit(target)
    )


def pick_patch(axes: int, terms: int, channels: int, reach: Sequence[int], itemsize: int, target: str) -> Patch | None:
    """The larger patch that fits, for blocks whose sums have `terms` terms in all; None if none fits.

    From compiled code (no spills up to 72 terms), not from timings.
    """
    some = PATCHES.get(axes, ())[terms > 36 :]  # many values are alive at once
    return next((patch for patch in some if fits_patch(patch, channels, reach, itemsize, target)), None)


#: Every tile of a convolution with one input channel per group that `pick_depthwise` may return, widest first.
DEPTHWISE_TILES = (Tile(128, 32, 4), Tile(256, 16, 4), Tile(1024, 1, 4))


def pick_depthwise(groups: int) -> Tile:
    """The narrowest tile that holds all groups, else the widest.

    From compiled code, not from timings: a thread has enough values to share what depends on the position or the group
    alone.
    """
    return next((tile for tile in DEPTHWISE_TILES[::-1] if tile.block_u >= groups), DEPTHWISE_TILES[0])


#: Every tile of the implicit GEMM that `pick_gemm` may return, the widest first, and of these the longest step first.
#: Half of the stages are spent on the table, which is read before the weights.
CONV_TILES = (
    GemmTile(128, 128, 64, 4, 3),
    *(GemmTile(64, block_n, block_k, 4, 5) for block_n in (128, 64, 32, 16) for block_k in (64, 32)),
)

#: Every tile of its weight gradient, in the same order: stored filters x channels x positions. No operand has the shape
#: of the result, since Triton gives accesses of one shape in a loop one layout, which would not suit channels-first x.
WEIGHT_TILES = (GemmTile(64, 128, 32, 4, 4), GemmTile(64, 64, 32, 4, 4), GemmTile(64, 32, 64, 4, 3))


def pick_gemm(tiles: Sequence[GemmTile], columns: int, length: int, itemsize: int, target: str) -> GemmTile:
    """The narrowest tile that fits the target and holds all columns, else the widest that fits.

    Its steps are shorter than twice the `length` of the sums, or than 64. A starting point from compiled code, not from
    timings.
    """
    fitting = [tile for tile in tiles if fits(tile, itemsize, target, taps=True) and tile.block_k < 2 * max(length, 32)]
    holding = [tile for tile in fitting if tile.block_n >= columns]
    return min(holding, key=lambda tile: tile.block_n) if holding else fitting[0]


#: Tile rows that neighbouring programs compute together, so that they share what they read.
GROUP = 8

#: Square tiles of products with symmetric matrices, by the bytes of an operand, the preferred first. From compiled code
#: (no spills; in 16 bits the prototypes' choice), not from timings.
SQUARE_TILES = {
    2: (GemmTile(128, 128, 64, 8, 4), GemmTile(128, 128, 64, 8, 3), GemmTile(128, 128, 32, 8, 2)),
    4: (GemmTile(64, 64, 16, 4, 3), GemmTile(64, 64, 16, 4, 2)),
}


def fits_square(tile: GemmTile, itemsize: int, target: str) -> bool:
    """`fits`, for a product computed on one side of its diagonal, which in float32 has few registers to spare."""
    spills = itemsize == 4 and target in ("sm_100", "sm_103") and tile.stages > 2
    return tile.block_m == tile.block_n and fits(tile, itemsize, target) and not spills


def pick_square(itemsize: int, target: str) -> GemmTile:
    """The preferred square tile that fits the target."""
    return next(tile for tile in SQUARE_TILES[itemsize] if fits_square(tile, itemsize, target))


#: Most rows of x for which x S is computed strip by strip, reading every entry of S once.
STRIP_ROWS = 64
#: Steps of a strip that one program takes.
SEGMENT_STEPS = 8

#: Tiles of strips: rows of S x rows of x x columns of S in one step.
STRIP_TILES = {
    2: (
        GemmTile(128, 16, 64, 8, 4),
        GemmTile(128, 32, 64, 8, 3),
        GemmTile(128, 64, 64, 8, 3),
        GemmTile(128, 64, 64, 8, 2),
    ),
    4: (GemmTile(64, 16, 32, 4, 3), GemmTile(64, 32, 16, 4, 3), GemmTile(64, 64, 16, 4, 2)),
}


def fits_product(tile: GemmTile, rows: int, itemsize: int, target: str) -> bool:
    """`fits`, for x S with this many rows of x: a strip holds them all, and a step ends where the diagonal begins."""
    if rows > STRIP_ROWS:
        return tile.block_k <= tile.block_n and fits(tile, itemsize, target)
    return rows <= tile.block_n <= STRIP_ROWS and tile.block_k <= tile.block_m and fits(tile, itemsize, target)


def pick_product(rows: int, itemsize: int, target: str) -> GemmTile:
    """The tile for x S with this many rows of x: a strip that holds them all, or a square tile."""
    if rows > STRIP_ROWS:
        return pick_square(itemsize, target)
    return next(tile for tile in STRIP_TILES[itemsize] if fits_product(tile, rows, itemsize, target))

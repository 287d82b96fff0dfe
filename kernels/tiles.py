"""Tiles of the kernels and the heuristic that picks one. Plain Python: imports without triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Positions x filters that one program of the additions computes, and its warps."""

    block_p: int
    block_u: int
    warps: int


#: Every tile that `pick` may return.
TILES = (Tile(64, 32, 4), Tile(128, 16, 4))


def pick(filters: int) -> Tile:
    """Tile for sums of `filters` channels (the most of any block): no wider than they need.

    A starting point from compiled code (no spills, 128-bit accesses), not from timings.
    """
    return TILES[0] if filters > 16 else TILES[1]

"""The sums of the shift path as one Triton kernel: forward, its adjoint, any symmetry, one to three axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tritonsym.kernels.address import Three, positions, read_at, wide
from tritonsym.kernels.epilogue import activate
from tritonsym.kernels.tiles import Tile


@dataclass(frozen=True, eq=False)  # tables are kept: as a key, one is itself
class Table:
    """Which sums stand in which target channels of a group.

    A sum (first, filters, terms) fills the target channels first + u, u < filters. Each of its terms (channel, shift,
    sign, image) is source channel channel + u at position (mul p + shift) / div of every axis, times sign; `image`
    counts where the source is the gradient of a pooled orbit. With `pool` the sums are the images of one filter each,
    and only the largest ('max') or smallest ('min') is stored.
    """

    source_channels: int  # of a group
    target_channels: int
    sums: tuple[tuple[int, int, tuple[tuple[int, Three, int, int], ...]], ...]
    mul: Three
    div: Three
    pool: str = ""


@triton.jit
def _shift_sum_kernel(
    source_ptr,  # [N, groups * SOURCE_C, SD, SH, SW], any strides
    target_ptr,  # [N, groups * TARGET_C, TD, TH, TW], any strides
    bias_ptr,  # [groups * TARGET_C] or None
    winners_ptr,  # bits of the images that won, strides of the pooled tensor; None if not kept or needed
    M,  # N * TD * TH * TW
    TD, TH, TW, SD, SH, SW,
    source_n, source_c, source_d, source_h, source_w, target_n, target_c, target_d, target_h, target_w,
    SOURCE_C: tl.constexpr, TARGET_C: tl.constexpr,
    TILES: tl.constexpr,  # filter tiles of one group
    TILE_AT: tl.constexpr,  # of every sum: its first tile; sums of equal filters share their tiles
    FIRST: tl.constexpr, FILTERS: tl.constexpr,  # of every sum
    TERMS: tl.constexpr,  # of every sum: as many as the longest has, the rest with SIGN 0
    CHANNEL: tl.constexpr, SHIFT_D: tl.constexpr, SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,  # of every term
    SIGN: tl.constexpr, IMAGE: tl.constexpr,  # of every term
    MUL: tl.constexpr, DIV: tl.constexpr,
    POOL: tl.constexpr,
    WON: tl.constexpr,  # the source is the gradient of a pooled orbit: only images that won receive it
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within an image need 64 bits
    BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """target[n, FIRST[o] + u, p] = act(bias + sum_t SIGN[o, t] source[n, CHANNEL[o, t] + u, at(p, o, t)]).

    at(p, o, t) = (MUL p + SHIFT[o, t]) / DIV; 0 where DIV does not divide it and outside the image. POOL: the extremum
    over o instead, and winners[n, u, p] = sum of 2^o over the o that attain it. WON: only terms with bit IMAGE[o, t]
    of the winners at their place count. Positions are the last axis of a tile: where no stride is known to be 1 for a
    run of values (channels-first, sizes that 16 does not divide), Triton gives a warp neighbours along that axis.
    """
    n, d, h, w, live = positions(tl.program_id(0), M, TD, TH, TW, BLOCK_P, WIDE)  # [P]
    group = (tl.program_id(1) // TILES).to(tl.int64)
    tile = tl.program_id(1) % TILES
    source = n * source_n + group * SOURCE_C * source_c  # [P]
    target = n * target_n + group * TARGET_C * target_c  # [P]
    target += d * target_d + h * target_h + w * target_w
    best = tl.zeros((BLOCK_U, BLOCK_P), tl.float32)
    winners = tl.zeros((BLOCK_U, BLOCK_P), tl.int32)
    for o in tl.static_range(len(FIRST)):
        if (tile >= TILE_AT[o]) & (tile * BLOCK_U < TILE_AT[o] * BLOCK_U + FILTERS[o]):
            u = (tile - TILE_AT[o]) * BLOCK_U + tl.arange(0, BLOCK_U)  # [U]
            has = u < FILTERS[o]
            if WIDE:
                u = u.to(tl.int64)
            total = tl.zeros((BLOCK_U, BLOCK_P), tl.float32)
            for t in tl.static_range(TERMS):
                if SIGN[o * TERMS + t] != 0:
                    place, inside = read_at(
                        d, h, w, SHIFT_D[o * TERMS + t], SHIFT_H[o * TERMS + t], SHIFT_W[o * TERMS + t], live,
                        SD, SH, SW, source_d, source_h, source_w, MUL, DIV,
                    )  # fmt: skip
                    place = ((u + CHANNEL[o * TERMS + t]) * source_c)[:, None] + (source + place)[None, :]
                    mask = has[:, None] & inside[None, :]
                    term = tl.load(source_ptr + place, mask=mask, other=0.0).to(tl.float32)  # [U, P]
                    if WON:
                        won = tl.load(winners_ptr + place, mask=mask, other=0).to(tl.int32)
                        term = tl.where(((won >> IMAGE[o * TERMS + t]) & 1) != 0, term, 0.0)
                    if SIGN[o * TERMS + t] > 0:
                        total += term
                    else:
                        total -= term
            if POOL == "":
                channel = (u + FIRST[o]) * target_c
                if bias_ptr is not None:
                    bias = tl.load(bias_ptr + group * TARGET_C + FIRST[o] + u, mask=has, other=0.0)
                    total += bias.to(tl.float32)[:, None]
                total = activate(total, ACTIVATION).to(target_ptr.dtype.element_ty)
                tl.store(target_ptr + channel[:, None] + target[None, :], total, mask=has[:, None] & live[None, :])
            else:
                if o == 0:
                    better = best == best
                    equal = best != best
                elif POOL == "max":
                    better = (total > best) | ((total != total) & (best == best))  # a NaN wins, as in torch.amax
                    equal = (total == best) | ((total != total) & (best != best))
                else:
                    better = (total < best) | ((total != total) & (best == best))
                    equal = (total == best) | ((total != total) & (best != best))
                best = tl.where(better, total, best)
                winners = tl.where(better, 1 << o, tl.where(equal, winners | (1 << o), winners))
    if POOL != "":
        u = tile * BLOCK_U + tl.arange(0, BLOCK_U)
        has = u < FILTERS[0]
        if WIDE:
            u = u.to(tl.int64)
        place = (u * target_c)[:, None] + target[None, :]
        mask = has[:, None] & live[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + group * TARGET_C + u, mask=has, other=0.0)
            best += bias.to(tl.float32)[:, None]
        tl.store(target_ptr + place, activate(best, ACTIVATION).to(target_ptr.dtype.element_ty), mask=mask)
        if winners_ptr is not None:
            tl.store(winners_ptr + place, winners.to(tl.uint8), mask=mask)


@lru_cache(maxsize=1024)
def constants(table: Table, block_u: int) -> dict[str, Any]:
    """The constexpr arguments of the kernel for one table and tile width."""
    tile_at: list[int] = []
    end, before = 0, -1
    for _, filters, _ in table.sums:
        tile_at.append(tile_at[-1] if filters == before else end)
        end, before = tile_at[-1] + triton.cdiv(filters, block_u), filters
    most = max(len(terms) for *_, terms in table.sums)
    flat = [term for *_, terms in table.sums for term in (*terms, *[(0, (0, 0, 0), 0, 0)] * (most - len(terms)))]
    channel, shift, sign, image = zip(*flat, strict=True)
    return {
        "SOURCE_C": table.source_channels,
        "TARGET_C": table.target_channels,
        "TILES": end,
        "TILE_AT": tuple(tile_at),
        "FIRST": tuple(first for first, *_ in table.sums),
        "FILTERS": tuple(filters for _, filters, _ in table.sums),
        "TERMS": most,
        "CHANNEL": channel,
        **dict(zip(("SHIFT_D", "SHIFT_H", "SHIFT_W"), zip(*shift, strict=True), strict=True)),
        "SIGN": sign,
        "IMAGE": image,
        "MUL": table.mul,
        "DIV": table.div,
        "POOL": table.pool,
    }


def shift_sum(
    z: Tensor,
    table: Table,
    y: Tensor,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    winners: Tensor | None = None,
) -> None:
    """Fill y (N, groups * channels, D, H, W) with the sums of `table` over z; both with any strides.

    `winners` (strides of y) receives those of a pooled orbit.
    """
    _launch(z, table, y, tile, bias, winners, ACTIVATION=activation or "", WON=False)


def gather_sum(dy: Tensor, table: Table, d: Tensor, tile: Tile, *, winners: Tensor | None = None) -> None:
    """Fill d with the sums of `table` over dy; `winners` (strides of dy) are those that a gradient goes to."""
    _launch(dy, table, d, tile, None, winners, ACTIVATION="", WON=winners is not None)


def _launch(
    source: Tensor, table: Table, target: Tensor, tile: Tile, bias: Tensor | None, winners: Tensor | None, **fixed: Any
) -> None:
    if target.numel() == 0:
        return
    batch, channels, *sizes = target.shape
    count = batch * math.prod(sizes)
    fixed |= constants(table, tile.block_u)
    programs = triton.cdiv(count, tile.block_p), channels // table.target_channels * fixed["TILES"]
    _shift_sum_kernel[programs](
        source, target, bias, winners, count, *sizes, *source.shape[2:], *source.stride(), *target.stride(),
        WIDE=wide(source, target), **fixed, **tile.constants, **tile.options,
    )  # fmt: skip

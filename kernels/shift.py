"""The additions of the shift path as one Triton kernel: forward, its adjoint, any symmetry, one to three axes."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Positions x filters that one program computes."""

    block_p: int
    block_u: int
    warps: int


@dataclass(frozen=True)
class Table:
    """Constants of one launch: which sums stand in which target channels.

    Sum o fills target channels first[o] + u, u < filters[o], with the terms term_at[o] <= t < term_at[o + 1]:
    source channels channel[t] + u at position (mul p + shift[t]) / div of every axis, times sign[t].
    """

    first: tuple[int, ...]
    filters: tuple[int, ...]
    term_at: tuple[int, ...]
    channel: tuple[int, ...]
    shift: tuple[int, ...]  # three per term
    sign: tuple[int, ...]
    mul: tuple[int, int, int]
    div: tuple[int, int, int]


@triton.jit
def _add_kernel(
    source_ptr,  # [N, groups * SOURCE_C, SD, SH, SW], any strides
    target_ptr,  # [N, groups * TARGET_C, TD, TH, TW], any strides
    M,  # N * TD * TH * TW
    TD,
    TH,
    TW,
    SD,
    SH,
    SW,
    source_n,
    source_c,
    source_d,
    source_h,
    source_w,
    target_n,
    target_c,
    target_d,
    target_h,
    target_w,
    SOURCE_C: tl.constexpr,
    TARGET_C: tl.constexpr,
    TILES: tl.constexpr,  # filter tiles of one group, over all blocks
    BLOCK_FILTERS: tl.constexpr,  # per block of sums with the same filters: how many filters,
    BLOCK_TILE: tl.constexpr,  # the first of its tiles,
    BLOCK_SUM: tl.constexpr,  # and the first of its sums
    FIRST: tl.constexpr,
    TERM_AT: tl.constexpr,
    CHANNEL: tl.constexpr,
    SHIFT: tl.constexpr,
    SIGN: tl.constexpr,
    MUL_D: tl.constexpr,
    MUL_H: tl.constexpr,
    MUL_W: tl.constexpr,
    DIV_D: tl.constexpr,
    DIV_H: tl.constexpr,
    DIV_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """target[n, FIRST[o] + u, p] = sum_t SIGN[t] source[n, CHANNEL[t] + u, (MUL p + SHIFT[t]) / DIV], t in sum o.

    0 where the position lies outside the source or DIV does not divide it.
    """
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    group = tl.program_id(1) // TILES
    tile = tl.program_id(1) % TILES
    live = p < M
    w = p % TW
    h = (p // TW) % TH
    d = (p // (TW * TH)) % TD
    n = p // (TW * TH * TD)
    source = source_ptr + n * source_n + group.to(tl.int64) * SOURCE_C * source_c  # [P]
    target = target_ptr + n * target_n + d * target_d + h * target_h + w * target_w
    target += group.to(tl.int64) * TARGET_C * target_c
    for b in tl.static_range(len(BLOCK_FILTERS)):
        if (tile >= BLOCK_TILE[b]) & (tile < BLOCK_TILE[b + 1]):
            u = (tile - BLOCK_TILE[b]).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)  # [U]
            has = u < BLOCK_FILTERS[b]
            for o in tl.static_range(BLOCK_SUM[b], BLOCK_SUM[b + 1]):
                total = tl.zeros((BLOCK_P, BLOCK_U), tl.float32)
                for t in tl.static_range(TERM_AT[o], TERM_AT[o + 1]):
                    at_d = d * MUL_D + SHIFT[3 * t]
                    at_h = h * MUL_H + SHIFT[3 * t + 1]
                    at_w = w * MUL_W + SHIFT[3 * t + 2]
                    inside = live & (at_d >= 0) & (at_h >= 0) & (at_w >= 0)
                    if DIV_D * DIV_H * DIV_W > 1:
                        inside = inside & (at_d % DIV_D == 0) & (at_h % DIV_H == 0) & (at_w % DIV_W == 0)
                        at_d = at_d // DIV_D
                        at_h = at_h // DIV_H
                        at_w = at_w // DIV_W
                    inside = inside & (at_d < SD) & (at_h < SH) & (at_w < SW)
                    place = source + at_d * source_d + at_h * source_h + at_w * source_w
                    channel = (CHANNEL[t] + u) * source_c
                    term = tl.load(
                        place[:, None] + channel[None, :], mask=inside[:, None] & has[None, :], other=0.0
                    )  # [P, U]
                    total += term.to(tl.float32) * SIGN[t]
                tl.store(
                    target[:, None] + ((FIRST[o] + u) * target_c)[None, :],
                    total.to(target_ptr.dtype.element_ty),
                    mask=live[:, None] & has[None, :],
                )


def add(source: Tensor, table: Table, target: Tensor, groups: int, tile: Tile) -> None:
    """Fill `target` (N, groups * channels, D, H, W) with the sums of `table` over `source`; both with any strides."""
    if target.numel() == 0:
        return
    batch, channels, *sizes = target.shape
    positions = batch * sizes[0] * sizes[1] * sizes[2]
    block_filters: list[int] = []
    block_tile, block_sum = [0], [0]
    for filters in table.filters:
        if block_filters and block_filters[-1] == filters:
            block_sum[-1] += 1
            continue
        block_filters.append(filters)
        block_tile.append(block_tile[-1] + triton.cdiv(filters, tile.block_u))
        block_sum.append(block_sum[-1] + 1)
    grid = (triton.cdiv(positions, tile.block_p), groups * block_tile[-1])
    _add_kernel[grid](
        source,
        target,
        positions,
        *sizes,
        *source.shape[2:],
        *source.stride(),
        *target.stride(),
        source.shape[1] // groups,
        channels // groups,
        block_tile[-1],
        tuple(block_filters),
        tuple(block_tile),
        tuple(block_sum),
        table.first,
        table.term_at,
        table.channel,
        table.shift,
        table.sign,
        *table.mul,
        *table.div,
        tile.block_p,
        tile.block_u,
        num_warps=tile.warps,
    )

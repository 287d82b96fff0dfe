"""The additions of the shift path as one Triton kernel: forward, its adjoint, any symmetry, one to three axes."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from tritonsym.kernels.tiles import Tile


@dataclass(frozen=True)
class Table:
    """Constants of one launch: which sums stand in which target channels.

    Sum o fills the target channels first[o] + u, u < filters[o]. Each of its terms (channel, shift, sign) is source
    channel channel + u at position (mul p + shift) / div of every axis, times sign.
    """

    first: tuple[int, ...]
    filters: tuple[int, ...]
    terms: tuple[tuple[tuple[int, tuple[int, int, int], int], ...], ...]
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
    TILES: tl.constexpr,  # filter tiles of one group
    TILE_AT: tl.constexpr,  # of every sum: its first tile; sums of equal filters share their tiles
    FIRST: tl.constexpr,
    FILTERS: tl.constexpr,
    TERMS: tl.constexpr,  # of every sum: as many as the longest has, the rest with SIGN 0
    CHANNEL: tl.constexpr,
    SHIFT_D: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
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
    """target[n, FIRST[o] + u, p] = sum_t SIGN[o, t] source[n, CHANNEL[o, t] + u, (MUL p + SHIFT[o, t]) / DIV].

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
    for o in tl.static_range(len(FIRST)):
        if (tile >= TILE_AT[o]) & (tile * BLOCK_U < TILE_AT[o] * BLOCK_U + FILTERS[o]):
            u = (tile - TILE_AT[o]).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)  # [U]
            has = u < FILTERS[o]
            total = tl.zeros((BLOCK_P, BLOCK_U), tl.float32)
            for t in tl.static_range(TERMS):
                if SIGN[o * TERMS + t] != 0:
                    at_d = d * MUL_D + SHIFT_D[o * TERMS + t]
                    at_h = h * MUL_H + SHIFT_H[o * TERMS + t]
                    at_w = w * MUL_W + SHIFT_W[o * TERMS + t]
                    inside = live & (at_d >= 0) & (at_h >= 0) & (at_w >= 0)
                    if DIV_D * DIV_H * DIV_W > 1:
                        inside = inside & (at_d % DIV_D == 0) & (at_h % DIV_H == 0) & (at_w % DIV_W == 0)
                        at_d = at_d // DIV_D
                        at_h = at_h // DIV_H
                        at_w = at_w // DIV_W
                    inside = inside & (at_d < SD) & (at_h < SH) & (at_w < SW)
                    place = source + at_d * source_d + at_h * source_h + at_w * source_w
                    channel = (u + CHANNEL[o * TERMS + t]) * source_c
                    mask = inside[:, None] & has[None, :]
                    term = tl.load(place[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)  # [P, U]
                    if SIGN[o * TERMS + t] > 0:
                        total += term
                    else:
                        total -= term
            tl.store(
                target[:, None] + ((u + FIRST[o]) * target_c)[None, :],
                total.to(target_ptr.dtype.element_ty),
                mask=live[:, None] & has[None, :],
            )


def constants(table: Table, source_channels: int, target_channels: int, tile: Tile) -> dict[str, object]:
    """The constexpr arguments of the kernel for one table."""
    tile_at: list[int] = []
    end = 0
    for o, filters in enumerate(table.filters):
        if o and filters == table.filters[o - 1]:
            tile_at.append(tile_at[-1])
        else:
            tile_at.append(end)
            end += triton.cdiv(filters, tile.block_u)
    most = max(map(len, table.terms))
    terms = [term for sum_ in table.terms for term in (*sum_, *[(0, (0, 0, 0), 0)] * (most - len(sum_)))]
    channel, shift, sign = zip(*terms, strict=True)
    shift_d, shift_h, shift_w = zip(*shift, strict=True)
    return {
        "SOURCE_C": source_channels,
        "TARGET_C": target_channels,
        "TILES": end,
        "TILE_AT": tuple(tile_at),
        "FIRST": table.first,
        "FILTERS": table.filters,
        "TERMS": most,
        "CHANNEL": channel,
        "SHIFT_D": shift_d,
        "SHIFT_H": shift_h,
        "SHIFT_W": shift_w,
        "SIGN": sign,
        **dict(zip(("MUL_D", "MUL_H", "MUL_W"), table.mul, strict=True)),
        **dict(zip(("DIV_D", "DIV_H", "DIV_W"), table.div, strict=True)),
        "BLOCK_P": tile.block_p,
        "BLOCK_U": tile.block_u,
    }


def add(source: Tensor, table: Table, target: Tensor, groups: int, tile: Tile) -> None:
    """Fill `target` (N, groups * channels, D, H, W) with the sums of `table` over `source`; both with any strides."""
    if target.numel() == 0:
        return
    batch, channels, *sizes = target.shape
    positions = batch * sizes[0] * sizes[1] * sizes[2]
    fixed = constants(table, source.shape[1] // groups, channels // groups, tile)
    grid = (triton.cdiv(positions, tile.block_p), groups * fixed["TILES"])
    _add_kernel[grid](
        source,
        target,
        positions,
        *sizes,
        *source.shape[2:],
        *source.stride(),
        *target.stride(),
        **fixed,
        num_warps=tile.warps,
    )

"""Positions and addresses: what every convolution kernel computes from a program's number."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def positions(block, M, D, H, W, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The image n, the position (d, h, w) and p < M for p = block BLOCK + 0, 1, .. of [N, D, H, W]; n is int64."""
    if WIDE:
        block = block + tl.zeros((BLOCK,), tl.int64)
    p = block * BLOCK + tl.arange(0, BLOCK)
    rest = p // W
    w = p % W
    h = rest % H
    rest = rest // H
    d = rest % D
    n = rest // D
    return n.to(tl.int64), d, h, w, p < M


@triton.jit
def read_at(
    d,
    h,
    w,
    shift_d,
    shift_h,
    shift_w,
    live,
    SD,
    SH,
    SW,
    source_d,
    source_h,
    source_w,
    MUL_D: tl.constexpr,
    MUL_H: tl.constexpr,
    MUL_W: tl.constexpr,
    DIV_D: tl.constexpr,
    DIV_H: tl.constexpr,
    DIV_W: tl.constexpr,
):
    """The offset of position (MUL p + shift) / DIV of an image [SD, SH, SW], and whether p is live and it exists."""
    at_d = d * MUL_D + shift_d
    at_h = h * MUL_H + shift_h
    at_w = w * MUL_W + shift_w
    inside = live & (at_d >= 0) & (at_h >= 0) & (at_w >= 0)
    if DIV_D * DIV_H * DIV_W > 1:
        inside = inside & (at_d % DIV_D == 0) & (at_h % DIV_H == 0) & (at_w % DIV_W == 0)
        at_d = at_d // DIV_D
        at_h = at_h // DIV_H
        at_w = at_w // DIV_W
    inside = inside & (at_d < SD) & (at_h < SH) & (at_w < SW)
    return at_d * source_d + at_h * source_h + at_w * source_w, inside


def wide(*tensors: Tensor) -> bool:
    """Whether positions (N, ., D, H, W) or offsets within one image need more than 31 bits.

    Room is left for the part of a last tile that lies outside, and for shifts that lead outside.
    """
    limit = 1 << 30
    for t in tensors:
        extent = sum((size - 1) * abs(stride) for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
        if extent >= limit or t.shape[0] * t.shape[2] * t.shape[3] * t.shape[4] >= limit:
            return True
    return False

"""Positions and addresses: what every convolution kernel computes from a program's number."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

Three = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """How positions of the result map to positions of the source: (mul p + step k + shift) / div per axis, where div
    divides it, for tap k of a kernel of these sizes."""

    kernel: Three
    mul: Three
    step: Three
    shift: Three
    div: Three

    @property
    def reversed(self) -> Grid:
        """Which positions of the result read a position of the source."""
        (d, h, w), (at_d, at_h, at_w) = self.step, self.shift
        return Grid(self.kernel, self.div, (-d, -h, -w), (-at_d, -at_h, -at_w), self.mul)

    @property
    def constants(self) -> dict[str, Three]:
        return {name.upper(): value for name, value in vars(self).items()}


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
    d, h, w, shift_d, shift_h, shift_w, live, SD, SH, SW, source_d, source_h, source_w,
    MUL: tl.constexpr, DIV: tl.constexpr,
):  # fmt: skip
    """The offset of position (MUL p + shift) / DIV of an image [SD, SH, SW], and whether p is live and it exists."""
    at_d = d * MUL[0] + shift_d
    at_h = h * MUL[1] + shift_h
    at_w = w * MUL[2] + shift_w
    inside = live & (at_d >= 0) & (at_h >= 0) & (at_w >= 0)
    if DIV[0] * DIV[1] * DIV[2] > 1:
        inside = inside & (at_d % DIV[0] == 0) & (at_h % DIV[1] == 0) & (at_w % DIV[2] == 0)
        at_d = at_d // DIV[0]
        at_h = at_h // DIV[1]
        at_w = at_w // DIV[2]
    inside = inside & (at_d < SD) & (at_h < SH) & (at_w < SW)
    return at_d * source_d + at_h * source_h + at_w * source_w, inside


@triton.jit
def read_tap(
    d, h, w, k, live, SD, SH, SW, source_d, source_h, source_w,
    KERNEL: tl.constexpr, MUL: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, DIV: tl.constexpr,
):  # fmt: skip
    """`read_at` for tap k of a `Grid`."""
    shift_d = k // (KERNEL[1] * KERNEL[2]) * STEP[0] + SHIFT[0]
    shift_h = k // KERNEL[2] % KERNEL[1] * STEP[1] + SHIFT[1]
    shift_w = k % KERNEL[2] * STEP[2] + SHIFT[2]
    return read_at(d, h, w, shift_d, shift_h, shift_w, live, SD, SH, SW, source_d, source_h, source_w, MUL, DIV)


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

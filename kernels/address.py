"""Positions and addresses, which every convolution kernel computes from its program id."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

Three = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """Where position p of the result reads the source for tap k: at (mul p + step k + shift) / div, if div divides it.

    Every axis has its own numbers and kernel size; of the three axes only the last `axes` are used.
    """

    axes: int
    kernel: Three
    mul: Three
    step: Three
    shift: Three
    div: Three

    @property
    def reversed(self) -> Grid:
        """The inverse: which positions of the result read a position of the source."""
        (d, h, w), (at_d, at_h, at_w) = self.step, self.shift
        return Grid(self.axes, self.kernel, self.div, (-d, -h, -w), (-at_d, -at_h, -at_w), self.mul)

    @property
    def constants(self) -> dict[str, Any]:
        return {name.upper(): value for name, value in vars(self).items()}


def strides_of(t: Tensor, name: str) -> tuple[list[int], dict[str, Any]]:
    """The numbers and constants from which a kernel gets the `strides` of t (N, C, D, H, W).

    The constants do not depend on the batch or image size, unless it changes the alignment of channels-first images.
    """
    unit = next((axis for axis, at in (("c", 1), ("w", 4)) if t.shape[at] > 1 and t.stride(at) == 1), "")
    found = [
        0 if size == 1 or axis == unit else stride
        for size, stride, axis in zip(t.shape, t.stride(), "ncdhw", strict=True)
    ]
    align = math.gcd(16 // t.element_size(), *found)
    return [stride // align for stride in found], {f"{name}_ALIGN": align, f"{name}_UNIT": unit}


@triton.jit
def strides(n, c, d, h, w, ALIGN: tl.constexpr, UNIT: tl.constexpr):
    """Strides from numbers in units of ALIGN values; the stride of axis UNIT, 'c' or 'w', is 1."""
    if UNIT == "c":
        c = tl.full((), 1, tl.int32)
    else:
        c = c * ALIGN
    if UNIT == "w":
        w = tl.full((), 1, tl.int32)
    else:
        w = w * ALIGN
    return n * ALIGN, c, d * ALIGN, h * ALIGN, w


@triton.jit
def _unsigned(n):
    n = n + tl.zeros((), tl.int32)
    if n.dtype == tl.int64:
        return n.to(tl.uint64)
    else:
        return n.to(tl.uint32)


@triton.jit
def positions(block, M, D, H, W, BLOCK: tl.constexpr, WIDE: tl.constexpr, AXES: tl.constexpr):
    """The image n (int64), the position (d, h, w) and p < M, for p = block BLOCK + 0, 1, .. of [N, D, H, W]."""
    if WIDE:
        block = block + tl.zeros((BLOCK,), tl.int64)
    p = block * BLOCK + tl.arange(0, BLOCK)
    live = p < M
    rest = _unsigned(p)  # unsigned divisions take fewer instructions
    w = (rest % _unsigned(W)).to(p.dtype)
    rest = rest // _unsigned(W)
    h = tl.zeros_like(w)
    d = h
    if AXES > 1:
        h = (rest % _unsigned(H)).to(p.dtype)
        rest = rest // _unsigned(H)
    if AXES > 2:
        d = (rest % _unsigned(D)).to(p.dtype)
        rest = rest // _unsigned(D)
    return rest.to(tl.int64), d, h, w, live


@triton.jit
def _along(place, inside, p, shift, size, stride, MUL: tl.constexpr, DIV: tl.constexpr):
    """`read_at` along one axis."""
    at = p * MUL + shift
    if DIV > 1:
        inside = inside & (at % DIV == 0) & (at >= 0)
        at = at // DIV
    return place + at * stride, inside & (_unsigned(at) < _unsigned(size))


@triton.jit
def read_at(
    d, h, w, shift_d, shift_h, shift_w, live, SD, SH, SW, source_d, source_h, source_w,
    MUL: tl.constexpr, DIV: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """The offset of position (MUL p + shift) / DIV of an image [SD, SH, SW], and whether it is inside and p live."""
    place, inside = _along(tl.zeros_like(w), live, w, shift_w, SW, source_w, MUL[2], DIV[2])
    if AXES > 1:
        place, inside = _along(place, inside, h, shift_h, SH, source_h, MUL[1], DIV[1])
    if AXES > 2:
        place, inside = _along(place, inside, d, shift_d, SD, source_d, MUL[0], DIV[0])
    return place, inside


@triton.jit
def read_tap(
    d, h, w, k, live, SD, SH, SW, source_d, source_h, source_w,
    KERNEL: tl.constexpr, MUL: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, DIV: tl.constexpr,
    AXES: tl.constexpr,
):  # fmt: skip
    """`read_at` for tap k of a `Grid`."""
    shift_d = k // (KERNEL[1] * KERNEL[2]) * STEP[0] + SHIFT[0]
    shift_h = k // KERNEL[2] % KERNEL[1] * STEP[1] + SHIFT[1]
    shift_w = k % KERNEL[2] * STEP[2] + SHIFT[2]
    return read_at(d, h, w, shift_d, shift_h, shift_w, live, SD, SH, SW, source_d, source_h, source_w, MUL, DIV, AXES)


def wide(*tensors: Tensor) -> bool:
    """Whether positions (N, ., D, H, W) or offsets within one image need more than 31 bits.

    The limit leaves room for the part of a last tile beyond the end, and for shifts that lead outside.
    """
    limit = 1 << 30
    for t in tensors:
        extent = sum((size - 1) * abs(stride) for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
        if extent >= limit or t.shape[0] * t.shape[2] * t.shape[3] * t.shape[4] >= limit:
            return True
    return False

"""The named layers that are measured: the only list of shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import tritonsym.nn as tnn


@dataclass(frozen=True)
class Case:
    """One layer on one input of `batch` images of `sizes`."""

    name: str
    batch: int
    channels: int
    sizes: tuple[int, ...]
    build: Callable[[], nn.Module]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.sizes)


def _orbit(channels: int, symmetry: str) -> Callable[[], nn.Module]:
    return lambda: tnn.SymmetricConv2d(channels, channels, 3, padding=1, bias=False, symmetry=symmetry)


def _tied(channels: int, symmetry: str) -> Callable[[], nn.Module]:
    return lambda: tnn.TiedConv2d(channels, channels, 3, padding=1, bias=False, symmetry=symmetry)


def _pool(channels: int, symmetry: str) -> Callable[[], nn.Module]:
    return lambda: tnn.OrbitPoolConv2d(channels, channels // 4, 3, padding=1, bias=False, symmetry=symmetry)


#: (batch, channels, height = width) that fit a laptop.
_CPU_SHAPES = [
    (8, 32, 32),
    (8, 64, 32),
    (8, 64, 56),
    (8, 128, 28),
    (1, 256, 14),
    (8, 256, 28),
    (4, 512, 14),
    (2, 384, 19),
    (1, 320, 64),
    (2, 1280, 16),
]

CPU: list[Case] = [
    *(
        Case(f"n{n}-c{c}-{h}x{h}-{symmetry}", n, c, (h, h), _orbit(c, symmetry))
        for n, c, h in _CPU_SHAPES
        for symmetry in ("h", "hv", "d4")
    ),
    *(
        Case(f"n{n}-c{c}-{h}x{h}-{name}", n, c, (h, h), build(c, symmetry))
        for n, c, h in [(8, 64, 56), (8, 256, 28), (4, 512, 14)]
        for name, build, symmetry in [("tied-hv", _tied, "hv"), ("tied-d4", _tied, "d4"), ("pool-hv", _pool, "hv")]
    ),
    *(
        Case(
            f"n{n}-c{c}-{h}^3-hvz",
            n,
            c,
            (h, h, h),
            lambda c=c: tnn.SymmetricConv3d(c, c, 3, padding=1, bias=False, symmetry="hvz"),
        )
        for n, c, h in [(1, 32, 16), (1, 64, 16)]
    ),
    *(
        Case(
            f"n{n}-c{c}-{h}x{h}-stride2-hv",
            n,
            c,
            (h, h),
            lambda c=c: tnn.SymmetricConv2d(c, c, 3, stride=2, padding=1, bias=False, symmetry="hv"),
        )
        for n, c, h in [(8, 128, 28), (8, 256, 28)]
    ),
    *(
        Case(
            f"n{n}-c{c}-{h}x{h}-transpose4-hv",
            n,
            c,
            (h, h),
            lambda c=c: tnn.SymmetricConvTranspose2d(c, c, 4, stride=2, padding=1, bias=False, symmetry="hv"),
        )
        for n, c, h in [(8, 64, 16), (4, 256, 16)]
    ),
]

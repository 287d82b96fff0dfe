"""The named layers that are measured, and what a device needs for them at least: the only list of shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import tritonsym.nn as tnn
from tritonsym import costs, dispatch, functional


class Function(nn.Module):
    """A function of a matrix in the place of a layer."""

    def __init__(self, ours: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ours, self.dense = ours, dense

    def forward(self, x: Tensor) -> Tensor:
        return self.ours(x)

    def to_dense(self) -> Function:
        return Function(self.dense, self.dense)

    def problem(self, shape: tuple[int, ...], target: str, dtype: str) -> costs.Problem:
        """Of every product with a symmetric result in it, for a square matrix."""
        return dispatch.gram_problem(shape, target, dtype)


def _function(name: str, dense: Callable[[Tensor], Tensor], **options: Any) -> Callable[[int], nn.Module]:
    return lambda _: Function(lambda x: getattr(functional, name)(x, **options), dense)


def _newton_schulz(g: Tensor) -> Tensor:
    x = g / g.norm().clamp(min=1e-7)
    a = x @ x.mT
    return 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x


def _conv(symmetry: Any, **options: Any) -> Callable[[int], nn.Module]:
    options = {"kernel_size": 3, "padding": 1, "bias": False, "symmetry": symmetry, **options}
    return lambda c: tnn.SymmetricConv2d(c, c, **options)


def _tied(symmetry: str, kernel_size: int = 3) -> Callable[[int], nn.Module]:
    options: dict[str, Any] = {"padding": kernel_size // 2, "bias": False, "symmetry": symmetry}
    return lambda c: tnn.TiedConv2d(c, c, kernel_size, groups=1 if kernel_size == 3 else c, **options)


#: Every kind of layer by its name, for so many channels.
KINDS: dict[str, Callable[[int], nn.Module]] = {
    **{symmetry: _conv(symmetry) for symmetry in ("h", "hv", "c4", "d4")},
    "mixed": _conv({"h": "25%", "hv": "25%", "d4": "25%"}),
    "tied-hv": _tied("hv"),
    "tied-d4": _tied("d4"),
    "pool-hv": lambda c: tnn.OrbitPoolConv2d(c, c // 4, 3, padding=1, bias=False, symmetry="hv"),
    "hvz": lambda c: tnn.SymmetricConv3d(c, c, 3, padding=1, bias=False, symmetry="hvz"),
    "stride2-hv": _conv("hv", stride=2),
    "transpose4-hv": lambda c: tnn.SymmetricConvTranspose2d(c, c, 4, 2, 1, bias=False, symmetry="hv"),
    "depthwise7-hv": _tied("hv", 7),
    "linear": lambda n: tnn.SymmetricLinear(n, n, bias=False),
    "gram": _function("gram", lambda x: x @ x.mT),
    "symmetric_mm": _function("symmetric_mm", lambda x: x @ x),
    "newton_schulz": _function("newton_schulz", _newton_schulz, steps=1),
}
#: Multiply-adds of matrix functions of n x n, dense and needed, in n^3; and the matrices they read and write at least.
FUNCTIONS = {"gram": (1, 0.5, 2), "symmetric_mm": (1, 0.5, 2), "newton_schulz": (3, 2, 2)}


@dataclass(frozen=True)
class Case:
    """One layer on one input: of `batch` images of `sizes`, or a matrix (batch, channels)."""

    kind: str
    batch: int
    channels: int
    sizes: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def name(self) -> str:
        size = f"-{self.sizes[0]}^3" if len(self.sizes) == 3 else f"-{'x'.join(map(str, self.sizes))}"
        return f"n{self.batch}-c{self.channels}{size if self.sizes else ''}-{self.kind}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.sizes)

    @property
    def modes(self) -> tuple[str, ...]:
        return ("forward",) if self.kind in FUNCTIONS else ("forward", "training")

    def build(self) -> nn.Module:
        return KINDS[self.kind](self.channels)

    def input(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        x = torch.randn(self.shape, dtype=dtype, device=device)
        return x + x.mT if self.kind == "symmetric_mm" else x

    def tiny(self) -> Case:
        """The same in a size for Triton's interpreter."""
        return Case(self.kind, 1 if self.sizes else 8, 8, (3,) * len(self.sizes))


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the dense layer, those needed, and values read and written at least."""

    dense: int
    useful: int
    values: int


def cost(case: Case, mode: str) -> Cost:
    """What a case takes however it is computed; a training step has two more products like that of the forward pass."""
    once, times = _forward_cost(case), 1 if mode == "forward" else 3
    return Cost(times * once.dense, times * once.useful, times * once.values)


@cache
def _forward_cost(case: Case) -> Cost:
    n = case.channels
    if case.kind in FUNCTIONS:
        dense, useful, matrices = FUNCTIONS[case.kind]
        return Cost(dense * n**3, int(useful * n**3), matrices * n * n)
    if case.kind == "linear":
        stored = n * (n + 1) // 2
        return Cost(case.batch * n * n, case.batch * n * n, 2 * case.batch * n + stored)
    with torch.device("meta"):
        problem: Any = case.build().problem(case.shape, "cuda", "float32")  # type: ignore[operator]
    work, traffic = problem.work, problem.traffic
    values = traffic.x + traffic.y + traffic.stored
    return Cost(problem.dense, min(work.multiply_adds, problem.expanded), values)


#: Datasheet peaks by a part of the GPU's name: 16-bit and tf32 multiply-adds x 2 per second (dense), bytes per second.
PEAKS = {
    "A100": (312e12, 156e12, 2.04e12),
    "H100 80GB HBM3": (989e12, 494e12, 3.35e12),
    "H200": (989e12, 494e12, 4.8e12),
    "B200": (2250e12, 1125e12, 8e12),
}


def peak(device: str, dtype: str) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of a device by its name, None if unknown."""
    for name, (half, tf32, memory) in PEAKS.items():
        if name in device:
            return (tf32 if dtype == "float32" else half), memory
    return None


def roofline(case: Case, mode: str, dtype: str, device: str) -> float | None:
    """Seconds below which the device cannot compute the case: its arithmetic, or its traffic with memory."""
    if (rates := peak(device, dtype)) is None:
        return None
    least = cost(case, mode)
    return max(2 * least.useful / rates[0], least.values * (4 if dtype == "float32" else 2) / rates[1])


def _all(kinds: tuple[str, ...], shapes: list[tuple[int, int, tuple[int, ...]]]) -> list[Case]:
    return [Case(kind, *shape) for shape in shapes for kind in kinds]


#: Sizes that fit a laptop.
CPU: list[Case] = [
    *_all(
        ("h", "hv", "d4"),
        [
            (8, 32, (32, 32)),
            (8, 64, (32, 32)),
            (8, 64, (56, 56)),
            (8, 128, (28, 28)),
            (1, 256, (14, 14)),
            (8, 256, (28, 28)),
            (4, 512, (14, 14)),
            (2, 384, (19, 19)),
            (1, 320, (64, 64)),
            (2, 1280, (16, 16)),
        ],
    ),
    *_all(("tied-hv", "tied-d4", "pool-hv"), [(8, 64, (56, 56)), (8, 256, (28, 28)), (4, 512, (14, 14))]),
    *_all(("hvz",), [(1, 32, (16,) * 3), (1, 64, (16,) * 3)]),
    *_all(("stride2-hv",), [(8, 128, (28, 28)), (8, 256, (28, 28))]),
    *_all(("transpose4-hv",), [(8, 64, (16, 16)), (4, 256, (16, 16))]),
]

_PLANAR = ("h", "hv", "c4", "d4", "tied-hv", "tied-d4", "pool-hv", "mixed")
#: The first of every sort first: time may be short.
_GPU = [
    *_all(_PLANAR, [(256, 384, (19, 19)), (16, 640, (32, 32)), (256, 256, (14, 14))]),  # Go, diffusion, ResNet
    *_all(("hvz",), [(8, 64, (32,) * 3), (2, 32, (64,) * 3)]),
    *_all(("depthwise7-hv",), [(64, 384, (28, 28))]),
    *_all(("transpose4-hv",), [(16, 256, (32, 32))]),
    *_all(("linear", *FUNCTIONS), [(8192, 8192, ())]),
    *_all(("linear",), [(b, 1 << n, ()) for n in range(14, 9, -1) for b in (8, 1, 32, 64, 512, 4096)]),
    *_all(tuple(FUNCTIONS), [(1 << n, 1 << n, ()) for n in range(10, 13)]),
    *_all(_PLANAR, [(256, 512, (19, 19)), (16, 320, (64, 64)), (16, 1280, (16, 16)), (32, 256, (56, 56))]),
    *_all(_PLANAR, [(256, 64, (56, 56)), (256, 128, (28, 28)), (256, 512, (7, 7))]),
]
#: Sizes of networks: bfloat16, and every third case in the other dtypes as well.
GPU: list[Case] = [
    replace(case, dtypes=("bfloat16", "float16", "float32")[: 1 if i % 3 else 3]) for i, case in enumerate(_GPU)
]


def select(cases: list[Case], words: str) -> list[Case]:
    """The cases whose name has one of the words, separated by commas, in it.

    Raises:
        ValueError: no case has such a word; the message lists what there is.
    """
    for word in words.split(","):
        if not any(word in case.name for case in cases):
            raise ValueError(f"no case contains {word!r}; known: {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(word in case.name for word in words.split(","))]


def smallest(cases: list[Case]) -> list[Case]:
    """One tiny case of every kind."""
    return list({case.kind: case.tiny() for case in cases}.values())

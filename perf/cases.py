"""The named layers that are measured, the only list of shapes, and the least work that each of them takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import tritonsym
import tritonsym.nn as tnn
from tritonsym import functional, plan


class Function(nn.Module):
    """A matrix function that takes the place of a layer."""

    def __init__(self, ours: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ours, self.dense = ours, dense

    def forward(self, x: Tensor) -> Tensor:
        return self.ours(x)

    def to_dense(self) -> Function:
        return Function(self.dense, self.dense)

    def problem(self, x: Tensor, target: str, training: bool) -> plan.GramProblem:
        """The problem of each of its products with a symmetric result, for a square matrix."""
        return plan.gram_problem(x.shape, target, plan.dtype_name(x))


def _function(name: str, dense: Callable[[Tensor], Tensor], **options: Any) -> Callable[[int], nn.Module]:
    return lambda _: Function(lambda x: getattr(functional, name)(x, **options), dense)


def _newton_schulz(g: Tensor) -> Tensor:
    x = g / g.norm().clamp(min=1e-7)
    a = x @ x.mT
    return 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x


def _conv(layer: str, symmetry: Any, kernel_size: int = 3, **options: Any) -> Callable[[int], nn.Module]:
    options = {"padding": kernel_size // 2, "bias": False, "symmetry": symmetry, **options}
    return lambda c: getattr(tnn, layer)(c, c, kernel_size, **options)


def _group(name: str, symmetry: str, kernel_size: int = 3) -> Callable[[int], nn.Module]:
    order = tritonsym.Symmetry(symmetry).order
    return lambda c: _conv(name, symmetry, kernel_size)(c // order)


_orbit = "SymmetricConv2d"
#: Every kind of layer by its name, as a function of its channels.
KINDS: dict[str, Callable[[int], nn.Module]] = {
    **{symmetry: _conv(_orbit, symmetry) for symmetry in ("h", "hv", "c4", "d4")},
    "mixed": _conv(_orbit, {"h": "25%", "hv": "25%", "d4": "25%"}),
    "groups4-hv": _conv(_orbit, "hv", groups=4),
    "k5-hv": _conv(_orbit, "hv", 5),
    "stride2-hv": _conv(_orbit, "hv", stride=2),
    "transpose4-hv": _conv("SymmetricConvTranspose2d", "hv", 4, stride=2, padding=1),
    "k9-h": _conv("SymmetricConv1d", "h", 9),
    "hvz": _conv("SymmetricConv3d", "hvz"),
    "tied-hv": _conv("TiedConv2d", "hv"),
    "tied-d4": _conv("TiedConv2d", "d4"),
    "radial7": _conv("TiedConv2d", "radial", 7),
    "depthwise7-hv": lambda c: _conv("TiedConv2d", "hv", 7, groups=c)(c),
    "pool-hv": lambda c: tnn.OrbitPoolConv2d(c, c // 4, 3, padding=1, bias=False, symmetry="hv"),
    **{f"group-{symmetry}": _group("GroupConv2d", symmetry) for symmetry in ("h", "hv", "d4")},
    "group1x1-hv": _group("GroupConv2d", "hv", 1),
    "group-hvz": _group("GroupConv3d", "hvz"),
    "linear": lambda n: tnn.SymmetricLinear(n, n, bias=False),
    "gram": _function("gram", lambda x: x @ x.mT),
    "symmetric_mm": _function("symmetric_mm", lambda x: x @ x),
    "newton_schulz": _function("newton_schulz", _newton_schulz, steps=1),
}
#: For functions of n x n matrices: multiply-adds, dense and needed, in n^3, and the least matrices read and written.
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
    def modes(self) -> tuple[str, ...]:
        return ("forward",) if self.kind in FUNCTIONS else ("forward", "training")

    def build(self, dtype: str, device: torch.device | str) -> nn.Module:
        with torch.device(device):
            return KINDS[self.kind](self.channels).to(getattr(torch, dtype))

    def input(self, dtype: str, device: torch.device | str) -> dict[str, Tensor]:
        """The same input in every memory format; the last is channels-last if there is such a format."""
        x = torch.randn(self.batch, self.channels, *self.sizes, dtype=getattr(torch, dtype), device=device)
        if self.kind == "symmetric_mm":
            x = x + x.mT
        last = memory_format("channels_last", x)
        return {"nchw": x, **({} if last is None else {"channels_last": x.to(memory_format=last)})}

    def tiny(self) -> Case:
        """The same case, small enough for Triton's interpreter."""
        channels = 16 if "groups" in self.kind else 8
        return Case(self.kind, 1 if self.sizes else 8, channels, (3,) * len(self.sizes))


def memory_format(form: str, x: Tensor) -> torch.memory_format | None:
    """torch's memory format for inputs like x; None where torch has none."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    return torch.contiguous_format if form == "nchw" else last.get(x.ndim)


def shape_and_kind(name: str) -> tuple[str, str]:
    """Shape and kind from a case's name: 'n8-c64-3x3-tied-hv' -> ('8 x 64 x 3x3', 'tied-hv')."""
    found = re.fullmatch(r"n(\d+)-c(\d+)(?:-(\d[\dx^]*))?-(.+)", name)
    assert found, name
    *shape, kind = found.groups()
    return " x ".join(size for size in shape if size), kind


@cache
def cost(case: Case, mode: str) -> dict[str, int]:
    """Multiply-adds of the dense layer and those that are needed, and the least values read and written.

    A training step has two more products like that of the forward pass.
    """
    n, x = case.channels, case.input("float32", "meta")["nchw"]
    layer: Any = case.build("float32", "meta")
    problem = layer.problem(x, "cuda", False)
    if case.kind in FUNCTIONS:
        once = [int(factor * n**power) for factor, power in zip(FUNCTIONS[case.kind], (3, 3, 2), strict=True)]
    elif isinstance(problem, plan.GroupProblem):
        folded = 2 ** len(problem.spec.symmetry.mirrors)
        once = [problem.dense, problem.dense // folded, x.numel() + layer(x).numel() + layer.weight.numel()]
    elif case.kind == "linear":
        once = [problem.dense, problem.dense, 2 * x.numel() + n * (n + 1) // 2]
    else:
        once = [problem.dense, min(problem.work[0], problem.expanded), x.numel() + problem.y + problem.stored]
    times = 3 if mode == "training" else 1
    return {name: times * number for name, number in zip(("dense", "useful", "values"), once, strict=True)}


def roofline(row: dict[str, Any], device: str) -> float | None:
    """The least seconds that a row's case can take on a GPU, by its arithmetic or memory traffic; None if unknown."""
    for name, gpu in plan.DEVICES.items():
        if name in device:
            flops, itemsize = (gpu.tf32, 4) if row["dtype"] == "float32" else (gpu.half, 2)
            return max(2 * row["useful"] / flops, row["values"] * itemsize / gpu.peak_memory)
    return None


# --- the list ---------------------------------------------------------------------------------------------------------

Shape = tuple[int, int, tuple[int, ...]]


def _all(kinds: tuple[str, ...], shapes: list[Shape]) -> list[Case]:
    return [Case(kind, *shape) for shape in shapes for kind in kinds]


#: README's inputs, over which it takes means, and its symmetries.
INPUTS: list[Shape] = [(8, 32, (32, 32)), (8, 64, (32, 32)), (8, 64, (56, 56)), (8, 128, (28, 28)), (1, 256, (14, 14))]
INPUTS += [(8, 256, (28, 28)), (4, 512, (14, 14)), (2, 384, (19, 19)), (1, 320, (64, 64)), (2, 1280, (16, 16))]
SYMMETRIES = ("h", "hv", "d4")
MEANT = {case.name for case in _all(SYMMETRIES, INPUTS)}

GROUP_INPUTS: list[Shape] = [shape for shape in INPUTS if shape[1] >= 64]

#: Sizes that fit a laptop.
CPU: list[Case] = [
    *_all(SYMMETRIES, [(8, 16, (32, 32)), *INPUTS]),
    *_all(("tied-hv", "tied-d4", "pool-hv"), [(8, 64, (56, 56)), (8, 256, (28, 28)), (4, 512, (14, 14))]),
    *_all(("hvz",), [(1, 32, (16,) * 3), (1, 64, (16,) * 3)]),
    *_all(("stride2-hv", "mixed"), [(8, 128, (28, 28)), (8, 256, (28, 28))]),
    *_all(("transpose4-hv",), [(8, 64, (16, 16)), (4, 256, (16, 16))]),
    *_all(("groups4-hv",), [(8, 256, (28, 28))]),
    *_all(("k5-hv",), [(8, 64, (28, 28))]),
    *_all(("radial7",), [(4, 128, (28, 28))]),
    *_all(("k9-h",), [(8, 128, (512,))]),
    *_all(("hv",), [(1, 64, (256, 256))]),
    *_all(("linear",), [(b, 1 << n, ()) for n in range(9, 14) for b in (1, 4, 16, 64)]),
    *_all(tuple(FUNCTIONS), [(1 << n, 1 << n, ()) for n in (9, 10, 11)]),
    *_all(("gram",), [(4096, 4096, ())]),
    *_all(("group-h", "group-hv", "group-d4"), GROUP_INPUTS),
    *_all(("group1x1-hv",), [(8, 256, (28, 28)), (8, 512, (28, 28))]),
    *_all(("group-hvz",), [(1, 64, (16,) * 3), (1, 256, (8,) * 3)]),
]

_PLANAR = ("h", "hv", "c4", "d4", "tied-hv", "tied-d4", "pool-hv", "mixed")
#: One of every sort comes early, since time may be short.
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
    """The cases whose name contains one of the words, separated by commas, and none of those marked by a '^'.

    Raises:
        ValueError: a word is in no name.
    """
    for word in words.split(","):
        if not any(word.lstrip("^") in case.name for case in cases):
            raise ValueError(f"no case contains {word!r}; known: {', '.join(case.name for case in cases)}")
    wanted = [word for word in words.split(",") if not word.startswith("^")] or [""]
    unwanted = [word[1:] for word in words.split(",") if word.startswith("^")]
    chosen = [case for case in cases if any(word in case.name for word in wanted)]
    return [case for case in chosen if not any(word in case.name for word in unwanted)]


def smallest(cases: list[Case]) -> list[Case]:
    """One tiny case of every kind."""
    return list({case.kind: case.tiny() for case in cases}.values())

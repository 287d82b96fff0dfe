"""Questions that only a GPU can answer, one per line, each with its verdict.

    python -m tritonsym.perf.questions [NAME...] [--tiny]

The exit code is 1 if something computes wrong results; slow paths do not count. --tiny tries the program in Triton's
interpreter on the CPU, at tiny sizes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tritonsym import launch, nn, testing
from tritonsym.perf.bench import kernels_if_interpreted
from tritonsym.perf.measure import Step, _graph, _seconds, forced, make_step, measure, paths

Answer = tuple[bool, str]


class Setting:
    """A device, and sizes that fit it."""

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.device = tiny, torch.device("cpu" if tiny else "cuda")

    def layer(self, symmetry: str, channels: int, dtype: torch.dtype = torch.bfloat16) -> nn.SymmetricConv2d:
        channels, dtype = (8, torch.float32) if self.tiny else (channels, dtype)
        layer = nn.SymmetricConv2d(channels, channels, 3, padding=1, symmetry=symmetry, device=self.device, dtype=dtype)
        return layer.to(memory_format=torch.channels_last)

    def image(self, layer: nn.SymmetricConv2d, batch: int, size: int) -> Tensor:
        batch, size = (1, 3) if self.tiny else (batch, size)
        x = torch.randn(batch, layer.in_channels, size, size, device=self.device, dtype=layer.weight.dtype)
        return x.to(memory_format=torch.channels_last)

    def medians(self, steps: dict[str, Step]) -> dict[str, float]:
        seconds, _ = measure(steps, 1 if self.tiny else 9, self.device)
        return {name: statistics.median(samples) for name, samples in seconds.items()}

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()


def host(setting: Setting) -> Answer:
    """Is the host's time for a call under 1.5x that of nn.Conv2d?"""
    layer = setting.layer("hv", 64)
    x, found, most = setting.image(layer, 2, 8), [], 0.0
    for training in (False, True):
        steps = {"dense": make_step(layer.to_dense(), x, training)}
        steps |= {path: make_step(layer, x, training, path) for path in paths(layer, x) if path != "reference"}
        taken = {}
        for name, step in steps.items():
            _seconds(step, 3)
            setting.wait()
            taken[name] = min(_seconds(step, 1 if setting.tiny else 100) for _ in range(1 if setting.tiny else 5))
            setting.wait()
        most = max(most, *(taken[name] / taken["dense"] for name in taken))
        found.append(", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in taken.items()))
    return most < 1.5, "; training ".join(found)


def padding(setting: Setting) -> Answer:
    """Is z faster with a pitch that 16 divides? (d4, 64 channels: 72 rows)"""
    layer, taken = setting.layer("d4", 64), {}
    x = setting.image(layer, 256, 56)
    for pitch in (16, 1):
        with patch.object(launch, "PITCH", pitch):
            launch.forget()
            taken[pitch] = setting.medians({"shift": make_step(layer, x, False, "shift")})["shift"]
    launch.forget()
    return taken[16] <= taken[1], f"{1e3 * taken[16]:.3f} ms padded, {1e3 * taken[1]:.3f} ms without"


def leading_dimension(setting: Setting) -> Answer:
    """Are batched products with a leading dimension of 361 slower than with 368, so that the copy pays?"""
    batch, channels = (1, 8) if setting.tiny else (256, 384)
    w = torch.randn(batch, channels, channels, device=setting.device).to(
        torch.float32 if setting.tiny else torch.bfloat16
    )
    xs = {n: torch.randn(batch, channels, n, device=setting.device, dtype=w.dtype) for n in (361, 368)}
    taken = setting.medians({str(n): lambda x=x: torch.bmm(w, x) for n, x in xs.items()})
    return taken["361"] > 1.1 * taken["368"], ", ".join(f"{n}: {1e3 * seconds:.3f} ms" for n, seconds in taken.items())


def few_channels(setting: Setting) -> Answer:
    """Does a path of ours beat the dense layer at 256x64x56x56 hv? And does `auto` take the fastest?"""
    layer = setting.layer("hv", 64)
    x = setting.image(layer, 256, 56)
    ours = paths(layer, x)
    steps = {"dense": make_step(layer.to_dense(), x, False)} | {
        p: make_step(layer, x, False, p) for p in [*ours, "auto"]
    }
    taken = setting.medians(steps)
    best = min(taken[path] for path in ours)
    words = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in taken.items())
    return best < taken["dense"] and taken["auto"] <= 1.05 * best, words


def graphs(setting: Setting) -> Answer:
    """Do CUDA graphs of inference and training replay what eager calls compute?"""
    layer, wrong = setting.layer("hv", 64), []
    x = setting.image(layer, 4, 14)
    for path in set(paths(layer, x)) - {"reference"}:
        for training in (False, True):
            kept: list[Any] = []
            step = make_step(layer, x, training, path)

            def keep(step: Step = step, kept: list[Any] = kept) -> None:
                kept.append(step())

            keep()
            replay = keep if setting.tiny else _graph(keep)
            if replay is None:
                wrong.append(f"{path}: cannot be captured")
                continue
            replay()
            setting.wait()
            pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (kept[0], kept[-1])), strict=True)
            wrong += [f"{path} {'training' if training else 'forward'}"] * any(not torch.equal(a, b) for a, b in pairs)
    return not wrong, "; ".join(wrong) or "to the bit"


def tf32(setting: Setting) -> Answer:
    """Are all paths as right as torch in float32, ieee and tf32?"""
    switches: Any = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before, wrong = [switch.fp32_precision for switch in switches], []
    layer = setting.layer("hv", 64, torch.float32)
    x = setting.image(layer, 2, 14)
    try:
        for precision, path in product(("ieee", "tf32"), paths(layer, x)):
            for switch in switches:
                switch.fp32_precision = precision
            with forced(path):
                try:
                    testing.assert_matches_reference(layer, x)
                except AssertionError as error:
                    wrong.append(f"{path} {precision}: {str(error).splitlines()[0]}")
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
    return not wrong, "; ".join(wrong) or "yes"


def large(setting: Setting) -> Answer:
    """Are the last positions of an image of more than 2^31 values right?"""
    layer, wrong = setting.layer("hv", 64), []
    size = 9 if setting.tiny else 5800
    x = torch.zeros(1, size, size, layer.in_channels, device=setting.device, dtype=layer.weight.dtype).movedim(-1, 1)
    x[..., -8:, -8:] = torch.randn_like(x[..., -8:, -8:])
    with torch.no_grad():
        expected = layer.to_dense()(x[..., -9:, -9:])[..., 2:, 2:]
        for path in set(paths(layer, x)) - {"reference"}:
            with forced(path):
                error = (layer(x)[..., -7:, -7:] - expected).abs().max() / expected.abs().max()
            wrong += [f"{path}: error {error:.2g}"] if error > 0.02 else []
    return not wrong, "; ".join(wrong) or f"{x.numel():,} values, yes"


#: All questions, and whether a no is an error.
QUESTIONS: dict[Callable[[Setting], Answer], bool] = {
    host: False, padding: False, leading_dimension: False, few_channels: False, graphs: True, tf32: True, large: True
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    names = {question.__name__: question for question in QUESTIONS}
    formatter = argparse.RawDescriptionHelpFormatter
    program = argparse.ArgumentParser("python -m tritonsym.perf.questions", None, __doc__, formatter_class=formatter)
    program.add_argument("names", nargs="*", help=f"of {', '.join(names)} (default: all)")
    program.add_argument("--tiny", action="store_true", help="on the CPU, at tiny sizes")
    args = program.parse_args(argv)
    if unknown := [name for name in args.names if name not in names]:
        program.error(f"unknown question {unknown[0]!r}; known: {', '.join(names)}")
    if not args.tiny and not torch.cuda.is_available():
        program.error("no CUDA device; --tiny tries the program on the CPU")
    setting, code = Setting(args.tiny), 0
    with kernels_if_interpreted(setting.device):
        for name in args.names or names:
            question = names[name]
            try:
                answer, words = question(setting)
                code |= QUESTIONS[question] and not answer
            except Exception as error:
                traceback.print_exc()
                answer, code, words = False, 1, f"FAILED: {type(error).__name__}: {error}"
            print(f"{'yes' if answer else 'NO '} {name}: {question.__doc__} {words}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

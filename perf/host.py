"""Time the host's part of kernel calls, without a GPU: by Triton's JIT, with a driver that launches nothing.

    python -m tritonsym.perf.host --output perf/results/NAME.json

The products of `shift` are the vendor's and are left out. The JSON has one row per line with all samples, in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import tritonsym
from tritonsym import launch, nn, tuned
from tritonsym.perf.bench import dumped, machine
from tritonsym.perf.measure import forced, make_step, measure, spread

#: The cases: the path of a convolution, or a symmetric matrix and the rows that multiply it.
CASES = ("shift", "implicit_gemm", "linear 1 row", "linear 128 rows")


@contextlib.contextmanager
def stub_driver(architecture: int = 90) -> Iterator[SimpleNamespace]:
    """Run kernels on CPU tensors as if these were a GPU's; they are compiled but compute nothing.

    Yields an object with the names of the kernels that were `launched`, and of those that were `compiled`.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.compiler import compiler
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tritonsym.kernels import conv, depthwise, fused, gram, shift, symm

    seen = SimpleNamespace(launched=[], compiled=[])

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
            assert 0 < x < 2**31 and 0 < y < 65536 and z == 1
            seen.launched.append(self.name)

    class Driver(DriverBase):
        utils = SimpleNamespace(load_binary=lambda *_: ("module", 1, 0, 0, 1024))
        launcher_cls = Launcher

        def __init__(self) -> None:
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        is_active = classmethod(lambda cls: True)
        map_python_to_cpp_type = get_active_torch_device = get_benchmarker = None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", architecture, 32)

    right = JITFunction._do_compile

    def compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.compiled.append(self.__name__)
        return right(self, *args, **kwargs)

    modules = (conv, depthwise, fused, gram, shift, symm)
    kernels = [v for module in modules for v in vars(module).values() if isinstance(v, JITFunction)]

    def forget() -> None:
        for kernel in kernels:
            kernel.device_caches.clear()
        for prepared in (symm._by_tiles, symm._by_strips, symm._of_gradient, gram._of_gram):
            prepared.cache_clear()
        launch.forget()

    Driver.__abstractmethods__ = frozenset()
    with (
        patch.object(JITFunction, "_do_compile", compile),
        patch.object(compiler, "max_shared_mem", lambda device: 227 << 10),
        patch.object(launch, "runs_on", lambda device: True),
        patch.object(driver, "_active", Driver()),
        tritonsym.backend("triton"),
    ):
        forget()
        try:
            yield seen
        finally:
            forget()


def layer_and_input(case: str) -> tuple[torch.nn.Module, torch.Tensor]:
    if case.startswith("linear"):
        return nn.SymmetricLinear(64, 64).bfloat16(), torch.randn(int(case.split()[1]), 64).bfloat16()
    layer = nn.SymmetricConv2d(16, 16, 3, padding=1, symmetry="hv").bfloat16()
    return layer, torch.randn(1, 16, 4, 4).bfloat16().to(memory_format=torch.channels_last)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonsym.perf.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="samples per case (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the samples to this JSON file")
    args = parser.parse_args(argv)
    device, rows = torch.device("cpu"), []
    with stub_driver(), patch.object(launch, "_multiply", lambda a, b, out, scale=1: out):
        for case in CASES:
            layer, x = layer_and_input(case)
            with forced(None if case.startswith("linear") else case):
                steps = {mode: make_step(layer, x, mode == "training") for mode in ("forward", "training")}
                found, _ = measure(steps, args.rounds, device)
            for mode, seconds in found.items():
                print(f"{case:16} {mode:9} median {1e6 * statistics.median(seconds):5.1f} us, +-{spread(seconds):.0%}")
                rows.append({"case": case, "mode": mode, "seconds": seconds})
    if args.output:
        result = machine("", argv, device)
        result["command"] = ["python", "-m", "tritonsym.perf.host", *result["command"][4:]]
        tuned.write(args.output, dumped({**result, "triton": __import__("triton").__version__, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time this library's paths against the dense torch layer with a pre-expanded weight, on this machine's CPU.

    python -m tritonsym.perf.bench --output perf/results/NAME.json [--filter c256] [--quick]

Every variant of a case runs in turn, round after round, so that a drift of the machine's speed touches all of them; a
case whose paths do not match the reference is not timed. The JSON keeps every sample.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tritonsym
from tritonsym import testing
from tritonsym.perf.cases import CPU, Case

Step = Callable[[], object]


def _steps(case: Case, backward: bool) -> dict[str, Step]:
    """The variants of a case, ready to run: the dense layer in both memory formats, and our paths in the better one."""
    torch.manual_seed(0)
    layer = case.build()
    dense = layer.to_dense()
    x = torch.randn(case.shape, requires_grad=backward)
    last = x.detach().to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    last.requires_grad_(backward)

    def step(module: nn.Module, x: Tensor, path: str | None) -> Step:
        def forward() -> Tensor:
            if path is None:
                return module(x)
            with tritonsym.path(path):
                return module(x)

        def both() -> None:
            # a fixed upstream gradient of ones would be an expanded tensor; a dense one is what a network sends
            y = forward()
            y.backward(torch.ones_like(y))

        def without() -> None:
            with torch.no_grad():
                forward()

        return both if backward else without

    variants = {
        "dense": (dense, None),
        "auto": (layer, None),
        "reference": (layer, "reference"),
        "shift": (layer, "shift"),
    }
    return {
        f"{name} {form}": step(module, data, path)
        for name, (module, path) in variants.items()
        for form, data in (("nchw", x), ("channels_last", last))
    }


def _measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - start)
    return samples


def _check(layer: nn.Module, x: Tensor) -> None:
    """The gate: what 'auto' computes, and the output by shifts."""
    testing.assert_matches_reference(layer, x)
    with torch.no_grad():
        with tritonsym.path("reference"):
            expected = layer(x)
        with tritonsym.path("shift"):
            torch.testing.assert_close(layer(x), expected)


def _best(samples: dict[str, list[float]], name: str) -> float:
    return min(statistics.median(values) for key, values in samples.items() if key.split()[0] == name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonsym.perf.bench", description=__doc__)
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--output", type=Path, help="write the samples to this JSON file")
    args = parser.parse_args(argv)
    cases = [case for case in CPU if args.filter in case.name]
    if not cases:
        parser.error(f"no case contains {args.filter!r}; known: {', '.join(case.name for case in CPU)}")
    rows = []
    print(f"{'case':32} {'mode':9} {'dense ms':>9} {'reference':>10} {'shift':>7} {'auto':>7}   speedup over dense")
    for case in tqdm(cases, disable=not sys.stderr.isatty()):
        layer, x = case.build(), torch.randn(case.shape)
        _check(layer, x[:1])
        for backward in (False, True):
            samples = _measure(_steps(case, backward), 3 if args.quick else 9)
            dense = _best(samples, "dense")
            speed = {name: dense / _best(samples, name) for name in ("reference", "shift", "auto")}
            mode = "training" if backward else "forward"
            with torch.set_grad_enabled(backward):
                plan = tritonsym.explain(layer, x)
            work = plan.problem.shift
            rows.append(
                {
                    "case": case.name,
                    "mode": mode,
                    "plan": plan.path,
                    "dense_multiply_adds": plan.problem.dense,
                    "expanded_multiply_adds": plan.problem.expanded,
                    "shift_multiply_adds": work and work.multiply_adds,
                    "shift_additions": work and work.additions,
                    "speedup": speed,
                    "seconds": samples,
                }
            )
            ratios = f"{speed['reference']:>10.2f} {speed['shift']:>7.2f} {speed['auto']:>7.2f}"
            tqdm.write(f"{case.name:32} {mode:9} {dense * 1e3:9.2f} {ratios}   {plan.path}")
            if args.output:
                args.output.write_text(json.dumps({**machine("bench", argv), "rows": rows}, indent=1) + "\n")
    return 0


def machine(program: str, argv: list[str] | None) -> dict[str, object]:
    """What every result file says of where it comes from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": ["python", "-m", f"tritonsym.perf.{program}", *(sys.argv[1:] if argv is None else argv)],
        "device": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tritonsym": tritonsym.__version__,
        "commit": commit,
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())

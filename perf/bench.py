"""Time this library's paths against the dense torch layer with a pre-expanded weight.

    python -m tritonsym bench --output perf/results/NAME.json [--filter c256,linear] [--quick] [--baseline OLD.json]

On a GPU the shapes of networks, without one reduced sizes on the CPU. All variants of a case are timed in one run, in
an order drawn for every round; what does not match the reference is not timed. The JSON keeps every sample and is
written after every row, so that an interrupted run keeps what it measured; --resume goes on with it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tritonsym
from tritonsym import launch, tuned
from tritonsym.perf.cases import CPU, GPU, Case, Function, cost, roofline, select, smallest
from tritonsym.perf.measure import Samples, Step, gate, make_step, measure, paths

#: The exit code of a run whose time was up before all cases were measured.
UNFINISHED = 75

#: Variants compiled by torch, by the path they are traced under.
COMPILED = {"reference": "compiled", "shift": "compiled-shift"}

Row = dict[str, Any]


class Named(nn.Module):
    """A layer with a name that Dynamo sees: code compiled under one `tritonsym.path` is not taken for another's."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.name else x


def _steps(case: Case, layer: nn.Module, x: Tensor, mode: str, ours: list[str], compiled: bool) -> dict[str, Step]:
    """The variants of a case, ready to run, by name and memory format. Each has a layer of its own, as in a program: a
    layer remembers its last call."""
    forms = {"nchw": (x, torch.contiguous_format)}
    if case.sizes:
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        forms["channels_last"] = (x.to(memory_format=last), last)
    training, steps = mode == "training", {}
    for form, (data, memory_format) in forms.items():
        dense = copy.deepcopy(layer).to_dense().to(memory_format=memory_format)  # type: ignore[operator]
        steps[f"dense {form}"] = make_step(dense, data, training)
        for path in ours:
            steps[f"{path} {form}"] = make_step(copy.deepcopy(layer), data, training, path)
        if compiled:
            torch.compiler.reset()  # else, after some layers, it falls back to eager
            for path in [path for path in COMPILED if path in ours]:
                step = make_step(torch.compile(Named(copy.deepcopy(layer), path)), data, training, path)  # type: ignore[arg-type]
                steps[f"{COMPILED[path]} {form}"] = step
    return steps


def _best(samples: dict[str, Samples], name: str) -> Samples:
    """In the better memory format."""
    return min((s for key, s in samples.items() if key.split()[0] == name), key=lambda s: s.median)


def bench(case: Case, dtype: str, device: torch.device, rounds: int, compiled: bool, done: set[Any]) -> Iterator[Row]:
    """The rows of a case that are not done: every mode, and matrices also with a warm cache."""
    todo = [
        (mode, cache)
        for mode in case.modes
        for cache in (("warm",) if device.type == "cpu" else ("cold",) if case.sizes else ("cold", "warm"))
        if (case.name, dtype, mode, cache) not in done
    ]
    if not todo:
        return
    torch.manual_seed(0)
    with device:
        layer = case.build().to(getattr(torch, dtype))
    x = case.input(getattr(torch, dtype), device)
    ours, red = paths(layer, x), {}
    for path in list(ours):
        try:
            gate(layer, x, path)
        except Exception as error:  # a kernel that fails is as wrong as one that computes something else
            ours.remove(path)
            red[path] = f"{type(error).__name__}: {error}"
    for mode, cache in todo:
        steps = _steps(case, layer, x, mode, ours, compiled and not isinstance(layer, Function))
        samples = measure(steps, rounds, device, cache == "cold")
        yield _row(case, layer, x, mode, cache, samples, red)


def _row(
    case: Case, layer: nn.Module, x: Tensor, mode: str, cache: str, samples: dict[str, Samples], red: dict[str, str]
) -> Row:
    names = list(dict.fromkeys(name.split()[0] for name in samples))
    best = {name: _best(samples, name) for name in names}
    with torch.set_grad_enabled(mode == "training"):
        plan = tritonsym.explain(layer, x)
    work, needs = plan.problem.work, cost(case, mode)
    dtype = str(x.dtype).removeprefix("torch.")
    least = roofline(case, mode, dtype, tuned.device_name(x.device))

    def rates(run: Samples) -> Row:
        return {
            "effective_tflops": 2e-12 * needs.dense / run.median,
            "useful_tflops": 2e-12 * needs.useful / run.median,
            "roofline": least and least / run.median,
            "spread": run.spread,
        }

    return {
        "case": case.name,
        "dtype": dtype,
        "mode": mode,
        "cache": cache,
        "plan": plan.path,
        "why": plan.why,
        "tiles": plan.tiles,
        "dense_multiply_adds": needs.dense,
        "useful_multiply_adds": needs.useful,
        "values": needs.values,
        "shift_additions": work and work.additions,
        "red": red,
        "speedup": {name: best["dense"].median / best[name].median for name in names if name != "dense"},
        "rates": {name: rates(run) for name, run in best.items()},
        "seconds": {name: run.seconds for name, run in samples.items()},
        "launch": {name: run.launch for name, run in samples.items()},
        "peak_bytes": {name: run.peak_bytes for name, run in samples.items()},
        "graph": [name for name, run in samples.items() if run.graph],
    }


#: Columns of speedups: variant and heading.
SHOWN = {name: name for name in ("reference", "compiled", "expand", "shift", "compiled-shift", "auto")}
SHOWN["compiled-shift"] = "c-shift"
COLUMNS = f"{'case':28} {'dtype':8} {'mode':8} {'cache':5} {'dense ms':>9} {'spread':>6}" + "".join(
    f" {name:>9}" for name in (*SHOWN.values(), "launch us", "TFLOP/s", "useful", "roof")
)


def line(row: Row) -> str:
    """A row of the terminal's table. Under the paths' names: how many times as fast as the dense layer; the rest of
    'auto', but the first two."""

    def shown(value: float | None, pattern: str = ".2f", factor: float = 1) -> str:
        return f" {'-' if value is None else format(factor * value, pattern):>9}"

    speed, auto = row["speedup"], row["rates"].get("auto", {})
    launch_auto = [s for name, s in row["launch"].items() if name.startswith("auto") and s is not None]
    dense = min(statistics.median(s) for name, s in row["seconds"].items() if name.startswith("dense"))
    return (
        f"{row['case']:28} {row['dtype']:8} {row['mode']:8} {row['cache']:5} {dense * 1e3:9.3f} "
        f"{row['rates']['dense']['spread']:6.0%}"
        + "".join(shown(speed.get(name)) for name in SHOWN)
        + shown(min(launch_auto, default=None), ".1f", 1e6)
        + "".join(shown(auto.get(name), ".1f") for name in ("effective_tflops", "useful_tflops"))
        + shown(auto.get("roofline"), ".0%")
        + f"  {row['plan']}"
        + "".join(
            f"\n    {path} is WRONG and was not timed: {message.splitlines()[0]}"
            for path, message in row["red"].items()
        )
    )


def identity(row: Row) -> tuple[str, str, str, str]:
    """What is measured."""
    return row["case"], row["dtype"], row["mode"], row["cache"]


def regressions(result: dict[str, Any], baseline: dict[str, Any], tolerance: float) -> list[str]:
    """Where a path is slower than before, as a ratio to the dense layer of the same run.

    Raises:
        ValueError: they are of different devices, or no row is in both.
    """
    before = {identity(row): row["speedup"] for row in baseline["rows"]}
    both = [row for row in result["rows"] if identity(row) in before]
    if not both or result["device"] != baseline["device"]:
        raise ValueError(
            f"the baseline, of {baseline['device']}, cannot be compared with this run, of {result['device']}: the same "
            "device and some of the same cases, dtypes and modes are needed"
        )
    return [
        f"{' '.join(identity(row))}: {path} {old:.2f} -> {row['speedup'][path]:.2f} times as fast as dense"
        for row in both
        for path, old in before[identity(row)].items()
        if path in row["speedup"] and row["speedup"][path] < (1 - tolerance) * old
    ]


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The options that the programs here have in common."""
    shared = argparse.ArgumentParser(
        prog=f"python -m tritonsym {program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    shared.add_argument("--filter", default="", help="only cases whose name contains this, or one of these,those")
    shared.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    shared.add_argument("--tiny", action="store_true", help="one case of every kind, tiny: to try the program")
    return shared


def prepare(args: argparse.Namespace, program: argparse.ArgumentParser) -> tuple[torch.device, list[Case]]:
    """The device and the cases that the options ask for."""
    if args.device == "cuda" and not torch.cuda.is_available():
        program.error(
            "no CUDA device: this needs an NVIDIA GPU with its driver, and a CUDA build of torch "
            f"(https://pytorch.org/get-started; this one is {torch.__version__}); --device cpu measures the CPU"
        )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases = GPU if device.type == "cuda" or args.tiny else CPU
    if device.type == "cpu":
        print("On the CPU, with reduced sizes: these numbers say nothing about GPUs.")
    try:
        return device, select(smallest(cases) if args.tiny else cases, args.filter)
    except ValueError as error:
        program.error(str(error))


def kernels_if_interpreted(device: torch.device) -> Any:
    """On CPU tensors under Triton's interpreter: the kernels."""
    return tritonsym.backend("triton") if device.type == "cpu" and launch.runs_on(device) else contextlib.nullcontext()


def main(argv: list[str] | None = None) -> int:
    program = parser("bench", __doc__)
    program.add_argument("--quick", action="store_true", help="3 rounds instead of 9, bfloat16 alone, no torch.compile")
    program.add_argument("--compiled", action="store_true", help="also what torch.compile makes of the torch paths")
    program.add_argument("--output", type=Path, help="write the samples to this JSON file, and plots beside it")
    program.add_argument("--resume", action="store_true", help="keep the rows that --output has, and measure the rest")
    program.add_argument("--baseline", type=Path, help="exit with 1 if a path is slower than in this older output")
    program.add_argument("--tolerance", type=float, default=0.1, help="by more than this share (default: %(default)s)")
    args = program.parse_args(argv)
    device, cases = prepare(args, program)
    if args.output and not args.output.absolute().parent.is_dir():
        program.error(f"--output: the folder of {args.output} does not exist; create it")
    result = {**machine("bench", argv, device), "rows": []}
    baseline = _load(args.baseline, program) if args.baseline else None
    if args.resume and args.output and args.output.exists():
        old = _load(args.output, program)
        if different := [k for k in ("device", "torch", "commit") if old[k] != result[k]]:
            program.error(f"--resume: {args.output} is of another {' and '.join(different)}; choose another --output")
        result["rows"] = old["rows"]
    done, start, code = {identity(row) for row in result["rows"]}, time.monotonic(), 0
    work = [(case, d) for case in cases for d in case.dtypes[: 1 if args.quick else None]]
    torch.backends.cudnn.benchmark = True
    failed = False
    rounds = 1 if args.tiny else 3 if args.quick else 9
    print(COLUMNS)
    try:
        with kernels_if_interpreted(device):
            for case, dtype in tqdm(work, disable=not sys.stderr.isatty()):
                if time.monotonic() - start > args.budget:
                    code = UNFINISHED
                    break
                compiled = args.compiled or (device.type == "cuda" and not args.quick)
                try:
                    for row in bench(case, dtype, device, rounds, compiled, done):
                        tqdm.write(line(row))
                        result["rows"].append(row)
                        if args.output:
                            tuned.write(args.output, json.dumps(result, indent=1) + "\n")
                except RuntimeError as error:  # out of memory
                    tqdm.write(f"{case.name} {dtype} FAILED: {str(error).splitlines()[0]}")
                    failed = True
    except KeyboardInterrupt:
        code = 130
    if code:
        print(f"Stopped early; {len(result['rows'])} rows are kept" + (f" in {args.output}" if args.output else ""))
    if args.output and result["rows"]:
        from tritonsym.perf import table

        table.plot(result, args.output)
    if failed or any(row["red"] for row in result["rows"]):
        code = 1
    if baseline is not None:
        try:
            slower = regressions(result, baseline, args.tolerance)
        except ValueError as error:
            program.error(str(error))
        print(*(f"REGRESSION {text}" for text in slower), sep="\n")
        code = 1 if slower else code
    return code


def _load(file: Path, program: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        _ = [identity(row) for row in content["rows"]], content["device"]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        program.error(f"{file} is no output of the benchmark: {type(error).__name__}: {error}")


def machine(program: str, argv: list[str] | None, device: torch.device | None = None) -> dict[str, Any]:
    """What every result file says of where it comes from."""

    def output(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=here).stdout.strip()

    here = Path(__file__).parent
    device = device or torch.device("cpu")
    cuda = {}
    if device.type == "cuda":
        cuda = {
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": __import__("triton").__version__,
        }
    return {
        "command": ["python", "-m", f"tritonsym.perf.{program}", *(sys.argv[1:] if argv is None else argv)],
        "device": tuned.device_name(device),
        **cuda,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tritonsym": tritonsym.__version__,
        "commit": output("git", "rev-parse", "HEAD"),
    }


if __name__ == "__main__":
    sys.exit(main())

"""Time this library's paths against the dense torch layer with a pre-expanded weight.

    python -m tritonsym bench --output perf/results/NAME.json [--filter c256,linear] [--quick] [--baseline OLD.json]

The cases are shapes of networks on a GPU, and reduced sizes on the CPU. Variants: `dense`, every path, the default
(`auto`), the weight expanded in every call by torch's `parametrize`, and on the CPU the product with the stored weights
alone (`gemm`), which no path can beat. Where escnn is installed, 2-D group convolutions are compared with its layer
between the same fields, too, which keeps its dense weight in inference. escnn needs an environment of its own:

    pip install -e . escnn==1.0.11 'scikit-learn<1.2' 'scipy<1.12'

All are timed in one run, in a random order in every round; a path that does not match the reference is not timed. The
JSON has one row per line with all samples, in seconds, and is written after every row, so that an interrupted run keeps
what it measured; --resume continues it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tritonsym
from tritonsym import launch, plan, reference, shift, tuned
from tritonsym.perf.cases import CPU, GPU, Case, Function, cost, memory_format, roofline, select, smallest
from tritonsym.perf.measure import Step, auto, gate, make_step, measure, paths, spread, tqdm

#: The exit code of a run whose time was up before all cases were measured.
UNFINISHED = 75

#: Variants compiled by torch, by the path they are traced under.
COMPILED = {"reference": "compiled", "shift": "compiled-shift"}

#: The variants that are compared with the dense layer, in the order in which they are shown.
VARIANTS = ("reference", "parametrize", "escnn", *COMPILED.values(), *plan.PATHS[1:], "gemm", "auto")

Row = dict[str, Any]


class Named(nn.Module):
    """A layer with a name that Dynamo sees, so that code compiled for one `tritonsym.path` is not used for another."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.name else x


def parametrized(layer: Any) -> nn.Module:
    """A plain torch convolution whose weight is expanded from the stored one in every call."""
    stored = layer.weight.detach().clone()

    class Expand(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return reference.expand(layer.spec, [weight])

        def right_inverse(self, dense: Tensor) -> Tensor:
            return stored

    return parametrize.register_parametrization(layer.to_dense(), "weight", Expand())


def escnn(layer: Any, training: bool) -> nn.Module | None:
    """escnn's layer from and to as many fields of the same group, with its own weights; None if there is none."""
    names = {"h": (1, "flip2dOnR2"), "hv": (2, "flipRot2dOnR2"), "d4": (4, "flipRot2dOnR2")}
    if not isinstance(layer, tritonsym.nn.GroupConv2d) or layer.symmetry.name not in names or not find_spec("escnn"):
        return None
    from escnn import gspaces
    from escnn import nn as theirs

    turns, name = names[layer.symmetry.name]
    space = getattr(gspaces, name)(*[turns] * (turns > 1))
    into, out = (theirs.FieldType(space, n * [space.regular_repr]) for n in (layer.in_fields, layer.out_fields))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = theirs.R2Conv(into, out, layer.kernel_size[0], padding=layer.padding[0], bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(theirs.GeometricTensor(x, into)).tensor
            return y

    return Layer().train(training)


def gemm(problem: plan.ConvProblem, x: Tensor, training: bool) -> Step | None:
    """x times the stored weights, (positions, C) x (C, rows), and if training the products of both gradients.

    None for layers with groups or strides, and for transposed ones.
    """
    geometry = problem.spec.geometry
    if problem.spec.groups > 1 or geometry.transposed or max(geometry.stride) > 1:
        return None
    a, w = x.movedim(1, -1).reshape(-1, problem.channels), x.new_ones(problem.spec.rows, problem.channels)
    d, sizes = a @ w.mT, x.shape[2:]

    def multiply() -> tuple[Tensor, ...]:
        if shift.is_convolved(a[None], w):
            more = shift.convolved_adjoint(d, a, w, sizes, True, True) if training else ()
            return shift.convolved(a, w, sizes), *more
        return (a @ w.mT, d @ w, d.mT @ a) if training else (a @ w.mT,)

    return multiply


def _steps(
    layer: Any, inputs: dict[str, Tensor], problem: Any, training: bool, ours: list[str], compiled: bool
) -> dict[str, Step]:
    """The variants of a case, ready to run, by name and by the memory format of input and weights."""
    is_conv, steps = isinstance(problem, plan.ConvProblem), {}
    other = escnn(layer, training)
    for form, x in inputs.items():
        modules = {"dense": layer.to_dense()}
        if is_conv and not hasattr(layer, "reduce"):
            modules["parametrize"] = parametrized(layer)
        modules |= {path: copy.deepcopy(layer) for path in ours}
        for name, module in modules.items():
            module = module.to(memory_format=memory_format(form, x))
            steps[f"{name} {form}"] = make_step(module, x, training, name if name in ours else None)
        if other is not None:
            steps[f"escnn {form}"] = make_step(other, x, training)
        if compiled:
            torch.compiler.reset()  # else torch.compile falls back to eager after some layers
        for path in COMPILED.keys() & ours if compiled else ():
            one: Any = torch.compile(Named(modules[path], path))
            steps[f"{COMPILED[path]} {form}"] = make_step(one, x, training, path)
    if is_conv and x.device.type == "cpu" and (product := gemm(problem, x, training)):
        steps[f"gemm {form}"] = product
    return steps


def bench(case: Case, dtype: str, device: torch.device, rounds: int, compiled: bool, done: set[Any]) -> Iterator[Row]:
    """The rows of a case that are not done: every mode, and matrices on a GPU also with a warm cache."""
    caches = ("warm",) if device.type == "cpu" else ("cold",) if case.sizes else ("cold", "warm")
    todo = [(mode, cache) for mode in case.modes for cache in caches if (case.name, dtype, mode, cache) not in done]
    if not todo:
        return
    torch.manual_seed(0)
    layer, inputs = case.build(dtype, device), case.input(dtype, device)
    *_, x = inputs.values()
    ours, red = paths(layer, x), {}
    for path in ours:
        try:
            gate(layer, x, path)
        except Exception as error:  # a kernel that fails is as wrong as one that computes something else
            red[path] = f"{type(error).__name__}: {error}"
    for mode, cache in todo:
        plans = {form: auto(layer, data, mode == "training") for form, data in inputs.items()}
        taken = {form: planned.path for form, planned in plans.items()}
        right = [path for path in ours if path not in red] + ["auto"] * red.keys().isdisjoint(taken.values())
        compile_too = compiled and not isinstance(layer, Function)
        steps = _steps(layer, inputs, plans["nchw"].problem, mode == "training", right, compile_too)
        seconds, more = measure(steps, rounds, device, cache == "cold")
        row = {"case": case.name, "dtype": dtype, "mode": mode, "cache": cache, "plan": taken, "red": red}
        yield {**row, "tiles": plans[[*plans][-1]].tiles, **cost(case, mode), "seconds": seconds, **more}


def speedups(row: Row) -> dict[str, float]:
    """Median time of the dense layer over that of every other variant, in the same memory format: 'auto nchw', ..."""
    median = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
    others = [name for name in median if not name.startswith("dense ")]
    return {name: median[f"dense {name.split()[1]}"] / median[name] for name in others}


def show(row: Row, device: str) -> None:
    """Print a row for every memory format: how many times as fast as the dense layer each variant is.

    For 'auto' also its path, its time, its time on the host, and the rates that it reaches.
    """
    speed, least = speedups(row), roofline(row, device)
    for form, path in row["plan"].items():
        dense, ours = (row["seconds"].get(f"{name} {form}", [math.nan]) for name in ("dense", "auto"))
        median, launched = statistics.median(ours), row.get("launch", {}).get(f"auto {form}", math.nan)
        cells = [f"dense {1e3 * statistics.median(dense):.3f} ms +-{spread(dense):.0%}"]
        cells += [f"{name} {speed[key]:.2f}" for name in VARIANTS if (key := f"{name} {form}") in speed]
        cells += [f"auto ({path}) {1e3 * median:.3f} ms +-{spread(ours):.0%}", f"least {1e3 * min(ours):.3f} ms"]
        cells += [f"host {1e6 * launched:.1f} us", f"{2e-12 * row['dense'] / median:.1f} TFLOP/s"]
        cells += [f"useful {2e-12 * row['useful'] / median:.1f}", f"roofline {(least or math.nan) / median:.0%}"]
        tqdm.write(" ".join((*identity(row), form)))
        shown = "  ".join(cell.replace(" ", "\0") for cell in cells if "nan" not in cell)
        lines = textwrap.wrap(shown, 96, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        tqdm.write("\n".join(lines).replace("\0", " "))
    for path, error in row["red"].items():
        tqdm.write(f"    {path} is WRONG and was not timed: {error.splitlines()[0]}")


def identity(row: Row) -> tuple[str, str, str, str]:
    """What identifies a row."""
    return row["case"], row["dtype"], row["mode"], row["cache"]


def regressions(result: dict[str, Any], baseline: dict[str, Any], tolerance: float) -> list[str]:
    """Where a path is slower than in the baseline, relative to the dense layer of the same run.

    Raises:
        ValueError: the runs differ in device or threads, or have no row in common.
    """
    before = {identity(row): speedups(row) for row in baseline["rows"]}
    both = [(row, speedups(row)) for row in result["rows"] if identity(row) in before]
    of, this = (f"{run['device']} with {run['threads']} threads" for run in (baseline, result))
    if not both or of != this:
        raise ValueError(
            f"the baseline, of {of}, cannot be compared with this run, of {this}: the same device and some of the same "
            "cases, dtypes and modes are needed"
        )
    return [
        f"{' '.join(identity(row))}: {name} {old:.2f} -> {speed[name]:.2f} times as fast as dense"
        for row, speed in both
        for name, old in before[identity(row)].items()
        if speed.get(name, old) < (1 - tolerance) * old
    ]


# --- command line -----------------------------------------------------------------------------------------------------


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that these programs have in common."""
    formatter = argparse.RawDescriptionHelpFormatter
    shared = argparse.ArgumentParser(f"python -m tritonsym {program}", None, description, formatter_class=formatter)
    shared.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    shared.add_argument(
        "--filter", default="", help="only cases whose name contains this, or one of these,^but-not-this"
    )
    shared.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no new case starts")
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
    if device.type == "cpu":
        print("On the CPU, with reduced sizes: these numbers say nothing about GPUs.")
    try:
        return device, select(smallest(CPU + GPU) if args.tiny else GPU if device.type == "cuda" else CPU, args.filter)
    except ValueError as error:
        program.error(str(error))


def kernels_if_interpreted(device: torch.device) -> Any:
    """The context that runs kernels on CPU tensors if Triton's interpreter is on."""
    return tritonsym.backend("triton") if device.type == "cpu" and launch.runs_on(device) else contextlib.nullcontext()


def main(argv: list[str] | None = None) -> int:
    program = parser("bench", __doc__)
    program.add_argument("--quick", action="store_true", help="3 rounds instead of 9, bfloat16 alone, no torch.compile")
    program.add_argument("--compiled", action="store_true", help="also time the torch paths under torch.compile")
    program.add_argument("--threads", type=int, choices=(1, 2), help="CPU threads (default: as many as torch takes)")
    program.add_argument("--output", type=Path, help="write the samples to this JSON file, and a plot beside it")
    program.add_argument("--resume", action="store_true", help="keep the rows that --output has, and measure the rest")
    program.add_argument("--baseline", type=Path, help="exit with 1 if a path is slower than in this older output")
    program.add_argument("--tolerance", type=float, default=0.1, help="by more than this share (default: %(default)s)")
    args = program.parse_args(argv)
    device, cases = prepare(args, program)
    if args.output and not args.output.absolute().parent.is_dir():
        program.error(f"--output: the folder of {args.output} does not exist; create it")
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {**machine("bench", argv, device), "rows": []}
    baseline = load(args.baseline, program) if args.baseline else None
    if args.resume and args.output and args.output.exists():
        old = load(args.output, program)
        if different := [k for k in ("device", "threads", "torch", "commit") if old[k] != result[k]]:
            program.error(f"--resume: {args.output} is of another {' and '.join(different)}; choose another --output")
        result["rows"] = old["rows"]
    code, failed = _measure(args, device, cases, result)
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


def _measure(
    args: argparse.Namespace, device: torch.device, cases: list[Case], result: dict[str, Any]
) -> tuple[int, bool]:
    """Measure the missing rows; returns an exit code, and whether a case failed."""
    done, start, failed = {identity(row) for row in result["rows"]}, time.monotonic(), False
    work = [(case, d) for case in cases for d in case.dtypes[: 1 if args.quick else None]]
    compiled = args.compiled or (device.type == "cuda" and not args.quick)
    torch.backends.cudnn.benchmark = True
    try:
        with kernels_if_interpreted(device):
            for case, dtype in tqdm(work, disable=not sys.stderr.isatty()):
                if time.monotonic() - start > args.budget:
                    return UNFINISHED, failed
                try:
                    for row in bench(case, dtype, device, 1 if args.tiny else 3 if args.quick else 9, compiled, done):
                        show(row, result["device"])
                        result["rows"].append(row)
                        if args.output:
                            tuned.write(args.output, dumped(result))
                except RuntimeError as error:  # out of memory
                    tqdm.write(f"{case.name} {dtype} FAILED: {str(error).splitlines()[0]}")
                    failed = True
    except KeyboardInterrupt:
        return 130, failed
    return 0, failed


def dumped(result: dict[str, Any]) -> str:
    """The result as JSON, one row per line."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"})
    rows = ",\n".join(map(json.dumps, result["rows"]))
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def load(file: Path, program: argparse.ArgumentParser) -> dict[str, Any]:
    """Read an output of the benchmark."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        _ = [(identity(row), speedups(row)) for row in content["rows"]], content["device"], content["threads"]
        return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        program.error(f"{file} is no output of the benchmark: {type(error).__name__}: {error}")


def machine(program: str, argv: list[str] | None, device: torch.device) -> dict[str, Any]:
    """What every result file says about its origin."""

    def output(*command: str) -> str:
        with contextlib.suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        return ""

    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        versions["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[
            :1
        ]
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        versions["triton"] = __import__("triton").__version__
    return {
        "command": ["python", "-m", "tritonsym", program, *(sys.argv[1:] if argv is None else argv)],
        "device": tuned.device_name(device),
        "threads": torch.get_num_threads(),
        **versions,
        "tritonsym": tritonsym.__version__,
        "commit": output("git", "rev-parse", "HEAD"),
    }


if __name__ == "__main__":
    sys.exit(main())

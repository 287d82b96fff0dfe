"""Measure what symmetric layers would gain in a model on this machine: layer by layer, and the whole model.

    python -m tritonsym advise PACKAGE:BUILDER --input 8,3,224,224 [--symmetry h,hv,d4] [--save]

BUILDER is called without arguments and returns the model. Every convolution that `replace_layers` could replace is
timed dense and symmetric, on the inputs that it gets in the model, forward and in training, then the model as a whole.
Paths with wrong results are not timed. --save puts the fastest paths into the user's table (`tritonsym.tuned`) for this
machine, from which later plans for such layers take them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import tritonsym
from tritonsym import plan, tuned
from tritonsym._compat import ConvNd
from tritonsym._table import aligned
from tritonsym.perf.bench import machine
from tritonsym.perf.measure import gate, make_step, measure, paths, tqdm

MODES = ("forward", "training")
#: The symmetries tried by default, by the number of spatial axes of a model's convolutions.
SYMMETRIES = {1: ("h",), 2: ("h", "hv", "d4"), 3: ("h", "hv", "hvz")}


@dataclass(frozen=True)
class Advised:
    """One symmetry, measured for layers that are alike, or for the whole model (no layers).

    `seconds` are medians of one call, by mode and by path or 'dense'; `auto` is the path that the plan takes, by mode.
    """

    layers: tuple[str, ...]
    layer: str
    input: tuple[int, ...]
    symmetry: str
    parameters_before: int
    parameters_after: int
    seconds: dict[str, dict[str, float]]
    auto: dict[str, str]

    def gain(self, mode: str = "training", path: str | None = None) -> float:
        """Seconds of the dense layers over those of the symmetric ones, as planned unless a path is named."""
        seconds = self.seconds[mode]
        return seconds["dense"] / seconds[path or self.auto[mode]]

    @property
    def saved(self) -> float:
        """Seconds that all of the layers together save in a training step."""
        seconds = self.seconds["training"]
        return max(len(self.layers), 1) * (seconds["dense"] - seconds[self.auto["training"]])


@dataclass(frozen=True)
class Advice(Sequence[Advised]):
    """What `advise` measured, sorted by the seconds saved in a training step; `str` is a table."""

    rows: tuple[Advised, ...]
    models: tuple[Advised, ...]
    machine: dict[str, Any]
    skipped: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __str__(self) -> str:
        names = ("layers", "input", "symmetry", "stored", "forward, ms", "gain", "training, ms", "gain", "path")
        lines: list[tuple[str, ...]] = [names]
        for row in (*self.rows, *self.models):
            times = []
            for mode in MODES:
                seconds = row.seconds[mode]
                times.append(f"{1e3 * seconds['dense']:.3g} -> {1e3 * seconds[row.auto[mode]]:.3g}")
                times.append(f"{row.gain(mode):.2f}x")
            label = f"{row.layers[0]} and {len(row.layers) - 1} more" if len(row.layers) > 1 else "".join(row.layers)
            shape = "x".join(map(str, row.input))
            stored = f"{row.parameters_after / row.parameters_before:.0%}"
            path = "/".join(dict.fromkeys(row.auto[mode] for mode in MODES)) if row.layers else ""
            lines.append((label or "(whole model)", shape, row.symmetry, stored, *times, path))
        text = aligned(lines, right=range(3, 8))
        text += [f"left as it is: {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(text)

    def json(self) -> str:
        """The machine and the rows, one per line, as JSON."""
        head = json.dumps({**self.machine, "skipped": self.skipped})
        rows = ",\n".join(json.dumps(asdict(row)) for row in (*self.rows, *self.models))
        return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'

    def plot(self, file: Path) -> None:
        """Draw the time of a training step, dense and symmetric, as bars for every row."""
        from matplotlib.figure import Figure

        rows = [*self.rows[:30], *self.models][::-1]
        figure = Figure((9, 1 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for row, at in zip(rows, range(len(rows)), strict=True):
            seconds = row.seconds["training"]
            axes.barh(at + 0.2, 1e3 * seconds["dense"], 0.4, color="#b0b0b0", label="dense" if at == 0 else None)
            ours = 1e3 * seconds[row.auto["training"]]
            axes.barh(at - 0.2, ours, 0.4, color="#2a6f97", label="symmetric" if at == 0 else None)
        labels = [f"{row.layers[0] if row.layers else 'whole model'} {row.symmetry}" for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel(f"ms of a training step, {self.machine['device']}, {self.machine['threads']} threads")
        axes.legend()
        figure.savefig(file, dpi=120)


def advise(
    model: nn.Module,
    x: Tensor,
    symmetries: Sequence[str] | None = None,
    rounds: int = 5,
    save: bool = False,
    command: Sequence[str] = (),
) -> Advice:
    """`tritonsym.advise`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"advise: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"advise: x must be a torch.Tensor, got {type(x).__name__}")
    model = copy.deepcopy(model)
    inputs = _inputs(model, x)
    if symmetries is None:
        axes = {len(layer.kernel_size) for _, layer, _ in inputs}
        symmetries = tuple(dict.fromkeys(s for n in sorted(axes, reverse=True) for s in SYMMETRIES[n]))
    for symmetry in symmetries:
        tritonsym.Symmetry(symmetry)
    jobs: dict[Any, tuple[list[str], nn.Module, nn.Module, Tensor, str]] = {}
    converted: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for symmetry in symmetries:
        converted[symmetry], report = _converted(model, symmetry)
        skipped.update((s.name, s.reason) for s in report.skipped)
        replaced = {row.name for row in report}
        for name, layer, like in inputs:
            if name in replaced:
                key = (repr(layer), tuple(like.shape), like.stride(), like.dtype, symmetry)
                new = converted[symmetry].get_submodule(name)
                jobs.setdefault(key, ([], layer, new, like, symmetry))[0].append(name)
    if not jobs:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"advise: no convolution of {type(model).__name__} can be replaced ({why or 'it calls none'})")
    replaced, called = {name for names, *_ in jobs.values() for name in names}, {name for name, *_ in inputs}
    rows, entries = [], {}
    for names, layer, new, like, symmetry in tqdm(list(jobs.values()), disable=not sys.stderr.isatty()):
        row, found = _advised(names, layer, new, like, symmetry, rounds)
        rows.append(row)
        entries.update(found)
    if save and x.device.type == "cpu":
        file = tuned.user_file(tuned.table_name("cpu"))
        tuned.record(file, entries)
    elif save:
        from tritonsym.perf.tune import tune

        for other in converted.values():
            tune(other, x)
    plan.forget()
    models = tuple(_whole(model, other, x, symmetry, rounds) for symmetry, other in converted.items())
    rows.sort(key=lambda row: -row.saved)
    left = tuple((name, reason) for name, reason in skipped.items() if name not in replaced and name in called)
    return Advice(tuple(rows), models, machine("advise", [*command], x.device), left)


def _inputs(model: nn.Module, x: Tensor) -> list[tuple[str, Any, Tensor]]:
    """The convolutions that a call runs, each with its first input as a meta tensor."""
    found: dict[str, tuple[str, Any, Tensor]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any) -> None:
            found.setdefault(name, (name, layer, torch.empty_like(args[0], device="meta")))

        return hook

    hooks = [
        layer.register_forward_pre_hook(remember(name))
        for name, layer in model.named_modules()
        if isinstance(layer, ConvNd) and not hasattr(layer, "problem")
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return list(found.values())


def _converted(model: nn.Module, symmetry: str) -> tuple[nn.Module, Any]:
    def rule(name: str, layer: Any) -> Any:
        if isinstance(layer, nn.Linear):
            return False
        return f"tied:{symmetry}" if layer.out_channels == layer.groups > 1 else {symmetry: "100%"}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tritonsym.replace_layers(model, rule=rule)


def _advised(
    names: list[str], layer: nn.Module, new: Any, like: Tensor, symmetry: str, rounds: int
) -> tuple[Advised, dict[str, Any]]:
    device = next(layer.parameters()).device
    x = torch.empty_like(like, device=device).normal_()
    new, dense = copy.deepcopy(new).requires_grad_(), copy.deepcopy(layer).requires_grad_()
    right = ["reference"]
    for path in paths(new, x):
        try:
            if path != "reference":
                gate(new, x, path)
                right.append(path)
        except (RuntimeError, AssertionError):
            continue
    seconds, auto, entries = {}, {}, {}
    for mode in MODES:
        training = mode == "training"
        steps: dict[str, Any] = {"dense": make_step(dense, x, training)}
        steps |= {path: make_step(new, x, training, path) for path in right}
        seconds[mode] = {name: statistics.median(s) for name, s in measure(steps, rounds, device)[0].items()}
        problem = new.problem(like, device.type, training)
        chosen = plan.plan(problem).path
        auto[mode] = chosen if chosen in right else "reference"
        best = min(right, key=lambda path: seconds[mode][path])
        entries[problem.key] = {"path": best, "tiles": [], "seconds": {path: seconds[mode][path] for path in right}}
    before, after = (sum(p.numel() for p in module.parameters()) for module in (layer, new))
    row = Advised(tuple(names), type(layer).__name__, tuple(like.shape), symmetry, before, after, seconds, auto)
    return row, entries


def _whole(model: nn.Module, other: nn.Module, x: Tensor, symmetry: str, rounds: int) -> Advised:
    """The row of the whole model, against the one with all layers replaced that can be."""
    modules = {"dense": model, "symmetric": other}
    seconds: dict[str, dict[str, float]] = {}
    for mode in MODES:
        steps = {name: _step(copy.deepcopy(module), x, mode == "training") for name, module in modules.items()}
        seconds[mode] = {name: statistics.median(s) for name, s in measure(steps, rounds, x.device)[0].items()}
    before, after = (sum(p.numel() for p in module.parameters()) for module in (model, other))
    auto = dict.fromkeys(MODES, "symmetric")
    return Advised((), type(model).__name__, tuple(x.shape), symmetry, before, after, seconds, auto)


def _step(model: nn.Module, x: Tensor, training: bool) -> Callable[[], object]:
    model.train(training)

    def forward() -> object:
        with torch.no_grad():
            return model(x)

    def step() -> object:
        model.zero_grad()
        sum(y.float().sum() for y in _tensors(model(x)) if y.requires_grad).backward()  # type: ignore[union-attr]
        return None

    return step if training else forward


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif hasattr(output, "values"):
        yield from _tensors(list(output.values()))


# --- command line -----------------------------------------------------------------------------------------------------


def _builder(text: str) -> Callable[[], Any]:
    package, _, name = text.partition(":")
    try:
        built = import_module(package)
        for part in name.split("."):
            built = getattr(built, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected PACKAGE:BUILDER, got {text!r} ({error})") from None
    if not callable(built):
        raise argparse.ArgumentTypeError(f"{text!r} is a {type(built).__name__} and cannot be called")
    return built


def _sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected sizes such as 8,3,224,224, got {text!r}")
    return list(map(int, sizes))


def main(argv: list[str] | None = None) -> int:
    program = argparse.ArgumentParser(
        prog="python -m tritonsym advise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    program.add_argument("builder", type=_builder, metavar="PACKAGE:BUILDER", help="called without arguments")
    program.add_argument("--input", type=_sizes, required=True, help="sizes of the input, with the batch: 8,3,224,224")
    program.add_argument("--symmetry", help="names, separated by commas (default: by the model's layers)")
    program.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    program.add_argument("--channels-last", action="store_true", help="model and input in that memory format")
    program.add_argument("--rounds", type=int, default=5, help="samples per time (default: %(default)s)")
    program.add_argument("--json", type=Path, help="write all numbers to this file")
    program.add_argument("--plot", type=Path, help="draw them into this .png, .pdf or .svg file (needs matplotlib)")
    program.add_argument("--save", action="store_true", help="let later plans use what was measured")
    sys.path.insert(0, "")  # for a builder in the current folder
    args = program.parse_args(argv)
    model, x = args.builder(), torch.randn(args.input)
    if not isinstance(model, nn.Module):
        program.error(f"the builder returned a {type(model).__name__}, expected a torch.nn.Module")
    model, x = model.to(args.device), x.to(args.device)
    if args.channels_last:
        if x.ndim not in (4, 5):
            program.error("--channels-last needs an input with two or three spatial axes")
        form: Any = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        model, x = cast(Any, model).to(memory_format=form), x.contiguous(memory_format=form)
    symmetries = args.symmetry.split(",") if args.symmetry else None
    try:
        advice = advise(model, x, symmetries, args.rounds, args.save, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        program.error(str(error))
    print(advice)
    if args.save:
        print(f"The fastest paths are in {tuned.user_file(tuned.table_name(x.device.type))}")
    if args.json:
        tuned.write(args.json, advice.json())
    if args.plot:
        advice.plot(args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Find the fastest path and the tiles of its kernels on this GPU, for the layers of a model or for named cases.

It tunes convolutions, `SymmetricLinear` and, among the cases, products with a symmetric result.

    python -m tritonsym tune [--filter c256] [--budget 300] [--output kernels/tuned/GPU.json]

Results go into the user's table (`tritonsym.tuned`), from which every later plan takes them. Layers that it holds are
skipped, so that an interrupted search continues where it stopped; --again searches anew. --output writes the entries of
these layers to another file as well, for example one to ship with the library.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonsym
from tritonsym import launch, plan, tuned
from tritonsym.perf.bench import UNFINISHED, kernels_if_interpreted, parser, prepare
from tritonsym.perf.cases import Case
from tritonsym.perf.measure import Step, gate, make_step, measure, paths, tqdm

#: A tile is better if its median time is below this share of the best one's.
BETTER = 0.98


@dataclass(frozen=True)
class Job:
    """A problem, whether it is a training step's, and a function that makes a layer and an input that pose it."""

    problem: plan.Problem
    training: bool
    make: Callable[[], tuple[nn.Module, Tensor]]


def neighbours(tile: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Tiles with one number halved or doubled, or the stages (the fifth) one less or more; many do not fit.

    For a matrix product also tiles with both sides halved or doubled: where tiles are square, no others fit.
    """
    for i, n in enumerate(tile):
        for other in (n - 1, n + 1) if i == 4 else (n // 2, 2 * n):
            yield (*tile[:i], other, *tile[i + 1 :])
    if len(tile) == 5:
        m, n, *rest = tile
        yield (m // 2, n // 2, *rest)
        yield (2 * m, 2 * n, *rest)


def _medians(steps: dict[Any, Step], rounds: int, device: torch.device) -> dict[Any, float]:
    return {name: statistics.median(seconds) for name, seconds in measure(steps, rounds, device)[0].items()}


def climb(job: Job, layer: nn.Module, x: Tensor, path: str, deadline: float) -> tuned.Tiles:
    """The best tiles found by moving to a better neighbour, one tile after the other, until there is none."""
    with tritonsym.path(path):
        best = plan.plan(job.problem).tiles
    seen, better = {best}, True
    while better:
        better = False
        for i in range(len(best) if job.training else 1):  # the other tiles are for gradients
            for tile in neighbours(best[i]):
                tiles = (*best[:i], tile, *best[i + 1 :])
                if tiles in seen or not job.problem.runs(path, tiles):
                    continue
                if time.monotonic() > deadline:
                    return best
                seen.add(tiles)
                try:
                    steps = {t: make_step(layer, x, job.training, path, t) for t in (best, tiles)}
                    seconds = _medians(steps, 5, x.device)
                    if seconds[tiles] < BETTER * seconds[best]:
                        gate(layer, x, path, tiles)
                        best, better = tiles, True
                except (RuntimeError, AssertionError):
                    continue  # does not run, or computes wrong results
    return best


def search(job: Job, deadline: float) -> dict[str, Any]:
    """The entry of a table for a job: the fastest path among those that are right, each with its best tiles."""
    layer, x = job.make()
    tiles: dict[str, tuned.Tiles] = {}
    for path in paths(layer, x):
        try:
            gate(layer, x, path)
            tiles[path] = () if path in ("reference", "blocks") else climb(job, layer, x, path, deadline)
        except (RuntimeError, AssertionError) as error:
            tqdm.write(f"    {path} is left out: {str(error).splitlines()[0]}")
    steps = {path: make_step(layer, x, job.training, path, t) for path, t in tiles.items()}
    seconds = _medians(steps, 9, x.device)
    best = min(seconds, key=lambda path: seconds[path])
    return {"path": best, "tiles": tiles[best], "seconds": seconds}


def run(jobs: Sequence[Job], device: torch.device, budget: float, again: bool = False) -> tuple[dict[str, Any], bool]:
    """Tune every job that is not in the user's table; returns all entries found there, and whether no job is left."""
    by_key: dict[str, Job] = {}
    for job in jobs:
        by_key.setdefault(job.problem.key, job)
    file = tuned.user_file(tuned.table_name(str(device)))
    known = {} if again else tuned.read(file)
    entries = {key: known[key] for key in by_key if key in known}
    todo = [key for key in by_key if key not in entries]
    end = time.monotonic() + budget
    for i, key in enumerate(tqdm(todo, disable=not sys.stderr.isatty())):
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            entry = search(by_key[key], time.monotonic() + left / (len(todo) - i))
        except RuntimeError as error:  # out of memory
            tqdm.write(f"{key}\n    failed: {str(error).splitlines()[0]}")
            continue
        entries[key] = entry
        tuned.record(file, {key: entry})
        shown = ", ".join(f"{path} {1e6 * s:.1f} us" for path, s in entry["seconds"].items())
        tqdm.write(f"{key}\n    {entry['path']} {[list(tile) for tile in entry['tiles']]}: {shown}")
    plan.forget()
    print(f"{len(entries)} of {len(by_key)} layers are in {file}")
    return entries, len(entries) == len(by_key)


def tune(model: nn.Module, example_input: Tensor, budget_s: float = 300) -> dict[str, Any]:
    """`tritonsym.tune`."""
    if not isinstance(example_input, Tensor) or not launch.runs_on(example_input.device):
        got = example_input.device if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ValueError(f"tune: expected an example_input on a GPU, got {got}; move the model and the input to 'cuda'")
    jobs: list[Job] = []

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        like = torch.empty_like(x, device="meta", dtype=plan.computing_dtype(x))
        for training in (False, True):
            problem = layer.problem(like, plan.target_of(x), training)  # type: ignore[operator]
            if problem.has_kernel:
                jobs.append(Job(problem, training, partial(_copy, layer, like, x.device)))

    hooks = [layer.register_forward_pre_hook(remember) for layer in model.modules() if hasattr(layer, "problem")]
    try:
        with torch.no_grad():
            model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    if not jobs:
        raise ValueError(
            f"tune: {type(model).__name__} runs no convolution and no SymmetricLinear of tritonsym.nn in a dtype that "
            "kernels compute; see replace_layers"
        )
    with kernels_if_interpreted(example_input.device):
        return run(jobs, example_input.device, budget_s)[0]


def _copy(layer: nn.Module, like: Tensor, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The layer in the dtype of `like`, which is on the meta device, and an input like it."""
    return copy.deepcopy(layer).to(like.dtype).requires_grad_(), torch.empty_like(like, device=device).normal_()


def _jobs(case: Case, device: torch.device) -> Iterator[Job]:
    """The jobs of a case in its first dtype, one per mode; images are channels-last."""
    dtype = case.dtypes[0]
    for mode in case.modes:
        x, training = [*case.input(dtype, "meta").values()][-1], mode == "training"
        problem = case.build(dtype, "meta").problem(x, str(device), training)  # type: ignore[operator]
        yield Job(problem, training, lambda: (case.build(dtype, device), [*case.input(dtype, device).values()][-1]))


def main(argv: list[str] | None = None) -> int:
    program = parser("tune", __doc__)
    program.set_defaults(budget=300)
    program.add_argument("--again", action="store_true", help="also layers that are in the table")
    program.add_argument("--output", type=Path, help="write the entries of these layers to this JSON file as well")
    args = program.parse_args(argv)
    device, cases = prepare(args, program)
    if not launch.runs_on(device):
        program.error("there are no kernels to tune on the CPU: this needs an NVIDIA GPU and a CUDA build of torch")
    jobs = [job for case in cases for job in _jobs(case, device)]
    try:
        with kernels_if_interpreted(device):
            entries, complete = run(jobs, device, args.budget, args.again)
    except KeyboardInterrupt:
        print("Stopped early; what was found is kept")
        return 130
    if args.output:
        tuned.record(args.output, entries)
    return 0 if complete else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())

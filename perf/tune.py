"""Find the fastest path, and tiles of its kernels, on this GPU, for the layers of a model or for named cases.

    python -m tritonsym tune [--filter c256] [--budget 300] [--output kernels/tuned/GPU.json]

What is found goes into the user's table (`tritonsym.tuned`), from which every later plan takes it. Layers that are in
it are skipped, so that an interrupted search goes on where it was; --again searches anew. --output writes what is known
of these layers to another file too, for example one to ship with the library.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tritonsym
from tritonsym import costs, dispatch, launch, tuned
from tritonsym.perf.bench import UNFINISHED, kernels_if_interpreted, parser, prepare
from tritonsym.perf.measure import gate, make_step, measure, paths

#: A tile is better if its median time is below this share of the best one's.
BETTER = 0.98


@dataclass(frozen=True)
class Job:
    """A layer and the input to time it with, which is on the meta device until then."""

    layer: nn.Module
    like: Tensor
    device: torch.device
    training: bool

    @property
    def problem(self) -> costs.Problem:
        dtype = str(self.like.dtype).removeprefix("torch.")
        found = self.layer.problem(tuple(self.like.shape), self.device.type, dtype)  # type: ignore[operator]
        return replace(found, training=self.training)


def neighbours(tile: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Tiles with one number halved or doubled, the stages (the fifth) one less or more; many do not fit."""
    for i, n in enumerate(tile):
        for other in (n - 1, n + 1) if i == 4 else (n // 2, 2 * n):
            yield (*tile[:i], other, *tile[i + 1 :])


def climb(job: Job, x: Tensor, path: str, deadline: float) -> tuned.Tiles:
    """The best tiles found by moving to a better neighbour of one tile after the other until there is none."""
    with tritonsym.path(path):
        best = dispatch.plan(job.problem).tiles
    architecture = costs.architecture(job.device.type)
    seen = {best}
    used = range(len(best) if job.training else 1)  # the others are of gradients
    better = True
    while better:
        better = False
        for i in used:
            for tile in neighbours(best[i]):
                tiles = (*best[:i], tile, *best[i + 1 :])
                if tiles in seen or not tuned.runs(path, tiles, job.problem, architecture):
                    continue
                if time.monotonic() > deadline:
                    return best
                seen.add(tiles)
                try:
                    steps = {t: make_step(job.layer, x, job.training, path, t) for t in (best, tiles)}
                    samples = measure(steps, 5, job.device)
                    if samples[tiles].median < BETTER * samples[best].median:
                        gate(job.layer, x, path, tiles)
                        best, better = tiles, True
                except (RuntimeError, AssertionError):
                    continue  # does not run, or not right
    return best


def search(job: Job, deadline: float) -> dict[str, Any]:
    """The entry of a table for a job: the fastest of the paths that are right, each with its best tiles."""
    x = torch.empty_like(job.like, device=job.device).normal_()
    tiles: dict[str, tuned.Tiles] = {}
    for path in paths(job.layer, x)[1:]:  # not 'auto'
        try:
            gate(job.layer, x, path)
            tiles[path] = () if path == "reference" else climb(job, x, path, deadline)
        except (RuntimeError, AssertionError) as error:
            tqdm.write(f"    {path} is left out: {str(error).splitlines()[0]}")
    steps = {path: make_step(job.layer, x, job.training, path, t) for path, t in tiles.items()}
    seconds = {path: samples.median for path, samples in measure(steps, 9, job.device).items()}
    best = min(seconds, key=lambda path: seconds[path])
    return {"path": best, "tiles": tiles[best], "seconds": seconds}


def run(jobs: Sequence[Job], device: torch.device, budget: float, again: bool = False) -> tuple[dict[str, Any], bool]:
    """Tune every job that is not in the user's table; the entries of all that are, and whether none is left."""
    by_key = {tuned.key(job.problem): job for job in jobs}
    file = tuned.user_file(tuned.gpu(device.type))
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
    dispatch.forget()
    print(f"{len(entries)} of {len(by_key)} layers are in {file}")
    return entries, len(entries) == len(by_key)


def tune(model: nn.Module, example_input: Tensor, budget_s: float = 300) -> dict[str, Any]:
    """`tritonsym.tune`."""
    if not isinstance(example_input, Tensor) or not launch.runs_on(example_input.device):
        got = example_input.device if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ValueError(f"tune: expected an example_input on a GPU, got {got}; move the model and the input to 'cuda'")
    calls: dict[str, Job] = {}

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        like = torch.empty_like(inputs[0], device="meta", dtype=dispatch.computing_dtype(inputs[0]))
        for training in (False, True):
            job = Job(layer, like, inputs[0].device, training)
            if job.problem.shift is not None:
                calls.setdefault(tuned.key(job.problem), job)

    layers = [layer for layer in model.modules() if hasattr(layer, "problem") and hasattr(layer, "kernel_size")]
    hooks = [layer.register_forward_pre_hook(remember) for layer in layers]
    try:
        with torch.no_grad():
            model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise ValueError(f"tune: {type(model).__name__} runs no convolution of tritonsym.nn; see replace_layers")
    jobs = [replace(job, layer=copy.deepcopy(job.layer).to(job.like.dtype)) for job in calls.values()]
    with kernels_if_interpreted(example_input.device):
        return run(jobs, example_input.device, budget_s)[0]


def main(argv: list[str] | None = None) -> int:
    program = parser("tune", __doc__)
    program.set_defaults(budget=300)
    program.add_argument("--again", action="store_true", help="also layers that are in the table")
    program.add_argument("--output", type=Path, help="write the entries of these layers to this JSON file as well")
    args = program.parse_args(argv)
    device, cases = prepare(args, program)
    if not launch.runs_on(device):
        program.error("there are no kernels to tune on the CPU: this needs an NVIDIA GPU and a CUDA build of torch")
    jobs = []
    for case, training in product(cases, (False, True)):
        if case.sizes:
            with device:
                layer = case.build().to(getattr(torch, case.dtypes[0]))
            last = torch.channels_last if len(case.sizes) == 2 else torch.channels_last_3d
            x = torch.empty(case.shape, device="meta", dtype=layer.weight.dtype)
            jobs.append(Job(layer, x.to(memory_format=last), device, training))
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

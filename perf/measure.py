"""Time what a layer takes, and refuse to where it computes the wrong thing."""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import tritonsym
from tritonsym import launch, testing
from tritonsym.dispatch import PATHS
from tritonsym.perf.cases import Function

Step = Callable[[], object]
Name = TypeVar("Name")

#: Steps on a GPU that take less are timed as CUDA graphs, so that launching them does not count.
GRAPH_BELOW = 300e-6


@dataclass
class Samples:
    """Of one step: seconds of every sample; on a GPU also what the host takes to launch it, and its peak memory."""

    seconds: list[float] = field(default_factory=list)
    launch: float | None = None
    peak_bytes: int | None = None
    graph: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Between the quartiles, over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else (0.0, 0.0, 0.0)
        return (high - low) / self.median


def forced(path: str, tiles: Any = ()) -> Any:
    """The context that computes by a path; 'auto' is whatever dispatch chooses."""
    return tritonsym.path(path, tiles) if path in PATHS else contextlib.nullcontext()


def paths(layer: nn.Module, x: Tensor) -> list[str]:
    """'auto', and the paths that can be forced on this layer and run on the device of x."""
    possible = ["auto"]
    for path in PATHS:
        try:
            with tritonsym.path(path):
                plan = tritonsym.explain(layer, x)
        except (ValueError, NotImplementedError):
            continue
        if plan.path == path and (path != "expand" or launch.runs_on(x.device)):
            possible.append(path)
    return possible


def make_step(module: nn.Module, x: Tensor, training: bool, path: str | None = None, tiles: Any = ()) -> Step:
    """A forward pass, or one with the gradients of x and of every parameter; of torch's own layer without a path."""

    def call() -> Tensor:
        if path in (None, "auto"):
            return module(x)
        with forced(path, tiles):
            return module(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    if not training:
        return forward
    x = x.detach().requires_grad_()
    inputs = [x, *module.parameters()]
    dy = torch.ones_like(forward())  # a dense tensor, as a network sends
    return lambda: torch.autograd.grad(call(), inputs, dy)


def gate(layer: nn.Module, x: Tensor, path: str, tiles: Any = ()) -> None:
    """One image, or a whole matrix, through the path is as right as through torch's own layer.

    Raises:
        AssertionError: it is not.
    """
    x = x[:1] if hasattr(layer, "kernel_size") else x
    with forced(path, tiles):
        if isinstance(layer, Function):
            return _gate_function(layer, x)
        plan = tritonsym.explain(layer, x)
        # by torch ops the shift path may round a little more than the rule allows where `auto` would not take it; the
        # gradient of a maximum goes to one of two nearly equal images: rounding decides which
        if plan.path != "shift" or plan.tiles:
            ordered = getattr(layer, "reduce", None) in ("max", "min")
            testing.assert_matches_reference(copy.deepcopy(layer).requires_grad_(False) if ordered else layer, x)
            return
        with torch.no_grad():
            y = layer(x)
    with torch.no_grad(), tritonsym.path("reference"):
        torch.testing.assert_close(y, layer(x))


def _gate_function(layer: Function, x: Tensor) -> None:
    exact = layer.dense(x.double())
    errors = [(function(x).double() - exact).square().mean().sqrt() for function in (layer.ours, layer.dense)]
    allowed = 2 * errors[1] + torch.finfo(x.dtype).eps * exact.square().mean().sqrt()
    assert errors[0] <= allowed, f"RMS error {errors[0]:.3e} > allowed {allowed:.3e}, twice that of the dense function"


def measure(steps: dict[Name, Step], rounds: int, device: torch.device, cold: bool = True) -> dict[Name, Samples]:
    """Every step once in each round, so that a drift of the machine's speed touches all of them; in an order drawn for
    every round, so that none always runs after the same other one, whose data or code it finds in the caches.

    On a GPU every sample starts with an L2 cache full of other data, unless `cold` is false.
    """
    return _on_gpu(steps, rounds, device, cold) if device.type == "cuda" else _on_cpu(steps, rounds)


def _on_cpu(steps: dict[Name, Step], rounds: int) -> dict[Name, Samples]:
    samples = {name: Samples() for name in steps}
    for step in steps.values():
        step()
    for name, step in _rounds(steps, rounds):
        start = time.perf_counter()
        step()
        samples[name].seconds.append(time.perf_counter() - start)
    return samples


def _rounds(steps: dict[Name, Step], rounds: int) -> Iterator[tuple[Name, Step]]:
    order, draw = list(steps.items()), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        yield from order


def _on_gpu(steps: dict[Name, Step], rounds: int, device: torch.device, cold: bool) -> dict[Name, Samples]:
    found: dict[Name, Samples] = {}
    runs: dict[Name, Step] = {}
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    other = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def event_seconds(run: Step, host: float) -> float:
        torch.cuda._sleep(int(4e9 * min(host, 5e-3)))  # cycles, until the host has launched all that follows
        if cold:
            other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    for name, step in steps.items():
        for _ in range(3):  # compiles, fills caches
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        start = time.perf_counter()
        for _ in range(10):
            step()
        host = (time.perf_counter() - start) / 10
        torch.cuda.synchronize()
        graph = _graph(step) if event_seconds(step, host) < GRAPH_BELOW else None
        runs[name] = graph or step
        found[name] = Samples(launch=host, peak_bytes=peak, graph=graph is not None)
    for name, run in _rounds(runs, rounds):
        found[name].seconds.append(event_seconds(run, found[name].launch or 0.0))
    return found


def _graph(step: Step) -> Step | None:
    """The step as a CUDA graph, or None if it cannot be one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay

"""Time layers, and refuse to time a path that computes wrong results."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tritonsym
from tritonsym import launch, plan, testing
from tritonsym.perf.cases import Function

try:
    from tqdm import tqdm
except ImportError:

    class tqdm:  # type: ignore[no-redef]
        """No progress bar."""

        write = staticmethod(print)

        def __init__(self, items: Iterable[Any], **_: Any) -> None:
            self.items = items

        def __iter__(self) -> Iterator[Any]:
            return iter(self.items)


Step = Callable[[], object]

#: Steps on a GPU that take fewer seconds than this are timed as CUDA graphs, so that launching them does not count.
GRAPH_BELOW = 300e-6
#: A sample on the CPU is the mean of as many calls as take this many seconds, at least one.
SAMPLE = 2e-3


def spread(seconds: list[float]) -> float:
    """The interquartile range over the median."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (0.0, 1.0, 0.0)
    return (high - low) / middle


def forced(path: str | None, tiles: Any = ()) -> Any:
    """The context that forces a path; with None or 'auto' the plan chooses."""
    return contextlib.nullcontext() if path in (None, "auto") else tritonsym.path(path, tiles)


def auto(layer: nn.Module, x: Tensor, training: bool) -> plan.Plan:
    """The plan of a call by default."""
    with torch.set_grad_enabled(training):
        planned: plan.Plan = tritonsym.explain(layer, x)
    return planned


def paths(layer: nn.Module, x: Tensor) -> list[str]:
    """The paths that can be forced on this layer and run on the device of x."""
    possible = []
    for path in plan.PATHS:
        with contextlib.suppress(ValueError, NotImplementedError), tritonsym.path(path):
            planned = tritonsym.explain(layer, x).path == path
            if planned and (path not in ("implicit_gemm", "fused") or launch.runs_on(x.device)):
                possible.append(path)
    return possible


def make_step(module: nn.Module, x: Tensor, training: bool, path: str | None = None, tiles: Any = ()) -> Step:
    """A forward pass, or a training step: also the gradients of x and of every parameter."""

    def forward() -> Tensor:
        with torch.no_grad(), forced(path, tiles):
            return module(x)

    def step() -> object:
        with forced(path, tiles):
            y = module(inputs[0])
        return torch.autograd.grad(y, inputs, dy)

    if not training:
        return forward
    inputs = [x.detach().requires_grad_(), *module.parameters()]
    dy = torch.ones_like(forward())  # a dense gradient, as in a network
    return step


def gate(layer: nn.Module, x: Tensor, path: str, tiles: Any = ()) -> None:
    """Raise AssertionError unless the path, on one image or a whole matrix, is as accurate as torch's layer."""
    is_default = path in {auto(layer, x, training).path for training in (False, True)}
    x = x[:1] if hasattr(layer, "kernel_size") else x
    with forced(path, tiles):
        if isinstance(layer, Function):
            exact = layer.dense(x.double())
            errors = [(f(x).double() - exact).square().mean().sqrt() for f in (layer.ours, layer.dense)]
            allowed = 2 * errors[1] + torch.finfo(x.dtype).eps * exact.square().mean().sqrt()
            assert errors[0] <= allowed, f"RMS error {errors[0]:.3e} > allowed {allowed:.3e}"
        # in torch ops the shift path may round a little more than the rule allows where `auto` would not take it
        elif path == "shift" and not is_default and not tritonsym.explain(layer, x).tiles:
            with torch.no_grad():
                y = layer(x)
                with tritonsym.path("reference"):
                    torch.testing.assert_close(y, layer(x))
        else:  # the gradient of a maximum goes to one of two nearly equal images: rounding decides which
            ordered = getattr(layer, "reduce", None) in ("max", "min")
            testing.assert_matches_reference(copy.deepcopy(layer).requires_grad_(not ordered), x)


def measure(
    steps: dict[Any, Step], rounds: int, device: torch.device, cold: bool = True
) -> tuple[dict[Any, list[float]], dict[str, Any]]:
    """Seconds of every step in every round, to 4 digits.

    Every round runs each step once, so that a drift of the machine's speed affects all of them, in a random order, so
    that no step always finds the caches as the same other one left them.

    On a GPU every sample starts with an L2 cache full of other data, unless `cold` is false, and the second result has
    for every step the host's time to launch it and its peak memory, and the steps that ran as CUDA graphs.
    """
    if device.type == "cuda":
        sample, more = _on_gpu(steps, device, cold)
    else:
        calls = {name: math.ceil(SAMPLE / min(_seconds(step, 1) for _ in range(3))) for name, step in steps.items()}
        sample, more = lambda name: _seconds(steps[name], calls[name]), {}
    found: dict[Any, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            found[name].append(float(f"{sample(name):.4g}"))
    return found, more


def _seconds(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return max(time.perf_counter() - start, 1e-9) / calls


def _on_gpu(steps: dict[Any, Step], device: torch.device, cold: bool) -> tuple[Callable[[Any], float], dict[str, Any]]:
    launched: dict[Any, float] = {}
    peak: dict[Any, int] = {}
    graphs: dict[Any, Step] = {}
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    other = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def sample(name: Any) -> float:
        torch.cuda._sleep(int(4e9 * min(launched[name], 5e-3)))  # cycles: waits until the host has launched the rest
        if cold:
            other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs.get(name, steps[name])()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    for name, step in steps.items():
        _seconds(step, 3)  # compiles, and fills caches
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak[name] = torch.cuda.max_memory_allocated() - before
        launched[name] = float(f"{_seconds(step, 10):.4g}")
        torch.cuda.synchronize()
        if sample(name) < GRAPH_BELOW and (graph := _graph(step)):
            graphs[name] = graph
    return sample, {"launch": launched, "peak_bytes": peak, "graph": [*graphs]}


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

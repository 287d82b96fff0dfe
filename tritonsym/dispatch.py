"""Which path computes a layer: one pure function of the problem, and the switches that override it.

Paths: ``reference`` (expand the weight with torch ops, call the torch convolution or matmul; every device and dtype),
``shift`` (`tritonsym.shift`: one multiply-add per position and stored weight) and ``expand`` (a kernel that reads the
stored weights through the symmetry; not in this version).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from tritonsym.shift import Geometry, schedule
from tritonsym.symmetry import Block

if TYPE_CHECKING:
    from torch import Tensor, nn

BACKENDS = ("auto", "reference", "triton")
PATHS = ("reference", "expand", "shift")

_backend: ContextVar[str | None] = ContextVar("tritonsym_backend", default=None)
_path: ContextVar[str | None] = ContextVar("tritonsym_path", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block use the 'reference', the 'triton' kernels for all convolutions, or choose ('auto', the default).

    On CPU tensors 'triton' runs Triton's interpreter, slowly, and needs TRITON_INTERPRET=1 from the start.

    The environment variable TRITONSYM_BACKEND sets the same outside of any block. A function that `torch.compile` or
    `torch.export` has traced keeps the choice in force when it was traced.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def path(name: str) -> Iterator[None]:
    """Within the block force one path, 'reference', 'expand' or 'shift', for tests and benchmarks."""
    if name not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(map(repr, PATHS))}, got {name!r}")
    token = _path.set(name)
    try:
        yield
    finally:
        _path.reset(token)


def current_backend() -> str:
    """The backend in force: of the innermost `backend` block, else of TRITONSYM_BACKEND, else 'auto'."""
    name = _backend.get() or os.environ.get("TRITONSYM_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"TRITONSYM_BACKEND={name!r}: expected one of {', '.join(BACKENDS)}")
    return name


@dataclass(frozen=True)
class Work:
    """What the shift path does for a layer on a batch."""

    multiply_adds: int
    additions: int
    passes: int  # of additions: one per image and tap
    filters: int  # of the largest block
    channels: int  # input channels of one group: the terms that one value of z sums


@dataclass(frozen=True)
class Problem:
    """What `plan` decides on. Multiply-adds are those of the whole layer on the whole batch."""

    layer: str
    target: str  # 'cpu', 'cuda', or an architecture such as 'sm_90'
    dtype: str
    dense: int  # multiply-adds of the dense layer it replaces
    expanded: int  # multiply-adds of the reference path
    shift: Work | None = None  # None where the shift path cannot compute the layer
    training: bool = False  # whether a gradient is needed


@dataclass(frozen=True)
class Plan:
    """How a layer will be computed; `str` is the plan in words."""

    problem: Problem
    path: str
    flops: int
    dense_flops: int
    why: str
    tile: tuple[int, int, int] | None = None  # (positions, filters, warps) of the kernel, where the path launches one

    def __str__(self) -> str:
        p = self.problem
        if self.flops == self.dense_flops:
            ratio = "as"
        elif 0 < self.flops < self.dense_flops:
            ratio = f"{self.dense_flops / self.flops:.3g}x fewer than"
        else:
            ratio = "more than" if self.flops else "fewer than"
        return (
            f"{p.layer} ({p.dtype} on {p.target}): {self.path} path, {self.flops:,} FLOPs, {ratio} "
            f"the dense layer ({self.dense_flops:,}). {self.why}"
        )


def plan(problem: Problem) -> Plan:
    """Choose the path. Pure but for the switches `backend`, `path`, TRITONSYM_BACKEND and `torch.set_num_threads`.

    Raises:
        NotImplementedError: the path 'expand' is forced, which this version does not have.
        ValueError: the path 'shift' is forced on a layer it cannot compute.
    """
    return _plan(problem, current_backend(), _path.get(), torch.get_num_threads())


@lru_cache(maxsize=4096)
def _plan(problem: Problem, backend: str, forced: str | None, threads: int) -> Plan:
    if forced == "expand":
        raise NotImplementedError("path 'expand' is forced, but this version has no such kernel; remove the switch")
    work = problem.shift
    if forced == "shift" and work is None:
        raise ValueError(
            f"path 'shift' is forced, but it cannot compute {problem.layer} in {problem.dtype}; remove the switch"
        )
    has_kernel = work is not None and problem.dtype in ("float32", "float16", "bfloat16")
    if forced is not None:
        chosen, why = forced, "Forced by tritonsym.path."
    elif backend == "triton" and not has_kernel:
        chosen, why = "reference", f"No Triton kernel computes {problem.layer} in {problem.dtype}."
    elif backend != "auto":
        chosen, why = "shift" if backend == "triton" else "reference", f"Forced by the backend {backend!r}."
    elif work is None:
        chosen, why = "reference", "The shift path does not know this layer or dtype."
    elif problem.target != "cpu":
        chosen, why = (
            "reference",
            "No measurement yet says that the shift path is faster on a GPU; backend='triton' uses it.",
        )
    else:
        chosen, why = _cheaper_on_cpu(problem, work, threads)
    if chosen == "reference" or work is None:
        return Plan(problem, "reference", 2 * problem.expanded, 2 * problem.dense, why)
    from tritonsym.kernels.tiles import pick

    wants_kernel = backend == "triton" or (backend == "auto" and problem.target != "cpu")
    tile = astuple(pick(work.filters)) if has_kernel and wants_kernel else None
    return Plan(problem, "shift", 2 * work.multiply_adds, 2 * problem.dense, why, tile)


#: What the shift path's work costs on a CPU, in multiply-adds of the dense convolution that take as long: one addition,
#: and one pass of additions however short. Fitted to perf/results/*-cpu.json (2 threads).
ADDITION = 100
PASS = 1_200_000
#: Estimated speedup below which the reference is taken all the same.
MARGIN = 1.2
#: Most channels for which an output was seen to keep the rule of `testing.assert_matches_reference`, twice the error of
#: the dense convolution plus one rounding: perf/results/*-cpu-rounding.json. Gradients do not keep it.
MOST_CHANNELS = 512


def _cheaper_on_cpu(problem: Problem, work: Work, threads: int) -> tuple[str, str]:
    """Compare multiply-adds, with additions counted as such; in doubt the reference."""
    cost = work.multiply_adds + ADDITION * work.additions + PASS * work.passes
    ratio = problem.expanded / max(cost, 1)
    words = f"{problem.expanded / max(work.multiply_adds, 1):.3g}x fewer multiply-adds, {work.additions:,} additions"
    if problem.dtype != "float32":
        return "reference", f"The shift path ({words}) has been measured in float32 only."
    if problem.training or work.channels > MOST_CHANNELS:
        reason = "in training" if problem.training else f"with more than {MOST_CHANNELS} channels"
        return "reference", f"The shift path ({words}) {reason} may round more than twice as much as torch."
    if threads == 1:  # torch gives the 1x1 convolutions to a slower GEMM then
        return "reference", f"The shift path ({words}) is slower on one thread."
    if ratio < MARGIN:
        return "reference", f"The shift path ({words}) would not be clearly faster: {ratio:.2g}x (estimate)."
    return "shift", f"{words}: {ratio:.2g}x faster than expanding the weight (estimate)."


@lru_cache(maxsize=4096)
def conv_problem(
    layer: str,
    target: str,
    dtype: str,
    batch: int,
    channels: int,
    sizes: tuple[int, ...],
    blocks: tuple[Block, ...],
    groups: int,
    geometry: Geometry,
    dense_factor: int = 1,
    training: bool = False,
) -> Problem:
    """The problem of a convolution of x (batch, channels, *sizes), x as padded before the op.

    `dense_factor`: the dense layer has so many times the kernels of `blocks` (orbit 'sum': all images of a filter).
    """
    positions = sizes if geometry.transposed else geometry.out_sizes(sizes)
    kernel = math.prod(geometry.kernel_size) * batch * math.prod(positions) * channels
    expanded = kernel * groups * sum(block.filters * len(block.images) for block in blocks)
    dense = expanded * dense_factor
    if "complex" in dtype:
        return Problem(layer, target, dtype, dense, expanded)
    _, additions = schedule(blocks, geometry, sizes)
    z = batch * groups * sum(rows * math.prod(class_sizes) for rows, class_sizes in additions.sources)
    count = batch * groups * sum(move.count for move in additions.moves)
    work = Work(z * channels, count, len(additions.moves), max(block.filters for block in blocks), channels)
    return Problem(layer, target, dtype, dense, expanded, work, training)


def computing_dtype(t: Tensor) -> torch.dtype:
    """The dtype of t, or the one that torch.autocast casts it to: not float64, not complex."""
    kind = t.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts and t.is_floating_point() and t.itemsize < 8 else t.dtype


def dtype_name(t: Tensor) -> str:
    """As in `Problem.dtype`: 'float32', ..."""
    return str(computing_dtype(t)).removeprefix("torch.")


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def explain(module: nn.Module, x: Tensor, target: str | None = None) -> Plan:
    """The plan for one tritonsym layer on one input; ``print(explain(layer, x))`` says it in words.

    As for a call at the same place: under ``torch.no_grad()`` it is the plan for inference.

    Args:
        module: a layer of `tritonsym.nn` with weights.
        x: an input; only its shape, dtype and device matter, so a meta tensor will do.
        target: plan for another device: 'cpu', 'cuda' or an architecture that is not there, such as 'sm_90'.
    Raises:
        TypeError: the module is not such a layer.
        ValueError: x does not fit the layer, or the target is unknown.
    """
    problem = getattr(module, "problem", None)
    if not callable(problem):
        raise TypeError(
            f"explain: expected a layer of tritonsym.nn with weights, got {type(module).__name__}; "
            "for a whole model call explain on its layers"
        )
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"explain: x must be a torch.Tensor, got {type(x).__name__}")
    if target not in (None, "cpu", "cuda") and not str(target).startswith(("sm_", "gfx")):
        raise ValueError(f"explain: target must be 'cpu', 'cuda', 'sm_..' or 'gfx..', got {target!r}")
    where = target or ("cpu" if x.device.type == "meta" else x.device.type)
    found = problem(tuple(x.shape), where, dtype_name(x))
    return plan(replace(found, training=needs_gradient(x, *module.parameters())))

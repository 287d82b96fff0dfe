"""Which path computes a layer: one pure function of the problem, and the switches that override it.

Paths: ``reference`` (expand the weight with torch ops, call the torch convolution or matmul; every device and dtype),
``shift`` (`tritonsym.shift`: one multiply-add per position and stored weight) and ``expand`` (one Triton kernel that
reads or writes through the symmetry: an implicit GEMM that expands the stored weights where it reads them, with all
multiply-adds of the dense layer, or plain sums with one input channel per group; a product with a packed matrix; one
triangle of a symmetric product, and its mirror image).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from tritonsym import costs, shift, tuned
from tritonsym.costs import GramProblem, LinearProblem, MatrixProblem, Problem, Traffic, Work, architecture
from tritonsym.shift import Conv

if TYPE_CHECKING:
    from torch import Tensor, nn

BACKENDS = ("auto", "reference", "triton")
PATHS = ("reference", "expand", "shift")

#: The environment variable TRITONSYM_BACKEND when this was imported.
ENVIRONMENT = os.environ.get("TRITONSYM_BACKEND") or "auto"

#: How often plans were forgotten (`forget`).
generation = 0

_backend: ContextVar[str | None] = ContextVar("tritonsym_backend", default=None)
_path: ContextVar[tuple[str | None, tuned.Tiles]] = ContextVar("tritonsym_path", default=(None, ()))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block use the 'reference', the 'triton' kernels where there is one, or choose ('auto', the default).

    On CPU tensors 'triton' runs Triton's interpreter, slowly, and needs TRITON_INTERPRET=1 from the start.

    The environment variable TRITONSYM_BACKEND, read on import, sets the same outside of any block. A function that
    `torch.compile` or `torch.export` has traced keeps the choice in force when it was traced.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def path(name: str, tiles: tuned.Tiles = ()) -> Iterator[None]:
    """Within the block force one path, 'reference', 'expand' or 'shift', for tests and benchmarks.

    'expand' is also the kernel of `SymmetricLinear`, `gram` and `symmetric_mm`, on a GPU or under backend('triton');
    they have no 'shift'. `tiles`: also those of the path's kernels (`Plan.tiles`), for the tuner.

    Raises:
        ValueError: an unknown name; by a layer, that the path cannot compute it, or that the tiles do not fit.
    """
    if name not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(map(repr, PATHS))}, got {name!r}")
    token = _path.set((name, tiles))
    try:
        yield
    finally:
        _path.reset(token)


def current_backend() -> str:
    """The backend in force: of the innermost `backend` block, else of TRITONSYM_BACKEND, else 'auto'."""
    name = _backend.get() or ENVIRONMENT
    if name not in BACKENDS:
        raise ValueError(f"TRITONSYM_BACKEND={name!r}: expected one of {', '.join(BACKENDS)}")
    return name


def switches() -> tuple[str, str | None, tuned.Tiles, int]:
    """All that a plan depends on besides its problem and the tables: backend, forced path, its tiles, threads."""
    return current_backend(), *_path.get(), torch.get_num_threads()


@dataclass(frozen=True)
class Plan:
    """How a layer will be computed; `str` is the plan in words. FLOPs: 2 x multiply-adds, of the whole batch."""

    problem: Problem
    path: str
    flops: int
    dense_flops: int
    why: str
    tiles: tuple[tuple[int, ...], ...] = ()  # of the path's kernels (`kernels.tiles`), if it launches any

    @property
    def flat_tiles(self) -> tuple[int, ...]:
        return tuple(number for tile in self.tiles for number in tile)

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
    """Choose the path. Pure but for the switches `backend`, `path`, TRITONSYM_BACKEND and `torch.set_num_threads`, and
    for the tables of measurements (`tuned`), which are read once.

    Raises:
        ValueError: a path is forced on a layer that it cannot compute, or with tiles that do not fit.
        NotImplementedError: a layer must never unpack, but has to.
    """
    if isinstance(problem, MatrixProblem):
        return _matrix_plan(problem, current_backend(), *_path.get())
    return _plan(problem, *switches())


def conv_plan(*problem: Any) -> Plan:
    """``plan(conv_problem(*problem))``, remembered: what a call of a layer costs should be its convolution."""
    return _conv_plan(problem, *switches())


@lru_cache(maxsize=4096)
def _conv_plan(problem: tuple[Any, ...], *switches: Any) -> Plan:
    return _plan(conv_problem(*problem), *switches)


def forget() -> None:
    """Plan anew, from the tables of measurements (`tuned`) as the files are now."""
    global generation
    generation += 1
    tuned.table.cache_clear()
    _conv_plan.cache_clear()
    _matrix_plan.cache_clear()


def _check_tiles(problem: Problem, forced: str | None, tiles: tuned.Tiles) -> None:
    if forced and tiles and not problem.runs(forced, tiles):
        raise ValueError(
            f"path {forced!r} is forced with tiles {tiles}, which are not its or do not fit "
            f"{problem.dtype} on {problem.target}; Plan.tiles shows some that do"
        )


def _runs_kernels(target: str) -> bool:
    return find_spec("triton") is not None and re.fullmatch(r"cpu|cuda|sm_\d+|gfx\w+", target) is not None


def _no_kernel(problem: Problem) -> str:
    """Why no kernel computes this."""
    if problem.has_kernel:
        return "Triton is not installed." if find_spec("triton") is None else f"No kernel runs on {problem.target}."
    return f"No Triton kernel computes {problem.layer} in {problem.dtype}."


def _plan(problem: Problem, backend: str, forced: str | None, forced_tiles: tuned.Tiles, threads: int) -> Plan:
    work = problem.work
    has_kernel = problem.has_kernel and _runs_kernels(problem.target)
    if (forced == "shift" and work is None) or (forced == "expand" and not has_kernel):
        why = f" ({_no_kernel(problem)})" if forced == "expand" else ""
        raise ValueError(
            f"path {forced!r} is forced, but it cannot compute {problem.layer} in {problem.dtype}{why}; "
            "remove the switch"
        )
    _check_tiles(problem, forced, forced_tiles)
    on_gpu = has_kernel and problem.target != "cpu" and backend != "reference"
    measured = tuned.find(problem) if on_gpu else None
    if work is not None and work.multiply_adds == 0:
        chosen, why = "reference", "There is nothing to multiply."
    elif forced is not None:
        chosen, why = forced, "Forced by tritonsym.path."
    elif backend == "reference":
        chosen, why = "reference", "Forced by the backend 'reference'."
    elif backend == "triton" and not has_kernel:
        chosen, why = "reference", _no_kernel(problem)
    elif measured and (backend == "auto" or measured[0] != "reference"):
        chosen, why = measured[0], f"Measured on {tuned.gpu(problem.target)}: the fastest path."
    elif backend == "triton":
        chosen, why = costs.fastest_on_gpu(problem, ("shift", "expand"))
        why = f"A kernel is forced by the backend 'triton'. {why}"
    elif work is None:
        chosen, why = "reference", "The shift path does not know this layer or dtype."
    elif problem.target == "cpu":
        chosen, why = costs.cheaper_on_cpu(problem, work, threads)
    elif not has_kernel:
        chosen, why = "reference", _no_kernel(problem)
    else:
        own = ("shift", "expand") if work.depthwise else ("shift",)
        chosen, why = costs.fastest_on_gpu(problem, ("reference", *own))
    if chosen == "reference" or work is None:
        return Plan(problem, "reference", 2 * problem.expanded, 2 * problem.dense, why)
    tiles: tuple[tuple[int, ...], ...] = ()
    if has_kernel and (chosen == "expand" or backend == "triton" or (backend == "auto" and problem.target != "cpu")):
        tiles = forced_tiles or (measured[1] if measured and measured[0] == chosen else _tiles(problem, work, chosen))
    multiply_adds = work.multiply_adds if chosen == "shift" else problem.expanded
    return Plan(problem, chosen, 2 * multiply_adds, 2 * problem.dense, why, tiles)


def _tiles(problem: Problem, work: Work, path: str) -> tuple[tuple[int, ...], ...]:
    """Tiles of the path's kernels: forward and backward additions, or forward, input and weight gradient."""
    from tritonsym.kernels import tiles

    if path == "shift":
        return tuple(astuple(tiles.pick(work.filters, work.taps, reads)) for reads in (0, work.passes))
    if work.depthwise:
        return (astuple(tiles.pick_depthwise(work.groups)),) * 3
    itemsize, target = costs.ITEMSIZE[problem.dtype], architecture(problem.target)
    weight_tiles = tiles.WEIGHT_TILES if itemsize == 2 else tiles.WEIGHT_TILES[1:]  # the widest spills in float32
    return tuple(
        astuple(tiles.pick_gemm(some, columns, length, itemsize, target))
        for some, columns, length in (
            (tiles.CONV_TILES, work.outputs, work.channels),
            (tiles.CONV_TILES, work.channels, work.outputs),
            (weight_tiles, work.channels, 64),  # positions of an image: most have more
        )
    )


def conv_problem(
    layer: str,
    target: str,
    dtype: str,
    batch: int,
    channels: int,
    sizes: tuple[int, ...],
    conv: Conv,
    dense_factor: int = 1,
    training: bool = False,
    compiled: bool = False,
    last: bool = False,
) -> Problem:
    """The problem of a convolution of x (batch, groups * channels, *sizes), x as padded before the op.

    `dense_factor`: the dense layer has so many times the kernels of `conv` (orbit 'sum': all images of a filter).
    """
    groups, geometry = conv.groups, conv.geometry
    out_sizes = geometry.out_sizes(sizes)
    kernel = math.prod(geometry.kernel_size) * batch * math.prod(sizes if geometry.transposed else out_sizes) * channels
    expanded = kernel * groups * len(conv.table)
    dense = expanded * dense_factor
    if "complex" in dtype:
        return Problem(layer, target, dtype, dense, expanded)
    _, additions = shift.schedule(conv, sizes)
    z = batch * groups * sum(rows * math.prod(class_sizes) for rows, class_sizes in additions.sources)
    count = batch * groups * sum(move.count for move in additions.moves)
    work = Work(
        z * channels,
        count,
        len(additions.moves),
        z,
        max(block.filters for block in conv.blocks),
        math.prod(geometry.kernel_size),
        channels,
        len(conv.table),
        groups,
    )
    traffic = Traffic(
        batch * groups * channels * math.prod(sizes),
        batch * conv.out_channels * math.prod(out_sizes),
        groups * conv.rows * channels,
        groups * len(conv.table) * math.prod(geometry.kernel_size) * channels,
    )
    fused = compiled and not shift.has_steps(additions)
    return Problem(layer, target, dtype, dense, expanded, work, training, traffic, fused, last)


# --- symmetric matrices -----------------------------------------------------------------------------------------------


def linear_problem(
    shape: Sequence[int], target: str, dtype: str, never_unpack: bool = False, training: bool = False
) -> LinearProblem:
    """The problem of x S with x of this shape."""
    n, rows = shape[-1], math.prod(shape[:-1])
    dense = rows * n * n
    return LinearProblem(
        "SymmetricLinear", target, dtype, dense, dense, training=training, n=n, rows=rows, never_unpack=never_unpack
    )


def gram_problem(shape: Sequence[int], target: str, dtype: str) -> GramProblem:
    """The problem of X X^T with X of this shape."""
    *batch, n, k = shape
    dense = math.prod(batch) * n * n * k
    return GramProblem("gram", target, dtype, dense, dense, n=n, k=k, batch=math.prod(batch))


def cannot_stay_packed(what: str) -> NotImplementedError:
    """The error for never_unpack where only the reference, which unpacks, can compute the layer."""
    return NotImplementedError(
        f"SymmetricLinear: never_unpack=True needs a Triton kernel, which {what} do not have; use float32, float16 or "
        "bfloat16 on a GPU without switches to the reference, or never_unpack=False"
    )


@lru_cache(maxsize=4096)
def _matrix_plan(problem: MatrixProblem, backend: str, forced: str | None, forced_tiles: tuned.Tiles) -> Plan:
    on_gpu, has_kernel = problem.target != "cpu", problem.has_kernel and _runs_kernels(problem.target)
    can_run = has_kernel and (on_gpu or backend == "triton")
    if forced == "shift" or (forced == "expand" and not can_run):
        raise ValueError(
            f"path {forced!r} is forced, but it cannot compute {problem.layer} in {problem.dtype} on {problem.target}; "
            "remove the switch (with triton installed, tritonsym.backend('triton') runs kernels in its interpreter)"
        )
    _check_tiles(problem, forced, forced_tiles)
    measured = tuned.find(problem) if can_run and on_gpu and backend != "reference" else None
    if forced is not None:
        chosen, why = forced, "Forced by tritonsym.path."
    elif backend == "reference":
        chosen, why = "reference", "Forced by the backend 'reference'."
    elif not has_kernel:
        chosen, why = "reference", _no_kernel(problem)
    elif not can_run:
        chosen, why = "reference", "The Triton kernels need a GPU."
    elif measured and (measured[0] == "expand" or (backend == "auto" and not problem.never_unpack)):
        chosen, why = measured[0], f"Measured on {tuned.gpu(problem.target)}: the fastest path."
    elif backend == "triton":
        chosen, why = "expand", "Forced by the backend 'triton'."
    elif problem.never_unpack:
        chosen, why = "expand", "Never unpacked: half of the memory, at any speed."
    else:
        chosen, why = _estimate(problem)
    if chosen == "reference":
        if problem.never_unpack:
            raise cannot_stay_packed(f"{problem.dtype} tensors on {problem.target} under these switches")
        return Plan(problem, chosen, 2 * problem.dense, 2 * problem.dense, why)
    tiles = forced_tiles or (measured[1] if measured and measured[0] == chosen else problem.pick())
    return Plan(problem, chosen, problem.flops, 2 * problem.dense, why, tiles)


def _estimate(problem: MatrixProblem) -> tuple[str, str]:
    """The path on a GPU where nothing was measured, and why."""
    target = architecture(problem.target)
    if target not in costs.MULTIPROCESSORS:
        return "reference", f"There is no estimate for {target}; backend='triton' uses the kernel."
    if costs.ITEMSIZE[problem.dtype] != 2:
        return "reference", "The estimates know 16-bit dtypes only; backend='triton' uses the kernel."
    is_faster, why = problem.compare()
    return "expand" if is_faster else "reference", f"{why} (estimate)."


def computing_dtype(t: Tensor) -> torch.dtype:
    """The dtype of t, or the one that torch.autocast casts it to: not float64, not complex."""
    if not torch._C._is_any_autocast_enabled():
        return t.dtype
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
        NotImplementedError: the layer must never unpack its weight, but has to.
    """
    problem = getattr(module, "problem", None)
    if not callable(problem):
        raise TypeError(
            f"explain: expected a layer of tritonsym.nn with weights, got {type(module).__name__}; "
            "for a whole model call explain on its layers"
        )
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"explain: x must be a torch.Tensor, got {type(x).__name__}")
    if target not in (None, "cpu", "cuda") and not re.fullmatch(r"sm_\d+|gfx\w+", str(target)):
        raise ValueError(f"explain: target must be 'cpu', 'cuda', 'sm_..' or 'gfx..', got {target!r}")
    where = target or ("cpu" if x.device.type == "meta" else x.device.type)
    found = problem(tuple(x.shape), where, dtype_name(x))
    return plan(replace(found, training=needs_gradient(x, *module.parameters()), last=takes_last(module, x)))


def takes_last(module: nn.Module, x: Tensor) -> bool:
    """Whether the layer computes x, perhaps without a batch, as channels-last."""
    return shift.is_last(x[None] if x.ndim == len(getattr(module, "kernel_size", ())) + 1 else x)

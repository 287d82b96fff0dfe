"""Which path computes a layer: one pure function of the problem, and the switches that override it.

Paths: ``reference`` (expand the weight with torch ops, call the torch convolution or matmul; every device and dtype),
``shift`` (`tritonsym.shift`: one multiply-add per position and stored weight) and ``expand`` (one implicit GEMM that
reads the stored weights through the symmetry: all multiply-adds of the dense layer, no expanded weight).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from tritonsym import shift, tuned
from tritonsym.shift import Conv

if TYPE_CHECKING:
    from torch import Tensor, nn

BACKENDS = ("auto", "reference", "triton")
PATHS = ("reference", "expand", "shift")

_backend: ContextVar[str | None] = ContextVar("tritonsym_backend", default=None)
_path: ContextVar[tuple[str | None, tuned.Tiles]] = ContextVar("tritonsym_path", default=(None, ()))


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
def path(name: str, tiles: tuned.Tiles = ()) -> Iterator[None]:
    """Within the block force one path, 'reference', 'expand' or 'shift', for tests and benchmarks.

    `tiles`: also those of its kernels (`Plan.tiles`), for the tuner.
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
    z: int  # values of z
    filters: int  # of the largest block
    taps: int
    channels: int  # input channels of one group: the terms that one value of z sums
    outputs: int  # filters of one group, with all images


@dataclass(frozen=True)
class Traffic:
    """Values that a convolution reads and writes however it is computed."""

    x: int
    y: int
    stored: int  # weights
    expanded: int  # weights


@dataclass(frozen=True)
class Problem:
    """What `plan` decides on. Multiply-adds are those of the whole layer on the whole batch."""

    layer: str
    target: str  # 'cpu', 'cuda', or an architecture such as 'sm_90'
    dtype: str
    dense: int  # multiply-adds of the dense layer it replaces
    expanded: int  # multiply-adds of the reference path
    shift: Work | None = None  # None where the kernels and the shift path cannot compute the layer
    training: bool = False  # whether a gradient is needed
    traffic: Traffic | None = None  # of a convolution


@dataclass(frozen=True)
class Plan:
    """How a layer will be computed; `str` is the plan in words."""

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
    """
    if isinstance(problem, LinearProblem):
        return linear_plan(problem)
    return _plan(problem, current_backend(), *_path.get(), torch.get_num_threads())


def forget() -> None:
    """Plan anew, from the tables of measurements (`tuned`) as the files are now."""
    tuned.table.cache_clear()
    _plan.cache_clear()


@lru_cache(maxsize=4096)
def _plan(problem: Problem, backend: str, forced: str | None, forced_tiles: tuned.Tiles, threads: int) -> Plan:
    work = problem.shift
    has_kernel = work is not None and problem.dtype in ITEMSIZE and find_spec("triton") is not None
    if (forced == "shift" and work is None) or (forced == "expand" and not has_kernel):
        raise ValueError(
            f"path {forced!r} is forced, but it cannot compute {problem.layer} in {problem.dtype}; remove the switch"
        )
    if forced and forced_tiles and not tuned.runs(forced, forced_tiles, problem.dtype, architecture(problem.target)):
        raise ValueError(
            f"path {forced!r} is forced with tiles {forced_tiles}, which are not its or do not fit "
            f"{problem.dtype} on {problem.target}; Plan.tiles shows some that do"
        )
    on_gpu = has_kernel and problem.target != "cpu" and backend != "reference"
    measured = tuned.find(problem, architecture(problem.target)) if on_gpu else None
    if work is not None and work.multiply_adds == 0:
        chosen, why = "reference", "There is nothing to multiply."
    elif forced is not None:
        chosen, why = forced, "Forced by tritonsym.path."
    elif backend == "reference":
        chosen, why = "reference", "Forced by the backend 'reference'."
    elif backend == "triton" and not has_kernel:
        chosen, why = "reference", f"No Triton kernel computes {problem.layer} in {problem.dtype}."
    elif measured and (backend == "auto" or measured[0] != "reference"):
        chosen, why = measured[0], f"Measured on {tuned.gpu(problem.target)}: the fastest path."
    elif backend == "triton":
        chosen, why = _fastest_on_gpu(problem, ("shift", "expand"))
        why = f"A kernel is forced by the backend 'triton'. {why}"
    elif work is None:
        chosen, why = "reference", "The shift path does not know this layer or dtype."
    elif problem.target == "cpu":
        chosen, why = _cheaper_on_cpu(problem, work, threads)
    elif not has_kernel:
        chosen, why = "reference", f"No Triton kernel computes {problem.dtype}."
    else:
        chosen, why = _fastest_on_gpu(problem, ("reference", "shift"))
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
        tile = astuple(tiles.pick(work.filters, work.taps))
        return (tile, tile)
    itemsize, target = ITEMSIZE[problem.dtype], architecture(problem.target)
    both = (tiles.pick_gemm(columns, itemsize, target) for columns in (work.outputs, work.channels))
    return tuple(astuple(tile) for tile in (*both, tiles.WEIGHT_TILE))


def architecture(target: str) -> str:
    """'cuda' as the architecture of the current GPU, if there is one."""
    if target != "cuda" or not torch.cuda.is_available():
        return target
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return device.gcnArchName.partition(":")[0]
    return f"sm_{device.major}{device.minor}"


@dataclass(frozen=True)
class Rates:
    """What a GPU is assumed to reach: datasheet numbers times an efficiency; never measured here."""

    gemm: float  # 16-bit multiply-adds x 2 per second of the vendor's GEMM
    conv: float  # of its dense convolution
    memory: float  # bytes per second
    l1: float
    launch: float = 4e-6  # seconds


#: By compute capability: A100, H200, B200.
RATES = {
    80: Rates(250e12, 230e12, 1.7e12, 13e12),
    90: Rates(700e12, 650e12, 4.3e12, 20e12),
    100: Rates(1500e12, 1400e12, 7e12, 24e12),
}
#: A dense convolution of float32 takes so many times as long as one of 16 bits (tf32).
FLOAT32 = 2
#: Estimated speedup below which the reference is taken all the same: nothing was measured.
MARGIN = 1.2
#: Terms of all sums together above which the kernel of the additions, which unrolls them, would compile for minutes.
MOST_TERMS = 512
#: What an implicit GEMM in Triton is assumed to reach of the vendor's convolution.
TRITON = 0.6


def estimated_seconds(problem: Problem) -> dict[str, float]:
    """Forward time of every path on a GPU, by a roofline model.

    Each step takes its arithmetic or its traffic, whichever is longer, and a launch. z is written to memory and read
    back once; every term of a sum is a load from L1.
    """
    work, traffic = problem.shift, problem.traffic
    assert work is not None and traffic is not None
    name = architecture(problem.target)
    capability = int(name[3:]) if name.startswith("sm_") else 90  # the interpreter stands in for an H200
    rates = RATES[max((c for c in RATES if c <= capability), default=80)]
    itemsize = ITEMSIZE[problem.dtype]
    slower = FLOAT32 if itemsize == 4 else 1

    def seconds(values: float, multiply_adds: float = 0, rate: float = rates.conv, terms: float = 0) -> float:
        arithmetic = 2 * multiply_adds * slower / rate
        return max(values * itemsize / rates.memory, arithmetic, terms * itemsize / rates.l1) + rates.launch

    expanding = seconds(2 * traffic.expanded)
    dense = seconds(traffic.x + traffic.y + traffic.expanded, problem.expanded)
    rows = seconds(2 * traffic.stored)
    passes = -(-work.z * itemsize // shift.SCRATCH_BYTES)  # every chunk has its launches
    gemm = seconds(traffic.x + work.z + traffic.stored, work.multiply_adds, rates.gemm)
    additions = seconds(work.z + traffic.y, terms=work.additions)
    return {
        "reference": expanding + dense,
        "shift": rows + gemm + additions + 2 * (passes - 1) * rates.launch,
        "expand": rows + seconds(traffic.x + traffic.y + traffic.stored, problem.expanded, TRITON * rates.conv),
    }


def _fastest_on_gpu(problem: Problem, paths: tuple[str, ...]) -> tuple[str, str]:
    """The path of least estimated time; the first one unless another is clearly faster."""
    if architecture(problem.target).startswith("gfx"):
        return paths[0], "No estimate for this GPU."
    assert problem.shift is not None
    if problem.shift.passes > MOST_TERMS:
        paths = tuple(path for path in paths if path != "shift")
    seconds = {path: s for path, s in estimated_seconds(problem).items() if path in paths}
    best = min(seconds, key=lambda path: seconds[path])
    words = ", ".join(f"{path} {1e6 * s:.3g} us" for path, s in seconds.items())
    if seconds[paths[0]] < MARGIN * seconds[best]:
        best = paths[0]
    return best, f"Not measured; by estimate {words}."


#: What the shift path's work costs on a CPU, in multiply-adds of the dense convolution that take as long: one addition,
#: one value of x, y or z, and one pass of additions however short. Fitted to perf/results/*-cpu.json (2 threads).
ADDITION = 40
VALUE = 50
PASS = 1_500_000
#: Speedup by the fit below which the reference is taken all the same.
CPU_MARGIN = 1.1


def _cheaper_on_cpu(problem: Problem, work: Work, threads: int) -> tuple[str, str]:
    """Compare multiply-adds, with additions counted as such; in doubt the reference."""
    assert problem.traffic is not None
    values = problem.traffic.x + problem.traffic.y + work.z
    cost = work.multiply_adds + ADDITION * work.additions + VALUE * values + PASS * work.passes
    ratio = problem.expanded / max(cost, 1)
    words = f"{problem.expanded / max(work.multiply_adds, 1):.3g}x fewer multiply-adds, {work.additions:,} additions"
    if problem.dtype != "float32":
        return "reference", f"The shift path ({words}) has been measured in float32 only."
    if threads == 1:  # torch gives the 1x1 convolutions to a slower GEMM then
        return "reference", f"The shift path ({words}) is slower on one thread."
    if ratio < CPU_MARGIN:
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
    conv: Conv,
    dense_factor: int = 1,
    training: bool = False,
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
    )
    traffic = Traffic(
        batch * groups * channels * math.prod(sizes),
        batch * conv.out_channels * math.prod(out_sizes),
        groups * conv.rows * channels,
        groups * len(conv.table) * math.prod(geometry.kernel_size) * channels,
    )
    return Problem(layer, target, dtype, dense, expanded, work, training, traffic)


# --- symmetric matrices -----------------------------------------------------------------------------------------------

#: Bytes of an operand, for the dtypes that the kernels know.
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}

#: What the estimates assume, whatever the GPU: an H200's memory and second-level cache in bytes/s and 16-bit matrix
#: products in FLOP/s, the seconds of a launch, and the speed of our kernels' products, as a part of the vendor's.
MEMORY, CACHE, GEMM, LAUNCH = 4.3e12, 6e12, 790e12, 2.5e-6
TILES_EFFICIENCY, STRIPS_EFFICIENCY, GRAM_EFFICIENCY = 0.85, 0.5, 0.75
#: Of the GPUs on which 'auto' may take the kernels.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
#: n up to which launches, which the estimates know least about, decide: the vendor library's products are taken.
SMALL_N = 2048


@dataclass(frozen=True)
class LinearProblem(Problem):
    """x S with a packed n x n matrix S, for so many rows of x."""

    n: int = 0
    rows: int = 0
    never_unpack: bool = False

    def seconds(self) -> tuple[float, float, float]:
        """Of the kernel, of unpacking and the vendor library's product, and of the product alone (16-bit, estimates).

        Unpacking is 8 launches that move 5.5 n^2 values.
        """
        from tritonsym.kernels.tiles import SEGMENT_STEPS, STRIP_ROWS, pick_product

        n, rows, tile = self.n, self.rows, pick_product(self.rows, 2, self.target)
        flops, moved = 2 * rows * n * n, n * n + 4 * rows * n
        product = LAUNCH + max((moved + n * n) / MEMORY, flops / GEMM)
        if rows > STRIP_ROWS:
            kernel = LAUNCH + max(moved / MEMORY, 2 * n * n / CACHE, flops / (TILES_EFFICIENCY * GEMM))
        else:
            partial = 4 * rows * n * (n / (2 * tile.block_m) + 0.75 * n / (2 * SEGMENT_STEPS * tile.block_k))
            flops = 2 * tile.block_n * n * n
            kernel = 2 * LAUNCH + partial / CACHE
            kernel += max(moved / MEMORY, (moved + partial) / CACHE, flops / (STRIPS_EFFICIENCY * GEMM))
        return kernel, product + 8 * LAUNCH + 11 * n * n / MEMORY, product

    def compare(self) -> tuple[bool, str]:
        """Whether the kernel is faster than the reference, and a reason."""
        kernel, unpacked, product = self.seconds()
        if self.n <= SMALL_N:
            return False, f"Up to n = {SMALL_N} the vendor library multiplies, by the unpacked matrix"
        if self.n % 16:
            return False, f"n = {self.n} is not a multiple of 16, so the packed rows are not aligned"
        words = f"{unpacked / kernel:.2g}x the speed of unpacking first, {product / kernel:.2g}x that of a dense layer"
        return unpacked > MARGIN * kernel, f"The packed kernel would have {words}"


@dataclass(frozen=True)
class GramProblem(Problem):
    """X X^T for so many matrices X (n, k)."""

    n: int = 0
    k: int = 0
    batch: int = 0

    def seconds(self) -> tuple[float, float]:
        """Of the kernel, and of the vendor library's product (16-bit, estimates)."""
        from tritonsym.kernels.tiles import pick_square

        tile = pick_square(2, self.target)
        edge = -(-self.n // tile.block_m)
        processors = MULTIPROCESSORS[self.target]
        waves = -(-self.batch * edge * (edge + 1) // 2 // processors)
        one = 2 * tile.block_m * tile.block_n * self.k * processors / (GRAM_EFFICIENCY * GEMM)
        return LAUNCH + waves * one, LAUNCH + 2 * self.dense / GEMM

    def compare(self) -> tuple[bool, str]:
        """Whether the kernel is faster than the reference, and a reason."""
        kernel, product = self.seconds()
        return product > MARGIN * kernel, f"The kernel for half of it would have {product / kernel:.2g}x the speed"


def linear_problem(shape: Sequence[int], target: str, dtype: str, never_unpack: bool = False) -> LinearProblem:
    """The problem of x S with x of this shape."""
    n, rows = shape[-1], math.prod(shape[:-1])
    dense = rows * n * n
    target = architecture(target)
    return LinearProblem("SymmetricLinear", target, dtype, dense, dense, n=n, rows=rows, never_unpack=never_unpack)


def gram_problem(shape: Sequence[int], target: str, dtype: str) -> GramProblem:
    """The problem of X X^T with X of this shape."""
    *batch, n, k = shape
    dense = math.prod(batch) * n * n * k
    return GramProblem("gram", architecture(target), dtype, dense, dense, n=n, k=k, batch=math.prod(batch))


def cannot_stay_packed(what: str) -> NotImplementedError:
    """The error for never_unpack where only the reference, which unpacks, can compute the layer."""
    return NotImplementedError(
        f"SymmetricLinear: never_unpack=True needs a Triton kernel, which {what} do not have; use float32, float16 or "
        "bfloat16 on a GPU without switches to the reference, or never_unpack=False"
    )


def linear_plan(problem: LinearProblem) -> Plan:
    """The path of x S: 'reference' unpacks S, 'expand' reads it packed. Pure but for the switches.

    Raises:
        ValueError: a path is forced that cannot compute the layer.
        NotImplementedError: the layer must never unpack, but has to.
    """
    return _linear_plan(problem, current_backend(), _path.get()[0])


@lru_cache(maxsize=4096)
def _linear_plan(problem: LinearProblem, backend: str, forced: str | None) -> Plan:
    if forced == "shift" or (forced == "expand" and (problem.target == "cpu" or problem.dtype not in ITEMSIZE)):
        raise ValueError(
            f"path {forced!r} is forced, but it cannot compute {problem.layer} in {problem.dtype} on {problem.target}; "
            "remove the switch (tritonsym.backend('triton') runs kernels in Triton's interpreter)"
        )
    if forced is not None:
        chosen, why = forced, "Forced by tritonsym.path."
    elif backend == "auto" and problem.never_unpack and problem.target != "cpu" and problem.dtype in ITEMSIZE:
        chosen, why = "expand", "Never unpacked: half of the memory, at any speed."
    else:
        chosen, why = _choose(problem, backend, "expand")
    flops = 2 * problem.dense
    if chosen == "reference":
        if problem.never_unpack:
            raise cannot_stay_packed(f"{problem.dtype} tensors on {problem.target} under these switches")
        return Plan(problem, chosen, flops, flops, why)
    from tritonsym.kernels.tiles import pick_product, pick_square

    itemsize = ITEMSIZE[problem.dtype]
    picked = pick_product(problem.rows, itemsize, problem.target), pick_square(itemsize, problem.target)
    return Plan(problem, chosen, flops, flops, why, tiles=tuple(map(astuple, picked)))


def gram_plan(problem: GramProblem) -> Plan:
    """The path of X X^T: 'reference' computes all of it, 'half' one triangle. Pure but for the switches."""
    return _gram_plan(problem, current_backend())


@lru_cache(maxsize=4096)
def _gram_plan(problem: GramProblem, backend: str) -> Plan:
    chosen, why = _choose(problem, backend, "half")
    if chosen == "reference":
        return Plan(problem, chosen, 2 * problem.dense, 2 * problem.dense, why)
    from tritonsym.kernels.tiles import pick_square

    tile = pick_square(ITEMSIZE[problem.dtype], problem.target)
    flops = problem.batch * problem.n * (problem.n + 1) * problem.k
    return Plan(problem, chosen, flops, 2 * problem.dense, why, tiles=(astuple(tile),))


def _choose(problem: LinearProblem | GramProblem, backend: str, kernel: str) -> tuple[str, str]:
    """The path `kernel` or the reference, and why."""
    if problem.dtype not in ITEMSIZE:
        return "reference", f"No Triton kernel computes {problem.layer} in {problem.dtype}."
    if backend != "auto":
        return kernel if backend == "triton" else "reference", f"Forced by the backend {backend!r}."
    if problem.target == "cpu" or find_spec("triton") is None:
        return "reference", "The Triton kernels need a GPU, and Triton."
    if problem.target not in MULTIPROCESSORS:
        return "reference", f"There is no estimate for {problem.target}; backend='triton' uses the kernel."
    if ITEMSIZE[problem.dtype] != 2:
        return "reference", "The estimates know 16-bit dtypes only; backend='triton' uses the kernel."
    is_faster, why = problem.compare()
    return kernel if is_faster else "reference", f"{why} (estimate)."


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

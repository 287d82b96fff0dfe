"""What a layer on a batch takes, and how long each path would need: by estimate on a GPU, by a fit on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from tritonsym import shift
from tritonsym.tuned import Tiles

#: Bytes of an operand, for the dtypes that the kernels know.
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


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
    groups: int

    @property
    def depthwise(self) -> bool:
        """One input channel per group: path 'expand' is `kernels.depthwise`, not an implicit GEMM."""
        return self.channels == 1


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
    work: Work | None = None  # None where the kernels and the shift path cannot compute the layer
    training: bool = False  # whether a gradient is needed
    traffic: Traffic | None = None  # of a convolution
    compiled: bool = False  # whether a compiler will fuse the additions
    last: bool = False  # whether x is channels-last

    @property
    def has_kernel(self) -> bool:
        """Whether some Triton kernel computes the layer in this dtype."""
        return self.work is not None and self.dtype in ITEMSIZE

    @property
    def key(self) -> str:
        """What decides how fast it is, for `tuned`; sizes that may vary are rounded to powers of two.

        Positions are those of all groups and images of the batch; z says how often the stored rows are multiplied.
        """
        work, traffic = self.work, self.traffic
        assert work is not None and traffic is not None
        positions = self.expanded // max(work.taps * work.channels * work.outputs, 1)
        return (
            f"{re.sub('[123]d$', '', self.layer)} {self.dtype} {'training' if self.training else 'inference'} "
            f"channels={work.channels} outputs={work.outputs} filters={work.filters} taps={work.taps} "
            f"stored={traffic.stored} positions={_bucket(positions)} z={_bucket(work.z)} "
            f"layout={'last' if self.last else 'first'}"
        )

    def runs(self, path: str, tiles: Tiles) -> bool:
        """Whether these are tiles of the path's kernels that fit."""
        try:
            return all(fits(*tile) for fits, tile in zip(self._rules()[path], tiles, strict=True))
        except (KeyError, TypeError, ValueError):
            return False

    def _rules(self) -> dict[str, tuple[Callable[..., bool], ...]]:
        """By path, for each tile of its kernels: whether one of these numbers fits."""
        from tritonsym.kernels.tiles import GemmTile, Tile, fits

        def fit(kind: type[Tile | GemmTile]) -> Callable[..., bool]:
            return lambda *numbers: fits(kind(*numbers), *self._where, taps=True)

        product = Tile if self.work and self.work.depthwise else GemmTile
        return {"reference": (), "shift": (fit(Tile),) * 2, "expand": (fit(product),) * 3}

    @property
    def _where(self) -> tuple[int, str]:
        """Bytes of an operand, and the architecture: what `kernels.tiles` asks for."""
        return ITEMSIZE.get(self.dtype, 2), architecture(self.target)


def _bucket(number: int) -> int:
    """The power of two nearest on a logarithmic scale."""
    return 0 if number == 0 else 1 << (number * number).bit_length() // 2


def architecture(target: str) -> str:
    """'cuda' as the architecture of the current GPU, if there is one."""
    if target != "cuda" or not torch.cuda.is_available():
        return target
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return device.gcnArchName.partition(":")[0]
    return f"sm_{device.major}{device.minor}"


# --- convolutions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a GPU is assumed to reach: datasheet numbers times an efficiency; never measured here."""

    gemm: float  # 16-bit multiply-adds x 2 per second of the vendor's GEMM
    conv: float  # of its dense convolution
    sums: float  # multiply-adds x 2 per second without tensor cores, at 6 instructions each, as compiled kernels take
    memory: float  # bytes per second
    l1: float
    launch: float = 4e-6  # seconds


#: By compute capability: A100, H200, B200.
RATES = {
    80: Rates(250e12, 230e12, 3.2e12, 1.7e12, 13e12),
    90: Rates(700e12, 650e12, 10e12, 4.3e12, 20e12),
    100: Rates(1500e12, 1400e12, 12e12, 7e12, 24e12),
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
    back once; every term of a sum is a load from L1. Without a product (depthwise) the vendor's convolution is taken to
    be as fast as our kernel, which then saves no more than expanding the weight.
    """
    work, traffic = problem.work, problem.traffic
    assert work is not None and traffic is not None
    name = architecture(problem.target)
    capability = int(name[3:]) if name.startswith("sm_") else 90  # the interpreter stands in for an H200
    rates = RATES[max((c for c in RATES if c <= capability), default=80)]
    itemsize = ITEMSIZE[problem.dtype]
    slower = FLOAT32 if itemsize == 4 and not work.depthwise else 1
    vendor, ours, terms = rates.conv, TRITON * rates.conv, 0
    if work.depthwise:
        vendor, ours, terms = rates.sums, rates.sums, problem.expanded

    def seconds(values: float, multiply_adds: float = 0, rate: float = vendor, terms: float = 0) -> float:
        arithmetic = 2 * multiply_adds * slower / rate
        return max(values * itemsize / rates.memory, arithmetic, terms * itemsize / rates.l1) + rates.launch

    dense = seconds(traffic.x + traffic.y + traffic.expanded, problem.expanded, vendor, terms)
    rows = seconds(2 * traffic.stored)
    chunks = -(-work.z * itemsize // shift.SCRATCH_BYTES)  # each has its launches
    gemm = seconds(traffic.x + work.z + traffic.stored, work.multiply_adds, rates.gemm)
    additions = seconds(work.z + traffic.y, terms=work.additions)
    return {
        "reference": rows + seconds(2 * traffic.expanded) + dense,
        "shift": rows + gemm + additions + 2 * (chunks - 1) * rates.launch,
        "expand": rows + seconds(traffic.x + traffic.y + traffic.stored, problem.expanded, ours, terms),
    }


def fastest_on_gpu(problem: Problem, paths: tuple[str, ...]) -> tuple[str, str]:
    """The path of least estimated time; the first one unless another is clearly faster."""
    if architecture(problem.target).startswith("gfx"):
        return paths[0], "No estimate for this GPU."
    assert problem.work is not None
    if problem.work.passes > MOST_TERMS:
        paths = tuple(path for path in paths if path != "shift")
    seconds = {path: s for path, s in estimated_seconds(problem).items() if path in paths}
    best = min(seconds, key=lambda path: seconds[path])
    words = ", ".join(f"{path} {1e6 * s:.3g} us" for path, s in seconds.items())
    if seconds[paths[0]] < MARGIN * seconds[best]:
        best = paths[0]
    return best, f"Not measured; by estimate {words}."


#: What the shift path's work costs on a CPU, in multiply-adds of the dense convolution that take as long: one addition,
#: one value of x, y or z, and one pass of additions however short; in inference, and in a training step relative to its
#: three products. Fitted to perf/results/*-cpu.json (2 threads).
EAGER, EAGER_TRAINING = (40, 50, 1_500_000), (27, 50, 1_000_000)
#: The same where a compiler fuses the additions: perf/results/*-cpu-compiled.json.
COMPILED = (35, 0, 0)
#: The same of one stored weight, which the shift path brings into the order of its products in every call, and of one
#: expanded weight in a training step; in inference it is kept.
ORDERING, EXPANDING = 100, 40
#: Speedup by the fit below which the reference is taken all the same.
CPU_MARGIN = 1.15


def cheaper_on_cpu(problem: Problem, work: Work, threads: int) -> tuple[str, str]:
    """Compare multiply-adds, with all else counted as such; in doubt the reference."""
    assert problem.traffic is not None
    addition, value, one_pass = COMPILED if problem.compiled else EAGER_TRAINING if problem.training else EAGER
    values = problem.traffic.x + problem.traffic.y + work.z
    cost = work.multiply_adds + addition * work.additions + value * values + one_pass * work.passes
    cost += ORDERING * problem.traffic.stored
    reference = problem.expanded + (EXPANDING * problem.traffic.expanded if problem.training else 0)
    ratio = reference / max(cost, 1)
    words = f"{problem.expanded / max(work.multiply_adds, 1):.3g}x fewer multiply-adds, {work.additions:,} additions"
    if problem.dtype != "float32":
        return "reference", f"The shift path ({words}) has been measured in float32 only."
    if threads == 1:  # torch gives the 1x1 convolutions to a slower GEMM then
        return "reference", f"The shift path ({words}) is slower on one thread."
    if ratio < CPU_MARGIN:
        return "reference", f"The shift path ({words}) would not be clearly faster: {ratio:.2g}x (estimate)."
    return "shift", f"{words}: {ratio:.2g}x faster than expanding the weight (estimate)."


# --- symmetric matrices -----------------------------------------------------------------------------------------------

#: What the estimates assume, whatever the GPU: an H200's memory and second-level cache in bytes/s and 16-bit matrix
#: products in FLOP/s, the seconds of a launch, and the speed of our kernels' products, as a part of the vendor's.
MEMORY, CACHE, GEMM, LAUNCH = 4.3e12, 6e12, 790e12, 2.5e-6
TILES_EFFICIENCY, STRIPS_EFFICIENCY, GRAM_EFFICIENCY = 0.85, 0.5, 0.75
#: Of the GPUs on which 'auto' may take the kernels.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
#: n up to which launches, which the estimates know least about, decide: the vendor library's products are taken.
SMALL_N = 2048


@dataclass(frozen=True)
class _MatrixProblem(Problem):
    """A product with an n x n matrix that is symmetric; the path of its kernel is 'expand'."""

    n: int = 0
    never_unpack: bool = False  # if the reference will not do

    @property
    def has_kernel(self) -> bool:
        return self.dtype in ITEMSIZE


@dataclass(frozen=True)
class LinearProblem(_MatrixProblem):
    """x S with a packed n x n matrix S, for so many rows of x."""

    rows: int = 0

    @property
    def key(self) -> str:
        """Rows are rounded up, so that a strip holds all that are rounded to as many; strips end at a power of two."""
        mode = "training" if self.training else "inference"
        rows = 1 << max(self.rows - 1, 0).bit_length()
        return f"SymmetricLinear {self.dtype} {mode} n={self.n} rows={rows}" + " packed" * self.never_unpack

    @property
    def flops(self) -> int:
        """Of the kernel."""
        return 2 * self.dense

    def pick(self) -> Tiles:
        """Tiles of the product and of the gradient that fit: not measured."""
        from tritonsym.kernels.tiles import pick_product, pick_square

        return astuple(pick_product(self.rows, *self._where)), astuple(pick_square(*self._where))

    def _rules(self) -> dict[str, tuple[Callable[..., bool], ...]]:
        from tritonsym.kernels.tiles import GemmTile, fits_product, fits_square

        where = self._where
        return {
            "reference": (),
            "expand": (
                lambda *numbers: fits_product(GemmTile(*numbers), self.rows, *where),
                lambda *numbers: fits_square(GemmTile(*numbers), *where),
            ),
        }

    def seconds(self) -> tuple[float, float, float]:
        """Of the kernel, of unpacking and the vendor library's product, and of the product alone (16-bit, estimates).

        Unpacking is 8 launches that move 5.5 n^2 values.
        """
        from tritonsym.kernels.tiles import SEGMENT_STEPS, STRIP_ROWS, pick_product

        n, rows, tile = self.n, self.rows, pick_product(self.rows, 2, architecture(self.target))
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
class GramProblem(_MatrixProblem):
    """X X^T for so many matrices X (n, k)."""

    k: int = 0
    batch: int = 0

    @property
    def key(self) -> str:
        return f"gram {self.dtype} n={self.n} k={self.k} batch={_bucket(self.batch)}"

    @property
    def flops(self) -> int:
        """Of the kernel."""
        return self.batch * self.n * (self.n + 1) * self.k

    def pick(self) -> Tiles:
        """A tile that fits: not measured."""
        from tritonsym.kernels.tiles import pick_square

        return (astuple(pick_square(*self._where)),)

    def _rules(self) -> dict[str, tuple[Callable[..., bool], ...]]:
        from tritonsym.kernels.tiles import GemmTile, fits_square

        return {"reference": (), "expand": (lambda *numbers: fits_square(GemmTile(*numbers), *self._where),)}

    def seconds(self) -> tuple[float, float]:
        """Of the kernel, and of the vendor library's product (16-bit, estimates)."""
        from tritonsym.kernels.tiles import pick_square

        target = architecture(self.target)
        tile, processors = pick_square(2, target), MULTIPROCESSORS[target]
        edge = -(-self.n // tile.block_m)
        waves = -(-self.batch * edge * (edge + 1) // 2 // processors)
        one = 2 * tile.block_m * tile.block_n * self.k * processors / (GRAM_EFFICIENCY * GEMM)
        return LAUNCH + waves * one, LAUNCH + 2 * self.dense / GEMM

    def compare(self) -> tuple[bool, str]:
        """Whether the kernel is faster than the reference, and a reason."""
        kernel, product = self.seconds()
        return product > MARGIN * kernel, f"The kernel for half of it would have {product / kernel:.2g}x the speed"


MatrixProblem = LinearProblem | GramProblem

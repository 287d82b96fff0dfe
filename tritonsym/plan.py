"""Which path computes a layer: one pure function of the problem, and the switches that override it.

Paths: ``reference`` (expand the weight with torch ops, call the torch convolution or matmul; every device and dtype),
``shift`` (one multiply-add per position and stored weight: `tritonsym.shift` on the CPU, `tritonsym.launch` on a GPU),
``fused`` (the same with its forward pass in one kernel, for few channels: `kernels.fused`, on a GPU),
``blocks`` (products with symmetric matrices by blocks of the stored half, `tritonsym.blocks`; every device and dtype),
``fold`` (group convolutions by characters: `tritonsym.fold`) and ``implicit_gemm`` (one Triton kernel that reads or
writes through the symmetry: an implicit GEMM that expands the stored weights where it reads them, with all multiply-
adds of the dense layer, or plain sums with one input channel per group; a product with a packed matrix; one triangle of
a symmetric product, and its mirror image).
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tritonsym import blocks, fold, shift, tuned
from tritonsym._compat import constant, multiplies_bfloat16
from tritonsym._table import aligned
from tritonsym.spec import ConvSpec, check
from tritonsym.tuned import Tiles

BACKENDS = ("auto", "reference", "triton")
PATHS = ("reference", "implicit_gemm", "shift", "fused", "blocks", "fold")

#: The environment variable TRITONSYM_BACKEND when this was imported.
ENVIRONMENT = os.environ.get("TRITONSYM_BACKEND") or "auto"

_backend: ContextVar[str | None] = ContextVar("tritonsym_backend", default=None)
_path: ContextVar[tuple[str | None, Tiles]] = ContextVar("tritonsym_path", default=(None, ()))

#: Bytes of an operand, for the dtypes that the kernels know.
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


# --- switches ---------------------------------------------------------------------------------------------------------


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block take the 'reference', the 'triton' kernel where there is one, or choose ('auto', the default).

    On CPU tensors 'triton' runs Triton's interpreter, slowly, and needs TRITON_INTERPRET=1 from the start.

    The environment variable TRITONSYM_BACKEND, read on import, sets the backend outside of any block. A function that
    `torch.compile` or `torch.export` has traced keeps the choice in force when it was traced.

    Raises:
        ValueError: an unknown name.

    >>> with tritonsym.backend("reference"):
    ...     y = nn.SymmetricConv2d(4, 4, 3, symmetry="h")(torch.randn(1, 4, 8, 8))
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def path(name: str, tiles: Tiles = ()) -> Iterator[None]:
    """Within the block force one path, 'reference', 'implicit_gemm', 'shift', 'fused', 'blocks' or 'fold', for tests
    and benchmarks.

    Group convolutions have 'reference' and 'fold', which then folds every axis it can. `SymmetricLinear`, `gram` and
    `symmetric_mm` have 'reference', 'blocks' and, on a GPU or under backend('triton'), 'implicit_gemm' (formerly
    'expand'). The other convolutions have all but 'blocks' and 'fold'. `tiles` forces the tiles of the path's kernels
    (`Plan.tiles`), for the tuner.

    Raises:
        ValueError: an unknown name; later, by a layer, if the path cannot compute it or the tiles do not fit.

    >>> with tritonsym.path("shift"):
    ...     y = nn.SymmetricConv2d(4, 4, 3, symmetry="h")(torch.randn(1, 4, 8, 8))
    """
    name = "implicit_gemm" if name == "expand" else name
    if name not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(map(repr, PATHS))}, got {name!r}")
    token = _path.set((name, tiles))
    try:
        yield
    finally:
        _path.reset(token)


def current_backend() -> str:
    """The backend in force: the innermost `backend` block's, else TRITONSYM_BACKEND, else 'auto'."""
    name = _backend.get() or ENVIRONMENT
    if name not in BACKENDS:
        raise ValueError(f"TRITONSYM_BACKEND={name!r}: expected one of {', '.join(BACKENDS)}")
    return name


Switches = tuple[str, str | None, Tiles]


def switches() -> Switches:
    """What a plan depends on besides its problem and the tables: the backend, the forced path and its tiles."""
    return current_backend(), *_path.get()


def forget() -> None:
    """Drop all plans, and read the tables of measurements (`tuned`) again."""
    tuned.table.cache_clear()
    _plan.cache_clear()
    route.cache_clear()


# --- problems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What `plan` decides on. Multiply-adds are counted over the whole batch."""

    layer: str
    target: str  # 'cpu', 'cuda', 'cuda:1', or an architecture such as 'sm_90'
    dtype: str

    @property
    def dense(self) -> int:
        """Multiply-adds of the dense layer it replaces."""
        raise NotImplementedError

    @property
    def expanded(self) -> int:
        """Multiply-adds of the reference path."""
        return self.dense

    @property
    def has_kernel(self) -> bool:
        """Whether some Triton kernel computes the layer in this dtype."""
        return self.dtype in ITEMSIZE

    @property
    def key(self) -> str:
        """The row of `tuned`'s tables: what decides the speed, with varying sizes rounded to powers of two."""
        raise NotImplementedError

    def runs(self, path: str, tiles: Tiles) -> bool:
        """Whether these tiles fit the path's kernels."""
        try:
            return all(fits(*tile) for fits, tile in zip(self.rules()[path], tiles, strict=True))
        except (KeyError, TypeError, ValueError):
            return False

    def rules(self) -> dict[str, tuple[Callable[..., bool], ...]]:
        """For every path, one predicate per tile of its kernels: whether the tile fits."""
        return {"reference": ()}

    def tiles(self, path: str) -> Tiles:
        """Default tiles of the path's kernels: they fit, but were not measured."""
        raise NotImplementedError

    @property
    def where(self) -> tuple[int, str]:
        """Bytes of an operand and the architecture, as `kernels.tiles` takes them."""
        return ITEMSIZE.get(self.dtype, 2), architecture(self.target)


@dataclass(frozen=True)
class FixedProblem(Problem):
    """A layer that only the reference computes."""

    multiply_adds: int
    of_reference: int

    @property
    def dense(self) -> int:
        return self.multiply_adds

    @property
    def expanded(self) -> int:
        return self.of_reference

    @property
    def has_kernel(self) -> bool:
        return False


@dataclass(frozen=True)
class ConvProblem(Problem):
    """A convolution of x (batch, groups channels, *sizes).

    `dense_factor`: how many times as many filters as `spec` the dense layer has (orbit 'sum': one per image).
    """

    spec: ConvSpec
    batch: int
    channels: int
    sizes: tuple[int, ...]
    dense_factor: int = 1
    training: bool = False
    last: bool = False

    @cached_property
    def positions(self) -> int:
        return shift.positions(self.spec.geometry, (self.batch, self.channels, *self.sizes))

    @property
    def taps(self) -> int:
        return math.prod(self.spec.geometry.kernel_size)

    @property
    def expanded(self) -> int:
        return self.positions * self.taps * self.channels * self.spec.filters

    @property
    def dense(self) -> int:
        return self.expanded * self.dense_factor

    @property
    def can_shift(self) -> bool:
        return "complex" not in self.dtype

    @property
    def has_kernel(self) -> bool:
        return self.can_shift and self.dtype in ITEMSIZE

    @property
    def is_depthwise(self) -> bool:
        """One input channel per group: 'implicit_gemm' is `kernels.depthwise`, which only adds."""
        return self.channels == 1

    @cached_property
    def inner(self) -> bool:
        """Whether axes that no image moves stay inside the product of the shift path."""
        if self.target == "cpu":
            return self.positions >= shift.INSIDE[0] * self.taps
        geometry, blocks = self.spec.geometry, self.spec.blocks
        can = self.dtype in ("bfloat16", "float32") and self.spec.groups == 1 and not geometry.transposed
        can &= not any(geometry.extra) and not any(block.orbits for block in blocks) and self.has_kernel
        return can and shift_seconds(self, True) < shift_seconds(self, False)

    @cached_property
    def work(self) -> tuple[int, int, int]:
        """Multiply-adds, values of z and additions of the shift path."""
        return self.work_of(self.inner)

    @cached_property
    def patch(self) -> tuple[int, ...] | None:
        """The fused kernel's tile, or None if that kernel cannot compute the layer."""
        from tritonsym.kernels.tiles import pick_patch

        if not self.has_kernel or max(self.spec.geometry.stride) > 1 or self.is_depthwise:
            return None
        found = pick_patch(len(self.sizes), max(self.terms_of_blocks), self.channels, self.reach, *self.where)
        return None if found is None else astuple(found)

    @property
    def reach(self) -> tuple[int, ...]:
        """How far beyond its own positions a patch (H, W) of results reads."""
        g = self.spec.geometry
        return (0, *(d * (k - 1) for d, k in zip(g.dilation, g.kernel_size, strict=True)))[-2:]

    def work_of(self, inner: bool) -> tuple[int, int, int]:
        """`work`, with the axes that no image moves inside the product or not."""
        z, products, sums = shift.work(self.spec, inner, self.sizes)
        return self.batch * products * self.channels, self.batch * z, self.batch * sums

    @property
    def x(self) -> int:
        """Values of x."""
        return self.batch * self.spec.groups * self.channels * math.prod(self.sizes)

    @property
    def y(self) -> int:
        """Values of y."""
        return self.batch * self.spec.out_channels * math.prod(self.spec.geometry.out_sizes(self.sizes))

    @property
    def stored(self) -> int:
        """Stored weights."""
        return self.spec.groups * self.spec.rows * self.channels

    @property
    def terms(self) -> int:
        """Terms of all sums of the shift path."""
        return sum(self.terms_of_blocks)

    @property
    def terms_of_blocks(self) -> list[int]:
        return [sum(sign != 0 for *_, signs in images for sign in signs) for images in self.spec.slot_table]

    @property
    def outputs(self) -> int:
        """Output channels of a group: filters times images."""
        return self.spec.filters // self.spec.groups

    @property
    def key(self) -> str:
        """Positions count all groups and images; z is how often the stored rows are multiplied."""
        mode, pool = "training" if self.training else "inference", f" {self.spec.pool}" if self.spec.pool else ""
        return (
            f"conv{pool} {self.dtype} {mode} channels={self.channels} outputs={self.outputs} "
            f"filters={max(block.filters for block in self.spec.blocks)} taps={self.taps} stored={self.stored} "
            f"positions={_bucket(self.positions * self.spec.groups)} z={_bucket(self.work_of(False)[1])} "
            f"layout={'last' if self.last else 'first'}"
        )

    def rules(self) -> dict[str, tuple[Callable[..., bool], ...]]:
        from tritonsym.kernels.tiles import GemmTile, Patch, Tile, fits, fits_patch

        def fit(kind: type[Tile | GemmTile]) -> Callable[..., bool]:
            return lambda *numbers: fits(kind(*numbers), *self.where, taps=True)

        product = Tile if self.is_depthwise else GemmTile
        rules: dict[str, tuple[Callable[..., bool], ...]] = {
            "reference": (),
            "shift": (fit(Tile),) * 2,
            "implicit_gemm": (fit(product),) * 3,
        }
        if self.patch is not None:
            rules["fused"] = (lambda *n: fits_patch(Patch(*n), self.channels, self.reach, *self.where), fit(Tile))
        return rules

    def tiles(self, path: str) -> Tiles:
        """Tiles of shift_sum (or the fused kernel) and gather_sum, or of fprop, dgrad and wgrad."""
        from tritonsym.kernels import tiles

        filters = max(block.filters for block in self.spec.blocks)
        if path in ("shift", "fused"):
            to_y, to_d = (astuple(tiles.pick(filters, self.taps, adjoint)) for adjoint in (False, True))
            return (self.patch if path == "fused" and self.patch else to_y, to_d)
        if self.is_depthwise:
            return (astuple(tiles.pick_depthwise(self.spec.groups)),) * 3
        itemsize, target = self.where
        skip = 0 if itemsize == 2 and self.last else 1  # in float32, and of channels-first images, the widest spills
        narrow = 2 if itemsize == 4 and target not in tiles.WIDE_TARGETS else skip  # and the next one on older GPUs
        return tuple(
            astuple(tiles.pick_gemm(some, columns, length, itemsize, target))
            for some, columns, length in (
                (tiles.CONV_TILES[skip:], self.outputs, self.channels),
                (tiles.CONV_TILES[skip:], self.channels, self.outputs),
                (tiles.WEIGHT_TILES[narrow:], self.channels, 64),  # positions of an image: most have more
            )
        )


@dataclass(frozen=True)
class LinearProblem(Problem):
    """x S with x (rows, n) and a packed n x n matrix S."""

    n: int
    rows: int
    training: bool = False
    never_unpack: bool = False  # if the reference, which unpacks, is not allowed
    skew: bool = False  # S = -S^T

    @property
    def dense(self) -> int:
        return self.rows * self.n * self.n

    @property
    def of_kernel(self) -> int:
        """Multiply-adds of the kernel."""
        return self.dense

    @property
    def of_blocks(self) -> int:
        return self.rows * blocks.product_work(self.n - self.skew)

    def blocks_pay(self) -> tuple[bool, str]:
        """Whether blocks are faster on the CPU than to unpack, and a reason."""
        if 2 * self.rows > self.n - PACKED_FROM:
            return False, "Of a small matrix, or for many rows, it costs little to unpack in the call."
        return True, "The packed matrix is read once, by blocks, and never unpacked."

    @property
    def key(self) -> str:
        """Rows are rounded up to a power of two, where the kernel's strips end."""
        mode = "training" if self.training else "inference"
        rows = 1 << max(self.rows - 1, 0).bit_length()
        return f"{self.layer} {self.dtype} {mode} n={self.n} rows={rows}" + " packed" * self.never_unpack

    def tiles(self, path: str) -> Tiles:
        """Tiles of the product and of the gradient."""
        from tritonsym.kernels.tiles import pick_product, pick_square

        return astuple(pick_product(self.rows, *self.where)), astuple(pick_square(*self.where))

    def rules(self) -> dict[str, tuple[Callable[..., bool], ...]]:
        from tritonsym.kernels.tiles import GemmTile, fits_product, fits_square

        return {
            "reference": (),
            "blocks": (),
            "implicit_gemm": (
                lambda *numbers: fits_product(GemmTile(*numbers), self.rows, *self.where),
                lambda *numbers: fits_square(GemmTile(*numbers), *self.where),
            ),
        }

    def compare(self) -> tuple[bool, str]:
        """Whether the kernel is estimated to be faster than the reference on a GPU, and a reason.

        Unpacking is 8 launches that move 5.5 n^2 values.
        """
        from tritonsym.kernels.tiles import SEGMENT_STEPS, STRIP_ROWS, pick_product

        n, rows = self.n, self.rows
        if self.skew:
            return False, "There is no estimate for skew-symmetric matrices, whose packed rows are not aligned"
        if n <= SMALL_N:
            return False, f"Up to n = {SMALL_N} the vendor library multiplies, by the unpacked matrix"
        if n % 16:
            return False, f"n = {n} is not a multiple of 16, so the packed rows are not aligned"
        tile, device = pick_product(rows, 2, architecture(self.target)), device_of(self.target)
        flops, moved = 2 * rows * n * n, n * n + 4 * rows * n
        product = LAUNCH + max((moved + n * n) / device.memory, flops / device.gemm)
        if rows > STRIP_ROWS:
            kernel = LAUNCH + max(
                moved / device.memory, 2 * n * n / device.cache, flops / (TILES_OF_VENDOR * device.gemm)
            )
        else:
            partial = 4 * rows * n * (n / (2 * tile.block_m) + 0.75 * n / (2 * SEGMENT_STEPS * tile.block_k))
            arithmetic = 2 * tile.block_n * n * n / (STRIPS_OF_VENDOR * device.gemm)
            traffic = max(moved / device.memory, (moved + partial) / device.cache, arithmetic)
            kernel = 2 * LAUNCH + partial / device.cache + traffic
        unpacked = product + 8 * LAUNCH + 11 * n * n / device.memory
        words = f"{unpacked / kernel:.2g}x the speed of unpacking first, {product / kernel:.2g}x that of a dense layer"
        return unpacked > MARGIN * kernel, f"The packed kernel would have {words}"


@dataclass(frozen=True)
class GramProblem(Problem):
    """X X^T for a batch of matrices X (n, k)."""

    n: int
    k: int
    batch: int
    never_unpack = False

    @property
    def dense(self) -> int:
        return self.batch * self.n * self.n * self.k

    @property
    def of_kernel(self) -> int:
        """Multiply-adds of the kernel."""
        return self.batch * self.n * (self.n + 1) * self.k // 2

    @property
    def of_blocks(self) -> int:
        return self.batch * self.k * blocks.gram_work(self.n)

    def blocks_pay(self) -> tuple[bool, str]:
        """Whether blocks are faster on the CPU than the whole product, and a reason."""
        if self.n < HALF_FROM:
            return False, f"Below n = {HALF_FROM} the whole product is fastest."
        return True, f"{self.dense / max(self.of_blocks, 1):.2g}x fewer multiply-adds, by blocks of one triangle."

    @property
    def key(self) -> str:
        return f"gram {self.dtype} n={self.n} k={self.k} batch={_bucket(self.batch)}"

    def tiles(self, path: str) -> Tiles:
        from tritonsym.kernels.tiles import pick_square

        return (astuple(pick_square(*self.where)),)

    def rules(self) -> dict[str, tuple[Callable[..., bool], ...]]:
        from tritonsym.kernels.tiles import GemmTile, fits_square

        return {
            "reference": (),
            "blocks": (),
            "implicit_gemm": (lambda *numbers: fits_square(GemmTile(*numbers), *self.where),),
        }

    def compare(self) -> tuple[bool, str]:
        """Whether the kernel is estimated to be faster than the reference on a GPU, and a reason."""
        from tritonsym.kernels.tiles import pick_square

        device = device_of(self.target)
        tile = pick_square(2, architecture(self.target))
        edge = -(-self.n // tile.block_m)
        waves = -(-self.batch * edge * (edge + 1) // 2 // device.processors)
        one = 2 * tile.block_m * tile.block_n * self.k * device.processors / (GRAM_OF_VENDOR * device.gemm)
        kernel, product = LAUNCH + waves * one, LAUNCH + 2 * self.dense / device.gemm
        return product > MARGIN * kernel, f"The kernel for half of it would have {product / kernel:.2g}x the speed"


@dataclass(frozen=True)
class GroupProblem(Problem):
    """A group convolution from `channels` to `filters` fields, of x (batch, |G| channels, *sizes); a linear layer if
    there are no sizes."""

    spec: fold.GroupSpec
    batch: int
    channels: int
    filters: int
    sizes: tuple[int, ...]
    training: bool = False

    @property
    def dense(self) -> int:
        geometry, fields = self.spec.geometry, self.channels * self.filters // self.spec.groups
        places = self.batch * math.prod(geometry.out_sizes(self.sizes))
        return places * math.prod(geometry.kernel_size) * self.spec.order**2 * fields

    @property
    def has_kernel(self) -> bool:
        return False

    def work(self, axes: int, rule: Rule) -> tuple[int, float]:
        """Multiply-adds with so many axes folded, and the cost by the rule."""
        one, fields = fold.fold(self.spec.text, axes, self.sizes), (self.channels, self.filters)
        products, values, additions = (self.batch * number for number in one.work(*fields))
        weight = one.weight_work(*fields)
        slower = 1 if one.is_flat else rule.grouped[self.training]
        cost = slower * products + rule.weight * weight + rule.addition * additions + rule.call
        return products + weight, cost + rule.value * (rule.flat if one.is_flat else 1) * values

    def plan(self, backend: str, forced: str | None) -> Plan:
        """Fold as many axes as cost least, or none."""
        most = len(self.spec.symmetry.mirrors)
        if forced not in (None, "reference", "fold") or (forced == "fold" and "complex" in self.dtype):
            raise ValueError(
                f"path {forced!r} is forced, but it cannot compute {self.layer} in {self.dtype}; remove the switch"
            )
        axes = 0
        on_cpu = self.target == "cpu"
        rule = (GROUP_SLOW_MKL if shift.mkl_is_slow() else GROUP_CPU) if on_cpu else GROUP_GPU
        dtypes = ["float32", *["float64"] * on_cpu, *["bfloat16"] * (on_cpu and not multiplies_bfloat16())]
        text = "" if on_cpu else " (estimate)"
        if forced or backend == "reference":
            axes = most if forced == "fold" and self.dense else 0
            why = "Forced by tritonsym.path." if forced else "Forced by the backend 'reference'."
        elif self.dense == 0:
            why = "There is nothing to multiply."
        elif self.dtype not in dtypes:
            why = f"The fold path is fast in {' and '.join(dtypes)} only, not in {self.dtype}."
        elif on_cpu and not shift.is_fast():
            why = "The sums of the fold path are slow in this build of torch."
        else:
            costs = [(float(self.dense), 0)]
            for number in range(1, most + 1):
                if fold.fold(self.spec.text, number, self.sizes).fits(self.spec.order * self.channels):
                    costs.append((self.work(number, rule)[1], number))
            _, axes = min(costs)
            why = f"Sums along mirrored axes would cost more than they save{text}."
        products, cost = self.work(axes, rule) if axes else (self.dense, 0)
        if axes and not forced:
            why = (
                f"Characters of {axes} mirror{'s' * (axes > 1)}: {self.dense / products:.3g}x fewer multiply-adds, "
                f"which save {(self.dense - products) / (cost - products):.2g}x what their sums cost{text}."
            )
        return Plan(self, "fold" if axes else "reference", 2 * products, 2 * self.dense, why, axes=axes)


def _bucket(number: int) -> int:
    """The power of two nearest on a logarithmic scale."""
    return 0 if number == 0 else 1 << (number * number).bit_length() // 2


def linear_problem(
    shape: Sequence[int],
    target: str,
    dtype: str,
    never_unpack: bool = False,
    training: bool = False,
    skew: bool = False,
) -> LinearProblem:
    """The problem of x S with x of this shape."""
    layer, (*batch, n) = "SkewLinear" if skew else "SymmetricLinear", shape
    return LinearProblem(layer, target, dtype, n, math.prod(batch), training, never_unpack, skew)


def gram_problem(shape: Sequence[int], target: str, dtype: str) -> GramProblem:
    """The problem of X X^T with X of this shape."""
    *batch, n, k = shape
    return GramProblem("gram", target, dtype, n, k, math.prod(batch))


# --- devices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Datasheet numbers of a GPU: FLOP/s of dense 16-bit and tf32 products, bytes per second of memory, and the number
    of multiprocessors."""

    target: str
    half: float
    tf32: float
    peak_memory: float
    processors: int
    l1: float  # bytes per second of all first-level caches
    sums: float  # FLOP/s without tensor cores, at 6 instructions per multiply-add, as compiled kernels take

    @property
    def gemm(self) -> float:
        """What a vendor's product is assumed to reach: like all below, not measured here."""
        return 0.8 * self.half if self.target == "sm_90" else 0.7 * self.half

    @property
    def conv(self) -> float:
        return 0.66 * self.half

    @property
    def memory(self) -> float:
        return 0.9 * self.peak_memory

    @property
    def cache(self) -> float:
        """Bytes per second of the second-level cache."""
        return 1.25 * self.peak_memory


#: By a part of the device's name. The last GPU of an architecture stands for the others of it.
DEVICES = {
    "A100": Device("sm_80", 312e12, 156e12, 2.04e12, 108, 13e12, 3.2e12),
    "H100 80GB HBM3": Device("sm_90", 989e12, 494e12, 3.35e12, 132, 20e12, 10e12),
    "H200": Device("sm_90", 989e12, 494e12, 4.8e12, 132, 20e12, 10e12),
    "B200": Device("sm_100", 2250e12, 1125e12, 8e12, 148, 24e12, 12e12),
}
#: Seconds of a launch, and the speed of our kernels' products relative to the vendor's: estimates.
LAUNCH = 2.5e-6
TILES_OF_VENDOR, STRIPS_OF_VENDOR, GRAM_OF_VENDOR, IMPLICIT_OF_VENDOR = 0.85, 0.5, 0.75, 0.6
#: Instructions per term of a sum, read off the machine code (2 with 8 images, 3.5 with 2), and instructions that a
#: lane issues per second: three quarters of 1.755 GHz.
TERM, CLOCK = 2.7, 1.3e9
#: Instructions of the fused kernel per value of z and per term of a sum, at every position of a patch, read off the
#: machine code for bfloat16 on sm_90; the rate of its products with 16 columns, relative to the tensor cores'; and the
#: terms of a block above which it needs more registers than there are.
FUSED_VALUE, FUSED_TERM, FUSED_RATE, FUSED_TERMS = 7.5, 1.7, 0.5, 72
#: Up to this n launches decide, about which the estimates know least: the vendor's products are taken.
SMALL_N = 2048
#: The reference is taken unless the estimated speedup exceeds this, since nothing was measured.
MARGIN = 1.2


def target_of(x: Tensor) -> str:
    """The `Problem.target` of a tensor: 'cpu', or 'cuda:1', since the GPUs of a machine may differ."""
    device = x.device
    return str(device) if device.type == "cuda" else device.type


def architecture(target: str) -> str:
    """The architecture behind 'cuda' (the current GPU) or 'cuda:1', if that GPU is there."""
    if not target.startswith("cuda") or not torch.cuda.is_available():
        return target
    device = torch.cuda.get_device_properties(torch.device(target))
    if torch.version.hip:
        return str(device.gcnArchName).partition(":")[0]
    return f"sm_{device.major}{device.minor}"


def device_of(target: str) -> Device:
    """The numbers of the GPU that is there, or of the nearest older architecture; of an H200 for the interpreter."""
    if target.startswith("cuda") and torch.cuda.is_available():
        there = torch.cuda.get_device_name(torch.device(target))
        if named := [device for part, device in DEVICES.items() if part.split()[0] in there]:
            return named[0]
    name = architecture(target)
    capability = int(name[3:]) if name.startswith("sm_") else 90
    older = [d for d in DEVICES.values() if int(d.target[3:]) <= capability]
    return max(older or [DEVICES["A100"]], key=lambda d: (int(d.target[3:]), d.peak_memory))


def estimated_seconds(problem: ConvProblem) -> dict[str, float]:
    """Forward time of every path on a GPU, by a roofline model.

    Each step takes as long as its arithmetic or its traffic, whichever is longer, plus a launch. The vendor's
    depthwise convolution is taken to be as fast as our kernel, which then saves only the expansion of the weight.
    """
    device, itemsize = device_of(problem.target), ITEMSIZE[problem.dtype]
    x = problem.x
    weights = problem.spec.filters * problem.taps * problem.channels
    slower = 2 if itemsize == 4 and not problem.is_depthwise else 1  # tf32
    conv, terms = (device.sums, problem.expanded) if problem.is_depthwise else (device.conv, 0)

    def seconds(values: float, multiply_adds: float = 0, rate: float = conv, terms: float = 0) -> float:
        arithmetic = 2 * multiply_adds * slower / rate
        return max(values * itemsize / device.memory, arithmetic, terms * itemsize / device.l1) + LAUNCH

    rows = seconds(2 * problem.stored)
    dense = seconds(x + problem.y + weights, problem.expanded, conv, terms)
    ours = conv if problem.is_depthwise else IMPLICIT_OF_VENDOR * conv
    fused = {"fused": rows + fused_seconds(problem)} if problem.patch and problem.dtype == "bfloat16" else {}
    return fused | {
        "reference": rows + seconds(2 * weights) + dense,
        "shift": rows + shift_seconds(problem, problem.inner),
        "implicit_gemm": rows + seconds(x + problem.y + problem.stored, problem.expanded, ours, terms),
    }


def shift_seconds(problem: ConvProblem, inner: bool) -> float:
    """The product plus the sums: z (float32 if x is float16) is written to memory and read back once, and a term of a
    sum takes a load from L1 and `TERM` instructions. With `inner` the product is the vendor's convolution."""
    device, itemsize = device_of(problem.target), ITEMSIZE[problem.dtype]
    multiply_adds, z, additions = problem.work_of(inner)
    of_z = z * (4 if problem.dtype == "float16" else itemsize)
    rate = (device.conv if inner else device.gemm) / (2 if itemsize == 4 else 1)  # tf32
    product = max(((problem.x + problem.stored) * itemsize + of_z) / device.memory, 2 * multiply_adds / rate)
    issued = TERM * additions / (128 * device.processors * CLOCK)
    sums = max((problem.y * itemsize + of_z) / device.memory, additions * itemsize / device.l1, issued)
    return product + sums + 2 * LAUNCH


def fused_seconds(problem: ConvProblem) -> float:
    """The fused kernel in bfloat16. All positions of all patches are multiplied, once per tile of filters, and every
    tile reads its patch from the second-level cache; every value of z and every term takes instructions. Programs run
    in waves of one per multiprocessor."""
    from tritonsym.kernels.tiles import Patch, padded_channels

    device, spec = device_of(problem.target), problem.spec
    patch = Patch(*problem.patch or ())
    count = problem.batch * spec.groups * patch.count((1, *spec.geometry.out_sizes(problem.sizes))[-2:], problem.reach)
    tiles = [-(-block.filters // patch.block_u) for block in spec.blocks]
    values = sum(tile * spec.slots(block) for tile, block in zip(tiles, spec.blocks, strict=True))
    terms = sum(tile * number for tile, number in zip(tiles, problem.terms_of_blocks, strict=True))
    wave = device.processors
    positions = -(-count * sum(tiles) // wave) * wave / sum(tiles) * patch.positions
    multiply_adds = positions * patch.block_u * values * padded_channels(problem.channels)
    issued = positions * patch.block_u * (FUSED_VALUE * values + FUSED_TERM * terms)
    return LAUNCH + max(
        2 * (problem.x + problem.y + problem.stored) / device.memory,
        2 * positions * sum(tiles) * problem.channels / device.cache,
        2 * multiply_adds / (FUSED_RATE * device.half),
        issued / (128 * device.processors * CLOCK),
    )


# --- the rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What `fold` costs, in multiply-adds of the dense convolution.

    `value`: a value of its sums or products. `addition`, `call`: one of these. `grouped`: a multiply-add where axes
    stay inside the product, which is then a grouped convolution, in inference and in training. `weight`: a
    multiply-add of the transform of the weight. `flat`: how many times as much a value costs if the product is one of
    matrices."""

    value: float
    addition: float
    call: float = 0
    grouped: tuple[float, float] = (1.2, 1.2)
    weight: float = 1
    flat: float = 1


#: The cost of an addition of `shift` on the CPU, a block of filters, a multiply-add with axes inside, in multiply-adds
#: of the dense convolution; a row counts as `WIDTH` values or more. Fitted to perf/results/2026-11-25-cpu-rule.json by
#: least squares of log(time of the choice / time of the faster path), threefold where the reference is faster.
ADDITION, BLOCK, INSIDE, WIDTH = 5, 13e6, 1.5, 32
#: How many times as long torch's convolution takes per multiply-add if a batch is one volume
#: (perf/results/2026-11-25-cpu-volumes.json).
ONE_VOLUME = 4
#: The rules of group convolutions, fitted to perf/results/2026-11-25-cpu-fold.json and, where MKL is slow, to
#: perf/results/2026-11-26-cpu-fold-amd.json and -zen4.json; a choice slower than the reference counts tenfold. They
#: hold in float64, too, and in bfloat16, which is computed in float32, on CPUs without matrix instructions for it.
GROUP_CPU = Rule(50, 4)
GROUP_SLOW_MKL = Rule(50, 4, grouped=(1.2, 1.3), weight=3, flat=2)
#: An estimate: every value is written and read once, and there are about ten launches.
GROUP_GPU = Rule(900, 60, 1e10)
#: The kernel of the additions unrolls all terms of all sums: with more than this many it compiles for over 10 seconds
#: (sm_90, Triton 3.7, one core: 8 to 11 for the 196 to 216 terms of hv and c4 7x7, d4 5x5, hvz 3x3x3).
MOST_TERMS = 216
#: Blocks pay on the CPU for up to (n - PACKED_FROM) / 2 rows times a packed n x n matrix
#: (perf/results/2026-11-25-cpu-matrices-rule.json), and for symmetric n x n results from n = HALF_FROM on
#: (perf/results/2026-11-26-cpu-matrices.json).
PACKED_FROM, HALF_FROM = 256, 384
NEVER_UNPACKED = "Never unpacked: half of the memory, at any speed."


def _pays(problem: ConvProblem) -> tuple[str, str]:
    """'shift' or 'fused' where that is taken instead of the reference, else '', and why."""
    multiply_adds, z, additions = problem.work
    words = f"{problem.expanded / max(multiply_adds, 1):.3g}x fewer multiply-adds, {additions:,} additions"
    on_cpu = problem.target == "cpu"
    if on_cpu and problem.dtype not in ITEMSIZE:
        return "", f"The sums of the shift path ({words}) are slow in {problem.dtype}."
    if on_cpu and not shift.is_fast():
        return "", f"The sums of the shift path ({words}) are slow in this build of torch."
    if on_cpu and not (problem.last or problem.training) and z * 4 > problem.batch * shift.CHUNK_BYTES:
        return (
            "",
            f"The shift path ({words}) is slow for large contiguous images; channels-last ones it is fast for.",
        )
    if not on_cpu and problem.is_depthwise:
        return "", "The implicit_gemm kernel is no faster than the vendor's depthwise convolution (estimate)."
    if not on_cpu and not architecture(problem.target).startswith(("sm_", "cuda", "cpu")):
        return "", "No estimate for this GPU."
    if not on_cpu and problem.terms > MOST_TERMS:
        return "", f"The shift path ({words}) has too many terms to compile."
    if not on_cpu:
        seconds = estimated_seconds(problem)
        fits = max(problem.terms_of_blocks) <= FUSED_TERMS
        best = min(("shift", "fused")[: 1 + fits], key=lambda path: seconds.get(path, math.inf))
        speed = seconds["reference"] / seconds[best]
        why = f"The {best} path ({words}) would have {speed:.2g}x the reference's speed (estimate)."
        return best if speed > MARGIN else "", why
    wide = problem.batch * shift.work(problem.spec, problem.inner, problem.sizes, WIDTH)[2]
    slow = ONE_VOLUME if problem.batch == 1 and len(problem.sizes) == 3 else 1
    any_inside = any(any(p.inside) and not p.is_plain for p in shift.parts(problem.spec, problem.inner))
    saved = slow * problem.expanded - (INSIDE if any_inside else 1) * multiply_adds
    cost = ADDITION * wide + BLOCK * len(problem.spec.blocks)
    if saved <= cost:
        return "", f"The shift path ({words}) saves less than its additions cost."
    return "shift", f"{words}: it saves {saved / max(cost, 1):.2g}x what its additions cost."


@dataclass(frozen=True)
class Plan:
    """How a layer is computed; `str` is the plan in words. FLOPs: 2 x multiply-adds, of the whole batch.

    >>> found = tritonsym.explain(nn.SymmetricConv2d(64, 64, 3, symmetry="d4"), torch.ones(8, 64, 32, 32))
    >>> found.path, found.dense_flops > 7 * found.flops
    ('shift', True)
    """

    problem: Any
    path: str
    flops: int
    dense_flops: int
    why: str
    tiles: Tiles = ()  # of the path's kernels (`kernels.tiles`), if it has any
    inner: bool = False  # whether axes that no image moves stay inside the product of 'shift'
    axes: int = 0  # how many mirrors 'fold' folds

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


def plan(problem: Any) -> Plan:
    """Choose the path. It depends on the problem, the switches `backend`, `path` and TRITONSYM_BACKEND, the tables of
    measurements (`tuned`), which are read once, and the kind of CPU.

    Raises:
        ValueError: a path is forced on a layer that it cannot compute, or with tiles that do not fit.
        NotImplementedError: a layer must never unpack, but has to.
    """
    return _plan(problem, *switches())


def _runs_kernels(target: str) -> bool:
    return find_spec("triton") is not None and re.fullmatch(r"cpu|cuda(:\d+)?|sm_\d+|gfx\w+", target) is not None


def _no_kernel(problem: Problem) -> str:
    """Why no kernel computes this."""
    if problem.has_kernel:
        return "Triton is not installed." if find_spec("triton") is None else f"No kernel runs on {problem.target}."
    return f"No Triton kernel computes {problem.layer} in {problem.dtype}."


@lru_cache(maxsize=8192)
def _plan(problem: Any, backend: str, forced: str | None, forced_tiles: Tiles) -> Plan:
    if isinstance(problem, GroupProblem):
        return problem.plan(backend, forced)
    is_conv = isinstance(problem, ConvProblem)
    on_gpu = problem.target != "cpu"
    has_kernel = problem.has_kernel and _runs_kernels(problem.target)
    runs = has_kernel and (is_conv or on_gpu or backend == "triton")  # a convolution says so when it is called
    can = {
        "reference": True,
        "shift": is_conv and problem.can_shift,
        "implicit_gemm": runs,
        "fused": runs and is_conv and problem.patch is not None,
        "blocks": hasattr(problem, "of_blocks"),
        "fold": False,
    }
    if forced and not can[forced]:
        why = "" if forced in ("shift", "blocks", "fold") else f" ({_no_kernel(problem)})" if not has_kernel else ""
        if forced == "fused" and has_kernel and is_conv:
            why = " (its kernel is for 2 to 128 channels per group, stride 1, one or two axes, and a patch that fits)"
        hint = (
            "" if is_conv else " (with triton installed, tritonsym.backend('triton') runs kernels in its interpreter)"
        )
        where = "" if is_conv else f" on {problem.target}"
        raise ValueError(
            f"path {forced!r} is forced, but it cannot compute {problem.layer} in {problem.dtype}{where}{why}; "
            f"remove the switch{hint}"
        )
    if forced and forced_tiles and not problem.runs(forced, forced_tiles):
        raise ValueError(
            f"path {forced!r} is forced with tiles {forced_tiles}, which are not its or do not fit "
            f"{problem.dtype} on {problem.target}; Plan.tiles shows some that do"
        )
    never_unpack = not is_conv and getattr(problem, "never_unpack", False)
    has_table = runs if on_gpu else is_conv and backend == "auto" and not forced
    measured = tuned.find(problem) if has_table and backend != "reference" else None
    unwanted = ("reference",) * never_unpack + ("reference", "blocks") * (backend == "triton")
    if measured and measured[0] in unwanted:
        measured = None
    if is_conv and problem.expanded == 0:
        chosen, why = "reference", "There is nothing to multiply."
    elif forced is not None:
        chosen, why = forced, "Forced by tritonsym.path."
    elif backend == "reference":
        chosen, why = "reference", "Forced by the backend 'reference'."
    elif not runs and never_unpack:
        chosen, why = "blocks", NEVER_UNPACKED
    elif not has_kernel and (backend == "triton" or on_gpu or (not can["blocks"] and not is_conv)):
        chosen, why = "reference", _no_kernel(problem)
    elif not runs and not is_conv:
        pays, why = problem.blocks_pay()
        chosen = "blocks" if pays else "reference"
    elif measured:
        chosen, why = measured[0], f"Measured on {tuned.table_name(problem.target)}: the fastest path."
    elif is_conv:
        interpreted = backend == "triton" and not on_gpu
        pays, why = _pays(replace(problem, target="sm_90") if interpreted else problem)
        chosen = pays if pays and can[pays] else "implicit_gemm" if backend == "triton" else "reference"
        why = f"A kernel is forced by the backend 'triton'. {why}" if backend == "triton" else why
    elif backend == "triton":
        chosen, why = "implicit_gemm", "Forced by the backend 'triton'."
    elif never_unpack:
        chosen, why = "implicit_gemm", NEVER_UNPACKED
    elif architecture(problem.target) not in {device.target for device in DEVICES.values()}:
        chosen, why = (
            "reference",
            f"There is no estimate for {architecture(problem.target)}; backend='triton' uses the kernel.",
        )
    elif ITEMSIZE[problem.dtype] != 2:
        chosen, why = "reference", "The estimates know 16-bit dtypes only; backend='triton' uses the kernel."
    else:
        is_faster, why = problem.compare()
        chosen, why = "implicit_gemm" if is_faster else "reference", f"{why} (estimate)."
    if chosen == "reference":
        if never_unpack:
            raise cannot_stay_packed(f"{problem.dtype} tensors on {problem.target} under these switches")
        return Plan(problem, chosen, 2 * problem.expanded, 2 * problem.dense, why)
    tiles: Tiles = ()
    launches = chosen in ("implicit_gemm", "fused") or (
        chosen == "shift" and (backend == "triton" or (on_gpu and backend == "auto"))
    )
    if has_kernel and launches:
        tiles = forced_tiles or (measured[1] if measured and measured[0] == chosen else problem.tiles(chosen))
    if is_conv:
        multiply_adds = problem.work[0] if chosen in ("shift", "fused") else problem.expanded
    else:
        multiply_adds = problem.of_blocks if chosen == "blocks" else problem.of_kernel
    inner = is_conv and problem.inner and (on_gpu or not tiles)  # the CPU's rule is not for the interpreter
    return Plan(problem, chosen, 2 * multiply_adds, 2 * problem.dense, why, tiles, inner)


def cannot_stay_packed(what: str) -> NotImplementedError:
    """The error for never_unpack where only the reference, which unpacks, can compute the layer."""
    return NotImplementedError(
        f"SymmetricLinear: never_unpack=True, but {what} take the reference, which unpacks; remove the switch or the "
        "transform, or pass never_unpack=False"
    )


# --- calls ------------------------------------------------------------------------------------------------------------

Route = tuple[str, tuple[int, ...], bool]


def conv_problem(
    where: str,
    spec: str,
    shape: Sequence[int],
    weights: Sequence[Sequence[int]],
    bias: Sequence[int] | None,
    target: str,
    dtype: str,
    training: bool,
    last: bool,
    dense_factor: int = 1,
) -> ConvProblem:
    """The problem of a convolution of x (N, C, *sizes), checked: what a call and `explain` plan on.

    Raises:
        ValueError: the stored weights, x or the bias do not fit the spec.
    """
    conv = ConvSpec.of(spec)
    check(conv, where, shape, weights, bias)
    if conv.pool and "complex" in dtype:
        raise TypeError(f"{where}: reduce={conv.pool!r} needs real numbers, x is torch.{dtype}; use 'sum' or 'mean'")
    batch, channels, *sizes = shape
    return ConvProblem(
        where,
        target,
        dtype,
        conv,
        batch,
        channels // conv.groups,
        tuple(sizes),
        dense_factor,
        training,
        last,
    )


@lru_cache(maxsize=8192)
def route(problem: tuple[Any, ...], *switches: Any) -> Route:
    """The path for ``conv_problem(*problem)``, its tiles one after the other, and whether axes stay inside."""
    found = _plan(conv_problem(*problem), *switches)
    return found.path, tuple(number for tile in found.tiles for number in tile), found.inner


@constant
def traced_route(*problem: Any) -> Route:
    """`route` under the switches in force; a constant for compilers."""
    return route(problem, *switches())


@constant
def traced_open_route(where: str, spec: str, weights: Any, bias: Any, target: str, dtype: str, training: bool) -> Route:
    """The same with symbolic sizes: the backend instead of the path where the path depends on the sizes."""
    conv = ConvSpec.of(spec)
    channels = weights[0][0] if conv.geometry.transposed else weights[0][1] * conv.groups
    large = (
        256,
        channels,
        *(64 + d * k for d, k in zip(conv.geometry.dilation, conv.geometry.kernel_size, strict=True)),
    )
    backend, forced, tiles = switches()
    found = route((where, spec, large, weights, bias, target, dtype, training, True), backend, forced, tiles)
    return found if forced or found[0] == "reference" else (backend, (), False)


@constant
def matrix_route(kind: str, *problem: Any) -> tuple[str, Tiles]:
    """The path and its tiles for the 'linear' or 'gram' problem of these arguments."""
    found = plan(linear_problem(*problem) if kind == "linear" else gram_problem(*problem))
    return found.path, found.tiles


def computing_dtype(t: Tensor) -> torch.dtype:
    """The dtype of t, or the one that torch.autocast casts it to (never float64 or complex numbers)."""
    kind = t.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return t.dtype
    return torch.get_autocast_dtype(kind) if t.is_floating_point() and t.itemsize < 8 else t.dtype


def dtype_name(t: Tensor) -> str:
    """As in `Problem.dtype`: 'float32', ..."""
    return str(computing_dtype(t)).removeprefix("torch.")


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# --- explain ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelPlan(Sequence[tuple[str, Plan]]):
    """The plans of the layers of a model, by their names, in the order in which it calls them; `str` is a table."""

    layers: tuple[tuple[str, Plan], ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    @property
    def flops(self) -> int:
        return sum(plan.flops for _, plan in self)

    @property
    def dense_flops(self) -> int:
        return sum(plan.dense_flops for _, plan in self)

    def __str__(self) -> str:
        def cells(name: str, layer: str, path: str, flops: int, dense: int, why: str) -> tuple[str, ...]:
            ratio = f"{dense / flops:.3g}x" if flops else "-"
            return name, layer, path, f"{flops / 2e6:,.1f} M", f"{dense / 2e6:,.1f} M", ratio, why

        rows: list[tuple[str, ...]] = [("layer", "kind", "path", "multiply-adds", "dense", "saved", "why")]
        rows += [cells(n, p.problem.layer, p.path, p.flops, p.dense_flops, p.why) for n, p in self]
        rows.append(cells(f"total of {len(self)}", "", "", self.flops, self.dense_flops, ""))
        return "\n".join(aligned(rows, right=(3, 4, 5)))


def explain(module: nn.Module, x: Tensor, target: str | None = None) -> Any:
    """The plan for one layer, or for all layers of a model, on an input; print it to read it.

    It is the plan of a call in the same place: under ``torch.no_grad()`` that for inference. A model is copied and the
    copy runs once on x, so that no buffer changes.

    Args:
        module: a layer of `tritonsym.nn` with weights, or a model that calls some.
        x: an input; for a layer only its shape, dtype and device matter, so a meta tensor will do.
        target: plan for another device: 'cpu', 'cuda' or an architecture that is not there, such as 'sm_90'.
    Returns:
        A `Plan`, or for a model a `ModelPlan`: a sequence of (name, plan).
    Raises:
        TypeError: the module is not such a layer and calls none.
        ValueError: x does not fit the layer, or the target is unknown.
        NotImplementedError: the layer must never unpack its weight, but has to.

    >>> tritonsym.explain(nn.SymmetricConv2d(4, 4, 3, symmetry="h"), torch.ones(1, 4, 8, 8)).path
    'reference'
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"explain: x must be a torch.Tensor, got {type(x).__name__}")
    if target not in (None, "cpu", "cuda") and not re.fullmatch(r"sm_\d+|gfx\w+", str(target)):
        raise ValueError(f"explain: target must be 'cpu', 'cuda', 'sm_..' or 'gfx..', got {target!r}")
    if callable(getattr(module, "problem", None)):
        where = target or ("cpu" if x.device.type == "meta" else target_of(x))
        training = needs_gradient(x, *module.parameters())
        return plan(module.problem(x, where, training))  # type: ignore[operator]
    found: list[tuple[str, Plan]] = []
    if isinstance(module, nn.Module):
        model = copy.deepcopy(module)
        for name, layer in model.named_modules():
            if callable(getattr(layer, "problem", None)):
                layer.register_forward_pre_hook(
                    lambda layer, args, name=name: found.append((name, explain(layer, args[0], target)))
                )
        model(x)
    if not found:
        raise TypeError(
            "explain: expected a layer of tritonsym.nn with weights, or a model that calls some, "
            f"got {type(module).__name__}"
        )
    return ModelPlan(tuple(found))

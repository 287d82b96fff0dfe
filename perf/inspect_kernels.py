"""Compile every kernel ahead of time, for GPUs that need not be present, and print what the compiler made of it.

    python -m tritonsym.perf.inspect_kernels [--targets sm_90,gfx942]

Columns: registers per thread, spills and reloads, shared memory, machine instructions (sums: per term of a value;
products: of one step, per 1000 multiply-adds; depthwise: per multiply-add of one tap), tensor-core
instructions, widest load and store in bits, KiB of machine code. AMD targets only show that the kernel compiles.

Per cycle a multiprocessor of sm_90 does 2048 multiply-adds in 16 bits, and its 4 warps 128 instructions: a product that
takes more than 62 instructions per 1000 multiply-adds of a thread is bound by instructions.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler when triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonsym import launch
from tritonsym.kernels import conv as conv_kernels
from tritonsym.kernels import depthwise as depthwise_kernels
from tritonsym.kernels import fused as fused_kernels
from tritonsym.kernels import gram as gram_kernels
from tritonsym.kernels import shift as shift_kernels
from tritonsym.kernels import symm as symm_kernels
from tritonsym.kernels.tiles import (
    CONV_TILES,
    DEPTHWISE_TILES,
    GROUP,
    SEGMENT_STEPS,
    SQUARE_TILES,
    STRIP_TILES,
    WEIGHT_TILES,
    GemmTile,
    Patch,
    Tile,
    pick,
    pick_patch,
)
from tritonsym.perf.measure import tqdm
from tritonsym.spec import ConvSpec, Geometry, orbit_spec, pool_spec
from tritonsym.symmetry import FilterLayout, Symmetry

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")


@dataclass(frozen=True)
class Entry:
    """One kernel as shipped: its constants for a layer, with one tile."""

    name: str
    kernel: Any
    fixed: dict[str, Any]  # constexprs and integers that are known: strides of 1
    tile: Tile | GemmTile | Patch
    work: float  # per thread: terms of values, or thousands of multiply-adds of one step
    types: dict[str, str] = field(default_factory=dict)  # as in `compile_kernel`
    odd: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of it; counts that the target's tools do not report are None."""

    registers: int | None
    spills: int | None
    shared: int
    instructions: float | None
    tensor_cores: int | None
    load_bits: int | None
    store_bits: int | None
    code: int | None  # KiB of machine code


def layer(symmetry: str, kernel_size: tuple[int, ...], stored: int, pool: str | None = None) -> ConvSpec:
    """A convolution with `stored` stored filters and stride 1."""
    one, zero = (1,) * len(kernel_size), (0,) * len(kernel_size)
    geometry = Geometry(kernel_size, one, one, one, zero)
    if pool:
        return pool_spec(Symmetry(symmetry), pool, stored, 1, geometry)
    return orbit_spec(FilterLayout.from_stored(symmetry, stored), geometry)


def entries() -> Iterator[Entry]:
    """Every kernel: for layers with 64 stored filters, in every direction with every tile, and for matrices."""
    for symmetry, kernel_size, pool in (
        ("h", (3, 3), None),
        ("hv", (3, 3), None),
        ("hv", (3, 3), "max"),
        ("d4", (3, 3), None),
        ("c4", (5, 5), None),
        ("hvz", (3, 3, 3), None),
    ):
        spec = layer(symmetry, kernel_size, 64, pool)
        for adjoint in (False, True):
            tiles = dict.fromkeys(pick(filters, math.prod(kernel_size), adjoint) for filters in (64, 16))
            if not pool or not adjoint:  # the launcher makes the gradient of a pooled orbit channels-last
                yield _sums(spec, adjoint, next(iter(tiles)), channels_first=True)
            for tile in tiles:
                yield _sums(spec, adjoint, tile)
    for stored, adjoint in product((8, 12, 16, 24, 40, 48), (False, True)):
        yield _sums(layer("hv", (3, 3), stored), adjoint, pick(stored, 9, adjoint))
    for symmetry, kernel_size, pool in (
        ("h", (3, 3), None),
        ("hv", (3, 3), None),
        ("hv", (3, 3), "max"),
        ("d4", (3, 3), None),
        ("c4", (5, 5), None),
        ("h", (3,), None),
    ):
        spec = layer(symmetry, kernel_size, 16, pool)
        of_block = len(spec.blocks[0].images) * math.prod(kernel_size)
        patch = pick_patch(len(kernel_size), of_block, 64, (0, 0), 2, "sm_90")
        yield from (_fused(spec, patch, channels_first) for channels_first in (False, True))
    for channels_first in (False, True):  # the widest tiles are for channels-last only
        for name, tile in product(("y", "dx"), CONV_TILES[channels_first:]):
            yield _gemm(name, tile, channels_first)
        for tile in WEIGHT_TILES[channels_first:]:
            yield _gemm("dw", tile, channels_first)
    for tile in DEPTHWISE_TILES:
        for name in ("y", "dx", "dw"):
            for channels_first in (False, True) if tile.block_u > 1 else (True,):
                yield _gemm(name, tile, channels_first)
    yield from _matrices()


def _title(name: str, sizes: dict[str, int], channels_first: bool = False) -> str:
    return f"{name} {'x'.join(map(str, sizes.values()))}{' NCHW' if channels_first else ''}"


def _image(channels: int, axes: int, channels_first: bool = False) -> torch.Tensor:
    """An image of odd size, as the launchers see one."""
    x = torch.empty(2, channels, *(1,) * (3 - axes), *(19,) * axes, dtype=torch.bfloat16, device="meta")
    return x if channels_first else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _entry(
    title: str, prepared: Any, tile: Any, work: float, none: tuple[str, ...], types: dict[str, str] | None = None
) -> Entry:
    """The entry of a launch, with None for some tensors; no integer is taken to be divisible by 16."""
    kernel, fixed = prepared.kernel, prepared.fixed | dict.fromkeys(none)
    odd = tuple(name for name in kernel.arg_names if name not in fixed and not name.endswith("_ptr"))
    return Entry(title, kernel, fixed, tile, work, types or {}, odd)


def _sums(spec: ConvSpec, adjoint: bool, tile: Tile, channels_first: bool = False) -> Entry:
    """The sums of `shift`; `channels_first`: y or dy, while z and d never are."""
    (stage,) = launch.stages(spec, False)
    table, axes = stage.to_d if adjoint else stage.to_y, len(spec.geometry.kernel_size)
    y, z = _image(spec.out_channels, axes, channels_first), _image(stage.width, axes)
    prepared = shift_kernels.sums(*((y, z) if adjoint else (z, y)), table, tile)
    images = f"{len(spec.blocks[0].images)} images{' pooled' if spec.pool else ''}"
    filters = "" if (stored := spec.blocks[0].filters) == 64 else f" of {stored}"
    name = f"shift {'d' if adjoint else 'y'} {images}{filters} {axes}-D"
    work = sum(len(terms) for *_, terms in table.sums) * tile.block_p * tile.block_u / (32 * tile.warps)
    none = (("bias_ptr",) if adjoint else ()) + (() if spec.pool else ("winners_ptr",))
    return _entry(_title(name, tile.constants, channels_first), prepared, tile, work, none, {"winners_ptr": "*u8"})


def _fused(spec: ConvSpec, patch: Patch, channels_first: bool = False, channels: int = 64) -> Entry:
    """The fused kernel for x with `channels`; `channels_first`: x and y."""
    (stage,) = launch.stages(spec, False)
    table, axes = stage.to_y, len(spec.geometry.kernel_size)
    x, y = _image(channels, axes, channels_first), _image(spec.out_channels, axes, channels_first)
    prepared = fused_kernels.conv(x, (1, spec.rows, channels), y, table, patch, None, "tf32")
    images = f"{len(spec.blocks[0].images)} images{' pooled' if spec.pool else ''}"
    work = sum(len(terms) for *_, terms in table.sums) * patch.positions * patch.block_u / (32 * patch.warps)
    none = () if spec.pool else ("winners_ptr",)
    title = _title(f"fused y {images} {axes}-D", patch.constants, channels_first)
    return _entry(title, prepared, patch, work, none, {"winners_ptr": "*u8"})


def _gemm(name: str, tile: Any, channels_first: bool) -> Entry:
    """A 3x3 convolution with 64 channels or, with a `Tile`, a 7x7 one with one filter per group and 64 groups."""
    is_product, x = isinstance(tile, GemmTile), _image(64, 2, channels_first)
    grid = launch.grid(layer("hv", (3, 3) if is_product else (7, 7), 64).geometry)
    kernels: Any = conv_kernels if is_product else depthwise_kernels
    rows = (1, 9 * 16, 64) if is_product else (64, 49, 1)
    options = {"signed": False, "precision": "tf32"} if is_product else {}
    if name == "dw":
        images = [[0, 1] + [0] * 12]
        options |= {"transposed": False, "most_bytes": 1 << 20} | ({"align": 16} if is_product else {})
        prepared, _ = kernels.wgrad(x, x, images, rows, grid, tile, **options)
    elif name == "dx":
        prepared = kernels.dgrad(x, rows, x, grid.reversed, tile, **{"signed": False, **options})
    else:
        prepared = kernels.fprop(x, rows, x, grid, tile, **{"signed": False, **options})
    types = {"table_ptr": "*i32", "images_ptr": "*i32", "workspace_ptr": "*fp32"}
    title = _title(f"{'implicit_gemm' if is_product else 'depthwise'} {name}", tile.constants, channels_first)
    return _entry(title, prepared, tile, _work(tile), ("bias_ptr",) if name == "dx" else (), types)


def _work(tile: Any) -> float:
    """Multiply-adds of one step or tap per thread; for a product, in thousands."""
    return math.prod(tile.constants.values()) / (32 * tile.warps) / (1000 if isinstance(tile, GemmTile) else 1)


def matrix_constants(kernel: Any, tile: GemmTile, of_float32: str = "ieee") -> dict[str, Any]:
    """The constexprs of a kernel for symmetric matrices of even n (except `_sum_kernel`), with a shipped tile."""
    precision = {"PRECISION": of_float32}
    if kernel is symm_kernels._strips_kernel:
        shape = {"BLOCK_R": tile.block_m, "BLOCK_B": tile.block_n, "BLOCK_C": tile.block_k}
        return precision | shape | {"SEGMENT": SEGMENT_STEPS * tile.block_k, "EVEN": 1, "SKEW": 0}
    fixed = precision | {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    if kernel is gram_kernels._gram_kernel:
        return fixed | {"HAS_A": True, "GROUP": GROUP}
    if kernel is symm_kernels._product_kernel:
        fixed |= {"BLOCK_N": tile.block_n, "GROUP": GROUP, "HAS_BIAS": True, "ACTIVATION": "gelu"}
    return fixed | {"EVEN": 1, "SKEW": 0}


def _matrices() -> Iterator[Entry]:
    square, strip = SQUARE_TILES[2][0], STRIP_TILES[2][0]
    for name, kernel, tile, unit in (
        ("gram", gram_kernels._gram_kernel, square, ("x_k", "a_n")),
        ("symm y by tiles", symm_kernels._product_kernel, square, ("x_k",)),
        ("symm y by strips", symm_kernels._strips_kernel, strip, ("x_k",)),
        ("symm dS", symm_kernels._gradient_kernel, square, ("x_k", "dy_k")),
    ):
        fixed = matrix_constants(kernel, tile) | dict.fromkeys(unit, 1)
        types = {"alpha": "fp32", "beta": "fp32", "partial_ptr": "*fp32"}
        yield Entry(_title(name, tile.constants), kernel, fixed, tile, _work(tile), types)


def compile_kernel(
    kernel: Any,
    fixed: dict[str, Any],
    tile: Tile | GemmTile | Patch,
    target: str,
    dtype: str = "bf16",
    types: dict[str, str] | None = None,
    odd: tuple[str, ...] = (),
) -> Any:
    """The kernel compiled ahead of time, for tensors aligned to 16 bytes and integers that 16 divides, except `odd`.

    `types`: those of arguments that are neither 32-bit integers nor, if named _ptr, pointers to `dtype`.
    """
    names = kernel.arg_names
    kinds = {name: (types or {}).get(name) or (f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}
    aligned = [n for n in names if n not in fixed and n not in odd and kinds[n] != "fp32"]
    source = ASTSource(
        kernel,
        kinds | dict.fromkeys(fixed, "constexpr"),
        {(names.index(n),): value for n, value in fixed.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=TARGETS[target], options=tile.options)


def compile_entry(entry: Entry, target: str) -> Any:
    return compile_kernel(entry.kernel, entry.fixed, entry.tile, target, types=entry.types, odd=entry.odd)


def machine_code(kernel: Any) -> tuple[str, str]:
    """Resource usage and disassembly of a kernel for an NVIDIA target."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, code


def step_length(code: str) -> int:
    """Instructions of the longest loop that holds a tensor-core instruction and no other such loop."""
    places = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)]
    back = [(int(to[1], 16), at) for at, text in places if (to := re.search(r"\bBRA\b.*(0x[0-9a-f]+)", text))]
    products = [at for at, text in places if re.search(rf"\b({'|'.join(TENSOR_CORES)})\b", text)]
    loops = [(low, high) for low, high in back if any(low <= at <= high for at in products)]
    steps = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops if (a, b) != (c, d))]
    return max((sum(low <= at <= high for at, _ in places) for low, high in steps), default=len(places))


def instructions(code: str) -> list[tuple[str, str]]:
    """Name and modifiers of every instruction."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)((?:\.[A-Z0-9_]+)*)", code, re.M)


def bits(modifiers: str) -> int:
    """Width of a load or store."""
    for width in (128, 64):
        if f".{width}" in modifiers:
            return width
    return 16 if ".U16" in modifiers or ".S16" in modifiers else 32


def inspect(kernel: Any, work: float) -> Compiled:
    """Read registers, spills and instructions from the machine code."""
    if "cubin" not in kernel.asm:
        return Compiled(None, None, kernel.metadata.shared, None, None, None, None, None)
    usage, code = machine_code(kernel)
    found = instructions(code)
    count = Counter(name for name, _ in found)

    tensor_cores = sum(count[name] for name in TENSOR_CORES)

    def widest(operation: tuple[str, ...]) -> int:
        return max((bits(suffix) for name, suffix in found if name in operation), default=0)

    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=count["LDL"] + count["STL"],
        shared=kernel.metadata.shared,
        instructions=(step_length(code) if tensor_cores else sum(count.values())) / work,
        tensor_cores=tensor_cores,
        load_bits=widest(("LDG", "LDGSTS")),
        store_bits=widest(("STG",)),
        code=-(-sum(count.values()) // 64),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonsym.perf.inspect_kernels", description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of: " + ", ".join(TARGETS))
    args = parser.parse_args(argv)
    unknown = [name for name in args.targets.split(",") if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}; known: {', '.join(TARGETS)}")
    work = [(name, entry) for name in args.targets.split(",") for entry in entries()]
    columns = ("regs", "spills", "shared", "instr", "mma", "load", "store", "KiB")
    print(f"{'target':8} {'kernel':37} " + " ".join(f"{name:>6}" for name in columns))
    for name, entry in tqdm(work, disable=not sys.stderr.isatty()):
        found = inspect(compile_entry(entry, name), entry.work)
        shown = [
            "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
            for value in astuple(found)
        ]
        tqdm.write(f"{name:8} {entry.name:37} " + " ".join(f"{text:>6}" for text in shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile every kernel ahead of time, for GPUs that need not be there, and print what the compiler made of it.

    python -m tritonsym.perf.inspect_kernels [--targets sm_90,gfx942]

Columns: registers per thread, spilled bytes, shared memory, machine instructions per (output, term), widest load and
store in bits. AMD targets only show that the kernel compiles.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler when triton is imported

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonsym import shift
from tritonsym.kernels.shift import Table, _add_kernel, constants
from tritonsym.kernels.tiles import TILES, Tile
from tritonsym.symmetry import FilterLayout

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Entry:
    """One kernel as shipped: a layer's additions with one tile."""

    name: str
    table: Table
    channels: tuple[int, int]  # per group, of source and target
    tile: Tile


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of it; counts that the target's tools do not tell are None."""

    registers: int | None
    spills: int | None
    shared: int
    instructions_per_term: float | None
    load_bits: int | None
    store_bits: int | None


def entries() -> Iterator[Entry]:
    """The additions of layers with 64 stored filters: both directions, every tile."""
    cases = [("h", (3, 3)), ("hv", (3, 3)), ("d4", (3, 3)), ("hvz", (3, 3, 3))]
    for symmetry, kernel_size in cases:
        layout = FilterLayout.parse(symmetry, 64 * 2 ** (3 if symmetry in ("d4", "hvz") else len(symmetry)))
        one = (1,) * len(kernel_size)
        geometry = shift.Geometry(kernel_size, one, one, one)
        _, additions = shift.schedule(layout.blocks(kernel_size), geometry, (8,) * len(kernel_size))
        for direction, plan in (("forward", additions), ("adjoint", additions.adjoint)):
            channels = (plan.sources[0][0], plan.targets[0][0])
            for tile in TILES:
                name = f"{symmetry} {direction} {tile.block_p}x{tile.block_u}"
                yield Entry(name, Table(*shift._table(plan.text, 0)), channels, tile)


def compile_entry(entry: Entry, target: GPUTarget, dtype: str = "bf16") -> Any:
    """The compiled kernel, for tensors aligned to 16 bytes with channels that are a multiple of 16."""
    fixed = constants(entry.table, *entry.channels, entry.tile)
    fixed |= {"source_c": 1, "target_c": 1}  # channels-last
    names = _add_kernel.arg_names
    signature = {
        name: "constexpr" if name in fixed else f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names
    }
    # sizes of an image are odd more often than not; strides of an aligned tensor are multiples of 16
    aligned = [n for n in names if n not in fixed and (n.endswith("_ptr") or "_" in n)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(_add_kernel, signature, {(names.index(n),): v for n, v in fixed.items()}, attributes)
    return triton.compile(source, target=target, options={"num_warps": entry.tile.warps})


def inspect(kernel: Any, terms: int, tile: Tile) -> Compiled:
    """Read registers, spills and instructions from the machine code."""
    if "cubin" not in kernel.asm:
        return Compiled(None, None, kernel.metadata.shared, None, None, None)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)((?:\.[A-Z0-9_]+)*)", code, re.M)
    count = Counter(name for name, _ in found)
    per_thread = tile.block_p * tile.block_u / (32 * tile.warps)

    def widest(operation: str) -> int:
        return max((_bits(suffix) for name, suffix in found if name == operation), default=0)

    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=count["LDL"] + count["STL"],
        shared=kernel.metadata.shared,
        instructions_per_term=sum(count.values()) / (terms * per_thread),
        load_bits=widest("LDG"),
        store_bits=widest("STG"),
    )


def _bits(suffix: str) -> int:
    for width in (128, 64):
        if f".{width}" in suffix:
            return width
    return 16 if ".U16" in suffix or ".S16" in suffix else 32


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonsym.perf.inspect_kernels", description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of: " + ", ".join(TARGETS))
    args = parser.parse_args(argv)
    unknown = [name for name in args.targets.split(",") if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}; known: {', '.join(TARGETS)}")
    work = [(name, entry) for name in args.targets.split(",") for entry in entries()]
    print("target   additions                         regs spills  shared instr/term  load store")
    for name, entry in tqdm(work, disable=not sys.stderr.isatty()):
        found = inspect(compile_entry(entry, TARGETS[name]), sum(map(len, entry.table.terms)), entry.tile)
        shown = [
            "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
            for value in (
                found.registers,
                found.spills,
                found.shared,
                found.instructions_per_term,
                found.load_bits,
                found.store_bits,
            )
        ]
        widths = (5, 6, 7, 10, 5, 5)
        cells = " ".join(f"{text:>{width}}" for text, width in zip(shown, widths, strict=True))
        tqdm.write(f"{name:8} {entry.name:32} {cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

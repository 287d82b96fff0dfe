"""Print the README's tables from the JSON files of `tritonsym.perf.bench`.

python -m tritonsym.perf.table perf/results/2026-11-20-cpu.json [--write README.md]

`--write` replaces what stands between ``<!-- table -->`` and ``<!-- /table -->`` in that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def table(result: dict[str, Any], name: str) -> str:
    """One line per shape, one column per symmetry: forward as 'auto' runs it, training on the shift path if forced."""
    rows = {(row["case"], row["mode"]): row for row in result["rows"]}
    shapes: dict[str, list[str]] = {}
    for case, mode in rows:
        if mode == "forward":
            shape, _, symmetry = case.rpartition("-")
            shapes.setdefault(shape, []).append(symmetry)
    symmetries = ("h", "hv", "d4")
    shapes = {shape: found for shape, found in shapes.items() if found == list(symmetries)}
    heading = " | ".join(f"`{symmetry}`" for symmetry in symmetries)
    lines = [
        f"| input | {heading} | {heading} |",
        "|---|" + "---|" * (2 * len(symmetries)),
    ]
    for shape in shapes:
        forward = [_forward(rows[f"{shape}-{symmetry}", "forward"]) for symmetry in symmetries]
        training = [f"{rows[f'{shape}-{symmetry}', 'training']['speedup']['shift']:.2f}" for symmetry in symmetries]
        batch, channels, size = shape.split("-")
        label = f"{batch[1:]} x {channels[1:]} x {size}"
        lines.append(f"| {label} | {' | '.join(forward)} | {' | '.join(training)} |")
    return "\n".join(
        [
            f"Times of the dense layer (weight expanded beforehand) over ours: {result['device']}, {result['threads']} "
            f"threads, float32, torch {result['torch']}, 3x3 convolutions with as many outputs as inputs, the better "
            "memory format for each. Left: inference as it runs by default, *in italics where that is the expanded "
            "convolution*. Right: a training step under `tritonsym.path('shift')`, which is not the default.",
            "",
            *lines,
            "",
            f"Raw samples and more layers: `{name}`, made by `{' '.join(result['command'])}`.",
        ]
    )


def _forward(row: dict[str, Any]) -> str:
    text = f"{row['speedup']['auto']:.2f}"
    return text if row["plan"] == "shift" else f"*{text}*"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonsym.perf.table", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", type=Path, help="the file whose table to replace")
    args = parser.parse_args(argv)
    text = table(json.loads(args.results.read_text()), args.results.as_posix())
    if args.write is None:
        print(text)
        return 0
    head, rest = args.write.read_text().split("<!-- table -->")
    _, tail = rest.split("<!-- /table -->")
    args.write.write_text(f"{head}<!-- table -->\n{text}\n<!-- /table -->{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

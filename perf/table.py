"""Print, or write into README.md, the tables of results and of estimates, and draw the plots.

    python -m tritonsym.perf.table perf/results/2026-11-22-cpu.json [--write README.md]

`--write` replaces what stands between ``<!-- table -->`` and ``<!-- /table -->`` in that file, and the same for
``estimate``. Plots go beside the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from tritonsym import costs
from tritonsym.perf.cases import GPU, peak


def table(result: dict[str, Any], name: str) -> str:
    """One line per shape, one column per symmetry: inference and a training step as 'auto' runs them."""
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
        cells = [
            _speedup(rows[f"{shape}-{symmetry}", mode]) for mode in ("forward", "training") for symmetry in symmetries
        ]
        lines.append(f"| {_label(shape)} | {' | '.join(cells)} |")
    return "\n".join(
        [
            f"Times of the dense layer (weight expanded beforehand) over ours: {result['device']}, {result['threads']} "
            f"threads, float32, torch {result['torch']}, 3x3 convolutions with as many outputs as inputs, the better "
            "memory format for each. Left: inference, right: a training step, both as they run by default; *in italics "
            "where that is the expanded convolution*.",
            "",
            *lines,
            "",
            f"Raw samples and more layers: `{name}`, made by `{' '.join(result['command'])}`.",
        ]
    )


def _speedup(row: dict[str, Any]) -> str:
    text = f"{row['speedup']['auto']:.2f}"
    return text if row["plan"] == "shift" else f"*{text}*"


def _label(shape: str) -> str:
    batch, channels, size = shape.split("-")
    return f"{batch[1:]} x {channels[1:]} x {size}"


def estimate() -> str:
    """Of the same layers on a GPU, by the model of `costs.estimated_seconds`: nothing of it was measured."""
    symmetries = ("h", "hv", "c4", "d4")
    lines: dict[str, list[str]] = {}
    for case in GPU:
        if case.kind in symmetries:
            with torch.device("meta"):
                problem = case.build().problem(case.shape, "sm_90", case.dtypes[0])  # type: ignore[operator]
            seconds = costs.estimated_seconds(problem)
            lines.setdefault(case.name.removesuffix(f"-{case.kind}"), []).append(
                f"{seconds['reference'] / seconds['shift']:.1f}"
            )
    return "\n".join(
        [
            "### Estimate for an H200, not measured",
            "",
            "Forward time of the dense convolution and of expanding its weight, over that of the shift path, bfloat16, "
            "by the roofline model of `costs.estimated_seconds`. Nothing in this table has run on a GPU.",
            "",
            f"| input | {' | '.join(f'`{symmetry}`' for symmetry in symmetries)} |",
            "|---|" + "---|" * len(symmetries),
            *(f"| {_label(shape)} | {' | '.join(ratios)} |" for shape, ratios in lines.items()),
        ]
    )


def plot(result: dict[str, Any], output: Path) -> list[Path]:
    """Draw OUTPUT-speedup.png, times of the dense layer over ours by channels, and OUTPUT-roofline.png."""
    from matplotlib.figure import Figure

    files = [output.with_name(f"{output.stem}-{name}.png") for name in ("speedup", "roofline")]
    rows = [row for row in result["rows"] if row["dtype"] == result["rows"][0]["dtype"]]
    modes = sorted({row["mode"] for row in rows})
    figure = Figure(figsize=(5 * len(modes), 4), layout="constrained")
    figure.suptitle(f"{result['device']}, torch {result['torch']}, {rows[0]['dtype']}", fontsize=9)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        for path, marker in {
            "reference": "x",
            "compiled": "+",
            "expand": "s",
            "shift": "o",
            "compiled-shift": "D",
        }.items():
            points = [
                (int(re.findall(r"-c(\d+)", row["case"])[0]), row["speedup"][path])
                for row in rows
                if row["mode"] == mode and path in row["speedup"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker, label=path, alpha=0.7)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set(xlabel="channels", ylabel="times as fast as dense", title=mode)
        axes.legend()
    figure.savefig(files[0], dpi=100)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    itemsize = 4 if rows[0]["dtype"] == "float32" else 2
    for path, marker in (("dense", "x"), ("auto", "o")):
        points = [
            (2 * row["useful_multiply_adds"] / (row["values"] * itemsize), row["rates"][path]["useful_tflops"])
            for row in rows
            if path in row["rates"]
        ]
        axes.plot(*zip(*points, strict=True), marker, label=path, alpha=0.7)
    if rates := peak(result["device"], rows[0]["dtype"]):
        intensity = [1, rates[0] / rates[1], 1e4]
        axes.plot(intensity, [1e-12 * min(rates[0], i * rates[1]) for i in intensity], "k-", label="roofline")
    axes.set(
        xscale="log", yscale="log", xlabel="useful FLOPs per byte", ylabel="useful TFLOP/s", title=result["device"]
    )
    axes.legend()
    figure.savefig(files[1], dpi=100)
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonsym.perf.table", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", type=Path, help="the file whose tables to replace")
    args = parser.parse_args(argv)
    result = json.loads(args.results.read_text())
    parts = {"table": table(result, args.results.as_posix()), "estimate": estimate()}
    if args.write is None:
        print(*parts.values(), sep="\n\n")
        return 0
    text = args.write.read_text()
    for name, part in parts.items():
        head, rest = text.split(f"<!-- {name} -->")
        _, tail = rest.split(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{part}\n<!-- /{name} -->{tail}"
    args.write.write_text(text)
    plot(result, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Print, or write into README.md, the tables of results and of estimates, and draw the plot.

    python -m tritonsym.perf.table perf/results/NAME.json [--one-thread perf/results/OTHER.json] [--write README.md]
        [--matrices perf/results/MATRICES.json]

`--write` replaces what stands between ``<!-- table -->`` and ``<!-- /table -->`` in that file, and the same for
``estimate``. The plot goes beside the results.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tritonsym import plan
from tritonsym.perf.bench import Row, load, speedups
from tritonsym.perf.cases import FUNCTIONS, GPU, MEANT, SYMMETRIES, shape_and_kind

MODES = ("forward", "training")


def _markdown(*rows: Sequence[str]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _format(row: Row) -> str:
    """Channels-last where torch has it."""
    return [*row["plan"]][-1]


def _cell(row: Row | None) -> str:
    """Speedup of 'auto'; in italics where that is the reference."""
    if row is None or (speed := speedups(row).get(f"auto {_format(row)}")) is None:
        return "-"
    return f"*{speed:.2f}*" if row["plan"][_format(row)] == "reference" else f"{speed:.2f}"


def means(rows: Iterable[Row], variant: str) -> list[str]:
    """Geometric means over README's inputs of the speedups of a variant ('auto channels_last'): for every symmetry and
    over all, inference and training."""
    cells, rows = [], list(rows)
    for mode in MODES:
        for symmetries in (*([s] for s in SYMMETRIES), SYMMETRIES):
            chosen = [
                speedups(row).get(variant)
                for row in rows
                if row["mode"] == mode and row["case"] in MEANT and shape_and_kind(row["case"])[1] in symmetries
            ]
            known = [speed for speed in chosen if speed]
            cells.append(f"{statistics.geometric_mean(known):.2f}" if known else "-")
    return cells


def matrices(result: dict[str, Any], name: str) -> str:
    """Products with symmetric matrices by size, as 'auto' computes them."""
    found = {(row["case"], row["mode"]): row for row in result["rows"]}
    shapes = [(*map(int, re.findall(r"[nc](\d+)", case)[:2]), case.split("-", 2)[2]) for case, _ in found]
    sizes, batches = ({shape[i] for shape in shapes if shape[2] == "linear"} for i in (1, 0))
    functions = list(dict.fromkeys(kind for *_, kind in shapes if kind in FUNCTIONS))
    columns = [(b, mode) for mode in MODES for b in sorted(batches)]
    return "\n".join(
        [
            f"Times of the dense product over ours: {result['device']}, {result['threads']} threads, float32, torch "
            f"{result['torch']}, medians; *in italics where it is unpacked, or computed whole*. `SymmetricLinear` for "
            "so many rows, inference and training:\n",
            _markdown(
                ["n", *(str(b) for b, _ in columns)],
                *(
                    [str(n), *(_cell(found.get((f"n{b}-c{n}-linear", mode))) for b, mode in columns)]
                    for n in sorted(sizes)
                ),
            ),
            "\nOf n x n matrices; a step of `newton_schulz` beside plain products and sums, not fused ones:\n",
            _markdown(
                ["n", *(f"`{kind}`" for kind in functions)],
                *(
                    [str(n), *(_cell(found.get((f"n{n}-c{n}-{kind}", "forward"))) for kind in functions)]
                    for n in sorted({n for _, n, kind in shapes if kind in FUNCTIONS})
                ),
            ),
            f"\nRaw samples: `{name}`, made by `{' '.join(result['command'])}`.",
        ]
    )


def table(result: dict[str, Any], name: str, one_thread: dict[str, Any] | None = None, other: str = "") -> str:
    """README's inputs by symmetry, means over them, and all other layers, as 'auto' computes them. `one_thread`: the
    results in the file `other`, of which only means are told."""
    rows: dict[tuple[str, str], Row] = {}
    shapes: dict[str, list[tuple[str, str]]] = {}
    for row in result["rows"]:
        shape, kind = shape_and_kind(row["case"])
        shapes.setdefault(shape, []).append((kind, row["case"]))
        rows.setdefault((row["case"], row["mode"]), row)  # the first of several dtypes
    inputs = {shape: dict(found) for shape, found in shapes.items() if set(SYMMETRIES) <= dict(found).keys()}
    columns = [f"`{symmetry}`" for symmetry in SYMMETRIES]
    main = [
        [shape, *(_cell(rows.get((cases[symmetry], mode))) for mode in MODES for symmetry in SYMMETRIES)]
        for shape, cases in inputs.items()
    ]
    shown = {cases[symmetry] for cases in inputs.values() for symmetry in SYMMETRIES}
    more = []
    for case in dict.fromkeys(case for case, _ in rows if case not in shown):
        forward, (shape, kind) = rows[case, "forward"], shape_and_kind(case)
        dense = 1e3 * statistics.median(forward["seconds"][f"dense {_format(forward)}"])
        more.append([shape, f"`{kind}`", f"{dense:.2f}", *(_cell(rows.get((case, mode))) for mode in MODES)])
    forms = [("channels-last", "channels_last"), ("contiguous", "nchw")]
    ways = [(label, f"auto {form}") for label, form in forms]
    ways += [(f"`parametrize`, {label}", f"parametrize {form}") for label, form in forms]
    summary = [[label, *means(result["rows"], variant)] for label, variant in ways]
    if one_thread is not None:
        summary += [[f"{label}, one thread", *means(one_thread["rows"], variant)] for label, variant in ways[:2]]
    made = [f"`{name}`, made by `{' '.join(result['command'])}`"]
    made += [f"`{other}`, made by `{' '.join(one_thread['command'])}`"] if one_thread else []
    return "\n\n".join(
        [
            f"Times of the dense layer (weight expanded beforehand) over ours: {result['device']}, {result['threads']} "
            f"threads, {result['rows'][0]['dtype']}, torch {result['torch']}, 3x3 convolutions with as many outputs as "
            "inputs, channels-last, medians. Left: inference, right: a training step, both as they run by default; *in "
            "italics where that is the expanded convolution*.",
            _markdown(["input", *columns, *columns], *main),
            f"Geometric means over README's {len(MEANT) // len(SYMMETRIES)} inputs (all above but the one with 16 "
            "channels), inference and training. `parametrize`: torch's own way to tie weights, which expands them in "
            "every call.",
            _markdown(["", *[*columns, "all"] * 2], *summary),
            "More layers:",
            _markdown(["input", "layer", "dense, ms", "inference", "training"], *more),
            f"Raw samples: {'; '.join(made)}.",
        ]
    )


def groups(result: dict[str, Any], name: str) -> str:
    """Layers of equivariant networks, by input and symmetry."""
    rows, kinds = {(row["case"], row["mode"]): row for row in result["rows"]}, ("group-h", "group-hv", "group-d4")
    lines: dict[str, dict[str, list[str]]] = {}
    for case, _ in rows:
        shape, kind = shape_and_kind(case)
        lines.setdefault(shape, {})[kind] = [_cell(rows.get((case, mode))) for mode in MODES]
    main = [
        [shape, *(found.get(k, "--")[i] for i in (0, 1) for k in kinds)]
        for shape, found in lines.items()
        if kinds[0] in found
    ]
    more = [[shape, f"`{k}`", *c] for shape, found in lines.items() for k, c in found.items() if k not in kinds]
    columns = [f"`{kind.removeprefix('group-')}`" for kind in kinds]
    return "\n\n".join(
        [
            "Times of the dense convolution with as many channels (weight expanded beforehand) over those of "
            f"`GroupConv`: {result['device']}, {result['threads']} threads, {result['rows'][0]['dtype']}, torch "
            f"{result['torch']}, 3x3 kernels, channels-last, medians of few samples. Left: inference, right: training; "
            "*in italics where that is the expanded convolution*, which expands its weight in every call.",
            _markdown(["input", *columns, *columns], *main),
            _markdown(["input", "layer", "inference", "training"], *more),
            f"Raw samples: `{name}`, made by `{' '.join(result['command'])}`.",
        ]
    )


def estimate() -> str:
    """Of the same layers on a GPU, by the model of `plan.estimated_seconds`: nothing of it was measured."""
    symmetries = ("h", "hv", "c4", "d4")
    lines: dict[str, list[str]] = {}
    for case in GPU:
        if case.kind in symmetries:
            x = case.input(case.dtypes[0], "meta")["nchw"]
            seconds = plan.estimated_seconds(case.build(case.dtypes[0], "meta").problem(x, "sm_90", False))  # type: ignore[operator]
            cells = lines.setdefault(shape_and_kind(case.name)[0], [])
            cells.append(f"{seconds['reference'] / seconds['shift']:.1f}")
    return "\n\n".join(
        [
            "### Estimate for an H200, not measured",
            "Forward time of the dense convolution and of expanding its weight, over that of the shift path, bfloat16, "
            "by the roofline model of `plan.estimated_seconds`. Nothing in this table has run on a GPU.",
            _markdown(["input", *(f"`{s}`" for s in symmetries)], *([shape, *cells] for shape, cells in lines.items())),
        ]
    )


def plot(result: dict[str, Any], output: Path) -> Path:
    """Draw OUTPUT-speedup.png: times of the dense layer over those of 'auto', by channels."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["dtype"] == result["rows"][0]["dtype"]]
    kinds = dict.fromkeys(shape_and_kind(row["case"])[1] for row in rows)
    kinds = {kind: None for kind in kinds if kind in (*SYMMETRIES, "c4")} or kinds
    modes = sorted({row["mode"] for row in rows})
    figure = Figure(figsize=(5 * len(modes), 4), layout="constrained")
    figure.suptitle(f"{result['device']}, {result['threads']} threads, torch {result['torch']}", fontsize=9)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        for kind, marker in zip(kinds, "os^DvP*X" * len(kinds), strict=False):
            of_kind = [row for row in rows if row["mode"] == mode and shape_and_kind(row["case"])[1] == kind]
            speeds = [(row, speedups(row).get(f"auto {_format(row)}")) for row in of_kind]
            points = [(int(shape_and_kind(row["case"])[0].split(" x ")[1]), speed) for row, speed in speeds if speed]
            axes.plot(*zip(*points, strict=True), marker, label=kind, alpha=0.7) if points else None
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        title = "inference" if mode == "forward" else "training step"
        axes.set(xlabel="channels", ylabel="times as fast as dense", title=title)
        axes.legend()
    file = output.with_name(f"{output.stem}-speedup.png")
    figure.savefig(file, dpi=100)
    return file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonsym.perf.table", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--one-thread", type=Path, help="results of the same layers with one thread: adds their means")
    parser.add_argument("--groups", type=Path, help="results of the layers of equivariant networks: their table, too")
    parser.add_argument("--matrices", type=Path, help="results of matrices: their table, too")
    parser.add_argument("--write", type=Path, help="the file whose tables to replace")
    args = parser.parse_args(argv)
    result = load(args.results, parser)
    one = load(args.one_thread, parser) if args.one_thread else None
    text = table(result, args.results.as_posix(), one, args.one_thread.as_posix() if one else "")
    parts = {"table": text, "estimate": estimate()}
    if args.groups:
        parts["groups"] = groups(load(args.groups, parser), args.groups.as_posix())
    if args.matrices:
        parts["matrices"] = matrices(load(args.matrices, parser), args.matrices.as_posix())
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

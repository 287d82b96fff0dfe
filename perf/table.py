"""Write the tables of README.md and perf/results/README.md, the plot, and the figure of the symmetries.

    python -m tritonsym.perf.table [--root CHECKOUT]

Everything comes from the files in `RESULTS`, in perf/results of the checkout. To renew them, run the commands that they
hold, then this program. In README.md it replaces the text between ``<!-- measured -->`` and ``<!-- /measured -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tritonsym import plan
from tritonsym.perf import figure
from tritonsym.perf.bench import Row, load, speedups
from tritonsym.perf.cases import FUNCTIONS, GPU, INPUTS, MEANT, SYMMETRIES, shape_and_kind

FOLDER = Path("perf/results")
#: The sources of the tables: outputs of `python -m tritonsym bench`, by what they hold.
RESULTS = {
    "layers": "2026-11-26-cpu.json",
    "one thread": "2026-11-26-cpu-one-thread.json",
    "groups": "2026-11-26-groups.json",
    "matrices": "2026-11-26-cpu-matrices.json",
}
MODES = ("forward", "training")
#: Inputs of group convolutions, and sizes of matrices, that README shows.
GROUPS = ("8 x 64 x 32x32", "8 x 256 x 28x28", "2 x 1280 x 16x16")
MATRICES = ("512", "2048", "8192")
Results = dict[str, dict[str, Any]]


def _markdown(*rows: Sequence[str]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _format(row: Row) -> str:
    """The memory format that is shown: channels-last where torch has it."""
    return [*row["plan"]][-1]


def _cell(row: Row | None) -> str:
    """Speedup of 'auto'; in italics where that is the reference."""
    if row is None or (speed := speedups(row).get(f"auto {_format(row)}")) is None:
        return "-"
    return f"*{speed:.2f}*" if row["plan"][_format(row)] == "reference" else f"{speed:.2f}"


def means(rows: Iterable[Row], variant: str) -> list[str]:
    """Geometric means of the speedups of a variant ('auto channels_last') over README's inputs.

    Inference, then training: one mean for every symmetry and one over all.
    """
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


def _rows(result: dict[str, Any]) -> dict[tuple[str, str], Row]:
    """The rows by case and mode, of the first dtype if there are several."""
    rows: dict[tuple[str, str], Row] = {}
    for row in result["rows"]:
        rows.setdefault((row["case"], row["mode"]), row)
    return rows


def _by_symmetry(result: dict[str, Any], prefix: str = "") -> dict[str, list[str]]:
    """For every input that was measured under all symmetries, their cells: inference, then training."""
    rows, shapes = _rows(result), {}
    for case, _ in rows:
        shape, kind = shape_and_kind(case)
        shapes.setdefault(shape, {})[kind] = case
    kinds = [prefix + symmetry for symmetry in SYMMETRIES]
    return {
        shape: [_cell(rows.get((cases[kind], mode))) for mode in MODES for kind in kinds]
        for shape, cases in shapes.items()
        if {*kinds} <= {*cases}
    }


def _others(result: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Input, layer, milliseconds of the dense layer, and cells, for all cases that `_by_symmetry` leaves out."""
    rows, shown, lines = _rows(result), _by_symmetry(result, prefix), []
    for case in dict.fromkeys(case for case, _ in rows):
        forward, (shape, kind) = rows[case, "forward"], shape_and_kind(case)
        if shape not in shown or kind not in {prefix + symmetry for symmetry in SYMMETRIES}:
            dense = 1e3 * statistics.median(forward["seconds"][f"dense {_format(forward)}"])
            lines.append([shape, f"`{kind}`", f"{dense:.2f}", *(_cell(rows.get((case, mode))) for mode in MODES)])
    return lines


def _machine(result: dict[str, Any]) -> str:
    return f"{result['device']}, {result['threads']} threads, torch {result['torch']}, float32, medians"


COLUMNS = [f"`{symmetry}`" for symmetry in SYMMETRIES] * 2


def when(results: Results) -> str:
    """How much faster layers are than dense ones, by channels: from the slowest to the fastest cell."""
    bounds = ((0, 32), (64, 64), (128, 256), (257, 8192))

    def line(name: str, cells: dict[str, list[str]], columns: Sequence[int]) -> list[str]:
        line = [name]
        for least, most in bounds:
            chosen = [
                row[i] for shape, row in cells.items() if least <= int(shape.split(" x ")[1]) <= most for i in columns
            ]
            speeds = sorted(float(cell.strip("*")) for cell in chosen if cell != "-")
            line.append(f"{speeds[0]:.1f} to {speeds[-1]:.1f}" if speeds else "-")
        return line

    layers, groups = _by_symmetry(results["layers"]), _by_symmetry(results["groups"], "group-")
    lines = [line(f"convolution, `{s}`", layers, (i, i + 3)) for i, s in enumerate(SYMMETRIES)]
    lines += [line(f"`GroupConv`, `{s}`", groups, (i, i + 3)) for i, s in enumerate(SYMMETRIES)]
    return _markdown(["on a CPU, by channels", *("up to 32", "64", "128 to 256", "more")], *lines)


def _matrix_lines(result: dict[str, Any], batches: Sequence[int]) -> list[list[str]]:
    """By n: `SymmetricLinear` for these numbers of rows, inference and training, and the functions of matrices."""
    rows = _rows(result)
    sizes = {int(n) for case, _ in rows for n in re.findall(r"-c(\d+)", case)}
    linear = [(f"n{b}-c{{n}}-linear", mode) for mode in MODES for b in batches]
    columns = [*linear, *(("n{n}-c{n}-" + kind, "forward") for kind in FUNCTIONS)]
    return [[str(n), *(_cell(rows.get((case.format(n=n), mode))) for case, mode in columns)] for n in sorted(sizes)]


def _matrix_head(batches: Sequence[int]) -> list[str]:
    rows = [f"{b} row{'s' * (b > 1)}{', training' * (mode == MODES[1])}" for mode in MODES for b in batches]
    return ["n", f"`SymmetricLinear`, {rows[0]}", *rows[1:], *(f"`{kind}`" for kind in FUNCTIONS)]


def measured(results: Results) -> str:
    """The tables that README shows."""
    layers, groups = results["layers"], results["groups"]
    last, plain = (
        [cell for i, cell in enumerate(means(layers["rows"], f"auto {form}")) if i not in (3, 7)]
        for form in ("channels_last", "nchw")
    )
    one = [cell for i, cell in enumerate(means(results["one thread"]["rows"], "auto channels_last")) if i not in (3, 7)]
    number, least = len(INPUTS), min(channels for _, channels, _ in INPUTS)
    by_input, group = _by_symmetry(layers), _by_symmetry(groups, "group-")
    return "\n\n".join(
        [
            "How many times as fast as a dense layer, its weight expanded beforehand, from worst to best, then by "
            "input; inference left, training right; *in italics where a layer takes the expanded convolution*. 3x3 "
            f"kernels, channels-last; {_machine(layers)}. More, with the commands that made it: "
            f"[{FOLDER.as_posix()}]({FOLDER.as_posix()}/README.md).",
            when(results),
            _markdown(
                ["input", *COLUMNS],
                *([shape, *cells] for shape, cells in by_input.items() if int(shape.split(" x ")[1]) >= least),
                [f"mean of these {number}", *last],
                ["of contiguous images", *plain],
                ["with one thread", *one],
                *([f"`GroupConv`, {shape}", *group[shape]] for shape in GROUPS),
            ),
            _markdown(
                _matrix_head((1, 64)),
                *(line for line in _matrix_lines(results["matrices"], (1, 64)) if line[0] in MATRICES),
            ),
        ]
    )


def full(results: Results, files: dict[str, dict[str, Any]]) -> str:
    """perf/results/README.md: every table, and where it comes from. `files`: all results in that folder, by name."""
    layers, groups = results["layers"], results["groups"]
    forms = [("channels-last", "channels_last"), ("contiguous", "nchw")]
    ways = [(label, f"auto {form}") for label, form in forms]
    ways += [(f"`parametrize`, {label}", f"parametrize {form}") for label, form in forms]
    summary = [[label, *means(layers["rows"], variant)] for label, variant in ways]
    summary += [[f"{label}, one thread", *means(results["one thread"]["rows"], variant)] for label, variant in ways[:2]]
    batches = (1, 4, 16, 64)
    sources = []
    for name, result in files.items():
        command = textwrap.shorten(" ".join(result.get("command", [])), 300, placeholder=" ...")
        made = "; ".join(text for text in (result.get("what"), f"`{command}`" if command else "") if text)
        sources.append(f"- [{name}]({name}), {len(result['rows'])} rows, commit {result['commit'][:7]}: {made}")
    red = dict.fromkeys(
        f"- {row['case']}, {result['threads']} threads: {reason.partition(': ')[2].partition(' (')[0]}"
        for result in results.values()
        for row in result["rows"]
        for reason in row["red"].values()
    )
    return (
        "\n\n".join(
            [
                "# Measurements",
                "Made by `python -m tritonsym.perf.table`; do not edit. Numbers are times of the dense layer over "
                "those of ours, inference left and training right; *in italics where the layer takes the expanded "
                "convolution, or a matrix is unpacked or computed whole*. The dense layer's weight is expanded "
                f"beforehand; the expanded convolution expands it in every call. {_machine(layers)}.",
                "## Convolutions",
                "3x3 kernels, as many outputs as inputs, channels-last.",
                _markdown(["input", *COLUMNS], *([shape, *cells] for shape, cells in _by_symmetry(layers).items())),
                "Geometric means over these inputs but the one with 16 channels. `parametrize`: torch's own way to tie "
                "weights, which expands them in every call.",
                _markdown(["", *[*COLUMNS[: len(SYMMETRIES)], "all"] * 2], *summary),
                "More layers:",
                _markdown(["input", "layer", "dense, ms", "inference", "training"], *_others(layers)),
                f"![Speed by channels]({_picture(RESULTS['layers'])})",
                "## Group convolutions",
                f"Beside dense convolutions of as many channels. {_machine(groups)}.",
                _markdown(["input", *COLUMNS], *([s, *cells] for s, cells in _by_symmetry(groups, "group-").items())),
                _markdown(["input", "layer", "dense, ms", "inference", "training"], *_others(groups, "group-")),
                "## Matrices",
                "`SymmetricLinear` of n features for so many rows, and products of n x n matrices; a step of "
                "`newton_schulz` beside plain products and sums, not fused ones. "
                f"{_machine(results['matrices'])}.",
                _markdown(_matrix_head(batches), *_matrix_lines(results["matrices"], batches)),
                "## Estimate for an H200, not measured",
                "Forward time of the dense convolution and of expanding its weight, over that of `shift`, and of "
                "`fused` where it can compute the layer, bfloat16, by "
                "the roofline model of `plan.estimated_seconds`. Nothing in this table has run on a GPU.",
                estimate(),
                "## What was too inexact to be timed",
                "\n".join(red) or "Nothing.",
                "## Files",
                "\n".join(sources),
            ]
        )
        + "\n"
    )


def estimate() -> str:
    """Speedups of the same layers on a GPU by the model of `plan.estimated_seconds`; none of them was measured."""
    symmetries = ("h", "hv", "c4", "d4")
    lines: dict[str, list[str]] = {}
    for case in GPU:
        if case.kind in symmetries:
            x = case.input(case.dtypes[0], "meta")["nchw"]
            seconds = plan.estimated_seconds(case.build(case.dtypes[0], "meta").problem(x, "sm_90", False))  # type: ignore[operator]
            cells = lines.setdefault(shape_and_kind(case.name)[0], [])
            found = {
                path: f"{seconds['reference'] / seconds[path]:.1f}" for path in ("shift", "fused") if path in seconds
            }
            cells.append(", `fused` ".join(found.values()))
    return _markdown(["input", *(f"`{s}`" for s in symmetries)], *([shape, *cells] for shape, cells in lines.items()))


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
    file = output.with_name(_picture(output.name))
    figure.savefig(file, dpi=100)
    return file


def _picture(results: str) -> str:
    return f"{Path(results).stem}-speedup.png"


def pages(root: Path) -> dict[Path, str]:
    """README.md, perf/results/README.md and the figure of a checkout, as they should be."""
    folder, readme = root / FOLDER, root / "README.md"
    files = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    results = {what: files[name] for what, name in RESULTS.items()}
    head, rest = readme.read_text().split("<!-- measured -->")
    _, tail = rest.split("<!-- /measured -->")
    return {
        readme: f"{head}<!-- measured -->\n{measured(results)}\n<!-- /measured -->{tail}",
        folder / "README.md": full(results, files),
        folder / "symmetries.svg": figure.drawn(),
    }


def main(argv: list[str] | None = None) -> int:
    first, rest = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m tritonsym.perf.table",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: the current folder)")
    args = parser.parse_args(argv)
    if missing := [name for name in RESULTS.values() if not (args.root / FOLDER / name).exists()]:
        parser.error(f"{args.root / FOLDER} has no {', '.join(missing)}: run this in a checkout, or name one by --root")
    for file, text in pages(args.root).items():
        file.write_text(text)
    layers = args.root / FOLDER / RESULTS["layers"]
    plot(load(layers, parser), layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

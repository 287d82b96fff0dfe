"""The benchmark, its tables, the search for tiles and the script that runs all: on tiny layers, without a GPU."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from matplotlib.image import imread

import tritonsym
from tritonsym import launch, nn, plan, shift, tuned
from tritonsym.__main__ import main
from tritonsym.perf import bench, cases, measure, table, tune
from tritonsym.perf.questions import QUESTIONS, Setting
from tritonsym.perf.questions import main as ask

ROOT = Path(__file__).parents[1]
TINY = ["bench", "--tiny", "--device", "cpu", "--filter"]
TINY_TUNE = ["tune", *TINY[1:]]


@pytest.fixture(autouse=True)
def no_table_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan.forget()
    yield
    plan.forget()


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [cases.CPU, cases.GPU], ids=["cpu", "gpu"])
def test_names_are_unique_and_can_be_read(known):
    assert len({case.name for case in known}) == len(known)
    for case in known:
        sizes = case.name.removeprefix(f"n{case.batch}-c{case.channels}-").removesuffix(case.kind).removesuffix("-")
        shape = [str(case.batch), str(case.channels), *([sizes] if sizes else [])]
        assert cases.shape_and_kind(case.name) == (" x ".join(shape), case.kind)


@pytest.mark.parametrize("case", cases.smallest(cases.CPU + cases.GPU), ids=lambda case: case.kind)
def test_every_kind_can_be_built_and_computed(case):
    layer = case.build("float32", "cpu")
    for x in case.input("float32", "cpu").values():
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert cases.cost(case, "forward")["useful"] <= cases.cost(case, "forward")["dense"]


def test_costs():
    """By hand: 3x3 kernels on 19x19 positions of 256 images, a quarter of the filters stored."""
    case, positions = cases.Case("hv", 256, 384, (19, 19)), 256 * 19 * 19
    costs = cases.cost(case, "forward")
    assert costs["dense"] == 384 * 384 * 9 * positions == 4 * costs["useful"]
    assert costs["values"] == 2 * 384 * positions + 96 * 384 * 9
    assert cases.cost(case, "training")["dense"] == 3 * costs["dense"]
    row = {"dtype": "bfloat16", **costs}
    assert cases.roofline(row, "NVIDIA H200") == 2 * costs["useful"] / 989e12
    assert cases.roofline(row, "abacus") is None
    row |= cases.cost(cases.Case("linear", 1, 8192), "forward")
    assert cases.roofline(row, "NVIDIA H200") == 2 * (2 * 8192 + 8192 * 8193 // 2) / 4.8e12


def test_the_parametrized_layer_and_the_product_alone(monkeypatch):
    case = cases.Case("tied-hv", 2, 8, (5, 6))
    layer, x = case.build("float32", "cpu"), case.input("float32", "cpu")["channels_last"]
    same = bench.parametrized(layer)
    assert [p.shape for p in same.parameters()] == [layer.weight.shape]
    torch.testing.assert_close(same(x), layer(x))
    for convolved in (False, True):
        monkeypatch.setattr(shift, "is_convolved", lambda a, w, convolved=convolved: convolved)
        assert [t.shape for t in bench.gemm(layer.problem(x, "cpu", False), x, False)()] == [(2 * 5 * 6, 8 * 4)]
        assert [t.shape for t in bench.gemm(layer.problem(x, "cpu", True), x, True)()] == [(60, 32), (60, 8), (32, 8)]
    for kind in ("stride2-hv", "transpose4-hv", "groups4-hv"):
        other = cases.Case(kind, 1, 16, (4, 4)).build("float32", "cpu")
        assert bench.gemm(other.problem(torch.ones(1, 16, 4, 4), "cpu", False), x, False) is None


# --- benchmark --------------------------------------------------------------------------------------------------------


ESCNN = """
import torch
class FieldType:
    def __init__(self, space, representations):
        self.size = sum(representations)
class GeometricTensor:
    def __init__(self, tensor, kind):
        self.tensor, self.kind = tensor, kind
class R2Conv(torch.nn.Module):
    def __init__(self, into, out, kernel_size, **options):
        super().__init__()
        self.into, self.conv = into, torch.nn.Conv2d(into.size, out.size, kernel_size, **options)
    def forward(self, x):
        assert x.kind is self.into
        return GeometricTensor(self.conv(x.tensor), None)
"""


def test_escnn_is_timed_where_it_is_installed(monkeypatch):
    """A stub package of that name has what is called."""
    layer = nn.GroupConv2d(2, 3, 3, padding=1, bias=False, symmetry="hv")
    assert bench.escnn(layer, True) is None
    spaces = "class flipRot2dOnR2:\n    def __init__(self, n):\n        self.regular_repr = 2 * n"
    for name, text in {"escnn": "", "escnn.nn": ESCNN, "escnn.gspaces": spaces}.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        exec(text, vars(module))
        monkeypatch.setitem(sys.modules, name, module)
    theirs = bench.escnn(layer, False)
    assert theirs is not None and not theirs.training
    assert theirs(torch.randn(2, 8, 5, 5)).shape == (2, 12, 5, 5)
    assert bench.escnn(nn.GroupConv2d(2, 2, 3, symmetry="c4"), True) is None
    case = cases.Case("group-hv", 1, 8, (3, 3))
    first, *_ = bench.bench(case, "float32", torch.device("cpu"), 1, False, set())
    assert {"escnn nchw", "escnn channels_last"} < first["seconds"].keys()


def test_bench(tmp_path, capsys):
    """Files hold one row per line; runs resume, compare with a baseline, and first refuse files that do not fit."""
    file, old = tmp_path / "result.json", tmp_path / "old.json"
    arguments = [*TINY, "3x3-hv,linear", "--output", str(file)]
    assert main([*arguments, "--budget", "0"]) == bench.UNFINISHED
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "reduced sizes" in out and "auto (reference)" in out and max(map(len, out.splitlines())) <= 100
    text = file.read_text()
    result, (head, *rows) = json.loads(text), text.splitlines()
    assert len(rows[:-1]) == len(result["rows"]) == 4 and "rows" in head
    assert [json.loads(row.removesuffix(",")) for row in rows[:-1]] == result["rows"]
    assert (result["torch"], result["threads"]) == (torch.__version__, torch.get_num_threads())
    assert result["command"] == ["python", "-m", "tritonsym", *arguments]
    for row, mode in zip(result["rows"], ("forward", "training") * 2, strict=True):
        names = ("dense", "auto", "reference") + (("parametrize", "shift") if "hv" in row["case"] else ("blocks",))
        forms = ("nchw", "channels_last") if "hv" in row["case"] else ("nchw",)
        gemm = {"gemm channels_last"} if "hv" in row["case"] else set()
        assert row["seconds"].keys() == {f"{name} {form}" for name in names for form in forms} | gemm
        assert (row["mode"], row["red"], row["plan"]["nchw"]) == (mode, {}, "reference")
    assert imread(tmp_path / "result-speedup.png")[..., :3].std() > 0.05

    file.write_text(bench.dumped({**result, "rows": result["rows"][:3]}))
    assert main([*arguments, "--resume"]) == 0
    resumed = json.loads(file.read_text())["rows"]
    assert resumed[:3] == result["rows"][:3] and [row["mode"] for row in resumed] == ["forward", "training"] * 2
    for other in ({"torch": "1.0"}, {"threads": 64}):
        file.write_text(bench.dumped({**result, **other}))
        with pytest.raises(SystemExit):
            main([*arguments, "--resume"])
        assert f"is of another {next(iter(other))}; choose another --output" in capsys.readouterr().err

    for factor, code in ((1e-4, 0), (1e4, 1)):
        slow = [name for name in result["rows"][0]["seconds"] if name.startswith("dense")]
        for row in (rows := json.loads(text)["rows"]):
            row["seconds"] |= {
                name: [factor * s for s in row["seconds"][name]] for name in slow if name in row["seconds"]
            }
        old.write_text(bench.dumped({**result, "rows": rows}))
        assert main([*TINY, "linear", "--baseline", str(old)]) == code
    assert "REGRESSION n8-c8-linear float32 forward warm: auto nchw " in capsys.readouterr().out


def test_only_comparable_runs_are_compared():
    row = {
        **dict.fromkeys(("case", "dtype", "mode", "cache"), "x"),
        "seconds": {"dense y": [2.0, 8.0, 4.0], "auto y": [2.0]},
    }
    result = {"device": "abacus", "threads": 1, "rows": [row]}
    assert bench.speedups(row) == {"auto y": 2.0} and bench.regressions(result, result, 0.1) == []
    for other in ({"device": "slide rule"}, {"threads": 2}, {"rows": []}):
        with pytest.raises(ValueError, match="cannot be compared"):
            bench.regressions({**result, **other}, result, 0.1)


def test_a_wrong_path_is_not_timed_and_what_fails_does_not_stop_the_rest(tmp_path, capsys, monkeypatch):
    right = tritonsym.shift.fprop
    monkeypatch.setattr(tritonsym.shift, "fprop", lambda *args: 1.1 * right(*args))
    monkeypatch.setattr(nn.SymmetricLinear, "to_dense", lambda self: torch.ones(2) @ torch.ones(3))
    file = tmp_path / "result.json"
    assert main([*TINY, "linear,3x3-hv", "--output", str(file)]) == 1
    out = capsys.readouterr().out
    assert "shift is WRONG and was not timed" in out and "n8-c8-linear float32 FAILED" in out
    assert [list(row["red"]) for row in json.loads(file.read_text())["rows"]] == [["shift"]] * 2
    assert not any("shift" in name for row in json.loads(file.read_text())["rows"] for name in row["seconds"])


def test_gates():
    """Gates check one image or a whole matrix, and only the outputs of a shift path that `auto` would not take."""
    x = torch.randn(4, 4)
    measure.gate(cases.Function(lambda x: x @ x.mT, lambda x: x @ x.mT), x, "reference")
    with pytest.raises(AssertionError, match="RMS error"):
        measure.gate(cases.Function(lambda x: 1.01 * (x @ x.mT), lambda x: x @ x.mT), x, "reference")
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(measure.testing, "assert_matches_reference", lambda layer, x: seen.append(tuple(x.shape)))
        image, rows = torch.randn(4, 8, 5, 5), torch.randn(4, 20, 8)
        for layer, x, path in (
            (nn.SymmetricConv2d(8, 8, 3, symmetry="hv"), image, "shift"),
            (nn.SymmetricConv2d(8, 8, 3, symmetry="hv"), image, "reference"),
            (nn.SymmetricLinear(8, 8), rows, "reference"),
        ):
            measure.gate(layer, x, path)
        assert seen == [(1, 8, 5, 5), (4, 20, 8)]


@pytest.mark.slow
def test_compiled_variants_and_threads(tmp_path):
    file, threads = tmp_path / "x.json", torch.get_num_threads()
    try:
        assert main([*TINY, "3x3-hv", "--compiled", "--threads", "1", "--output", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(file.read_text())
    assert result["threads"] == 1
    assert {"compiled nchw", "compiled-shift channels_last"} <= result["rows"][1]["seconds"].keys()


def test_code_compiled_for_one_path_is_not_taken_for_another():
    layer, x, graphs = nn.SymmetricConv2d(2, 4, 3, symmetry="h"), torch.randn(1, 2, 5, 5), []
    torch.compiler.reset()
    for path in ("reference", "shift"):
        with tritonsym.path(path):
            torch.compile(bench.Named(layer, path), backend=lambda graph, _: graphs.append(graph) or graph)(x)
    assert len(graphs) == 2


def test_cases_are_selected_by_words_and_left_out_by_words_behind_a_circumflex():
    some = [cases.Case(kind, 1, 8, (3, 3)) for kind in ("h", "hv", "tied-hv", "group-h")]
    words = {"": some, "hv": some[1:3], "tied,group": some[2:], "^group": some[:3], "hv,^tied": some[1:2]}
    assert {word: cases.select(some, word) for word in words} == words


@pytest.mark.parametrize("program", ["bench", "tune"])
def test_bad_options(tmp_path, capsys, monkeypatch, program):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "broken.json").write_text("{}")
    options = {
        ("--filter", "32x32,nothing"): "no case contains 'nothing'; known: n8-c16-32x32-h, ",
        ("--device", "cuda"): "no CUDA device: this needs an NVIDIA GPU with its driver, and a CUDA build of torch",
    }
    if program == "bench":
        options[("--baseline", str(tmp_path / "broken.json"))] = "broken.json is no output of the benchmark: KeyError"
        options[("--baseline", str(tmp_path / "none"))] = "is no output of the benchmark: FileNotFoundError"
        options[("--output", "nowhere/x.json")] = "the folder of nowhere/x.json does not exist"
    else:
        options[()] = "there are no kernels to tune on the CPU"
    for arguments, message in options.items():
        with pytest.raises(SystemExit) as stop:
            main([program, *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err


# --- tables -----------------------------------------------------------------------------------------------------------


def results(speed, path="shift", threads=2):
    """Results of all cases: dense layers take 1 s, `auto` is `speed` times as fast, `parametrize` half as fast."""
    rows = []
    for case in cases.CPU:
        forms = [*case.input("float32", "meta")]
        for mode in case.modes:
            row = {"case": case.name, "dtype": "float32", "mode": mode, "cache": "warm", "red": {}}
            row |= {"plan": dict.fromkeys(forms, path), "seconds": {}}
            for form in forms:
                row["seconds"] |= {f"dense {form}": [1.0], f"auto {form}": [1 / speed(case, mode, form)]}
                row["seconds"][f"parametrize {form}"] = [2.0]
            rows.append(row)
    return {
        "command": ["python"],
        "device": "abacus",
        "threads": threads,
        "torch": "2",
        "commit": "c" * 40,
        "rows": rows,
    }


def checkout(folder, **files):
    """Make a checkout in `folder` with these results as the files of `table.RESULTS`."""
    (folder / table.FOLDER).mkdir(parents=True)
    for what, result in files.items():
        (folder / table.FOLDER / table.RESULTS[what.replace("_", " ")]).write_text(bench.dumped(result))
    (folder / "README.md").write_text("a\n<!-- measured -->\nold\n<!-- /measured -->\nc\n")


def test_tables(tmp_path, capsys):
    def speed(case, mode, form):
        return (2 if case.kind == "h" else 8) * (2 if mode == "training" else 1) / (4 if form == "nchw" else 1)

    all_cases = results(speed)
    all_cases["rows"][0]["red"] = {"shift": "AssertionError: y is wrong (by far)"}
    losses = results(lambda *_: 0.9, "reference")
    one = results(lambda *_: 3, threads=1)
    checkout(tmp_path, layers=all_cases, one_thread=one, groups=losses, matrices=losses)
    assert table.main(["--root", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text and text.startswith("a\n") and text.endswith("c\n")
    assert text.count("| 2.00 | 8.00 | 8.00 | 4.00 | 16.00 | 16.00 |") == len(cases.INPUTS) + 1
    assert "| of contiguous images | 0.50 | 2.00 | 2.00 | 1.00 | 4.00 | 4.00 |" in text
    assert "| with one thread | 3.00 | 3.00 |" in text
    assert "| convolution, `h` | 2.0 to 4.0 | 2.0 to 4.0 |" in text and "`GroupConv`, `d4` | - | 0.9 to 0.9 |" in text
    assert "| `GroupConv`, 8 x 64 x 32x32 | *0.90* | *0.90* |" in text and "| 512 | *0.90* |" in text
    assert "8 x 16 x" not in text and "| 1024 |" not in text  # only on the longer page
    full = (tmp_path / table.FOLDER / "README.md").read_text()
    assert "| channels-last | 2.00 | 8.00 | 8.00 | 5.04 | 4.00 | 16.00 | 16.00 | 10.08 |" in full
    assert "| contiguous | 0.50 | 2.00 | 2.00 | 1.26 |" in full
    assert "| `parametrize`, channels-last | 0.50 |" in full and "| contiguous, one thread | 3.00 |" in full
    assert "| 1 x 64 x 256x256 | `hv` | 1000.00 | 8.00 | 16.00 |" in full and "`k9-h` | 1000.00 | 2.00 | 4.00 |" in full
    assert (
        "| 8 x 16 x 32x32 |" in full and "| 1024 | *0.90* |" in full and "n8-c16-32x32-h, 2 threads: y is wrong" in full
    )
    assert all(f"]({name})" in full for name in table.RESULTS.values())
    assert (tmp_path / table.FOLDER / "symmetries.svg").read_text().startswith("<svg")
    picture = (tmp_path / table.FOLDER / table.RESULTS["layers"]).with_suffix("")
    assert imread(f"{picture}-speedup.png")[..., :3].std() > 0.05


def test_tables_need_a_checkout(tmp_path, capsys):
    with pytest.raises(SystemExit):
        table.main(["--root", str(tmp_path)])
    assert "run this in a checkout, or name one by --root" in capsys.readouterr().err


RESULTS = [file for file in (ROOT / "perf" / "results").glob("*.json") if '"plan": {' in file.read_text()[:2000]]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_shipped_results_can_be_read(file, tmp_path):
    result = bench.load(file, None)
    assert bench.regressions(result, result, 0.1) == []
    assert table.plot(result, tmp_path / "x.json").stat().st_size > 10_000


# --- times on a GPU, with a fake one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("can_capture", [False, True])
def test_small_steps_are_timed_as_graphs(monkeypatch, cold, can_capture):
    replayed, flushed, now = [], [], [0.0]

    @contextlib.contextmanager
    def capture(graph):
        if not can_capture:
            raise RuntimeError("not permitted when stream is capturing")
        graph.replay = lambda: replayed.append(graph)
        yield

    class Event(SimpleNamespace):
        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    def large():
        now[0] += 2**-10

    fake = MagicMock(graph=capture, Event=lambda **_: Event(synchronize=lambda: None))
    fake.get_device_properties.return_value.L2_cache_size = 1024
    fake.memory_allocated.return_value, fake.max_memory_allocated.return_value = 100, 350
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cuda", fake)
        patch.setattr(time, "perf_counter", lambda: now[0])  # only a large step takes time
        patch.setattr(torch, "empty", lambda n, **_: SimpleNamespace(zero_=lambda: flushed.append(n)))
        seconds, more = measure.measure({"small": lambda: None, "large": large}, 3, torch.device("cuda"), cold)
    assert flushed == [2048] * 8 * cold
    assert more["graph"] == ["small"] * can_capture and len(replayed) == 3 * can_capture
    assert seconds == {"small": [0.0] * 3, "large": [9.766e-4] * 3}
    assert more["launch"]["large"] == 9.766e-4 and more["peak_bytes"] == {"small": 250, "large": 250}


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended_kernels(monkeypatch):
    """Fake kernels that are right, and faster the nearer their tiles are to those returned, by length and position."""
    best = {3: [(256, 16, 4), (32, 32, 4)], 4: [(8, 32, 16, 4)] * 2, 5: [(64, 128, 32, 4, 3), (32, 32, 64, 2, 4)]}

    def seconds(path, tiles, training):
        if path == "reference":
            return 100.0
        found = [
            sum(abs(math.log2(a / b)) for a, b in zip(tile, best[len(tile)][-1 if last else 0], strict=True))
            for last, tile in zip([len(tiles) == 1, True, True], tiles, strict=False)
        ]
        return 1 + sum(found if training else found[:1]) + 50 * (len(tiles) == 3 or path == "fused")

    def pretend(steps, rounds, device):
        return {name: [seconds(*step)] * rounds for name, step in steps.items()}, {}

    monkeypatch.setattr(launch, "runs_on", lambda device: True)
    monkeypatch.setattr(tune, "make_step", lambda layer, x, training, path, tiles=(): (path, tiles, training))
    monkeypatch.setattr(tune, "gate", lambda layer, x, path, tiles=(): None)
    monkeypatch.setattr(tune, "measure", pretend)
    return best


def test_tune_finds_the_fastest_and_plans_take_it(pretended_kernels, monkeypatch):
    layers = [nn.SymmetricConv2d(8, 16, 3, symmetry="hv"), nn.SymmetricLinear(7, 7)]
    model, x = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]).eval(), torch.randn(2, 8, 9, 9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tritonsym.tune(model, x, budget_s=0) == {}
    entries = tritonsym.tune(model, x)
    assert len(entries) == 4, "two layers, two modes"
    for key, entry in entries.items():
        first, last = pretended_kernels[3 if "conv" in key else 5]
        assert entry["path"] == ("shift" if "conv" in key else "implicit_gemm")
        assert entry["tiles"][0] == first and (entry["tiles"][1] == last) == ("training" in key)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not layers[0]._forward_pre_hooks
    monkeypatch.setattr(tune, "search", lambda *_: pytest.fail("searched again"))
    assert tritonsym.tune(model, x).keys() == entries.keys()
    tuned.user_file(tuned.table_name("cpu")).rename(tuned.user_file("sm_90"))  # as if measured on that GPU
    plan.forget()
    with torch.no_grad():
        found = tritonsym.explain(layers[0], x, "sm_90")
    assert found.why.startswith("Measured") and found.tiles[0] == pretended_kernels[3][0]


def test_interrupted_search_and_products_with_a_symmetric_result(pretended_kernels, monkeypatch, capsys):
    right, arguments = tune.search, [*TINY_TUNE, "3x3-hv,gram,symmetric_mm,newton_schulz"]

    def interrupted(job, deadline):
        if job.training:
            raise KeyboardInterrupt
        return right(job, deadline)

    monkeypatch.setattr(tune, "search", interrupted)
    assert main(arguments) == 130 and len(tuned.read(tuned.user_file(tuned.table_name("cpu")))) == 1
    monkeypatch.setattr(tune, "search", right)
    assert main([*arguments, "--budget", "0"]) == bench.UNFINISHED
    assert main(arguments) == 0
    assert "3 of 3 layers" in capsys.readouterr().out, "two modes, and one product"
    entry = tuned.read(tuned.user_file(tuned.table_name("cpu")))["gram float32 n=8 k=8 batch=1"]
    assert (entry["path"], entry["tiles"]) == ("implicit_gemm", [list(pretended_kernels[5][1])])


def test_tiles_that_are_wrong_or_fail_are_not_taken(pretended_kernels, monkeypatch):
    def gate(layer, x, path, tiles=()):
        if path in ("implicit_gemm", "fused"):
            raise RuntimeError("does not compile")
        assert not tiles or tiles[0][0] < 256, "wrong"

    monkeypatch.setattr(tune, "gate", gate)
    entries = tritonsym.tune(nn.SymmetricConv2d(8, 16, 3, symmetry="hv"), torch.randn(2, 8, 9, 9))
    for entry in entries.values():
        assert entry["path"] == "shift" and entry["tiles"][0][:2] == (128, 16)
        assert entry["seconds"].keys() == {"reference", "shift"}


def test_tune_leaves_packed_what_is_never_unpacked(pretended_kernels):
    layer, x = nn.SymmetricLinear(8, 8, never_unpack=True), torch.randn(2, 8)
    job = tune.Job(layer.problem(x, "cpu", False), False, lambda: (layer, x))
    with tritonsym.backend("triton"):
        entries, is_complete = tune.run([job, job], x.device, 100)
    assert is_complete and [entry["seconds"].keys() for entry in entries.values()] == [{"implicit_gemm", "blocks"}]
    copied, x = tune._copy(nn.SymmetricLinear(8, 8).requires_grad_(False), x.to("meta"), torch.device("cpu"))
    measure.make_step(copied, x, True, "reference")()  # frozen layers are tuned for training


def test_neighbours():
    found = {(32, 32, 4), (128, 32, 4), (64, 16, 4), (64, 64, 4), (64, 32, 2), (64, 32, 8)}
    assert set(tune.neighbours((64, 32, 4))) == found
    square = [tile for tile in tune.neighbours((64, 64, 32, 4, 3)) if tile[0] == tile[1] and tile[2:4] == (32, 4)]
    assert square == [(64, 64, 32, 4, 2), (64, 64, 32, 4, 4), (32, 32, 32, 4, 3), (128, 128, 32, 4, 3)]


def test_what_tune_needs(monkeypatch):
    model, x = nn.SymmetricConv2d(2, 2, 3, symmetry="h"), torch.ones(1, 2, 5, 5)
    for data, got in ((x, "cpu"), ([1], "list")):
        with pytest.raises(ValueError, match=f"on a GPU, got {got}; move"):
            tritonsym.tune(model, data)
    monkeypatch.setattr(launch, "runs_on", lambda device: True)
    wide = nn.SymmetricConv2d(2, 2, 3, symmetry="h").double()
    for other, data in ((torch.nn.Linear(5, 2), x), (nn.GlobalConv1d(2, 2), x[0, :, :2]), (wide, x.double())):
        with pytest.raises(ValueError, match=f"{type(other).__name__} runs no convolution and no SymmetricLinear"):
            tritonsym.tune(other, data)


# --- all at once ------------------------------------------------------------------------------------------------------


def run_all(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "perf" / "run_all.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")


@pytest.mark.slow
def test_run_all(tmp_path):
    """What a machine with a GPU will run, here in the interpreter; every run resumes where the last ran out of time."""
    pytest.importorskip("triton")  # Linux only
    for _ in range(5):
        run = run_all(tmp_path, "--dry")
        assert run.returncode in (0, bench.UNFINISHED), run.stdout + run.stderr
        if run.returncode == 0:
            break
        assert "run the same command again" in run.stdout
    questions = (tmp_path / "questions.log").read_text().splitlines()
    assert [re.split(r"[ :]+", line)[1] for line in questions] == [f.__name__ for f in QUESTIONS]
    assert "All done" in run.stdout and "2 passed" in (tmp_path / "tests.log").read_text()
    rows = {row["case"]: row for row in json.loads((tmp_path / "bench-tuned.json").read_text())["rows"]}
    expected = {"n1-c8-3x3-hv": {"shift", "fused"}, "n8-c8-linear": {"blocks"}, "n8-c8-gram": {"blocks"}}
    for case, paths in expected.items():
        names = {name.split()[0] for name in rows[case]["seconds"]} - {"dense", "parametrize", "gemm"}
        assert names == {"auto", "reference", "implicit_gemm", *paths}
    entries = json.loads((tmp_path / "tuned.json").read_text())["entries"]
    assert sorted(key.split()[0] for key in entries) == ["SymmetricLinear"] * 2 + ["conv"] * 2 + ["gram"]
    for step in ("bench", "tune", "tests"):
        (tmp_path / f"{step}.done").unlink()
    again = run_all(tmp_path, "--dry", "info", "bench", "tune")
    assert again.returncode == 0 and again.stdout.count("done before") == 1
    assert not (tmp_path / "tests.done").exists(), "the tests were not asked for"
    assert "forward" not in (tmp_path / "bench.log").read_text(), "all its rows were there"
    assert " us" not in (tmp_path / "tune.log").read_text(), "all its entries were there"


def test_questions(monkeypatch, capsys):
    """On the CPU, without kernels; a wrong result and an exception both give exit code 1."""
    names = [question.__name__ for question in QUESTIONS if question.__name__ != "large"]
    assert ask(["--tiny", *names]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [f"{name}:" for name in names]
    monkeypatch.setattr(Setting, "image", lambda *_: 1 / 0)
    assert ask(["--tiny", "graphs"]) == 1 and "NO  graphs" in capsys.readouterr().out
    monkeypatch.undo()
    right = tritonsym.shift.fprop
    monkeypatch.setattr(tritonsym.shift, "fprop", lambda *args: 1.1 * right(*args))
    assert ask(["--tiny", "tf32", "large"]) == 1 and capsys.readouterr().out.count("NO ") == 2
    for arguments in (["--tiny", "why"], []):
        with pytest.raises(SystemExit):
            ask(arguments)
    error = capsys.readouterr().err
    assert "unknown question 'why'; known: host, padding" in error and "no CUDA device" in error


def test_run_all_says_how_to_call_it():
    assert "usage: perf/run_all.sh OUTDIR" in run_all().stderr
    wrong = run_all("/tmp", "--fast")
    assert wrong.returncode == 2 and "unknown option or step --fast" in wrong.stderr

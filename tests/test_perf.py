"""The benchmark, the search for tiles and the script that runs all: on tiny layers, without a GPU."""

import contextlib
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread

import tritonsym
from tritonsym import dispatch, launch, nn, tuned
from tritonsym.perf import bench, cases, measure, table, tune

ROOT = Path(__file__).parents[1]
TINY = ["--tiny", "--quick", "--device", "cpu", "--filter", "3x3-hv"]

TINY_TUNE = [option for option in TINY if option != "--quick"]


@pytest.fixture(autouse=True)
def no_table_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.forget()
    yield
    dispatch.forget()


# --- cases ------------------------------------------------------------------------------------------------------------


def test_names_are_unique():
    for known in (cases.CPU, cases.GPU):
        assert len({case.name for case in known}) == len(known)


@pytest.mark.parametrize("case", [*{c.kind: c for c in cases.GPU}.values()], ids=lambda case: case.kind)
def test_every_kind_can_be_built_and_computed(case):
    tiny = case.tiny()
    layer, x = tiny.build(), tiny.input(torch.float32)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert cases.cost(case, "forward").useful <= cases.cost(case, "forward").dense


def test_costs():
    """By hand: 3x3 kernels on 19x19 positions of 256 images, a quarter of the filters stored."""
    case = cases.Case("hv", 256, 384, (19, 19))
    positions = 256 * 19 * 19
    assert cases.cost(case, "forward") == cases.Cost(
        384 * 384 * 9 * positions, 96 * 384 * 9 * positions, 2 * 384 * positions + 96 * 384 * 9
    )
    assert cases.cost(case, "training").dense == 3 * cases.cost(case, "forward").dense
    flops = 2 * 96 * 384 * 9 * positions
    assert cases.roofline(case, "forward", "bfloat16", "NVIDIA H200") == flops / 989e12
    assert cases.roofline(case, "forward", "bfloat16", "abacus") is None
    linear = cases.Case("linear", 1, 8192)
    assert cases.roofline(linear, "forward", "bfloat16", "NVIDIA H200") == 2 * (2 * 8192 + 8192 * 8193 // 2) / 4.8e12


# --- benchmark --------------------------------------------------------------------------------------------------------


def test_bench(tmp_path, capsys):
    file = tmp_path / "result.json"
    assert bench.main([*TINY, "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert "reduced sizes" in out and "n1-c8-3x3-hv" in out
    result = json.loads(file.read_text())
    assert (
        result["device"] and result["torch"] == torch.__version__ and result["command"][-2:] == ["--output", str(file)]
    )
    assert [row["mode"] for row in result["rows"]] == ["forward", "training"]
    for row in result["rows"]:
        assert row["red"] == {} and row["rates"]["auto"]["roofline"] is None
        assert row["speedup"].keys() == {"auto", "reference", "shift"}
        assert row["seconds"].keys() == {
            f"{name} {form}" for name in ("dense", "auto", "reference", "shift") for form in ("nchw", "channels_last")
        }
    for name in ("speedup", "roofline"):
        assert imread(tmp_path / f"result-{name}.png")[..., :3].std() > 0.05


def test_bench_as_a_command(capsys):
    from tritonsym.__main__ import main

    assert main(["bench", *TINY]) == 0
    assert "n1-c8-3x3-hv" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0 and "--baseline" in capsys.readouterr().out


def test_a_wrong_path_is_not_timed(tmp_path, capsys, monkeypatch):
    right = launch.shift.forward
    monkeypatch.setattr(launch.shift, "forward", lambda *args: 1.1 * right(*args))
    file = tmp_path / "result.json"
    assert bench.main([*TINY, "--output", str(file)]) == 1
    assert "shift is WRONG and was not timed" in capsys.readouterr().out
    for row in json.loads(file.read_text())["rows"]:
        assert list(row["red"]) == ["shift"] and "shift nchw" not in row["seconds"] and "auto nchw" in row["seconds"]


def test_a_wrong_function_is_seen():
    x = torch.randn(4, 4)
    measure.gate(cases.Function(lambda x: x @ x.mT, lambda x: x @ x.mT), x, "auto")
    with pytest.raises(AssertionError, match="RMS error"):
        measure.gate(cases.Function(lambda x: 1.01 * (x @ x.mT), lambda x: x @ x.mT), x, "auto")


def test_a_case_that_fails_does_not_stop_the_others(capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "measure", fail)
    assert bench.main([*TINY[:-1], "3x3-hv,linear"]) == 1
    out = capsys.readouterr().out
    assert "n1-c8-3x3-hv float32 FAILED: out of memory" in out and "n8-c8-linear float32 FAILED" in out


def test_compiled_variant(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    case = cases.Case("hv", 1, 8, (3, 3))
    rows = [*bench.bench(case, "float32", torch.device("cpu"), 1, True, set())]
    for name in ("compiled", "compiled-shift"):
        assert [row["speedup"][name] > 0 for row in rows] == [True, True]
    assert bench.line(rows[0]).split()[7] != "-", "column compiled"


def test_code_compiled_for_one_path_is_not_taken_for_another(monkeypatch):
    layer, x, graphs = tritonsym.nn.SymmetricConv2d(2, 4, 3, symmetry="h"), torch.randn(1, 2, 5, 5), []
    torch.compiler.reset()
    for path in ("reference", "shift"):
        with tritonsym.path(path):
            torch.compile(bench.Named(layer, path), backend=lambda graph, _: graphs.append(graph) or graph)(x)
    assert len(graphs) == 2


def test_interrupted_and_resumed(tmp_path, capsys, monkeypatch):
    file, right = tmp_path / "result.json", bench._row
    calls = itertools.count()

    def interrupted(*args):
        if next(calls):
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(bench, "_row", interrupted)
    many = [*TINY[:-1], "3x3-hv,linear", "--resume", "--output", str(file)]
    assert bench.main(many) == 130
    assert len(json.loads(file.read_text())["rows"]) == 1
    monkeypatch.setattr(bench, "_row", right)
    assert bench.main([*many, "--budget", "0"]) == bench.UNFINISHED
    assert bench.main(many) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len({bench.identity(row) for row in rows}) == len(rows) == 4
    monkeypatch.setattr(bench, "_row", lambda *_: pytest.fail("measured again"))
    assert bench.main(many) == 0
    assert "rows are kept" in capsys.readouterr().out


def test_baseline(tmp_path, capsys):
    file, old = tmp_path / "result.json", tmp_path / "old.json"
    assert bench.main([*TINY, "--output", str(old)]) == 0
    result = json.loads(old.read_text())

    def against(factor):
        rows = [{**row, "speedup": {k: factor * v for k, v in row["speedup"].items()}} for row in result["rows"]]
        old.write_text(json.dumps({**result, "rows": rows}))
        return bench.main([*TINY, "--baseline", str(old), "--output", str(file)])

    assert against(1e-3) == 0
    assert "REGRESSION" not in capsys.readouterr().out
    assert against(1e3) == 1
    assert "REGRESSION n1-c8-3x3-hv float32 forward warm: auto " in capsys.readouterr().out


def test_shipped_results_can_be_a_baseline():
    file = ROOT / "perf" / "results" / "2026-11-22-cpu.json"
    result = json.loads(file.read_text())
    assert bench.regressions(result, result, 0.1) == []
    assert bench.identity(result["rows"][0])[0] in {case.name for case in cases.CPU}
    for other in ({"device": "abacus"}, {"rows": []}):
        with pytest.raises(ValueError, match="cannot be compared"):
            bench.regressions({**result, **other}, result, 0.1)


@pytest.mark.parametrize("program", [bench, tune])
def test_bad_options(tmp_path, capsys, monkeypatch, program):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    options = {
        ("--filter", "32x32,nothing"): "no case contains 'nothing'; known: n8-c32-32x32-h, ",
        ("--device", "cuda"): "no CUDA device: this needs an NVIDIA GPU with its driver, and a CUDA build of torch",
    }
    if program is bench:
        options[(*TINY, "--baseline", str(broken))] = "broken.json is no output of the benchmark: KeyError"
        options[(*TINY, "--baseline", str(tmp_path / "none"))] = "is no output of the benchmark: FileNotFoundError"
        options[("--output", "nowhere/x.json")] = "the folder of nowhere/x.json does not exist"
    else:
        options[()] = "there are no kernels to tune on the CPU"
    for arguments, message in options.items():
        with pytest.raises(SystemExit) as stop:
            program.main(list(arguments))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


# --- time on a GPU, with a pretended one ------------------------------------------------------------------------------


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def pretended_gpu(monkeypatch):
    captured = []

    @contextlib.contextmanager
    def capture(graph):
        graph.replay = lambda: captured.append(graph)
        yield

    fake = {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024),
        "current_device": lambda: 0,
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda stream: None),
        "Stream": lambda: SimpleNamespace(wait_stream=lambda stream: None),
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": capture,
        "CUDAGraph": SimpleNamespace,
        "Event": Event,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
        "_sleep": lambda cycles: None,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captured


@pytest.mark.parametrize("cold", [False, True])
def test_small_steps_are_timed_as_graphs(pretended_gpu, monkeypatch, cold):
    flushed, now = [], [0.0]

    def large():
        now[0] += 2**-10

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])  # only a large step takes time
    monkeypatch.setattr(torch.Tensor, "zero_", lambda x: flushed.append(x))
    steps = {"small": lambda: None, "large": large}
    samples = measure._on_gpu(steps, 3, torch.device("cpu"), cold)
    assert {len(x) for x in flushed} == ({2048} if cold else set()) and len(flushed) == (8 if cold else 0)
    assert samples["small"].graph and not samples["large"].graph
    assert len(pretended_gpu) == 3
    assert [len(s.seconds) for s in samples.values()] == [3, 3]
    assert samples["large"].median == pytest.approx(2**-10) and samples["large"].launch == 2**-10
    assert samples["large"].peak_bytes == 250


def test_what_is_said_of_the_machine(monkeypatch):
    pytest.importorskip("triton")  # Linux only
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = bench.machine("bench", [], torch.device("cuda"))
    assert (
        found["device"] == "NVIDIA H200" and found["triton"] and {"driver", "cuda", "cudnn", "commit"} <= found.keys()
    )
    json.dumps(found)


def test_what_cannot_be_a_graph_is_timed_as_it_is(pretended_gpu, monkeypatch):
    def fail(graph):
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    [samples] = measure._on_gpu({"a": lambda: None}, 2, torch.device("cpu"), cold=False).values()
    assert not samples.graph and len(samples.seconds) == 2


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended_kernels(monkeypatch):
    """Triton kernels that are torch ops, and take the time that `seconds` says."""
    monkeypatch.setattr(launch, "runs_on", lambda device: True)
    monkeypatch.setattr(tune, "make_step", lambda layer, x, training, path, tiles=(): (path, tiles, training))
    monkeypatch.setattr(tune, "gate", lambda layer, x, path, tiles=(): None)

    def seconds(path, tiles, training):
        if path != "shift":
            return {"reference": 2.0, "expand": 3.0}[path]
        wrong = abs(tiles[0][0] - 256) / 256 + abs(tiles[0][1] - 16) / 16
        return 1 + wrong + (abs(tiles[1][0] - 32) / 32 if training else 0)

    def pretend(steps, rounds, device):
        return {name: measure.Samples([seconds(*step)] * rounds) for name, step in steps.items()}

    monkeypatch.setattr(tune, "measure", pretend)


def test_tune_finds_the_fastest_and_dispatch_takes_it(pretended_kernels, monkeypatch, capsys):
    layer = nn.SymmetricConv2d(8, 16, 3, symmetry="hv")
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), nn.SymmetricConv2d(16, 16, 3, symmetry="hv")).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 8, 9, 9)
    entries = tritonsym.tune(model, x)
    assert len(entries) == 4, "two layers, two modes"
    assert all(entry["path"] == "shift" and entry["tiles"][0][:2] == (256, 16) for entry in entries.values())
    assert all((entry["tiles"][1][0] == 32) == ("training" in key) for key, entry in entries.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not layer._forward_pre_hooks
    tuned.user_file("cpu").rename(tuned.user_file("sm_90"))  # as if it had been that GPU
    dispatch.forget()
    with torch.no_grad():
        plan = tritonsym.explain(layer, x, "sm_90")
    assert plan.why.startswith("Measured") and plan.tiles[0][:2] == (256, 16)


def test_tune_goes_on_where_it_was(pretended_kernels, monkeypatch):
    model, x = nn.SymmetricConv2d(8, 16, 3, symmetry="hv"), torch.randn(2, 8, 9, 9)
    assert tritonsym.tune(model, x, budget_s=0) == {}
    entries = tritonsym.tune(model, x)
    monkeypatch.setattr(tune, "search", lambda *_: pytest.fail("searched again"))
    assert tritonsym.tune(model, x).keys() == entries.keys()


def test_interrupted_search(pretended_kernels, monkeypatch, capsys):
    right, calls = tune.search, itertools.count()

    def interrupted(*args):
        if next(calls):
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(tune, "search", interrupted)
    assert tune.main(TINY_TUNE) == 130
    assert len(tuned.read(tuned.user_file("cpu"))) == 1
    monkeypatch.setattr(tune, "search", right)
    assert tune.main([*TINY_TUNE, "--budget", "0"]) == bench.UNFINISHED
    assert tune.main(TINY_TUNE) == 0
    assert "2 of 2 layers" in capsys.readouterr().out


def test_tiles_that_are_wrong_or_fail_are_not_taken(pretended_kernels, monkeypatch):
    def gate(layer, x, path, tiles=()):
        if path == "expand":
            raise RuntimeError("does not compile")
        assert not tiles or tiles[0][0] < 256, "wrong"

    monkeypatch.setattr(tune, "gate", gate)
    entries = tritonsym.tune(nn.SymmetricConv2d(8, 16, 3, symmetry="hv"), torch.randn(2, 8, 9, 9))
    for entry in entries.values():
        assert entry["path"] == "shift" and entry["tiles"][0][:2] == (128, 16)
        assert entry["seconds"].keys() == {"reference", "shift"}


@pytest.fixture
def pretended_matrix_kernels(pretended_kernels, monkeypatch):
    """The nearer its tiles are to these, the faster a product with a symmetric matrix."""
    best = {"product": (64, 128, 32, 4, 3), "square": (32, 32, 64, 2, 4)}

    def distance(tile, kind):
        return sum(abs(math.log2(a / b)) for a, b in zip(tile, best[kind], strict=True))

    def seconds(path, tiles, training):
        if path == "reference":
            return 100.0
        *products, square = tiles
        used = training or not products
        return 1 + sum(distance(tile, "product") for tile in products) + (distance(square, "square") if used else 0)

    def pretend(steps, rounds, device):
        return {name: measure.Samples([seconds(*step)] * rounds) for name, step in steps.items()}

    monkeypatch.setattr(tune, "measure", pretend)
    return best


def test_tune_finds_tiles_of_packed_matrices(pretended_matrix_kernels):
    layers, x = [nn.SymmetricLinear(8, 8) for _ in range(2)], torch.randn(20, 5, 8)
    entries = tritonsym.tune(torch.nn.Sequential(*layers, torch.nn.Tanh()), x)
    assert entries.keys() == {f"SymmetricLinear float32 {mode} n=8 rows=128" for mode in ("inference", "training")}
    for key, entry in entries.items():
        assert entry["path"] == "expand" and entry["seconds"].keys() == {"reference", "expand"}
        product, square = entry["tiles"]
        assert product == pretended_matrix_kernels["product"]
        assert (square == pretended_matrix_kernels["square"]) == ("training" in key)
    tuned.user_file("cpu").rename(tuned.user_file("sm_90"))  # as if it had been that GPU
    dispatch.forget()
    plan = tritonsym.explain(layers[1], x, "sm_90")
    assert plan.why.startswith("Measured") and plan.tiles == tuple(pretended_matrix_kernels.values())


def test_tune_leaves_packed_what_is_never_unpacked(pretended_matrix_kernels):
    layer, x = nn.SymmetricLinear(8, 8, never_unpack=True), torch.randn(2, 8)
    job = tune.Job(layer.problem(x.shape, "cpu", "float32"), lambda: (layer, x))
    with tritonsym.backend("triton"):
        entries, _ = tune.run([job], x.device, 100)
    [(key, entry)] = entries.items()
    assert key.endswith(" packed") and entry["seconds"].keys() == {"expand"}


def test_tune_finds_tiles_of_products_with_a_symmetric_result(pretended_matrix_kernels, monkeypatch, capsys):
    arguments = [*TINY_TUNE[:-1], "gram,symmetric_mm,newton_schulz"]
    assert tune.main(arguments) == 0
    assert "1 of 1 layers" in capsys.readouterr().out, "one product"
    [(key, entry)] = tuned.read(tuned.user_file("cpu")).items()
    assert key == "gram float32 n=8 k=8 batch=1"
    assert (entry["path"], entry["tiles"]) == ("expand", [list(pretended_matrix_kernels["square"])])
    monkeypatch.setattr(tune, "search", lambda *_: pytest.fail("searched again"))
    assert tune.main(arguments) == 0


def test_the_first_of_equal_jobs_is_timed(pretended_matrix_kernels):
    layer, x, made = nn.SymmetricLinear(8, 8), torch.randn(2, 8), []
    problem = layer.problem(x.shape, "cpu", "float32")
    jobs = [tune.Job(problem, lambda i=i: made.append(i) or (layer, x)) for i in range(2)]
    tune.run(jobs, x.device, 100)
    assert made == [0]


@pytest.mark.parametrize("kind", ["gram", "symmetric_mm", "newton_schulz"])
def test_functions_are_gated_on_every_path(pretended_kernels, monkeypatch, kind):
    """With inputs that they are meant for; `pretended_kernels` let everything through."""
    monkeypatch.setattr(tune, "gate", measure.gate)
    entries, _ = tune.run([*tune._jobs(cases.Case(kind, 8, 8), torch.device("cpu"))], torch.device("cpu"), 100)
    assert [entry["seconds"].keys() for entry in entries.values()] == [{"reference"}], "no kernel runs here"


def test_images_are_gated_one_by_one_and_matrices_whole(monkeypatch):
    seen = []
    monkeypatch.setattr(measure.testing, "assert_matches_reference", lambda layer, x: seen.append(tuple(x.shape)))
    for layer, x in (
        (nn.SymmetricConv2d(8, 8, 3, symmetry="hv"), torch.randn(4, 8, 5, 5)),
        (nn.SymmetricLinear(8, 8), torch.randn(4, 20, 8)),
    ):
        measure.gate(layer, x, "reference")
    assert seen == [(1, 8, 5, 5), (4, 20, 8)]


def test_frozen_layers_are_tuned_for_training(monkeypatch):
    layer = nn.SymmetricLinear(8, 8).requires_grad_(False)
    copied, x = tune._copy(layer, torch.empty(2, 8, device="meta"), torch.device("cpu"))
    measure.make_step(copied, x, True, "reference")()
    assert not layer.weight.requires_grad


def test_neighbours():
    assert set(tune.neighbours((64, 32, 4))) == {
        (32, 32, 4),
        (128, 32, 4),
        (64, 16, 4),
        (64, 64, 4),
        (64, 32, 2),
        (64, 32, 8),
    }
    assert {tile[4] for tile in tune.neighbours((64, 32, 32, 4, 3))} == {2, 3, 4}
    square = {tile for tile in tune.neighbours((64, 64, 32, 4, 3)) if tile[0] == tile[1] != 64}
    assert square == {(32, 32, 32, 4, 3), (128, 128, 32, 4, 3)}


@pytest.mark.parametrize(
    "model, x, message",
    [
        (nn.SymmetricConv2d(2, 2, 3, symmetry="h"), torch.ones(1, 2, 5, 5), "on a GPU, got cpu; move"),
        (nn.SymmetricConv2d(2, 2, 3, symmetry="h"), [1], "on a GPU, got list; move"),
    ],
)
def test_tune_needs_a_gpu(model, x, message):
    with pytest.raises(ValueError, match=message):
        tritonsym.tune(model, x)


def test_tune_needs_a_layer(pretended_kernels):
    x = torch.ones(1, 2, 2)
    for model, data in (
        (torch.nn.Linear(2, 2), x),
        (nn.GlobalConv1d(2, 2), x),
        (nn.SymmetricLinear(2, 2).double(), x.double()),
    ):
        with pytest.raises(ValueError, match=f"{type(model).__name__} runs no convolution and no SymmetricLinear"):
            tritonsym.tune(model, data)


def test_tune_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonsym.perf.tune", None)
    monkeypatch.setitem(sys.modules, "tritonsym.perf", None)
    with pytest.raises(ImportError, match=r'pip install "tritonsym\[perf\]"'):
        tritonsym.tune(torch.nn.Linear(2, 2), torch.ones(1, 2))


# --- tables, and all at once ------------------------------------------------------------------------------------------


RESULTS = [file.name for file in (ROOT / "perf" / "results").glob("*.json") if "speedup" in file.read_text()]


@pytest.mark.parametrize("name", RESULTS)
def test_plots_of_results(name, tmp_path):
    result = json.loads((ROOT / "perf" / "results" / name).read_text())
    drawn = table.plot(result, tmp_path / "x.json")
    assert [file.name for file in drawn] == ["x-speedup.png", "x-roofline.png"]
    assert all(file.stat().st_size > 10_000 for file in drawn)


def run_all(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "perf" / "run_all.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")


def test_run_all(tmp_path):
    """What a machine with a GPU will run, in the interpreter, each time going on where the time was up."""
    pytest.importorskip("triton")  # Linux only
    for _ in range(5):
        run = run_all(tmp_path, "--dry")
        assert run.returncode in (0, bench.UNFINISHED), run.stdout + run.stderr
        if run.returncode == 0:
            break
        assert "run the same command again" in run.stdout
    assert "All done" in run.stdout
    rows = json.loads((tmp_path / "bench-tuned.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"n1-c8-3x3-hv", "n8-c8-linear", "n8-c8-gram"}
    assert rows[0]["speedup"].keys() == {"auto", "reference", "shift", "expand"}
    entries = json.loads((tmp_path / "tuned.json").read_text())["entries"]
    assert sorted(" ".join(key.split()[:3]) for key in entries) == [
        *(
            f"{layer} float32 {mode}"
            for layer in ("SymmetricConv", "SymmetricLinear")
            for mode in ("inference", "training")
        ),
        "gram float32 n=8",
    ]
    assert rows[-1]["speedup"].keys() == rows[-2]["speedup"].keys() == {"auto", "reference", "expand"}
    assert "2 passed" in (tmp_path / "tests.log").read_text()
    for step in ("bench", "tune"):
        (tmp_path / f"{step}.done").unlink()
    again = run_all(tmp_path, "--dry")
    assert again.returncode == 0 and again.stdout.count("done before") == 3
    assert "forward" not in (tmp_path / "bench.log").read_text(), "all its rows were there"
    assert " us" not in (tmp_path / "tune.log").read_text(), "all its entries were there"


def test_run_all_says_how_to_call_it():
    assert "usage: perf/run_all.sh OUTDIR" in run_all().stderr
    wrong = run_all("/tmp", "--fast")
    assert wrong.returncode == 2 and "unknown option --fast" in wrong.stderr

"""Tables of measurements: found, preferred to the estimate, merged, and ignored where they cannot be used."""

import importlib
import json
import subprocess
import sys
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tritonsym
from tritonsym import plan, tuned

TILES = {
    "shift": ((128, 32, 4), (64, 32, 4)),
    "fused": ((16, 8, 16, 8), (64, 32, 4)),
    "implicit_gemm": ((64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (64, 64, 64, 4, 2)),
}

SHIPPED = tuned.shipped_file


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """No tables of this machine; one folder for the user's tables and one for shipped ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "shipped").mkdir()
    (tmp_path / "tritonsym").mkdir()
    monkeypatch.setattr(tuned, "shipped_file", lambda name: tmp_path / "shipped" / f"{name}.json")
    plan.forget()
    yield
    plan.forget()


def explain(channels=64, batch=8, size=16, target="sm_90", dtype=torch.bfloat16, layer="SymmetricConv2d", **options):
    options = {"kernel_size": 3, "padding": 1, "symmetry": "hv", **options}
    module = getattr(tritonsym.nn, layer)(channels, channels, **options, device="meta")
    x = torch.empty(batch, channels, size, size, device="meta", dtype=dtype)
    with torch.no_grad():
        return tritonsym.explain(module, x, target)


def is_measured(**options):
    return explain(**options).why.startswith("Measured")


def put(file, path, tiles, problem=None, version=tuned.VERSION):
    entries = {(problem or explain().problem).key: {"path": path, "tiles": tiles}}
    file.write_text(json.dumps({"version": version, "entries": entries}))
    plan.forget()


@pytest.mark.parametrize("path", TILES)
def test_a_measurement_comes_before_the_estimate(path):
    assert explain().path == "reference" and not is_measured()
    put(tuned.shipped_file("sm_90"), path, TILES[path])
    found = explain()
    assert (found.path, found.tiles) == (path, TILES[path])
    assert found.why == "Measured on sm_90: the fastest path."
    with tritonsym.backend("triton"):
        assert explain().tiles == TILES[path]
    with tritonsym.path(path):
        assert explain().tiles == TILES[path]
    with tritonsym.backend("reference"):
        assert explain().path == "reference"


def test_only_for_what_was_measured():
    put(tuned.user_file("sm_90"), "shift", TILES["shift"])
    assert explain(batch=9).path == "shift", "positions are rounded"
    others = [{"batch": 32}, {"channels": 128}, {"dtype": torch.float16}, {"target": "sm_80"}, {"target": "cpu"}]
    others += [{"symmetry": "h"}, {"stride": 2}, {"layer": "TiedConv2d"}]
    assert [other for other in others if is_measured(**other)] == []
    with tritonsym.backend("triton"):
        assert not is_measured(target="cpu")


def test_positions_and_products_are_told_apart():
    """With a stride of 4 every image of a filter has its own products."""
    options = {"kernel_size": 4, "padding": 0}
    patches, few, many = (
        dict(word.split("=") for word in explain(size=size, stride=stride, **options).problem.key.split()[3:])
        for size, stride in ((64, 4), (19, 1), (34, 1))
    )
    assert [name for name in patches if patches[name] != few[name]] == ["z"]
    assert [name for name in patches if patches[name] != many[name]] == ["positions"]


def test_keys_are_those_of_this_version():
    """Users' tables hold these keys: whoever changes them changes `tuned.VERSION`."""
    assert tuned.VERSION == 3
    numbers = "channels=64 outputs=64 filters=16 taps=9 stored=9216 positions=2048 z=262144"
    assert explain().problem.key.split() == f"conv bfloat16 inference {numbers} layout=first".split()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_call_has_the_key_that_explain_tells(mode, batched):
    """The key depends on training and on the memory format."""
    module = tritonsym.nn.SymmetricConv2d(8, 8, 3, padding=1, padding_mode=mode, symmetry="hv")
    x, seen, route = torch.randn(2, 8, 5, 6), [], plan.route
    for images, training in product((x, x.to(memory_format=torch.channels_last)), (False, True)):
        given = images if batched else images[0]
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
            patch.setattr(plan, "route", lambda problem, *s: seen.append(problem) or route(problem, *s))
            module(given)
            assert plan.conv_problem(*seen[-1]) == tritonsym.explain(module, given).problem
    assert len({plan.conv_problem(*problem).key for problem in seen}) == 4


def test_the_users_table_comes_first():
    put(tuned.shipped_file("sm_90"), "implicit_gemm", TILES["implicit_gemm"])
    put(tuned.user_file("sm_90"), "shift", TILES["shift"])
    assert explain().path == "shift"


CANNOT_RUN = [("fastest", []), (["shift"], []), ("shift", "tiles"), ("shift", 3), ("shift", [[64, 32, 4]])]
CANNOT_RUN += [("shift", [tile] * 2) for tile in ([4096, 64, 4], [48, 32, 4], [0, 32, 4])]
CANNOT_RUN += [("implicit_gemm", [tile] * 3) for tile in ([64, 64, 32, 4, 0], [8, 64, 32, 4, 2], [256, 256, 64, 4, 4])]
CANNOT_RUN += [("fused", [tile, [64, 32, 4]]) for tile in ([2, 128, 16, 8], [16, 16, 64, 4], [64, 32, 4])]
CANNOT_RUN += [("implicit_gemm", [[64, 64, 32, 8, 3]] * 3)]  # miscompiled


@pytest.mark.parametrize("path, tiles", CANNOT_RUN)
def test_what_cannot_run_is_ignored(path, tiles):
    put(tuned.user_file("sm_90"), path, tiles)
    assert not is_measured()


NO_ENTRIES = "{", "[]", "3", '{"entries": {}}', '{"version": 0, "entries": {}}'
BAD_ENTRY = f'{{"version": {tuned.VERSION}, "entries": {{"a": 3}}}}'


@pytest.mark.parametrize("text", ["", *NO_ENTRIES, BAD_ENTRY])
def test_a_bad_table_is_ignored_with_one_warning(text):
    file = tuned.user_file("sm_90")
    file.write_text(text) if text else file.mkdir()
    plan.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not is_measured() and not is_measured(batch=64)
    assert len(caught) == 1
    assert str(file) in str(caught[0].message) and "tritonsym.tune" in str(caught[0].message)


# --- symmetric matrices -----------------------------------------------------------------------------------------------


def linear(rows=8, n=256, target="sm_90", dtype=torch.bfloat16, training=False, **options):
    layer = tritonsym.nn.SymmetricLinear(n, n, device="meta", **options)
    with torch.set_grad_enabled(training):
        return tritonsym.explain(layer, torch.empty(rows, n, device="meta", dtype=dtype), target)


def gram(n=256, k=256, batch=1, target="sm_90", dtype="bfloat16"):
    return plan.plan(plan.gram_problem((batch, n, k), target, dtype))


#: Plans, and tiles that they take only from a table.
MATRICES = {
    "strips": (linear, ((64, 16, 32, 4, 2), (64, 64, 32, 4, 2))),
    "tiles": (partial(linear, rows=100), ((64, 128, 32, 8, 2), (64, 64, 32, 4, 2))),
    "training": (partial(linear, training=True), ((64, 16, 32, 4, 2), (64, 64, 32, 4, 2))),
    "gram": (gram, ((64, 64, 32, 4, 2),)),
}


@pytest.mark.parametrize(("explain", "tiles"), MATRICES.values(), ids=MATRICES)
def test_what_decides_on_the_path_of_a_matrix(explain, tiles):
    """A forced path, the backend 'reference', the measurement, the estimate, in this order."""
    pytest.importorskip("triton")

    def planned(**options):
        found = explain(**options)
        return found.path, found.tiles, found.why.split(".")[0]

    forced, measured = "Forced by tritonsym", "Measured on sm_90: the fastest path"
    other = ((16, 16, 16, 1, 1),) * len(tiles)
    with tritonsym.backend("triton"):
        picked = explain().tiles
    assert len({picked, tiles, other}) == 3
    assert explain().path == "reference" and "estimate" in explain().why
    assert explain(n=4096).path == "implicit_gemm" and "estimate" in explain(n=4096).why
    put(tuned.user_file("sm_90"), "implicit_gemm", tiles, explain().problem)
    assert planned() == ("implicit_gemm", tiles, measured)
    with tritonsym.path("implicit_gemm"):
        assert planned() == ("implicit_gemm", tiles, forced)
    with tritonsym.path("implicit_gemm", other):
        assert planned() == ("implicit_gemm", other, forced)
    with tritonsym.path("reference"):
        assert planned() == ("reference", (), forced)
    with tritonsym.backend("triton"):
        assert planned() == ("implicit_gemm", tiles, measured)
    with tritonsym.backend("reference"):
        assert planned() == ("reference", (), "Forced by the backend 'reference'")
        with tritonsym.path("implicit_gemm"):
            assert planned() == ("implicit_gemm", picked, forced)
    put(tuned.user_file("sm_90"), "reference", [], explain().problem)
    assert planned() == ("reference", (), measured)
    with tritonsym.backend("triton"):
        assert planned() == ("implicit_gemm", picked, "Forced by the backend 'triton'")
    put(tuned.user_file("sm_90"), "reference", [], explain(n=4096).problem)
    assert planned(n=4096) == ("reference", (), measured)


def test_a_matrix_that_is_never_unpacked_is_measured_by_itself():
    pytest.importorskip("triton")
    packed = partial(linear, never_unpack=True)
    put(tuned.user_file("sm_90"), "implicit_gemm", MATRICES["strips"][1], linear().problem)
    assert packed().why.startswith("Never unpacked")
    put(tuned.user_file("sm_90"), "reference", [], packed().problem)
    assert packed().path == "implicit_gemm" and packed().why.startswith("Never unpacked")
    put(tuned.user_file("sm_90"), "implicit_gemm", MATRICES["strips"][1], packed().problem)
    assert packed().tiles == MATRICES["strips"][1] and packed().why.startswith("Measured")


SQUARE, STRIP = (64, 64, 32, 4, 2), (64, 32, 32, 4, 2)
UNFIT = [
    (linear, "shift", [(64, 16, 4)] * 2),
    (linear, "implicit_gemm", [STRIP]),
    (linear, "implicit_gemm", [STRIP, (64, 32, 32, 4, 2)]),  # the gradient needs a square tile
    (linear, "implicit_gemm", [(64, 128, 32, 8, 2), SQUARE]),
    (linear, "implicit_gemm", [(32, 32, 64, 4, 2), SQUARE]),  # steps across the diagonal
    (partial(linear, rows=33), "implicit_gemm", [STRIP, SQUARE]),
    (partial(linear, rows=65), "implicit_gemm", [(64, 32, 64, 4, 2), SQUARE]),  # steps across the diagonal
    (partial(linear, rows=65), "implicit_gemm", [(256, 128, 128, 8, 4), SQUARE]),  # shared memory
    (partial(linear, target="sm_86"), "implicit_gemm", [STRIP, (128, 128, 64, 8, 4)]),
    (gram, "implicit_gemm", [(64, 32, 32, 4, 2)]),
    (gram, "implicit_gemm", [(128, 128, 64, 2, 2)]),  # registers
]


@pytest.mark.parametrize(("explain", "path", "tiles"), UNFIT)
def test_tiles_of_matrices_that_do_not_fit(explain, path, tiles):
    """In a table they are ignored; forced, they are an error."""
    pytest.importorskip("triton")
    put(tuned.user_file(explain().problem.target), path, tiles, explain().problem)
    assert "estimate" in explain().why
    with tritonsym.path(path, tuple(tiles)), pytest.raises(ValueError, match=f"'{path}' is forced"):
        explain()


def test_keys_of_matrices():
    assert linear().problem.key == "SymmetricLinear bfloat16 inference n=256 rows=8"
    assert linear(training=True).problem.key == "SymmetricLinear bfloat16 training n=256 rows=8"
    assert linear(never_unpack=True).problem.key == "SymmetricLinear bfloat16 inference n=256 rows=8 packed"
    assert gram(batch=3).problem.key == "gram bfloat16 n=256 k=256 batch=4"
    rounded = {rows: int(linear(rows=rows).problem.key.split("=")[-1]) for rows in (0, 1, 2, 5, 8, 9, 64, 65, 129)}
    assert rounded == {0: 1, 1: 1, 2: 2, 5: 8, 8: 8, 9: 16, 64: 64, 65: 128, 129: 256}
    assert len({gram(n, k, batch).problem.key for n in (255, 256) for k in (7, 8) for batch in (0, 1, 2, 5)}) == 16


def test_a_tile_that_fits_some_rows_fits_all_with_their_key():
    fit = {}
    for rows, columns in product(range(1, 200), (16, 32, 64, 128)):
        problem = plan.linear_problem((rows, 256), "sm_90", "bfloat16")
        tiles = ((64, columns, 16, 4, 2), SQUARE)
        fit.setdefault((problem.key, columns), set()).add(problem.runs("implicit_gemm", tiles))
    assert all(len(found) == 1 for found in fit.values())


def test_a_gpu_that_is_there_has_its_table_by_its_name(monkeypatch):
    """Its estimate goes by its architecture."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    here, there = linear(n=4096, target="cuda"), linear(n=4096)
    assert (here.path, here.tiles, here.why) == (there.path, there.tiles, there.why)
    put(tuned.user_file("nvidia-h200"), "implicit_gemm", MATRICES["strips"][1], here.problem)
    assert linear(n=4096, target="cuda").why.startswith("Measured on nvidia-h200")
    assert tuned.table_name("sm_90") == "sm_90"


# --- files ------------------------------------------------------------------------------------------------------------

RECORD = """
import sys
from pathlib import Path
from tritonsym import tuned
file, number = sys.argv[1:]
for i in range(20):
    tuned.record(Path(file), {f"{number} {i}": {"path": "reference", "tiles": []}})
"""


def test_processes_that_record_at_once_lose_nothing(tmp_path):
    file = tmp_path / "new" / "gpu.json"
    processes = [subprocess.Popen([sys.executable, "-c", RECORD, file, str(number)]) for number in range(3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    assert len(tuned.read(file)) == 60
    assert {path.name for path in file.parent.iterdir()} == {"gpu.json", "gpu.lock"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "table.json"
    tuned.write(file, "old")
    with pytest.raises(TypeError):
        tuned.write(file, 3)
    assert file.read_text() == "old" and [*tmp_path.glob("*.tmp")] == []


def test_shipped_tables_lie_beside_the_kernels():
    """`.ci/lint` builds a wheel with such a table."""
    kernels = importlib.import_module("tritonsym.kernels")
    assert SHIPPED("nvidia-h200") == Path(kernels.__file__).parent / "tuned" / "nvidia-h200.json"


def test_a_user_without_a_home_has_no_tables(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tuned.Path, "home", fail)
    assert tuned.user_file("sm_90").parent.name == "tritonsym"
    plan.forget()
    assert explain().path


def test_a_measurement_on_this_cpu_comes_before_the_rule():
    before = explain(target="cpu", dtype=torch.float32)
    other = {"reference": "shift", "shift": "reference"}[before.path]
    name = tuned.table_name("cpu")
    assert name.startswith("cpu-") and name.endswith(f"-{torch.get_num_threads()}-threads")
    put(tuned.user_file(name), other, [], before.problem)
    after = explain(target="cpu", dtype=torch.float32)
    assert after.path == other and after.why == f"Measured on {name}: the fastest path."
    layer = tritonsym.nn.SymmetricConv2d(64, 64, 3, padding=1, symmetry="hv")
    x = torch.randn(8, 64, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
    with tritonsym.path(before.path):
        assert explain(target="cpu", dtype=torch.float32).path == before.path
    with tritonsym.backend("reference"):
        assert explain(target="cpu", dtype=torch.float32).why == "Forced by the backend 'reference'."
    put(tuned.user_file(name), "implicit_gemm", [], before.problem)
    assert explain(target="cpu", dtype=torch.float32).path == before.path, "no such path on a CPU"


def test_tables_are_written_where_no_file_can_be_locked(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    file = tuned.user_file("some")
    tuned.record(file, {"key": {"path": "reference", "tiles": []}})
    assert tuned.read(file) == {"key": {"path": "reference", "tiles": []}}

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
from tritonsym import calls, dispatch, tuned

TILES = {"shift": ((128, 32, 4), (64, 32, 4)), "expand": ((64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (64, 64, 64, 4, 2))}

SHIPPED = tuned.shipped_file


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """No table of this machine; one folder for the user's and one for the shipped ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "shipped").mkdir()
    (tmp_path / "tritonsym").mkdir()
    monkeypatch.setattr(tuned, "shipped_file", lambda name: tmp_path / "shipped" / f"{name}.json")
    dispatch.forget()
    yield
    dispatch.forget()


def explain(channels=64, batch=8, size=16, target="sm_90", dtype=torch.bfloat16, layer="SymmetricConv2d", **options):
    options = {"kernel_size": 3, "padding": 1, "symmetry": "hv", **options}
    module = getattr(tritonsym.nn, layer)(channels, channels, **options, device="meta")
    x = torch.empty(batch, channels, size, size, device="meta", dtype=dtype)
    with torch.no_grad():
        return tritonsym.explain(module, x, target)


def put(file, path, tiles, problem=None, version=tuned.VERSION):
    entries = {(problem or explain().problem).key: {"path": path, "tiles": tiles}}
    file.write_text(json.dumps({"version": version, "entries": entries}))
    dispatch.forget()


@pytest.mark.parametrize("path", TILES)
def test_a_measurement_comes_before_the_estimate(path):
    assert explain().path == "reference" and "estimate" in explain().why
    put(tuned.shipped_file("sm_90"), path, TILES[path])
    plan = explain()
    assert (plan.path, plan.tiles) == (path, TILES[path])
    assert plan.why == "Measured on sm_90: the fastest path."
    with tritonsym.backend("triton"):
        assert explain().tiles == TILES[path]
    with tritonsym.path(path):
        assert explain().tiles == TILES[path]
    with tritonsym.backend("reference"):
        assert explain().path == "reference"


def test_only_for_what_was_measured():
    put(tuned.user_file("sm_90"), "shift", TILES["shift"])
    assert explain(batch=9).path == "shift", "positions are rounded"
    others = [
        {"batch": 32},
        {"channels": 128},
        {"dtype": torch.float16},
        {"target": "sm_80"},
        {"target": "cpu"},
        {"symmetry": "h"},
        {"stride": 2},
        {"layer": "TiedConv2d"},
    ]
    assert [other for other in others if explain(**other).why.startswith("Measured")] == []
    with tritonsym.backend("triton"):
        assert not explain(target="cpu").why.startswith("Measured")


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
    """Of tables that users have: whoever changes them changes `tuned.VERSION`."""
    assert tuned.VERSION == 2
    assert explain().problem.key == (
        "SymmetricConv bfloat16 inference channels=64 outputs=64 filters=16 taps=9 stored=9216 positions=2048 z=262144 "
        "layout=first"
    )


def test_training_is_another_measurement():
    module = tritonsym.nn.SymmetricConv2d(8, 8, 3, symmetry="hv", device="meta")
    x = torch.empty(1, 8, 5, 5, device="meta")
    training = tritonsym.explain(module, x, "sm_90").problem
    with torch.no_grad():
        assert training.key != tritonsym.explain(module, x, "sm_90").problem.key


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_a_call_has_the_key_that_explain_tells(mode, batched, monkeypatch):
    module = tritonsym.nn.SymmetricConv2d(8, 8, 3, padding=1, padding_mode=mode, symmetry="hv")
    x, keys, plan = torch.randn(2, 8, 5, 6), [], calls.plan
    monkeypatch.setattr(calls, "plan", lambda *a, **o: keys.append(plan(*a, **o).plan.problem.key) or plan(*a, **o))
    for images in (x, x.to(memory_format=torch.channels_last)):
        given = images if batched else images[0]
        module(given)
        assert keys.pop() == tritonsym.explain(module, given).problem.key


def test_another_layout_is_another_measurement():
    module = tritonsym.nn.SymmetricConv2d(8, 8, 3, symmetry="hv")
    x = torch.randn(2, 8, 5, 5)
    first, last = (
        t.problem.key
        for t in (tritonsym.explain(module, x), tritonsym.explain(module, x.movedim(1, -1).contiguous().movedim(-1, 1)))
    )
    assert first.replace("layout=first", "layout=last") == last
    planned = []
    for t in (x, x.to(memory_format=torch.channels_last)):
        module(t)
        planned.append(calls._calls.find(module.weight)[1].plan.problem.key)
    assert planned == [first, last]


def test_names_of_a_layer_share_their_key():
    layer, x = tritonsym.nn.SymmetricConv2d(8, 8, 3, symmetry="hv"), torch.randn(2, 8, 6, 6)
    planned = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        plan = dispatch._plan
        patch.setattr(dispatch, "_plan", lambda problem, *args: planned.append(problem) or plan(problem, *args))
        layer(x)
        tritonsym.explain(layer, x)
    assert planned[0].layer != planned[1].layer and len({problem.key for problem in planned}) == 1


def test_the_users_table_comes_first():
    put(tuned.shipped_file("sm_90"), "expand", TILES["expand"])
    put(tuned.user_file("sm_90"), "shift", TILES["shift"])
    assert explain().path == "shift"


def test_a_reference_that_was_fastest_is_no_kernel_for_the_backend_triton():
    put(tuned.user_file("sm_90"), "reference", [])
    assert explain().why.startswith("Measured")
    with tritonsym.backend("triton"):
        assert explain().path != "reference" and "estimate" in explain().why


@pytest.mark.parametrize(
    "path, tiles",
    [
        ("shift", [[4096, 64, 4]] * 2),
        ("shift", [[64, 32, 4]]),
        ("shift", [[48, 32, 4]] * 2),
        ("shift", [[0, 32, 4]] * 2),
        ("shift", "tiles"),
        ("shift", 3),
        ("expand", [[64, 64, 32, 8, 3]] * 3),  # miscompiled
        ("expand", [[64, 64, 32, 4, 0]] * 3),
        ("expand", [[8, 64, 32, 4, 2]] * 3),
        ("expand", [[256, 256, 64, 4, 4]] * 3),
        ("fastest", []),
        (["shift"], []),
    ],
)
def test_what_cannot_run_is_ignored(path, tiles):
    put(tuned.user_file("sm_90"), path, tiles)
    assert "estimate" in explain().why


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"version": 0, "entries": {}}',
        '{"entries": {}}',
        f'{{"version": {tuned.VERSION}, "entries": {{"a": 3}}}}',
    ],
)
def test_a_bad_table_is_ignored_with_one_warning(text):
    file = tuned.user_file("sm_90")
    file.write_text(text)
    dispatch.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "estimate" in explain().why and "estimate" in explain(batch=64).why
    assert len(caught) == 1
    assert str(file) in str(caught[0].message) and "tritonsym.tune" in str(caught[0].message)


def test_a_table_that_is_no_file_is_ignored():
    tuned.user_file("sm_90").mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert "estimate" in explain().why


# --- symmetric matrices -----------------------------------------------------------------------------------------------


def linear(rows=8, n=256, target="sm_90", dtype=torch.bfloat16, training=False, **options):
    layer = tritonsym.nn.SymmetricLinear(n, n, device="meta", **options)
    with torch.set_grad_enabled(training):
        return tritonsym.explain(layer, torch.empty(rows, n, device="meta", dtype=dtype), target)


def gram(n=256, k=256, batch=1, target="sm_90", dtype="bfloat16"):
    return dispatch.plan(dispatch.gram_problem((batch, n, k), target, dtype))


#: Plans, and tiles that no plan takes unless told to.
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
        plan = explain(**options)
        return plan.path, plan.tiles, plan.why.split(".")[0]

    forced, measured = "Forced by tritonsym", "Measured on sm_90: the fastest path"
    other = ((16, 16, 16, 1, 1),) * len(tiles)
    with tritonsym.backend("triton"):
        picked = explain().tiles
    assert len({picked, tiles, other}) == 3
    assert explain().path == "reference" and "estimate" in explain().why
    assert explain(n=4096).path == "expand" and "estimate" in explain(n=4096).why
    put(tuned.user_file("sm_90"), "expand", tiles, explain().problem)
    assert planned() == ("expand", tiles, measured)
    with tritonsym.path("expand"):
        assert planned() == ("expand", tiles, forced)
    with tritonsym.path("expand", other):
        assert planned() == ("expand", other, forced)
    with tritonsym.path("reference"):
        assert planned() == ("reference", (), forced)
    tuned.user_file("cpu").write_text(tuned.user_file("sm_90").read_text())  # as the tuner does in the interpreter
    with tritonsym.backend("triton"):
        assert planned() == ("expand", tiles, measured)
        assert explain(target="cpu").tiles != tiles
    with tritonsym.backend("reference"):
        assert planned() == ("reference", (), "Forced by the backend 'reference'")
        with tritonsym.path("expand"):
            assert planned() == ("expand", picked, forced)
    put(tuned.user_file("sm_90"), "reference", [], explain().problem)
    assert planned() == ("reference", (), measured)
    with tritonsym.backend("triton"):
        assert planned() == ("expand", picked, "Forced by the backend 'triton'")
    put(tuned.user_file("sm_90"), "reference", [], explain(n=4096).problem)
    assert planned(n=4096) == ("reference", (), measured)


def test_a_matrix_that_is_never_unpacked_is_measured_by_itself():
    pytest.importorskip("triton")
    packed = partial(linear, never_unpack=True)
    put(tuned.user_file("sm_90"), "expand", MATRICES["strips"][1], linear().problem)
    assert packed().why.startswith("Never unpacked")
    put(tuned.user_file("sm_90"), "reference", [], packed().problem)
    assert packed().path == "expand" and packed().why.startswith("Never unpacked")
    put(tuned.user_file("sm_90"), "expand", MATRICES["strips"][1], packed().problem)
    assert packed().tiles == MATRICES["strips"][1] and packed().why.startswith("Measured")


SQUARE, STRIP = (64, 64, 32, 4, 2), (64, 32, 32, 4, 2)
UNFIT = [
    (linear, "shift", [(64, 16, 4)] * 2),
    (linear, "expand", [STRIP]),
    (linear, "expand", [STRIP, (64, 32, 32, 4, 2)]),  # half of the gradient mirrors a square
    (linear, "expand", [STRIP, "square"]),
    (linear, "expand", [(64, 128, 32, 8, 2), SQUARE]),
    (linear, "expand", [(32, 32, 64, 4, 2), SQUARE]),  # steps across the diagonal
    (linear, "expand", [(48, 32, 16, 4, 2), SQUARE]),
    (partial(linear, rows=33), "expand", [STRIP, SQUARE]),
    (partial(linear, rows=65), "expand", [(64, 32, 64, 4, 2), SQUARE]),  # steps across the diagonal
    (partial(linear, rows=65), "expand", [(256, 128, 128, 8, 4), SQUARE]),  # shared memory
    (partial(linear, target="sm_86"), "expand", [STRIP, (128, 128, 64, 8, 4)]),
    (gram, "expand", [(64, 32, 32, 4, 2)]),
    (gram, "expand", [SQUARE, SQUARE]),
    (gram, "expand", [(128, 128, 64, 2, 2)]),  # registers
]


@pytest.mark.parametrize(("explain", "path", "tiles"), UNFIT)
def test_tiles_of_matrices_that_do_not_fit(explain, path, tiles):
    """Those in a table are ignored, those that are forced an error."""
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


@pytest.mark.parametrize("training", [False, True])
def test_a_packed_layer_plans_as_explained(training):
    layer, x, planned = tritonsym.nn.SymmetricLinear(8, 8), torch.randn(2, 3, 8), []
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
        patch.setattr(dispatch, "plan", lambda problem, plan=dispatch.plan: planned.append(problem) or plan(problem))
        layer(x)
        tritonsym.explain(layer, x)
    assert planned[0] == planned[1] and planned[0].training == training


def test_a_tile_that_fits_some_rows_fits_all_with_their_key():
    by_key = {}
    for rows in range(1, 200):
        problem = dispatch.linear_problem((rows, 256), "sm_90", "bfloat16")
        by_key.setdefault(problem.key, []).append(problem)
    for problems, columns in product(by_key.values(), (16, 32, 64, 128)):
        tiles = ((64, columns, 16, 4, 2), SQUARE)
        assert len({problem.runs("expand", tiles) for problem in problems}) == 1


def test_matrices_on_a_gpu_that_is_there(monkeypatch):
    """Its table by its name, its estimate by its architecture."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    for explain in (linear, gram):
        for n in (256, 4096):
            here, there = explain(n=n, target="cuda"), explain(n=n)
            assert (here.path, here.tiles, here.why) == (there.path, there.tiles, there.why)
        tiles = MATRICES["strips" if explain is linear else "gram"][1]
        put(tuned.user_file("nvidia-h200"), "expand", tiles, explain(target="cuda").problem)
        assert explain(target="cuda").tiles == tiles and "Measured on nvidia-h200" in explain(target="cuda").why


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


def test_tables_are_named_after_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert tuned.gpu("cuda") == "nvidia-h100-80gb-hbm3" and tuned.gpu("sm_90") == "sm_90"


def test_shipped_tables_lie_beside_the_kernels():
    """.ci/lint builds a wheel with one."""
    kernels = importlib.import_module("tritonsym.kernels")
    assert SHIPPED("nvidia-h200") == Path(kernels.__file__).parent / "tuned" / "nvidia-h200.json"


def test_a_user_without_a_home_has_no_tables(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tuned.Path, "home", fail)
    assert tuned.user_file("sm_90").parent.name == "tritonsym"
    dispatch.forget()
    assert explain().path

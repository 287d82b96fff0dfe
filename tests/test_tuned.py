"""Tables of measurements: found, preferred to the estimate, merged, and ignored where they cannot be used."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import tritonsym
from tritonsym import dispatch, tuned

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


def test_training_is_another_measurement():
    module = tritonsym.nn.SymmetricConv2d(8, 8, 3, symmetry="hv", device="meta")
    x = torch.empty(1, 8, 5, 5, device="meta")
    training = tritonsym.explain(module, x, "sm_90").problem
    with torch.no_grad():
        assert training.key != tritonsym.explain(module, x, "sm_90").problem.key


def test_names_of_a_layer_share_their_key():
    layer, x = tritonsym.nn.SymmetricConv2d(8, 8, 3, symmetry="hv"), torch.randn(2, 8, 6, 6)
    planned = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dispatch, "plan", lambda problem, plan=dispatch.plan: planned.append(problem) or plan(problem))
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
    "text", ["{", "[]", "3", '{"version": 0, "entries": {}}', '{"entries": {}}', '{"version": 1, "entries": {"a": 3}}']
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

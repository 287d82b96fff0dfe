"""Models that leave Python: traced, scripted, exported, compiled ahead of time, and loaded without this library."""

import io
import subprocess
import sys

import pytest
import torch
from torch import nn

import tritonsym
import tritonsym.nn as tnn
from tritonsym import materialize

GROWN = 5  # batch size of calls, unlike that of the trace


def saved(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_traces_take_other_batches(any_layer):
    layer, x = any_layer.make().eval(), any_layer.input(GROWN)
    torch.testing.assert_close(saved(torch.jit.trace(layer, any_layer.input(2)))(x), layer(x))


PADDED = [
    (tnn.SymmetricConv1d, {"symmetry": "h"}),
    (tnn.SymmetricConv2d, {"symmetry": "hv", "dilation": 2}),
    (tnn.TiedConv2d, {"symmetry": "hv", "free": 2, "groups": 2}),
    (tnn.OrbitPoolConv2d, {"symmetry": "hv", "padding_mode": "circular"}),
    (tnn.OrbitPoolConv3d, {"symmetry": "h", "reduce": "sum"}),
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("path", ["reference", "shift"])
@pytest.mark.parametrize("kernel_size", [3, 4])
@pytest.mark.parametrize(("cls", "options"), PADDED)
def test_traces_with_same_padding_take_other_sizes(cls, options, kernel_size, path):
    model = nn.Sequential(*(cls(4, 4, kernel_size, padding="same", **options) for _ in range(2)))
    ndim = len(model[0].kernel_size)
    x, larger = torch.randn(1, 4, *(8, 9, 7)[:ndim]), torch.randn(2, 4, *(12, 9, 8)[:ndim])
    with tritonsym.path(path), torch.no_grad():
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(larger), model(larger))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("over", ["swap", "cyclic", "flip", "permutations"])
def test_a_traced_symmetrize_refuses_another_number_of_entries(over):
    layer = tnn.Symmetrize(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), over)
    traced = torch.jit.trace(layer, torch.randn(2, 4, 3))
    x = torch.randn(GROWN, 4, 3)
    torch.testing.assert_close(traced(x), layer(x))
    for n in (2, 6):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            traced(torch.randn(2, n, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_materialized_layers_are_scripted(any_layer):
    layer, x = any_layer.make().eval(), any_layer.input(GROWN)
    torch.testing.assert_close(saved(torch.jit.script(materialize(layer)))(x), layer(x))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_exports_need_torch_only(any_layer, plain, dynamic):
    layer = any_layer.make().eval()
    model, x = materialize(layer) if plain else layer, any_layer.input(GROWN)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (any_layer.input(2 if dynamic else GROWN),), dynamic_shapes=shapes)
    assert not [n for n in program.graph.nodes if "tritonsym" in str(n.target)]
    torch.testing.assert_close(program.module()(x), layer(x))


LOADS = """
import sys
sys.modules["tritonsym"] = None
import torch
model = torch.export.load(sys.argv[1]).module() if sys.argv[1].endswith("pt2") else torch.jit.load(sys.argv[1])
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(model(x), y)
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["pt2", "jit"])
def test_a_saved_export_loads_without_this_library(tmp_path, kind):
    model = nn.Sequential(
        tnn.SymmetricConv1d(2, 4, 3, symmetry="h", activation="gelu"),
        tnn.Symmetrize(nn.Sequential(tnn.SymmetricLinear(6, 6), nn.Tanh()), "flip"),
    )
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "xy")
    if kind == "pt2":
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    else:
        torch.jit.save(torch.jit.script(materialize(model)), tmp_path / "model.jit")
    run = [sys.executable, "-c", LOADS, str(tmp_path / f"model.{kind}"), str(tmp_path / "xy")]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_compiled_ahead_of_time(tmp_path, plain):
    model = nn.Sequential(
        tnn.SymmetricConv2d(4, 8, 3, symmetry="hv"), nn.ReLU(), tnn.TiedConv2d(8, 8, 3, symmetry="d4"),
        tnn.OrbitPoolConv2d(8, 4, 3, symmetry="h"), nn.Flatten(), nn.LazyLinear(7), tnn.SymmetricLinear(7, 7),
    )  # fmt: skip
    x = torch.randn(2, 4, 9, 9)
    model(x)
    with torch.no_grad():
        program = torch.export.export(
            materialize(model) if plain else model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)
        )
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled, larger = torch._inductor.aoti_load_package(package), torch.randn(GROWN, 4, 9, 9)
        torch.testing.assert_close(compiled(larger), model(larger))

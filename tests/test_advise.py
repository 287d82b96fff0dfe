"""`advise` times every replaceable layer on the input it gets; later plans take the paths that it saves."""

import json
import sys

import pytest
import torch
from matplotlib.image import imread
from torch import nn

import tritonsym
from tritonsym import plan, tuned
from tritonsym.__main__ import main


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return {"logits": self.head(self.point(self.depthwise(x)).mean((2, 3)))}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan.forget()
    yield
    plan.forget()


def test_every_layer_that_is_called_is_timed_in_its_place():
    model, x = Net(), torch.randn(2, 1, 13, 12)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    advice = tritonsym.advise(model, x, ["h", "hv"], rounds=1)
    assert {(row.layers, row.symmetry, row.input) for row in advice} == {
        (names, symmetry, shape)
        for symmetry in ("h", "hv")
        for names, shape in (
            (("stem",), (2, 1, 13, 12)),
            (("blocks.0", "blocks.1"), (2, 8, 6, 5)),
            (("depthwise",), (2, 8, 6, 5)),
        )
    }
    block = next(row for row in advice if row.layers[0] == "blocks.0" and row.symmetry == "hv")
    assert (block.parameters_before, block.parameters_after) == (8 * 72 + 8, 2 * 72 + 8)
    assert block.seconds["forward"].keys() == {"dense", "reference", "shift"}
    assert [row.saved for row in advice] == sorted((row.saved for row in advice), reverse=True)
    assert block.gain("forward", "shift") == block.seconds["forward"]["dense"] / block.seconds["forward"]["shift"]
    for whole, symmetry in zip(advice.models, ("h", "hv"), strict=True):
        assert whole.symmetry == symmetry and whole.parameters_before == sum(p.numel() for p in model.parameters())
    assert dict(advice.skipped).keys() == {"point"}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert not tuned.user_file(tuned.table_name("cpu")).exists()
    text = str(advice)
    assert "blocks.0 and 1 more" in text and "(whole model)" in text and "left as it is: point: its kernel" in text


def test_what_is_saved_is_what_later_plans_take():
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3)), torch.randn(1, 4, 9, 9)
    advice = tritonsym.advise(model, x, ["hv"], rounds=1, save=True)
    converted, _ = tritonsym.replace_layers(model, "hv")
    for mode in ("forward", "training"):
        with torch.set_grad_enabled(mode == "training"):
            planned = tritonsym.explain(converted[0], x)
        seconds = {path: s for path, s in advice[0].seconds[mode].items() if path != "dense"}
        assert planned.why.startswith("Measured on cpu-") and planned.path == min(seconds, key=seconds.get)


def test_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv1d(2, 4, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main(["advise", "mine:net", "--input", "2,2,30", "--rounds", "1", "--save", *files]) == 0
    out = capsys.readouterr().out
    assert "(whole model)" in out and f"The fastest paths are in {tuned.user_file(tuned.table_name('cpu'))}" in out
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["symmetry"] for row in found["rows"]] == ["h", "h"] and found["threads"] == torch.get_num_threads()
    assert found["command"][:4] == ["python", "-m", "tritonsym", "advise"] and "commit" in found
    assert imread(tmp_path / "a.png")[..., :3].std() > 0.05
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere:net", "--input", "1,2,30"],
            "expected PACKAGE:BUILDER, got 'nowhere:net' (No module named 'nowhere')",
        ),
        (["torch:nothing", "--input", "1,2,30"], "expected PACKAGE:BUILDER, got 'torch:nothing'"),
        (["torch:__version__", "--input", "1,2,30"], "is a TorchVersion and cannot be called"),
        (["torch:get_num_threads", "--input", "1,2,30"], "the builder returned a int, expected a torch.nn.Module"),
        (["torch.nn:Identity", "--input", "1,x"], "expected sizes such as 8,3,224,224, got '1,x'"),
        (["torch.nn:Identity", "--input", "1,2"], "no convolution of Identity can be replaced (it calls none)"),
        (["torch.nn:Identity", "--input", "1,2", "--symmetry", "q"], "unknown name 'q'"),
        (["torch.nn:Identity", "--input", "1,2", "--channels-last"], "two or three spatial axes"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["advise", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_bad_input():
    with pytest.raises(TypeError, match=r"advise: expected a torch\.nn\.Module, got list"):
        tritonsym.advise([], torch.ones(1))
    with pytest.raises(TypeError, match=r"advise: x must be a torch\.Tensor, got list"):
        tritonsym.advise(nn.Identity(), [1])

"""What README.md shows is true: its example runs, its table is generated."""

import json
import re
from pathlib import Path

import torch
from torch import nn as torch_nn

import tritonsym
from tritonsym.__main__ import PERF
from tritonsym.perf.table import estimate, groups, matrices, table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_example_runs(capsys):
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    model = torch_nn.Sequential(torch_nn.Conv2d(3, 8, 3), torch_nn.ReLU(), torch_nn.Conv2d(8, 10, 3))
    names = {"model": model, "dense_model": model, "x": torch.randn(2, 64, 9, 9)}
    exec(code, names)
    assert type(names["model"][0]) is torch_nn.Conv2d
    assert [row.symmetry for row in names["report"]] == ["hv:8", "hv:8 free:2"]
    assert "SymmetricConv2d" in capsys.readouterr().out


def test_matrices_run():
    *_, code = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {"tritonsym": tritonsym, "S": torch.randn(6, 6), "x": torch.randn(4, 6), "G": torch.randn(2, 3, 5)}
    exec(code.replace("T.newton_schulz", "update = T.newton_schulz"), names)
    assert names["packed"].shape == (7, 3) and names["C"].shape == (2, 3, 3) and names["update"].shape == (2, 3, 5)


def test_table_is_generated():
    [shown] = re.findall(r"<!-- table -->\n(.*?)\n<!-- /table -->", README, re.S)
    name, *one_thread = re.findall(r"`(perf/results/[^`]+\.json)`", shown)
    more = [part for other in one_thread for part in (json.loads((ROOT / other).read_text()), other)]
    assert shown == table(json.loads((ROOT / name).read_text()), name, *more)


def test_table_of_equivariant_networks_is_generated():
    [shown] = re.findall(r"<!-- groups -->\n(.*?)\n<!-- /groups -->", README, re.S)
    [name] = re.findall(r"Raw samples: `(perf/results/[^`]+\.json)`", shown)
    assert shown == groups(json.loads((ROOT / name).read_text()), name)


def test_network_runs():
    _, code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {"x": torch.randn(2, 3, 9, 9)}
    exec(code, names)
    assert names["net"](names["x"]).shape == (2, 16, 9, 9)


def test_table_of_matrices_is_generated():
    [shown] = re.findall(r"<!-- matrices -->\n(.*?)\n<!-- /matrices -->", README, re.S)
    [name] = re.findall(r"`(perf/results/[^`]+\.json)`", shown)
    assert shown == matrices(json.loads((ROOT / name).read_text()), name)


def test_estimate_is_generated_and_says_so():
    [shown] = re.findall(r"<!-- estimate -->\n(.*?)\n<!-- /estimate -->", README, re.S)
    assert shown == estimate(), "python -m tritonsym.perf.table perf/results/NAME.json --write README.md"
    assert re.search("^#+ Estimate .*not measured$", shown, re.M)


def test_pictures_are_there():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / name).exists()


def test_commands_of_measurements_exist():
    for command in re.findall(r"^python -m tritonsym (\w+)", README, re.M):
        assert command in PERF
    assert (ROOT / "perf" / "run_all.sh").exists()

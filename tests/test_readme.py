"""What README.md shows is true: its code and its commands run, its tables and pictures are generated."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import tritonsym
from tritonsym.__main__ import main
from tritonsym.perf import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = table.pages(ROOT)
COMMANDS = [command.strip() for command in re.findall(r"^python -m tritonsym ([^#\n]+)", README, re.M)]
SLOW = ("check", "bench")


@pytest.fixture(autouse=True)
def one_thread():
    """Leave the other cores to tests that run at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_is_short():
    assert len(README.splitlines()) <= 160
    limits = README.partition("## Limits\n")[2].partition("\n## ")[0]
    assert len(limits.strip().splitlines()) <= 6


def test_code_runs_as_it_stands(capsys):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(code, names)
    out = capsys.readouterr().out
    assert "shift" in out and "SymmetricConv2d" in out
    assert [row.symmetry for row in names["report"]] == ["hv:64", "hv:128", "hv:128"]
    assert names["layer"].weight.shape == (16, 64, 3, 3) and names["y"].shape == (8, 64, 32, 32)
    assert names["packed"].shape == (7, 3) and [u.shape for u in names["update"]] == [(3, 5), (4, 4)]
    assert not any(type(m).__module__.startswith("tritonsym") for m in names["plain"].modules())
    names["again"].load_state_dict(names["model"].state_dict())
    tritonsym.testing.assert_matches_reference(names["model"], names["images"].requires_grad_())


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.slow] * c.startswith(SLOW), id=c) for c in COMMANDS]
)
def test_commands_run_as_they_stand(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "--baseline" in command:
        pytest.importorskip("matplotlib")
        assert main(shlex.split(next(c for c in COMMANDS if "--output" in c))) == 0
    if command.startswith("tune") and not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(shlex.split(command))
        assert "no kernels to tune on the CPU" in capsys.readouterr().err
    else:
        assert main(shlex.split(command)) == 0


def test_commands_within_sentences_exist():
    mentioned = re.findall(r"`python\s-m\stritonsym ([^`]+)`", README)
    assert len(mentioned) >= 3
    for command in mentioned:
        assert main(shlex.split(command)) == 0
    assert f"`{sys.modules[table.__name__].__doc__.split('[')[0].split('    ')[1].strip()}`" in README.replace(
        "-m\n", "-m "
    )
    assert (ROOT / "perf" / "run_all.sh").exists() and (ROOT / ".ci" / "run").exists()


def test_installations_name_what_there_is():
    project = (ROOT / "pyproject.toml").read_text()
    for kind in ("demo", "tests"):
        [command] = re.findall(rf"<!-- {kind} -->\n```sh\n(.*)\n```", README)
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c tests/constraints.txt torch && ")
        for extra in re.search(r'-e "\.\[(.*)\]"', command)[1].split(","):
            assert re.search(rf"^{extra} = \[", project, re.M)
    assert (ROOT / "tests" / "constraints.txt").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_and_figure_are_generated(page):
    assert page.read_text() == PAGES[page], "run python -m tritonsym.perf.table"


def test_pictures_and_files_are_there():
    for page in PAGES:
        for name in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / name).exists(), name
    assert (ROOT / "perf/results/symmetries.svg").stat().st_size < 60_000


def test_what_was_not_measured_says_so():
    text = (ROOT / "perf/results/README.md").read_text()
    assert re.search("^#+ Estimate .*not measured$", text, re.M)
    assert "No kernel has run on a GPU yet" in README and "On a GPU nothing was measured" in README

"""``python -m tritonsym``: exit codes, what it prints, and the picture it draws."""

import re
import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread

import tritonsym
from tritonsym import __main__ as command_line
from tritonsym import demo, explain, plan, reference
from tritonsym.__main__ import main


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("TRITONSYM_BACKEND", "reference")
    monkeypatch.setattr(plan, "ENVIRONMENT", "reference")
    assert main(["info"]) == 0
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["tritonsym"] == tritonsym.__version__
    assert rows["torch"] == torch.__version__
    assert rows["cpu"].endswith(f", {torch.get_num_threads()} threads")
    assert rows["backend"] == rows["TRITONSYM_BACKEND"] == "reference"
    assert {"triton", "numpy", "python"} <= rows.keys()


def test_info_with_a_wrong_backend(capsys, monkeypatch):
    monkeypatch.setattr(plan, "ENVIRONMENT", "fast")
    assert main(["info"]) == 0
    assert re.search(r"^backend +none: TRITONSYM_BACKEND='fast': expected one of auto", capsys.readouterr().out, re.M)


def test_info_without_triton(capsys, monkeypatch):
    def version(package):
        raise command_line.PackageNotFoundError(package)

    monkeypatch.setattr(command_line, "version", version)
    assert main(["info"]) == 0
    assert re.search(r"^triton +not installed$", capsys.readouterr().out, re.M)


def test_as_a_module():
    """In a separate process: neither the package nor its command line imports what only the demo needs."""
    script = "import sys, runpy; runpy.run_module('tritonsym', run_name='__main__')"
    loud = f"import atexit, sys; atexit.register(lambda: print(sorted(sys.modules), file=sys.stderr)); {script}"
    result = subprocess.run([sys.executable, "-c", loud, "info"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "tritonsym" in result.stdout
    modules = set(re.findall(r"'([^']+)'", result.stderr))
    assert "tritonsym.testing" in modules
    assert not modules & {"matplotlib", "sklearn", "triton", "tritonsym.demo"}


def test_check_all(capsys):
    assert main(["check", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.endswith("  ok")]
    layers = {line.split()[0] for line in table}
    without_products = {name for name in tritonsym.nn.__all__ if re.match("Group(Batch|Pool|Drop)", name)}
    assert layers == set(tritonsym.nn.__all__) - without_products
    assert {line.split(" cpu ")[0].split()[-1] for line in table} == {str(dtype)[6:] for dtype in command_line.DTYPES}
    assert len({line.index(" cpu ") for line in table}) == 1
    assert all("reference" in line for line in table)
    assert re.search(r"SymmetricConv2d +d4 +float32 +cpu +reference shift symmetric equivariant +ok", out)
    assert max(map(len, out.splitlines())) <= 100
    assert f"all {len(table)} ok" in out.splitlines()[-1]


def test_check_reports_what_is_wrong(capsys, monkeypatch):
    right = reference.conv
    monkeypatch.setattr(reference, "conv", lambda *args: right(*args) * (1.01 if args[-1].blocks[0].orbits else 1))
    monkeypatch.setattr(command_line, "DTYPES", (torch.float32,))
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [i for i, line in enumerate(lines) if line.endswith("FAIL")]
    layers = {"TiedConv1d", "TiedConv2d", "TiedConv3d", "OrbitPoolConv2d", "OrbitPoolConv3d"}  # pools: 'sum' and 'mean'
    assert {lines[i].split()[0] for i in failed} == layers
    for i in failed:
        assert "reference: AssertionError: assert_matches_reference: output is wrong" in lines[i + 1]
    assert lines[-1].startswith(f"{len(failed)} of ")


def numbers(text):
    """The words of all lines without times, which also set the widths of columns."""
    return [line.split() for line in text.splitlines() if " ms " not in line]


@pytest.mark.parametrize(
    "symmetry, filters, path", [("hv", "hv:64", "shift"), ("h:50%, d4:8", "h:32 d4:8 free:24", "reference")]
)
def test_demo(tmp_path, capsys, symmetry, filters, path):
    picture = tmp_path / "demo.png"
    command = ["demo", "--epochs", "2", "--seed", "3", "--symmetry", symmetry, "--output", str(picture)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^0 +Conv2d +SymmetricConv2d +{filters} ", out, re.M)
    accuracy = [float(number) for number in re.search(r"accuracy +(\S+) % +(\S+) %", out).groups()]
    assert min(accuracy) > 60
    dense, symmetric, share = re.search(r"convolution parameters +(\S+) +(\S+) +(\S+)%", out).groups()
    assert dense == "223,104"
    assert float(share) == pytest.approx(100 * int(symmetric.replace(",", "")) / 223104, abs=0.05)
    assert re.findall(r"^\d +SymmetricConv2d +(\w+) ", out, re.M) == ["reference", path, path]
    assert re.search(r"time per training step +[\d.]+ ms +[\d.]+ ms +[\d.]+%, medians", out)
    assert "against the reference, outputs and all gradients: agrees." in out
    assert all("tritonsym" in line for line in out.splitlines()[-3:-1]) and len(demo.NEXT.splitlines()) == 3
    assert out.endswith(f"{demo.NEXT}\n")
    verdict = accuracy[1] - accuracy[0] >= -2 and float(share) <= 60
    assert ("\nReached: " in out) == verdict and ("NOT reached on this run" in out) != verdict
    image = imread(picture)
    assert image.shape[1] > image.shape[0] > 500
    assert image[..., :3].std() > 0.1
    assert main(command) == 0
    assert numbers(capsys.readouterr().out) == numbers(out)


def test_demo_with_a_broken_layer(tmp_path, capsys, monkeypatch):
    right = demo.train

    def break_after_training(*args):
        right(*args)
        monkeypatch.setattr(reference, "image", lambda w, g: w)

    monkeypatch.setattr(demo, "train", break_after_training)
    assert main(["demo", "--epochs", "1", "--output", str(tmp_path / "demo.png")]) == 1
    assert "all gradients: DIFFERS: assert_matches_reference: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "accuracy, symmetry, reached",
    [((97, 95), "h", True), ((97, 94.9), "h", False), ((97, 99), {"h": "50%"}, False)],
)
def test_verdict(accuracy, symmetry, reached):
    plain = demo.plain_cnn()
    model, _ = tritonsym.replace_layers(plain, conv=symmetry)
    contestants = [demo.Contestant(name, m, steps=5) for name, m in (("dense", plain), ("symmetric", model))]
    for contestant, percent in zip(contestants, accuracy, strict=True):
        contestant.accuracy.append(percent)
        contestant.seconds += [0.002, 0.001, 5]
    x = torch.zeros(4, 1, 8, 8)
    text = demo.summary(*contestants, explain(model, x))
    assert ("\nReached: within 2 points" in text) == reached
    assert ("\nNOT reached on this run: within 2 points" in text) == (not reached)
    # 8 x 8, 8 x 8 and 4 x 4 positions
    dense = 64 * 64 * 25 + 64 * 128 * 64 * 9 + 16 * 128 * 128 * 9
    share = 0.5 if symmetry == "h" else 0.75
    assert re.search(rf"multiply-adds per image +{dense:,} +{int(share * dense):,} +{share:.1%}, stored", text)
    assert re.search(r"step +2.00 ms +2.00 ms +100.0%, medians", text)


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "tqdm"])
def test_demo_without_its_extra(tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(demo, "run", lambda *args: pytest.fail("started without its extras"))
    assert main(["demo", "--output", str(tmp_path / "demo.png")]) == 1
    assert capsys.readouterr().err == f'The demo needs {missing}: pip install "tritonsym[demo]"\n'


def test_measurements_without_their_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == 'The bench needs matplotlib: pip install "tritonsym[perf]"\n'
    with pytest.raises(SystemExit) as stop:  # needs no plots: it starts, and finds no GPU
        main(["tune"])
    assert stop.value.code == 2 and "no kernels to tune on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "check", "docs", "demo", "advise", "bench", "tune"])
def test_help_needs_no_extra(command):
    code = """
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "tqdm", "sklearn", "triton"), None))
from tritonsym.__main__ import main
main(sys.argv[1:])
"""
    result = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and f"tritonsym {command}" in result.stdout, result.stderr
    assert f"python -m tritonsym {command}" in result.stdout.partition("\n\n")[2], "no example"
    assert len(result.stdout.splitlines()) <= 40


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: command"),
        (["benchmark"], "invalid choice: 'benchmark' (choose from"),
        (["info", "--fast"], "unrecognized arguments: --fast"),
        (["check", "--device", "abacus"], "device 'abacus' cannot be used: Expected one of cpu"),
        (["check", "--device", "meta"], "device 'meta' cannot be used"),
        (["docs", "Nothing"], "docs: no public name 'Nothing'; python -m tritonsym docs lists them"),
        (["demo", "--epochs", "0"], "expected a positive number, got '0'"),
        (["demo", "--output", "nowhere/demo.png"], "an existing folder, got 'nowhere/demo.png'"),
        (["demo", "--output", "/"], "expected a .png, .pdf or .svg file"),
        (["demo", "--output", "demo.txt"], "expected a .png, .pdf or .svg file"),
        (["demo", "--symmetry", "q7"], "unknown symmetry 'q7'"),
        (["demo", "--symmetry", "h:3%%"], "'3%%' is not a percentage"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_docs(capsys):
    assert main(["docs"]) == 0
    tables = capsys.readouterr().out
    for module in (tritonsym, tritonsym.nn, tritonsym.functional, tritonsym.testing):
        for name in module.__all__:
            if name not in ("__version__", "functional", "nn", "testing"):
                stem, axes = re.fullmatch(r"(.*?)([123]d)?", name).groups("")
                assert re.search(
                    rf"^{stem}(1d/2d/)?{axes or ' '}", tables.replace("1d/2d/3d", "1d/2d/" + axes), re.M
                ), name
    assert "TopKPool1d  " in tables and "/2d" not in re.search("TopKPool.*", tables)[0]
    assert main(["docs", "--files"]) == 0
    table = capsys.readouterr().out
    assert {"nn/conv.py", "kernels/shift.py", "perf/bench.py", "__main__.py"} <= {
        line.split()[0] for line in table.splitlines()
    }
    assert max(map(len, (tables + table).splitlines())) <= 100
    for name in ("nn.TiedConv2d", "TiedConv2d"):
        assert main(["docs", name]) == 0
        assert capsys.readouterr().out.startswith("tritonsym.nn.TiedConv2d(in_channels")


def test_help_lists_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert re.findall(r"^ {4}(\w+) ", capsys.readouterr().out, re.M) == [
        "info",
        "check",
        "docs",
        "demo",
        "advise",
        "bench",
        "tune",
    ]

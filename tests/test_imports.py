"""Who may import whom, and what importing the package needs and costs."""

import ast
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tritonsym

SOURCE = Path(tritonsym.__file__).parent
KERNELS = Path(importlib.import_module("tritonsym.kernels").__file__).parent
PERF = Path(importlib.import_module("tritonsym.perf").__file__).parent

#: A module may import those of earlier lines; modules of `nn`, and `kernels`, may import one another.
ORDER = [
    {"_compat", "_table", "symmetry", "packing", "tuned"},
    {"spec"},
    {"reference"},
    {"shift"},
    {"blocks", "fold"},
    {"launch"},
    {"plan"},
    {"ops"},
    {"matrices", "groups"},
    {"functional"},
    {"nn"},
    {"aliases"},
    {"equivariant"},
    {"convert", "importers"},
    {"testing"},
    {"demo"},
    {"__init__"},
    {"docs", "perf"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
LAUNCHERS = {"tuned", "launch", "plan", "matrices"}  # may import kernels within functions
LAZY = {"__init__": "perf"}  # imported within a function


def modules(folder, prefix=""):
    return {prefix + ".".join(p.relative_to(folder).with_suffix("").parts): p for p in folder.rglob("*.py")}


MODULES = modules(SOURCE) | modules(KERNELS, "kernels.") | modules(PERF, "perf.")


def imports(path, everywhere=True):
    """Full names of what a file imports, in functions too if `everywhere`, but not for type checkers only."""
    tree = ast.parse(path.read_text())
    checkers = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    unread = {id(node) for branch in checkers for node in ast.walk(branch)}
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import) and id(node) not in unread:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in unread:
            assert node.level == 0, "absolute imports only"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def heads(names):
    """The modules of this package among the names: 'tritonsym.nn.conv.Init' -> 'nn', 'tritonsym.Plan' -> '__init__'."""
    parts = [name.split(".")[1:] for name in names if name.split(".")[0] == "tritonsym"]
    return {p[0] if p and (p[0] in LEVEL or p[0] == "kernels") else "__init__" for p in parts}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    head, names = name.split(".")[0], imports(MODULES[name])
    assert "kernels" not in {n.split(".")[0] for n in names}, "the folder is installed as tritonsym.kernels"
    if head == "kernels":
        assert heads(names) <= {"kernels"}
        return
    assert head in LEVEL, "give the new module a line in ORDER"
    allowed = {other for other, level in LEVEL.items() if level < LEVEL[head]}
    if head == "perf":
        assert heads(names) <= allowed | {"perf", "kernels"}
        return
    allowed |= {"nn"} if head == "nn" else {"kernels"} if head in LAUNCHERS else {LAZY.get(head)}
    assert heads(names) <= allowed
    assert not {"kernels", LAZY.get(head)} & heads(imports(MODULES[name], everywhere=False)), (
        "kernels load when the first one runs"
    )


def test_symmetry_is_pure_python():
    assert {name.split(".")[0] for name in imports(MODULES["symmetry"])} <= set(sys.stdlib_module_names)


def fresh(code, **environment):
    """The JSON that a fresh interpreter, started outside the checkout, prints."""
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_works_without_triton_and_without_a_gpu():
    code = """
import sys
sys.modules["triton"] = None
import json, torch, tritonsym
from tritonsym.nn import SymmetricConv2d
layer, x = SymmetricConv2d(2, 4, 3, symmetry="hv"), torch.randn(1, 2, 5, 5, requires_grad=True)
layer(x).sum().backward()
whys = [tritonsym.explain(layer, x, target="sm_90").why]
with tritonsym.backend("triton"):
    whys.append(tritonsym.explain(layer, x).why)
try:
    with tritonsym.path("implicit_gemm"):
        layer(x)
except ValueError as error:
    whys.append(str(error))
print(json.dumps([torch.cuda.is_available(), torch.equal(layer(x), layer.to_dense()(x)), bool(x.grad.any()), whys]))
"""
    *found, whys = fresh(code, CUDA_VISIBLE_DEVICES="")
    assert found == [False, True, True]
    assert whys[:2] == ["Triton is not installed."] * 2 and "Triton is not installed" in whys[2]


def test_import_loads_nothing_that_is_optional():
    code = """
import json, sys, torch
before = set(sys.modules)
import tritonsym
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = fresh(code)
    optional = ("triton", "matplotlib", "sklearn", "hypothesis", "tqdm", "pytest", "torch._dynamo", "torch._inductor")
    assert not [name for name in loaded if f"{name}.".startswith(tuple(f"{other}." for other in optional))]


def test_kernels_are_no_top_level_package():
    distribution = importlib.metadata.distribution("tritonsym")
    files = {str(file) for file in distribution.files or ()}  # an editable install lists no modules
    assert not [file for file in files if file.startswith("kernels")]
    assert (distribution.read_text("top_level.txt") or "tritonsym").split() == ["tritonsym"]
    code = "import importlib.util, json; print(json.dumps(importlib.util.find_spec('kernels') is None))"
    assert fresh(code, PYTHONPATH="")


def test_public_names_exist():
    for package in (tritonsym, tritonsym.nn, tritonsym.functional, tritonsym.testing):
        assert package.__all__ == sorted(package.__all__)
        assert all(hasattr(package, name) for name in package.__all__)
    assert tritonsym.__version__ == importlib.metadata.version("tritonsym")

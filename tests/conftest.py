"""Fixtures: one small layer of every kind, for tests of what all layers have in common.

Every run of a test draws the same numbers.
"""

import dataclasses
import inspect
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from interpret import Interpreter
from torch import Tensor, nn

import tritonsym
import tritonsym.nn as tnn

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tritonsym-tests-")  # this machine's tables decide no plan

settings.register_profile("tritonsym", deadline=None, derandomize=True)
settings.load_profile("tritonsym")


def pytest_collectstart() -> None:
    """Seed before a test module is imported: it may draw numbers, too."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Layer:
    name: str
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]  # one sample
    options: dict[str, Any]
    path: str = "reference"  # forced while the test runs

    def __str__(self) -> str:
        return self.name

    def but(self, **options: Any) -> "Layer":
        return dataclasses.replace(self, options={**self.options, **options})

    def make(self, **factory: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.build(**self.options, **factory)

    def input(self, batch: int = 3, **options: Any) -> Tensor:
        torch.manual_seed(1)
        return torch.randn(batch, *self.shape, **options)

    @property
    def torch_class(self) -> type[nn.Module]:
        if self.build in (tnn.SymmetricLinear, tnn.SkewLinear, tnn.GroupLinear):
            return nn.Linear
        return next(c for c in self.build.__mro__ if c.__module__ == "torch.nn.modules.conv")

    def dense(self, module: Any, x: Tensor) -> Tensor:
        """The torch layer's output with the expanded weight; differentiable with respect to the stored one."""
        weights = {"bias": module.expanded_bias()} if module.bias is not None else {}
        if isinstance(module, tnn.GlobalConv1d):
            length = x.shape[-1]
            y = F.conv1d(x, module.expanded_weight(length), padding=length, **weights)
        else:
            accepted = inspect.signature(self.torch_class).parameters
            options = {**vars(module), **self.options}  # a group convolution takes fields, not channels
            plain = self.torch_class(**{k: v for k, v in options.items() if k in accepted}, device="meta")
            y = torch.func.functional_call(plain, {"weight": module.expanded_weight(), **weights}, x)
        if (reduce := self.options.get("reduce")) in ("max", "min"):
            orbits = y.unflatten(-len(self.shape), (-1, module.symmetry.order))
            y = getattr(orbits, f"a{reduce}")(-len(self.shape))
        activation = self.options.get("activation")
        return y if activation is None else getattr(F, activation)(y)


def _conv(name: str, ndim: int, **options: Any) -> Layer:
    cls = getattr(tnn, f"{name}{ndim}d")
    options = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1, **options}
    label = " ".join([cls.__name__, *(str(options[key]) for key in ("symmetry", "parity", "reduce") if key in options)])
    return Layer(label, cls, (options["in_channels"], *(7, 6, 5)[:ndim]), options)


def _group(ndim: int, order: int, **options: Any) -> Layer:
    layer = _conv("GroupConv", ndim, in_fields=2, out_fields=3, **options)
    options = {key: value for key, value in layer.options.items() if not key.endswith("channels")}
    return dataclasses.replace(layer, shape=(2 * order, *layer.shape[1:]), options=options)


def _symmetrize(over: Any, reduce: str, **factory: Any) -> nn.Module:
    return tnn.Symmetrize(nn.Sequential(nn.Linear(4, 5, **factory), nn.Tanh()), over=over, reduce=reduce)


CONVOLUTIONS = [
    _conv("SymmetricConv", 1, symmetry="h", stride=2),
    _conv("SymmetricConv", 2, symmetry={"h": 4, "v": 2}, dilation=2),
    _conv("SymmetricConv", 2, symmetry="d4", share_bias=True, activation="silu"),
    _conv("SymmetricConv", 3, symmetry={"hvz": 8}, out_channels=10),
    _conv("SymmetricConvTranspose", 1, symmetry="h", stride=2, output_padding=1),
    _conv("SymmetricConvTranspose", 2, symmetry={"c4": 4}, share_bias=True),
    _conv("SymmetricConvTranspose", 3, symmetry="hv", groups=2, activation="tanh"),
    _conv("TiedConv", 1, symmetry="h", parity="odd"),
    _conv("TiedConv", 2, symmetry="hv", parity={"h": "odd"}, free=2, groups=2),
    _conv("TiedConv", 2, symmetry="radial:0.5", kernel_size=(5, 3), padding=(2, 1), activation="gelu"),
    _conv("TiedConv", 3, symmetry="hvz", bias=False),
    _conv("OrbitPoolConv", 1, symmetry="h", reduce="min"),
    _conv("OrbitPoolConv", 2, symmetry="d4", reduce="max", activation="relu"),
    _conv("OrbitPoolConv", 2, symmetry="c4", reduce="sum", groups=2),
    _conv("OrbitPoolConv", 3, symmetry="hz", reduce="mean", stride=2),
]
FOLDED = [
    _group(2, 8, symmetry="d4", activation="tanh"),
    Layer("GroupLinear", tnn.GroupLinear, (24,), {"in_fields": 3, "out_fields": 2, "symmetry": "d4"}),
]
FOLDED = [dataclasses.replace(layer, name=f"{layer.name} by characters", path="fold") for layer in FOLDED]
WEIGHTED = [
    *CONVOLUTIONS,
    _group(3, 4, symmetry="hz", stride=2, bias=False),
    *FOLDED,
    Layer("SymmetricLinear", tnn.SymmetricLinear, (7,), {"in_features": 7, "out_features": 7, "activation": "sigmoid"}),
    Layer("SkewLinear", tnn.SkewLinear, (6,), {"in_features": 6, "out_features": 6, "activation": "tanh"}),
    Layer("GlobalConv1d", tnn.GlobalConv1d, (4, 7), {"in_channels": 4, "out_channels": 8, "activation": "relu"}),
]
LAYERS = [
    *WEIGHTED,
    Layer("Symmetrize swap max", _symmetrize, (4,), {"over": "swap", "reduce": "max"}),
    Layer("Symmetrize cyclic logsumexp", _symmetrize, (4,), {"over": "cyclic", "reduce": "logsumexp"}),
    Layer("TopKPool1d", lambda **_: tnn.TopKPool1d(2), (4, 7), {}),
]


def _fixture(name: str, layers: Iterable[Layer]) -> Any:
    def fixture(request: pytest.FixtureRequest) -> Iterator[Layer]:
        with tritonsym.path(request.param.path):
            yield request.param

    return pytest.fixture(fixture, params=list(layers), ids=str, name=name)


BY_BLOCKS = [
    dataclasses.replace(layer, name=f"{layer.name} by blocks", path="blocks")
    for layer in WEIGHTED
    if layer.build in (tnn.SymmetricLinear, tnn.SkewLinear)
]
SHIFTED = [dataclasses.replace(layer, name=f"{layer.name} by shifts", path="shift") for layer in CONVOLUTIONS]
QUICK = [layer for layer in SHIFTED if "3d" not in layer.name] + BY_BLOCKS  # a 3-D kernel has many terms to compile

any_layer = _fixture("any_layer", LAYERS + QUICK)
weighted_layer = _fixture("weighted_layer", WEIGHTED + QUICK)
#: Layers that can be complex: they compare no values.
linear_layer = _fixture(
    "linear_layer", [c for c in WEIGHTED if c.options.get("reduce") not in ("max", "min") and c.path != "fold"]
)
convolution = _fixture("convolution", CONVOLUTIONS + SHIFTED)
forward_convolution = _fixture("forward_convolution", [c for c in CONVOLUTIONS + SHIFTED if "Transpose" not in c.name])
transposed_convolution = _fixture(
    "transposed_convolution", [c for c in CONVOLUTIONS + SHIFTED if "Transpose" in c.name]
)
planar_convolution = _fixture("planar_convolution", [c for c in CONVOLUTIONS + SHIFTED if "1d" not in c.name])


@pytest.fixture
def layers() -> list[Layer]:
    return LAYERS


# --- kernels, interpreted and compiled ahead of time ------------------------------------------------------------------


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@dataclass(frozen=True)
class MachineCode:
    """A kernel compiled with a tile; `count` is empty for targets without a cubin."""

    target: str
    shared: int
    count: Counter[str]  # instructions by name
    load_bits: Counter[int]  # loads from global memory by width
    waits: set[str]  # how many of Hopper's matrix instructions each wait leaves in flight
    from_registers: int  # how many of these take an operand from registers

    def check(self, multiplies: bool = True) -> None:
        from tritonsym.kernels.tiles import SHARED

        assert self.shared <= SHARED[self.target]
        if self.count:
            assert self.count["LDL"] + self.count["STL"] == 0, "spills"
            instruction = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[self.target]
            assert bool(self.count[instruction]) == multiplies, "tensor cores"
        if self.from_registers:  # they must not be overwritten while in flight (triton pull 11781)
            assert self.waits == {"0x0"}

    @property
    def widest_load(self) -> int:
        return max(self.load_bits)

    @property
    def narrow_loads(self) -> int:
        """Loads of 16 bits: the compiler did not see that their addresses are contiguous."""
        return self.load_bits[16]


@pytest.fixture(scope="session")
def ahead_of_time() -> Callable[..., MachineCode]:
    """compile(kernel, dtype, constants, tile, target, **types), with addresses and sizes that are multiples of 16."""
    pytest.importorskip("triton")
    from tritonsym.perf import inspect_kernels

    def compile(kernel: Any, dtype: str, fixed: dict[str, Any], tile: Any, target: str, **types: str) -> MachineCode:
        compiled = inspect_kernels.compile_kernel(kernel, fixed, tile, target, dtype, types)
        shared = compiled.metadata.shared
        if "cubin" not in compiled.asm:
            return MachineCode(target, shared, Counter(), Counter(), set(), 0)
        _, code = inspect_kernels.machine_code(compiled)
        found = inspect_kernels.instructions(code)
        return MachineCode(
            target,
            shared,
            Counter(name for name, _ in found),
            Counter(inspect_kernels.bits(modifiers) for name, modifiers in found if name in ("LDG", "LDGSTS")),
            set(re.findall(r"DEPBAR\.LE gsb0, (0x\w+)", code)),
            len(re.findall(r"HGMMA\S*\s+R\d+, R\d+", code)),
        )

    return compile

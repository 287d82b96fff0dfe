"""The additions kernel: in Triton's interpreter against the torch ops, and compiled ahead of time for GPUs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tritonsym
from tritonsym import shift
from tritonsym.shift import Additions, Geometry
from tritonsym.symmetry import FilterLayout, Symmetry, tap_orbits, tied_blocks

pytest.importorskip("triton")  # Linux only

#: Runs in a process of its own: the interpreter must be chosen before triton is imported.
INTERPRET = """
import json, sys, torch
from tritonsym.shift import Additions, _in_place
torch.set_num_threads(1)
for text, groups, batch, tile, dtype, layout in json.load(sys.stdin):
    plan = Additions.from_text(text)
    torch.manual_seed(0)
    sources = []
    for channels, sizes in plan.sources:
        source = torch.randint(-64, 65, (batch, groups * channels, *sizes)).to(getattr(torch, dtype)) / 8
        if layout == "sliced":
            source = source.repeat_interleave(2, -1)[..., ::2]
        elif layout == "last":
            source = source.movedim(1, -1).contiguous().movedim(-1, 1)
        sources.append(source)
    got = torch.ops.tritonsym.additions(sources, text, groups, tile)
    expected = _in_place(plan, [source.unflatten(1, (groups, -1)) for source in sources])
    print(json.dumps([torch.equal(g.double(), e.flatten(1, 2).double()) for g, e in zip(got, expected, strict=True)]))
"""


def plan_of(blocks, kernel_size, sizes, *, stride=1, padding=1, dilation=1, transposed=False):
    def each(value):
        return (value,) * len(kernel_size) if isinstance(value, int) else value

    extra = each(0) if transposed else ()
    geometry = Geometry(kernel_size, each(stride), each(padding), each(dilation), transposed, extra)
    return shift.schedule(blocks, geometry, sizes)[1]


def orbits(spec, out_channels, kernel_size, sizes, **options):
    return plan_of(FilterLayout.parse(spec, out_channels).blocks(kernel_size), kernel_size, sizes, **options)


def ties(symmetry, odd, kernel_size, tied, free, sizes, **options):
    return plan_of(
        tied_blocks(tap_orbits(Symmetry(symmetry), kernel_size, odd), tied, free), kernel_size, sizes, **options
    )


#: Sizes 1, primes, H != W; filters below, at and above the tile; every kind of symmetry; strides; even kernels.
PLANS = {
    "1-D h": orbits("h", 10, (3,), (13,)),
    "h one pixel": orbits("h", 2, (3, 3), (1, 1)),
    "hv": orbits("hv", 4 * 17, (3, 3), (5, 7)),
    "v even kernel": orbits("v", 2 * 16, (4, 2), (6, 5)),
    "c4 5x5": orbits("c4", 4 * 3, (5, 5), (7, 6), padding=2),
    "d4": orbits("d4", 8 * 15, (3, 3), (4, 3)),
    "mixed": orbits({"h": 4, "v": 2, "c2": 2, "d4": 16}, 31, (3, 3), (6, 5)),
    "dilation": orbits("h", 4, (3, 3), (9, 8), dilation=2, padding=(2, 1)),
    "stride": orbits("hv", 8, (3, 3), (9, 8), stride=2),
    "stride 3, kernel 4": orbits("h", 4, (4, 4), (11, 10), stride=(3, 2)),
    "3-D hvz": orbits("hvz", 8 * 2, (3, 3, 3), (3, 4, 5)),
    "transposed": orbits("hv", 8, (4, 4), (5, 3), stride=2, transposed=True),
    "transposed, stride > kernel": orbits("h", 4, (2, 2), (4, 3), stride=3, padding=0, transposed=True),
    "tied odd": ties("hv", "h", (3, 4), 5, 3, (6, 7)),
    "tied d4, negative signs": ties("d4", "h", (5, 5), 4, 0, (7, 6), padding=2),
    "rings": ties("radial:1", "", (5, 5), 3, 2, (6, 6), padding=2),
}
ADDITIONS = {
    f"{name}{end}": p for name, plan in PLANS.items() for end, p in ((", forward", plan), (", adjoint", plan.adjoint))
}


@pytest.fixture(scope="module")
def interpreted():
    """The result of every case, from one process."""
    cases = {}
    for i, (name, plan) in enumerate(ADDITIONS.items()):
        dtype = ("float32", "float16")[i % 2]
        layout = ("first", "last", "sliced")[i % 3]
        cases[name] = (plan.text, 1 + i % 2, (2, 1, 3)[i % 3], ((32, 16, 4), (64, 32, 4))[i // 2 % 2], dtype, layout)
    cases["empty batch"] = (PLANS["hv"].text, 1, 0, (64, 32, 4), "float32", "first")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRET]
    done = subprocess.run(command, input=json.dumps([*cases.values()]), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", [*ADDITIONS, "empty batch"])
def test_kernel_equals_the_torch_ops(interpreted, name):
    # multiples of 1/8: every sum is exact in fp32 and fp16
    assert interpreted[name] and all(interpreted[name])


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions_survive_as_text(name):
    plan = ADDITIONS[name]
    assert Additions.from_text(plan.text).text == plan.text
    assert plan.adjoint.adjoint is plan


@pytest.mark.parametrize("name", ADDITIONS)
def test_adjoint(name):
    plan, torch_dtype = ADDITIONS[name], torch.float64

    def draw(sides):
        return [torch.randn(2, 1, channels, *sizes, dtype=torch_dtype) for channels, sizes in sides]

    torch.manual_seed(0)
    x, y = draw(plan.sources), draw(plan.targets)

    def dot(a, b):
        return sum((s * t).sum() for s, t in zip(a, b, strict=True))

    torch.testing.assert_close(dot(shift._in_place(plan, x), y), dot(x, shift._in_place(plan.adjoint, y)))


@pytest.mark.parametrize("name", [name for name, plan in ADDITIONS.items() if not shift._has_steps(plan)])
def test_what_inductor_sees_equals_what_eager_does(name):
    plan = ADDITIONS[name]
    torch.manual_seed(0)
    x = [torch.randn(2, 2, channels, *sizes, dtype=torch.float64) for channels, sizes in plan.sources]
    for fused, eager in zip(shift._fused(plan, x), shift._in_place(plan, x), strict=True):
        torch.testing.assert_close(fused, eager)


def test_one_multiply_add_per_position_and_stored_weight():
    """Against the GEMMs that are really called."""
    layer = tritonsym.nn.SymmetricConv2d(16, 32, 3, padding=1, symmetry="d4", bias=False)
    x = torch.randn(2, 16, 9, 7)
    with tritonsym.path("shift"), torch.no_grad():
        plan = tritonsym.explain(layer, x)
        with FlopCounterMode(display=False) as counter:
            layer(x)
    assert counter.get_total_flops() == plan.flops == 2 * 2 * 9 * 7 * layer.weight.numel() == plan.dense_flops // 8
    tied = tritonsym.nn.TiedConv2d(16, 32, 3, padding=1, symmetry="d4", bias=False)
    with tritonsym.path("shift"):
        assert tritonsym.explain(tied, x).flops * 3 == plan.dense_flops


def test_auto_takes_shifts_only_where_they_were_measured_to_win(monkeypatch):
    def planned(channels=256, size=28, dtype=torch.float32):
        layer = tritonsym.nn.SymmetricConv2d(
            channels, channels, 3, padding=1, symmetry="hv", device="meta", dtype=dtype
        )
        return tritonsym.explain(layer, torch.empty(8, channels, size, size, device="meta", dtype=dtype)).path

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert planned() == "reference"  # in training it rounds too much
    with torch.no_grad():
        assert planned() == "shift"
        assert planned(channels=64) == planned(size=4) == "reference"  # additions or calls cost too much
        assert planned(channels=1024) == "reference"  # one value of z sums too many terms
        assert planned(dtype=torch.float64) == planned(dtype=torch.bfloat16) == "reference"
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert planned() == "reference"


def test_auto_sees_the_dtype_of_autocast():
    layer, x = tritonsym.nn.SymmetricConv2d(256, 256, 3, symmetry="hv"), torch.empty(8, 256, 28, 28)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tritonsym.explain(layer, x).problem.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_what_the_kernel_cannot_sum_goes_to_the_reference(dtype):
    layer = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="hv", dtype=dtype)
    with tritonsym.backend("triton"):
        plan = tritonsym.explain(layer, torch.empty(1, 4, 5, 5, dtype=dtype, device="meta"), target="sm_90")
        assert (plan.path, plan.tile) == ("reference", None)
        tritonsym.testing.assert_matches_reference(layer, torch.randn(1, 4, 5, 5, dtype=dtype))


def test_every_layer_runs_through_the_kernel():
    """Forward and gradients under backend('triton'), in the interpreter, by the rule of assert_matches_reference."""
    code = """
import torch, tritonsym
from tritonsym import nn
torch.manual_seed(0)
x = torch.randn(2, 4, 6, 5)
for layer in (
    nn.SymmetricConv2d(4, 12, 3, padding=1, symmetry={"h": 4, "v": 4}, groups=2),
    nn.SymmetricConv2d(4, 8, 3, stride=2, symmetry="hv", activation="gelu"),
    nn.SymmetricConvTranspose2d(4, 8, 2, stride=2, symmetry="c4", share_bias=True),
    nn.OrbitPoolConv2d(4, 4, 3, padding="same", symmetry="hv"),
):
    with tritonsym.backend("triton"):
        assert tritonsym.explain(layer, x).tile
        tritonsym.testing.assert_matches_reference(layer.double().float(), x)
        tritonsym.testing.assert_matches_reference(layer.half(), x.half())
print("right")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_shipped_tiles_compile_without_spills(target):
    """Ahead of time, no GPU needed; wide loads and stores, no shared memory beyond what every GPU has."""
    from tritonsym.perf import inspect_kernels

    for entry in inspect_kernels.entries():
        terms = sum(map(len, entry.table.terms))
        kernel = inspect_kernels.compile_entry(entry, inspect_kernels.TARGETS[target])
        found = inspect_kernels.inspect(kernel, terms, entry.tile)
        assert found.spills == 0, entry.name
        assert found.shared <= 48 << 10, entry.name
        assert found.load_bits == found.store_bits == 128, entry.name

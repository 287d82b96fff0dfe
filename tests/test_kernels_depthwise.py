"""The kernels for one input channel per group: in Triton's interpreter against float64, and compiled for GPUs."""

import re
from dataclasses import replace

import pytest
import torch
from interpret import DEVICE, variants

import tritonsym

pytest.importorskip("triton")  # Linux only


TILES = [[16, 16, 1], [32, 4, 4], [128, 32, 4]]
#: conv (`interpret.build`), batch, sizes. Groups below, at and above the tiles; one filter per group and several.
CASES = {
    "1-D h": ({"orbits": "h", "filters": 2, "kernel": [3], "groups": 5}, 2, [13]),
    "1-D, long, so that several programs share its positions": (
        {"ties": ["h", ""], "filters": 1, "kernel": [3], "groups": 3},
        2,
        [601],
    ),
    "one group, one pixel": ({"orbits": "h", "filters": 2}, 1, [1, 1]),
    "one group": ({"orbits": "hv", "filters": 8}, 1, [3, 5]),
    "hv": ({"orbits": "hv", "filters": 4, "groups": 17}, 1, [4, 3]),
    "d4": ({"orbits": "d4", "filters": 8, "groups": 4}, 2, [4, 3]),
    "mixed": ({"orbits": {"h": 2, "v": 4}, "filters": 7, "groups": 3}, 1, [4, 5]),
    "5x7 hv": ({"ties": ["hv", ""], "filters": 1, "kernel": [5, 7], "padding": [2, 3], "groups": 15}, 1, [3, 4]),
    "tied hv and free": ({"ties": ["hv", ""], "filters": 1, "free": 1, "groups": 16}, 2, [5, 4]),
    "odd, even kernel": ({"ties": ["hv", "h"], "filters": 1, "kernel": [3, 4], "groups": 33}, 1, [6, 7]),
    "odd d4": ({"ties": ["d4", "h"], "filters": 2, "kernel": [4, 4], "padding": 2, "groups": 5}, 1, [4, 3]),
    "rings": ({"ties": ["radial:1", ""], "filters": 1, "kernel": [5, 5], "padding": 2, "groups": 31}, 1, [6, 5]),
    "stride": ({"ties": ["hv", ""], "filters": 1, "stride": 2, "groups": 16}, 2, [9, 8]),
    "stride 3 and 2, kernel 4": (
        {"orbits": "h", "filters": 2, "kernel": [4, 4], "stride": [3, 2], "groups": 3},
        1,
        [8, 9],
    ),
    "stride > kernel": (
        {"orbits": "h", "filters": 2, "kernel": [2, 2], "stride": 3, "padding": 0, "groups": 4},
        2,
        [8, 7],
    ),
    "dilation": ({"ties": ["h", "h"], "filters": 1, "dilation": 2, "padding": [2, 1], "groups": 4}, 2, [9, 8]),
    "3-D hvz": ({"ties": ["hvz", "z"], "filters": 1, "kernel": [3, 3, 3], "groups": 5}, 1, [3, 4, 5]),
    "3-D, images, stride": (
        {"orbits": "vz", "filters": 4, "kernel": [3, 2, 3], "stride": [1, 2, 2], "groups": 3},
        1,
        [4, 5, 3],
    ),
    "transposed": (
        {"orbits": "hv", "filters": 4, "kernel": [4, 4], "stride": 2, "transposed": True, "groups": 5},
        2,
        [3, 4],
    ),
    "transposed, stride > kernel": (
        {
            "orbits": "h",
            "filters": 2,
            "kernel": [2, 2],
            "stride": 3,
            "padding": 0,
            "extra": [1, 0],
            "groups": 4,
            "transposed": True,
        },
        1,
        [4, 3],
    ),
    "image smaller than the stride": ({"orbits": "h", "filters": 2, "stride": 3, "extra": 2, "groups": 3}, 2, [1, 2]),
    "no images": ({"orbits": "h", "filters": 2, "groups": 3}, 0, [4, 5]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i in (0, 3) else pytest.mark.slow) for i, name in enumerate(CASES)]
)
def test_kernels_are_exact(interpreter, name):
    """y, dx and dw; with layout 'sliced' dy is expanded."""
    conv, batch, sizes = CASES[name]
    number = list(CASES).index(name)
    for dtype, layout in variants(number):
        options = {"tiles": TILES[number % 3] * 3, "dtype": dtype, "layout": layout, "path": "implicit_gemm"}
        assert interpreter("convolution", conv=conv, batch=batch, channels=1, sizes=sizes, **options)


def test_offsets_beyond_31_bits(interpreter):
    conv = {"orbits": "h", "filters": 2, "groups": 3}
    options = {"tiles": TILES[0] * 3, "dtype": "float16", "layout": "far", "path": "implicit_gemm"}
    assert interpreter("convolution", conv=conv, batch=2, channels=1, sizes=[4, 5], **options)


def test_nan_and_infinity(interpreter):
    conv = {"orbits": "h", "filters": 2, "groups": 3}
    options = {"path": "implicit_gemm", "tiles": TILES[0] * 3, "dtype": "float32", "activation": "relu"}
    assert interpreter("not_finite", conv=conv, batch=2, channels=1, sizes=[9, 11], **options)


def test_activation_of_the_epilogue(interpreter):
    conv = {"orbits": "h", "filters": 2, "groups": 3}
    options = {"tiles": TILES[0] * 3, "dtype": "float32", "layout": "last", "path": "implicit_gemm"}
    assert interpreter("convolution", conv=conv, batch=1, channels=1, sizes=[4, 5], activation="gelu", **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", *(["bfloat16"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("SymmetricConv2d", {"symmetry": "hv", "out_channels": 24, "stride": 2, "activation": "gelu"}),
        ("SymmetricConvTranspose2d", {"symmetry": "h", "kernel_size": 2, "stride": 2, "out_channels": 12}),
        ("TiedConv2d", {"symmetry": "hv", "kernel_size": 7, "parity": "odd", "padding": 3}),
        ("TiedConv2d", {"symmetry": "radial", "free": 6, "out_channels": 12, "activation": "relu"}),
        ("OrbitPoolConv2d", {"symmetry": "hv", "activation": "silu"}),
        ("OrbitPoolConv2d", {"symmetry": "h", "reduce": "mean"}),
    ],
)
def test_layers_round_as_torch_does(interpreter, kind, options, dtype):
    options = {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6, **options}
    tiles = interpreter("layer", kind=kind, options=options, shape=[2, 6, 8, 7], dtype=dtype, path="implicit_gemm")
    assert [len(tile) for tile in tiles] == [3, 3, 3]


def test_plans():
    layer = tritonsym.nn.TiedConv2d(384, 384, 7, padding=3, groups=384, symmetry="hv", device="meta")
    x = torch.empty(64, 384, 28, 28, dtype=torch.bfloat16, device="meta")
    plan = tritonsym.explain(layer, x, "sm_90")
    assert plan.path == "reference" and "implicit_gemm" in plan.why and "estimate" in plan.why, (
        "no clear win by estimate"
    )
    with tritonsym.backend("triton"):
        plan = tritonsym.explain(layer, x, "sm_90")
    assert plan.path == "implicit_gemm" and plan.tiles == ((128, 32, 4),) * 3
    assert plan.problem.runs("implicit_gemm", plan.tiles)
    assert not plan.problem.runs("implicit_gemm", ((64, 64, 32, 4, 3),) * 3)


def sums():
    """The entries of `inspect_kernels` for these kernels."""
    from tritonsym.perf import inspect_kernels

    return [entry for entry in inspect_kernels.entries() if entry.name.startswith("depthwise")]


def check_compiled(entry, target):
    """No spills; 128-bit accesses to channels-last tensors; warps read along rows of channels-first ones."""
    from tritonsym.kernels.tiles import fits
    from tritonsym.perf import inspect_kernels

    kernel = inspect_kernels.compile_entry(entry, target)
    found = inspect_kernels.inspect(kernel, entry.work)
    assert fits(entry.tile, 2, target) and found.shared <= 8 << 10, entry.name
    if target == "gfx942":
        return
    assert found.spills == found.tensor_cores == 0, entry.name
    layouts = set(re.findall(r"tt\.load .*x!tt\.ptr<bf16>, (#blocked\w*)>", kernel.asm["ttgir"]))
    if "NCHW" in entry.name:
        spread = {re.search(rf"^{layout} = (.*)", kernel.asm["ttgir"], re.M)[1] for layout in layouts}
        assert spread and all("threadsPerWarp = [1, 32]" in layout for layout in spread), entry.name
    else:
        assert found.load_bits == 128 and found.store_bits == (32 if " dw " in entry.name else 128), entry.name


@pytest.mark.parametrize("name", ["depthwise y 128x32", "depthwise dw 128x32 NCHW"])
def test_a_tile_of_every_kernel_compiles(name):
    (entry,) = (entry for entry in sums() if entry.name == name)
    check_compiled(entry, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_shipped_tiles_compile(target):
    for entry in sums():
        check_compiled(entry, target)


@pytest.mark.slow
def test_several_filters_and_offsets_beyond_31_bits_compile():
    from tritonsym.perf import inspect_kernels

    for entry in {entry.kernel: entry for entry in sums()}.values():
        for filters in ({"SOURCE_F": 4}, {"TARGET_F": 4}) if "SOURCE_F" in entry.fixed else ({"F": 4},):
            for wide in (False, True):
                fixed = entry.fixed | filters | {"WIDE": wide}
                inspect_kernels.compile_entry(replace(entry, fixed=fixed), "sm_90")

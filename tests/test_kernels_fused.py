"""The fused kernel: in the interpreter against float64, compiled ahead of time for GPUs, and when it is planned."""

from dataclasses import replace

import pytest
import torch
from interpret import CASES, DEVICE, variants

import tritonsym

pytest.importorskip("triton")  # Linux only

from tritonsym.kernels.tiles import PATCHES, SHARED, Patch, fits_patch, pick_patch

#: The tile of the sums' adjoint, which the gradients need.
TO_D = [32, 16, 4]
IMAGES, LINES = ([16, 16, 16, 8], [8, 8, 16, 4]), ([1, 128, 16, 8], [1, 32, 32, 2])
NAMES = [name for name, (conv, *_, sizes) in CASES.items() if len(sizes) < 3 and conv.get("stride", 1) == 1]
QUICK = {"1-D h", "hv in groups", "mixed", "tied odd", "max of h", "much padding"}
#: Padding beyond the kernel, none, uneven; transposed; images wider and higher than some patches; 127 channels.
MORE = {
    "much padding": ({"orbits": "hv", "filters": 4, "padding": [4, 0]}, 2, 3, [9, 17]),
    "uneven padding": ({"orbits": "h", "filters": 6, "kernel": [2, 4], "extra": [1, 2]}, 2, 3, [17, 6]),
    "transposed": ({"orbits": "c4", "filters": 8, "transposed": True, "dilation": 2}, 2, 3, [7, 9]),
    "many channels": ({"orbits": "h", "filters": 2 * 17, "padding": 0}, 1, 127, [5, 7]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in [*NAMES, *MORE]]
)
def test_the_kernel_is_exact(interpreter, name):
    conv, batch, channels, sizes = {**CASES, **MORE}[name]
    number = [*NAMES, *MORE].index(name)
    options = {"conv": conv, "batch": batch, "channels": channels, "sizes": sizes, "path": "fused"}
    for i, (dtype, layout) in enumerate(variants(number)):
        patch = (LINES if len(sizes) == 1 else IMAGES)[(number + i) % 2]
        assert interpreter("convolution", tiles=[*patch, *TO_D], dtype=dtype, layout=layout, **options)


@pytest.mark.parametrize("orbits, pool", [("d4", None), ("hv", "min")])
def test_products_in_pairs(interpreter, orbits, pool):
    """As for bfloat16, which the interpreter does not know."""
    options = {"conv": {"orbits": orbits, "filters": 8 * 5, "pool": pool}, "tiles": [*IMAGES[1], *TO_D]}
    options |= {"batch": 2, "channels": 3, "sizes": [7, 9], "path": "fused", "dtype": "float32", "layout": "last"}
    assert interpreter("convolution", packed=True, **options)


@pytest.mark.parametrize(
    "options",
    [{"activation": "relu"}, {"activation": "tanh"}, {"batch": 0}, {"layout": "far"}, {"layout": "far rows"}],
)
@pytest.mark.parametrize("pool", [None, "max"])
def test_epilogues_no_images_and_far_offsets(interpreter, options, pool):
    options = {"batch": 2, "layout": "last", "channels": 3, "sizes": [4, 5], "path": "fused", **options}
    conv = {"orbits": "h", "filters": 4, "pool": pool}
    assert interpreter("convolution", conv=conv, dtype="float16", tiles=[*IMAGES[1], *TO_D], **options)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("pool", [None, "max"])
def test_nan_and_infinity(interpreter, activation, pool):
    options = {"path": "fused", "tiles": [*IMAGES[1], *TO_D], "dtype": "float32", "activation": activation}
    conv = {"orbits": "h", "filters": 4, "pool": pool}
    assert interpreter("not_finite", conv=conv, batch=2, channels=2, sizes=[9, 11], **options)


def test_float16_overflows_where_dense_layers_do(interpreter):
    assert interpreter("large", path="fused", tiles=[*IMAGES[1], *TO_D])


@pytest.mark.parametrize("dtype", ["float32", "float16", *(["bfloat16"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("SymmetricConv2d", {"symmetry": {"h": 4, "v": 4}, "groups": 2, "out_channels": 12, "activation": "gelu"}),
        ("TiedConv2d", {"symmetry": "hv", "parity": "odd", "free": 2}),
        ("OrbitPoolConv2d", {"symmetry": "hv", "out_channels": 4, "activation": "silu"}),
    ],
)
def test_layers_round_as_torch_does(interpreter, kind, options, dtype):
    options = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options}
    tiles = interpreter("layer", kind=kind, options=options, shape=[2, 4, 6, 5], dtype=dtype, path="fused")
    assert len(tiles) == 2 and len(tiles[0]) == 4


# --- plans ------------------------------------------------------------------------------------------------------------


def explain(size=128, dtype=torch.bfloat16, channels=128, symmetry="hv", target="sm_90", batch=256, **options):
    layer = tritonsym.nn.SymmetricConv2d(channels, 128, 3, padding=1, symmetry=symmetry, device="meta", **options)
    return tritonsym.explain(layer, torch.empty(batch, channels, 28, 28, device="meta", dtype=dtype), target)


def test_auto_takes_it_where_the_estimate_wins():
    planned = explain()
    assert planned.path == "fused" and planned.tiles == ((16, 16, 16, 8), (64, 16, 4)) and "estimate" in planned.why
    assert planned.dense_flops == 4 * planned.flops
    for other in ({"dtype": torch.float16}, {"channels": 129}, {"stride": 2}, {"symmetry": "h"}, {"target": "cpu"}):
        assert explain(**other).path != "fused", other


@pytest.mark.parametrize("options", [{"channels": 129}, {"stride": 2}, {"dtype": torch.float64}, {"dilation": 8}])
def test_it_refuses_what_it_cannot_compute(options):
    with tritonsym.path("fused"), pytest.raises(ValueError, match="'fused' is forced, but it cannot compute"):
        explain(**options)


def test_patches():
    patch = Patch(16, 16, 16, 8)
    for wrong in ({"block_h": 2}, {"block_w": 12}, {"block_u": 8}, {"block_u": 64}, {"warps": 16}, {"block_h": 4}):
        assert not fits_patch(replace(patch, **wrong), 64, (2, 2), 2, "sm_90"), wrong
    assert fits_patch(patch, 128, (2, 2), 2, "sm_80") and not fits_patch(patch, 128, (2, 2), 4, "sm_86")
    assert not fits_patch(patch, 129, (2, 2), 2, "sm_90")
    assert pick_patch(2, 36, 128, (2, 2), 2, "sm_90") == PATCHES[2][0]
    assert pick_patch(2, 36, 128, (2, 2), 4, "sm_86") == PATCHES[2][1]  # shared memory
    assert pick_patch(2, 72, 64, (2, 2), 2, "sm_90") == PATCHES[2][1]  # registers
    assert pick_patch(1, 6, 64, (0, 2), 2, "sm_90") == PATCHES[1][0]
    assert pick_patch(2, 6, 64, (16, 2), 2, "sm_90") is pick_patch(3, 6, 64, (2, 2), 2, "sm_90") is None


# --- ahead of time ----------------------------------------------------------------------------------------------------


def entries():
    from tritonsym.kernels import fused
    from tritonsym.perf import inspect_kernels

    return [entry for entry in inspect_kernels.entries() if entry.kernel is fused._fused_kernel]


def check_compiled(entry, target):
    """Tensor cores; no spills, except with over 100 terms on sm_100; operands in shared memory, as `fits` assumes."""
    from tritonsym.perf import inspect_kernels

    kernel = inspect_kernels.compile_entry(entry, target)
    found = inspect_kernels.inspect(kernel, entry.work)
    assert found.shared <= entry.tile.shared(entry.fixed["C"], 2) <= SHARED[target], entry.name
    if target == "gfx942":
        return
    assert found.tensor_cores, entry.name
    assert found.spills == 0 or (target, len(entry.fixed["OP"][0]) > 100) == ("sm_100", True), entry.name
    assert "NCHW" in entry.name or (found.load_bits, found.store_bits) == (128, 128), entry.name
    dots = [line for line in kernel.asm["ttgir"].splitlines() if "warp_group_dot " in line]
    # registers that feed a product of sm_90 must not change before it is done (triton's issue 9433)
    assert target != "sm_90" or (dots and all(line.count("!ttg.memdesc") == 2 for line in dots)), entry.name


def test_a_patch_compiles():
    (entry,) = (entry for entry in entries() if entry.name == "fused y 4 images 2-D 16x16x16")
    check_compiled(entry, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_shipped_patches_compile(target):
    for entry in entries():
        check_compiled(entry, target)

"""The convolution kernels: in Triton's interpreter against float64, and compiled ahead of time for GPUs."""

import re
from dataclasses import astuple, replace

import pytest
import torch
from interpret import BFLOAT16, CASES, DEVICE, variants

import tritonsym

pytest.importorskip("triton")  # Linux only

from tritonsym import plan
from tritonsym.kernels import tiles

TILES = {"shift": [[32, 16, 4] * 2, [64, 32, 4] * 2], "implicit_gemm": [[32, 16, 32, 4, 2] * 3, [64, 32, 16, 4, 2] * 3]}


#: A few cases of every path run always, the rest with `-m slow`.
QUICK = {
    ("hv", "shift"),
    ("mixed", "shift"),
    ("max of h", "shift"),
    ("h one row", "implicit_gemm"),
    ("hv", "implicit_gemm"),
}
#: For one input channel `implicit_gemm` is another kernel, which test_kernels_depthwise.py tests.
PATHS = [
    pytest.param(name, path, marks=() if (name, path) in QUICK else pytest.mark.slow)
    for name, (_, _, channels, _) in CASES.items()
    for path in ("shift", "implicit_gemm")[: min(channels, 2)]
]


@pytest.mark.parametrize("name, path", PATHS)
def test_kernels_are_exact(interpreter, name, path):
    conv, batch, channels, sizes = CASES[name]
    if conv.get("pool") and path == "implicit_gemm":
        conv = {**conv, "pool": None}
    number = list(CASES).index(name) + (path == "implicit_gemm")
    for dtype, layout in variants(number):
        tiles = TILES[path][number // 4 % 2]
        assert interpreter(
            "convolution",
            conv=conv,
            batch=batch,
            channels=channels,
            sizes=sizes,
            path=path,
            tiles=tiles,
            dtype=dtype,
            layout=layout,
        )


#: Every tile in the tables once for each of y, dx and dw.
SHIPPED = [
    *(("shift", (tile, tiles.TILES[i - 1])) for i, tile in enumerate(tiles.TILES)),
    *(
        ("implicit_gemm", (tile, tiles.CONV_TILES[i - 1], tiles.WEIGHT_TILES[i % len(tiles.WEIGHT_TILES)]))
        for i, tile in enumerate(tiles.CONV_TILES)
    ),
]


@pytest.mark.parametrize("number", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(SHIPPED)))])
def test_shipped_tiles_are_exact(interpreter, number):
    path, chosen = SHIPPED[number]
    variants = [("float16", "last" if number % 2 else "first"), *BFLOAT16]
    if DEVICE == "cuda" and all(tiles.fits(tile, 4, "sm_90", taps=True) for tile in chosen):
        variants.append(("float32", "last"))
    for dtype, layout in variants:
        assert interpreter(
            "convolution",
            conv={"orbits": {"hv": 4 * 17, "h": 6}, "filters": 77},  # more rows and channels than most tiles have
            batch=2,
            channels=70,
            sizes=[4, 5],
            path=path,
            tiles=[number for tile in chosen for number in astuple(tile)],
            dtype=dtype,
            layout=layout,
        )


@pytest.mark.parametrize(
    "path, name",
    [("shift", "mixed"), ("shift", "max of h"), ("implicit_gemm", "hv in groups"), ("implicit_gemm", "h one row")],
)
def test_runs_are_equal(interpreter, path, name):
    conv, batch, channels, sizes = CASES[name]
    arguments = {
        "conv": conv,
        "batch": batch,
        "channels": channels,
        "sizes": sizes,
        "times": 100 if DEVICE == "cuda" else 1,
    }
    for dtype in ("float16", "float32") if DEVICE == "cuda" else ("float32" if "one row" in name else "float16",):
        assert interpreter("repeat", path=path, tiles=TILES[path][0], dtype=dtype, **arguments)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(
    "conv, channels, sizes",
    [
        ({"orbits": "h", "filters": 10}, 5, [4, 5]),
        ({"orbits": "v", "filters": 32, "stride": 2}, 3, [7, 6]),
        ({"orbits": {"h": 4, "v": 2, "hv": 4}, "filters": 13}, 4, [5, 4]),
        ({"orbits": "hv", "filters": 8, "kernel": [2, 3, 3], "padding": 1, "stride": [1, 2, 1]}, 3, [5, 4, 5]),
        ({"orbits": "h", "filters": 4, "groups": 2, "dilation": 2, "padding": [2, 1]}, 3, [6, 5]),
    ],
)
def test_axes_inside_the_products(interpreter, conv, channels, sizes, layout):
    options = {"path": "shift", "tiles": TILES["shift"][0], "dtype": "float32", "layout": layout, "inner": True}
    assert interpreter("convolution", conv=conv, batch=2, channels=channels, sizes=sizes, **options)


@pytest.mark.parametrize("path", ["shift", "implicit_gemm"])
def test_float16_overflows_where_dense_layers_do(interpreter, path):
    assert interpreter("large", path=path, tiles=TILES[path][0])


@pytest.mark.parametrize("path", ["shift", "implicit_gemm"])
def test_no_images(interpreter, path):
    arguments = {"conv": {"orbits": "h", "filters": 4}, "path": path, "tiles": TILES[path][0], "layout": "first"}
    assert interpreter("convolution", batch=0, channels=2, sizes=[4, 5], dtype="float16", **arguments)


@pytest.mark.parametrize("name", ["stride", "max of h"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_batch_in_chunks(interpreter, name, dtype):
    conv, _, channels, sizes = CASES[name]
    options = {"tiles": TILES["shift"][0], "dtype": dtype, "layout": "first", "path": "shift", "scratch": 6 << 10}
    assert interpreter("convolution", conv=conv, batch=5, channels=channels, sizes=sizes, **options)


@pytest.mark.parametrize("path", ["shift", "implicit_gemm"])
def test_offsets_beyond_31_bits(interpreter, path):
    conv, tiles = {"orbits": "h", "filters": 4}, TILES[path][0]
    arguments = {"conv": conv, "path": path, "tiles": tiles, "dtype": "float16", "layout": "far"}
    assert interpreter("convolution", batch=2, channels=3, sizes=[4, 5], **arguments)


@pytest.mark.parametrize("path, pool", [("shift", None), ("shift", "max"), ("implicit_gemm", None)])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "sigmoid", "tanh"])
def test_activations_of_the_epilogue(interpreter, activation, path, pool):
    conv, tiles = {"orbits": "h", "filters": 4, "pool": pool}, TILES[path][0]
    arguments = {"conv": conv, "path": path, "tiles": tiles, "dtype": "float32", "layout": "last"}
    assert interpreter("convolution", batch=1, channels=2, sizes=[4, 5], activation=activation, **arguments)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "sigmoid", "tanh"])
@pytest.mark.parametrize("path, pool", [("shift", None), ("shift", "max"), ("shift", "min"), ("implicit_gemm", None)])
def test_nan_and_infinity(interpreter, activation, path, pool):
    conv = {"orbits": "h", "filters": 4, "pool": pool}
    options = {"path": path, "tiles": TILES[path][0], "dtype": "float32", "activation": activation}
    assert interpreter("not_finite", conv=conv, batch=2, channels=2, sizes=[9, 11], **options)


@pytest.mark.parametrize("activation", ["gelu", "silu", "sigmoid", "tanh"])
@pytest.mark.parametrize("scale", [1, 0.1, 1e-4])
@pytest.mark.parametrize("path", ["shift", "implicit_gemm"])
def test_activations_round_as_torchs_do(interpreter, activation, scale, path):
    options = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "symmetry": "h", "activation": activation}
    arguments = {"options": options, "shape": [2, 4, 9, 7], "dtype": "float32", "path": path, "scale": scale}
    assert interpreter("layer", kind="SymmetricConv2d", **arguments)


@pytest.mark.parametrize("dtype", ["float32", "float16", *(["bfloat16"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("path", ["shift", "implicit_gemm"])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("SymmetricConv2d", {"symmetry": {"h": 4, "v": 4}, "groups": 2, "out_channels": 12}),
        ("SymmetricConv2d", {"symmetry": "hv", "stride": 2, "activation": "gelu"}),
        ("SymmetricConvTranspose2d", {"symmetry": "c4", "kernel_size": 2, "stride": 2, "share_bias": True}),
        ("TiedConv2d", {"symmetry": "radial", "free": 2, "activation": "relu"}),
        ("OrbitPoolConv2d", {"symmetry": "hv", "out_channels": 4, "activation": "silu"}),
    ],
)
def test_layers_round_as_torch_does(interpreter, kind, options, path, dtype):
    options = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options}
    assert interpreter("layer", kind=kind, options=options, shape=[2, 4, 6, 5], dtype=dtype, path=path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_what_kernels_cannot_compute_goes_to_the_reference(dtype):
    layer = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="hv", dtype=dtype)
    with tritonsym.backend("triton"):
        plan = tritonsym.explain(layer, torch.empty(1, 4, 5, 5, dtype=dtype, device="meta"), target="sm_90")
        assert (plan.path, plan.tiles) == ("reference", ())
        tritonsym.testing.assert_matches_reference(layer, torch.randn(1, 4, 5, 5, dtype=dtype))


def test_devices_without_kernels():
    layer = tritonsym.nn.SymmetricConv2d(512, 512, 3, symmetry="hv", device="meta", dtype=torch.bfloat16)
    problem = layer.problem(torch.empty(64, 512, 14, 14, device="meta", dtype=torch.bfloat16), "xpu", False)
    assert (plan.plan(problem).path, plan.plan(problem).tiles) == ("reference", ())
    with tritonsym.backend("triton"):
        assert plan.plan(problem).why == "No kernel runs on xpu."


@pytest.mark.parametrize(
    "size, dtype, path", [(64, "bfloat16", "reference"), (512, "bfloat16", "shift"), (512, "float64", "reference")]
)
def test_auto_estimates_gpus(size, dtype, path):
    layer = tritonsym.nn.SymmetricConv2d(size, size, 3, padding=1, symmetry="hv", device="meta")
    x = torch.empty(64, size, 14, 14, device="meta", dtype=getattr(torch, dtype))
    plan = tritonsym.explain(layer, x, target="sm_90")
    assert plan.path == path and (dtype == "float64" or "estimate" in plan.why)
    assert bool(plan.tiles) == (path != "reference")


def test_steps_are_no_shorter_than_they_need_be():
    for length, step in ((3, 32), (32, 32), (33, 64), (64, 64), (100, 64)):
        for columns, block_n in ((5, 16), (17, 32), (60, 64)):
            tile = tiles.pick_gemm(tiles.CONV_TILES, columns, length, 2, "sm_90")
            assert (tile.block_n, tile.block_k) == (block_n, step)


@pytest.mark.parametrize("kernel_size, symmetry, fits", [(5, "d4", True), (7, "hv", True), (7, "d4", False)])
def test_sums_that_would_compile_for_long_are_not_taken(kernel_size, symmetry, fits):
    layer = tritonsym.nn.SymmetricConv2d(512, 512, kernel_size, padding=2, symmetry=symmetry, device="meta")
    planned = tritonsym.explain(
        layer.bfloat16(), torch.empty(64, 512, 28, 28, device="meta").bfloat16(), target="sm_90"
    )
    assert ("too many terms to compile" in planned.why) != fits and (planned.path == "shift") == fits


def convolutions():
    """The entries of `inspect_kernels` for this file's kernels."""
    from tritonsym.kernels import conv, shift
    from tritonsym.perf import inspect_kernels

    kernels = (shift._shift_sum_kernel, conv._implicit_gemm_kernel, conv._wgrad_kernel)
    return [entry for entry in inspect_kernels.entries() if entry.kernel in kernels]


def check_compiled(entry, target):
    """Compiled without a GPU: no spills, wide loads and stores, tensor cores, shared memory as `fits` assumes."""
    from tritonsym.perf import inspect_kernels

    kernel = inspect_kernels.compile_entry(entry, target)
    found = inspect_kernels.inspect(kernel, entry.work)
    product = isinstance(entry.tile, tiles.GemmTile)
    # besides operands: table entries in flight, barriers, and exchanges of layouts
    assert found.shared <= (entry.tile.shared(2) if product else 0) + (8 << 10), entry.name
    if target == "gfx942":
        return
    assert found.spills == 0, entry.name
    assert bool(found.tensor_cores) == product, entry.name
    # as wide as a thread's part of a tile; images of 12 filters begin at multiples of 12
    values = 8 if product else entry.tile.block_p * entry.tile.block_u // (32 * entry.tile.warps)
    wide = 64 if " of 12 " in entry.name else min(128, 16 * values)
    if "NCHW" in entry.name:  # a warp reads along a row of an image, at any address
        units = {name: entry.fixed.get(f"{name}_UNIT") == "w" for name in ("SOURCE", "TARGET", "X")}
        images = {"load": units["SOURCE"] or units["X"], "store": units["TARGET"]}
        for access in (name for name, is_image in images.items() if is_image):
            layouts = spread(kernel, access)
            runs = ["sizePerThread = [1, 1], threadsPerWarp = [1, 32]"]
            if product and entry.tile.block_m == entry.tile.block_n:  # as for the weights, whose tile has this shape
                runs.append("sizePerThread = [1, 8], threadsPerWarp = [4, 8]")
            assert layouts and all(any(run in layout for run in runs) for layout in layouts), entry.name
        assert images["load"] or found.load_bits == wide, entry.name
        assert images["store"] or found.store_bits == wide, entry.name
    else:
        assert (found.load_bits, found.store_bits) == (wide, wide), entry.name
        if product and target != "sm_80":  # all operands are loaded asynchronously
            assert not spread(kernel, "load"), entry.name
    if product and entry.tile.block_n == 128 and target == "sm_90":  # so no division per position
        assert found.instructions < 160, entry.name


@pytest.mark.parametrize(
    "name", ["shift y 2 images 2-D 32x32", "implicit_gemm y 64x32x32", "implicit_gemm dw 64x32x64"]
)
def test_a_tile_of_every_kernel_compiles(name):
    (entry,) = (entry for entry in convolutions() if entry.name == name)
    check_compiled(entry, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_shipped_tiles_compile(target):
    entries = [entry for entry in convolutions() if tiles.fits(entry.tile, 2, target, taps=True)]
    assert len(entries) == len(convolutions()) or target in ("sm_80", "gfx942")
    for entry in entries:
        check_compiled(entry, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("channels", [64, 256])
def test_weight_gradients_of_float32_do_not_spill(target, channels):
    from tritonsym.perf import inspect_kernels

    layer = tritonsym.nn.SymmetricConv2d(channels, channels, 3, padding=1, symmetry="hv", device="meta")
    with tritonsym.path("implicit_gemm"):
        plan = tritonsym.explain(layer, torch.empty(8, channels, 28, 28, device="meta"), target=target)
    tile = tiles.GemmTile(*plan.tiles[2])
    entry = inspect_kernels._gemm("dw", tile, channels_first=False)
    kernel = inspect_kernels.compile_kernel(entry.kernel, entry.fixed, tile, target, "fp32", entry.types, entry.odd)
    assert inspect_kernels.inspect(kernel, entry.work).spills == 0


def spread(kernel, access):
    """How threads are spread over the tiles that a kernel loads or stores."""
    code = kernel.asm["ttgir"]
    names = set(re.findall(rf"tt\.{access} .*tensor<\d+x\d+x!tt\.ptr<.*?>, (#\w+)>", code))
    return [re.search(rf"^{name} = (.*)", code, re.M)[1] for name in names]


@pytest.mark.slow
def test_no_operand_of_a_hopper_product_is_computed_in_registers():
    """Registers that feed a wgmma must not change before it is done; Triton got this wrong (its issue 9433)."""
    from tritonsym.kernels.tiles import GemmTile
    from tritonsym.perf import inspect_kernels

    for entry in convolutions():
        if isinstance(entry.tile, GemmTile):
            for signed in (False, True) if "SIGNED" in entry.fixed else (None,):
                fixed = entry.fixed if signed is None else {**entry.fixed, "SIGNED": signed}
                kernel = inspect_kernels.compile_entry(replace(entry, fixed=fixed), "sm_90")
                products = re.findall(r"warp_group_dot %.*? : (\S+?)<.*? \* (\S+?)<", kernel.asm["ttgir"])
                assert products and set(products) == {("!ttg.memdesc", "!ttg.memdesc")}, entry.name


@pytest.mark.slow
def test_offsets_beyond_31_bits_compile():
    from tritonsym.perf import inspect_kernels

    for entry in {entry.kernel: entry for entry in convolutions()}.values():
        inspect_kernels.compile_entry(replace(entry, fixed=entry.fixed | {"WIDE": True}), "sm_90")

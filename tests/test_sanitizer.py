"""Every kernel in Triton's interpreter with a check of every access; planted bugs show that it finds them."""

import re
from pathlib import Path

import pytest
from interpret import CASES

pytest.importorskip("triton")  # Linux only

from tritonsym import kernels

#: The tiles of every path, and the kernels that it launches.
PATHS = {
    "shift": ([32, 16, 4] * 2, ["_shift_sum_kernel"]),
    "fused": ([8, 8, 16, 4, 32, 16, 4], ["_fused_kernel", "_shift_sum_kernel"]),
    "implicit_gemm": ([32, 16, 32, 4, 2] * 3, ["_implicit_gemm_kernel", "_wgrad_kernel"]),
    "depthwise": ([32, 4, 4] * 3, ["_depthwise_kernel", "_depthwise_wgrad_kernel"]),
    "matrices": (
        [16, 16, 16, 4, 2],
        ["_gradient_kernel", "_gram_kernel", "_product_kernel", "_strips_kernel", "_sum_kernel"],
    ),
}

#: A path, a case as in `interpret.CASES`, and the memory layout of x and dy.
CONVOLUTIONS = [
    ("shift", {"orbits": {"h": 2, "d4": 8}, "filters": 11}, 1, 3, [4, 3], "last"),
    ("shift", *CASES["stride in groups"], "sliced"),
    ("shift", *CASES["transposed"], "first"),
    ("shift", *CASES["max, stride"], "last"),
    ("fused", {"orbits": {"h": 2, "d4": 8}, "filters": 11, "groups": 2}, 2, 3, [9, 3], "sliced"),
    ("fused", *CASES["max of h"], "last"),
    ("implicit_gemm", {"orbits": "hv", "filters": 4, "groups": 2}, 2, 3, [4, 5], "sliced"),
    ("implicit_gemm", {"ties": ["h", "h"], "filters": 2, "free": 1}, 1, 2, [4, 5], "first"),
    ("implicit_gemm", {"orbits": "h", "filters": 2, "kernel": [3]}, 2, 2, [561], "last"),
    ("implicit_gemm", *CASES["transposed, stride > kernel, groups"], "last"),
    ("depthwise", {"ties": ["hv", "h"], "filters": 1, "free": 1, "groups": 5}, 1, 1, [4, 3], "last"),
    ("depthwise", {"orbits": "h", "filters": 2, "stride": 2, "transposed": True, "groups": 3}, 2, 1, [4, 3], "first"),
]


@pytest.mark.parametrize("path, conv, batch, channels, sizes, layout", CONVOLUTIONS)
def test_accesses_of_convolutions(interpreter, path, conv, batch, channels, sizes, layout):
    tiles, kernels = PATHS[path]
    options = {"path": "implicit_gemm" if path == "depthwise" else path, "tiles": tiles, "layout": layout}
    options |= {"conv": conv, "batch": batch, "channels": channels, "sizes": sizes}
    assert interpreter("sanitized", function="convolution", dtype="float32", **options) == [kernels, []]


@pytest.mark.parametrize("options", [{"inner": True}, {"scratch": 1 << 10}], ids=["axes inside", "chunks"])
def test_accesses_of_special_cases(interpreter, options):
    conv = {"orbits": {"h": 4, "v": 4}, "filters": 8, "stride": 2}
    options |= {"conv": conv, "batch": 3, "channels": 3, "sizes": [5, 4], "path": "shift", "tiles": PATHS["shift"][0]}
    found = interpreter("sanitized", function="convolution", dtype="float16", layout="first", **options)
    assert found == [PATHS["shift"][1], []]


@pytest.mark.parametrize("n, batch, skew", [(130, 5, False), (33, 16, False), (33, 3, True), (34, 3, True)])
def test_accesses_of_matrices(interpreter, n, batch, skew):
    tile, kernels = PATHS["matrices"]
    options = {"n": n, "batch": batch, "skew": skew, "tile": tile}
    assert interpreter("sanitized", function="matrices", **options) == [kernels, []]


def test_no_kernel_is_left_out():
    sources = [file.read_text() for file in Path(kernels.__file__).parent.glob("*.py")]
    known = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}
    assert known == {name for _, names in PATHS.values() for name in names}


def test_bugs_are_found(interpreter):
    for found, expected in interpreter("planted"):
        assert found == expected

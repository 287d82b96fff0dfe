"""The kernel of half a product: in Triton's interpreter against torch, and compiled ahead of time for GPUs."""

import json
import subprocess
import sys

import pytest
from interpret import ENVIRONMENT

from tritonsym.kernels.tiles import SQUARE_TILES, fits

pytest.importorskip("triton")  # Linux only

#: Runs in a separate process: TRITON_INTERPRET must be set before triton is imported.
INTERPRET = """
import json, os, sys, torch
from tritonsym.kernels.gram import gram
from tritonsym.kernels.tiles import GemmTile
torch.set_default_device(os.environ["TRITONSYM_TEST_DEVICE"])
torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
torch.manual_seed(0)
for batch, m, k, layout, has_a, dtype in json.load(sys.stdin):
    def draw(*shape):
        return torch.randint(-2, 3, shape).to(getattr(torch, dtype))
    x = {
        "contiguous": lambda: draw(batch, m, k),
        "transposed": lambda: draw(batch, k, m).mT,
        "sliced": lambda: draw(batch, 2 * m, 3 * k)[:, ::2, ::3],
        "expanded": lambda: draw(1, 1, k).expand(batch, m, k),
    }[layout]()
    a = draw(batch, m, m).mT if has_a else None
    got = gram(x, a, 0.5, -2.0, GemmTile(16, 16, 16, 4, 2), "ieee").double()
    expected = 0.5 * (x.double() @ x.double().mT) - (2 * a.double() if has_a else 0)
    print(json.dumps([torch.equal(got.tril(), expected.tril()), torch.equal(got, got.mT)]))
"""

#: `_row_of` takes an inexact float32 square root: check both ends of rows, also far down.
ROWS = """
import os, torch, triton, triton.language as tl
from tritonsym.kernels.gram import _row_of
torch.set_default_device(os.environ["TRITONSYM_TEST_DEVICE"])
@triton.jit
def kernel(p_ptr, row_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(row_ptr + at, _row_of(tl.load(p_ptr + at)))
rows = torch.cat([torch.arange(2048), torch.randint(2048, 30000, (2048,))])
for p in (rows * (rows + 1) // 2, rows * (rows + 3) // 2):
    got = torch.empty(4096, dtype=torch.int32)
    kernel[(1,)](p.to(torch.int32), got, 4096)
    assert torch.equal(got.long(), rows)
"""

#: Sizes 0, 1, below, at and above the tile of 16, and more tile rows than a group of 8.
CASES = [
    (1, 1, 1, "contiguous", False),
    (2, 15, 7, "transposed", True),
    (3, 16, 16, "sliced", True),
    (1, 17, 33, "contiguous", True),
    (2, 50, 40, "transposed", False),
    (2, 33, 5, "expanded", False),
    (1, 150, 3, "contiguous", True),
    (2, 270, 2, "sliced", False),
    (2, 3, 0, "contiguous", True),
    (0, 5, 4, "contiguous", False),
]
ITEMSIZE = {"bf16": 2, "fp32": 4}
SHIPPED = [
    pytest.param(
        target,
        dtype,
        place,
        has_a,
        transposed,
        marks=() if (target, dtype, place) == ("sm_90", "bf16", 0) else pytest.mark.slow,
    )
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for dtype, itemsize in ITEMSIZE.items()
    for place, tile in enumerate(SQUARE_TILES[itemsize])
    for has_a, transposed in ((False, False), (True, False), (False, True))
    if fits(tile, itemsize, target)
    if not (transposed and dtype == "fp32")  # spills some registers on sm_100
]


def test_kernel_equals_torch():
    """Small integers: every sum is exact in fp32 and fp16."""
    cases = [(*case, dtype) for case in CASES for dtype in ("float32", "float16")]
    command = [sys.executable, "-c", INTERPRET]
    done = subprocess.run(command, input=json.dumps(cases), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(cases)
    assert [case for case, right in zip(cases, results, strict=True) if not all(right)] == []


def test_rows_of_a_triangle(tmp_path):
    path = tmp_path / "rows.py"  # the kernel's source must be in a file
    path.write_text(ROWS)
    done = subprocess.run([sys.executable, path], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("target", "dtype", "place", "has_a", "transposed"), SHIPPED)
def test_shipped_tiles_compile(ahead_of_time, target, dtype, place, has_a, transposed):
    from tritonsym.kernels.gram import _gram_kernel
    from tritonsym.kernels.tiles import GROUP

    itemsize = ITEMSIZE[dtype]
    tile = SQUARE_TILES[itemsize][place]
    fixed = {"HAS_A": has_a, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "GROUP": GROUP, "a_n": 1}
    types = {"alpha": "fp32", "beta": "fp32"}
    fixed[("x_m" if transposed else "x_k")] = 1
    for precision in ("ieee", "tf32")[: itemsize // 2]:
        found = ahead_of_time(_gram_kernel, dtype, fixed | {"PRECISION": precision}, tile, target, **types)
        if (target, precision) != ("sm_100", "tf32"):  # spills some registers, and is not torch's default
            found.check(multiplies=itemsize == 2 or precision == "tf32")
        assert found.narrow_loads == 0


@pytest.mark.parametrize("ones", [["M"], ["K"], ["M", "K", "x_batch", "x_m", "x_k", "a_batch", "a_m", "a_n"]])
def test_sizes_of_one_compile(ahead_of_time, ones):
    """Triton makes them constants; the interpreter does not."""
    from tritonsym.kernels.gram import _gram_kernel

    fixed = {"HAS_A": True, "BLOCK_M": 128, "BLOCK_K": 32, "GROUP": 8, "PRECISION": "ieee"} | dict.fromkeys(ones, 1)
    ahead_of_time(_gram_kernel, "bf16", fixed, SQUARE_TILES[2][-1], "sm_90", alpha="fp32", beta="fp32")

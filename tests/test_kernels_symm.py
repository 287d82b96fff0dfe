"""The kernels of packed matrices: in Triton's interpreter against torch, and compiled ahead of time for GPUs."""

import json
import subprocess
import sys
from itertools import product

import pytest
from interpret import ENVIRONMENT

pytest.importorskip("triton")  # Linux only

#: Runs in a separate process: TRITON_INTERPRET must be set before triton is imported.
INTERPRET = """
import json, os, sys, torch
from tritonsym.kernels import symm
from tritonsym.kernels.tiles import GemmTile
from tritonsym.packing import pack, unpack
torch.set_default_device(os.environ["TRITONSYM_TEST_DEVICE"])
torch.use_deterministic_algorithms(True)  # what is not written is NaN
torch.manual_seed(0)
symm.SEGMENT_STEPS = 2
tile, wide, strip = GemmTile(16, 16, 16, 4, 2), GemmTile(16, 32, 16, 4, 2), GemmTile(32, 64, 16, 4, 2)
for n, batch, layout, has_bias, activation, dtype, skew in json.load(sys.stdin):
    def draw(*shape):
        return torch.randint(-2, 3, shape).to(getattr(torch, dtype))
    def draw_x():
        return {
            "contiguous": lambda: draw(batch, n),
            "transposed": lambda: draw(n, batch).mT,
            "sliced": lambda: draw(2 * batch, 3 * n)[::2, ::3],
            "expanded": lambda: draw(n).expand(batch, n),
        }[layout]()
    x, dy, packed = draw_x(), draw_x(), pack(draw(n, n), "lower", skew=skew)
    bias = draw(n) if has_bias else None
    exact = packed.double().requires_grad_()
    y = x.double() @ unpack(exact, skew=skew) + (bias.double() if has_bias else 0)
    y.backward(dy.double())
    expected = y.relu() if activation else y
    print(json.dumps([
        torch.equal(function(x, packed, bias, activation, t, "ieee", skew).double(), expected)
        for function, t in ((symm.product_by_tiles, wide), (symm.product_by_strips, strip))
    ] + [torch.equal(symm.gradient(x, dy, tile, "ieee", skew).double(), exact.grad)]))
"""

#: Odd and even, 1, on either side of tiles (16 columns), strips (32 rows), segments (32 columns) and their multiples.
SIZES = (1, 2, 3, 15, 16, 17, 30, 31, 32, 33, 34, 47, 50, 63, 64, 65, 66, 96, 97, 127, 130, 193, 260)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


def run(code, text=""):
    done = subprocess.run([sys.executable, "-c", code], input=text, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "sizes", [SIZES[:15], pytest.param(SIZES[15:], marks=pytest.mark.slow)], ids=["to 64", "above"]
)
def test_kernels_equal_torch(sizes):
    """Small integers: every sum is exact in fp32 and fp16."""
    cases = [
        (n, (1, 3, 17, 33)[i % 4], LAYOUTS[i // 2 % 4], i % 3 > 0, "relu" if i % 3 > 1 else None, dtype, skew)
        for i, n in enumerate(sizes)
        for dtype, skew in (("float32", False), ("float16", False), ("float32", True))
    ]
    cases += [
        (n, batch, "contiguous", True, None, "float32", skew) for n, batch in ((5, 0), (34, 50)) for skew in (0, 1)
    ]
    results = [json.loads(line) for line in run(INTERPRET, json.dumps(cases)).splitlines()]
    assert len(results) == len(cases)
    assert [(case, right) for case, right in zip(cases, results, strict=True) if not all(right)] == []


TILES = """
import json, os, torch
from itertools import product
from tritonsym.kernels import symm
from tritonsym.kernels.tiles import GemmTile, fits_product
from tritonsym.packing import pack, unpack
torch.set_default_device(os.environ["TRITONSYM_TEST_DEVICE"])
torch.use_deterministic_algorithms(True)  # what is not written is NaN
torch.manual_seed(0)
packed = pack(torch.randint(-2, 3, (70, 70)).float(), "lower")
for rows in (3, 70):
    x = torch.randint(-2, 3, (rows, 70)).float()
    exact = x.double() @ unpack(packed.double())
    for blocks in product((16, 32, 64), repeat=3):
        tile = GemmTile(*blocks, 4, 2)
        is_right = torch.equal(symm.product(x, packed, None, None, tile, "ieee").double(), exact)
        print(json.dumps([rows, blocks, fits_product(tile, rows, 4, "sm_90"), is_right]))
"""


def test_tiles_fit_where_they_are_right():
    found = [json.loads(line) for line in run(TILES).splitlines()]
    assert len(found) == 2 * 27
    assert [case for case in found if case[2] != case[3]] == []


LAYERS = """
import itertools, os, torch, tritonsym
from torch.utils._python_dispatch import TorchDispatchMode
from tritonsym import functional as T, nn
from tritonsym.testing import assert_matches_reference
torch.set_default_device(os.environ["TRITONSYM_TEST_DEVICE"])
torch.manual_seed(0)

class Largest(TorchDispatchMode):  # except bytes, which the interpreter copies
    most = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        outputs = result if isinstance(result, (list, tuple)) else [result]
        outputs = [t for t in outputs if isinstance(t, torch.Tensor) and t.dtype != torch.uint8]
        self.most = max([self.most, *(t.numel() for t in outputs)])
        return result

with tritonsym.backend("triton"):
    for (n, shape), activation in zip(
        ((1, (2, 1)), (7, (7,)), (8, (2, 3, 8)), (33, (70, 33)), (20, (0, 20)), (6, (0, 2, 6))),
        itertools.cycle([None, "relu", "gelu", "silu", "sigmoid", "tanh"]),
    ):
        for dtype, kind in itertools.product((torch.float32, torch.float16), (nn.SymmetricLinear, nn.SkewLinear)):
            layer = kind(n, n, activation=activation, bias=n != 8, dtype=dtype)
            x = torch.randn(shape).to(dtype)
            plan = tritonsym.explain(layer, x)
            assert plan.path == "implicit_gemm" and len(plan.tiles) == 2 and "'triton'" in str(plan)
            assert_matches_reference(layer, x)

    # bias and activation within the kernels
    for activation, rows in itertools.product((None, "relu", "gelu", "silu", "sigmoid", "tanh"), (3, 70)):
        layer, x = nn.SymmetricLinear(5, 5, activation=activation), torch.linspace(-9, 9, 5 * rows).view(rows, 5)
        with torch.no_grad():
            got, exact = layer(x), layer.to_dense().double()(x.double())
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-6)
    layer, strided = nn.SymmetricLinear(5, 5), torch.randn(10)[::2]
    with torch.no_grad():
        got = T.symmetric_linear(x, layer.weight, strided)
        torch.testing.assert_close(got, x @ layer.expanded_weight() + strided, rtol=1e-5, atol=1e-5)
        assert T.symmetric_linear(x * torch.nan, layer.weight, strided).isnan().all()

    # orders one to three, through the packed weight and x, against the reference
    for n, rows in ((5, 3), (6, 66)):
        def derivatives():
            torch.manual_seed(n)
            leaves = [t.requires_grad_() for t in (torch.randn(rows, n), tritonsym.pack(torch.randn(n, n), "average"),
                                                   torch.randn(n))]
            found, y = [], T.symmetric_linear(*leaves, activation="tanh").square().sum() / rows
            for _ in range(3):
                gradients = torch.autograd.grad(y, leaves, create_graph=True)
                found += gradients
                y = sum(g.square().sum() for g in gradients) / rows
            return found
        got = derivatives()
        with tritonsym.backend("reference"):
            expected = derivatives()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())

    # gram and symmetric_mm: bits, derivatives of two orders
    for shape in ((3, 5), (2, 0, 4, 3), (2, 3, 7, 4), (18, 33)):
        x = torch.randn(shape, requires_grad=True)
        def derivatives():
            c = T.gram(x)
            d = T.symmetric_mm(c, 0.5, -2.0)
            e = T.symmetric_mm(d / (1 + d.detach().abs().amax() if d.numel() else 1))
            for s in (c, d, e, T.gram(x.mT)):
                assert torch.equal(s, s.mT)
            (g,) = torch.autograd.grad((e * torch.arange(e.numel()).view(e.shape)).sum(), x, create_graph=True)
            (h,) = torch.autograd.grad(g.square().sum(), x)
            return c, d, e, g, h
        got = derivatives()
        with tritonsym.backend("reference"):
            expected = derivatives()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * (b.abs().max().item() if b.numel() else 1))

    # left, strides, memory: no tensor of n^2 values, forward or backward
    n = 64
    packed = tritonsym.pack(torch.randn(n, n), "average").requires_grad_()
    x = torch.randn(n, 3, requires_grad=True)
    with Largest() as seen:
        y = T.symmetric_matmul(packed, x, left=True, never_unpack=True)
        y.sum().backward()
    assert seen.most == packed.numel() < n * n
    torch.testing.assert_close(y, tritonsym.unpack(packed) @ x)
    deterministic = [T.symmetric_matmul(packed, torch.ones(2, n)) for _ in range(2)]
    assert torch.equal(*deterministic)

    # compile, opcheck, autocast, torch.func
    layer, x = nn.SymmetricLinear(6, 6, activation="gelu"), torch.randn(4, 6, requires_grad=True)
    def loss(x):
        return layer(x).square().sum() + T.newton_schulz(T.gram(layer(x))).sum()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x), [x, *layer.parameters()]) for f in (compiled, loss)))
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == T.gram(x).dtype == torch.float16
        layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    tile, x = [16, 16, 16, 4, 2], x.detach()
    ops = torch.ops.tritonsym
    torch.library.opcheck(ops.packed_product, (x, layer.weight.detach(), layer.bias.detach(), "relu", False, tile))
    torch.library.opcheck(ops.packed_gradient, (x, x, False, tile))
    torch.library.opcheck(ops.half_gram, (x[None], None, 1.0, 0.0, tile))
    torch.library.opcheck(ops.half_gram, (x[None, :, :4], x[None, :, :4], 1.0, 2.0, tile))
print("right")
"""


def test_layers_and_functions_run_through_the_kernels():
    assert run(LAYERS) == "right\n"


ITEMSIZE = {"bf16": 2, "fp32": 4}
KERNELS = {"SQUARE_TILES": ("_product_kernel", "_gradient_kernel"), "STRIP_TILES": ("_strips_kernel",)}


def shipped():
    """(kernel, dtype, table, place in it, target, is n even, is S skew)."""
    from tritonsym.kernels import tiles

    for target, dtype, table in product(("sm_80", "sm_90", "sm_100", "gfx942"), ITEMSIZE, KERNELS):
        of_dtype = getattr(tiles, table)[ITEMSIZE[dtype]]
        places = [place for place, tile in enumerate(of_dtype) if tiles.fits(tile, ITEMSIZE[dtype], target)]
        if (table, dtype) == ("SQUARE_TILES", "fp32"):  # every tile is for some targets
            places = [of_dtype.index(tiles.pick_square(4, target))]
        for kernel, place in product(KERNELS[table], places):
            marks = () if (target, dtype, place) == ("sm_90", "bf16", 0) else pytest.mark.slow
            yield pytest.param(kernel, dtype, table, place, target, True, False, marks=marks)
    for target in ("sm_90", "sm_100"):  # unaligned rows; elsewhere a few registers spill
        for kernel in KERNELS["SQUARE_TILES"]:
            yield pytest.param(kernel, "bf16", "SQUARE_TILES", 0, target, False, False, marks=pytest.mark.slow)
    for target, table in product(("sm_90", "gfx942"), KERNELS):
        for kernel in KERNELS[table]:
            yield pytest.param(kernel, "bf16", table, -1, target, True, True, marks=pytest.mark.slow)


def constants(kernel, tile, of_float32="ieee"):
    from tritonsym.kernels import symm
    from tritonsym.perf import inspect_kernels

    return inspect_kernels.matrix_constants(getattr(symm, kernel), tile, of_float32)


@pytest.mark.parametrize(("kernel", "dtype", "table", "place", "target", "is_even", "skew"), [*shipped()])
def test_shipped_tiles_compile(ahead_of_time, kernel, dtype, table, place, target, is_even, skew):
    from tritonsym.kernels import symm, tiles

    itemsize = ITEMSIZE[dtype]
    tile = getattr(tiles, table)[itemsize][place]
    strides = {"x_k": 1, "dy_k": 1} if kernel == "_gradient_kernel" else {"x_k": 1}
    for precision in ("ieee", "tf32")[: itemsize // 2]:
        fixed = constants(kernel, tile, precision) | strides | {"EVEN": int(is_even), "SKEW": int(skew)}
        found = ahead_of_time(getattr(symm, kernel), dtype, fixed, tile, target, partial_ptr="*fp32")
        found.check(multiplies=itemsize == 2 or precision == "tf32")
    if found.count and is_even and not skew and dtype == "bf16":
        assert found.narrow_loads == 0


@pytest.mark.slow
@pytest.mark.parametrize("ones", [["K"], ["K", "N"], ["B"], ["B", "K", "N", "x_b", "x_k", "strips", "segments"]])
@pytest.mark.parametrize("kernel", ["_product_kernel", "_gradient_kernel", "_strips_kernel", "_sum_kernel"])
def test_sizes_of_one_compile(ahead_of_time, kernel, ones):
    """Triton makes them constants; the interpreter does not."""
    from tritonsym.kernels import symm, tiles

    tile = (tiles.STRIP_TILES if kernel == "_strips_kernel" else tiles.SQUARE_TILES)[2][-1]
    fixed = constants(kernel, tile)
    if kernel == "_sum_kernel":
        fixed = {"HAS_BIAS": True, "ACTIVATION": "", "BLOCK_R": 128, "SEGMENT": 512, "BLOCK_B": 16, "BLOCK_Q": 64}
    function = getattr(symm, kernel)
    fixed |= {name: 1 for name in ones if name in function.arg_names}
    ahead_of_time(function, "bf16", fixed, tile, "sm_90", partial_ptr="*fp32")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_the_sum_of_strips_compiles(ahead_of_time, rows, target):
    from tritonsym.kernels import symm, tiles

    fixed = {"HAS_BIAS": True, "ACTIVATION": "tanh", "BLOCK_R": 128, "SEGMENT": 512, "BLOCK_B": rows}
    tile = tiles.GemmTile(128, rows, 64, 4, 3)
    found = ahead_of_time(
        symm._sum_kernel, "bf16", fixed | {"BLOCK_Q": 1024 // rows}, tile, target, partial_ptr="*fp32"
    )
    found.check(multiplies=False)
    if found.count:
        assert found.widest_load == 128

"""A process in which Triton's interpreter stands in for a GPU: it reads one request per line and answers on one line.

A request is JSON: [name of a function below, its keyword arguments]; the answer is [result, traceback or null].
TRITON_INTERPRET must be set before triton is imported, hence the separate process, which `Interpreter` starts.

With TRITONSYM_TEST_DEVICE=cuda the same functions run on the GPU, without the interpreter. To test another version of
Triton (3.6.0, which needs numpy < 2.3, and 3.9.0 were tried), install it in a folder and name that in PYTHONPATH:

    pip install --no-deps --target other triton==3.6.0 numpy==2.2.6
    PYTHONPATH=other pytest tests/test_kernels_*.py -k "not compile and not registers"
"""

import json
import os
import subprocess
import sys
import traceback

DEVICE = os.environ.get("TRITONSYM_TEST_DEVICE", "cpu")
#: The environment of a process that runs kernels on that device.
ENVIRONMENT = {
    **os.environ,
    "TRITONSYM_TEST_DEVICE": DEVICE,
    "TRITON_INTERPRET": "1" if DEVICE == "cpu" else "0",
    "OMP_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch's deterministic algorithms need it
}


class Interpreter:
    """``interpreter("convolution", path="shift", ...)`` runs that function in the other process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, name, **arguments):
        print(json.dumps([name, arguments]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the interpreter's process died"
        result, error = json.loads(line)
        assert error is None, error
        return result

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def build(orbits=None, ties=None, filters=0, free=0, kernel=(3, 3), groups=1, pool=None, transposed=False, **geometry):
    """The `ConvSpec` of `filters` filters per group in orbits, or of `filters` tied and `free` free ones.

    `geometry`: fields of `Geometry`; a number stands for all axes.
    """
    from dataclasses import replace

    from tritonsym.spec import Geometry, orbit_spec, pool_spec, tied_spec
    from tritonsym.symmetry import FilterLayout, Symmetry, tap_orbits

    sizes = {"stride": 1, "padding": 1, "dilation": 1, "extra": 0, **geometry}
    sizes = {name: (v,) * len(kernel) if isinstance(v, int) else tuple(v) for name, v in sizes.items()}
    geometry = Geometry(tuple(kernel), **sizes, transposed=transposed)
    if pool:
        return pool_spec(Symmetry(orbits), pool, filters // Symmetry(orbits).order, groups, geometry)
    if ties:
        orbits = tap_orbits(Symmetry(ties[0]), geometry.kernel_size, ties[1])
        return tied_spec(orbits, filters, free, groups, geometry)
    return orbit_spec(replace(FilterLayout.parse(orbits, filters), groups=groups), geometry)


def dense_conv(x, rows, spec):
    """torch's convolution of x with the dense weight that the rows (groups, R, C) stand for, then pooled."""
    import torch
    from torch.nn import functional as F

    table = torch.tensor(spec.row_table)  # [filters, taps]
    weight = table.sign().unsqueeze(-1) * rows[:, table.abs() - 1]  # [G, filters, taps, C]
    weight = weight.where((table != 0).unsqueeze(-1), 0)
    g, dims = spec.geometry, len(spec.geometry.kernel_size)
    options = {"stride": g.stride, "dilation": g.dilation, "groups": spec.groups}
    if g.transposed:
        weight = weight.permute(0, 3, 1, 2).flatten(0, 1).unflatten(-1, g.kernel_size)
        function = getattr(F, f"conv_transpose{dims}d")
        y = function(x, weight, padding=g.padding, output_padding=g.extra, **options)
    else:
        weight = weight.permute(0, 1, 3, 2).flatten(0, 1).unflatten(-1, g.kernel_size)
        sides = [side for p, e in zip(g.padding[::-1], g.extra[::-1], strict=True) for side in (p, p + e)]
        y = getattr(F, f"conv{dims}d")(F.pad(x, sides), weight, **options)
    assert y.shape[2:] == spec.geometry.out_sizes(x.shape[2:])
    if spec.pool:
        y = y.unflatten(1, (spec.groups, -1, spec.blocks[0].filters))
        y = getattr(y, f"a{spec.pool}")(2).flatten(1, 2)
    return y


def weights_of(rows, spec):
    """The stored weights that have these rows (groups, R, C)."""
    import torch

    shapes, start, found = spec.weight_shapes(rows.shape[2]), 0, []
    plain = []
    for block in spec.blocks:
        count = block.filters * spec.slots(block)
        part = rows[:, start : start + count].unflatten(1, (-1, block.filters)).permute(0, 2, 3, 1)  # [G, F, C, slots]
        (found if block.orbits else plain).append(part)
        start += count
    if plain:
        shared = torch.cat(plain, 1)
        found.append(shared.transpose(1, 2) if spec.geometry.transposed else shared)
    return [part.reshape(shape) for part, shape in zip(found, shapes, strict=True)]


def forward(x, rows, bias, spec, path, tiles, activation=None, inner=False):
    """`launch.fprop`: y, and the winners of pooled orbits or None."""
    from tritonsym import launch, shift

    options = (spec.text, path, tiles, inner, activation, shift.is_last(x), bool(spec.pool))
    y, winners = launch.fprop(x, weights_of(rows, spec), bias, *options)
    return y, winners if spec.pool else None


def backward(dy, x, rows, winners, spec, path, tiles, need_x=True, need_rows=True, inner=False):
    """`launch.backward`: dx, and the gradients of the weights; None where not needed."""
    from tritonsym import launch

    options = (spec.text, path, tiles, inner, need_x, need_rows)
    return launch.backward(dy, x, weights_of(rows, spec), winners, *options)


def lay_out(x, layout):
    """The same values with other strides."""
    import torch

    if layout == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "turned":  # in memory: the spatial axes reversed, the batch, the channels
        order = (*reversed(range(2, x.ndim)), 0, 1)
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])
    if layout in ("far", "far rows"):  # every stride has 31 bits, but not every offset
        axis, apart = 1 if layout == "far" else 2, (1 << 30) + 16
        near = x.select(axis, 0).contiguous()
        stride = (*near.stride()[:axis], apart, *near.stride()[axis:])
        length = apart * (x.shape[axis] - 1) + x.numel()
        far = torch.empty(length, dtype=x.dtype, device=x.device)  # untouched pages take no room
        return far.as_strided(x.shape, stride).copy_(x)
    assert layout == "first"
    return x


#: The interpreter does not know bfloat16.
BFLOAT16 = [("bfloat16", "last"), ("bfloat16", "first")] if DEVICE == "cuda" else []


def variants(number):
    """Two pairs of a dtype and a layout, which depend on `number`, and those of bfloat16."""
    layouts = ("first", "last", "sliced", "first", "turned")
    turns = [*zip(("float32", "float16", "float32", "float16", "float16"), layouts, strict=True)]
    return [turns[number % 5], turns[(number + 2) % 5], *BFLOAT16]


def convolution(
    conv, batch, channels, sizes, path, tiles, dtype, layout, activation=None, scratch=None, inner=False, packed=False
):
    """Check that y, dx and dw are exactly those of the dense convolution in float64.

    The numbers are small integers: every sum is exact in float32 and float16, and rounded in bfloat16.
    `packed`: the fused kernel keeps products in bfloat16, where they are exact for few channels.
    """
    import torch

    from tritonsym import launch, reference
    from tritonsym.kernels import fused

    launch.SCRATCH_BYTES = scratch or 1 << 30
    spec, dtype = build(**conv), getattr(torch, dtype)
    fused.PACKED = (torch.bfloat16, dtype) if packed else (torch.bfloat16,)
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randint(-2, 3, shape).double()

    x = draw(batch, spec.groups * channels, *sizes).requires_grad_()
    rows = draw(spec.groups, spec.rows, channels).requires_grad_()
    bias = draw(spec.out_channels)
    y = dense_conv(x, rows, spec)
    dy = draw(*y.shape[:1], 1, *y.shape[2:]).expand(y.shape) if layout == "sliced" else draw(*y.shape)
    dx, drows = torch.autograd.grad(y, (x, rows), dy)
    if spec.pool:  # up to 8 winners share a gradient: inexact
        tolerance = {"rtol": 4e-3 if dtype == torch.float16 else 1e-6, "atol": 1e-2 if dtype == torch.float16 else 1e-5}
    else:
        tolerance = {"rtol": 0, "atol": 0}
    rounded = {"rtol": 2**-6, "atol": 2} if dtype == torch.bfloat16 else {}
    tolerance |= rounded
    x, rows, bias, dy = (t.detach().to(DEVICE, dtype) for t in (x, rows, bias, dy))
    x, dy = lay_out(x, layout), dy if layout == "sliced" else lay_out(dy, layout)
    bias = bias.repeat_interleave(2)[::2] if layout == "sliced" else bias
    got, winners = forward(x, rows, bias, spec, path, tiles, activation, inner)
    expected = reference.activate(y.detach() + bias.double()[(...,) + (None,) * len(sizes)], activation)
    exact = {"rtol": 0, "atol": 0} if activation in (None, "relu") else {"rtol": 1e-3, "atol": 1e-3}
    exact |= rounded
    torch.testing.assert_close(got.cpu().double(), expected, **exact, msg=lambda m: f"y: {m}")
    got_dx, got_dws = backward(dy, x, rows, winners, spec, path, tiles, inner=inner)
    torch.testing.assert_close(got_dx.cpu().double(), dx, **tolerance, msg=lambda m: f"dx: {m}")
    for got_dw, dw in zip(got_dws, weights_of(drows, spec), strict=True):
        torch.testing.assert_close(got_dw.cpu().double(), dw, **tolerance, msg=lambda m: f"dw: {m}")
    return True


def not_finite(conv, batch, channels, sizes, path, tiles, dtype, activation=None):
    """Check that NaN and infinity in x reach y as in the dense convolution."""
    import torch

    from tritonsym import reference

    spec, dtype = build(**conv), getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (batch, spec.groups * channels, *sizes)).double()
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x.view(-1)[(i + 1) * x.numel() // 4] = value
    rows = torch.randint(-2, 3, (spec.groups, spec.rows, channels)).double()
    y = dense_conv(x, rows, spec)
    assert 0 < y.isnan().sum() < y.numel() and y.isinf().any()
    expected = reference.activate(y, activation)
    got, _ = forward(x.to(DEVICE, dtype), rows.to(DEVICE, dtype), None, spec, path, tiles, activation)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    return True


def large(path, tiles):
    """Check that float16 overflows only where the dense convolution does, when products cancel and gradients are large.

    4 channels of 200 with weights of 100 and -100; then gradients of 30000, inputs of 1 / 32 and weights of 1 / 128.
    """
    import torch

    spec = build(orbits="hv", filters=8, padding=0)
    for of_x, weight, of_dy in ((200.0, 100.0, 1.0), (0.03125, 0.0078125, 30000.0)):
        x = torch.full((1, 4, 5, 6), of_x).double()
        rows = torch.full((1, spec.rows, 4), weight).double()
        rows[:, : 3 * spec.rows // 9 if weight > 1 else 0] = -weight
        rows[:, 6 * spec.rows // 9 if weight > 1 else spec.rows :] = 0
        x, rows = x.requires_grad_(), rows.requires_grad_()
        y = dense_conv(x, rows, spec)
        dy = torch.full_like(y, of_dy)
        dx, drows = torch.autograd.grad(y, (x, rows), dy)
        halves = [t.detach().half().to(DEVICE) for t in (x, rows, dy)]
        got, _ = forward(halves[0], halves[1], None, spec, path, tiles)
        got_dx, (got_dw,) = backward(halves[2], halves[0], halves[1], None, spec, path, tiles)
        for found, exact in ((got, y), (got_dx, dx), (got_dw, weights_of(drows, spec)[0])):
            assert exact.abs().max() < 65504
            torch.testing.assert_close(found.cpu().double(), exact.detach(), rtol=2e-3, atol=1e-2)
    return True


def repeat(conv, batch, channels, sizes, path, tiles, dtype, times):
    """Check that `times` runs, and either gradient alone, give the same bits.

    On a GPU half of the runs are on a stream of their own, while another one is busy.
    """
    import torch

    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    spec, dtype = build(**conv), getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(batch, spec.groups * channels, *sizes).to(DEVICE, dtype)
    rows = torch.randn(spec.groups, spec.rows, channels).to(DEVICE, dtype)

    dy = torch.randn(batch, spec.out_channels, *spec.geometry.out_sizes(sizes)).to(DEVICE, dtype)

    def run():
        y, winners = forward(x, rows, None, spec, path, tiles)
        dx, (dw,) = backward(dy, x, rows, winners, spec, path, tiles)
        return winners, y, dx, dw

    winners, *expected = run()
    assert all(t.isfinite().all() for t in expected)
    assert torch.equal(expected[1], backward(dy, x, rows, winners, spec, path, tiles, need_rows=False)[0])
    assert torch.equal(expected[2], backward(dy, x, rows, winners, spec, path, tiles, need_x=False)[1][0])
    for i in range(times):
        if DEVICE == "cuda" and i % 2:
            torch.cuda.synchronize()
            busy = torch.randn(4096, 4096, device=DEVICE)
            busy = busy @ busy
            with torch.cuda.stream(torch.cuda.Stream()):
                found = run()
            torch.cuda.synchronize()
        else:
            found = run()
        for name, a, b in zip(("y", "dx", "dw"), expected, found[1:], strict=True):
            assert torch.equal(a, b), f"{name} of run {i} differs"
    torch.use_deterministic_algorithms(False)
    return True


def layer(kind, options, shape, dtype, path, scale=1):
    """`assert_matches_reference` of a layer of `tritonsym.nn` through the kernels; returns the tiles it took."""
    import torch

    import tritonsym

    torch.manual_seed(0)
    module = getattr(tritonsym.nn, kind)(**options).to(DEVICE, getattr(torch, dtype))
    x = torch.randn(shape).to(DEVICE, getattr(torch, dtype))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= scale
    with tritonsym.backend("triton"), tritonsym.path(path):
        tritonsym.testing.assert_matches_reference(module, x)
        return tritonsym.explain(module, x).tiles


def matrices(n, batch, skew, tile):
    """Check that products with a packed matrix, by tiles and by strips, its gradient and X X^T are exactly torch's."""
    import torch

    from tritonsym.kernels import gram, symm
    from tritonsym.kernels.tiles import GemmTile
    from tritonsym.packing import pack, unpack

    x, dy, bias, full = (torch.randint(-2, 3, shape).float() for shape in ((batch, n), (batch, n), (n,), (n, n)))
    packed = pack(full, "lower", skew=skew).requires_grad_()
    expected = x @ unpack(packed, skew=skew) + bias
    expected.backward(dy)
    tile, symm.SEGMENT_STEPS = GemmTile(*tile), 2
    for product in (symm.product_by_tiles, symm.product_by_strips):
        assert torch.equal(product(x.mT.contiguous().mT, packed.detach(), bias, None, tile, "ieee", skew), expected)
    assert torch.equal(symm.gradient(x, dy, tile, "ieee", skew), packed.grad)
    square = x[None] @ x.mT
    assert torch.equal(gram.gram(x[None], square, 1.0, 1.0, tile, "ieee"), 2 * square)
    return True


def sanitized(function, **arguments):
    """The kernels that the named function launches, and what the sanitizer finds in them."""
    from sanitizer import Sanitizer

    with Sanitizer() as seen:
        try:
            globals()[function](**arguments)
        except AssertionError as error:
            seen.found.add(str(error))
    return sorted(seen.kernels), sorted(seen.found)


def planted():
    """What the sanitizer finds and should find in kernels with planted bugs, for integer and floating dtypes."""
    import torch
    from sanitizer import PLANTED, Sanitizer

    answers = []
    for kernel, expected in PLANTED.items():
        for dtype in (torch.float32, torch.float16, torch.int32, torch.uint8):
            with Sanitizer() as seen:
                kernel[(2,)](torch.ones(6, dtype=dtype), torch.empty(6, dtype=dtype))
            answers.append([sorted(seen.found), [f"{kernel.__name__}: {expected}"]])
    return answers


#: conv (`build`), batch, channels per group, sizes. Sizes 1, primes, H != W; filters and channels below, at and
#: above the tiles (16 and 32); every kind of symmetry; strides, also larger than the kernel; even kernels; groups.
CASES = {
    "1-D h": ({"orbits": "h", "filters": 10, "kernel": [3]}, 2, 5, [13]),
    "h one pixel": ({"orbits": "h", "filters": 2}, 1, 1, [1, 1]),
    "h one row": ({"orbits": "h", "filters": 2 * 33}, 3, 31, [1, 9]),
    "hv": ({"orbits": "hv", "filters": 4 * 17}, 1, 33, [5, 4]),
    "hv in groups": ({"orbits": "hv", "filters": 4 * 3, "groups": 2}, 2, 16, [4, 5]),
    "v even kernel": ({"orbits": "v", "filters": 2 * 16, "kernel": [4, 2]}, 2, 7, [6, 5]),
    "c4, even kernel": ({"orbits": "c4", "filters": 4 * 3, "kernel": [4, 4], "padding": 2}, 1, 17, [5, 4]),
    "c2 unpadded": ({"orbits": "c2", "filters": 6, "padding": 0}, 2, 3, [3, 4]),
    "d4": ({"orbits": "d4", "filters": 8 * 15}, 1, 15, [4, 3]),
    "mixed": ({"orbits": {"h": 4, "c2": 2, "d4": 8}, "filters": 19}, 2, 9, [4, 3]),
    "dilation": ({"orbits": "h", "filters": 4, "dilation": 2, "padding": [2, 1]}, 2, 3, [9, 8]),
    "stride": ({"orbits": "hv", "filters": 8, "stride": 2}, 2, 5, [9, 8]),
    "stride in groups": ({"orbits": "h", "filters": 6, "stride": 2, "groups": 2}, 1, 4, [7, 6]),
    "stride 3, kernel 4": ({"orbits": "h", "filters": 4, "kernel": [4, 4], "stride": [3, 2]}, 1, 2, [11, 10]),
    "stride > kernel": ({"orbits": "h", "filters": 4, "kernel": [2, 2], "stride": 3, "padding": 0}, 2, 3, [8, 7]),
    "uneven padding": ({"orbits": "h", "filters": 6, "kernel": [2, 4], "stride": 2, "extra": [1, 2]}, 2, 3, [7, 6]),
    "image smaller than the stride": ({"orbits": "hv", "filters": 8, "stride": [3, 2]}, 2, 3, [1, 5]),
    "image smaller than the stride, nothing to read": (
        {"orbits": "h", "filters": 4, "kernel": [1, 3], "stride": 3, "padding": [2, 1]},
        2,
        3,
        [1, 4],
    ),
    "patches": ({"orbits": "hv", "filters": 8, "kernel": [4, 4], "stride": 4, "padding": 0}, 2, 3, [8, 12]),
    "3-D hvz": ({"orbits": "hvz", "filters": 8 * 2, "kernel": [3, 2, 2]}, 1, 3, [3, 2, 4]),
    "3-D hvz, stride, dilation, groups": (
        {
            "orbits": "hvz",
            "filters": 8,
            "kernel": [2, 2, 3],
            "stride": [2, 1, 2],
            "dilation": [1, 2, 2],
            "groups": 2,
        },
        2,
        3,
        [2, 4, 5],
    ),
    "transposed 1-D, far output": (
        {"orbits": "h", "filters": 4, "kernel": [3], "stride": 3, "extra": 2, "transposed": True},
        2,
        3,
        [5],
    ),
    "transposed, free filters, dilation": (
        {"orbits": {"c4": 8}, "filters": 11, "stride": 2, "dilation": 2, "extra": 1, "transposed": True},
        2,
        3,
        [3, 4],
    ),
    "transposed": (
        {"orbits": "hv", "filters": 8, "kernel": [4, 4], "stride": 2, "transposed": True},
        2,
        3,
        [5, 3],
    ),
    "transposed, stride > kernel, groups": (
        {
            "orbits": "h",
            "filters": 4,
            "kernel": [2, 2],
            "stride": 3,
            "padding": 0,
            "extra": [1, 0],
            "groups": 2,
            "transposed": True,
        },
        1,
        2,
        [4, 3],
    ),
    "tied odd": ({"ties": ["hv", "h"], "filters": 5, "free": 3, "kernel": [3, 4]}, 1, 6, [6, 7]),
    "tied d4, negative signs": ({"ties": ["d4", "h"], "filters": 4, "kernel": [5, 5], "padding": 2}, 2, 2, [7, 6]),
    "rings": ({"ties": ["radial:1", ""], "filters": 3, "free": 2, "kernel": [3, 4]}, 1, 3, [6, 6]),
    "max of h": ({"orbits": "h", "filters": 2 * 17, "pool": "max"}, 2, 5, [5, 6]),
    "min of d4 in groups": ({"orbits": "d4", "filters": 8 * 2, "groups": 2, "pool": "min"}, 1, 3, [3, 4]),
    "long, so that several programs share its positions": ({"orbits": "h", "filters": 2, "kernel": [3]}, 2, 3, [601]),
    "many images, so that several programs share them": ({"orbits": "h", "filters": 4, "kernel": [3]}, 33, 2, [40]),
    "max, stride": ({"orbits": "hv", "filters": 4 * 3, "stride": 2, "pool": "max"}, 2, 2, [5, 4]),
}


if __name__ == "__main__":
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = [globals()[name](**arguments), None]
        except BaseException:
            answer = [None, traceback.format_exc()]
        print(json.dumps(answer), flush=True)

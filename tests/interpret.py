"""A process in which Triton's interpreter stands in for a GPU: reads one request a line, answers one line.

A request is JSON: [name of a function below, its keyword arguments]; the answer [result, traceback or null]. The
interpreter must be chosen before triton is imported, hence the process of its own; `Interpreter` starts it.

With TRITONSYM_TEST_DEVICE=cuda there is no interpreter: the same functions run on the GPU.
"""

import json
import os
import subprocess
import sys
import traceback

DEVICE = os.environ.get("TRITONSYM_TEST_DEVICE", "cpu")
#: Of a process that runs kernels on that device.
ENVIRONMENT = {
    **os.environ,
    "TRITONSYM_TEST_DEVICE": DEVICE,
    "TRITON_INTERPRET": "1" if DEVICE == "cpu" else "0",
    "OMP_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic algorithms of torch ask for
}


class Interpreter:
    """``interpreter("convolution", path="shift", ...)`` runs that function over there."""

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


def build(orbits=None, ties=None, filters=0, free=0, kernel=(3, 3), groups=1, pool=None, **geometry):
    """The `shift.Conv` of `filters` output filters per group in orbits, or so many tied ones and `free` ones."""
    from tritonsym.shift import Conv, Geometry
    from tritonsym.symmetry import FilterLayout, Symmetry, tap_orbits, tied_blocks

    kernel = tuple(kernel)

    def each(name, default):
        value = geometry.get(name, default)
        return (value,) * len(kernel) if isinstance(value, int) else tuple(value)

    if ties is None:
        blocks = FilterLayout.parse(orbits, filters).blocks(kernel)
    else:
        symmetry, odd = ties
        blocks = tied_blocks(tap_orbits(Symmetry(symmetry), kernel, odd), filters, free)
    transposed = geometry.get("transposed", False)
    extra = each("output_padding", 0) if transposed else ()
    shape = Geometry(kernel, each("stride", 1), each("padding", 1), each("dilation", 1), transposed, extra)
    return Conv(blocks, groups, shape, pool)


def lay_out(x, layout):
    """The same values with other strides."""
    import torch

    if layout == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "turned":  # channels innermost, behind the batch and the other axes in reverse
        order = (*reversed(range(2, x.ndim)), 0, 1)
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])
    if layout == "far":  # every stride has 31 bits, but not every offset
        apart = (1 << 30) + 16
        far = torch.empty(
            apart * (x.shape[1] - 1) + x.numel(), dtype=x.dtype, device=x.device
        )  # untouched pages take no room
        return far.as_strided(x.shape, (x[0, 0].numel(), apart, *x[0, 0].contiguous().stride())).copy_(x)
    assert layout == "first"
    return x


#: The interpreter does not know bfloat16.
BFLOAT16 = [("bfloat16", "last"), ("bfloat16", "first")] if DEVICE == "cuda" else []


def variants(number):
    """Two pairs of a dtype and a layout, by turns, and those of bfloat16."""
    layouts = ("first", "last", "sliced", "first", "turned")
    turns = [*zip(("float32", "float16", "float32", "float16", "float16"), layouts, strict=True)]
    return [turns[number % 5], turns[(number + 2) % 5], *BFLOAT16]


def convolution(conv, batch, channels, sizes, path, tiles, dtype, layout, activation=None):
    """Whether y, dx and the gradient of the rows are exactly those of the dense convolution in float64.

    The numbers are small integers, so that every sum is exact in float32 and float16, and rounded in bfloat16.
    """
    import torch

    from tritonsym import launch, reference
    from tritonsym.convolution import dense_conv, expand_rows

    conv, dtype = build(**conv), getattr(torch, dtype)
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randint(-2, 3, shape).double()

    x = draw(batch, conv.groups * channels, *sizes).requires_grad_()
    rows = draw(conv.groups, conv.rows, channels).requires_grad_()
    bias = draw(conv.out_channels)
    y = dense_conv(x, expand_rows(rows, conv), None, conv)
    dy = draw(*y.shape[:1], 1, *y.shape[2:]).expand(y.shape) if layout == "sliced" else draw(*y.shape)
    dx, drows = torch.autograd.grad(y, (x, rows), dy)
    if conv.pool:  # shared by up to 8 winners: not exact
        tolerance = {"rtol": 4e-3 if dtype == torch.float16 else 1e-6, "atol": 1e-2 if dtype == torch.float16 else 1e-5}
    else:
        tolerance = {"rtol": 0, "atol": 0}
    rounded = {"rtol": 2**-6, "atol": 2} if dtype == torch.bfloat16 else {}
    tolerance |= rounded
    x, rows, bias, dy = (t.detach().to(DEVICE, dtype) for t in (x, rows, bias, dy))
    x, dy = lay_out(x, layout), dy if layout == "sliced" else lay_out(dy, layout)
    bias = bias.repeat_interleave(2)[::2] if layout == "sliced" else bias
    got, winners = launch.forward(x, rows, bias, conv.text, path, tiles, activation, conv.pool is not None)
    expected = reference.activate(y.detach() + bias.double()[(...,) + (None,) * len(sizes)], activation)
    exact = {"rtol": 0, "atol": 0} if activation in (None, "relu") else {"rtol": 1e-3, "atol": 1e-3}
    exact |= rounded
    torch.testing.assert_close(got.cpu().double(), expected, **exact, msg=lambda m: f"y: {m}")
    got_dx, got_drows = launch.backward(dy, x, rows, winners, conv.text, path, tiles, True, True)
    torch.testing.assert_close(got_dx.cpu().double(), dx, **tolerance, msg=lambda m: f"dx: {m}")
    torch.testing.assert_close(got_drows.cpu().double(), drows, **tolerance, msg=lambda m: f"drows: {m}")
    only_rows = launch.backward(dy, x, rows, winners, conv.text, path, tiles, False, True)
    assert only_rows[0].numel() == 0 and torch.equal(only_rows[1], got_drows)
    only_x = launch.backward(dy, x, rows, winners, conv.text, path, tiles, True, False)
    assert only_x[1].numel() == 0 and torch.equal(only_x[0], got_dx)
    return True


def not_finite(conv, batch, channels, sizes, path, tiles, dtype, activation=None):
    """Whether NaN and infinity in x reach y as they do in the dense convolution."""
    import torch

    from tritonsym import launch, reference
    from tritonsym.convolution import dense_conv, expand_rows

    conv, dtype = build(**conv), getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (batch, conv.groups * channels, *sizes)).double()
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x.view(-1)[(i + 1) * x.numel() // 4] = value
    rows = torch.randint(-2, 3, (conv.groups, conv.rows, channels)).double()
    y = dense_conv(x, expand_rows(rows, conv), None, conv)
    assert 0 < y.isnan().sum() < y.numel() and y.isinf().any()
    expected = reference.activate(y, activation)
    x, rows = x.to(DEVICE, dtype), rows.to(DEVICE, dtype)
    got, _ = launch.forward(x, rows, None, conv.text, path, tiles, activation, False)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    return True


def repeat(conv, batch, channels, sizes, path, tiles, dtype, times):
    """Whether so many runs give the same bits, on a GPU half of them in a stream beside another one that is busy."""
    import torch

    from tritonsym import launch

    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    conv, dtype = build(**conv), getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(batch, conv.groups * channels, *sizes).to(DEVICE, dtype)
    rows = torch.randn(conv.groups, conv.rows, channels).to(DEVICE, dtype)
    dy = torch.randn(conv.out_shape(x)).to(DEVICE, dtype)

    def run():
        y, winners = launch.forward(x, rows, None, conv.text, path, tiles, None, conv.pool is not None)
        return y, *launch.backward(dy, x, rows, winners, conv.text, path, tiles, True, True)

    expected = run()
    assert all(t.isfinite().all() for t in expected)
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
        for name, a, b in zip(("y", "dx", "drows"), expected, found, strict=True):
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


#: conv (`build`), batch, channels per group, sizes. Sizes 1, primes, H != W; filters and channels below, at and
#: above the tiles (16 and 32); every kind of symmetry; strides, also larger than the kernel; even kernels; groups.
CASES = {
    "1-D h": ({"orbits": "h", "filters": 10, "kernel": [3]}, 2, 5, [13]),
    "h one pixel": ({"orbits": "h", "filters": 2}, 1, 1, [1, 1]),
    "h one row": ({"orbits": "h", "filters": 2 * 33}, 3, 31, [1, 9]),
    "hv": ({"orbits": "hv", "filters": 4 * 17}, 1, 33, [5, 7]),
    "hv in groups": ({"orbits": "hv", "filters": 4 * 3, "groups": 3}, 2, 16, [4, 5]),
    "v even kernel": ({"orbits": "v", "filters": 2 * 16, "kernel": [4, 2]}, 2, 7, [6, 5]),
    "c4 5x5": ({"orbits": "c4", "filters": 4 * 3, "kernel": [5, 5], "padding": 2}, 1, 17, [7, 6]),
    "c2 unpadded": ({"orbits": "c2", "filters": 6, "padding": 0}, 2, 3, [3, 4]),
    "d4": ({"orbits": "d4", "filters": 8 * 15}, 1, 15, [4, 3]),
    "mixed": ({"orbits": {"h": 4, "v": 2, "c2": 2, "d4": 16}, "filters": 31}, 2, 9, [4, 5]),
    "dilation": ({"orbits": "h", "filters": 4, "dilation": 2, "padding": [2, 1]}, 2, 3, [9, 8]),
    "stride": ({"orbits": "hv", "filters": 8, "stride": 2}, 2, 5, [9, 8]),
    "stride in groups": ({"orbits": "h", "filters": 6, "stride": 2, "groups": 2}, 1, 4, [7, 6]),
    "stride 3, kernel 4": ({"orbits": "h", "filters": 4, "kernel": [4, 4], "stride": [3, 2]}, 1, 2, [11, 10]),
    "stride > kernel": ({"orbits": "h", "filters": 4, "kernel": [2, 2], "stride": 3, "padding": 0}, 2, 3, [8, 7]),
    "patches": ({"orbits": "hv", "filters": 8, "kernel": [4, 4], "stride": 4, "padding": 0}, 2, 3, [8, 12]),
    "3-D hvz": ({"orbits": "hvz", "filters": 8 * 2, "kernel": [3, 3, 3]}, 1, 3, [3, 4, 5]),
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
            "output_padding": [1, 0],
            "groups": 2,
            "transposed": True,
        },
        1,
        2,
        [4, 3],
    ),
    "tied odd": ({"ties": ["hv", "h"], "filters": 5, "free": 3, "kernel": [3, 4]}, 1, 6, [6, 7]),
    "tied d4, negative signs": ({"ties": ["d4", "h"], "filters": 4, "kernel": [5, 5], "padding": 2}, 2, 2, [7, 6]),
    "rings": ({"ties": ["radial:1", ""], "filters": 3, "free": 2, "kernel": [5, 5], "padding": 2}, 1, 3, [6, 6]),
    "max of h": ({"orbits": "h", "filters": 2 * 17, "pool": "max"}, 2, 5, [5, 6]),
    "min of d4 in groups": ({"orbits": "d4", "filters": 8 * 2, "groups": 2, "pool": "min"}, 1, 3, [4, 5]),
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

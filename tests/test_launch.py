"""The host side of calls by kernels: rows of stored weights, preparation, launches, errors.

A stub driver replaces the GPU's: calls go through Triton's JIT, which specializes and compiles, but launches nothing.
"""

import contextlib
import json
import re
import time
from functools import partial
from itertools import product

import pytest
import torch
from interpret import CASES, build

import tritonsym
from tritonsym import launch, nn, reference


def dense_weight(spec, weights):
    """The definition in `ConvSpec`, tap by tap: (groups, filters, C, taps)."""
    *tied, shared = weights if any(not block.orbits for block in spec.blocks) else [*weights, None]
    channels = (tied or [shared])[0].shape[1]
    if shared is not None:
        shared = shared.flatten(2).unflatten(0, (spec.groups, -1))
        shared = shared.transpose(1, 2) if spec.geometry.transposed else shared  # [G, stored, C, taps]
        channels = shared.shape[2]
    dense, done = torch.zeros(spec.groups, len(spec.row_table), channels, len(spec.row_table[0])).double(), 0
    for block, images in zip(spec.blocks, spec.slot_table, strict=True):
        if block.orbits:
            stored = tied.pop(0).unflatten(0, (spec.groups, -1))
        else:
            stored, done = shared[:, done : done + block.filters], done + block.filters
        for first, slots, signs in images:
            for k, (slot, sign) in enumerate(zip(slots, signs, strict=True)):
                if sign:
                    dense[:, first : first + block.filters, :, k] = sign * stored[..., slot]
    return dense


def stored_rows(spec, weights):
    """Rows (groups, R, C), ordered by block, slot and filter."""
    return torch.cat([rows.flatten(1, 2) for rows in reference.block_rows(spec, weights)], 1)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_stored_weights(name):
    spec = build(**CASES[name][0])
    weights = [torch.randn(shape).double().requires_grad_() for shape in spec.weight_shapes(3)]
    rows = stored_rows(spec, weights)
    assert rows.shape == (spec.groups, spec.rows, 3)
    dense = dense_weight(spec, [w.detach() for w in weights])
    of_table = torch.tensor(spec.row_table)
    found = of_table.sign().unsqueeze(-1) * rows[:, of_table.abs() - 1].detach()
    torch.testing.assert_close(found.transpose(2, 3), dense, rtol=0, atol=0)
    by_block = reference.block_rows(spec, weights)
    drows = [torch.randn_like(rows) for rows in by_block]
    expected = torch.autograd.grad(by_block, weights, drows)
    for got, of_weight in zip(reference.block_gradients(spec, drows, spec.weight_shapes(3)), expected, strict=True):
        torch.testing.assert_close(got, of_weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_rows_that_kernels_take(name):
    """The same for every memory layout of the weights, and written back."""
    spec = build(**CASES[name][0])
    weights = [torch.randn(shape).double() for shape in spec.weight_shapes(3)]
    for form in (weights, [w.mT.contiguous().mT if w.ndim > 1 else w for w in weights]):
        stored = launch.Rows(spec, range(len(spec.blocks)), [False] * len(spec.geometry.kernel_size), form)
        rows = stored.of(form)
        assert rows.is_contiguous() and torch.equal(rows, stored_rows(spec, weights))
        back = [torch.empty_like(w) for w in form]
        stored.write(back, rows)  # every row is stored
        torch.testing.assert_close(back, weights, rtol=0, atol=0)


# --- with a driver that launches nothing ------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    """`launched`: names of kernels; `compiled`: what was compiled for them."""
    pytest.importorskip("triton")
    from tritonsym.perf.host import stub_driver

    with stub_driver() as seen:
        yield seen


def step(layer, x):
    """Forward and backward, and an inference call."""
    with torch.no_grad():
        layer(x)
    x = x.detach().requires_grad_()
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))


LAST = {"memory_format": torch.channels_last}
CONV = lambda: nn.SymmetricConv2d(16, 16, 3, padding=1, symmetry="hv"), torch.randn(1, 16, 4, 4).to(**LAST)
STRIPS, TILES = ["_strips_kernel", "_sum_kernel"], ["_product_kernel"]


@pytest.mark.parametrize(
    "path, build, x, once, others",
    [
        ("shift", *CONV, ["_shift_sum_kernel"], ["_shift_sum_kernel"]),
        ("fused", *CONV, ["_fused_kernel"], ["_shift_sum_kernel"]),
        ("implicit_gemm", *CONV, ["_implicit_gemm_kernel"], ["_implicit_gemm_kernel", "_wgrad_kernel"]),
        (
            None,
            lambda: nn.SymmetricLinear(64, 64),
            torch.randn(1, 64),
            STRIPS,
            [*STRIPS, "_gradient_kernel"],
        ),
        (
            None,
            lambda: nn.SymmetricLinear(64, 64),
            torch.randn(99, 64),
            TILES,
            [*TILES, "_gradient_kernel"],
        ),
    ],
)
def test_a_repeated_call_is_a_few_launches(gpu, path, build, x, once, others, monkeypatch):
    """The least of many times, so as not to measure other processes, beside that of a training step of a small layer
    of torch, so as not to measure the machine; without the products, which are the vendor's."""
    monkeypatch.setattr(launch, "_multiply", lambda a, b, out, scale=1: out)

    def inference(layer, x):
        with torch.no_grad():
            layer(x)

    def training(layer, x):
        y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    layer, x = build().bfloat16(), x.bfloat16().requires_grad_()
    yardstick = partial(training, torch.nn.Linear(8, 8), torch.randn(1, 8, requires_grad=True))
    with tritonsym.path(path) if path else contextlib.nullcontext():
        for step, names, most in (inference, once, 2.5), (training, once + others, 6):
            run = partial(step, layer, x)
            run()
            gpu.launched.clear()
            run()
            assert gpu.launched == names
            gpu.compiled.clear()
            least = {run: 1.0, yardstick: 1.0}
            for _, function in product(range(1000), least):
                start = time.perf_counter()
                function()
                least[function] = min(least[function], time.perf_counter() - start)
            assert not gpu.compiled
            assert least[run] < most * least[yardstick], [f"{1e6 * seconds:.0f} us" for seconds in least.values()]


def test_times_as_a_file(tmp_path, capsys):
    pytest.importorskip("triton")
    from tritonsym.perf import host

    assert host.main(["--rounds", "2", "--output", str(tmp_path / "host.json")]) == 0
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert [(row["case"], row["mode"]) for row in rows] == [*product(host.CASES, ("forward", "training"))]
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert all(len(row["seconds"]) == 2 and 1e-6 < min(row["seconds"]) for row in rows)


@pytest.mark.parametrize("path, count", [("shift", 2), ("fused", 2), ("implicit_gemm", 3)])
def test_sizes_of_images_and_batches_compile_nothing_new(gpu, path, count):
    layer = nn.SymmetricConv2d(16, 24, 3, padding=1, symmetry="h").bfloat16()
    with tritonsym.path(path):
        for batch, sizes in ((2, (5, 4)), (1, (8, 16)), (16, (1, 7)), (3, (1, 1))):
            step(layer, torch.randn(batch, 16, *sizes).bfloat16().to(**LAST))
        assert len(gpu.compiled) == count, gpu.compiled


@pytest.mark.slow
@pytest.mark.parametrize("path", ["shift", "implicit_gemm"])
def test_kernels_of_a_network(gpu, path):
    """The 3x3 convolutions of ResNet-18, training."""
    shapes = [(64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    with tritonsym.path(path):
        for channels, filters, stride in shapes:
            layer = nn.SymmetricConv2d(channels, filters, 3, stride, 1, symmetry="hv").bfloat16()
            for batch in (2, 1):
                step(layer, torch.randn(batch, channels, 4, 4).bfloat16().to(**LAST))
    assert len(gpu.compiled) <= 3 * len(shapes)


def test_tensors_that_are_not_aligned(gpu):
    """Kernels are compiled for their alignment."""
    layer = nn.SymmetricConv2d(8, 8, 3, padding=1, symmetry="h").bfloat16()
    with tritonsym.path("implicit_gemm"), torch.no_grad():
        for at, count in ((0, 1), (1, 2), (0, 2), (1, 2)):
            x = torch.randn(2 * 6 * 4 * 8 + 1).bfloat16()[at:][: 2 * 6 * 4 * 8].view(2, 6, 4, 8).movedim(-1, 1)
            layer(x)
            assert len(gpu.compiled) == count
    assert len(gpu.launched) == 4


def test_errors_of_kernels(gpu, monkeypatch):
    layer, x = nn.SymmetricConv2d(8, 8, 3, padding=1, symmetry="h"), torch.randn(1, 8, 4, 4)
    for error, expected in ((ValueError("no"), RuntimeError), (torch.OutOfMemoryError("no"), torch.OutOfMemoryError)):
        monkeypatch.setattr(launch, "_forward", lambda *_, error=error: (_ for _ in ()).throw(error))
        with tritonsym.path("shift"), pytest.raises(expected) as caught:
            layer(x)
        assert caught.type is expected
    monkeypatch.undo()
    text = "the kernels of path 'shift' with tiles [3, 4, 5] failed for torch.float32 tensors (1, 8, 4, 4) on cpu: no"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        monkeypatch.setattr(launch, "runs_on", lambda device: True)
        with launch.launching("shift", [3, 4, 5], x):
            raise ValueError("no")

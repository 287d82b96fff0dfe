"""The shift path on the CPU: its sums, what it multiplies, what it keeps, and where `auto` takes it."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import tritonsym
import tritonsym.nn as tnn
from tritonsym import plan, shift

LAYERS = {
    "hv": lambda: tnn.SymmetricConv2d(6, 8, 3, padding=1, symmetry="hv"),
    "h, rows inside": lambda: tnn.SymmetricConv2d(6, 8, (3, 5), padding=(1, 2), stride=(2, 1), symmetry="h"),
    "v, columns inside": lambda: tnn.SymmetricConv2d(6, 8, 3, padding=(2, 0), dilation=(1, 2), symmetry="v"),
    "mixed": lambda: tnn.SymmetricConv2d(6, 16, 3, padding="same", groups=2, symmetry={"h": 4, "d4": 0, "hv": 8}),
    "even kernel": lambda: tnn.SymmetricConv2d(6, 8, 4, padding="same", symmetry="d4"),
    "stride": lambda: tnn.SymmetricConv2d(6, 8, 3, padding=1, stride=(2, 3), symmetry="hv"),
    "odd": lambda: tnn.TiedConv2d(6, 8, 3, padding=1, symmetry="hv", parity={"h": "odd"}, free=2),
    "radial": lambda: tnn.TiedConv2d(6, 8, 5, padding=2, symmetry="radial", groups=2),
    "transposed": lambda: tnn.SymmetricConvTranspose2d(6, 8, 4, stride=2, padding=1, symmetry="hv"),
    "transposed, rows inside": lambda: tnn.SymmetricConvTranspose2d(6, 8, 3, stride=3, output_padding=1, symmetry="h"),
    "pool": lambda: tnn.OrbitPoolConv2d(6, 4, 3, padding=1, symmetry="c4"),
}


@pytest.fixture
def bounds(monkeypatch):
    def set_to(chunk_bytes, positions):
        monkeypatch.setattr(shift, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(shift, "INSIDE", (positions, positions))
        plan.forget()

    yield set_to
    monkeypatch.undo()
    plan.forget()


def results(layer, x):
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("positions", [0, 1 << 60])
@pytest.mark.parametrize("chunk_bytes", [1 << 8, 1 << 12, 1 << 30])
@pytest.mark.parametrize("name", LAYERS)
def test_bands_of_rows_chunks_of_images_and_axes_inside(name, chunk_bytes, positions, bounds):
    """All ways through a layer give the same results, channels-last or not."""
    layer = LAYERS[name]()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(5, 6, 13, 9).to(memory_format=memory_format).requires_grad_()
        with tritonsym.path("reference"):
            expected = results(layer, x)
        bounds(chunk_bytes, positions)
        with tritonsym.path("shift"):
            for got, right in zip(results(layer, x), expected, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(13, 14), (16, 8)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1 << 8, 1 << 30])
@pytest.mark.parametrize("name", LAYERS)
def test_products_by_convolutions(name, chunk_bytes, sizes, bounds, monkeypatch):
    """As on CPUs where MKL is slow; also with channels a multiple of 512 bytes apart."""
    layer = LAYERS[name]()
    bounds(chunk_bytes, 1 << 60)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 6, *sizes).to(memory_format=memory_format).requires_grad_()
        with tritonsym.path("reference"):
            expected = results(layer, x)
        monkeypatch.setattr(shift, "mkl_is_slow", lambda: True)
        monkeypatch.setattr(shift, "CONVOLVED", 0)
        with tritonsym.path("shift"):
            torch.testing.assert_close(results(layer, x), expected, rtol=1e-4, atol=1e-4)


def test_rows_are_set_apart_where_they_would_evict_one_another():
    x = torch.randn(2, 3, 16, 8)
    assert shift.apart(x.flatten(2)).stride() == (3 * 144, 144, 1) and torch.equal(shift.apart(x), x)
    for other in (x, x[:, :, 2:10], x[..., ::2], x.to(memory_format=torch.channels_last)):
        y = shift.channels_last(other)
        assert torch.equal(y, other) and y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("is_slow", [False, True])
def test_large_products_of_float32_are_convolutions_if_mkl_is_slow(is_slow, monkeypatch):
    monkeypatch.setattr(shift, "mkl_is_slow", lambda: is_slow)
    layer = tnn.SymmetricConv2d(64, 64, 3, padding=1, symmetry="hv")
    found = []
    for size, dtype in ((28, torch.float32), (4, torch.float32), (28, torch.bfloat16)):
        x = torch.randn(8, 64, size, size, dtype=dtype).to(memory_format=torch.channels_last)
        with torch.no_grad(), tritonsym.path("shift"), FlopCounterMode(display=False) as counter:
            layer.to(dtype)(x)
        found.append(torch.ops.aten.convolution in counter.get_flop_counts()["Global"])
    assert found == [is_slow, False, False]


def test_axes_that_no_image_moves_stay_inside_the_product():
    def slots(layer, inner):
        (part, *_) = shift.parts(layer.spec, inner)
        return len(part.order), len(part.order[0])

    h = tnn.SymmetricConv2d(4, 8, (3, 5), symmetry="h")
    assert slots(h, True) == (5, 3) and slots(h, False) == (15, 1)
    assert slots(tnn.SymmetricConv3d(4, 8, 3, symmetry="h"), True) == (3, 9)
    assert slots(tnn.SymmetricConv3d(4, 8, 3, symmetry="hv"), True) == (9, 3)
    assert slots(tnn.TiedConv2d(4, 8, 3, symmetry="h"), True) == (2, 3)
    assert slots(tnn.SymmetricConv2d(4, 8, 3, symmetry="c2"), True) == (9, 1)
    assert slots(tnn.SymmetricConv2d(4, 8, 3, symmetry=None), False) == (1, 9), "free filters are plain convolutions"


def test_index_tables_are_shared_by_equal_layers_and_serve_smaller_batches(monkeypatch):
    monkeypatch.setattr(shift, "tables", shift._Tables())
    made = []
    make = shift.make_sums
    monkeypatch.setattr(shift, "make_sums", lambda *args: made.append(args) or make(*args))
    with tritonsym.path("shift"), torch.no_grad():
        for channels, batch in ((8, 4), (16, 4), (8, 3), (24, 1)):
            tnn.SymmetricConv2d(channels, channels, 3, padding=1, symmetry="hv")(torch.randn(batch, channels, 9, 7))
        assert len(made) == 1
        tnn.SymmetricConv2d(8, 8, 3, padding=1, symmetry="hv")(torch.randn(5, 8, 9, 7))  # a larger batch
        tnn.SymmetricConv2d(8, 8, 3, padding=1, symmetry="c4")(torch.randn(4, 8, 9, 7))  # other sums
    assert len(made) == 3 and len(shift.tables.kept) == 2
    (sums, *_) = shift.tables.kept.values()
    assert sums.forward.index.dtype == sums.forward.offsets.dtype == torch.int32


@pytest.mark.slow
def test_a_thousand_image_sizes_do_not_fill_memory(monkeypatch):
    monkeypatch.setattr(shift, "tables", shift._Tables())
    monkeypatch.setattr(shift, "TABLE_BYTES", 1 << 22)
    layer = tnn.SymmetricConv2d(2, 4, 3, padding=1, symmetry="hv")
    with tritonsym.path("shift"), torch.no_grad():
        for size in range(1000):
            layer(torch.randn(1, 2, 3 + size % 40, 3 + size // 40))
            kept = shift.tables.kept.values()
            assert shift.tables.nbytes == sum(sums.nbytes for sums in kept) <= shift.TABLE_BYTES
        assert 10 < len(kept) < 1000
        monkeypatch.setattr(shift, "TABLE_BYTES", 0)
        x = torch.randn(1, 2, 50, 50)
        torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-4, atol=1e-5)
        assert not shift.tables.kept and not shift.tables.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetry", ["h", "d4"])
def test_every_dtype_of_the_bags_rounds_as_torch_does(symmetry, dtype):
    layer = tnn.SymmetricConv2d(64, 64, 3, padding=1, symmetry=symmetry, dtype=dtype)
    x = torch.randn(2, 64, 17, 15, dtype=dtype).to(memory_format=torch.channels_last)
    with tritonsym.path("shift"):
        tritonsym.testing.assert_matches_reference(layer, x)


def test_one_multiply_add_per_position_and_stored_weight():
    """As counted in the products that are called."""
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


def test_auto_takes_shifts_only_where_the_rule_says_that_they_win():
    def planned(channels=128, size=28, dtype=torch.float32):
        layer = tnn.SymmetricConv2d(channels, channels, 3, padding=1, symmetry="hv", device="meta", dtype=dtype)
        return tritonsym.explain(layer, torch.empty(8, channels, size, size, device="meta", dtype=dtype))

    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            assert planned().path == planned(channels=1280, size=16).path == "shift"
            assert planned(channels=8).path == "reference" and "cost" in planned(channels=8).why
            assert planned(size=1).path == "reference"
            assert planned(dtype=torch.float64).path == "reference" and "float64" in planned(dtype=torch.float64).why


def test_auto_sees_the_dtype_of_autocast():
    layer, x = tritonsym.nn.SymmetricConv2d(256, 256, 3, symmetry="hv"), torch.empty(8, 256, 28, 28)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tritonsym.explain(layer, x).problem.dtype == "bfloat16"


class Allocated(TorchDispatchMode):
    """Counts the bytes of storages that torch ops make, while they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage()).data_ptr() not in self.known | given:
                self.known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return result

    def _freed(self, pointer, count):
        self.known.discard(pointer)
        self.now -= count


@pytest.mark.parametrize("kind", ["SymmetricConv2d", "TiedConv2d"])
def test_training_needs_no_more_memory_than_the_dense_layer_and_the_scratch(kind, monkeypatch):
    monkeypatch.setattr(shift, "CHUNK_BYTES", 1 << 19)

    def peak(layer):
        x = torch.randn(32, 32, 24, 24, requires_grad=True)
        with Allocated() as allocated:
            layer(x).backward(torch.ones(()).expand(32, 64, 24, 24))
        return allocated.peak

    layer = getattr(tritonsym.nn, kind)(32, 64, 3, padding=1, symmetry="hv")
    with tritonsym.path("shift"):
        peak(layer)  # makes the index tables, which are kept
        ours = peak(layer)
    dense = peak(layer.to_dense())
    assert dense > 6 * shift.CHUNK_BYTES  # or the comparison says nothing
    assert ours <= dense + 2 * shift.CHUNK_BYTES, "more than z and y of a chunk"


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("symmetry, channels", [("d4", 640), ("h", 320)])
def test_long_sums_round_as_torch_does(symmetry, channels, last):
    """Sums over many channels, rows and positions, in output and gradients."""
    torch.manual_seed(0)
    layer = tritonsym.nn.SymmetricConv2d(channels, channels, 3, padding=1, symmetry=symmetry)
    x = torch.randn(1, channels, 19, 19)
    with tritonsym.path("shift"):
        tritonsym.testing.assert_matches_reference(layer, x.to(memory_format=torch.channels_last) if last else x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetry", ["h", "c4", "d4"])
def test_nan_and_infinity_reach_what_they_reach_in_the_dense_layer(symmetry, value):
    layer = tritonsym.nn.SymmetricConv2d(3, 8, 3, padding=1, stride=2, symmetry=symmetry)
    x = torch.randn(2, 3, 9, 8)
    x[1, 2, 4, 3] = value
    with tritonsym.path("shift"), torch.no_grad():
        torch.testing.assert_close(layer(x), layer.to_dense()(x), equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_more_than_31_bits_of_elements():
    """Takes 8 GB and minutes: ``pytest -m slow``."""
    layer = tritonsym.nn.TiedConv2d(1, 1, (1, 2), symmetry="h", dtype=torch.bfloat16)
    image = torch.randn(1, 1, 16384, 8192).bfloat16()
    x = image.expand(17, -1, -1, -1)
    assert x.numel() > 1 << 31
    with tritonsym.path("shift"), torch.no_grad():
        assert torch.equal(layer(x)[16:], layer(image))


def test_taps_forced_to_zero_do_not_see_other_weights():
    layer = tnn.TiedConv2d(4, 2, 3, symmetry="h", parity="odd")
    torch.nn.init.constant_(layer.weight, torch.nan)
    dense = layer.expanded_weight()
    assert (dense[..., 1] == 0).all() and dense[..., ::2].isnan().all()


def test_the_memory_format_is_that_of_torch():
    layer = tnn.SymmetricConv2d(64, 64, 3, padding=1, symmetry="hv")
    x, last = torch.randn(4, 64, 28, 28), torch.channels_last
    for weight_format in (torch.contiguous_format, last):
        layer.to(memory_format=weight_format)
        dense = layer.to_dense().to(memory_format=weight_format)
        for path in ("shift", "reference"):
            for given in (x, x.to(memory_format=last)):
                with tritonsym.path(path):
                    y = layer(given)
                assert y.stride() == F.conv2d(given, dense.weight, padding=1).stride()


def test_a_whole_model_is_explained(capsys):
    model = torch.nn.Sequential(
        tnn.SymmetricConv2d(3, 8, 3, symmetry="h"), torch.nn.BatchNorm2d(8), tnn.TiedConv2d(8, 8, 3, symmetry="d4")
    )
    model.append(model[2])
    x = torch.randn(2, 3, 12, 12)
    found = tritonsym.explain(model, x)
    assert [name for name, _ in found] == ["0", "2", "2"] and model[1].num_batches_tracked == 0
    assert found[0][1] == tritonsym.explain(model[0], x)
    assert found.flops == sum(layer.flops for _, layer in found) and len(found) == 3
    lines = str(found).splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["layer", "kind", "path"] and lines[-1].startswith("total of 3")
    with tritonsym.path("shift"):
        assert {layer.path for _, layer in tritonsym.explain(model, x)} == {"shift"}
    assert {layer.problem.target for _, layer in tritonsym.explain(model, x, "sm_90")} == {"sm_90"}


def test_bags_read_whole_rows(monkeypatch):
    """An expanded gradient, as of a sum, is copied first: torch adds up rows of other strides slowly."""
    add, tables = torch.embedding_bag, []
    monkeypatch.setattr(torch, "embedding_bag", lambda table, *args: tables.append(table) or add(table, *args))
    layer, x = tnn.SymmetricConv2d(8, 8, 3, padding=1, symmetry="d4"), torch.randn(2, 8, 6, 6)
    with tritonsym.path("shift"):
        layer(x.to(memory_format=torch.channels_last)).sum().backward()
    assert len(tables) == 2 and all(table.is_contiguous() for table in tables)


def test_float16_overflows_where_dense_layers_do():
    """Products of 80000 that cancel, and sums of four gradients of 30000."""
    layer = tnn.SymmetricConv2d(4, 8, 3, symmetry="hv", bias=False, dtype=torch.float16)
    for of_x, weights, of_dy in ((200, (-100, 100, 0), 1), (1 / 32, (1 / 128,) * 3, 30000)):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weights)[:, None].expand_as(layer.weight))
        x = torch.full((1, 4, 5, 6), of_x, dtype=torch.float16, requires_grad=True)
        with tritonsym.path("shift"):
            y = layer(x)
            dx, dw = torch.autograd.grad(y, [x, layer.weight], torch.full_like(y, of_dy))
        assert torch.equal(y, torch.full_like(y, 36 * of_x * weights[2]))
        assert dx.max() == 36 * of_dy * 2 * weights[2] if weights[2] else dx.isfinite().all()
        assert torch.equal(dw, torch.full_like(dw, 48 * of_x * of_dy))

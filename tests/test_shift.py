"""The shift path in torch ops: its additions, what it multiplies, what it keeps, and where `auto` takes it."""

import weakref

import pytest
import torch
from interpret import CASES, build, lay_out
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import tritonsym
from tritonsym import convolution, launch, shift

ADDITIONS = {
    name: shift.schedule(build(**{**conv, "pool": None}), tuple(sizes))[1]
    for name, (conv, _, _, sizes) in CASES.items()
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_adjoint(name):
    plan, torch_dtype = ADDITIONS[name], torch.float64

    def draw(sides):
        return [torch.randn(2, 1, channels, *sizes, dtype=torch_dtype) for channels, sizes in sides]

    torch.manual_seed(0)
    x, y = draw(plan.sources), draw(plan.targets)

    def dot(a, b):
        return sum((s * t).sum() for s, t in zip(a, b, strict=True))

    torch.testing.assert_close(dot(shift._in_place(plan, x), y), dot(x, shift._in_place(plan.adjoint, y)))


@pytest.mark.parametrize("name", [name for name, plan in ADDITIONS.items() if not shift.has_steps(plan)])
def test_what_inductor_sees_equals_what_eager_does(name):
    plan = ADDITIONS[name]
    torch.manual_seed(0)
    x = [torch.randn(2, 2, channels, *sizes, dtype=torch.float64) for channels, sizes in plan.sources]
    for fused, eager in zip(shift._fused(plan, x), shift._in_place(plan, x), strict=True):
        torch.testing.assert_close(fused, eager)


def test_one_multiply_add_per_position_and_stored_weight():
    """Against the GEMMs that are really called."""
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


def test_auto_takes_shifts_only_where_the_fit_says_that_they_win(monkeypatch):
    def planned(channels=256, size=28, dtype=torch.float32):
        layer = tritonsym.nn.SymmetricConv2d(
            channels, channels, 3, padding=1, symmetry="hv", device="meta", dtype=dtype
        )
        return tritonsym.explain(layer, torch.empty(8, channels, size, size, device="meta", dtype=dtype)).path

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert planned() == planned(channels=1280, size=16) == "shift"
    assert planned(channels=64) == "reference"  # additions cost too much
    assert planned(size=4) == "shift"  # expanding the weight in every step costs more
    with torch.no_grad():
        assert planned() == "shift"
        assert planned(channels=64) == planned(size=4) == "reference"  # here it is kept
        assert planned(dtype=torch.float64) == planned(dtype=torch.bfloat16) == "reference"
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert planned() == "reference"


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
    monkeypatch.setattr(shift, "SCRATCH_BYTES", 1 << 20)

    def peak(layer):
        x = torch.randn(32, 32, 24, 24, requires_grad=True)
        with Allocated() as allocated:
            layer(x).backward(torch.ones(()).expand(32, 64, 24, 24))
        return allocated.peak

    layer = getattr(tritonsym.nn, kind)(32, 64, 3, padding=1, symmetry="hv")
    with tritonsym.path("shift"):
        ours = peak(layer)
    dense = peak(layer.to_dense())
    assert dense > 6 * shift.SCRATCH_BYTES  # else the comparison says nothing
    assert ours <= dense + shift.SCRATCH_BYTES


@pytest.mark.parametrize("layout", ["first", "last", "sliced", "expanded"])
def test_the_backward_kernels_copy_no_gradient(layout, monkeypatch):
    """Of any strides: they read dy as it lies, and dx is written where it belongs."""
    kernels, read = pytest.importorskip("tritonsym.kernels.shift"), []
    monkeypatch.setattr(kernels, "add", lambda source, *_, **options: read.append(source))
    conv, shape = build(orbits="hv", filters=64), (2, 64, 24, 24)
    dy = torch.ones((), dtype=torch.bfloat16).expand(shape) if layout == "expanded" else torch.ones(shape).bfloat16()
    dy = lay_out(dy, layout) if layout in ("last", "sliced") else dy
    x = torch.empty(2, 32, 24, 24, dtype=torch.bfloat16)
    x = lay_out(x, "last") if layout == "last" else x
    rows, dx = torch.empty(1, conv.rows, 32, dtype=torch.bfloat16), torch.empty_like(x)
    with Allocated() as allocated:
        launch._shift_backward(dy, x, rows, None, conv, [64, 32, 4] * 2, dx, None)
    assert read[0].stride()[-2:] == dy.stride()[-2:] and read[0].data_ptr() == dy.data_ptr()
    d = 2 * conv.rows * 24 * 24 * 2
    assert allocated.peak == d, "no copy of dy or dx"


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
    """8 GB, minutes: ``pytest -m slow``."""
    layer = tritonsym.nn.TiedConv2d(1, 1, (1, 2), symmetry="h", dtype=torch.bfloat16)
    image = torch.randn(1, 1, 16384, 8192).bfloat16()
    x = image.expand(17, -1, -1, -1)
    assert x.numel() > 1 << 31
    with tritonsym.path("shift"), torch.no_grad():
        assert torch.equal(layer(x)[16:], layer(image))


def test_products_stay_float32_under_autocast():
    a, b = torch.randn(2, 3, 40).bfloat16(), torch.randn(2, 40, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = launch._products(a, b)
    torch.testing.assert_close(found, torch.bmm(a.float(), b.float()), rtol=0, atol=0)


def test_taps_forced_to_zero_do_not_see_other_weights():
    conv = build(ties=["h", "h"], filters=2, kernel=[3, 3])
    rows = torch.full((1, conv.rows, 4), torch.nan)
    dense = convolution.expand_rows(rows, conv)
    assert (dense[..., 1] == 0).all() and dense[..., ::2].isnan().all()

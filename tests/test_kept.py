"""The expanded weight that is kept for inference: never a stale one, and gone where it is not wanted."""

import copy
import gc
import weakref

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import tritonsym
from tritonsym import calls, convolution


def load(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def step(layer):
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


@torch.no_grad()
def in_place(layer):
    layer.weight.mul_(2)


def one_value(layer):
    layer.weight.data.view(-1)[-1] += 1  # the version counter does not notice


def one_value_in_place(layer):
    layer.weight.data[-1, -1, -1, -1] += 1


def through_numpy(layer):
    layer.weight.detach().numpy()[:] *= 2


CHANGES = {
    "load_state_dict": load,
    "assign": lambda layer: layer.load_state_dict(
        {name: 2 * value for name, value in layer.state_dict().items()}, assign=True
    ),
    "optimizer": step,
    "in place": in_place,
    ".data": one_value,
    "numpy": through_numpy,
    "to": lambda layer: layer.to(torch.float64),
    "to and back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "new parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight.detach() * 2)),
}


def assert_seen(layer, x, change):
    with torch.inference_mode():
        layer(x)
        layer(x)
    change(layer)
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        x = x.to(layer.weight.dtype)
        assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(convolution, change):
    assert_seen(convolution.make(), convolution.input(), change)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_of_a_matrix_are_seen(change):
    assert_seen(tritonsym.nn.SymmetricLinear(7, 7), torch.randn(3, 7), change)


def kept(layer):
    return calls._kept.find(layer.weight)


def forced_shift(layer, x):
    with tritonsym.path("shift"):
        layer(x)


def test_kept_while_values_stay_and_no_longer():
    layer, x = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="hv"), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        layer(x)
        dense = kept(layer)[2]
        layer(x)
        assert kept(layer)[2] is dense  # expanded once
        layer.weight.mul_(2)
        layer(x)
        assert torch.equal(kept(layer)[2], 2 * dense)
    layer(x)  # may be differentiated
    assert kept(layer) is None
    with torch.no_grad():
        layer(x)
    dense = weakref.ref(kept(layer)[2])
    del layer
    gc.collect()
    assert dense() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("channels", [3, 4])
def test_any_storage(channels, offset, dtype):
    """Weights that lie anywhere in a larger tensor, with an odd number of values or zeros of both signs."""
    layer = tritonsym.nn.SymmetricConv2d(channels, 2, 3, symmetry="h", dtype=dtype)
    flat = torch.randn(offset + 9 * channels, dtype=dtype)
    flat[-1] = torch.nan
    layer.weight = torch.nn.Parameter(flat[offset:].view(1, channels, 3, 3))
    x = torch.randn(1, channels, 5, 5, dtype=dtype)
    with torch.no_grad():
        layer(x)
        for i in range(offset, len(flat) - 1):
            dense = kept(layer)[2]
            layer(x)
            assert kept(layer)[2] is dense
            flat[i] = -0.0
            layer(x)
            torch.testing.assert_close(kept(layer)[2], layer.expanded_weight(), rtol=0, atol=0, equal_nan=True)
            flat[i] = 0.0
            layer(x)
            assert torch.equal(kept(layer)[2].signbit(), layer.expanded_weight().signbit())


@pytest.mark.parametrize("shape, strides", [((2, 4, 3, 3), (72, 18, 6, 2)), ((2, 4, 3, 3), (0, 9, 3, 1))])
def test_any_strides(shape, strides):
    """Weights with gaps, or whose filters are one and the same."""
    layer = tritonsym.nn.SymmetricConv2d(4, 4, 3, symmetry="h")
    layer.weight = torch.nn.Parameter(torch.randn(150).as_strided(shape, strides))
    assert_seen(layer, torch.randn(1, 4, 5, 5), one_value_in_place)


@torch.no_grad()
def test_a_write_while_the_weight_is_expanded(monkeypatch):
    """By another thread, say: what is kept is what the values were, or nothing is taken for it."""
    layer, x = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="hv"), torch.randn(1, 4, 5, 5)
    expand = convolution.expand

    def disturbed(*args):
        dense = expand(*args)
        one_value_in_place(layer)
        return dense

    monkeypatch.setattr(convolution, "expand", disturbed)
    layer(x)
    monkeypatch.undo()
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


@torch.no_grad()
def test_freed_storage_is_not_read():
    layer, x = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="h"), torch.randn(1, 4, 5, 5)
    layer.weight = torch.nn.Parameter(torch.randn(2000)[64 : 64 + 144].view(4, 4, 3, 3))
    layer(x)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        layer(x)


@torch.no_grad()
def test_bits_of_the_tensor_itself():
    layer, x = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="h"), torch.randn(1, 4, 5, 5)
    layer(x)
    layer.weight.data = torch._neg_view(layer.weight.data)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    layer, z = tritonsym.nn.SymmetricLinear(5, 5, dtype=torch.complex64), torch.randn(3, 5, dtype=torch.complex64)
    layer(z)
    layer.weight.data = layer.weight.data.conj()
    torch.testing.assert_close(layer(z), layer.to_dense()(z))


@torch.no_grad()
@pytest.mark.parametrize("unused", [lambda layer, x: layer.to(torch.bfloat16)(x.bfloat16()), forced_shift])
def test_dropped_where_it_is_not_used(unused):
    layer, x = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="h"), torch.randn(1, 4, 5, 5)
    layer(x)
    assert kept(layer)
    unused(layer, x)
    assert kept(layer) is None


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_parameters_can_be_swapped(swapping, convolution):
    layer, x = convolution.make(), convolution.input()
    with torch.no_grad():
        layer(x)
    state = {name: value.double() for name, value in layer.state_dict().items()}
    layer.double()
    with torch.no_grad():
        layer(x.double())
    layer.load_state_dict(state)


def test_a_matrix_can_be_swapped(swapping):
    layer = tritonsym.nn.SymmetricLinear(5, 5)
    with torch.no_grad():
        layer(torch.randn(2, 5))
    layer.load_state_dict(layer.double().state_dict())


def test_weights_that_are_channels_last():
    layer = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="h").to(memory_format=torch.channels_last)
    assert not layer.weight.is_contiguous()
    assert_seen(layer, torch.randn(2, 4, 5, 5), one_value_in_place)


def test_free_filters_count_too():
    layer, x = tritonsym.nn.TiedConv2d(4, 8, 3, symmetry="hv", free=2), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        before = layer(x)
        layer.free_weight.mul_(2)
        assert not torch.equal(layer(x), before)


def test_a_weight_kept_in_inference_mode_serves_gradients_of_the_input():
    layer, x = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="hv").requires_grad_(False), torch.randn(2, 4, 6, 6)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_nothing_is_kept_of_other_tensors_and_by_compiled_code():
    weight, x = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 6, 6)
    tritonsym.functional.symmetric_conv2d(x, weight, symmetry="hv")
    assert calls._kept.find(weight) is None
    layer = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="hv")
    with torch.no_grad():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.func.vmap(layer)(x[None])
    assert kept(layer) is None


@torch.no_grad()
def test_reductions_of_one_weight():
    """'sum' and 'mean' are the same convolution of other rows."""
    weight, x = torch.nn.Parameter(torch.randn(4, 2, 3, 3)), torch.randn(1, 2, 6, 6)
    for reduce in ("sum", "mean", "sum", "max"):
        y = tritonsym.functional.orbit_pool_conv2d(x, weight, symmetry="hv", reduce=reduce)
        expected = tritonsym.functional.orbit_pool_conv2d(x, weight.detach(), symmetry="hv", reduce=reduce)
        assert torch.equal(y, expected), reduce


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

#: Layers, and the shape of an input, of which oneDNN takes weights ordered beforehand.
PACKED = {
    "plain": (lambda: tritonsym.nn.SymmetricConv2d(8, 16, 3, padding=1, symmetry="hv"), (2, 8, 9, 7)),
    "stride, dilation, no bias": (
        lambda: tritonsym.nn.SymmetricConv2d(5, 6, 3, stride=2, dilation=2, bias=False, symmetry="h"),
        (3, 5, 11, 12),
    ),
    "groups": (lambda: tritonsym.nn.SymmetricConv2d(6, 18, 3, groups=3, symmetry={"hv": 12, "h": 6}), (2, 6, 7, 7)),
    "depthwise": (lambda: tritonsym.nn.SymmetricConv2d(6, 12, 3, groups=6, symmetry="v"), (2, 6, 7, 8)),
    "3-D": (lambda: tritonsym.nn.SymmetricConv3d(4, 8, 3, padding=1, symmetry="hvz"), (2, 4, 5, 6, 7)),
    "odd ties and free filters": (
        lambda: tritonsym.nn.TiedConv2d(4, 8, 3, symmetry="h", parity="odd", free=3, activation="relu"),
        (2, 4, 6, 6),
    ),
    "pooled": (lambda: tritonsym.nn.OrbitPoolConv2d(4, 6, 3, symmetry="d4", reduce="max"), (2, 4, 8, 8)),
    "same, unevenly padded": (
        lambda: tritonsym.nn.SymmetricConv2d(4, 8, 2, padding="same", symmetry="h"),
        (2, 4, 5, 6),
    ),
}


@pytest.mark.parametrize("make, shape", PACKED.values(), ids=PACKED)
def test_packed_by_onednn(make, shape):
    layer = make()
    for sizes in (shape, (1, *shape[1:-1], shape[-1] + 4), shape):  # packed for the first, used for all
        x = torch.randn(sizes).to(memory_format=LAST[len(shape)])
        for _ in range(2):
            with torch.inference_mode():
                y = layer(x)
            assert kept(layer if layer.weight.shape[0] else layer.free_weight)[2].is_mkldnn
            torch.testing.assert_close(y, layer.to_dense()(x))
            assert y.is_contiguous(memory_format=LAST[len(shape)])
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))


def is_packed(layer, x):
    layer(x)
    return kept(layer) is not None and kept(layer)[2].is_mkldnn


@torch.no_grad()
def test_packed_only_where_it_can_be():
    layer, x = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="h"), torch.randn(2, 4, 6, 6)
    last = x.to(memory_format=torch.channels_last)
    assert is_packed(layer, last) and not is_packed(layer, x) and is_packed(layer, last)
    assert not is_packed(layer, torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)[:, :4])
    assert not is_packed(layer, last[:0])
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_packed(layer, last)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_packed(layer, last)
    assert not is_packed(copy.deepcopy(layer).double(), last.double())
    transposed = tritonsym.nn.SymmetricConvTranspose2d(4, 8, 3, symmetry="h")
    assert not is_packed(transposed, last)


def test_packed_weights_have_no_gradients():
    layer = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="h").requires_grad_(False)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    assert is_packed(layer, x)
    assert not is_packed(layer, x.requires_grad_())
    layer(x).sum().backward()
    assert x.grad is not None
    assert is_packed(layer, x.detach())


@torch.no_grad()
def test_counters_see_packed_convolutions():
    layer = tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="h")
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    assert is_packed(layer, x)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 16 * 8 * 4 * 9


@torch.no_grad()
@pytest.mark.parametrize("bias", [lambda: torch.randn(32)[::2], lambda: torch.randn(1).expand(16)], ids=["step", "one"])
def test_packed_convolutions_take_any_bias(bias):
    layer = tritonsym.nn.SymmetricConv2d(8, 16, 3, symmetry="hv")
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    assert is_packed(layer, x)
    layer.bias = torch.nn.Parameter(bias())
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


@torch.no_grad()
def test_weights_that_become_subclasses():
    layer, x = tritonsym.nn.TiedConv2d(8, 16, 3, symmetry="hv", free=4), torch.randn(2, 8, 9, 7)
    expected = layer(x)
    part = layer.free_weight.detach()
    layer.free_weight = torch.nn.Parameter(TwoTensor(part, part.clone()))
    torch.testing.assert_close(layer(x).a, expected)

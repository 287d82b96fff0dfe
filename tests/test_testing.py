"""The tools users check their layers with: they accept right layers, refuse broken ones, and leave no trace."""

import contextlib
import copy
import random
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import tritonsym
import tritonsym.nn as tnn
from tritonsym import reference, shift, testing
from tritonsym.testing import assert_equivariant, assert_matches_reference, assert_symmetric


def conv(name="SymmetricConv2d", dtype=None, **options):
    torch.manual_seed(0)
    options = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1, **options}
    return getattr(tnn, name)(**options, dtype=dtype)


def some_input(*shape, dtype=None):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=dtype)


def planar(dtype=None):
    return some_input(2, 4, 7, 9, dtype=dtype)


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def break_forward(layer, wrong):
    """Let this layer return wrong(what it should return)."""
    layer.forward = lambda *args: wrong(type(layer).forward(layer, *args))
    return layer


def nudge(t, ulps=1, index=0):
    """t with one value, by its flat index, moved by a few representable numbers."""
    flat = t.flatten().clone()
    for _ in range(ulps):
        flat[index] = torch.nextafter(flat[index], torch.tensor(torch.inf, dtype=t.dtype))
    return flat.view(t.shape)


# --- assert_matches_reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_right_layers_match(any_layer, dtype):
    assert_matches_reference(any_layer.make(dtype=dtype), any_layer.input(batch=8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["reference", "shift"])
def test_low_precision_matches(dtype, path):
    with tritonsym.path(path):
        assert_matches_reference(conv(symmetry="d4", dtype=dtype), planar(dtype))


def test_complex_matches(linear_layer):
    layer = linear_layer.but(activation="tanh") if linear_layer.options.get("activation") else linear_layer
    assert_matches_reference(layer.make(dtype=torch.complex64), layer.input(dtype=torch.complex64))


GEOMETRIES = [
    {"stride": 2, "dilation": 2, "groups": 2, "output_padding": 1},
    {"padding": 2, "dilation": 3, "output_padding": 2, "bias": False},
    {"kernel_size": 2, "stride": 3, "padding": 0, "activation": "tanh", "groups": 4},
    {"padding": "same", "kernel_size": 4, "dilation": 2},
    {"padding_mode": "circular", "padding": 2},
    {"padding_mode": "reflect", "kernel_size": 5, "padding": 2, "stride": 2},
]


@pytest.mark.parametrize(("ndim", "transposed", "geometry"), list(product((1, 2, 3), (False, True), GEOMETRIES)))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_products_of_the_unfolded_input_are_the_convolution(ndim, transposed, geometry):
    if transposed and (geometry.get("padding") == "same" or "padding_mode" in geometry):
        pytest.skip("torch has no such transposed convolution")
    options = {name: value for name, value in geometry.items() if transposed or name != "output_padding"}
    layer = conv(f"SymmetricConv{'Transpose' * transposed}{ndim}d", torch.float64, symmetry="h", **options)
    for x in (some_input(2, 4, *(9, 8, 7)[:ndim]).double(), some_input(4, *(9, 8, 7)[:ndim]).double()):
        twins = [testing._dense_twin(layer, forwards) for forwards in (testing._DENSE, testing._PRODUCTS)]
        dense, products = (testing._results(twin, [x], gradients=True) for twin in twins)
        for (name, a), (_, b) in zip(dense, products, strict=True):
            torch.testing.assert_close(b, a, msg=name)
            assert name != "output" or a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["SymmetricConv2d", "SymmetricConvTranspose2d", "TiedConv2d"])
def test_the_shift_path_is_as_right_as_the_worse_of_convolution_and_products(name, dtype):
    layer = conv(name, dtype, symmetry="hv", in_channels=16, out_channels=16).to(memory_format=torch.channels_last)
    with tritonsym.path("shift"):
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(4, 16, 28, 28, dtype=dtype).to(memory_format=torch.channels_last)
            assert_matches_reference(layer, x)


#: A relative error of the output that must be found.
SMALL = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 0.1, torch.float16: 0.02}


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_slightly_wrong_output(dtype):
    layer = break_forward(conv(symmetry="hv", dtype=dtype), lambda y: y * (1 + SMALL[dtype]))
    with pytest.raises(
        AssertionError, match=r"output is wrong: max error \S+ > allowed \S+ .* worst at index \(\d, \d"
    ):
        assert_matches_reference(layer, planar(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_layer_can_fail(any_layer, dtype):
    layer = break_forward(any_layer.make(dtype=dtype), lambda y: y * (1 + SMALL[dtype]))
    with pytest.raises(AssertionError, match="output is wrong"):
        assert_matches_reference(layer, any_layer.input(dtype=dtype))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda y: -y, "output is wrong: max error"),
        (lambda y: y.roll(1, -1), "output is wrong: max error"),
        (lambda y: y.bfloat16().float(), "output is wrong: max error"),
        (lambda y: torch.where(y > 1, torch.nan, y), "output is wrong: max error nan"),
        (lambda y: y + 4e-7, "output is wrong: RMS error"),
        (lambda y: y[:, 1:], r"output has shape \(2, 7, 7, 9\), expected \(2, 8, 7, 9\)"),
        (lambda y: y.double(), r"output is torch.float64, expected torch.float32"),
        (lambda y: y.detach(), "gradient of x is wrong"),
        (lambda y: (y, y), "outputs and gradients, expected"),
    ],
)
def test_wrong_output(wrong, message):
    with pytest.raises(AssertionError, match=message):
        assert_matches_reference(break_forward(conv(symmetry="hv"), wrong), planar())


def test_worst_index():
    layer = break_forward(
        conv(symmetry="hv"), lambda y: y.index_put([torch.tensor(i) for i in (1, 2, 3, 4)], y.new_tensor(9.0))
    )
    with pytest.raises(AssertionError, match=r"worst at index \(1, 2, 3, 4\): got 9.0, expected"):
        assert_matches_reference(layer, planar())


@pytest.mark.parametrize("argument, name", list(enumerate(["x", "weight", "bias"])))
def test_scaled_gradient(monkeypatch, argument, name):
    right = reference.conv

    def wrong(*args):
        args = list(args)
        args[argument] = ScaledGradient.apply(args[argument])
        return right(*args)

    monkeypatch.setattr(reference, "conv", wrong)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(AssertionError, match=f"gradient of {name} is wrong"):
            assert_matches_reference(conv(symmetry="hv"), planar())


def test_scaled_gradient_of_a_free_filter_inside_a_model(monkeypatch):
    def wrong(*args):
        dx, (dw, dfree) = right(*args)
        return dx, [dw, 1.01 * dfree]

    right = shift.backward
    monkeypatch.setattr(shift, "backward", wrong)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), conv("TiedConv2d", symmetry="h", free=2))
    with tritonsym.path("shift"), pytest.raises(AssertionError, match=r"gradient of 2\.free_weight is wrong"):
        assert_matches_reference(model, planar())


class Functional(nn.Module):
    def forward(self, x):
        return tritonsym.functional.symmetric_conv2d(x, x.new_ones(2, 4, 3, 3), symmetry="hv")


def test_functions_inside_a_model_are_compared_with_the_reference(monkeypatch):
    with tritonsym.path("shift"):
        assert_matches_reference(Functional(), planar())
        right = shift.fprop
        monkeypatch.setattr(shift, "fprop", lambda *args: 1.01 * right(*args))
        with pytest.raises(AssertionError, match="output is wrong"):
            assert_matches_reference(Functional(), planar())


def test_wrong_tap(monkeypatch):
    fprop, image = shift.fprop, reference.image
    with tritonsym.path("shift"), pytest.raises(AssertionError, match="output is wrong"):
        monkeypatch.setattr(shift, "fprop", lambda x, weights, *rest: fprop(x, [w.roll(1, -1) for w in weights], *rest))
        assert_matches_reference(conv("OrbitPoolConv2d", symmetry="c4"), planar())
    monkeypatch.setattr(reference, "image", lambda w, g: image(w, g).roll(1, -1) if g.turns == 1 else image(w, g))
    for name in ("SymmetricConv2d", "OrbitPoolConv2d"):
        with pytest.raises(AssertionError, match=rf"{name}: expanded_weight\(\) under r90"):
            assert_symmetric(conv(name, symmetry="c4"))


class Perturbed(tnn.SymmetricConv2d):
    """Reports another expanded weight than it computes with."""

    def expanded_weight(self):
        return super().expanded_weight() + torch.eye(3) * 1e-3


def test_subclass_with_another_meaning():
    layer = Perturbed(4, 8, 3, padding=1, symmetry="hv")
    with pytest.raises(AssertionError, match="output is wrong"):
        assert_matches_reference(layer, planar())
    with pytest.raises(AssertionError, match=r"Perturbed: expanded_weight\(\) under id: 24 of 72 values differ"):
        assert_symmetric(layer)


class Recurrent(nn.Module):
    """Several outputs, an integer input, an argument that is no tensor."""

    def __init__(self):
        super().__init__()
        self.mix = tnn.GlobalConv1d(4, 3)
        self.memory = nn.LSTM(3, 5, batch_first=True)

    def forward(self, x, index, scale=1.0):
        out, state = self.memory(self.mix(x).mT)
        return {"out": scale * out[:, index], "state": state, "length": index}


@pytest.mark.parametrize(
    "model, inputs",
    [
        (Recurrent, (some_input(2, 4, 6), torch.tensor([0, 3]), 0.5)),
        (lambda: Recurrent().double(), (some_input(2, 4, 6).double(), torch.tensor([0, 3]))),
        (lambda: nn.Sequential(conv(symmetry="h"), nn.BatchNorm2d(8), nn.Dropout(0.4)), (planar(),)),
        (lambda: nn.Sequential(conv(symmetry="h").requires_grad_(False), nn.Conv2d(8, 2, 3)), (planar(),)),
        (lambda: torch.compile(nn.Sequential(conv(symmetry="h"), nn.ReLU()), backend="aot_eager"), (planar(),)),
        (lambda: nn.utils.parametrizations.weight_norm(conv(symmetry="d4")), (planar(),)),
        (lambda: tnn.Symmetrize(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), over="cyclic"), (some_input(6, 4),)),
        (lambda: conv("SymmetricConvTranspose2d", symmetry="h", stride=2), (planar(), [14, 17])),
        (lambda: conv(symmetry="c4"), (planar()[:0],)),
        (lambda: conv(symmetry="c4"), (planar()[0],)),
        (lambda: conv(symmetry="c4"), (planar()[:, :, ::2, 1::3],)),
        (lambda: tnn.GlobalConv1d(4, 3), (some_input(2, 4, 0),)),
    ],
)
def test_models_and_awkward_inputs_match(model, inputs):
    torch.manual_seed(0)
    assert_matches_reference(model(), *inputs)


class Noise(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return self.draw(x)


DRAWS = {
    "randn_like": lambda x: x + torch.randn_like(x),
    "rand": lambda x: x * (torch.rand(x.shape, dtype=x.dtype) < 0.5),
    "normal_": lambda x: x + torch.empty_like(x).normal_(),
    "dropout": lambda x: nn.functional.alpha_dropout(x, training=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_hide_nothing(draw, dtype):
    model = nn.Sequential(conv(symmetry="hv", dtype=dtype), Noise(draw))
    assert_matches_reference(model, planar(dtype))
    break_forward(model[0], lambda y: 1.5 * y)
    with pytest.raises(AssertionError, match="output is wrong"):
        assert_matches_reference(model, planar(dtype))


def test_inputs_that_a_model_changes():
    model = nn.Sequential(nn.ReLU(inplace=True), conv(symmetry="hv"))
    for x in (planar(), planar()[:, :, ::2], planar()[:1].expand(3, -1, -1, -1).contiguous()):
        before = x.clone()
        assert_matches_reference(model, x)
        assert torch.equal(x, before) and x.grad is None

    class Clamps(nn.Module):
        def forward(self, x, index):
            with torch.no_grad():
                x.mul_(2)
            return x[index.clamp_(max=1)]

    model = conv(symmetry="hv")
    for x in (torch._neg_view(planar()), planar()[:, :, :1].expand(-1, -1, 5, -1), planar().mT):
        assert_matches_reference(model, x)
    x, index = planar(), torch.tensor([0, 5])
    assert_matches_reference(Clamps(), x, index)
    assert torch.equal(x, planar()) and index[1] == 5


def test_a_wide_input_of_a_narrow_model():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = conv(symmetry="h")

        def forward(self, x, t):
            return self.inner(x) * t.to(x.dtype)

    assert_matches_reference(Timed(), planar(), torch.tensor(0.5, dtype=torch.float64))


def test_inference_is_compared_too():
    layer = break_forward(conv(symmetry="hv"), lambda y: y if y.requires_grad else 1.01 * y)
    with pytest.raises(AssertionError, match="under no_grad: output is wrong"):
        assert_matches_reference(layer, planar())


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_kernels_of_sums_round_as_one_convolution(reduce):
    options = {"stride": 2, "padding": 1, "dilation": 2, "symmetry": "hvz", "reduce": reduce}
    for seed in range(5):
        torch.manual_seed(seed)
        layer = tnn.OrbitPoolConv3d(4, 16, (2, 3, 4), **options)
        assert_matches_reference(layer, torch.randn(2, 4, 8, 8, 8))


def test_matches_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert_matches_reference(conv("TiedConv2d", symmetry="d4"), planar())


def test_names_an_output_inside_a_structure():
    model = Recurrent()
    broken = lambda out, state: (out, (state[0], 1.01 * state[1]))  # noqa: E731
    model.memory.register_forward_hook(lambda module, args, result: broken(*result) if module is model.memory else None)
    with pytest.raises(AssertionError, match=r"output\['state'\]\[1\] is wrong"):
        assert_matches_reference(model, some_input(2, 4, 6), torch.tensor([0, 3]))


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="inf or NaN in the output"):
        assert_matches_reference(conv(symmetry="h", dtype=torch.float16), 60000 * planar(torch.float16).sign())
    with pytest.raises(ValueError, match="Sequential returned no floating or complex tensor"):
        assert_matches_reference(nn.Sequential(conv(symmetry="h"), ArgMax()), planar())


class ArgMax(nn.Module):
    def forward(self, x):
        return x.argmax(1)


# --- assert_symmetric -------------------------------------------------------------------------------------------------


def test_right_weights_are_symmetric(weighted_layer):
    assert_symmetric(weighted_layer.make())


@pytest.mark.parametrize("index", [1, 2])
def test_one_wrong_bit_in_a_model(weighted_layer, index):
    layer = weighted_layer.make()
    layer.expanded_weight = lambda *args: nudge(type(layer).expanded_weight(layer, *args), index=index)
    model = nn.Sequential(nn.ReLU(), layer)
    with pytest.raises(AssertionError, match=rf"assert_symmetric: {type(layer).__name__} 1: .* values differ"):
        assert_symmetric(model)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "name, options, message",
    [
        ("SymmetricConv2d", {"symmetry": {"h": 4}}, "under id"),
        ("TiedConv2d", {"symmetry": "h", "free": 2}, "free filters"),
        ("SymmetricConv2d", {"symmetry": "h", "share_bias": True}, r"expanded_bias\(\)"),
    ],
)
def test_wrong_free_filter_or_shared_bias(groups, name, options, message):
    layer = conv(name, groups=groups, **options)
    part = "expanded_bias" if "share_bias" in options else "expanded_weight"
    free = {"SymmetricConv2d": 8 // groups // 2 - 1, "TiedConv2d": 8 // groups - 1}[name]
    right = getattr(layer, part)()
    setattr(layer, part, lambda: nudge(right, index=(-1 if part == "expanded_bias" else free * right[0].numel())))
    with pytest.raises(AssertionError, match=message):
        assert_symmetric(layer)


def test_ring_of_another_value():
    """Equal under every flip and turn, but two values in one ring."""
    layer = conv("TiedConv2d", symmetry="radial:9", kernel_size=5, padding=2)
    right = layer.expanded_weight()
    corner = torch.zeros(5, 5)
    corner[::4, ::4] = 1e-3
    layer.expanded_weight = lambda: right + corner
    with pytest.raises(AssertionError, match="rings"):
        assert_symmetric(layer)


def test_wrong_sign():
    layer = conv("TiedConv2d", symmetry="hv", parity="odd")
    layer.odd = "h"
    with pytest.raises(AssertionError, match=r"TiedConv2d: expanded_weight\(\) under v"):
        assert_symmetric(layer)


def test_diverged_weights_are_still_symmetric():
    layer = conv(symmetry="d4")
    nn.init.constant_(layer.weight, torch.nan)
    assert_symmetric(layer)


def test_nothing_symmetric_to_check():
    with pytest.raises(ValueError, match="no tritonsym layer with weights in this Sequential"):
        assert_symmetric(nn.Sequential(nn.Conv2d(2, 2, 3)))


# --- assert_equivariant -----------------------------------------------------------------------------------------------

SHARED = {"share_bias": True}
FREE = {"bias": False}
CIRCULAR = {"kernel_size": 4, "padding": 2, "padding_mode": "circular"}
EQUIVARIANT = [
    ("SymmetricConv1d", {"symmetry": "h", "stride": 2, **SHARED}, (2, 4, 7)),
    ("SymmetricConv2d", {"symmetry": {"h": 4, "d4": 8}, "out_channels": 14, **SHARED}, (2, 4, 7, 9)),
    ("SymmetricConv2d", {"symmetry": "c4", "groups": 2, **CIRCULAR, **SHARED}, (4, 6, 6)),
    ("SymmetricConv2d", {"symmetry": "d4", "padding": "same", "dilation": 2, **FREE}, (2, 4, 8, 5)),
    ("SymmetricConv3d", {"symmetry": "hvz", "padding": 0, **FREE}, (1, 4, 4, 5, 6)),
    ("SymmetricConvTranspose2d", {"symmetry": "d4", "stride": 3, "kernel_size": 2, **SHARED}, (2, 4, 5, 4)),
    ("SymmetricConvTranspose3d", {"symmetry": {"hz": 8}, "out_channels": 10, "groups": 2, **FREE}, (2, 4, 3, 4, 5)),
    ("TiedConv2d", {"symmetry": "hv", "parity": {"h": "odd"}, "free": 2, "groups": 2, **FREE}, (2, 4, 5, 6)),
    ("TiedConv2d", {"symmetry": "d4", "parity": "odd", "kernel_size": 5, **FREE}, (4, 7, 7)),
    ("TiedConv2d", {"symmetry": "radial", "padding_mode": "reflect"}, (2, 4, 5, 7)),
    ("OrbitPoolConv2d", {"symmetry": "d4"}, (2, 4, 5, 7)),
    ("OrbitPoolConv1d", {"symmetry": "h", "reduce": "sum", "groups": 2}, (2, 4, 5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("name, options, shape", EQUIVARIANT)
def test_convolutions_are_equivariant(name, options, shape, activation, dtype):
    assert_equivariant(conv(name, **options, activation=activation, dtype=dtype), some_input(*shape, dtype=dtype))


@pytest.mark.parametrize("name, options, shape", EQUIVARIANT)
def test_shifted_output_is_not(name, options, shape):
    layer = break_forward(conv(name, **options), lambda y: y.roll(1, -1))
    with pytest.raises(AssertionError, match=rf"{name}, g = .*: y\(g x\) is not g y\(x\): error"):
        assert_equivariant(layer, some_input(*shape))


@pytest.mark.parametrize("name, options, shape", [*EQUIVARIANT, ("GlobalConv1d", {}, (2, 4, 6))])
def test_integers_leave_no_room(name, options, shape):
    layer = tnn.GlobalConv1d(4, 3) if name == "GlobalConv1d" else conv(name, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-8, 8, parameter.shape))
    x = torch.randint(-8, 8, shape).float()
    assert_equivariant(layer, x)
    break_forward(layer, lambda y: nudge(y, index=1))
    with pytest.raises(AssertionError, match=r"> allowed 0\.000e\+00"):
        assert_equivariant(layer, x)


def test_swapped_images():
    layer = break_forward(conv(symmetry="hv", **SHARED), lambda y: y[:, [0, 1, 2, 5, 4, 3, 6, 7]])
    with pytest.raises(AssertionError, match="g = "):
        assert_equivariant(layer, planar())


def test_part_of_the_group():
    layer = conv("TiedConv2d", symmetry="d4", parity="odd", kernel_size=5, bias=False)
    assert_equivariant(layer, planar(), symmetry="c2")
    break_forward(layer, lambda y: y * (torch.arange(7) > 2))
    assert_equivariant(layer, planar(), symmetry="v")
    with pytest.raises(AssertionError, match="g = h:"):
        assert_equivariant(layer, planar(), symmetry="h")
    # a half turn is two reflections: the filters are even under it, so a bias is no obstacle
    assert_equivariant(conv("TiedConv2d", symmetry="hv", parity="odd"), planar(), symmetry="c2")


def test_rings_are_checked_under_turns_too():
    layer = break_forward(conv("TiedConv2d", symmetry="radial"), lambda y: y * (torch.arange(7) > 2)[:, None])
    with pytest.raises(AssertionError, match="g = r90:"):
        assert_equivariant(layer, some_input(2, 4, 7, 7))


@pytest.mark.parametrize("reduce", ["max", "min", "mean", "sum", "logsumexp"])
@pytest.mark.parametrize("over", ["swap", "cyclic", "permutations", "flip", ((0, 1, 2, 3), (1, 0, 2, 3))], ids=str)
def test_symmetrize_is_invariant(over, reduce):
    torch.manual_seed(0)
    layer = tnn.Symmetrize(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)), over=over, reduce=reduce)
    assert_equivariant(layer, some_input(3, 4))
    layer.forward = lambda x: layer.inner(x)
    with pytest.raises(AssertionError, match=r"Symmetrize, re-ordered by .* differ, allowed none"):
        assert_equivariant(layer, some_input(3, 4))


def test_global_conv_and_top_k():
    x = some_input(2, 4, 9)
    layer = tnn.GlobalConv1d(4, 3, activation="silu")
    assert_equivariant(layer, x)
    with pytest.raises(AssertionError, match=r"GlobalConv1d, re-ordered by \[8, 7"):
        assert_equivariant(break_forward(layer, lambda y: y + 1e-4 * torch.arange(9)), x)
    assert_equivariant(tnn.TopKPool1d(3), x)
    with pytest.raises(AssertionError, match="TopKPool1d, re-ordered by"):
        layer = tnn.TopKPool1d(9)
        layer.forward = lambda x: x
        assert_equivariant(layer, x)


ONE_SIDED, EVEN = {"stride": 2, "output_padding": 1}, {"kernel_size": 2, "padding": "same"}


@pytest.mark.parametrize(
    "name, options, symmetry, message",
    [
        ("SymmetricConv2d", {"symmetry": "hv"}, None, "biases of their own.*share_bias=True or bias=False"),
        (
            "SymmetricConv2d",
            {"symmetry": "v", "stride": (4, 1), **SHARED},
            None,
            "stride 4 .* leaves 2 positions .* -2",
        ),
        ("SymmetricConv2d", {"symmetry": "c2", "kernel_size": 2, "stride": 3, **SHARED}, None, "leaves 1 positions"),
        ("SymmetricConv2d", {"symmetry": "h", **EVEN, **SHARED}, None, "pads an even kernel"),
        ("SymmetricConv2d", {"symmetry": "c4", "stride": (1, 2), **SHARED}, None, r"stride=\(1, 2\) differs"),
        ("SymmetricConvTranspose2d", {"symmetry": "h", **ONE_SIDED, **SHARED}, None, "output_padding"),
        ("TiedConv2d", {"symmetry": "h", "parity": "odd"}, None, "changes its sign"),
        ("TiedConv2d", {"symmetry": "h", "parity": "odd", "activation": "relu", **FREE}, None, "changes its sign"),
        ("TiedConv2d", {"symmetry": "h", "free": 8}, None, "free filters only"),
        ("SymmetricConv2d", {"symmetry": None}, None, "free filters only"),
        ("SymmetricConv2d", {"symmetry": {"h": 4, "hv": 4}, **SHARED}, "hv", "'h' are not symmetric under v, hv"),
        ("SymmetricConv2d", {"symmetry": "h", **SHARED}, "z", "assert_equivariant: symmetry 'z' flips an axis"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions_that_cannot_be_equivariant(name, options, symmetry, message):
    with pytest.raises(ValueError, match=message):
        assert_equivariant(conv(name, **options), planar(), symmetry)


def test_layers_without_such_a_symmetry():
    with pytest.raises(ValueError, match="symmetry='h' is for convolutions; TopKPool1d has its own"):
        assert_equivariant(tnn.TopKPool1d(1), planar(), "h")
    with pytest.raises(TypeError, match=r"got SymmetricLinear; .* with assert_symmetric"):
        assert_equivariant(tnn.SymmetricLinear(9, 9), planar())
    with pytest.raises(TypeError, match="got Sequential; name the symmetry of a model"):
        assert_equivariant(nn.Sequential(conv(symmetry="h")), planar())


# --- no trace ---------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """State of every kind: buffers that training changes, random numbers, a frozen parameter, gradients."""

    def __init__(self):
        super().__init__()
        self.first = conv(symmetry="hv")
        self.norm = nn.BatchNorm2d(8)
        self.last = conv("TiedConv2d", in_channels=8, symmetry="h", free=2).requires_grad_(False)
        for parameter in self.first.parameters():
            parameter.grad = torch.ones_like(parameter)

    def forward(self, x):
        return self.last(nn.functional.dropout(self.norm(self.first(x)), 0.3, self.training))


def snapshot(module, x):
    return (
        {name: t.clone() for name, t in module.state_dict().items()},
        {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        [(name, m.training, "forward" in vars(m)) for name, m in module.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in module.named_parameters()],
        [id(t) for t in module.buffers()],
        (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),
        (x.detach().clone(), x.requires_grad, x.grad, torch.is_grad_enabled()),
    )


def same(a, b):
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_no_trace(training, fails, monkeypatch):
    if fails:
        right = reference.conv
        monkeypatch.setattr(reference, "conv", lambda *args: right(*args) * 0)
    module = Everything().train(training)
    x = planar()
    before = snapshot(module, x)
    with pytest.raises(AssertionError) if fails else contextlib.nullcontext():
        assert_matches_reference(module, x)
    assert_symmetric(module)
    assert same(before, snapshot(module, x))


def test_no_trace_of_equivariance():
    module = tnn.Symmetrize(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)))
    x = some_input(4, 4).requires_grad_()
    before = snapshot(module, x)
    assert_equivariant(module, x)
    assert same(before, snapshot(module, x))


def test_snapshot_sees_a_trace():
    """The comparison above can fail: it finds what an ordinary training step changes."""
    module, x = Everything(), planar()
    before = snapshot(module, x)
    other = copy.deepcopy(before)
    assert same(before, other)
    module(x).sum().backward()
    after = snapshot(module, x)
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True, True, True, False, True]

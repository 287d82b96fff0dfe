"""What every layer promises: its meaning in plain torch, symmetry to the bit, initialisation and conversion."""

import copy
import math
import re
from collections import Counter
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tritonsym.nn as tnn
from tritonsym import FilterLayout, Symmetry, explain, functional, pack, pack_tril, pack_triu
from tritonsym.symmetry import parity_axes

ORBITS = [
    ("SymmetricConv1d", {"symmetry": "h"}),
    ("SymmetricConv2d", {"symmetry": {"d4": 8, "h": 4, "hv": "30%"}, "out_channels": 18, "share_bias": True}),
    ("SymmetricConv2d", {"symmetry": {"c4": 8, "v": 4}, "groups": 2, "kernel_size": 4, "out_channels": 16}),
    ("SymmetricConv3d", {"symmetry": {"hvz": 8, "z": 2}, "out_channels": 12, "kernel_size": (2, 3, 4)}),
    ("SymmetricConvTranspose1d", {"symmetry": {"h": 4}, "groups": 2, "stride": 2, "output_padding": 1}),
    ("SymmetricConvTranspose2d", {"symmetry": {"d4": 8, "c2": 2}, "out_channels": 11, "share_bias": True}),
    ("SymmetricConvTranspose3d", {"symmetry": "vz", "dilation": 2}),
]
TIES = [
    ("TiedConv1d", {"symmetry": "h", "parity": "odd"}),
    ("TiedConv2d", {"symmetry": "hv", "parity": {"h": "odd"}, "groups": 2, "free": 4, "kernel_size": (3, 5)}),
    ("TiedConv2d", {"symmetry": "d4", "parity": "odd", "kernel_size": 5}),
    ("TiedConv2d", {"symmetry": "c4", "kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    ("TiedConv2d", {"symmetry": "radial:0.75", "kernel_size": (5, 4), "free": 1}),
    ("TiedConv3d", {"symmetry": "hvz", "parity": {"z": "odd"}}),
]
POOLS = [
    ("OrbitPoolConv1d", {"symmetry": "h", "reduce": "max"}),
    ("OrbitPoolConv2d", {"symmetry": "d4", "reduce": "mean", "kernel_size": 4}),
    ("OrbitPoolConv2d", {"symmetry": "c4", "reduce": "min", "groups": 2, "padding": "valid"}),
    ("OrbitPoolConv2d", {"symmetry": "hv", "reduce": "sum", "padding": 1, "padding_mode": "reflect"}),
    ("OrbitPoolConv3d", {"symmetry": "hz", "reduce": "sum", "stride": 2}),
]
CONVOLUTIONS = [*ORBITS, *TIES, *POOLS]
SYMMETRIC = ("symmetry", "share_bias", "parity", "free", "reduce")  # the arguments that torch does not know


def symmetric(options):
    return {key: value for key, value in options.items() if key in SYMMETRIC}


def conv(name, **options):
    torch.manual_seed(0)
    options = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options}
    return getattr(tnn, name)(**options)


def dense_twin(name, **options):
    """The torch layer with the same arguments."""
    options = {key: value for key, value in options.items() if key not in SYMMETRIC}
    torch.manual_seed(5)
    cls = getattr(nn, re.sub("Symmetric|Tied|OrbitPool", "", name))
    return cls(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options})


def conv_input(layer, **options):
    torch.manual_seed(1)
    return torch.randn(3, layer.in_channels, *(9, 8, 7)[: len(layer.kernel_size)], **options)


def image(w, g, kernel_size):
    """g w by the slots of taps, which test_symmetry checks against numpy."""
    taps = w.flatten(w.ndim - len(kernel_size))
    return taps[..., list(g.slots(kernel_size))].view_as(w)


def assert_same_bits(a, b):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def train_a_step(layer):
    """Move every weight, as training would."""
    x = conv_input(layer, dtype=layer.weight.dtype)
    layer(x).square().mean().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.1 * parameter.grad


# --- symmetry to the bit ----------------------------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize(("name", "options"), ORBITS)
def test_an_orbit_of_filters_is_its_own_image_to_the_bit(name, options, dtype):
    layer = conv(name, **options, dtype=dtype)
    train_a_step(layer)
    dense = layer.expanded_weight().detach()
    if not layer.transposed:
        dense = dense.unflatten(0, (layer.groups, -1))  # [..., out/groups, ...]: output filters on axis 1
    for symmetry, bases in layer.layout.bases:
        for base in bases:
            members = [o for o, (u, _) in enumerate(layer.layout.filters) if u == base]
            assert len(members) == symmetry.order
            orbit = dense[:, members]
            filters = Counter(bytes(f.contiguous().view(torch.uint8).flatten()) for f in orbit.unbind(1))
            assert len(filters) == symmetry.order
            for g in symmetry.elements:
                images = image(orbit, g, layer.kernel_size).unbind(1)
                assert Counter(bytes(f.contiguous().view(torch.uint8).flatten()) for f in images) == filters


@DTYPES
@pytest.mark.parametrize(("name", "options"), TIES)
def test_a_tied_filter_is_its_own_image_to_the_bit(name, options, dtype):
    layer = conv(name, **options, dtype=dtype)
    train_a_step(layer)
    tied = (layer.out_channels - layer.free) // layer.groups
    dense = layer.expanded_weight().detach().unflatten(0, (layer.groups, -1))
    if layer.free:
        assert torch.equal(dense[:, tied:].flatten(0, 1), layer.free_weight)
    dense = dense[:, :tied]
    symmetry = Symmetry("hv") if layer.symmetry.is_radial else layer.symmetry
    odd = "" if layer.symmetry.is_radial else parity_axes(symmetry, options.get("parity", "even"))
    for g in symmetry.elements:
        assert torch.equal(image(dense, g, layer.kernel_size), g.character(odd) * dense)


@DTYPES
@pytest.mark.parametrize(("name", "options"), [case for case in POOLS if case[1]["reduce"] in ("sum", "mean")])
def test_the_kernel_of_a_sum_over_images_is_symmetric_to_the_bit(name, options, dtype):
    layer = conv(name, **options, dtype=dtype)
    train_a_step(layer)
    dense = layer.expanded_weight().detach()
    assert layer.weight.unique().numel() > dense.unique().numel()
    for g in layer.symmetry.elements:
        assert_same_bits(image(dense, g, layer.kernel_size), dense)


@DTYPES
def test_a_symmetric_matrix_equals_its_transpose_to_the_bit(dtype):
    layer = tnn.SymmetricLinear(13, 13, dtype=dtype)
    matrix = layer.expanded_weight()
    assert matrix.unique().numel() > 13
    assert_same_bits(matrix, matrix.mT)


# --- meaning: tied kernels, pooled images, orbits ---------------------------------------------------------------------


def test_a_kernel_symmetric_about_its_centre_row_stores_three_of_five_rows():
    layer = tnn.TiedConv2d(2, 3, 5, symmetry="v", dtype=torch.float64)
    assert layer.weight.shape == (3, 2, 3 * 5)
    top, next_, centre = layer.weight.unflatten(-1, (3, 5)).unbind(2)
    kernel = torch.stack([top, next_, centre, next_, top], 2)
    x = torch.randn(2, 2, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, layer.bias))


def test_a_kernel_symmetric_about_both_axes_stores_a_quarter():
    layer = tnn.TiedConv2d(2, 3, 5, symmetry="hv", dtype=torch.float64)
    assert layer.weight.shape == (3, 2, 3 * 3)
    quarter = layer.weight.unflatten(-1, (3, 3))
    kernel = quarter[..., [0, 1, 2, 1, 0], :][..., [0, 1, 2, 1, 0]]
    x = torch.randn(2, 2, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, layer.bias))


def test_a_circular_kernel_is_a_function_of_the_distance():
    layer = tnn.TiedConv2d(2, 3, 5, symmetry="radial", dtype=torch.float64)
    assert layer.weight.shape == (3, 2, 6)  # squared distances 8, 5, 4, 2, 1, 0 in the order of their first taps
    squared = (torch.arange(-2, 3)[:, None] ** 2 + torch.arange(-2, 3) ** 2).tolist()
    ring = torch.tensor([[[8, 5, 4, 2, 1, 0].index(d) for d in row] for row in squared])
    x = torch.randn(2, 2, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight[..., ring], layer.bias))
    coarse = tnn.TiedConv2d(2, 3, 5, symmetry="radial:1").weight
    assert coarse.shape == (3, 2, 3)  # rings [0, 1), [1, 2), [2, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_tied_filters_mix_with_free_ones(groups):
    layer = tnn.TiedConv2d(4, 6, 3, groups=groups, symmetry="h", free=2, dtype=torch.float64)
    assert layer.weight.shape == (4, 4 // groups, 6) and layer.free_weight.shape == (2, 4 // groups, 3, 3)
    left, centre = layer.weight.unflatten(-1, (3, 2)).unbind(-1)
    tied = torch.stack([left, centre, left], -1)
    parts = [part for pair in zip(tied.chunk(groups), layer.free_weight.chunk(groups), strict=True) for part in pair]
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, torch.cat(parts), layer.bias, groups=groups))


@pytest.mark.parametrize("reduce", ["max", "min", "sum", "mean"])
def test_flip_and_reduce(reduce):
    layer = tnn.OrbitPoolConv2d(2, 3, 3, padding=1, symmetry="hv", reduce=reduce, dtype=torch.float64)
    x = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    responses = torch.stack([F.conv2d(x, layer.weight.flip(axes), padding=1) for axes in [(), (3,), (2,), (2, 3)]])
    pooled = {"max": responses.amax(0), "min": responses.amin(0), "sum": responses.sum(0), "mean": responses.mean(0)}
    torch.testing.assert_close(layer(x), pooled[reduce] + layer.bias[:, None, None])
    torch.testing.assert_close(layer(x.flip(3)), layer(x).flip(3))


def test_flip_and_sum_is_a_convolution_with_the_symmetrized_kernel():
    layer = tnn.OrbitPoolConv2d(2, 3, 3, symmetry="h", reduce="sum", dtype=torch.float64)
    kernel = layer.weight + layer.weight.flip(3)
    x = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer.expanded_weight(), kernel)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, layer.bias))


def test_orbits_of_two_dimensional_filters():
    layer = tnn.SymmetricConv2d(1, 16, 3, symmetry={"h": 2, "v": 4, "hv": 8}, dtype=torch.float64)
    assert layer.weight.shape[0] == 1 + 2 + 2 + 2
    h, v, hv = layer.weight.split([1, 2, 4])[0], layer.weight[1:3], layer.weight[3:5]
    dense = torch.cat([layer.weight, h.flip(3), v.flip(2), hv.flip(3), hv.flip(2), hv.flip(2, 3)])
    x = torch.randn(2, 1, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, dense, layer.bias))


def test_orbits_of_three_dimensional_filters():
    layer = tnn.SymmetricConv3d(2, 10, (3, 2, 3), symmetry={"h": 2, "v": 2, "z": 2, "hz": 4}, dtype=torch.float64)
    assert layer.weight.shape[0] == 1 + 1 + 1 + 1
    h, v, z, hz = layer.weight.split(1)
    dense = torch.cat([layer.weight, h.flip(4), v.flip(3), z.flip(2), hz.flip(4), hz.flip(2), hz.flip(2, 4)])
    x = torch.randn(2, 2, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv3d(x, dense, layer.bias))


def test_orbits_by_percentage():
    layer = tnn.SymmetricConv2d(3, 16, 3, symmetry={"h": "25%", "hv": "60%"})
    assert layer.layout == FilterLayout.parse({"h": 4, "hv": 8}, 16)
    assert layer.weight.shape[0] == 2 + 2 + 4


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["SymmetricConv2d", "SymmetricConvTranspose2d"])
def test_a_shared_bias_is_that_of_the_base_filter(name, groups):
    layer = conv(name, symmetry={"hv": 8, "h": 4}, out_channels=14, groups=groups, share_bias=True)
    stored, per_group = layer.layout.stored_channels, layer.layout.stored_per_group
    assert layer.bias.shape == (stored,) == (2 + 2 + 2,)
    owner = [g * per_group + u for g in range(groups) for u, _ in layer.layout.filters]
    assert torch.equal(layer.expanded_bias(), layer.bias[owner])
    x = conv_input(layer)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert torch.equal(layer.to_dense().bias, layer.bias[owner])


def test_identical_copies_are_reported_to_the_caller():
    with pytest.warns(UserWarning, match=r"is 1 along axis 'v' of symmetry 'hv', .* identical copies") as caught:
        layer = tnn.SymmetricConv2d(1, 4, (1, 3), symmetry="hv")
    assert [record.filename for record in caught] == [__file__]
    base, h, v, hv = layer.expanded_weight()
    assert torch.equal(base, v) and torch.equal(h, hv) and torch.equal(h, base.flip(2))


# --- meaning: symmetric matrices --------------------------------------------------------------------------------------


def test_a_symmetric_linear_layer_from_vectors_and_matrices():
    n = 5
    torch.manual_seed(0)
    full, bias, x = torch.randn(n, n).double(), torch.randn(n).double(), torch.randn(2, 3, n).double()
    matrix = (full + full.mT) / 2
    layers = [
        tnn.SymmetricLinear.from_packed(pack_tril(matrix[tuple(torch.tril_indices(n, n))]), bias),
        tnn.SymmetricLinear.from_packed(pack_triu(matrix[tuple(torch.triu_indices(n, n))]), bias),
        tnn.SymmetricLinear.from_packed(pack(full, "average"), bias),
        tnn.SymmetricLinear.from_packed(pack(matrix), bias),
    ]
    for layer in layers:
        assert layer.weight.numel() == n * (n + 1) // 2
        assert torch.equal(layer.expanded_weight(), matrix)
        torch.testing.assert_close(layer(x), x @ matrix + bias)
    torch.testing.assert_close(functional.symmetric_matmul(layers[0].weight, x), x @ matrix)
    torch.testing.assert_close(functional.symmetric_matmul(layers[0].weight, x.mT, left=True), matrix @ x.mT)


@pytest.mark.parametrize(
    ("init", "matrix"),
    [("project", lambda w: (w + w.mT) / 2), ("keep", lambda w: w.tril() + w.tril(-1).mT)],
)
def test_a_symmetric_linear_layer_from_a_dense_one(init, matrix):
    dense = nn.Linear(6, 6, dtype=torch.float64).eval()
    dense.bias.requires_grad_(False)
    layer = tnn.SymmetricLinear.from_dense(dense, init=init, activation="tanh")
    assert torch.equal(layer.expanded_weight(), matrix(dense.weight))
    assert torch.equal(layer.bias, dense.bias)
    assert (layer.weight.requires_grad, layer.bias.requires_grad, layer.training) == (True, False, False)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer.to_dense()(x), layer(x), rtol=0, atol=0)


# --- meaning: sets ----------------------------------------------------------------------------------------------------


def global_conv(**options):
    torch.manual_seed(0)
    return tnn.GlobalConv1d(3, 4, **options)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_global_conv_is_the_convolution_of_width_2n_plus_1(length, bias):
    layer = global_conv(bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, length, dtype=torch.float64)
    kernel = torch.stack([layer.center if k == length else layer.surround for k in range(2 * length + 1)], -1)
    assert torch.equal(layer.expanded_weight(length), kernel)
    torch.testing.assert_close(layer(x), F.conv1d(x, kernel, layer.bias, padding=length))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_global_conv_takes_every_other_position_once():
    layer = global_conv(dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for i in range(4):
        others = sum(x[..., j] for j in range(4) if j != i)
        torch.testing.assert_close(
            layer(x)[..., i], x[..., i] @ layer.center.mT + others @ layer.surround.mT + layer.bias
        )


def test_global_conv_commutes_with_permutations():
    layer = global_conv(dtype=torch.float64, activation="relu")
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[..., order]), layer(x)[..., order])


@pytest.mark.parametrize("length", [4, 64, 1024])
def test_global_conv_costs_o_of_n(length):
    layer = global_conv()
    x = torch.randn(2, 3, length)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    plan = explain(layer, x)
    assert counter.get_total_flops() == plan.flops == 2 * 2 * 3 * 4 * (length + 1)
    with FlopCounterMode(display=False) as counter:
        F.conv1d(x, layer.expanded_weight(length), padding=length)
    assert counter.get_total_flops() >= plan.dense_flops == 2 * 2 * 3 * 4 * length * (2 * length + 1)


@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 1), (2, 2, 2, 5)])
def test_top_1_is_global_max_pooling(shape):
    x = torch.randn(shape)
    assert torch.equal(tnn.TopKPool1d(1)(x), x.amax(-1, keepdim=True))
    assert torch.equal(tnn.TopKPool1d(shape[-1])(x), x.sort(-1, descending=True).values)


# --- meaning: independence of the order of the inputs -----------------------------------------------------------------

N = 4
ORDERS = {
    "swap": [[0, 1, 2, 3], [2, 3, 0, 1]],
    "flip": [[0, 1, 2, 3], [3, 2, 1, 0]],
    "cyclic": [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]],
    "permutations": [list(order) for order in permutations(range(N))],
    ((0, 1, 2, 3), (1, 0, 3, 2)): [[0, 1, 2, 3], [1, 0, 3, 2]],
}
REDUCE = {
    "max": lambda y: y.amax(0),
    "min": lambda y: y.amin(0),
    "mean": lambda y: sum(y) / len(y),
    "sum": sum,
    "logsumexp": lambda y: y.exp().sum(0).log(),
}


class Inner(nn.Module):
    """A model whose rounding depends on the order of its inputs, and which records batch sizes."""

    def __init__(self, dim=1, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.dim = dim
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(N * 5, 17), nn.Tanh(), nn.Linear(17, 3)).to(dtype)
        self.batches = []

    def forward(self, x):
        self.batches.append(x.shape[0])
        return self.model(x)


def set_input(batch, dim=1, dtype=None):
    torch.manual_seed(batch)
    return torch.randn(batch, N, 5, dtype=dtype).movedim(1, dim)


OVER = pytest.mark.parametrize("over", ORDERS, ids=str)
REDUCTION = pytest.mark.parametrize("reduce", REDUCE)


@OVER
@REDUCTION
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_reordered_inputs_give_the_same_bits(over, reduce, batch):
    model = tnn.Symmetrize(Inner(), over=over, reduce=reduce)
    x = set_input(batch)
    y = model(x).detach()
    orders = torch.tensor(ORDERS[over])
    for order in orders:
        assert_same_bits(model(x[:, order]).detach(), y)
    own = orders[torch.randint(len(orders), (batch,))]  # every sample in its own order
    assert_same_bits(model(x[torch.arange(batch)[:, None], own]).detach(), y)


@OVER
@REDUCTION
def test_nan_and_minus_zero_have_an_order_too(over, reduce):
    model = tnn.Symmetrize(nn.Flatten(), over=over, reduce=reduce)
    payloads = (0x7FC00000 + torch.arange(N, dtype=torch.int32)).view(torch.float32)
    x = torch.stack([torch.tensor([0.0, -0.0, -0.0, 0.0]), torch.tensor([0.0, float("nan"), 1.0, -0.0]), payloads])
    y = model(x)
    for order in ORDERS[over]:
        assert_same_bits(model(x[:, order]), y)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_width_of_number_gives_the_same_bits(dtype):
    model = tnn.Symmetrize(Inner(dtype=dtype), over="cyclic", reduce="sum")
    x = set_input(3, dtype=dtype)
    for order in ORDERS["cyclic"]:
        assert_same_bits(model(x[:, order]).detach(), model(x).detach())


@OVER
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_inner_is_called_once_on_all_orders(over, batch):
    inner = Inner()
    y = tnn.Symmetrize(inner, over=over)(set_input(batch))
    assert inner.batches == [batch * len(ORDERS[over])]
    assert y.shape == (batch, 3)


@pytest.mark.parametrize("over", ["swap", "cyclic", "permutations", "flip"])
def test_symmetrize_of_no_entries(over):
    y = tnn.Symmetrize(nn.Flatten(), over)(torch.ones(3, 0, 2))
    assert y.shape == (3, 0)


@OVER
@REDUCTION
@pytest.mark.parametrize("dim", [1, -1])
def test_symmetrize_is_the_loop_over_orders(over, reduce, dim):
    inner = Inner(dtype=torch.float64)
    model = tnn.Symmetrize(inner, over=over, dim=dim, reduce=reduce)
    x = set_input(3, dim, torch.float64).requires_grad_()
    y = model(x)
    looped = REDUCE[reduce](torch.stack([inner(x.index_select(dim, torch.tensor(order))) for order in ORDERS[over]]))
    torch.testing.assert_close(y, looped, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(y)
    for got, truth in zip(
        torch.autograd.grad(y, [x, *inner.parameters()], upstream),
        torch.autograd.grad(looped, [x, *inner.parameters()], upstream),
        strict=True,
    ):
        assert truth.abs().max() > 0
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)


def test_two_inputs_of_one_number():
    model = tnn.Symmetrize(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
    xy = torch.randn(16, 2)
    assert_same_bits(model(xy).detach(), model(xy.flip(1)).detach())
    assert not torch.equal(model.inner(xy), model.inner(xy.flip(1)))


# --- initialisation ---------------------------------------------------------------------------------------------------

WIDE = {"in_channels": 64, "out_channels": 96}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SymmetricConv1d", {"symmetry": "h", "kernel_size": 5}),
        ("SymmetricConv2d", {"symmetry": {"d4": 64, "h": 16}, "groups": 2}),
        ("SymmetricConv3d", {"symmetry": {"hvz": 64}}),
        ("SymmetricConvTranspose1d", {"symmetry": "h", "groups": 4, "kernel_size": 4}),
        ("SymmetricConvTranspose2d", {"symmetry": {"c4": 32, "hv": "50%"}}),
        ("SymmetricConvTranspose3d", {"symmetry": "hvz", "kernel_size": 2}),
        ("TiedConv1d", {"symmetry": "h", "free": 32}),
        ("TiedConv2d", {"symmetry": "radial:1", "free": 32, "groups": 2, "kernel_size": 5}),
        ("TiedConv2d", {"symmetry": "hv", "parity": "odd", "kernel_size": 4}),
        ("TiedConv3d", {"symmetry": "hvz", "free": 8}),
        ("OrbitPoolConv1d", {"symmetry": "h"}),
        ("OrbitPoolConv2d", {"symmetry": "d4", "groups": 2}),
        ("OrbitPoolConv3d", {"symmetry": "hvz", "reduce": "sum"}),
    ],
)
def test_initialisation_is_that_of_the_dense_layer(name, options):
    layer, dense = conv(name, **WIDE, **options), dense_twin(name, **WIDE, **options)
    assert_uniform_like(layer, dense)


def test_initialisation_of_matrices_is_that_of_the_dense_layers():
    torch.manual_seed(0)
    assert_uniform_like(tnn.SymmetricLinear(300, 300), nn.Linear(300, 300))
    assert_uniform_like(tnn.GlobalConv1d(200, 300), nn.Conv1d(200, 300, 1))


def assert_uniform_like(layer, dense):
    """Check that parameters are uniform within the dense layer's bound, up to the sampling error of the variance."""
    bound = 1 / math.sqrt(nn.init._calculate_fan_in_and_fan_out(dense.weight)[0])
    assert 0.99 * bound < dense.weight.abs().max() <= bound, "the bound is torch's"
    for name, parameter in layer.named_parameters():
        assert parameter.abs().max() <= bound, name
        # the mean square of n uniform samples has the relative standard error sqrt(0.8 / n)
        error = math.sqrt(0.8 / parameter.numel())
        assert abs(3 * parameter.square().mean() / bound**2 - 1) < 5 * error, name
        if name != "bias":
            assert parameter.numel() > 500, "enough samples to tell the fan-ins apart"
            assert abs(parameter.mean()) < 5 * bound / math.sqrt(3 * parameter.numel()), name


# --- dense layers and back --------------------------------------------------------------------------------------------

CONVERSIONS = pytest.mark.parametrize(("name", "options"), CONVOLUTIONS)


def from_dense(name, options, **more):
    dense = dense_twin(name, **options, dtype=torch.float64)
    cls = getattr(tnn, name)
    return dense, cls.from_dense(dense, **symmetric(options), **more)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@CONVERSIONS
@pytest.mark.parametrize("activation", [None, "silu"])
def test_to_dense_has_equal_outputs(name, options, activation):
    layer = conv(name, **options, activation=activation, dtype=torch.float64)
    layer.bias.requires_grad_(False)
    dense = layer.to_dense()
    assert not any("tritonsym" in type(module).__module__ for module in dense.modules())
    assert [p.requires_grad for p in dense.parameters()] == [True, False]
    x = conv_input(layer, dtype=torch.float64)
    torch.testing.assert_close(dense(x), layer(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense(x[0]), layer(x)[0], rtol=1e-12, atol=1e-12)
    for parameter in layer.parameters():
        parameter.data.zero_()
    assert all(p.abs().max() > 0 for p in dense.parameters()), "the dense layer has its own memory"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
@CONVERSIONS
def test_to_dense_keeps_the_training_flag(name, options, activation, training):
    dense = conv(name, **options, activation=activation).train(training).to_dense()
    assert {module.training for module in dense.modules()} == {training}


@CONVERSIONS
def test_projection_is_orthogonal(name, options):
    dense, layer = from_dense(name, options, init="project")
    if options.get("reduce") in ("max", "min"):
        assert torch.equal(layer.weight, dense.weight)
        return
    residual = dense.weight - layer.expanded_weight()
    assert residual.norm() > 0.1 * dense.weight.norm()
    for _ in range(3):
        other = copy.deepcopy(layer)
        other.reset_parameters()
        direction = other.expanded_weight()
        assert abs((residual * direction).sum()) < 1e-12 * residual.norm() * direction.norm()
    if options.get("share_bias"):
        residual, direction = dense.bias - layer.expanded_bias(), other.expanded_bias()
        assert residual.norm() > 0.1 * dense.bias.norm()
        assert abs((residual * direction).sum()) < 1e-12 * residual.norm() * direction.norm()
    else:
        assert torch.equal(layer.bias, dense.bias)


@DTYPES
@pytest.mark.parametrize(("name", "options"), [c for c in CONVOLUTIONS if c[1].get("reduce") not in ("max", "min")])
def test_an_expanded_layer_gives_its_stored_bits_back(name, options, dtype):
    layer = conv(name, **options, dtype=dtype)
    again = type(layer).from_dense(layer.to_dense(), **symmetric(options))
    assert_same_bits(again.expanded_weight().detach(), layer.expanded_weight().detach())
    if "reduce" not in options:  # many filters have the same symmetrized kernel
        for got, expected in zip(again.parameters(), layer.parameters(), strict=True):
            assert_same_bits(got.detach(), expected.detach())


@CONVERSIONS
def test_keep_takes_the_values_where_stored_ones_stand(name, options):
    dense, layer = from_dense(name, options, init="keep")
    if name.startswith("Tied"):
        tied = layer.expanded_weight().unflatten(0, (layer.groups, -1))
        original = dense.weight.unflatten(0, (layer.groups, -1))
        count = (layer.out_channels - layer.free) // layer.groups
        assert torch.equal(tied[:, count:], original[:, count:])
        for slot in range(len(layer.orbits)):
            first = layer.orbits.slot.index(slot)
            assert torch.equal(tied[:, :count].flatten(3)[..., first], original[:, :count].flatten(3)[..., first])
    elif name.startswith("OrbitPool"):
        assert torch.equal(layer.weight, dense.weight)
    else:
        axis, groups = (1, 1) if layer.transposed else (0, layer.groups)
        stored = [part.narrow(axis, 0, layer.layout.stored_per_group) for part in dense.weight.chunk(groups, axis)]
        assert torch.equal(layer.weight, torch.cat(stored, axis))


@CONVERSIONS
def test_reset_draws_new_values(name, options):
    dense, layer = from_dense(name, options, init="reset")
    _, kept = from_dense(name, options, init="keep")
    assert all((new != old).all() for new, old in zip(layer.parameters(), kept.parameters(), strict=True))
    bound = 1 / math.sqrt(nn.init._calculate_fan_in_and_fan_out(dense.weight)[0])
    assert all(p.abs().max() <= bound for p in layer.parameters())


@CONVERSIONS
@pytest.mark.parametrize("init", ["project", "keep", "reset"])
def test_from_dense_keeps_everything_else(name, options, init):
    dense = dense_twin(name, **options, dtype=torch.float64).eval()
    dense.weight.requires_grad_(False)
    layer = getattr(tnn, name).from_dense(dense, **symmetric(options), init=init)
    for attribute in (
        *["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"],
        *["output_padding", "transposed", "training"],
    ):
        assert getattr(layer, attribute) == getattr(dense, attribute), attribute
    assert layer.weight.dtype == torch.float64
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == {
        name: name == "bias" for name, _ in layer.named_parameters()
    }
    x = conv_input(layer, dtype=torch.float64)
    assert layer(x).shape == dense(x).shape
    no_bias = dense_twin(name, **{**options, "bias": False})
    assert getattr(tnn, name).from_dense(no_bias, symmetry=options["symmetry"]).bias is None


# --- activations and functional twins ---------------------------------------------------------------------------------

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, options in CONVOLUTIONS if "2d" in name]
    + [("SymmetricLinear", {}), ("GlobalConv1d", {})],
)
def test_activations_come_last(name, options, activation):
    if name in ("SymmetricLinear", "GlobalConv1d"):
        layer, x = getattr(tnn, name)(8, 8, activation=activation), torch.randn(3, 8, 8)
    else:
        layer = conv(name, **options, activation=activation)
        x = conv_input(layer)
    assert f"activation={activation!r}" in repr(layer)
    plain = copy.deepcopy(layer)
    plain.activation = None
    torch.testing.assert_close(layer(x), ACTIVATIONS[activation](plain(x)), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@CONVERSIONS
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_functional_convolutions_equal_the_modules(name, options, activation):
    layer = conv(name, **{**options, "padding_mode": "zeros"}, activation=activation)
    function = getattr(functional, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    own = {
        "Sy": {"symmetry": getattr(layer, "layout", None)},
        "Ti": {k: options[k] for k in ("symmetry", "parity") if k in options}
        | {"kernel_size": layer.kernel_size, "free_weight": getattr(layer, "free_weight", None)},
        "Or": {k: options[k] for k in ("symmetry", "reduce") if k in options},
    }[name[:2]]
    hyper = ["stride", "padding", "output_padding", "dilation", "groups"]
    arguments = {key: getattr(layer, key) for key in hyper if key != "output_padding" or layer.transposed}
    x = conv_input(layer)
    expected = layer(x)
    assert torch.equal(function(x, layer.weight, layer.bias, **arguments, **own, activation=activation), expected)
    assert torch.equal(function(x[0], layer.weight, layer.bias, **arguments, **own, activation=activation), layer(x[0]))
    if name.startswith("Symmetric"):
        counts = {symmetry.name: count for symmetry, count in layer.layout.counts.items()}
        y = function(x, layer.weight, layer.bias, **arguments, symmetry=counts, activation=activation)
        assert torch.equal(y, expected)


def test_other_functions_equal_the_modules():
    x = torch.randn(2, 6, 6)
    linear = tnn.SymmetricLinear(6, 6, activation="relu")
    assert torch.equal(functional.symmetric_linear(x, linear.weight, linear.bias, activation="relu"), linear(x))
    layer = tnn.GlobalConv1d(6, 3, activation="tanh")
    weights = (layer.center, layer.surround, layer.bias)
    assert torch.equal(functional.global_conv1d(x, *weights, activation="tanh"), layer(x))
    assert torch.equal(functional.topk_pool1d(x, 3), tnn.TopKPool1d(3)(x))
    inner = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    arguments = ("cyclic", 2, "logsumexp")
    assert torch.equal(functional.symmetrize(inner, x, *arguments), tnn.Symmetrize(inner, *arguments)(x))

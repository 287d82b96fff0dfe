"""A converted model starts where the dense one did: filters keep their norms, initializers act on expanded weights."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonsym
import tritonsym.nn as tnn
from tritonsym import init_, replace_layers

F64 = torch.float64


def in_front(weight, layer):
    """The output filters of all groups along the first axis."""
    return torch.cat([part.transpose(0, 1) for part in weight.chunk(layer.groups)]) if layer.transposed else weight


def filter_norms(weight, layer):
    return torch.stack([w.norm() for w in in_front(weight, layer)])


def scaled(filters, by):
    return torch.stack([w * s for w, s in zip(filters, by, strict=True)])


#: A dense layer, a conversion, and the output filters of the orbits it makes.
ORBITS = {
    "mixed": (
        nn.Conv2d(3, 9, 3, dtype=F64),
        partial(tnn.SymmetricConv2d.from_dense, symmetry={"h": 4, "hv": 4}),
        # bases of h: 0, 1, of hv: 2; free: 3; images of h: 4, 5, of hv: 6, 7, 8
        [(0, 4), (1, 5), (2, 6, 7, 8), (3,)],
    ),
    "groups": (
        nn.Conv1d(4, 8, 3, groups=2, dtype=F64),
        partial(tnn.SymmetricConv1d.from_dense, symmetry="h"),
        [(0, 2), (1, 3), (4, 6), (5, 7)],
    ),
    "transposed": (
        nn.ConvTranspose2d(4, 4, 3, groups=2, dtype=F64),
        partial(tnn.SymmetricConvTranspose2d.from_dense, symmetry="v"),
        [(0, 1), (2, 3)],
    ),
    "tied": (
        nn.Conv2d(4, 6, 3, groups=2, dtype=F64),
        partial(tnn.TiedConv2d.from_dense, symmetry="d4", free=2),
        [(i,) for i in range(6)],
    ),
    "odd": (
        nn.Conv2d(2, 3, 3, dtype=F64),
        partial(tnn.TiedConv2d.from_dense, symmetry="h", parity="odd"),
        [(0,), (2,)],
    ),
    "sum": (
        nn.Conv2d(2, 3, 3, dtype=F64),
        partial(tnn.OrbitPoolConv2d.from_dense, symmetry="hv", reduce="sum"),
        [(1,)],
    ),
    "mean": (
        nn.Conv2d(2, 3, 3, dtype=F64),
        partial(tnn.OrbitPoolConv2d.from_dense, symmetry="c4", reduce="mean"),
        [(2,)],
    ),
}


@pytest.mark.parametrize(("dense", "convert", "orbits"), ORBITS.values(), ids=ORBITS)
def test_every_filter_keeps_its_norm_and_the_projection_has_its_own_name(dense, convert, orbits):
    before, layer = filter_norms(dense.weight, dense), convert(dense)
    after = filter_norms(layer.expanded_weight(), dense)
    projected = convert(dense, init="project").expanded_weight()
    left = filter_norms(projected, dense)
    for orbit in orbits:
        index = list(orbit)
        torch.testing.assert_close(after[index], before[index].square().mean().sqrt().expand(len(index)))
        assert len(index) == 1 or (left[index] < 0.95 * after[index]).all()
    alike = after / left
    torch.testing.assert_close(in_front(layer.expanded_weight(), dense), scaled(in_front(projected, dense), alike))
    assert (projected - dense.weight).norm() < (layer.expanded_weight() - dense.weight).norm()


def test_a_matrix_keeps_its_norm():
    dense = nn.Linear(7, 7, dtype=F64)
    layer = tnn.SymmetricLinear.from_dense(dense)
    nearest = (dense.weight + dense.weight.T) / 2
    torch.testing.assert_close(layer.expanded_weight(), nearest * dense.weight.norm() / nearest.norm())
    assert torch.equal(tnn.SymmetricLinear.from_dense(layer.to_dense()).weight, layer.weight)


def test_filters_of_which_nothing_is_left_stay_zero():
    dense = nn.Conv2d(1, 2, (1, 3), bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.tensor([[-1.0, 0, 1], [0, 0, 0]]).view(2, 1, 1, 3))
    layer = tnn.TiedConv2d.from_dense(dense, symmetry="h")
    assert torch.equal(layer.expanded_weight(), torch.zeros(2, 1, 1, 3))
    with torch.no_grad():
        dense.weight[0] += 1e-7  # rounding errors must not grow
    assert tnn.TiedConv2d.from_dense(dense, symmetry="h").expanded_weight().abs().max() < 1e-6
    skew = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        skew.weight.copy_(torch.tensor([[0.0, 1], [-1, 0]]))
    assert torch.equal(tnn.SymmetricLinear.from_dense(skew).expanded_weight(), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_other_dtypes(dtype):
    dense = nn.Conv2d(4, 8, 3, dtype=dtype)
    layer = tnn.SymmetricConv2d.from_dense(dense, symmetry="hv")
    norm = torch.linalg.vector_norm
    torch.testing.assert_close(
        norm(layer.expanded_weight().abs().double()), norm(dense.weight.abs().double()), rtol=4e-3, atol=0
    )


# --- whole models -----------------------------------------------------------------------------------------------------


def vgg16(width=64, head=4096):
    """VGG-16 as initialised in torchvision: kaiming normal by fan-out, biases 0."""
    layers, channels = [], 3
    for size in (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"):
        if size == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width * size, 3, padding=1), nn.ReLU()]
            channels = width * size
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, head), nn.ReLU(), nn.Linear(head, 10)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


@pytest.mark.slow
@pytest.mark.parametrize("symmetry", ["h", "hv", "d4"])
def test_vgg16_keeps_the_scale_of_its_outputs(symmetry):
    check_scale(vgg16(), symmetry, torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("symmetry", ["h", "hv", "d4"])
def test_a_narrow_vgg16_keeps_the_scale_of_its_outputs(symmetry):
    check_scale(vgg16(16, 64), symmetry, torch.randn(4, 3, 32, 32))


@torch.no_grad()
def check_scale(model, symmetry, x):
    conv = {symmetry: "100%"}
    converted, report = replace_layers(model, conv=conv)
    assert len(report) == 13
    dense, ours = model(x).std(), converted(x).std()
    assert dense / 2 < ours < 2 * dense, (dense, ours)
    shrunk = replace_layers(model, conv=conv, init="project")[0][:-3](x).std()
    assert shrunk < model[:-3](x).std() / 30  # without rescaling, outputs shrink


@pytest.mark.slow
def test_a_net_without_norm_trains_as_the_dense_one():
    torch.manual_seed(2)
    layers = [nn.Conv2d(1 if i == 0 else 32, 32, 3, padding=1) for i in range(8)]
    dense = nn.Sequential(*(m for conv in layers for m in (conv, nn.ReLU())))
    dense.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)])
    for conv in layers:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    x, target = torch.randn(32, 1, 8, 8), torch.arange(32) // 16
    x[16:] *= 2

    def losses(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        found = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    with tritonsym.backend("reference"):
        ours, shrunk = (losses(replace_layers(dense, "hv", init=init)[0]) for init in ("rescale", "project"))
    curve = losses(copy.deepcopy(dense))
    assert max(curve[-1], ours[-1]) < 0.25 < 0.6 < shrunk[-1], (curve[-1], ours[-1], shrunk[-1])
    assert all(abs(a - b) < 0.2 for a, b in zip(curve[2:], ours[2:], strict=True))


# --- memory formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["rescale", "project", "keep", "reset"])
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d])
def test_channels_last_weights_stay_so_there_and_back(cls, init):
    form = torch.channels_last_3d if cls is nn.Conv3d else torch.channels_last
    dense = cls(8, 16, 3, groups=2).to(memory_format=form)
    converted, _ = replace_layers(nn.Sequential(dense), conv={"hv": 8}, init=init)
    for weight in (converted[0].weight, tritonsym.materialize(converted)[0].weight):
        assert weight.is_contiguous(memory_format=form) and not weight.is_contiguous()
    plain, _ = replace_layers(nn.Sequential(cls(8, 16, 3)), conv="hv", init=init)
    assert plain[0].weight.is_contiguous() and plain[0].to_dense().weight.is_contiguous()


# --- init_ ------------------------------------------------------------------------------------------------------------

kaiming = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")


@pytest.mark.parametrize("layer", [
    partial(tnn.SymmetricConv2d, 32, 64, 3, symmetry="hv"),
    partial(tnn.SymmetricConv2d, 32, 64, 3, symmetry={"d4": 32}, groups=2),
    partial(tnn.SymmetricConvTranspose2d, 32, 64, 3, symmetry="c4"),
    partial(tnn.TiedConv2d, 32, 64, 3, symmetry="hv", free=16),
    partial(tnn.OrbitPoolConv2d, 32, 64, 3, symmetry="h", reduce="mean"),
])  # fmt: skip
def test_an_initializer_acts_on_the_expanded_weight(layer):
    layer = layer()
    bias = layer.bias.detach().clone()
    assert init_(layer, kaiming) is layer
    expected = torch.empty(layer._dense_shape()).normal_()
    kaiming(expected)
    assert layer.expanded_weight().std().item() == pytest.approx(expected.std().item(), rel=0.05)
    assert torch.equal(layer.bias, bias)
    tritonsym.testing.assert_symmetric(layer)
    nn.init.constant_(layer.weight, 0.0)
    init_(layer, partial(nn.init.constant_, val=2.0))
    torch.testing.assert_close(layer.expanded_weight(), torch.full_like(expected, 2.0))


def test_of_a_model_every_layer_of_ours_is_initialised_and_no_other():
    model = nn.Sequential(tnn.SymmetricConv2d(3, 8, 3, symmetry="hv"), nn.Conv2d(8, 8, 3), tnn.SymmetricLinear(5, 5))
    before = copy.deepcopy(model.state_dict())
    init_(model, partial(nn.init.constant_, val=1.0))
    assert torch.equal(model[1].weight, before["1.weight"]) and torch.equal(model[2].bias, before["2.bias"])
    torch.testing.assert_close(model[2].expanded_weight(), torch.ones(5, 5))
    assert model[0].weight.eq(1).all()


def test_init_refuses_what_it_cannot_do_and_changes_nothing():
    layer = tnn.SymmetricConv2d(3, 8, 3, symmetry="hv")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"init_: Linear holds no layer of tritonsym\.nn with a dense weight"):
        init_(nn.Linear(2, 2), kaiming)
    with pytest.raises(TypeError, match=r"init_: initializer must fill a tensor, as .* got 'kaiming'"):
        init_(layer, "kaiming")
    with pytest.raises(TypeError, match=r"init_: expected a torch\.nn.Module, got Parameter"):
        init_(layer.weight, kaiming)
    normed = nn.utils.parametrizations.weight_norm(tnn.SymmetricConv2d(3, 8, 3, symmetry="hv"))
    with pytest.raises(ValueError, match=r"init_: 1 has parametrizations; initialise it before they are added"):
        init_(nn.Sequential(layer, normed), kaiming)
    with pytest.raises(ZeroDivisionError):
        init_(nn.Sequential(layer), lambda w: w.fill_(1) / (1 / 0))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

"""Tools for plain torch layers: with these layers their results are right or an error, never wrong."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
import torch.ao.quantization as ao
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torch.utils.mkldnn import to_mkldnn

import tritonsym.nn as tnn

ORBITS = {None: (4, 8), "h": (4, 8), "hv": (4, 4)}
LAYERS = {
    f"SymmetricConv{kind}{n}d {symmetry}": partial(
        getattr(tnn, f"SymmetricConv{kind}{n}d"), *channels, 3, symmetry=symmetry
    )
    for kind, n, (symmetry, channels) in product(("", "Transpose"), (1, 2, 3), ORBITS.items())
    if symmetry != "hv" or n > 1
}
for n, name in (1, "h"), (2, "hv"), (3, "hv"):
    LAYERS[f"TiedConv{n}d"] = partial(getattr(tnn, f"TiedConv{n}d"), 4, 8, 3, symmetry=name)
    LAYERS[f"TiedConv{n}d free"] = partial(getattr(tnn, f"TiedConv{n}d"), 4, 8, 3, symmetry=name, free=7)
    LAYERS[f"GroupConv{n}d"] = partial(getattr(tnn, f"GroupConv{n}d"), 2, 1, 3, symmetry=name)
    for reduce in ("max", "min", "sum", "mean"):
        LAYERS[f"OrbitPoolConv{n}d {reduce}"] = partial(
            getattr(tnn, f"OrbitPoolConv{n}d"), 4, 4, 3, symmetry=name, reduce=reduce
        )
LAYERS |= {
    "shared bias": partial(tnn.SymmetricConv2d, 4, 8, 3, symmetry="hv", share_bias=True),
    "one free": partial(tnn.TiedConv2d, 4, 1, 3, symmetry="hv", free=1),
    "SymmetricLinear": partial(tnn.SymmetricLinear, 4, 4),
    "SymmetricLinear of one": partial(tnn.SymmetricLinear, 1, 1),
    "SkewLinear": partial(tnn.SkewLinear, 4, 4),
    "GroupLinear": partial(tnn.GroupLinear, 1, 1, symmetry="hv"),
}


def test_every_layer_with_a_weight_is_here():
    classes = {getattr(tnn, name) for name in tnn.__all__ if isinstance(getattr(tnn, name), type)}
    stored = {cls for cls in classes if issubclass(cls, (nn.modules.conv._ConvNd, nn.Linear, tnn.SymmetricLinear))}
    assert {make.func for make in LAYERS.values()} == stored


def sequential(tool):
    """Apply a tool for models to a model of one layer."""
    return lambda layer, x: (nn.Sequential(layer)(x), tool(nn.Sequential(layer), x)(x))


def with_norm(tool):
    def used(layer, x):
        y = layer(x)
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[max(y.ndim - 3, 0)](y.shape[1]).eval()
        for value in norm.state_dict().values():
            if value.ndim:
                value.uniform_(0.5, 1.5)
        norm.weight[::2] *= -1
        return norm(y), tool(layer, norm)(x)

    return used


def fuse_by_hand_of_torch(layer, norm):
    if hasattr(layer, "kernel_size"):
        return fusion.fuse_conv_bn_eval(layer, norm, layer.transposed)
    return fusion.fuse_linear_bn_eval(layer, norm)


def mkldnn(layer, x):
    y, of_torch = layer(x), to_mkldnn(copy.deepcopy(layer))(x.to_mkldnn())
    return y, of_torch.to_dense() if of_torch.is_mkldnn else of_torch


def quantized(model, x):
    model.qconfig = ao.get_default_qconfig()
    observed = ao.prepare(model)
    observed(x)
    return ao.convert(observed)


def trained_quantized(model, x):
    model.train().qconfig = ao.get_default_qat_qconfig()
    return ao.prepare_qat(model).apply(ao.disable_fake_quant)


def reparametrized(tool):
    """Apply a tool that reparametrizes the stored weight: the layer computes what its expanded weight says."""

    def used(layer, x):
        y = layer(x)
        layer = tool(layer)
        return layer.to_dense()(x) if tool is pruned else y, layer(x)

    return used


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


class LowRank(nn.Module):
    """As in LoRA: adds the product of two factors to a weight of this shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.down = nn.Parameter(torch.randn(2, torch.Size(shape[1:]).numel()))
        self.up = nn.Parameter(torch.randn(shape[0], 2))

    def forward(self, weight):
        return weight + (self.up @ self.down).view(self.shape)


def dense_shape(layer):
    out, into = getattr(layer, "out_channels", 0), getattr(layer, "in_channels", 0)
    if not out:
        return layer.out_features, layer.in_features
    return (into, out, *layer.kernel_size) if layer.transposed else (out, into, *layer.kernel_size)


def low_rank(layer, x):
    """Changes the stored weight: the layer computes what its expanded weight says."""
    parametrize.register_parametrization(layer, "weight", LowRank(tuple(layer.weight.shape)))
    return layer.to_dense()(x), layer(x)


def adapter(layer, x):
    """As in peft: beside the layer another one of its class with fewer channels, then merged."""
    if hasattr(layer, "kernel_size"):
        sizes = layer.kernel_size, layer.stride, layer.padding
        down = type(layer)(layer.in_channels, 2, *sizes, bias=False)
        up = type(layer)(2, layer.out_channels, 1, bias=False)
    else:
        down, up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(up.weight)
    y = layer(x) + up(down(x))
    change = (up.weight.flatten(1) @ down.weight.flatten(1)).view(dense_shape(layer))
    layer.weight.data += change
    return y, layer(x)


TOOLS = {
    "fuse_bn_eval": with_norm(fuse_by_hand_of_torch),
    "ao fuse_modules": with_norm(lambda layer, norm: ao.fuse_modules(nn.Sequential(layer, norm), ["0", "1"])),
    "fx fuse": with_norm(lambda layer, norm: fuse(nn.Sequential(layer, norm).eval())),
    "to_mkldnn": mkldnn,
    "quantize_dynamic": sequential(lambda model, x: ao.quantize_dynamic(model, {nn.Linear, nn.Conv2d})),
    "prepare and convert": sequential(quantized),
    "prepare_qat": sequential(trained_quantized),
    "weight_norm": reparametrized(parametrizations.weight_norm),
    "prune": reparametrized(pruned),
    "low rank": low_rank,
    "adapter": adapter,
}
#: No layer can be right with these: they constrain the singular values of the stored weight.
REFUSED = {"spectral_norm": parametrizations.spectral_norm, "orthogonal": parametrizations.orthogonal}


def made(name, activation):
    torch.manual_seed(0)
    layer = LAYERS[name](activation=activation).eval()
    if not hasattr(layer, "kernel_size"):
        return layer, torch.randn(3, layer.in_features)
    return layer, torch.randn(3, layer.in_channels, *[5] * len(layer.kernel_size))


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_right_or_an_error(tool, activation):
    wrong = []
    for name in LAYERS:
        layer, x = made(name, activation)
        try:
            expected, y = TOOLS[tool](layer, x)
        except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, AssertionError):
            continue
        if y.shape != expected.shape or not torch.allclose(y, expected, atol=1e-4):
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("activation", [None, "relu"])
@torch.no_grad()
def test_what_reads_a_dense_weight_is_told_so(activation):
    for name in LAYERS:
        layer, x = made(name, activation)
        words = f"^{type(layer).__name__}: torch.* takes the stored weight .* tritonsym.materialize"
        with pytest.raises(ValueError, match=words):
            with_norm(fuse_by_hand_of_torch)(layer, x)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            with pytest.raises(ValueError, match=words):
                mkldnn(layer, x)
    plain = made("TiedConv2d free", None)[0].to_dense()
    expected, y = with_norm(fuse_by_hand_of_torch)(plain, torch.randn(2, 4, 5, 5))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("normalize", REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_norms_are_refused(normalize):
    for name in LAYERS:
        layer, x = made(name, None)
        if layer.weight.ndim < 2 or not layer.weight.numel():
            continue
        with pytest.raises(ValueError, match="acts on the stored weight"):
            normalize(layer)(x)


@torch.no_grad()
def test_a_change_of_the_dense_shape_is_refused():
    for name in LAYERS:
        layer, _ = made(name, None)
        if tuple(layer.weight.shape) != dense_shape(layer):
            with pytest.raises((ValueError, RuntimeError)):
                parametrize.register_parametrization(layer, "weight", LowRank(dense_shape(layer)))

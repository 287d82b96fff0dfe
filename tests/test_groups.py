"""Group convolutions and the layers of equivariant networks, against their definition written out in numpy."""

import itertools
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tritonsym
import tritonsym.functional as T
import tritonsym.nn as tnn
from tritonsym import Symmetry, fold, shift, symmetry
from tritonsym.spec import Geometry

F64 = torch.float64


def move(array, g):
    """An element's action on the last axes, by numpy."""
    array = np.rot90(array, g.turns, (-2, -1)) if g.turns else array
    return np.flip(array, [{"h": -1, "v": -2, "z": -3}[letter] for letter in g.flips]) if g.flips else array


def action(name):
    """All elements, each with its image of a marked cube."""
    cube = np.arange(27).reshape(3, 3, 3)
    return [(g, move(cube, g)) for g in Symmetry(name).elements]


def product(name, i, j):
    """The index of the element that acts as element j, then element i."""
    images = action(name)
    both = move(images[j][1], images[i][0])
    return next(k for k, (_, image) in enumerate(images) if np.array_equal(image, both))


def dense(psi, name):
    """W[g o, h c] = g psi[o, c, e] with g e = h."""
    elements = Symmetry(name).elements
    rows = []
    for i, g in enumerate(elements):
        inverse = {product(name, i, e): e for e in range(len(elements))}
        rows.append(np.concatenate([move(psi[:, :, inverse[h]], g) for h in range(len(elements))], 1))
    return torch.from_numpy(np.concatenate(rows, 0).copy())


@pytest.mark.parametrize("name", ["h", "hv", "hvz", "c2", "c4", "d4", "vz"])
def test_algebra(name):
    value = Symmetry(name)
    for i, j in itertools.product(range(value.order), repeat=2):
        assert value.products[i][j] == product(name, i, j)
    mirrors = [value.elements.index(g) for g in value.mirrors]
    assert all(product(name, i, i) == 0 for i in mirrors)
    assert all(product(name, i, j) == product(name, j, i) for i, j in itertools.product(mirrors, repeat=2))
    assert 2 ** len(mirrors) == {"c4": 2, "d4": 4}.get(name, value.order)


OPTIONS = {
    "h": ("h", (3,), {}),
    "h, even kernel, stride": ("h", (4,), {"stride": 2, "padding": 1}),
    "v": ("v", (3, 3), {"stride": 2, "padding": 1}),
    "h, oblong": ("h", (3, 5), {"padding": (0, 3), "dilation": (2, 1)}),
    "hv": ("hv", (3, 3), {"padding": 1}),
    "hv, groups": ("hv", (3, 3), {"stride": (2, 1), "padding": (1, 2), "groups": 2}),
    "hv, 1x1": ("hv", (1, 1), {"stride": 2}),
    "hv, same": ("hv", (2, 4), {"padding": "same", "dilation": (1, 2)}),
    "c2": ("c2", (3, 4), {"padding": 2}),
    "c4": ("c4", (3, 3), {"dilation": 2, "padding": 2}),
    "d4": ("d4", (3, 3), {"padding": 1}),
    "d4, groups": ("d4", (2, 2), {"groups": 3}),
    "hz": ("hz", (3, 2, 3), {"stride": (1, 2, 1), "padding": (1, 0, 1)}),
    "hvz": ("hvz", (3, 3, 3), {"padding": 1}),
}


def layer_and_input(name, kernel_size, options, **factory):
    groups = options.get("groups", 1)
    cls = getattr(tnn, f"GroupConv{len(kernel_size)}d")
    layer = cls(2 * groups, 3 * groups, kernel_size, symmetry=name, **options, **factory)
    return layer, torch.randn(3, layer.in_channels, *(6, 5, 4)[: len(kernel_size)], **factory)


def oracle(layer, x):
    """torch's convolution of every group of fields with the dense weight of the definition."""
    order, groups = layer.symmetry.order, layer.groups
    parts = x.unflatten(1, (order, groups, -1)).unbind(2)
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    outputs = []
    for part, psi in zip(parts, layer.weight.detach().chunk(groups), strict=True):
        weight = dense(psi.numpy(), layer.symmetry.name)
        y = conv(part.flatten(1, 2), weight, None, layer.stride, layer.padding, layer.dilation)
        outputs.append(y.unflatten(1, (order, -1)))
    y = torch.cat(outputs, 2)
    return (y + layer.bias.detach()[(None, None, slice(None), *[None] * (x.ndim - 2))]).flatten(1, 2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_way_of_folding_is_the_definition(case, last, convolved, monkeypatch):
    """The reference, and folding by any number of mirrors, with the other axes inside the product or not, and with
    convolutions as products or not; gradients against autograd through the reference."""
    monkeypatch.setattr(fold, "CONVOLVED_TERMS", 0)
    monkeypatch.setattr(shift, "is_convolved", lambda a, w: convolved)
    layer, x = layer_and_input(*OPTIONS[case], dtype=F64)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    inputs = [x.requires_grad_(), *layer.parameters()]
    y = layer(x)
    torch.testing.assert_close(y, oracle(layer, x.detach()))
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, dy)
    with tritonsym.path("fold"):
        got = layer(x)
        torch.testing.assert_close([got, *torch.autograd.grad(got, inputs, dy)], [y, *expected])
    spec = layer.spec
    padded = F.pad(x.detach(), [side for e in reversed(spec.geometry.extra) for side in (0, e)])
    text = tritonsym.groups.unpadded(spec.text)
    psi = layer.weight.detach()
    for axes, whole in itertools.product(range(1, len(layer.symmetry.mirrors) + 1), (False, True)):
        monkeypatch.setattr(fold, "chosen", lambda x, *_, a=axes, w=whole: fold.fold(text, a, tuple(x.shape[2:]), w))
        torch.testing.assert_close(fold.fprop(padded, psi, layer.bias.detach(), text, axes), y.detach())
        dx, dpsi = fold.backward(dy, padded, psi, text, axes, True, True)
        torch.testing.assert_close((dx[tuple(map(slice, x.shape))], dpsi), expected[:2])


@pytest.mark.parametrize("image", ["h r90", "h r270"])
def test_a_new_group_of_one_diagonal_reflection(image, monkeypatch):
    """As README says: a name in two tables. One diagonal keeps the corner that the other moves."""
    name = f"diagonal {image}"
    monkeypatch.setitem(symmetry._IMAGES, name, (image,))
    for has_mirror in (False, True):
        if has_mirror:
            monkeypatch.setitem(symmetry._MIRRORS, name, (image,))
        layer, x = tnn.GroupConv2d(2, 3, 3, padding=1, symmetry=name, dtype=F64), torch.randn(2, 4, 6, 6, dtype=F64)
        with tritonsym.path("reference"):
            expected = layer(x)
        with tritonsym.path("fold"):
            torch.testing.assert_close(layer(x), expected)
        tritonsym.testing.assert_equivariant(layer, x)
        fold.characters.cache_clear()
        fold.fold.cache_clear()
    for options in ({"stride": (1, 2)}, {"padding": (0, 1)}):
        stack = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, **options))
        with pytest.raises(ValueError, match="turns the axes"):
            tritonsym.replace_layers(stack, group=name)


@pytest.mark.parametrize("name", ["h", "d4", "hvz"])
def test_linear_is_the_definition(name):
    order = Symmetry(name).order
    layer, x = tnn.GroupLinear(3, 2, symmetry=name, dtype=F64), torch.randn(2, 5, 3 * order, dtype=F64)
    weight = dense(layer.weight.detach().numpy()[..., None, None, None], name).flatten(1)
    expected = x @ weight.mT + layer.bias.detach().repeat(order)
    torch.testing.assert_close(layer(x), expected)
    with tritonsym.path("fold"):
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.expanded_weight(), weight)


def test_where_all_axes_are_summed(monkeypatch):
    """For few positions; for gradients of many channels whose sums fit the cache; never if MKL is slow."""
    monkeypatch.setattr(shift, "mkl_is_slow", lambda: False)
    text = tnn.GroupConv2d(1, 1, 3, padding=1, symmetry="h").spec.text

    def whole(shape, backward):
        return fold.chosen(torch.empty(shape, device="meta"), text, 1, backward).whole

    assert whole((1, 256, 14, 14), False) and not whole((8, 256, 14, 14), False)
    assert whole((8, 256, 14, 14), True) and not whole((8, 128, 14, 14), True)
    assert not whole((1, 256, 64, 64), True)
    monkeypatch.setattr(shift, "mkl_is_slow", lambda: True)
    assert not whole((1, 256, 14, 14), False) and not whole((8, 256, 14, 14), True)


class Products(TorchDispatchMode):
    """The multiply-adds of all convolutions and batched products that are called, except products of the weights with
    one table. (torch's counter ignores groups in the backward pass.)"""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            self.count += result.numel() * args[1][0].numel()
        elif function is torch.ops.aten.bmm.default and 0 not in (args[0].stride(0), args[1].stride(0)):
            self.count += result.numel() * args[0].shape[2]
        elif function is torch.ops.aten.convolution_backward.default:
            self.count += sum(args[-1][:2]) * args[0].numel() * args[2][0].numel()
        return result


@pytest.mark.parametrize("case", OPTIONS)
def test_multiply_adds_that_are_called(case):
    """dense / |A| in the forward product, and twice that in the backward pass."""
    name, kernel_size, options = OPTIONS[case]
    if options.get("padding") == "same":
        options = {**options, "padding": 1}
    layer, x = layer_and_input(name, kernel_size, options)
    x.requires_grad_()
    counts = {}
    for path in ("reference", "fold"):
        with tritonsym.path(path), Products() as counter:
            y = layer(x)
            forward = counter.count
            y.sum().backward()
        counts[path] = forward, counter.count - forward
    folded = 2 ** len(layer.symmetry.mirrors)
    assert [folded * n for n in counts["fold"]] == list(counts["reference"])
    assert counts["fold"][1] == 2 * counts["fold"][0] > 0
    assert tritonsym.explain(layer, x).dense_flops == 2 * counts["reference"][0]


def test_chunks_and_empty_batches(monkeypatch):
    layer, x = layer_and_input(*OPTIONS["hv"], dtype=F64)
    monkeypatch.setattr(fold, "CHUNK_BYTES", 2 * 9 * x[0].numel() * 8)  # two images, then one
    expected = layer(x)
    with tritonsym.path("fold"):
        torch.testing.assert_close(layer(x), expected)
        assert layer(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize(("name", "lengths"), [("h", [3, 3, 2]), ("hv", [1] * 8)])
def test_chunks_of_a_convolution_grow_with_its_weight(name, lengths, monkeypatch):
    """It orders the weight for every chunk; a product of matrices does not."""
    symmetry, x = Symmetry(name), torch.empty(8, 8, 6, 6)
    layer = tnn.GroupConv2d(8 // symmetry.order, 2, 3, padding=1, symmetry=name)
    one = fold.fold(layer._spec(), len(symmetry.mirrors), (6, 6))
    image = 4 * one.values(8)
    for setting, value in (("CHUNK_BYTES", image), ("ORDERED", 10**6), ("MOST_BYTES", 3 * image)):
        monkeypatch.setattr(fold, setting, value)
    assert [len(x[n]) for n in one.images(x, one.weight(layer.weight))] == lengths


@pytest.mark.parametrize(("ndim", "form"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_memory_formats(ndim, form):
    """The layers take a model's format as torch's do; outputs have the format of the input on every path."""
    name = "hv"
    cls, x = getattr(tnn, f"GroupConv{ndim}d"), torch.randn(2, 8, *(5, 4, 3)[:ndim])
    layer = cls(2, 3, 3, padding=1, symmetry=name)
    expected = layer(x)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer = layer.to(memory_format=form)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    for path in ("reference", "fold"):
        with tritonsym.path(path):
            for y in (layer(x), layer(x.to(memory_format=form))):
                torch.testing.assert_close(y, expected)
            assert layer(x).is_contiguous() and y.is_contiguous(memory_format=form)
    assert layer.to(F64).weight.dtype == F64 and layer.to("meta").weight.is_meta
    layer.to_empty(device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_right_as_torch(dtype):
    layer, x = tnn.GroupConv2d(16, 16, 3, padding=1, symmetry="hv", dtype=dtype), torch.randn(2, 64, 9, 9, dtype=dtype)
    with tritonsym.path("fold"):
        y = layer(x).double()
    truth = layer.double()(x.double())
    naive = layer.to(dtype).to_dense()(x).double()
    assert (y - truth).square().mean().sqrt() <= 2 * (naive - truth).square().mean().sqrt()


# --- equivariance -----------------------------------------------------------------------------------------------------


def moved(x, name, i, regular):
    """Element i acts on images, or on fields: (g x)[h] = g (x[g^-1 h])."""
    g, order = Symmetry(name).elements[i], Symmetry(name).order
    image = torch.from_numpy(move(x.detach().numpy(), g).copy())
    if not regular:
        return image
    inverse = {product(name, i, e): e for e in range(order)}
    return image.unflatten(1, (order, -1))[:, [inverse[h] for h in range(order)]].flatten(1, 2)


@pytest.mark.parametrize("name", ["h", "hv", "c2", "c4", "d4"])
def test_layers_follow_the_group(name):
    torch.manual_seed(1)
    order = Symmetry(name).order
    net = nn.Sequential(
        tnn.SymmetricConv2d(2, 2 * order, 3, padding=1, symmetry=name, share_bias=True),
        tnn.GroupBatchNorm2d(2, name),
        nn.ReLU(),
        tnn.GroupConv2d(2, 4, 3, padding=1, symmetry=name),
        tnn.GroupConv2d(4, 4, 3, padding=1, groups=2, symmetry=name, activation="silu"),
        tnn.GroupDropout(0.5, symmetry=name),
    ).double()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), tnn.GroupLinear(4, 3, symmetry=name)).double()
    pool, x = tnn.GroupPool(name), torch.randn(2, 2, 6, 6, dtype=F64)

    def run(x):
        torch.manual_seed(2)  # the same mask
        y = net(x)
        return y, pool(y), pool(head(y))

    fields, image, number = run(x)
    for i in range(order):
        a, b, c = run(moved(x, name, i, False))
        torch.testing.assert_close(a, moved(fields, name, i, True))
        torch.testing.assert_close(b, moved(image, name, i, False))
        torch.testing.assert_close(c, number)


def test_a_deep_network_stays_equivariant():
    layers = [tnn.SymmetricConv2d(1, 16, 3, padding=1, symmetry="d4", share_bias=True)]
    for _ in range(19):
        layers += [tnn.GroupBatchNorm2d(2, "d4"), nn.ReLU(), tnn.GroupConv2d(2, 2, 3, padding=1, symmetry="d4")]
    net, x = nn.Sequential(*layers).eval(), torch.randn(1, 1, 9, 9)
    plain = tritonsym.materialize(net)
    errors = []
    for model, dtype in ((net, F64), (net, torch.float32), (plain, torch.float32)):
        model, x = model.to(dtype), x.to(dtype)
        y = model(x).detach()
        errors.append(max((moved(y, "d4", i, True) - model(moved(x, "d4", i, False))).abs().max() for i in range(8)))
        errors[-1] /= y.abs().max()
    assert errors[0] < 1e-10
    assert errors[1] <= 2 * errors[2] < 1e-4


# --- layers without products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [0, 1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_batch_norm_shares_statistics(ndim, last):
    cls = (tnn.GroupBatchNorm1d, tnn.GroupBatchNorm1d, tnn.GroupBatchNorm2d, tnn.GroupBatchNorm3d)[ndim]
    norm, x = cls(3, "hv", dtype=F64), 2 + torch.randn(5, 12, *(4, 3, 2)[:ndim], dtype=F64)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    fields = x.unflatten(1, (4, 3))
    axes = [axis for axis in range(fields.ndim) if axis != 2]
    mean, var = fields.mean(axes, keepdim=True), fields.var(axes, keepdim=True, correction=0)
    y = norm(x)
    torch.testing.assert_close(y, ((fields - mean) / (var + 1e-5).sqrt()).flatten(1, 2))
    assert y.stride() == x.stride()
    torch.testing.assert_close(norm.running_mean, 0.1 * mean.flatten())
    norm.eval()
    torch.testing.assert_close(norm.to_dense()(x), norm(x))
    assert type(norm.to_dense()).__module__.startswith("torch.")


def test_pool_and_dropout():
    x = torch.randn(200, 12, 2, dtype=F64)
    for reduce, expected in (("max", x.view(200, 4, 3, 2).amax(1)), ("mean", x.view(200, 4, 3, 2).mean(1))):
        torch.testing.assert_close(tnn.GroupPool("hv", reduce)(x), expected)
    drop = tnn.GroupDropout(0.25, symmetry="hv")
    ratio = (drop(x) / x).view(200, 4, 3, 2)
    torch.testing.assert_close(ratio, 4 / 3 * (ratio > 0).double())
    assert ((ratio > 0) == (ratio > 0)[:, :1, :, :1]).all() and 0.65 < (ratio > 0).double().mean() < 0.85
    assert drop.eval()(x) is x


# --- conversions ------------------------------------------------------------------------------------------------------


def test_from_dense_projects():
    """What is lost is orthogonal to all equivariant weights; 'keep' takes the filters of the identity."""
    plain = nn.Conv2d(8, 16, 3, stride=2, padding=1, dtype=F64)
    layer = tnn.GroupConv2d.from_dense(plain, symmetry="d4")
    assert (layer.in_fields, layer.out_fields, layer.stride) == (1, 2, (2, 2))
    lost = plain.weight - layer.expanded_weight()
    for _ in range(3):
        other = dense(torch.randn_like(layer.weight).numpy(), "d4")
        assert (lost * other).sum().abs() < 1e-12
    again = tnn.GroupConv2d.from_dense(layer.to_dense(), symmetry="d4")
    torch.testing.assert_close(again.weight, layer.weight)
    torch.testing.assert_close(layer.bias, plain.bias.view(8, 2).mean(0))
    kept = tnn.GroupConv2d.from_dense(plain, symmetry="d4", init="keep")
    torch.testing.assert_close(kept.expanded_weight()[:2], plain.weight[:2])
    linear = nn.Linear(8, 12)
    line = tnn.GroupLinear.from_dense(linear, symmetry="hv")
    torch.testing.assert_close(tnn.GroupLinear.from_dense(line.to_dense(), symmetry="hv").weight, line.weight)


def test_from_dense_with_groups():
    """Every group is converted as if alone."""
    plain = nn.Conv2d(16, 24, 3, groups=2, dtype=F64)
    for init in ("project", "rescale", "keep"):
        layer = tnn.GroupConv2d.from_dense(plain, symmetry="hv", init=init)
        alone = nn.Conv2d(8, 12, 3, dtype=F64)
        for part, weight, bias in zip((0, 1), plain.weight.chunk(2), plain.bias.chunk(2), strict=True):
            alone.weight.data, alone.bias.data = weight.data, bias.data
            one = tnn.GroupConv2d.from_dense(alone, symmetry="hv", init=init)
            at = slice(3 * part, 3 * part + 3)
            torch.testing.assert_close((layer.weight[at], layer.bias[at]), (one.weight, one.bias))
    again = nn.Conv2d(16, 24, 3, groups=2, dtype=F64)
    again.weight.data, again.bias.data = layer.expanded_weight().detach(), layer.expanded_bias().detach()
    torch.testing.assert_close(tnn.GroupConv2d.from_dense(again, symmetry="hv").state_dict(), layer.state_dict())


def test_grouped_layers_are_plain_after_to_dense():
    layer, x = layer_and_input(*OPTIONS["hv, groups"], dtype=F64)
    plain = layer.to_dense()
    torch.testing.assert_close(plain(x), layer(x))
    assert all(type(m).__module__.startswith("torch.") for m in plain.modules())


def test_initialisation():
    layer, plain = tnn.GroupConv2d(16, 16, 3, symmetry="hv"), nn.Conv2d(64, 64, 3)
    assert abs(layer.expanded_weight().var() / plain.weight.var() - 1) < 0.1
    for init in (nn.init.kaiming_normal_, nn.init.xavier_uniform_):  # these see the shape of the weight
        assert abs(init(layer.weight).var() / init(plain.weight).var() - 1) < 0.1
    start = time.perf_counter()
    tnn.GroupConv2d(64, 64, 3, symmetry="d4")
    assert time.perf_counter() - start < 1  # milliseconds on an idle machine


# --- plans ------------------------------------------------------------------------------------------------------------


def planned(name, channels, batch, *sizes, kernel=3, **options):
    order = Symmetry(name).order
    cls = getattr(tnn, f"GroupConv{len(sizes)}d")
    layer = cls(channels // order, channels // order, kernel, padding=kernel // 2, symmetry=name, device="meta")
    with torch.no_grad():
        return tritonsym.explain(layer, torch.empty(batch, channels, *sizes, device="meta"), **options)


def test_plans():
    wide, narrow = planned("hv", 1280, 2, 16, 16), planned("hv", 16, 2, 16, 16)
    assert (wide.path, wide.axes, narrow.path) == ("fold", 2, "reference")
    assert "cost more" in narrow.why and "Characters of 2 mirrors" in wide.why
    assert 3.7 < wide.dense_flops / wide.flops < 4
    assert "(estimate)" in planned("hv", 1280, 2, 16, 16, target="sm_90").why
    with tritonsym.backend("reference"):
        assert planned("hv", 1280, 2, 16, 16).path == "reference"
    with tritonsym.path("fold"):
        assert planned("hv", 16, 2, 16, 16).axes == 2
    assert planned("hv", 320, 1, 64, 64).axes == 1  # with two, the sums of an image would not fit the cache
    assert planned("hv", 64, 1, 4096, 4096).path == "reference"  # the tables would take gigabytes


@pytest.mark.parametrize(("is_slow", "expected"), [(False, [0, 1, 2]), (True, [0, 0, 2])])
def test_each_kind_of_cpu_has_its_rule(is_slow, expected, monkeypatch):
    """Where MKL is slow, the values of products of matrices cost twice as much."""
    monkeypatch.setattr(shift, "mkl_is_slow", lambda: is_slow)
    tritonsym.plan.forget()
    found = []
    for name, channels, kernel, size, trains in (
        ("h", 64, 3, 32, True),
        ("h", 256, 1, 28, True),
        ("hv", 256, 3, 28, True),
    ):
        fields = channels // Symmetry(name).order
        layer = tnn.GroupConv2d(fields, fields, kernel, padding=kernel // 2, symmetry=name)
        x = torch.empty(8, channels, size, size)
        found.append(tritonsym.explain(layer.requires_grad_(trains), x).axes)
    tritonsym.plan.forget()
    assert found == expected


@pytest.mark.parametrize("matrices", [False, True])
def test_dtypes_that_fold(matrices, monkeypatch):
    """Of the 16-bit dtypes only bfloat16, on CPUs without matrix instructions for it."""
    monkeypatch.setattr(tritonsym.plan, "multiplies_bfloat16", lambda: matrices)
    tritonsym.plan.forget()
    folded = set()
    for dtype in (torch.float32, F64, torch.bfloat16, torch.float16):
        layer = tnn.GroupConv2d(320, 320, 3, padding=1, symmetry="hv", dtype=dtype, device="meta")
        if tritonsym.explain(layer, torch.empty(2, 1280, 16, 16, device="meta", dtype=dtype)).path == "fold":
            folded.add(dtype)
    tritonsym.plan.forget()
    assert folded == {torch.float32, F64} | (set() if matrices else {torch.bfloat16})


def test_functions_are_the_layers():
    layer, x = layer_and_input(*OPTIONS["hv, groups"], dtype=F64)
    y = T.group_conv2d(x, layer.weight, layer.bias, (2, 1), (1, 2), groups=2, symmetry="hv", activation="relu")
    torch.testing.assert_close(y, layer(x).relu())
    line, row = tnn.GroupLinear(3, 2, symmetry="c4", dtype=F64), torch.randn(5, 12, dtype=F64)
    torch.testing.assert_close(T.group_linear(row, line.weight, line.bias, symmetry="c4"), line(row))


def test_spec_as_text():
    spec = fold.GroupSpec(Symmetry("d4"), 2, Geometry((3, 3), (2, 1), (1, 1), (1, 2), (0, 1)))
    assert fold.GroupSpec.of(spec.text) == spec


def test_a_network_becomes_plain_torch():
    net = nn.Sequential(
        tnn.SymmetricConv2d(2, 8, 3, padding=1, symmetry="hv", share_bias=True),
        tnn.GroupBatchNorm2d(2, "hv"),
        tnn.GroupConv2d(2, 3, 3, symmetry="hv", activation="relu"),
        tnn.GroupDropout(0.5, symmetry="hv"),
        tnn.GroupPool("hv", "mean"),
    )
    x = torch.randn(2, 2, 6, 6)
    net(x)
    with pytest.raises(ValueError, match=r"GroupBatchNorm2d.to_dense: .*call eval\(\)"):
        tritonsym.materialize(net)
    plain = tritonsym.materialize(net.eval())
    torch.testing.assert_close(plain(x), net(x))
    assert not any(type(m).__module__.startswith("tritonsym") for m in plain.modules())
    plain.train()[3](torch.randn(2, 12, 4, 4))  # still drops whole fields
    assert [name for name, _ in tritonsym.explain(net, x)] == ["0", "2"]

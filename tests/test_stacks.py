"""`replace_layers(model, group=...)`: plain stacks made equivariant, and what is refused."""

import copy
import json
import re

import pytest
import torch
from torch import nn

import tritonsym.nn as tnn
from tritonsym import replace_layers
from tritonsym.testing import assert_equivariant

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def trunk(ndim=2, **options):
    conv, norm = CONVS[ndim], NORMS[ndim]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(conv(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU()),
        nn.Sequential(conv(16, 24, 3, padding=1, **options), nn.Identity(), nn.GELU(), nn.Dropout(0.3)),
        conv(24, 16, 1),
    )
    with torch.no_grad():
        for value in model[0][1].state_dict().values():
            if value.ndim:
                value.uniform_(0.5, 1.5)
    return model.eval()


def head(ndim=2):
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[ndim - 1]
    return nn.Sequential(pool(1), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5))


STACKS = {"h": (1, (7,)), "h of images": (2, (6, 5)), "hv": (2, (6, 5)), "c4": (2, (5, 5)), "d4": (2, (5, 5))}
STACKS |= {"hvz": (3, (3, 4, 5))}


@pytest.mark.parametrize("init", ["rescale", "keep", "reset"])
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("with_head", [False, True])
def test_the_output_follows_the_input(name, with_head, init):
    group, (ndim, sizes) = name.split()[0], STACKS[name]
    plain = trunk(ndim)
    plain = nn.Sequential(plain, head(ndim)).eval() if with_head else plain
    before = copy.deepcopy(plain.state_dict())
    model, report = replace_layers(plain, group=group, init=init)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    x = torch.randn(2, 3, *sizes)
    assert_equivariant(model, x, group)
    y, order = model(x), tnn.GroupPool(group).order
    assert y.shape == ((2, 5) if with_head else (2, 16 // order, *sizes)) and y.std() > 0
    convs = [m.numel() for m in plain.parameters() if m.ndim > 2]
    stored = sum(m.numel() for m in model.parameters() if m.ndim > 2)
    assert stored == sum(convs) // order
    if not with_head:
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) // order
    assert sum(p.numel() for p in model.parameters()) == report.model_parameters_after
    assert [row.name.split(".")[-1] for row in report][:4] == ["0", "1", "0", "3"]
    assert {row.symmetry for row in report} == {group} and str(report)
    assert report.multiply_adds_after is not None and report.multiply_adds_after < report.multiply_adds_before


@pytest.mark.parametrize("group", ["h", "hv", "c4", "d4"])
def test_equivariant_filters_keep_their_outputs(group):
    """A network of group layers is made plain and converted back."""
    order = tnn.GroupPool(group).order
    options = {"padding": 1, "symmetry": group}
    net = nn.Sequential(
        tnn.SymmetricConv2d(3, 2 * order, 3, share_bias=True, **options),
        tnn.GroupBatchNorm2d(2, group),
        nn.SiLU(),
        tnn.GroupConv2d(2, 3, 3, stride=2, **options),
    )
    x = torch.randn(4, 3, 7, 7)
    net.train()(x)  # sets the statistics
    net.eval()
    plain = nn.Sequential(*(m.to_dense() if hasattr(m, "to_dense") else m for m in net))
    torch.testing.assert_close(replace_layers(plain, group=group)[0](x), tnn.GroupPool(group, "mean")(net(x)))
    top = nn.Sequential(plain, nn.AdaptiveMaxPool2d((1, 1)), nn.Flatten(), nn.ReLU(), nn.Linear(3 * order, 4)).eval()
    with torch.no_grad():
        top[-1].weight.copy_(top[-1].weight[:, :3].repeat(1, order))
    model, report = replace_layers(top, group=group)
    torch.testing.assert_close(model(x), top(x))
    assert all(row.projection_error is None or row.projection_error < 1e-6 for row in report)
    torch.testing.assert_close([row.scale for row in report if row.scale], [1.0] * 3)


def test_rescaled_filters_have_the_norms_they_had():
    plain = nn.Conv2d(16, 24, 3)
    layer = tnn.GroupConv2d.from_dense(plain, symmetry="hv", init="rescale")
    for field in range(6):
        ours, theirs = (w[field::6].norm() for w in (layer.expanded_weight(), plain.weight))
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        plain.weight.zero_()
    assert not tnn.GroupConv2d.from_dense(plain, symmetry="hv", init="rescale").weight.any()


def test_it_trains_and_keeps_what_requires_a_gradient():
    plain = nn.Sequential(trunk(), head())
    plain[0][0][1].requires_grad_(False)
    plain[1][2].weight.requires_grad_(False)
    model, _ = replace_layers(plain.train().double(), group="d4", inplace=True)
    assert model is plain and all(m.training for m in model.modules())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["0.0.1.weight", "0.0.1.bias", "1.2.1.weight"]
    model(torch.randn(4, 3, 9, 9, dtype=torch.float64)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_strides_are_noted():
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 8, 4, (3, 1), 1, dilation=(2, 1))
    )
    model, report = replace_layers(plain, group="hv")
    first, last = (row.note for row in report)
    assert first == "stride 2: equivariant on sizes n with n % 2 == 1"
    assert last == "stride 3: equivariant on sizes n with n % 3 == 2; 4 (GroupPool) leaves 1/4 channels"
    assert [tuple(vars(s).values()) for s in report.skipped] == [
        ("1", "MaxPool2d", "stride 2: equivariant on sizes n with n % 2 == 0")
    ]
    assert_equivariant(model, torch.randn(1, 3, 31, 31), "hv")
    with pytest.raises(AssertionError, match=r"0 \(SymmetricConv2d\).*with stride 2"):
        assert_equivariant(model, torch.randn(1, 3, 32, 31), "hv")


def conv(*args, **options):
    return nn.Conv2d(*(args or (8, 8, 3)), **options)


def hooked():
    layer = nn.ReLU()
    layer.register_forward_hook(lambda *_: None)
    return layer


def sharing(layer):
    other = conv()
    other.weight = layer.weight
    return other


twice = conv()
REFUSED = {
    "no counterpart": ([nn.Upsample(2), nn.PReLU(8)], ["1 (Upsample): it has no equi", "2 (PReLU): it has no equi"]),
    "another norm": ([nn.GroupNorm(2, 8)], ["1 (GroupNorm): it has no equivariant counterpart"]),
    "transposed": ([nn.ConvTranspose2d(8, 8, 3)], ["1 (ConvTranspose2d): it has no equivariant counterpart"]),
    "a block": ([nn.Sequential(nn.ReLU(), nn.ModuleList())], ["1.1 (ModuleList): it has no"]),
    "channels": (
        [conv(8, 6, 3), nn.BatchNorm2d(6)],
        ["1 (Conv2d): GroupConv2d.from_dense: out_channels=6", "2 (Batch"],
    ),
    "groups": ([conv(8, 8, 3, groups=2)], ["1 (Conv2d): groups=2 divide the channels of fields"]),
    "even and same": ([conv(8, 8, 4, padding="same")], ["1 (Conv2d): Conv2d: padding='same' of an even kernel"]),
    "hooks": ([hooked()], ["1 (ReLU): it has hooks"]),
    "parametrizations": ([nn.utils.parametrizations.weight_norm(conv())], ["1 (ParametrizedConv2d): it has no equi"]),
    "shared weights": (
        [twice, sharing(twice)],
        ["1 (Conv2d): its weight is shared: ", "2 (Conv2d): its weight is shared"],
    ),
    "twice": ([twice, twice], ["2 (Conv2d): it is called more than once"]),
    "indices": ([nn.MaxPool2d(3, 1, return_indices=True)], ["1 (MaxPool2d): return_indices=True"]),
    "flattened positions": ([nn.Flatten(), nn.Linear(72, 2)], ["1 (Flatten): it turns positions into channels"]),
    "positions again": ([nn.AdaptiveAvgPool2d(1), conv(8, 8, 1, padding=1), nn.Flatten()], ["3 (Flatten): it turns"]),
    "another axis": ([nn.Linear(3, 3)], ["1 (Linear): it acts on the last axis; put Flatten"]),
    "after Flatten": ([nn.AdaptiveMaxPool2d(1), nn.Flatten(), conv()], ["3 (Conv2d): Flatten has left no positions"]),
    "decoder": (
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Unflatten(1, (8, 1, 1))],
        ["4 (Unflatten): no layer of vectors"],
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, inplace):
    layers, reasons = REFUSED[name]
    model = nn.Sequential(conv(3, 8, 3), *layers)
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=r"^replace_layers: group='hv' is for plain stacks.*nothing was changed") as e:
        replace_layers(model, group="hv", inplace=inplace)
    for reason in reasons:
        assert re.search(re.escape(reason), str(e.value)), str(e.value)
    assert str(e.value).count("\n") == len(reasons)
    assert list(model.named_modules()) == before


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("model", "group", "words"),
    [
        (nn.Conv2d(3, 8, 3), "z", "flips an axis that a 2-D layer"),
        (Residual(nn.Conv2d(8, 8, 3)), "hv", "(model) (Residual): it has no equivariant counterpart"),
        (nn.Sequential(nn.ReLU()), "hv", "(model) (Sequential): it is no Sequential with a convolution"),
        (nn.Sequential(nn.Conv2d(3, 8, 1)), "hv", "0 (Conv2d): its kernel has size 1 along 'hv'"),
        (nn.Sequential(nn.Conv2d(3, 6, 3)), "hv", "0 (Conv2d): Conv2d: out_channels=6 channels are no whole fields"),
        (nn.Sequential(nn.Conv2d(3, 8, (3, 5))), "d4", "0 (Conv2d): Conv2d: symmetry 'd4' needs a square kernel"),
        (nn.Sequential(nn.Conv2d(3, 8, 3, (1, 2))), "c4", "'c4' turns the axes, whose stride differ"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d((2, 3))),
            "d4",
            "1 (MaxPool2d): MaxPool2d: symmetry 'd4' needs",
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), "hvz", "symmetry 'hvz' flips an axis"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), "radial", "'radial' has no elements"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), "hx", "unknown name 'hx'"),
    ],
)
def test_models_and_groups_that_are_refused(model, group, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        replace_layers(model, group=group)


def test_groups_go_with_nothing_else():
    for options in ({"conv": "hv"}, {"linear": True}, {"rule": lambda *_: None}):
        with pytest.raises(ValueError, match=r"^replace_layers: group='hv' replaces every layer; pass no conv"):
            replace_layers(nn.Sequential(conv()), group="hv", **options)


@pytest.mark.parametrize("with_head", [False, True])
def test_a_recipe_builds_the_stack_again(with_head):
    plain = nn.Sequential(trunk(), head()) if with_head else trunk()
    model, report = replace_layers(plain, group="d4")
    recipe = json.loads(json.dumps(report.recipe))
    again, second = replace_layers(copy.deepcopy(plain).apply(reset), recipe)
    assert repr(again) == repr(model) and second.recipe == report.recipe
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(again.eval()(x), model.eval()(x))
    names = list(dict(plain.named_modules()))
    for other, options in ((recipe | {"layers": ["9"]}, {}), (recipe, {"group": "hv"}), (recipe, {"linear": True})):
        with pytest.raises(ValueError, match=r"^replace_layers: .*(recipe|group)"):
            replace_layers(plain, other, inplace=True, **options)
    assert list(dict(plain.named_modules())) == names
    with pytest.raises(ValueError, match="the recipe has version 2, expected 1"):
        replace_layers(plain, recipe | {"tritonsym": 2})


def reset(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def test_the_report_tells_what_became_of_the_head():
    plain = nn.Sequential(trunk(), head())
    weight = plain[1][2].weight.detach()
    nearest = weight.unflatten(1, (4, 4)).mean(1, keepdim=True).expand(-1, 4, -1).flatten(1)
    row = {row.name: row for row in replace_layers(plain, group="hv")[1]}["1.2"]
    assert row.projection_error == pytest.approx(((nearest - weight).norm() / weight.norm()).item(), rel=1e-5)
    assert row.scale == pytest.approx(1, rel=1e-6)
    with torch.no_grad():
        plain[1][2].weight.copy_(nearest)
    row = {row.name: row for row in replace_layers(plain, group="hv")[1]}["1.2"]
    assert row.projection_error < 1e-6

"""Converting whole models: what is replaced, what is kept, what is left alone and why, and the way back."""

import copy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import tritonsym
import tritonsym.nn as tnn
from tritonsym import Symmetry, load_cnn_symmetry, materialize, replace_layers


class Conv2dSame(nn.Conv2d):
    """A subclass with its own forward, as in image models."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Named(nn.Conv2d):
    """A subclass that computes what its base does."""


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2, padding_mode="circular")

    def forward(self, x):
        return x + self.conv2(self.norm(self.conv1(x)).relu())


class Zoo(nn.Module):
    """A small network with one layer of every kind that models use."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, (5, 3), stride=2, padding=(2, 1), padding_mode="reflect")
        self.blocks = nn.ModuleList([Residual(16), nn.Sequential(nn.ReLU(), Residual(16))])
        self.depthwise = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.same = Conv2dSame(16, 16, 2)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.shared = nn.Conv2d(8, 8, 3, padding="same")
        self.again = nn.ModuleDict({"same layer": self.shared})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.up(self.same(self.pointwise(self.depthwise(x)).relu()))
        x = self.again["same layer"](self.shared(x).relu())
        x = x.flatten(2).mT
        x = x + self.attention(x, x, x)[0]
        return self.head(self.mix(x.mean(1)).tanh())


REPLACED = {  # by conv='hv', linear=True
    "stem": "SymmetricConv2d",
    "blocks.0.conv1": "SymmetricConv2d",
    "blocks.0.conv2": "SymmetricConv2d",
    "blocks.1.1.conv1": "SymmetricConv2d",
    "blocks.1.1.conv2": "SymmetricConv2d",
    "up": "SymmetricConvTranspose2d",
    "shared": "SymmetricConv2d",
    "mix": "SymmetricLinear",
}
SKIPPED = {
    "depthwise": "one filter per group, without images beside it: conv='tied:...', or TiedConv2d by a rule, ties taps",
    "pointwise": "size 1",
    "same": "a subclass of Conv2d; pass subclasses=True",
    "attention.out_proj": "MultiheadAttention reads its weight directly",
    "head": "in_features=8 and out_features=5",
}


def zoo():
    torch.manual_seed(0)
    return Zoo().double()


def image():
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 10, dtype=torch.float64)


def dense(cls=nn.Conv2d, **options):
    """A torch layer of these sizes, unless the options say otherwise."""
    if cls is nn.Linear:
        return nn.Linear(12, 12, **options)
    return cls(**{"in_channels": 8, "out_channels": 16, "kernel_size": 3, **options})


def names(report):
    return [row.name for row in report]


def reasons(report):
    return {skip.name: skip.reason for skip in report.skipped}


@contextmanager
def unchanged(model):
    """Check that the block leaves the model's modules, values, requires_grad flags and training modes unchanged."""

    def switches():
        return [p.requires_grad for p in model.parameters()], [module.training for module in model.modules()]

    modules, values, before = list(model.modules()), copy.deepcopy(model.state_dict()), switches()
    yield
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert model.state_dict().keys() == values.keys() and switches() == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


both_places = pytest.mark.parametrize("inplace", [False, True])


# --- replace_layers: the whole model ----------------------------------------------------------------------------------


def test_a_model_is_replaced_where_the_symmetry_fits_and_the_report_says_why_not_elsewhere():
    model = zoo()
    with unchanged(model):
        converted, report = replace_layers(model, conv="hv", linear=True)
    assert {row.name: row.after for row in report} == REPLACED
    modules = dict(converted.named_modules())
    assert {name: type(modules[name]).__name__ for name in REPLACED} == REPLACED
    assert reasons(report).keys() == SKIPPED.keys()
    for name, reason in reasons(report).items():
        assert SKIPPED[name] in reason
        assert type(modules[name]) is type(model.get_submodule(name))
    assert not {id(p) for p in converted.parameters()} & {id(p) for p in model.parameters()}


def test_the_report_counts():
    original = zoo()
    conv = {"hv": "50%", "h": 4}
    model, report = replace_layers(original, conv, linear=True)
    assert isinstance(report, Sequence) and len(report) == len(list(report)) == len(REPLACED)
    stem = report[0]
    what = (stem.name, stem.before, stem.after, stem.symmetry)
    assert what == ("stem", "Conv2d", "SymmetricConv2d", "h:4 hv:8 free:4")
    stored = 2 + 2 + 4  # base filters of h, of hv, free
    assert (stem.parameters_before, stem.parameters_after) == (16 * 45 + 16, stored * 45 + 16)
    assert (stem.multiply_adds_before, stem.multiply_adds_after) == (16 * 45, stored * 45)
    up = next(row for row in report if row.name == "up")  # 8 outputs in 2 groups: h 4, hv 0 (below one orbit per group)
    assert (up.symmetry, up.multiply_adds_before, up.multiply_adds_after) == ("h:4 free:4", 16 * 4 * 9, 16 * 3 * 9)
    mix = report[-1]
    assert (mix.symmetry, mix.parameters_after, mix.multiply_adds_after) == ("symmetric", 8 * 9 // 2 + 8, 64)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (original, model))
    assert report.parameters_before - report.parameters_after == before - after
    assert report.multiply_adds_before == sum(row.multiply_adds_before for row in report)
    assert report.multiply_adds_after == sum(row.multiply_adds_after for row in report)
    for row in report:
        weight, layer = original.get_submodule(row.name).weight, model.get_submodule(row.name)
        projected, _ = replace_layers(
            nn.Sequential(original.get_submodule(row.name)), conv, linear=True, init="project"
        )
        nearest = projected[0].expanded_weight()
        assert row.projection_error == pytest.approx(((nearest - weight).norm() / weight.norm()).item(), rel=1e-12)
        assert row.scale == pytest.approx((layer.expanded_weight().norm() / nearest.norm()).item(), rel=1e-12)
        assert 0 < row.projection_error < 1 < row.scale
    assert (report.model_parameters_before, report.model_parameters_after) == (before, after)


def test_the_report_prints_aligned_rows_totals_and_reasons():
    model, report = replace_layers(zoo(), conv="hv", linear=True, rule=lambda name, _: name != "up")
    table, skipped = str(report).split("\n\n")
    header, *rows, total, whole = table.splitlines()
    assert [row.split()[0] for row in rows] == ["stem", "blocks.0.conv1", "blocks.0.conv2", "shared", "mix"]
    assert [row.split(" Conv2d")[0].strip() for row in rows[1:3]] == [f"blocks.0.conv{i} and 1 more" for i in (1, 2)]
    assert len({line.index("->") for line in (*rows, total, whole)}) == 1
    assert total.startswith(f"total of {len(report)}") and f"{report.parameters_after:,}" in total
    assert whole.startswith("whole model") and f"{sum(p.numel() for p in model.parameters()):,}" in whole
    assert header.index("symmetry") == rows[0].index("hv:16")
    assert skipped.splitlines()[0] == f"skipped {len(report.skipped)}:"
    for line, skip in zip(skipped.splitlines()[1:], report.skipped, strict=True):
        assert line.startswith(skip.name) and line.endswith(skip.reason)
    assert "up  " in skipped and "left alone by the rule" in skipped


def test_a_conversion_that_does_nothing_warns():
    with pytest.warns(UserWarning, match="nothing was replaced .there is no such layer"):
        _, empty = replace_layers(nn.ReLU(), conv="hv")
    assert len(empty) == 0 and "total of 0" in str(empty) and "skipped" not in str(empty)
    with pytest.warns(UserWarning, match="nothing was replaced .1: its kernel has size 1"):
        replace_layers(nn.Sequential(nn.ReLU(), nn.Conv2d(2, 4, 1)), conv="hv")


def test_the_converted_model_trains_and_stays_symmetric():
    model, _ = replace_layers(zoo(), conv="hv", linear=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    target, losses = torch.randn(2, 5, dtype=torch.float64), []
    start = copy.deepcopy(model)
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(image()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, kind in REPLACED.items():
        layer = model.get_submodule(name)
        assert not torch.equal(layer.weight, start.get_submodule(name).weight)
        weight = layer.expanded_weight()
        if kind == "SymmetricLinear":
            assert torch.equal(weight, weight.mT)
        else:  # four equal parts of every group: the base filters and their images
            parts = weight.chunk(4, 1) if layer.transposed else weight.unflatten(0, (layer.groups, 4, -1)).unbind(1)
            for part, flips in zip(parts[1:], ([-1], [-2], [-1, -2]), strict=True):
                assert torch.equal(part, parts[0].flip(flips))


def test_inplace_edits_the_model_itself():
    model = zoo()
    inner = model.blocks[0]
    expected = replace_layers(model, conv="hv")[0](image())
    converted, _ = replace_layers(model, conv="hv", inplace=True)
    assert converted is model and model.blocks[0] is inner
    assert isinstance(inner.conv1, tnn.SymmetricConv2d)
    assert torch.equal(model(image()), expected)


def test_a_shared_layer_is_replaced_once_and_stays_shared():
    model, report = replace_layers(zoo(), conv="h")
    assert model.shared is model.again["same layer"] and isinstance(model.shared, tnn.SymmetricConv2d)
    assert [name for name in names(report) if "same layer" in name or name == "shared"] == ["shared"]
    plain = materialize(model)
    assert plain.shared is plain.again["same layer"] and type(plain.shared) is nn.Conv2d


@both_places
def test_a_model_that_is_itself_a_layer_is_returned_replaced(inplace):
    layer = nn.Conv2d(2, 4, 3)
    with unchanged(layer):
        converted, report = replace_layers(layer, conv="hv", inplace=inplace)
    assert type(converted) is tnn.SymmetricConv2d and report[0].name == "" and "(model)" in str(report)
    plain = materialize(converted, inplace=inplace)
    assert type(plain) is nn.Conv2d and type(converted) is tnn.SymmetricConv2d
    wrapper = tnn.Symmetrize(converted, over="flip")
    assert type(materialize(wrapper, inplace=inplace).inner) is nn.Conv2d and wrapper.inner is converted


# --- replace_layers: one layer ----------------------------------------------------------------------------------------

LAYERS = [
    (nn.Conv1d, {"padding": 1, "stride": 2}, "h"),
    (nn.Conv2d, {"padding": "same", "dilation": 2, "groups": 2}, "hv"),
    (nn.Conv2d, {"padding": (1, 2), "padding_mode": "circular", "bias": False}, {"d4": 8}),
    (nn.Conv2d, {"kernel_size": (2, 5), "stride": (1, 2)}, {"h": 4, "v": "50%"}),
    (nn.Conv3d, {"padding": 1, "groups": 4}, {"z": 8, "hv": "20%"}),
    (nn.ConvTranspose1d, {"stride": 3, "padding": 1, "output_padding": 2}, "h"),
    (nn.ConvTranspose2d, {"groups": 2, "dilation": 2, "stride": 2}, {"c4": 8}),
    (nn.ConvTranspose3d, {"kernel_size": (1, 2, 3), "bias": False}, {"hv": 4, "h": 2}),
    (nn.Linear, {}, "symmetric"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("init", ["rescale", "project", "keep", "reset"])
@pytest.mark.parametrize(("cls", "options", "symmetry"), LAYERS)
def test_a_layer_becomes_what_from_dense_makes_of_it(cls, options, symmetry, init, dtype):
    layer = dense(cls, **options, dtype=dtype).eval()
    layer.weight.requires_grad_(False)
    kind, own = ("linear", {}) if cls is nn.Linear else ("conv", {"symmetry": symmetry})
    torch.manual_seed(1)
    new, _ = replace_layers(layer, **{kind: symmetry}, init=init)
    torch.manual_seed(1)
    expected = getattr(tnn, f"Symmetric{cls.__name__}").from_dense(layer, **own, init=init)
    assert repr(new) == repr(expected) and not new.training and not new.weight.requires_grad
    torch.testing.assert_close(new.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert layer.bias is None or (new.bias.requires_grad and new.bias is not layer.bias)
    on_meta, report = replace_layers(copy.deepcopy(layer).to("meta"), **{kind: symmetry}, init=init)
    assert on_meta.weight.is_meta and on_meta.weight.shape == new.weight.shape and report[0].scale is None


def test_sizes_may_be_of_numpy():
    model = nn.Sequential(nn.Conv2d(4, np.int64(8), (np.int64(3), 3), stride=np.int32(1), padding=np.int64(1)))
    model, _ = replace_layers(model, conv={"h": np.int64(4), "hv": "50%"})
    x = torch.randn(1, 4, 5, 5)
    for path in ("reference", "shift"):
        with tritonsym.path(path):
            torch.testing.assert_close(model(x), materialize(model)(x))
    assert type(model[0]) is tnn.SymmetricConv2d and all(type(size) is int for size in model[0].kernel_size)
    assert tnn.SymmetricLinear(np.int64(3), 3).in_features == 3 and tnn.TopKPool1d(np.int64(2)).k == 2


def test_flips_along_an_axis_of_size_1_are_dropped():
    model = nn.Sequential(nn.Conv2d(2, 8, (1, 3)), nn.Conv2d(8, 12, (3, 1)), nn.Conv3d(1, 8, (1, 3, 3)))
    _, report = replace_layers(model, conv="hv")
    assert [row.symmetry for row in report] == ["h:8", "v:12", "hv:8"]
    assert [row.note for row in report] == [
        "without 'v', along which the kernel has size 1",
        "without 'h', along which the kernel has size 1",
        "",
    ]
    assert report[0].note in str(report)
    _, report = replace_layers(model, conv={"h": "25%", "hv": "50%"})
    assert [row.symmetry for row in report] == ["h:6 free:2", "v:4 free:8", "h:2 hv:4 free:2"]
    _, report = replace_layers(model, conv="v")
    assert names(report) == ["1", "2"] and "size 1 along 'v'" in reasons(report)["0"]


# --- rules ------------------------------------------------------------------------------------------------------------


def test_a_rule_selects_and_chooses():
    choices = {
        "stem": lambda layer: True,
        "blocks.0.conv1": lambda layer: "d4",
        "blocks.0.conv2": lambda layer: {"h": 8, "v": "25%"},
        "blocks.1.1.conv1": lambda layer: tnn.OrbitPoolConv2d.from_dense(layer, symmetry="hv"),
        "blocks.1.1.conv2": lambda layer: False,
        "depthwise": lambda layer: tnn.TiedConv2d.from_dense(layer, symmetry="hv"),
        "pointwise": lambda layer: "h",
        "mix": lambda layer: "symmetric",
        "head": lambda layer: nn.Sequential(layer, nn.Dropout(0.0)),
        "shared": lambda layer: layer,
        "up": lambda layer: None,
    }
    seen = {}

    def rule(name, layer):
        seen[name] = type(layer)
        return choices[name](layer)

    original = zoo()
    model, report = replace_layers(original, conv="h", rule=rule)
    # the rule is asked about all but subclasses and what attention reads
    assert seen == {name: type(original.get_submodule(name)) for name in choices}
    assert {row.name: (row.after, row.symmetry) for row in report} == {
        "stem": ("SymmetricConv2d", "h:16"),
        "blocks.0.conv1": ("SymmetricConv2d", "d4:16"),
        "blocks.0.conv2": ("SymmetricConv2d", "h:8 v:4 free:4"),
        "blocks.1.1.conv1": ("OrbitPoolConv2d", "pool:hv max"),
        "depthwise": ("TiedConv2d", "tied:hv"),
        "mix": ("SymmetricLinear", "symmetric"),
        "head": ("Sequential", None),
    }
    skipped = reasons(report)
    assert "size 1" in skipped["pointwise"]
    assert {skipped[name] for name in ("blocks.1.1.conv2", "up", "shared")} == {"left alone by the rule"}
    rows = {row.name: row for row in report}
    depthwise, pooled = rows["depthwise"], rows["blocks.1.1.conv1"]
    assert (depthwise.multiply_adds_before, depthwise.multiply_adds_after) == (16 * 9, 16 * 4)
    assert pooled.multiply_adds_after == 16 * 16 * 9 and pooled.scale is None
    assert rows["head"].multiply_adds_after is None and report.multiply_adds_after is None
    assert model.head[0].weight.shape == (5, 8)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in original.parameters()}
    assert model(image()).shape == (2, 5)


def test_without_defaults_a_rule_gives_symmetries_and_a_linear_layer_takes_only_its_own():
    model, report = replace_layers(zoo(), rule=lambda name, layer: "hv")
    assert set(names(report)) == set(REPLACED) - {"mix"}
    skipped = reasons(report)
    assert skipped["mix"] == skipped["head"] == "'hv' is a symmetry of filters; a linear layer knows 'symmetric'"
    assert type(model.mix) is nn.Linear


def test_subclasses_are_replaced_when_asked_but_never_what_a_parent_reads():
    original = zoo()
    original.named = Named(8, 8, 3)
    model, report = replace_layers(original, conv="h", linear=True, subclasses=True)
    assert type(model.named) is tnn.SymmetricConv2d and "named" in names(report)
    assert reasons(report)["same"] == "Conv2dSame has a forward of its own, which its replacement would lose"
    assert "attention.out_proj" in reasons(report)
    assert model.attention(*torch.randn(3, 2, 4, 8, dtype=torch.float64))[0].isfinite().all()
    encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True).eval()
    with pytest.warns(UserWarning, match="nothing was replaced"):
        converted, report = replace_layers(encoder, linear=True, subclasses=True)
    assert len(report) == 0
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.equal(converted(x), encoder(x))
    assert {name: reason.split()[0] for name, reason in reasons(report).items()} == {
        "self_attn.out_proj": "MultiheadAttention",
        "linear1": "TransformerEncoderLayer",
        "linear2": "TransformerEncoderLayer",
    }


def test_layers_inside_symmetrize_are_replaced_and_own_layers_are_no_candidates():
    model = tnn.Symmetrize(nn.Sequential(nn.Conv1d(2, 4, 3), tnn.SymmetricConv1d(4, 4, 3, symmetry="h")), over="flip")
    own = model.inner[1]
    converted, report = replace_layers(model, conv="h", inplace=True)
    assert converted is model and names(report) == ["inner.0"] and report.skipped == ()
    assert model.inner[1] is own


# --- what is skipped --------------------------------------------------------------------------------------------------


def ignore(*_):
    """A hook."""


def changed(change):
    def build():
        layer = dense()
        change(layer)
        return layer

    return build


def frozen(dtype):
    return changed(lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().to(dtype), requires_grad=False)))


SKIPS = {
    "subclass": (partial(dense, Conv2dSame), "hv", "a subclass of Conv2d; pass subclasses=True"),
    "other shape": (
        changed(lambda m: setattr(m, "weight", nn.Parameter(torch.ones(9)))),
        "h",
        "shape (9,), not (16, 8",
    ),
    "compiled": (changed(lambda m: m.compile(backend="eager")), "h", "it is compiled; convert the model before"),
    "depthwise": (partial(dense, groups=8, out_channels=8), "h", "one filter per group"),
    "no taps tied": (partial(dense, kernel_size=(3, 1)), "tied:h", "ties no taps"),
    "no such layer": (partial(dense, nn.ConvTranspose2d), "tied:hv", "no transposed TiedConv"),
    "1x1": (partial(dense, kernel_size=1), "hv", "size 1"),
    "count": (partial(dense, out_channels=6), {"d4": 8}, "out_channels is 6"),
    "orbits": (partial(dense, out_channels=6), "d4", "nearest valid counts: 0 or 8"),
    "kernel": (partial(dense, kernel_size=(3, 5)), "d4", "needs a square kernel"),
    "axis": (partial(dense, nn.Conv1d), "v", "flips an axis"),
    "percent": (partial(dense, groups=4), {"hv": "20%"}, "leaves all of its filters free"),
    "parametrized": (lambda: parametrizations.weight_norm(dense()), "h", "parametrizations"),
    "weight_norm": (lambda: weight_norm(dense()), "h", "hooks"),
    "forward hook": (changed(lambda m: m.register_forward_hook(ignore)), "h", "hooks"),
    "pre-hook": (changed(lambda m: m.register_forward_pre_hook(ignore)), "h", "hooks"),
    "backward hook": (changed(lambda m: m.register_full_backward_hook(ignore)), "h", "hooks"),
    "state hook": (changed(lambda m: m.register_state_dict_pre_hook(ignore)), "h", "hooks"),
    "patched": (changed(lambda m: setattr(m, "forward", ignore)), "h", "a patched forward"),
    "buffer": (changed(lambda m: m.register_buffer("mask", torch.ones(3))), "h", "more than weight and bias: mask"),
    "parameter": (changed(lambda m: setattr(m, "gain", nn.Parameter(torch.ones(1)))), "h", "weight and bias: gain"),
    "child": (changed(lambda m: m.add_module("lora", nn.Identity())), "h", "more than weight and bias: lora"),
    "integers": (frozen(torch.int8), "h", "its weight is torch.int8"),
    "float8": (frozen(torch.float8_e4m3fn), "h", "its weight is torch.float8_e4m3fn"),
    "lazy": (lambda: nn.LazyConv2d(16, 3), "h", "not initialized"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("build", "conv", "reason"), SKIPS.values(), ids=SKIPS)
def test_a_layer_that_cannot_be_replaced_stays_where_it_is(build, conv, reason):
    first, last = build(), nn.Conv2d(16, 8, 3, bias=False)
    model = nn.Sequential(first, last)
    converted, report = replace_layers(model, conv=conv, inplace=True)
    assert converted is model and model[0] is first
    assert reason in reasons(report)["0"]
    if conv == "h":  # its neighbour is replaced
        assert names(report) == ["1"] and model[1] is not last


@both_places
def test_layers_that_share_a_weight_stay_as_they_are(inplace):
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
    model.append(model[0])
    model[2].weight = model[0].weight
    first = model[0]
    converted, report = replace_layers(model, conv="h", inplace=inplace)
    assert converted[0].weight is converted[2].weight and names(report) == ["1"]
    assert model[0] is first and (converted[0] is first) == inplace
    assert list(reasons(report)) == ["0", "2"]
    assert "its weight is shared: 0.weight, 2.weight" in reasons(report)["0"]


def test_kinds_of_layers_not_asked_for_are_not_mentioned():
    _, report = replace_layers(zoo(), linear=True)
    assert names(report) == ["mix"] and reasons(report).keys() == {"head", "attention.out_proj"}


# --- bad input --------------------------------------------------------------------------------------------------------


def refuse(*_):
    raise KeyError("from the rule")


def late(answer):
    """A rule that is right until the last layer."""
    return lambda name, _: answer if name == "head" else True


BAD = {
    "nothing": ({}, ValueError, "nothing to replace; pass conv='hv', linear=True, group='hv' or a rule"),
    "linear off": ({"linear": False}, ValueError, "nothing to replace"),
    "name": ({"conv": "hw"}, ValueError, "unknown symmetry 'hw'"),
    "key": ({"conv": {"h": 2, "q": 2}}, ValueError, "unknown symmetry 'q'"),
    "radial": ({"conv": "radial"}, ValueError, "use TiedConv"),
    "percent": ({"conv": {"h": "half"}}, ValueError, "h='half' is not a percentage"),
    "over 100%": ({"conv": {"h": "120%"}}, ValueError, "expected '0%' to '100%'"),
    "count": ({"conv": {"hv": 6}}, ValueError, "nearest valid counts: 4 or 8"),
    "negative": ({"conv": {"h": -2}}, ValueError, "nearest valid counts"),
    "twice": ({"conv": {"hv": 4, "vh": 4}}, ValueError, "given twice"),
    "kind of count": ({"conv": {"h": 1.5}}, TypeError, "h=1.5 must be a count"),
    "kind of conv": ({"conv": True}, TypeError, "symmetry must be a name"),
    "linear": ({"linear": "lower"}, ValueError, "linear must be True, False, 'symmetric' or None, got 'lower'"),
    "init": (
        {"conv": "h", "init": "mean"},
        ValueError,
        "init must be one of 'rescale', 'project', 'keep', 'reset', got",
    ),
    "kind of rule": ({"rule": "h"}, TypeError, "rule must be called as rule"),
    "rule without default": ({"conv": "h", "rule": late(True)}, ValueError, "no default; pass linear=True"),
    "rule's kind": ({"conv": "h", "linear": True, "rule": late(3)}, TypeError, "layer 'head': symmetry must be a name"),
    "rule's name": ({"conv": "h", "linear": True, "rule": late("symetric")}, ValueError, "unknown symmetry 'symetric'"),
    "rule raises": ({"conv": "h", "rule": refuse}, KeyError, "from the rule"),
}


@both_places
@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_and_change_nothing(arguments, error, message, inplace):
    model = zoo()
    with unchanged(model), pytest.raises(error, match=message):
        replace_layers(model, **arguments, inplace=inplace)


def test_a_bad_symmetry_is_refused_even_where_no_layer_would_take_it():
    with pytest.raises(ValueError, match="unknown symmetry 'hw'"):
        replace_layers(nn.Linear(2, 2), conv="hw", linear=True)


@pytest.mark.parametrize("function", [replace_layers, materialize, load_cnn_symmetry])
def test_only_modules_are_converted(function):
    with pytest.raises(TypeError, match=f"{function.__name__}: expected a torch.nn.Module, got list"):
        function([nn.Conv2d(1, 2, 3)], {})


# --- materialize ------------------------------------------------------------------------------------------------------


def foreign(model):
    return [type(module) for module in model.modules() if type(module).__module__.startswith("tritonsym")]


@both_places
def test_a_materialized_model_is_plain_torch_with_equal_outputs(inplace):
    model, _ = replace_layers(zoo(), conv={"d4": "50%", "h": 4}, linear=True)
    model.eval().up.weight.requires_grad_(False)
    expected = model(image())
    with nullcontext() if inplace else unchanged(model):
        plain = materialize(model, inplace=inplace)
    assert (plain is model) == inplace
    assert not foreign(plain) and not plain.up.weight.requires_grad and plain.up.bias.requires_grad
    assert not any(module.training for module in plain.modules())
    close(plain(image()), expected)
    assert plain.state_dict().keys() == zoo().state_dict().keys()
    again, report = replace_layers(plain, conv={"d4": "50%", "h": 4}, linear=True)
    assert {(row.projection_error, row.scale) for row in report} == {(0.0, 1.0)}
    assert torch.equal(again(image()), expected)


def nested():
    """A model that uses one layer and one Symmetrize twice, also inside others, and an input."""
    conv = tnn.SymmetricConv1d(4, 4, 3, padding=1, symmetry="h")
    inner = tnn.Symmetrize(nn.Sequential(conv, nn.Tanh()), "flip", dim=2, reduce="mean")
    model = nn.Sequential(conv, tnn.Symmetrize(inner, "cyclic", reduce="sum"), inner, tnn.TopKPool1d(2)).double()
    return model, torch.randn(3, 4, 6, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True])
def test_every_layer_is_materialized(any_layer, training):
    layer = any_layer.make(dtype=torch.float64).train(training)
    plain = materialize(nn.Sequential(layer.requires_grad_(False)))
    assert not foreign(plain) and not any(parameter.requires_grad for parameter in plain.parameters())
    assert {module.training for module in plain[0].modules()} == {training}
    for x in (any_layer.input(dtype=torch.float64), any_layer.input(0, dtype=torch.float64)):
        close(plain(x), layer(x))


def test_pickles_of_materialized_layers_load_where_tritonsym_does_not_exist(layers, tmp_path):
    f64 = {"dtype": torch.float64}
    cases = [("nested", *nested()), *((str(layer), layer.make(**f64), layer.input(**f64)) for layer in layers)]
    cases = [(name, materialize(module), x, module(x).detach()) for name, module, x in cases]
    torch.save(cases, tmp_path / "cases.pt")
    code = """
import sys
sys.modules["tritonsym"] = None
import torch
for name, module, x, y in torch.load(sys.argv[1], weights_only=False):
    torch.testing.assert_close(module(x), y, rtol=1e-11, atol=1e-11, msg=lambda m: f"{name}: {m}")
    print(name)
try:
    import tritonsym
except ImportError:
    print("absent")
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cases.pt")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [*(name for name, *_ in cases), "absent"]


ORDERS = [("swap", 4), ("flip", 3), ("cyclic", 1), ("cyclic", 5), ([(0, 1, 2), (1, 2, 0), (2, 0, 1)], 3)]
ORDERS += [("permutations", n) for n in range(1, 6)]


@pytest.mark.parametrize("reduce", ["max", "min", "mean", "sum", "logsumexp"])
@pytest.mark.parametrize(("over", "n"), ORDERS)
def test_a_materialized_symmetrize_still_knows_every_order(over, n, reduce):
    for dim, shape in ((1, (3, n, 2)), (2, (3, 2, n)), (-1, (3, 2, n)), (-2, (3, n, 2))):
        inner = nn.Sequential(nn.Flatten(), nn.Linear(2 * n, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        layer = tnn.Symmetrize(inner, over, dim, reduce)
        plain = materialize(layer)
        x = torch.randn(shape, dtype=torch.float64)
        close(plain(x), layer(x))
    exported = torch.export.export(plain, (x,)).module()
    close(exported(x.roll(1, 0)), layer(x.roll(1, 0)))


def test_a_materialized_symmetrize_takes_any_size_and_all_seven_entries():
    calls = []

    class Inner(nn.Module):
        def forward(self, x):
            calls.append(x)
            return x @ torch.arange(1.0, x.shape[-1] + 1)

    plain = materialize(tnn.Symmetrize(Inner(), "permutations"))
    for n in (2, 7, 3):
        x = torch.arange(float(n))[None]
        assert plain(x).item() == sum(i * (i + 1) for i in range(n))  # largest when both are sorted
        rows = {tuple(row.tolist()) for row in calls[-1]}
        assert len(calls[-1]) == len(rows) and rows == set(permutations(range(n)))
    assert len(calls) == 3  # one batched call each


@pytest.mark.parametrize(
    ("over", "n", "message"),
    [("swap", 3, "odd size"), ("permutations", 8, "5040"), ([(0, 1), (1, 0)], 3, "must have 2 entries")],
)
def test_a_materialized_symmetrize_refuses_what_the_layer_refuses(over, n, message):
    layer = tnn.Symmetrize(nn.Flatten(), over)
    with pytest.raises(ValueError):
        layer(torch.randn(2, n))
    with pytest.raises(AssertionError, match=message):
        materialize(layer)(torch.randn(2, n))


def test_nested_and_shared_layers_are_materialized_once():
    model, x = nested()
    plain = materialize(model)
    close(plain(x), model(x))
    assert not foreign(plain)
    assert plain[1].inner is plain[2] and plain[2].inner[0] is plain[0]
    assert len(list(plain.parameters())) == 2
    assert "tritonsym" not in plain[1].code and "Symmetrize" in repr(plain)


def test_what_plain_layers_would_lose_is_refused():
    class Louder(tnn.SymmetricConv1d):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = tnn.TopKPool1d(2)
    hooked.register_forward_hook(ignore)
    for layer, has in ((Louder(1, 2, 3, symmetry="h"), "a forward of its own"), (hooked, "hooks")):
        model = nn.Sequential(tnn.SymmetricConv1d(1, 2, 3, symmetry="h"), tnn.Symmetrize(layer))
        message = rf"materialize: 1.inner \({type(layer).__name__}\) has {has}"
        with unchanged(model), pytest.raises(ValueError, match=message):
            materialize(model, inplace=True)


def test_what_learns_still_learns():
    every = tnn.TiedConv2d(4, 8, 3, symmetry="hv", free=8)
    some = tnn.TiedConv2d(4, 8, 3, symmetry="hv", free=2)
    some.weight.requires_grad_(False)
    normed = nn.Sequential(parametrizations.weight_norm(tnn.SymmetricConv2d(4, 8, 3, symmetry="hv")))
    with torch.no_grad():
        assert every.to_dense().weight.requires_grad and some.to_dense().weight.requires_grad
        assert materialize(normed)[0].weight.requires_grad
    some.requires_grad_(False)
    some.bias.requires_grad_(True)
    assert [p.requires_grad for p in some.to_dense().parameters()] == [False, True]
    converted = tnn.TiedConv2d.from_dense(nn.Conv2d(4, 8, 3), symmetry="hv", free=8)
    assert [p.requires_grad for p in converted.parameters()] == [p.requires_grad for p in every.parameters()]


@pytest.mark.parametrize("remove", [False, True])
def test_a_normalized_layer_is_materialized(remove):
    layer, x = tnn.SymmetricConv2d(3, 8, 3, symmetry="hv"), torch.randn(1, 3, 5, 5)
    parametrizations.weight_norm(layer)
    if remove:  # leaves a hook
        parametrize.remove_parametrizations(layer, "weight")
    plain = materialize(nn.Sequential(layer))
    assert type(plain[0]) is nn.Conv2d
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("later", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_materialized_global_conv_computes_in_the_dtype_of_its_input_without_overflow(there, later):
    layer = tnn.GlobalConv1d(4, 5, dtype=there)
    with torch.no_grad():
        layer.center.mul_(0.01), layer.surround.mul_(0.01)
    plain, layer = materialize(layer).to(later), layer.to(later)
    x = 30 * torch.ones(1, 4, 4096, dtype=later)  # their sum overflows float16
    y = plain(x)
    assert torch.equal(y, layer(x)) and y.isfinite().all()
    assert torch.equal(torch.export.export(plain, (x,)).module()(x), y)


# --- load_cnn_symmetry ------------------------------------------------------------------------------------------------

COUNTS = {2: {"h": 2, "v": 4, "hv": 8}, 3: {"h": 2, "v": 2, "z": 2, "hv": 4, "hz": 4, "vz": 4, "hvz": 8}}


def cnn_symmetry_filters(stored, counts):
    """The dense filters in the order of CNN-Symmetry: stored ones, then images key by key."""
    images = {"h": ["h"], "v": ["v"], "z": ["z"]}
    images |= {a + b: [a, b, a + b] for a, b in ("hv", "hz", "vz")}
    images["hvz"] = ["h", "v", "z", "vz", "hz", "hv", "hvz"]
    filters, at = [stored], 0
    for key, count in counts.items():
        bases = count // (len(images[key]) + 1)
        for flips in images[key]:
            filters.append(stored[at : at + bases].flip([-1 - "hvz".index(letter) for letter in flips]))
        at += bases
    return torch.cat(filters)


def their_layer(ndim):
    """A checkpoint of one layer, and the dense weight it stands for."""
    counts = COUNTS[ndim]
    stored = 34 - sum(count - count // Symmetry(key).order for key, count in counts.items())
    weight = torch.randn(stored, 2, *(3, 4, 5)[:ndim], dtype=torch.float64)
    return {"weight": weight, "bias": torch.randn(34, dtype=torch.float64)}, cnn_symmetry_filters(weight, counts)


def our_layer(ndim, **options):
    cls = getattr(tnn, f"SymmetricConv{ndim}d")
    return cls(2, 34, (3, 4, 5)[:ndim], symmetry=COUNTS[ndim], dtype=torch.float64, **options)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_checkpoint_of_cnn_symmetry_gives_the_outputs_it_gave_there(ndim):
    (theirs, weight), layer = their_layer(ndim), our_layer(ndim)
    load_cnn_symmetry(layer, theirs)
    x = torch.randn(2, 2, *(6, 7, 8)[:ndim], dtype=torch.float64)
    conv = F.conv2d if ndim == 2 else F.conv3d
    close(layer(x), conv(x, weight, theirs["bias"]))


def test_a_shared_bias_is_taken_if_it_is_equal_within_every_orbit():
    (theirs, weight), layer = their_layer(2), our_layer(2, share_bias=True)
    message = "load_cnn_symmetry: bias differs within an orbit: channel 25 .*share_bias=False"
    with unchanged(layer), pytest.raises(ValueError, match=message):
        load_cnn_symmetry(layer, theirs)
    stored = torch.randn(layer.weight.shape[0], dtype=torch.float64)
    theirs["bias"] = cnn_symmetry_filters(stored[:, None, None], COUNTS[2]).flatten()
    load_cnn_symmetry(layer, theirs)
    assert torch.equal(layer.bias, stored)
    x = torch.randn(2, 2, 6, 7, dtype=torch.float64)
    close(layer(x), F.conv2d(x, weight, theirs["bias"]))


def whole(**options):
    return nn.Sequential(our_layer(2, **options), nn.BatchNorm2d(34), nn.ReLU(), nn.Linear(4, 3)).double()


def their_model():
    model = whole()
    model[1](torch.randn(2, 34, 3, 3, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = model.state_dict()
    state.update({f"0.{key}": value for key, value in their_layer(2)[0].items()})
    return state


def test_a_whole_model_loads_with_its_other_layers():
    state, model = their_model(), whole()
    assert not any(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    load_cnn_symmetry(model, state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    shared = whole(share_bias=True)
    state["0.bias"] = torch.full((34,), 0.5, dtype=torch.float64)
    load_cnn_symmetry(shared, state)
    assert torch.equal(shared[0].bias, torch.full_like(shared[0].bias, 0.5))
    assert state["0.bias"].shape == (34,)


WRONG = {
    "missing": (lambda s: s.pop("1.running_var"), r"missing \['1.running_var'\], unexpected \[\]"),
    "unexpected": (lambda s: s.update(x=s.pop("3.bias")), r"missing \['3.bias'\], unexpected \['x'\]"),
    "weight": (
        lambda s: s.update({"0.weight": torch.ones(34, 2, 3, 4)}),
        r"0.weight must have shape \(25, 2, 3, 4\), got \(34, 2, 3, 4\)",
    ),
    "bias": (lambda s: s.update({"0.bias": torch.zeros(26)}), r"0.bias must have shape \(34,\), got \(26,\)"),
    "linear": (lambda s: s.update({"3.weight": torch.zeros(3, 5)}), r"3.weight must have shape \(3, 4\), got \(3, 5\)"),
    "kind": (lambda s: s.update({"3.bias": [0, 0, 0]}), r"3.bias must have shape \(3,\), got list"),
}


@pytest.mark.parametrize("share_bias", [False, True])
@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(spoil, message, share_bias):
    model, state = whole(share_bias=share_bias), their_model()
    state["0.bias"] = torch.zeros(34, dtype=torch.float64)
    spoil(state)
    with unchanged(model), pytest.raises(ValueError, match=f"load_cnn_symmetry: .*{message}"):
        load_cnn_symmetry(model, state)


def test_a_checkpoint_is_a_mapping():
    with pytest.raises(TypeError, match="load_cnn_symmetry: expected a state_dict, got list"):
        load_cnn_symmetry(our_layer(2), [1])

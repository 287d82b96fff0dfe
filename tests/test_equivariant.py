"""`assert_equivariant` on whole networks: it accepts equivariant ones and names the layer that breaks the others."""

import re

import pytest
import torch
from torch import nn

import tritonsym.nn as tnn
from tritonsym.testing import assert_equivariant

LIFT = {"padding": 1, "symmetry": "hv", "share_bias": True}


def net(lift=LIFT, norm=None, middle=None, pool="max"):
    return nn.Sequential(
        tnn.SymmetricConv2d(2, 8, 3, **lift),
        norm or tnn.GroupBatchNorm2d(2, "hv"),
        nn.ReLU(),
        middle or tnn.GroupConv2d(2, 3, 3, padding=1, symmetry="hv"),
        *([tnn.GroupPool("hv", pool)] if pool else []),
    )


def test_what_holds():
    x = torch.randn(2, 2, 6, 5)
    assert_equivariant(net(), x, "hv")
    assert_equivariant(net(pool=None), x, "hv", out_type="regular")
    assert_equivariant(net(pool=None)[1:], torch.randn(2, 8, 6, 5), "hv", "regular", "regular")
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    assert_equivariant(nn.Sequential(net(), head), x, "v")
    assert_equivariant(tnn.GroupConv3d(1, 2, 3, padding=1, symmetry="hvz"), torch.randn(1, 8, 3, 4, 5))
    assert_equivariant(tnn.GroupConv2d(1, 2, 3, padding=1, symmetry="d4"), torch.randn(1, 8, 5, 5))
    assert_equivariant(tnn.GroupLinear(3, 2, symmetry="d4"), torch.randn(4, 24))


FREE = {"padding": 1, "symmetry": {"hv": 4}, "share_bias": True}
BROKEN = {
    "no shared bias": (net({"padding": 1, "symmetry": "hv"}), r"0 \(SymmetricConv2d\).*share_bias=True"),
    "mixed symmetries": (net(FREE), r"0 \(SymmetricConv2d\).*hv:4 free:4.*symmetry='hv' for all"),
    "plain norm": (net(norm=nn.BatchNorm2d(8)), r"1 \(BatchNorm2d\).*GroupBatchNorm"),
    "plain convolution": (net(middle=nn.Conv2d(8, 12, 3, padding=1)), r"3 \(Conv2d\).*GroupConv"),
    "stride": (
        net(middle=tnn.GroupConv2d(2, 3, 3, 2, 1, symmetry="hv")),
        r"3 \(GroupConv2d\).*stride 2 it leaves 1 positions",
    ),
    "flattened": (nn.Sequential(net(), nn.Flatten()), r"1 \(Flatten\).*pool"),
    "no pool": (net(pool=None), r"y\(g x\) is not g y\(x\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_layer_that_breaks_it_is_named(name):
    model, message = BROKEN[name]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AssertionError, match=f"^assert_equivariant: Sequential, g = .*{message}"):
        assert_equivariant(model, torch.randn(2, 2, 6, 6), "hv")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("z",), "symmetry 'z' flips an axis"),
        (("hv", "image"), "in_type must be one of 'scalar', 'regular', got 'image'"),
        (("hv", "regular"), "x (2, 2, 6, 6) has no whole fields of 4 elements of 'hv'"),
        (("hv", "scalar", "regular"), "the output (2, 3, 6, 6) has no regular fields of 'hv'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=f"^assert_equivariant: {re.escape(message)}"):
        assert_equivariant(net(), torch.randn(2, 2, 6, 6), *arguments)

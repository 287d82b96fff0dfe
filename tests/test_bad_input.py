"""Messages about wrong arguments: who raises them, what came, what was expected and how to fix it."""

import ast
import copy
import os
import re
import sys
import traceback
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import tritonsym
import tritonsym.functional as T
import tritonsym.nn as tnn
from tritonsym import FilterLayout, Symmetry, explain, pack, pack_tril, pack_triu, unpack, unpack_tril, unpack_triu

pytestmark = pytest.mark.filterwarnings("ignore:.*identical copies")

C64, F64 = torch.complex64, torch.float64
X = torch.ones(2, 4, 6, 6)
ARRAY, COMPLEX, DOUBLE, FLAT, THREE = X.numpy(), X.to(C64), X.double(), X[0, 0], X[:, :3]
W, CENTER, SEQUENCE, ROWS = torch.ones(2, 4, 3, 3), torch.ones(2, 4), torch.ones(2, 4, 6), torch.ones(2, 3)
PACKED, EYE = torch.ones(3, 2), torch.eye(2)  # PACKED stands for a 3 x 3 matrix
DENSE = nn.Conv2d(4, 4, 3)
BIG = ((4096, 64, 4), (64, 32, 4))  # tiles


def conv(symmetry="h", out=8, kernel_size=3, cls=tnn.SymmetricConv2d, **options):
    return cls(4, out, kernel_size, symmetry=symmetry, **options)


def linear(n=3, m=None, **options):
    return tnn.SymmetricLinear(n, m or n, **options)


def reorder(over="swap", x=SEQUENCE, **options):
    return tnn.Symmetrize(nn.Identity(), over, **options)(x)


def forced(path, function, *args, tiles=()):
    with tritonsym.path(path, tiles):
        function(*args)


def computed(backend, function, *args):
    with tritonsym.backend(backend):
        function(*args)


def with_environment(value):
    with mock.patch.object(sys.modules[tritonsym.backend.__module__], "ENVIRONMENT", value):
        f_conv()


def failing():
    from tritonsym import launch

    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), launch.launching("expand", [1, 2], X, W):
        raise TypeError("broken")


shift, expand = partial(forced, "shift"), partial(forced, "expand")
up = partial(conv, cls=tnn.SymmetricConvTranspose2d)
tied = partial(conv, cls=tnn.TiedConv2d)
pool = partial(conv, cls=tnn.OrbitPoolConv2d)
never = partial(linear, never_unpack=True)
to_conv = partial(tnn.SymmetricConv2d.from_dense, symmetry="h")
to_tied = partial(tnn.TiedConv2d.from_dense, DENSE, symmetry="h")
group = partial(tnn.GroupConv2d, 1, 2, 3, symmetry="hv")
to_group, to_group_linear = (partial(c.from_dense, symmetry="hv") for c in (tnn.GroupConv2d, tnn.GroupLinear))
f_group = partial(T.group_conv2d, x=X, weight=torch.ones(2, 1, 4, 3, 3), symmetry="hv")
line = tnn.GroupLinear(1, 1, symmetry="hv")
to_linear, from_packed = tnn.SymmetricLinear.from_dense, tnn.SymmetricLinear.from_packed
f_conv = partial(T.symmetric_conv2d, x=X, weight=W, symmetry="hv")
f_up = partial(T.symmetric_conv_transpose2d, x=X, weight=torch.ones(4, 2, 3, 3), symmetry="hv")
f_tied = partial(T.tied_conv2d, x=X, weight=SEQUENCE, symmetry="h", kernel_size=3)
f_tied_1d = partial(T.tied_conv1d, SEQUENCE, SEQUENCE, parity="odd")
f_pool = partial(T.orbit_pool_conv2d, X, symmetry="h")
f_global = partial(T.global_conv1d, x=SEQUENCE, center=CENTER, surround=CENTER)
f_linear, matmul = T.symmetric_linear, T.symmetric_matmul


def sharded():
    """A tensor that looks like a DTensor."""
    value = torch.ones(3, 1)
    value.device_mesh = None
    return value


#: The first word of the message, and what is wrong: a call, the type of its error and other words of the message.
CASES = {
    "GroupConv2d: another number of fields": (
        lambda: assigned(tnn.GroupConv2d(1, 1, 3, symmetry="hv"), "weight", torch.ones(4, 1, 4, 3, 3))(X),
        ValueError,
        "(4, 1, 4, 3, 3) (1, 1) in front out_fields",
    ),
    "TiedConv2d: fused": (
        lambda: nn.utils.fuse_conv_bn_eval(tied().eval(), nn.BatchNorm2d(4).eval()),
        ValueError,
        "torch.nn.utils.fusion stored weight materialize",
    ),
    "materialize: kind": (lambda: tritonsym.materialize([]), TypeError, "expected a torch.nn.Module, got list"),
    "unpack: sharded": (lambda: tritonsym.unpack(sharded()), TypeError, "packed DTensor packed.full_tensor()"),
    "SymmetricConv2d: normalized": (
        lambda: nn.utils.parametrizations.spectral_norm(conv())(X),
        ValueError,
        "SpectralNorm stored weight expanded_weight() remove it",
    ),
    # symmetries and layouts
    "Symmetry: unknown name": (lambda: Symmetry("hx"), ValueError, "'hx' 'hvz' 'c2' 'd4' 'radial:WIDTH'"),
    "Symmetry: letter twice": (lambda: Symmetry("hh"), ValueError, "'hh' once"),
    "Symmetry: empty name": (lambda: Symmetry(""), ValueError, "'' expected"),
    "Symmetry: no string": (lambda: Symmetry(b"hv"), TypeError, "b'hv' expected 'hv'"),
    "Symmetry: a mapping": (lambda: tied(symmetry={"h": 2}), TypeError, "{'h': 2} name"),
    "Symmetry: ring width 0": (lambda: Symmetry("radial:0"), ValueError, "'radial:0' positive 'radial:0.5'"),
    "Symmetry: ring width nan": (lambda: Symmetry("radial:nan"), ValueError, "'radial:nan' positive"),
    "'radial': no images": (lambda: Symmetry("radial").elements, ValueError, "images TiedConv"),
    "FilterLayout: groups": (lambda: FilterLayout.parse("h", 5, 2), ValueError, "out_channels=5 groups=2"),
    "FilterLayout: text": (lambda: FilterLayout.parse("h:2 h:4", 8), ValueError, "'h:2 h:4' names counts once"),
    "FilterLayout: text, free": (lambda: FilterLayout.parse("h:4 free:3", 8), ValueError, "free:3 4 of 8"),
    "FilterLayout: text, free 5%": (lambda: FilterLayout.parse("h:4 free:5%", 8), ValueError, "free:5% count"),
    "OrbitPoolConv2d: weight": (lambda: orbit_sum(), ValueError, "(2, 4, 5, 5) (2, 4, 3, 3) filters"),
    "FilterLayout: no groups": (lambda: FilterLayout.parse("h", 4, 0), ValueError, "groups=0 positive"),
    "FilterLayout: no size": (lambda: FilterLayout.parse("h", None), TypeError, "out_channels integer None"),
    # layers of equivariant networks
    "GroupConv2d: rings": (lambda: group(symmetry="radial"), ValueError, "'radial' elements 'hv'"),
    "GroupConv2d: no such axis": (lambda: group(symmetry="z"), ValueError, "'z' 2-D 'h', 'v'"),
    "torch: groups of fields": (lambda: group(groups=3), ValueError, "groups divisible"),
    "GroupConv2d: groups of fields": (lambda: group(groups=2), ValueError, "groups=2 in_fields=1 out_fields=2"),
    "GroupConv2d: fields of words": (lambda: tnn.GroupConv2d("1", 2, 3, symmetry="h"), TypeError, "in_fields '1'"),
    "GroupConv2d: x channels": (
        lambda: group()(THREE),
        ValueError,
        "(2, 3, 6, 6) 4 channels 1 fields 4 'hv' SymmetricConv",
    ),
    "GroupConv2d: x rank": (lambda: group()(FLAT), ValueError, "(6, 6) 2 spatial axes"),
    "GroupConv2d: x too small": (lambda: group()(X[..., :2]), ValueError, "(3, 3) (2, 4, 6, 2) pad more"),
    "GroupConv2d: x float64": (lambda: group()(DOUBLE), TypeError, "torch.float64 weight torch.float32"),
    "GroupConv2d: explain": (lambda: explain(group(), THREE), ValueError, "(2, 3, 6, 6) 4 channels"),
    "GroupConv2d.from_dense: 1-D": (lambda: to_group(nn.Conv1d(4, 4, 3)), TypeError, "torch.nn.Conv2d Conv1d"),
    "GroupConv2d.from_dense: fields": (
        lambda: to_group(nn.Conv2d(4, 6, 3)),
        ValueError,
        "out_channels=6 4 'hv' 4 and 8",
    ),
    "GroupConv2d.from_dense: groups": (
        lambda: to_group(nn.Conv2d(4, 4, 3, groups=4)),
        ValueError,
        "in_channels / groups=1",
    ),
    "GroupLinear: x": (lambda: line(ROWS), ValueError, "x (..., 4) (2, 3)"),
    "GroupLinear: explain": (lambda: explain(line, ROWS), ValueError, "(..., 4) (2, 3)"),
    "GroupLinear.from_dense: own": (lambda: to_group_linear(line), TypeError, "torch.nn.Linear GroupLinear"),
    "GroupBatchNorm2d: x": (lambda: tnn.GroupBatchNorm2d(2, "hv")(X), ValueError, "8 channels (2, 4, 6, 6)"),
    "GroupBatchNorm2d.to_dense: training": (lambda: tnn.GroupBatchNorm2d(2, "h").to_dense(), ValueError, "eval()"),
    "GroupPool: x": (lambda: tnn.GroupPool("hv")(THREE), ValueError, "multiple of 4 (2, 3, 6, 6)"),
    "GroupPool: reduce": (lambda: tnn.GroupPool("h", "min"), ValueError, "reduce 'min' 'max', 'mean', 'sum'"),
    "GroupPool: rings": (lambda: tnn.GroupPool("radial"), ValueError, "'radial' elements"),
    "GroupDropout: x": (lambda: tnn.GroupDropout(symmetry="hv")(ROWS), ValueError, "multiple of 4 (2, 3)"),
    "path: shift of a group": (lambda: shift(group(), X), ValueError, "'shift' GroupConv2d remove"),
    "path: fold of an orbit": (lambda: forced("fold", conv(), X), ValueError, "'fold' SymmetricConv2d remove"),
    "group_conv2d: rings": (lambda: f_group(symmetry="radial"), ValueError, "'radial' elements 'hv'"),
    "group_conv2d: rank": (lambda: f_group(weight=W), ValueError, "weight fields elements (2, 4, 3, 3)"),
    "group_conv2d: weight": (lambda: f_group(symmetry="h"), ValueError, "weight (2, 1, 4, 3, 3) 2, 3, 3 groups=1"),
    "group_conv2d: bias": (lambda: f_group(bias=torch.ones(8)), ValueError, "bias (2,) field (8,)"),
    "group_conv2d: groups": (lambda: f_group(groups=3), ValueError, "groups=3 2 fields"),
    "group_linear: rank": (lambda: T.group_linear(ROWS, ROWS, symmetry="h"), ValueError, "weight elements (2, 3)"),
    # convolutions
    "SymmetricConv2d: unknown key": (lambda: conv({"x": 2}), ValueError, "'x' hv, d4"),
    "SymmetricConv2d: unknown name": (lambda: conv("diagonal"), ValueError, "'diagonal' hv, d4"),
    "SymmetricConv2d: bytes": (lambda: conv(b"h"), TypeError, "b'h' name mapping"),
    "SymmetricConv2d: a Symmetry": (lambda: conv(Symmetry("h")), TypeError, "Symmetry('h') name mapping"),
    "SymmetricConv2d: key is no name": (lambda: conv({1: 2}), TypeError, "keys 'hv' 1"),
    "SymmetricConv2d: ties no images": (lambda: conv("radial"), ValueError, "'radial' TiedConv"),
    "SymmetricConv2d: key twice": (lambda: conv({"hv": 4, "vh": 4}), ValueError, "'hv' twice 'vh'"),
    "SymmetricConv2d: part of an orbit": (lambda: conv({"hv": 6}), ValueError, "hv=6 orbits of 4 4 or 8"),
    "SymmetricConv2d: negative count": (lambda: conv({"h": -2}), ValueError, "h=-2 0 or 2"),
    "SymmetricConv2d: group": (lambda: conv({"h": 6}, groups=2), ValueError, "h=6 orbits of 2 in each groups 4 or 8"),
    "SymmetricConv2d: name does not fill": (lambda: conv("hv", 6), ValueError, "hv=6 4 or 8"),
    "SymmetricConv2d: bool count": (lambda: conv({"h": True}), TypeError, "h=True count percentage"),
    "SymmetricConv2d: float count": (lambda: conv({"h": 2.0}), TypeError, "h=2.0 count percentage"),
    "SymmetricConv2d: no percent sign": (lambda: conv({"h": "50"}), ValueError, "h='50' percentage '50%'"),
    "SymmetricConv2d: above 100%": (lambda: conv({"h": "150%"}), ValueError, "h='150%' '100%'"),
    "SymmetricConv2d: negative percentage": (lambda: conv({"h": "-5%"}), ValueError, "h='-5%' '0%'"),
    "SymmetricConv2d: percentage of words": (lambda: conv({"h": "half%"}), ValueError, "h='half%' '50%'"),
    "SymmetricConv2d: over": (lambda: conv({"h": 6, "v": 4}), ValueError, "6 (h) 4 (v) 10 out_channels is 8; raise"),
    "SymmetricConv2d: no such axis": (lambda: conv("hz"), ValueError, "'hz' 2-D 'h', 'v'"),
    "SymmetricConv2d: oblong kernel": (lambda: conv("d4", kernel_size=(3, 5)), ValueError, "'d4' 3x5 5x5 'hv'"),
    "SymmetricConv2d: kernel of 3 axes": (lambda: conv(kernel_size=(3, 3, 3)), ValueError, "kernel_size 2 (3, 3, 3)"),
    "SymmetricConv2d: stride of 3 axes": (lambda: conv(stride=(1, 1, 1)), ValueError, "stride 2 (1, 1, 1)"),
    "SymmetricConv2d: kernel 0": (lambda: conv(kernel_size=0), ValueError, "kernel_size >= 1 0"),
    "SymmetricConv2d: stride 0": (lambda: conv(stride=0), ValueError, "stride >= 1 0"),
    "SymmetricConv2d: negative stride": (lambda: conv(stride=-1), ValueError, "stride >= 1 -1"),
    "SymmetricConv2d: float stride": (lambda: conv(stride=1.0), TypeError, "stride integers 1.0"),
    "SymmetricConv2d: negative padding": (lambda: conv(padding=-1), ValueError, "padding >= 0 -1"),
    "SymmetricConv2d: dilation 0": (lambda: conv(dilation=0), ValueError, "dilation >= 1 0"),
    "SymmetricConv2d: activation": (lambda: conv(activation="swish"), ValueError, "activation 'swish' 'silu'"),
    "SymmetricConv2d: no groups": (lambda: conv(groups=0), ValueError, "groups at least 1"),
    "SymmetricConv2d: unknown option": (
        lambda: conv(dilatation=2),
        TypeError,
        "SymmetricConv2d unexpected 'dilatation'",
    ),
    "SymmetricConv2d: channels of words": (lambda: conv(out="8"), TypeError, "channels integer '8'"),
    "SymmetricConv2d: negative channels": (lambda: conv(out=-8), ValueError, "out_channels at least 0 -8"),
    "SymmetricConv2d: x array": (lambda: conv()(ARRAY), TypeError, "x torch.Tensor ndarray"),
    "SymmetricConv2d: x none": (lambda: conv()(None), TypeError, "x torch.Tensor NoneType"),
    "SymmetricConv2d: x padded": (lambda: conv(padding_mode="reflect")(None), TypeError, "x torch.Tensor NoneType"),
    "SymmetricConv2d: x rank": (lambda: conv()(FLAT), ValueError, "(N, C_in, H, W) (6, 6)"),
    "SymmetricConv2d: x rank, padded": (lambda: conv(padding=1, padding_mode="circular")(FLAT), ValueError, "(6, 6)"),
    "SymmetricConv2d: x channels": (lambda: conv()(THREE), ValueError, "3 channels (2, 3, 6, 6) expects 4"),
    "SymmetricConv2d: x device": (lambda: conv()(X.to("meta")), ValueError, "x is on meta weight is on cpu move"),
    "SymmetricConv2d: x too small": (lambda: conv()(X[..., :2]), ValueError, "(3, 3) (6, 2) pad more"),
    "SymmetricConv2d: explain too small": (lambda: explain(conv(), X[..., :2]), ValueError, "(3, 3) (6, 2) pad"),
    "SymmetricConv2d: explain rank": (lambda: explain(conv(), FLAT), ValueError, "(N, C_in, H, W) (6, 6)"),
    "SymmetricConv2d.from_dense: 1-D": (lambda: to_conv(nn.Conv1d(4, 4, 3)), TypeError, "torch.nn.Conv2d Conv1d"),
    "SymmetricConv2d.from_dense: own": (lambda: to_conv(conv()), TypeError, "torch.nn.Conv2d SymmetricConv2d"),
    "SymmetricConv3d: turns": (lambda: conv("c4", cls=tnn.SymmetricConv3d), ValueError, "'c4' 3-D 'hvz'"),
    "SymmetricConvTranspose2d: x rank": (lambda: up()(FLAT, output_size=[8, 8]), ValueError, "(6, 6)"),
    "SymmetricConvTranspose2d: x float64": (lambda: up()(DOUBLE), TypeError, "torch.float64 weight torch.float32"),
    "SymmetricConvTranspose2d: x padded away": (lambda: up(padding=8)(X), ValueError, "padding=(8, 8) pad less"),
    "TiedConv2d: unknown parity": (lambda: tied(parity="weird"), ValueError, "parity 'weird' 'even', 'odd'"),
    "TiedConv2d: no parity": (lambda: tied(parity=None), TypeError, "parity None 'even', 'odd'"),
    "TiedConv2d: axis of parity": (lambda: tied(parity={"v": "odd"}), ValueError, "'v' 'h'"),
    "TiedConv2d: axis is no letter": (lambda: tied(parity={1: "odd"}), ValueError, "1 'h'"),
    "TiedConv2d: parity of an axis": (lambda: tied(parity={"h": "o"}), ValueError, "'h' 'o' 'even' 'odd'"),
    "TiedConv2d: turns": (lambda: tied("d4", parity={"h": "odd"}), ValueError, "'h' 'd4' use 'even' or 'odd'"),
    "TiedConv2d: odd rings": (lambda: tied("radial", parity="odd"), ValueError, "'radial' 'even'"),
    "TiedConv2d: no tap": (lambda: tied(kernel_size=1, parity="odd"), ValueError, "'h' 1x1 zero larger"),
    "TiedConv2d: oblong kernel": (lambda: tied("c4", kernel_size=(3, 5)), ValueError, "'c4' 3x5 5x5"),
    "TiedConv2d: no such axis": (lambda: tied("z"), ValueError, "'z' 2-D 'h', 'v'"),
    "TiedConv2d: free float": (lambda: tied(free=1.0), TypeError, "free 1.0 integer"),
    "TiedConv2d: free bool": (lambda: tied(free=True), TypeError, "free True integer"),
    "TiedConv2d: free too many": (lambda: tied(free=9), ValueError, "free=9 out_channels=8"),
    "TiedConv2d: free per group": (lambda: tied(free=3, groups=2), ValueError, "free=3 groups=2"),
    "TiedConv2d: x channels last": (lambda: tied()(X.movedim(1, -1)), ValueError, "6 channels expects 4"),
    "TiedConv2d.from_dense: init": (
        lambda: to_tied(init="copy"),
        ValueError,
        "init 'copy' 'rescale', 'project', 'keep', 'reset'",
    ),
    "OrbitPoolConv2d: reduce": (lambda: pool(reduce="median"), ValueError, "reduce 'median' 'max', 'min', 'sum'"),
    "OrbitPoolConv2d: rings": (lambda: pool("radial"), ValueError, "'radial' 'd4'"),
    "OrbitPoolConv2d: oblong kernel": (lambda: pool("c4", kernel_size=(3, 5)), ValueError, "'c4' 5x5"),
    "OrbitPoolConv2d: complex": (lambda: pool(dtype=C64)(COMPLEX), TypeError, "reduce='max' torch.complex64 'sum'"),
    "OrbitPoolConv2d: x integers": (lambda: pool()(X.int()), TypeError, "torch.int32 torch.float32 convert"),
    "torch: padding_mode": (lambda: conv(padding_mode="zero"), ValueError, "padding_mode 'zero' 'zeros'"),
    "torch: padding": (lambda: conv(padding="full"), ValueError, "padding 'full' 'same'"),
    "torch: same and stride": (lambda: conv(padding="same", stride=2), ValueError, "padding='same' strided"),
    "torch: groups": (lambda: conv(groups=3), ValueError, "in_channels divisible groups"),
    "torch: kernel of words": (lambda: conv(kernel_size="3"), TypeError, "str"),
    "torch: transposed": (lambda: up(padding_mode="circular"), ValueError, "zeros SymmetricConvTranspose2d"),
    "torch: size": (lambda: up(stride=2)(X, output_size=[99, 99]), ValueError, "[99, 99] [13, 13] [14, 14]"),
    "symmetric_conv2d: x list": (lambda: f_conv(x=[1.0]), TypeError, "x torch.Tensor list"),
    "symmetric_conv2d: weight missing": (lambda: f_conv(weight=None), TypeError, "weight torch.Tensor NoneType"),
    "symmetric_conv2d: weight array": (lambda: f_conv(weight=ARRAY), TypeError, "weight torch.Tensor ndarray"),
    "symmetric_conv2d: rank": (
        lambda: f_conv(weight=W[0]),
        ValueError,
        "weight (stored filters, C_in / groups, *kernel) (4, 3, 3)",
    ),
    "symmetric_conv2d: bias list": (lambda: f_conv(bias=[0.0] * 8), TypeError, "bias torch.Tensor list"),
    "symmetric_conv2d: bias shape": (lambda: f_conv(bias=torch.ones(3)), ValueError, "bias (8,) or (2,) (3,)"),
    "symmetric_conv2d: bias dtype": (lambda: f_conv(bias=torch.ones(8).double()), TypeError, "bias torch.float64"),
    "symmetric_conv2d: float stride": (lambda: f_conv(stride=1.5), TypeError, "stride integers 1.5"),
    "symmetric_conv2d: float strides": (lambda: f_conv(stride=(1.0, 2.0)), TypeError, "stride integers (1.0, 2.0)"),
    "symmetric_conv2d: stride of words": (lambda: f_conv(stride="2"), TypeError, "stride integers '2'"),
    "symmetric_conv2d: stride missing": (lambda: f_conv(stride=None), TypeError, "stride integers None"),
    "symmetric_conv2d: bool stride": (lambda: f_conv(stride=True), TypeError, "stride integers True"),
    "symmetric_conv2d: stride 0": (lambda: f_conv(stride=0), ValueError, "stride >= 1 0"),
    "symmetric_conv2d: negative stride": (lambda: f_conv(stride=-1), ValueError, "stride >= 1 -1"),
    "symmetric_conv2d: three strides": (lambda: f_conv(stride=(1, 2, 3)), ValueError, "stride 2 integers (1, 2, 3)"),
    "symmetric_conv2d: padding": (lambda: f_conv(padding="full"), ValueError, "'same' 'valid' 'full'"),
    "symmetric_conv2d: negative padding": (lambda: f_conv(padding=-1), ValueError, "padding >= 0 -1"),
    "symmetric_conv2d: same": (lambda: f_conv(padding="same", stride=2), ValueError, "'same' stride=(2, 2) ints"),
    "symmetric_conv2d: groups": (lambda: f_conv(groups=3), ValueError, "groups=3 2 stored filters"),
    "symmetric_conv2d: float groups": (lambda: f_conv(groups=1.0), TypeError, "groups integer 1.0"),
    "symmetric_conv2d: groups missing": (lambda: f_conv(groups=None), TypeError, "groups integer None"),
    "symmetric_conv2d: activation": (lambda: f_conv(activation=torch.relu), ValueError, "activation 'relu' <built-in"),
    "symmetric_conv2d: bytes": (lambda: f_conv(symmetry=b"hv"), TypeError, "b'hv' name mapping FilterLayout"),
    "symmetric_conv2d: 50%": (lambda: f_conv(symmetry={"h": "50%"}), ValueError, "h='50%' counts FilterLayout.parse"),
    "symmetric_conv2d: too few stored": (lambda: f_conv(symmetry={"h": 8}), ValueError, "2 filters few 4 base"),
    "symmetric_conv2d: layout": (lambda: f_conv(symmetry=conv().layout), ValueError, "2 filters 'h:8' stores 4"),
    "symmetric_conv2d: oblong kernel": (lambda: f_conv(weight=W[..., :2], symmetry="c4"), ValueError, "'c4' 3x2 3x3"),
    "symmetric_conv_transpose2d: groups": (lambda: f_up(groups=3), ValueError, "groups=3 4 input channels"),
    "symmetric_conv_transpose2d: x channels": (lambda: f_up(x=THREE), ValueError, "3 channels expects 4"),
    "symmetric_conv_transpose2d: padding": (lambda: f_up(padding="same"), TypeError, "padding integers 'same'"),
    "symmetric_conv_transpose2d: output": (
        lambda: f_up(output_padding=1),
        ValueError,
        "output_padding=(1, 1) smaller stride",
    ),
    "tied_conv1d: odd rings": (lambda: f_tied_1d(symmetry="radial", kernel_size=3), ValueError, "'radial' zero 'even'"),
    "tied_conv1d: no tap": (lambda: f_tied_1d(symmetry="h", kernel_size=1), ValueError, "'h' zero larger 'even'"),
    "tied_conv2d: orbits": (lambda: f_tied(weight=torch.ones(2, 4, 9)), ValueError, "(2, 4, 9) (2, 4, 6) (3, 3) orbit"),
    "tied_conv2d: weight missing": (lambda: f_tied(weight=None), TypeError, "weight torch.Tensor NoneType"),
    "tied_conv2d: kernel missing": (lambda: f_tied(kernel_size=None), TypeError, "kernel_size integers None"),
    "tied_conv2d: kernel 0": (lambda: f_tied(kernel_size=0), ValueError, "kernel_size >= 1 0"),
    "tied_conv2d: bias": (lambda: f_tied(bias=torch.ones(3)), ValueError, "bias (2,) (3,)"),
    "tied_conv2d: free shape": (lambda: f_tied(free_weight=W[..., :2]), ValueError, "free_weight 4, 3, 3 (2, 4, 3, 2)"),
    "tied_conv2d: free list": (lambda: f_tied(free_weight=[1.0]), TypeError, "free_weight torch.Tensor list"),
    "tied_conv2d: free groups": (
        lambda: f_tied(weight=SEQUENCE[:, :2], groups=2, free_weight=W[:1, :2]),
        ValueError,
        "groups=2 1 free filters",
    ),
    "orbit_pool_conv2d: rank": (lambda: f_pool(W[0]), ValueError, "weight (C_out, C_in / groups, *kernel) (4, 3, 3)"),
    "orbit_pool_conv2d: reduce": (lambda: f_pool(W, reduce=None), ValueError, "reduce None 'max'"),
    # symmetric matrices
    "SymmetricLinear: rectangle": (lambda: linear(3, 4), ValueError, "in_features=3 out_features=4 equal"),
    "SymmetricLinear: no features": (lambda: linear(0), ValueError, "in_features at least 1 0"),
    "SymmetricLinear: words": (lambda: linear("3"), TypeError, "in_features integer '3'"),
    "SymmetricLinear: activation": (lambda: linear(activation="x"), ValueError, "'x' 'relu'"),
    "SymmetricLinear: explain features": (lambda: explain(linear(), X), ValueError, "(..., 3) (2, 4, 6, 6)"),
    "SymmetricLinear: from_dense": (lambda: to_linear(nn.Linear(4, 3)), ValueError, "in_features=4 out_features=3"),
    "SymmetricLinear: packed by the reference": (
        lambda: forced("reference", never(), ROWS),
        NotImplementedError,
        "never_unpack=True float32 cpu switch never_unpack=False",
    ),
    "SymmetricLinear: under vmap": (lambda: vmap(never())(ROWS), NotImplementedError, "never_unpack=True torch.func"),
    "SymmetricLinear.from_dense: class": (lambda: to_linear(DENSE), TypeError, "torch.nn.Linear Conv2d"),
    "SymmetricLinear.from_packed: shape": (lambda: from_packed(torch.ones(2, 5)), ValueError, "(2, 5) n = 4 (5, 2)"),
    "SymmetricLinear.from_packed: bias": (lambda: from_packed(PACKED, torch.ones(1)), ValueError, "bias (3,) (1,)"),
    "SymmetricLinear.from_packed: int": (lambda: from_packed(PACKED.int()), TypeError, "packed floating torch.int32"),
    "symmetric_linear: x features": (lambda: linear()(X), ValueError, "(..., 3) (2, 4, 6, 6)"),
    "symmetric_linear: x scalar": (lambda: linear(1)(torch.tensor(1.0)), ValueError, "(..., 1) ()"),
    "symmetric_linear: x integers": (lambda: linear(6)(X.long()), TypeError, "torch.int64 torch.float32"),
    "symmetric_linear: x array": (lambda: linear(6)(ARRAY), TypeError, "x torch.Tensor ndarray"),
    "symmetric_linear: full": (lambda: f_linear(X, torch.eye(6)), ValueError, "(6, 6) tritonsym.pack(S)"),
    "symmetric_linear: vector": (lambda: f_linear(X, torch.ones(21)), ValueError, "(21,) n = 6 (7, 3) pack_tril"),
    "symmetric_linear: weight missing": (lambda: f_linear(X, None), TypeError, "packed torch.Tensor NoneType"),
    "symmetric_linear: bias": (lambda: f_linear(ROWS, PACKED, torch.ones(4)), ValueError, "(3,) (4,)"),
    "symmetric_linear: from the left": (lambda: matmul(torch.ones(6), ROWS), ValueError, "6 n = 3 (3, 2)"),
    "symmetric_linear: dtype": (lambda: matmul(PACKED, ROWS.to(F64)), TypeError, "torch.float64 torch.float32 convert"),
    "symmetric_linear: devices": (lambda: matmul(PACKED, ROWS.to("meta")), ValueError, "meta cpu move"),
    "symmetric_linear: batch": (
        lambda: f_linear(ROWS, PACKED[None]),
        ValueError,
        "one packed matrix (1, 3, 2) symmetric_matmul",
    ),
    "symmetric_matmul: batches": (
        lambda: matmul(PACKED.expand(4, 3, 2), ROWS.expand(3, *ROWS.shape)),
        ValueError,
        "(..., m, 3) broadcast (4, 3, 2)",
    ),
    "quadratic_form: length": (lambda: T.quadratic_form(PACKED, torch.ones(4)), ValueError, "(..., 3) (4,)"),
    "symmetric_matmul: rank": (lambda: matmul(PACKED, torch.ones(3), True), ValueError, "(..., n, m) (3,)"),
    "symmetric_matmul: array": (lambda: matmul(PACKED, ARRAY, True), TypeError, "x torch.Tensor ndarray"),
    "pack: not square": (lambda: pack(torch.ones(2, 3)), ValueError, "square (2, 3)"),
    "pack: not symmetric": (lambda: pack(torch.ones(2, 2).triu()), ValueError, "reaches 1 'average' tolerance"),
    "pack: one nan": (lambda: pack(EYE * torch.tensor([1, torch.nan])), ValueError, "reaches nan"),
    "pack: unknown choice": (lambda: pack(EYE, "mean"), ValueError, "symmetrize 'lower' 'mean'"),
    "pack: integers": (lambda: pack(EYE.int(), "average"), TypeError, "matrix floating torch.int32"),
    "pack: unsigned": (lambda: pack(torch.tensor([[0, 1], [2, 0]]).byte()), ValueError, "reaches 1, tolerance"),
    "pack: array": (lambda: pack(ARRAY), TypeError, "matrix torch.Tensor ndarray"),
    "pack_tril: length": (lambda: pack_tril(torch.ones(5)), ValueError, "(5,) 3 (n = 2) 6 (n = 3)"),
    "pack_tril: list": (lambda: pack_tril([1.0]), TypeError, "vector torch.Tensor list"),
    "pack_triu: rank": (lambda: pack_triu(torch.ones(3, 2)), ValueError, "(3, 2) vector"),
    "unpack: full": (lambda: unpack(torch.eye(4)), ValueError, "(4, 4) tritonsym.pack(S)"),
    "unpack: no n": (lambda: unpack(torch.ones(7, 1)), ValueError, "(7, 1) n = 3 (3, 2) n = 4 (5, 2)"),
    "unpack: none": (lambda: unpack(None), TypeError, "packed torch.Tensor NoneType"),
    "unpack_tril: full": (lambda: unpack_tril(EYE), ValueError, "(2, 2) tritonsym.pack(S)"),
    "unpack_triu: full": (lambda: unpack_triu(EYE), ValueError, "(2, 2) tritonsym.pack(S)"),
    "gram: integers": (lambda: T.gram(EYE.int()), TypeError, "x floating torch.int32"),
    "gram: list": (lambda: T.gram([[1.0]]), TypeError, "x torch.Tensor list"),
    "gram: vector": (lambda: T.gram(torch.ones(3)), ValueError, "(..., m, k) (3,)"),
    "symmetric_mm: integers": (lambda: T.symmetric_mm(EYE.int()), TypeError, "matrix floating"),
    "symmetric_mm: array": (lambda: T.symmetric_mm(ARRAY), TypeError, "matrix torch.Tensor ndarray"),
    "symmetric_mm: rectangle": (lambda: T.symmetric_mm(PACKED), ValueError, "(..., n, n) (3, 2)"),
    "symmetric_mm: alpha": (lambda: T.symmetric_mm(X, None), TypeError, "alpha number None"),
    "symmetric_mm: beta": (lambda: T.symmetric_mm(X, beta="1"), TypeError, "beta number '1'"),
    "newton_schulz: none": (lambda: T.newton_schulz(None), TypeError, "gradient torch.Tensor NoneType"),
    "newton_schulz: vector": (lambda: T.newton_schulz(FLAT[0]), ValueError, "(..., m, k) (6,)"),
    "newton_schulz: integers": (lambda: T.newton_schulz(X.int()), TypeError, "real floating int32 convert"),
    "newton_schulz: float steps": (lambda: T.newton_schulz(X, 2.0), TypeError, "steps integer 2.0"),
    "newton_schulz: negative steps": (lambda: T.newton_schulz(X, -1), ValueError, "steps at least 0 -1"),
    "newton_schulz: two": (lambda: T.newton_schulz(X, 2, (1, -1)), ValueError, "coefficients three (a, b, c) (1, -1)"),
    "newton_schulz: one none": (lambda: T.newton_schulz(X, 2, (1, None, 0)), TypeError, "coefficients number None"),
    "newton_schulz: triples": (
        lambda: T.newton_schulz(X, 5, [(1, -1, 0)] * 2),
        ValueError,
        "steps=5 2 triples leave steps out",
    ),
    "newton_schulz: a triple": (lambda: T.newton_schulz(X, None, [(1, -1, 0), (1,)]), ValueError, "(a, b, c) (1,)"),
    "newton_schulz: in a list": (lambda: T.newton_schulz([X, FLAT[0]]), ValueError, "gradient[1] (..., m, k) (6,)"),
    "newton_schulz: array in a list": (lambda: T.newton_schulz([ARRAY]), TypeError, "gradient[0] Tensor ndarray"),
    "newton_schulz: eps": (lambda: T.newton_schulz(X, eps=None), TypeError, "eps number None"),
    # sequences and sets
    "GlobalConv1d: channels": (lambda: tnn.GlobalConv1d(0, 1), ValueError, "in_channels at least 1 0"),
    "GlobalConv1d: words": (lambda: tnn.GlobalConv1d("2", 2), TypeError, "in_channels integer '2'"),
    "GlobalConv1d: activation": (lambda: tnn.GlobalConv1d(2, 1, activation="x"), ValueError, "'x' 'relu'"),
    "GlobalConv1d: explain rank": (lambda: explain(tnn.GlobalConv1d(3, 3), X), ValueError, "(N, 3, L) (2, 4, 6, 6)"),
    "global_conv1d: channels": (lambda: tnn.GlobalConv1d(3, 1)(SEQUENCE), ValueError, "4 channels (2, 4, 6) expects 3"),
    "global_conv1d: x rank": (lambda: tnn.GlobalConv1d(3, 1)(X), ValueError, "(N, C_in, L) (2, 4, 6, 6)"),
    "global_conv1d: x float64": (lambda: tnn.GlobalConv1d(4, 1)(SEQUENCE.double()), TypeError, "torch.float64 center"),
    "global_conv1d: center": (lambda: f_global(center=CENTER[..., None]), ValueError, "center (C_out, C_in) (2, 4, 1)"),
    "global_conv1d: surround": (lambda: f_global(surround=CENTER[:, :3]), ValueError, "(2, 4) surround (2, 3) equal"),
    "global_conv1d: no surround": (lambda: f_global(surround=None), TypeError, "surround torch.Tensor NoneType"),
    "TopKPool1d: float": (lambda: tnn.TopKPool1d(1.0), TypeError, "k integer 1.0"),
    "TopKPool1d: bool": (lambda: tnn.TopKPool1d(True), TypeError, "k integer True"),
    "TopKPool1d: none": (lambda: tnn.TopKPool1d(0), ValueError, "k at least 1 0"),
    "topk_pool1d: more than all": (lambda: tnn.TopKPool1d(7)(SEQUENCE), ValueError, "k=7 length (2, 4, 6)"),
    "topk_pool1d: float": (lambda: T.topk_pool1d(SEQUENCE, 1.0), TypeError, "k integer 1.0"),
    "topk_pool1d: complex": (lambda: T.topk_pool1d(COMPLEX, 1), TypeError, "order torch.complex64"),
    "topk_pool1d: list": (lambda: T.topk_pool1d([1.0], 1), TypeError, "x torch.Tensor list"),
    "Symmetrize: inner": (lambda: tnn.Symmetrize(torch.relu), TypeError, "inner torch.nn.Module builtin"),
    "Symmetrize: over unknown": (lambda: reorder("perm"), ValueError, "over 'perm' 'permutations'"),
    "Symmetrize: over none": (lambda: reorder(None), TypeError, "over 'swap' permutations None"),
    "Symmetrize: over a number": (lambda: reorder(3), TypeError, "over permutations 3"),
    "Symmetrize: over one permutation": (lambda: reorder([0, 1]), TypeError, "over permutations [0, 1]"),
    "Symmetrize: over nothing": (lambda: reorder([]), ValueError, "permutations empty"),
    "Symmetrize: over floats": (lambda: reorder([(0.0, 1.0)]), TypeError, "permutations integers [(0.0, 1.0)]"),
    "Symmetrize: not a permutation": (lambda: reorder([[0, 1], [1, 1]]), ValueError, "(1, 1) permutation 0..1"),
    "Symmetrize: not closed": (lambda: reorder([[0, 1, 2], [1, 2, 0]]), ValueError, "closed (2, 0, 1) add"),
    "Symmetrize: reduce": (lambda: reorder(reduce="prod"), ValueError, "reduce 'prod' 'logsumexp'"),
    "Symmetrize: the batch": (lambda: reorder(dim=0), ValueError, "dim=0 batch"),
    "Symmetrize: float dim": (lambda: reorder(dim=1.0), TypeError, "dim integer 1.0"),
    "symmetrize: of another axis": (lambda: reorder([[0, 1], [1, 0]]), ValueError, "(0, 1) permutation 0..3"),
    "symmetrize: the batch, counted back": (lambda: reorder(dim=-3), ValueError, "dim=-3 (2, 4, 6) batch"),
    "symmetrize: no such axis": (lambda: reorder(dim=3), ValueError, "dim=3 (2, 4, 6)"),
    "symmetrize: odd halves": (lambda: reorder(x=SEQUENCE[:, :3]), ValueError, "'swap' odd 3"),
    "symmetrize: too many": (lambda: reorder("permutations", torch.ones(1, 8)), ValueError, "8 40320 7"),
    "symmetrize: array": (lambda: reorder(x=ARRAY), TypeError, "x torch.Tensor ndarray"),
    "symmetrize: complex": (lambda: reorder(x=COMPLEX), TypeError, "'max' torch.complex64 'sum'"),
    "symmetrize: dim missing": (lambda: T.symmetrize(abs, SEQUENCE, dim=None), TypeError, "dim integer None"),
    "symmetrize: inner missing": (lambda: T.symmetrize(None, SEQUENCE), TypeError, "inner callable NoneType"),
    "symmetrize: a tuple": (lambda: T.symmetrize(lambda x: (x,), SEQUENCE), TypeError, "inner batch of 4 tuple"),
    "symmetrize: another batch": (lambda: T.symmetrize(torch.sum, SEQUENCE), TypeError, "inner batch of 4 ()"),
    # switches and plans
    "backend: unknown": (lambda: computed("cuda", f_conv), ValueError, "'cuda' 'auto', 'reference', 'triton'"),
    "backend: none": (lambda: computed(None, f_conv), ValueError, "None 'auto'"),
    "TRITONSYM_BACKEND='gpu'": (lambda: with_environment("gpu"), ValueError, "auto, reference, triton"),
    "path: unknown": (lambda: forced("fast", f_conv), ValueError, "'fast' 'reference', 'implicit_gemm', 'shift'"),
    "path: tiles": (lambda: shift(f_conv, tiles=BIG), ValueError, "'shift' tiles (4096, 64, 4) float32 cpu Plan.tiles"),
    "path: tiles of gram": (
        lambda: expand(computed, "triton", T.gram, EYE, tiles=((64, 32, 32, 4, 2),)),
        ValueError,
        "'implicit_gemm' tiles (64, 32, 32, 4, 2) float32 cpu Plan.tiles",
    ),
    "path: linear": (lambda: shift(linear(), ROWS), ValueError, "'shift' forced SymmetricLinear float32 cpu remove"),
    "path: convolution": (
        lambda: forced("blocks", conv(), X),
        ValueError,
        "'blocks' forced SymmetricConv2d float32 remove",
    ),
    "path: gram": (lambda: shift(T.gram, EYE), ValueError, "'shift' forced gram float32 cpu remove"),
    "path: C64": (lambda: shift(conv(dtype=C64), COMPLEX), ValueError, "'shift' forced SymmetricConv complex64 remove"),
    "path: F64": (
        lambda: expand(conv(dtype=F64), DOUBLE),
        ValueError,
        "'implicit_gemm' forced SymmetricConv2d float64 remove",
    ),
    "path: fused": (
        lambda: forced("fused", tnn.SymmetricConv2d(4, 8, 3, stride=2, symmetry="h"), X),
        ValueError,
        "'fused' forced SymmetricConv2d float32 128 stride remove",
    ),
    "path: tiles of fused": (
        lambda: forced("fused", conv(), X, tiles=((2, 128, 16, 4), (32, 16, 4))),
        ValueError,
        "'fused' tiles (2, 128, 16, 4) float32 cpu Plan.tiles",
    ),
    "tritonsym: kernels on a CPU": (lambda: expand(f_conv), RuntimeError, "cpu TRITON_INTERPRET=1 auto"),
    "tritonsym: kernel fails": (failing, RuntimeError, "'expand' [1, 2] (2, 4, 6, 6) float32 cpu broken 'reference'"),
    "explain: module": (lambda: explain(nn.Conv2d(4, 4, 3), X), TypeError, "tritonsym.nn Conv2d"),
    "explain: no weights": (lambda: explain(tnn.TopKPool1d(1), X), TypeError, "weights TopKPool1d"),
    "explain: target": (lambda: explain(conv(), X, "h100"), ValueError, "target 'h100' 'sm_..'"),
    "explain: target of letters": (lambda: explain(conv(), X, "sm_9x"), ValueError, "target 'sm_9x' 'sm_..'"),
    "explain: target number": (lambda: explain(conv(), X, 90), ValueError, "target 90 'sm_..'"),
    "explain: x tuple": (lambda: explain(conv(), (2, 4, 6, 6)), TypeError, "x torch.Tensor tuple"),
}


def orbit_sum():
    layer = tnn.OrbitPoolConv2d(4, 2, 3, symmetry="hv", reduce="sum")
    layer.weight = nn.Parameter(torch.ones(2, 4, 5, 5))
    return layer(X)


def missing(words, message):
    """The words and bracketed groups that do not occur in the message."""
    return [word for word in re.findall(r"\([^)]*\)|\[[^]]*\]|\S+", words) if word not in message]


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    who, (call, error, words) = case.partition(": ")[0], CASES[case]
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    message = str(caught.value)
    assert who == "torch" or message.startswith((f"{who}: ", f"{who} ")), message
    assert not missing(words, message), message


#: A layer, the layer whose checkpoint it loads, and words of the message.
CHECKPOINTS = {
    "dense": (conv, lambda: nn.Conv2d(4, 8, 3), "weight (8, 4, 3, 3) (4, 4, 3, 3) dense SymmetricConv2d.from_dense"),
    "transposed": (up, lambda: nn.ConvTranspose2d(4, 8, 3), "SymmetricConvTranspose2d.from_dense (4, 8, 3, 3)"),
    "tied": (tied, lambda: nn.Conv2d(4, 8, 3), "TiedConv2d.from_dense weight (8, 4, 3, 3) (8, 4, 6)"),
    "linear": (partial(linear, 4), lambda: nn.Linear(4, 4), "SymmetricLinear.from_dense weight (4, 4) (5, 2)"),
    "another symmetry": (conv, partial(conv, "hv"), "SymmetricConv2d weight (2, 4, 3, 3) (4, 4, 3, 3) symmetry"),
    "bias per channel": (partial(conv, share_bias=True), conv, "SymmetricConv2d bias (8,) (4,)"),
    "free filters": (partial(tied, free=2), partial(tied, free=4), "TiedConv2d weight (4, 4, 6) (6, 4, 6)"),
    "channels": (lambda: tnn.GlobalConv1d(2, 3), lambda: tnn.GlobalConv1d(2, 4), "GlobalConv1d center (4, 2) (3, 2)"),
}


@pytest.mark.parametrize(("make", "saved", "words"), CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_wrong_checkpoint_changes_nothing(make, saved, words, assign):
    module = make()
    state = dict(reversed(saved().state_dict().items()))  # entries that fit come first
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(state, assign=assign)
    assert not missing(f"size mismatch {words}", str(caught.value)), caught.value
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


#: A layer, the name of a weight, a shape that does not fit and the one that does.
SHAPES = {
    "dense": (partial(conv, "hv"), "weight", (8, 4, 3, 3), (2, 4, 3, 3)),
    "another kernel size": (partial(conv, "hv"), "weight", (2, 4, 5, 5), (2, 4, 3, 3)),
    "dense transposed": (partial(up, "hv"), "weight", (4, 8, 3, 3), (4, 2, 3, 3)),
    "dense tied": (partial(tied, free=2), "weight", (8, 4, 3, 3), (6, 4, 6)),
    "dense free": (partial(tied, free=2), "free_weight", (8, 4, 3, 3), (2, 4, 3, 3)),
    "dense pooled": (pool, "weight", (16, 4, 3, 3), (8, 4, 3, 3)),
    "dense linear": (partial(linear, 6), "weight", (6, 6), (7, 3)),
}


def assigned(module, name, weight):
    setattr(module, name, nn.Parameter(weight))
    return module


def written(module, name, weight):
    getattr(module, name).data = weight
    return module


def passed(module, name, weight):
    return partial(functional_call, module, {name: weight})


class NothingIsComputed(TorchDispatchMode):
    """Every tensor operation within its block is an error."""

    def __torch_dispatch__(self, function, *_):
        raise AssertionError(function)


@pytest.mark.parametrize("path", [None, "reference", "shift"])
@pytest.mark.parametrize("put", [assigned, written, passed], ids=lambda put: put.__name__)
@pytest.mark.parametrize(("make", "name", "came", "expected"), SHAPES.values(), ids=SHAPES)
def test_a_weight_of_another_shape_is_refused_before_anything_is_computed(make, name, came, expected, put, path):
    fresh, used = make(), make()
    if path == "shift" and isinstance(fresh, tnn.SymmetricLinear):
        pytest.skip("a linear layer has no shifts")
    message = re.escape(f"{name} has shape {came}, expected {expected}")
    weight = getattr(used, name).detach().clone()
    with torch.no_grad(), tritonsym.path(path) if path else nullcontext():
        y = used(X)  # may cache something for the next call
        for module, watch in product((fresh, used), (nullcontext, NothingIsComputed)):
            call = put(module, name, torch.ones(came))
            with watch(), pytest.raises(ValueError, match=rf"^{type(module).__name__}.*{message}"):
                call(X)
        assert torch.equal(put(used, name, weight)(X), y)


def raises(path):
    """First and last line of every statement that raises an error with a message."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.lineno, node.end_lineno


def test_every_message_has_a_case():
    source = Path(tritonsym.__file__).parent
    others = (
        "__init__",
        "__main__",
        "convert",
        "demo",
        "docs",
        "equivariant",
        "importers",
        "testing",
    )  # their messages are tested in their own files
    files = [path for path in sorted(source.glob("*.py")) if path.stem not in others] + sorted(source.glob("nn/*.py"))
    calls = [call for call, *_ in CASES.values()]
    calls += [lambda m=m, s=s: m().load_state_dict(s().state_dict()) for m, s, _ in CHECKPOINTS.values()]
    calls += [partial(assigned(make(), name, torch.ones(came)), X) for make, name, came, _ in SHAPES.values()]
    reached = set()
    for call in calls:
        try:
            call()
        except Exception as error:
            reached |= {(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)}
    silent = [
        f"{path.name}:{first}"
        for path in files
        for first, last in raises(path)
        if not any((str(path), line) in reached for line in range(first, last + 1))
    ]
    assert silent == []


@pytest.mark.parametrize("normalize", [
    nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.orthogonal, nn.utils.spectral_norm
])  # fmt: skip
@pytest.mark.parametrize("make", [conv, tied, group, partial(linear, 4)])
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
def test_norms_of_a_stored_weight_are_refused(make, normalize):
    module = normalize(make())
    with pytest.raises(ValueError, match=f"^{type(make()).__name__}: .* acts on the stored weight, not on the filters"):
        module(torch.randn(2, 4) if isinstance(module, tnn.SymmetricLinear) else X)

"""Whatever is wrong with an argument: who says so, what came, what was expected and how to fix it."""

import ast
import copy
import os
import re
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import tritonsym
import tritonsym.functional as T
import tritonsym.nn as tnn
from tritonsym import FilterLayout, Symmetry, dispatch, launch
from tritonsym.dispatch import current_backend
from tritonsym.symmetry import tap_orbits

X = torch.ones(2, 4, 6, 6)
W = torch.ones(2, 4, 3, 3)
SEQUENCE = torch.ones(2, 4, 6)
PACKED = torch.ones(3, 2)  # of a 3 x 3 matrix
W_TRANSPOSED = torch.ones(4, 2, 3, 3)
W_TIED = torch.ones(2, 4, 6)


def conv(x=X, weight=W, bias=None, symmetry="hv", **options):
    return T.symmetric_conv2d(x, weight, bias, symmetry=symmetry, **options)


def transposed(x=X, weight=W_TRANSPOSED, bias=None, symmetry="hv", **options):
    return T.symmetric_conv_transpose2d(x, weight, bias, symmetry=symmetry, **options)


def tied(x=X, weight=W_TIED, bias=None, symmetry="h", kernel_size=3, **options):
    return T.tied_conv2d(x, weight, bias, symmetry=symmetry, kernel_size=kernel_size, **options)


def pooled(x=X, weight=W, bias=None, symmetry="h", **options):
    return T.orbit_pool_conv2d(x, weight, bias, symmetry=symmetry, **options)


def layer(out=8, kernel_size=3, symmetry="h", cls=tnn.SymmetricConv2d, **options):
    return cls(4, out, kernel_size, symmetry=symmetry, **options)


def up(**options):
    return layer(cls=tnn.SymmetricConvTranspose2d, **options)


def tied_layer(**options):
    return layer(cls=tnn.TiedConv2d, **options)


def pool_layer(**options):
    return layer(cls=tnn.OrbitPoolConv2d, **options)


def wrap(over="swap", x=SEQUENCE, **options):
    return tnn.Symmetrize(nn.Identity(), over, **options)(x)


def enter(context):
    with context:
        pass


def with_environment(value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "ENVIRONMENT", value)
        current_backend()


def forced(context, function):
    with context:
        function()


def kernels(function, *args):
    with tritonsym.backend("triton"):
        function(*args)


def failing_kernel():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), launch.launching("expand", [1, 2], X, W):
        raise TypeError("broken")


def missing(words, message):
    """Those of the words, or bracketed groups, that do not occur in the message."""
    return [word for word in re.findall(r"\([^)]*\)|\[[^]]*\]|\S+", words) if word not in message]


#: What is wrong, the call, the type of the error and what its message must contain.
CASES = [
    # names of symmetries
    ("unknown name", lambda: Symmetry("hx"), ValueError, "Symmetry 'hx' 'hvz' 'c2' 'd4' 'radial:WIDTH'"),
    ("letter twice", lambda: Symmetry("hh"), ValueError, "Symmetry 'hh' once"),
    ("empty name", lambda: Symmetry(""), ValueError, "Symmetry '' expected"),
    ("name is no string", lambda: Symmetry(b"hv"), TypeError, "Symmetry b'hv' expected 'hv'"),
    ("ring width 0", lambda: Symmetry("radial:0"), ValueError, "Symmetry 'radial:0' positive 'radial:0.5'"),
    ("ring width nan", lambda: Symmetry("radial:nan"), ValueError, "Symmetry 'radial:nan' positive"),
    ("rings have no images", lambda: Symmetry("radial").elements, ValueError, "'radial' images TiedConv"),
    ("axis not there", lambda: tap_orbits(Symmetry("z"), (3, 3)), ValueError, "tap_orbits 'z' 2-D 'h', 'v'"),
    ("odd ring", lambda: tap_orbits(Symmetry("radial"), (3,), "h"), ValueError, "tap_orbits 'radial' zero 'even'"),
    (
        "sign leaves no tap",
        lambda: tap_orbits(Symmetry("h"), (1,), "h"),
        ValueError,
        "tap_orbits 'h' zero larger 'even'",
    ),
    # layouts
    ("layer: unknown key", lambda: layer(symmetry={"x": 2}), ValueError, "SymmetricConv2d 'x' hv, d4"),
    ("layer: unknown name", lambda: layer(symmetry="diagonal"), ValueError, "SymmetricConv2d 'diagonal' hv, d4"),
    ("layer: bytes", lambda: layer(symmetry=b"h"), TypeError, "SymmetricConv2d b'h' name mapping"),
    (
        "layer: a Symmetry",
        lambda: layer(symmetry=Symmetry("h")),
        TypeError,
        "SymmetricConv2d Symmetry('h') name mapping",
    ),
    ("layer: key is no name", lambda: layer(symmetry={1: 2}), TypeError, "SymmetricConv2d keys 'hv' 1"),
    ("layer: ties no images", lambda: layer(symmetry="radial"), ValueError, "SymmetricConv2d 'radial' TiedConv"),
    ("layer: key twice", lambda: layer(symmetry={"hv": 4, "vh": 4}), ValueError, "SymmetricConv2d 'hv' twice 'vh'"),
    (
        "layer: part of an orbit",
        lambda: layer(symmetry={"hv": 6}),
        ValueError,
        "SymmetricConv2d hv=6 orbits of 4 4 or 8",
    ),
    ("layer: negative count", lambda: layer(symmetry={"h": -2}), ValueError, "SymmetricConv2d h=-2 0 or 2"),
    (
        "layer: part of an orbit in a group",
        lambda: layer(symmetry={"h": 6}, groups=2),
        ValueError,
        "SymmetricConv2d h=6 orbits of 2 in each of 2 groups 4 or 8",
    ),
    ("layer: name does not fill", lambda: layer(out=6, symmetry="hv"), ValueError, "SymmetricConv2d hv=6 4 or 8"),
    ("layer: bool count", lambda: layer(symmetry={"h": True}), TypeError, "SymmetricConv2d h=True count percentage"),
    ("layer: float count", lambda: layer(symmetry={"h": 2.0}), TypeError, "SymmetricConv2d h=2.0 count percentage"),
    (
        "layer: no percent sign",
        lambda: layer(symmetry={"h": "50"}),
        ValueError,
        "SymmetricConv2d h='50' percentage '50%'",
    ),
    ("layer: above 100%", lambda: layer(symmetry={"h": "150%"}), ValueError, "SymmetricConv2d h='150%' '100%'"),
    ("layer: negative percentage", lambda: layer(symmetry={"h": "-5%"}), ValueError, "SymmetricConv2d h='-5%' '0%'"),
    (
        "layer: percentage of words",
        lambda: layer(symmetry={"h": "half%"}),
        ValueError,
        "SymmetricConv2d h='half%' '50%'",
    ),
    (
        "layer: more than all filters",
        lambda: layer(symmetry={"h": 6, "v": 4}),
        ValueError,
        "SymmetricConv2d 6 (h) 4 (v) 10 out_channels is 8; raise",
    ),
    ("layout: groups", lambda: FilterLayout.parse("h", 5, 2), ValueError, "FilterLayout out_channels=5 groups=2"),
    ("layout: no groups", lambda: FilterLayout.parse("h", 4, 0), ValueError, "FilterLayout groups=0 positive"),
    ("layout: no size", lambda: FilterLayout.parse("h", None), TypeError, "FilterLayout out_channels integer None"),
    # layers against their kernels
    ("layer: no such axis", lambda: layer(symmetry="hz"), ValueError, "SymmetricConv2d 'hz' 2-D 'h', 'v'"),
    (
        "layer: oblong kernel",
        lambda: layer(kernel_size=(3, 5), symmetry="d4"),
        ValueError,
        "SymmetricConv2d 'd4' 3x5 5x5 'hv'",
    ),
    (
        "layer: turns in 3-D",
        lambda: layer(cls=tnn.SymmetricConv3d, symmetry="c4"),
        ValueError,
        "SymmetricConv3d 'c4' 3-D 'hvz'",
    ),
    (
        "layer: kernel of 3 axes",
        lambda: layer(kernel_size=(3, 3, 3)),
        ValueError,
        "SymmetricConv2d kernel_size 2 (3, 3, 3)",
    ),
    ("layer: stride of 3 axes", lambda: layer(stride=(1, 1, 1)), ValueError, "SymmetricConv2d stride 2 (1, 1, 1)"),
    ("layer: kernel 0", lambda: layer(kernel_size=0), ValueError, "SymmetricConv2d kernel_size >= 1 0"),
    ("layer: stride 0", lambda: layer(stride=0), ValueError, "SymmetricConv2d stride >= 1 0"),
    ("layer: stride negative", lambda: layer(stride=-1), ValueError, "SymmetricConv2d stride >= 1 -1"),
    ("layer: stride float", lambda: layer(stride=1.0), TypeError, "SymmetricConv2d stride integers 1.0"),
    ("layer: padding negative", lambda: layer(padding=-1), ValueError, "SymmetricConv2d padding >= 0 -1"),
    ("layer: dilation 0", lambda: layer(dilation=0), ValueError, "SymmetricConv2d dilation >= 1 0"),
    ("layer: activation", lambda: layer(activation="swish"), ValueError, "SymmetricConv2d activation 'swish' 'silu'"),
    # what the torch constructor refuses
    ("torch: padding_mode", lambda: layer(padding_mode="zero"), ValueError, "padding_mode 'zero' 'zeros'"),
    ("torch: padding", lambda: layer(padding="full"), ValueError, "padding 'full' 'same'"),
    ("torch: same and stride", lambda: layer(padding="same", stride=2), ValueError, "padding='same' strided"),
    ("torch: groups", lambda: layer(groups=3), ValueError, "in_channels divisible groups"),
    ("torch: no groups", lambda: layer(groups=0), ValueError, "groups at least 1"),
    ("torch: channels of words", lambda: layer("8"), TypeError, "SymmetricConv2d channels integer '8'"),
    ("torch: negative channels", lambda: layer(-8), ValueError, "SymmetricConv2d out_channels at least 0 -8"),
    ("torch: kernel of words", lambda: layer(kernel_size="3"), TypeError, "str"),
    (
        "torch: transposed padding_mode",
        lambda: up(padding_mode="circular"),
        ValueError,
        "zeros SymmetricConvTranspose2d",
    ),
    ("torch: output_size", lambda: up(stride=2)(X, output_size=[99, 99]), ValueError, "[99, 99] [13, 13] [14, 14]"),
    # tied layers
    ("tied: parity", lambda: tied_layer(parity="weird"), ValueError, "TiedConv2d parity 'weird' 'even', 'odd'"),
    ("tied: no parity", lambda: tied_layer(parity=None), TypeError, "TiedConv2d parity None 'even', 'odd'"),
    ("tied: axis of parity", lambda: tied_layer(parity={"v": "odd"}), ValueError, "TiedConv2d 'v' 'h'"),
    ("tied: axis is no letter", lambda: tied_layer(parity={1: "odd"}), ValueError, "TiedConv2d 1 'h'"),
    ("tied: parity of an axis", lambda: tied_layer(parity={"h": "o"}), ValueError, "TiedConv2d 'h' 'o' 'even' 'odd'"),
    (
        "tied: parity of turns",
        lambda: tied_layer(symmetry="d4", parity={"h": "odd"}),
        ValueError,
        "TiedConv2d 'h' 'd4' use 'even' or 'odd'",
    ),
    ("tied: odd rings", lambda: tied_layer(symmetry="radial", parity="odd"), ValueError, "TiedConv2d 'radial' 'even'"),
    ("tied: no tap", lambda: tied_layer(kernel_size=1, parity="odd"), ValueError, "TiedConv2d 'h' 1x1 zero larger"),
    (
        "tied: oblong kernel",
        lambda: tied_layer(kernel_size=(3, 5), symmetry="c4"),
        ValueError,
        "TiedConv2d 'c4' 3x5 5x5",
    ),
    ("tied: a mapping", lambda: tied_layer(symmetry={"h": 2}), TypeError, "Symmetry {'h': 2} name"),
    ("tied: free float", lambda: tied_layer(free=1.0), TypeError, "TiedConv2d free 1.0 integer"),
    ("tied: free bool", lambda: tied_layer(free=True), TypeError, "TiedConv2d free True integer"),
    ("tied: free too many", lambda: tied_layer(free=9), ValueError, "TiedConv2d free=9 out_channels=8"),
    ("tied: free per group", lambda: tied_layer(free=3, groups=2), ValueError, "TiedConv2d free=3 groups=2"),
    # orbit pooling
    (
        "pool: reduce",
        lambda: pool_layer(reduce="median"),
        ValueError,
        "OrbitPoolConv2d reduce 'median' 'max', 'min', 'sum'",
    ),
    ("pool: rings", lambda: pool_layer(symmetry="radial"), ValueError, "OrbitPoolConv2d 'radial' 'd4'"),
    (
        "pool: oblong kernel",
        lambda: pool_layer(kernel_size=(3, 5), symmetry="c4"),
        ValueError,
        "OrbitPoolConv2d 'c4' 5x5",
    ),
    (
        "pool: complex",
        lambda: pool_layer(dtype=torch.complex64)(X.to(torch.complex64)),
        TypeError,
        "OrbitPoolConv2d reduce='max' torch.complex64 'sum'",
    ),
    # inputs of layers
    ("input: no tensor", lambda: layer()(X.numpy()), TypeError, "SymmetricConv2d x torch.Tensor ndarray"),
    ("input: none", lambda: layer()(None), TypeError, "SymmetricConv2d x torch.Tensor NoneType"),
    (
        "input: padded, none",
        lambda: layer(padding_mode="reflect")(None),
        TypeError,
        "SymmetricConv2d x torch.Tensor NoneType",
    ),
    ("input: rank", lambda: layer()(X[0, 0]), ValueError, "SymmetricConv2d (N, C_in, H, W) (6, 6)"),
    (
        "input: rank, padded",
        lambda: layer(padding=1, padding_mode="circular")(X[0, 0]),
        ValueError,
        "SymmetricConv2d (6, 6)",
    ),
    (
        "input: rank, transposed",
        lambda: up()(X[0, 0], output_size=[8, 8]),
        ValueError,
        "SymmetricConvTranspose2d (6, 6)",
    ),
    ("input: channels", lambda: layer()(X[:, :3]), ValueError, "SymmetricConv2d 3 channels (2, 3, 6, 6) expects 4"),
    ("input: channels last", lambda: tied_layer()(X.movedim(1, -1)), ValueError, "TiedConv2d 6 channels expects 4"),
    ("input: integers", lambda: pool_layer()(X.int()), TypeError, "OrbitPoolConv2d torch.int32 torch.float32 convert"),
    (
        "input: double",
        lambda: up()(X.double()),
        TypeError,
        "SymmetricConvTranspose2d torch.float64 weight torch.float32",
    ),
    ("input: device", lambda: layer()(X.to("meta")), ValueError, "SymmetricConv2d x is on meta weight is on cpu move"),
    ("input: too small", lambda: layer()(X[..., :2]), ValueError, "SymmetricConv2d (3, 3) (6, 2) pad more"),
    (
        "input: padded away",
        lambda: up(padding=8)(X),
        ValueError,
        "SymmetricConvTranspose2d padding=(8, 8) pad less",
    ),
    # functions
    ("conv: no tensor", lambda: conv(x=[1.0]), TypeError, "symmetric_conv2d x torch.Tensor list"),
    ("conv: weight missing", lambda: conv(weight=None), TypeError, "symmetric_conv2d weight torch.Tensor NoneType"),
    ("conv: numpy weight", lambda: conv(weight=W.numpy()), TypeError, "symmetric_conv2d weight torch.Tensor ndarray"),
    ("conv: list bias", lambda: conv(bias=[0.0] * 8), TypeError, "symmetric_conv2d bias torch.Tensor list"),
    (
        "conv: rank of weight",
        lambda: conv(weight=W[0]),
        ValueError,
        "symmetric_conv2d weight (stored filters, C_in / groups, *kernel) (4, 3, 3)",
    ),
    ("conv: bias", lambda: conv(bias=torch.ones(3)), ValueError, "symmetric_conv2d bias (8,) or (2,) (3,)"),
    (
        "conv: dtype of bias",
        lambda: conv(bias=torch.ones(8).double()),
        TypeError,
        "symmetric_conv2d bias torch.float64",
    ),
    ("conv: stride float", lambda: conv(stride=1.5), TypeError, "symmetric_conv2d stride integers 1.5"),
    (
        "conv: stride of floats",
        lambda: conv(stride=(1.0, 2.0)),
        TypeError,
        "symmetric_conv2d stride integers (1.0, 2.0)",
    ),
    ("conv: stride of words", lambda: conv(stride="2"), TypeError, "symmetric_conv2d stride integers '2'"),
    ("conv: stride missing", lambda: conv(stride=None), TypeError, "symmetric_conv2d stride integers None"),
    ("conv: stride bool", lambda: conv(stride=True), TypeError, "symmetric_conv2d stride integers True"),
    ("conv: stride 0", lambda: conv(stride=0), ValueError, "symmetric_conv2d stride >= 1 0"),
    ("conv: stride negative", lambda: conv(stride=-1), ValueError, "symmetric_conv2d stride >= 1 -1"),
    ("conv: three strides", lambda: conv(stride=(1, 2, 3)), ValueError, "symmetric_conv2d stride 2 integers (1, 2, 3)"),
    ("conv: padding", lambda: conv(padding="full"), ValueError, "symmetric_conv2d 'same' 'valid' 'full'"),
    ("conv: padding negative", lambda: conv(padding=-1), ValueError, "symmetric_conv2d padding >= 0 -1"),
    (
        "conv: same and stride",
        lambda: conv(padding="same", stride=2),
        ValueError,
        "symmetric_conv2d 'same' stride=(2, 2) ints",
    ),
    ("conv: groups", lambda: conv(groups=3), ValueError, "symmetric_conv2d groups=3 2 stored filters"),
    ("conv: groups float", lambda: conv(groups=1.0), TypeError, "symmetric_conv2d groups integer 1.0"),
    ("conv: groups missing", lambda: conv(groups=None), TypeError, "symmetric_conv2d groups integer None"),
    (
        "conv: activation",
        lambda: conv(activation=torch.relu),
        ValueError,
        "symmetric_conv2d activation 'relu' <built-in",
    ),
    ("conv: bytes", lambda: conv(symmetry=b"hv"), TypeError, "symmetric_conv2d b'hv' name mapping FilterLayout"),
    (
        "conv: percentages",
        lambda: conv(symmetry={"h": "50%"}),
        ValueError,
        "symmetric_conv2d h='50%' counts FilterLayout.parse",
    ),
    ("conv: too few stored", lambda: conv(symmetry={"h": 8}), ValueError, "symmetric_conv2d 2 filters few 4 base"),
    (
        "conv: another layout",
        lambda: conv(symmetry=FilterLayout.parse("h", 8)),
        ValueError,
        "symmetric_conv2d 2 filters 'h:8' stores 4",
    ),
    (
        "conv: oblong kernel",
        lambda: conv(weight=W[..., :2], symmetry="c4"),
        ValueError,
        "symmetric_conv2d 'c4' 3x2 3x3",
    ),
    (
        "transposed: groups",
        lambda: transposed(groups=3),
        ValueError,
        "symmetric_conv_transpose2d groups=3 4 input channels",
    ),
    (
        "transposed: channels",
        lambda: transposed(x=X[:, :3]),
        ValueError,
        "symmetric_conv_transpose2d 3 channels expects 4",
    ),
    (
        "transposed: padding",
        lambda: transposed(padding="same"),
        TypeError,
        "symmetric_conv_transpose2d padding integers 'same'",
    ),
    (
        "transposed: output_padding",
        lambda: transposed(output_padding=1),
        ValueError,
        "symmetric_conv_transpose2d output_padding=(1, 1) smaller stride",
    ),
    ("tied: orbits", lambda: tied(weight=torch.ones(2, 4, 9)), ValueError, "tied_conv2d (2, 4, 9) 'h' (3, 3) 6 orbits"),
    ("tied: weight missing", lambda: tied(weight=None), TypeError, "tied_conv2d weight torch.Tensor NoneType"),
    ("tied: kernel missing", lambda: tied(kernel_size=None), TypeError, "tied_conv2d kernel_size integers None"),
    ("tied: kernel 0", lambda: tied(kernel_size=0), ValueError, "tied_conv2d kernel_size >= 1 0"),
    ("tied: bias", lambda: tied(bias=torch.ones(3)), ValueError, "tied_conv2d bias (2,) (3,)"),
    (
        "tied: free shape",
        lambda: tied(free_weight=W[..., :2]),
        ValueError,
        "tied_conv2d free_weight 4, 3, 3 (2, 4, 3, 2)",
    ),
    ("tied: free no tensor", lambda: tied(free_weight=[1.0]), TypeError, "tied_conv2d free_weight torch.Tensor list"),
    (
        "tied: free groups",
        lambda: tied(weight=torch.ones(2, 2, 6), groups=2, free_weight=torch.ones(1, 2, 3, 3)),
        ValueError,
        "tied_conv2d groups=2 1 free filters",
    ),
    (
        "pool: rank of weight",
        lambda: pooled(weight=W[0]),
        ValueError,
        "orbit_pool_conv2d weight (C_out, C_in / groups, *kernel) (4, 3, 3)",
    ),
    ("pool: reduction", lambda: pooled(reduce=None), ValueError, "orbit_pool_conv2d reduce None 'max'"),
    # symmetric matrices
    (
        "linear: rectangle",
        lambda: tnn.SymmetricLinear(3, 4),
        ValueError,
        "SymmetricLinear in_features=3 out_features=4 equal",
    ),
    ("linear: no features", lambda: tnn.SymmetricLinear(0, 0), ValueError, "SymmetricLinear in_features at least 1 0"),
    ("linear: activation", lambda: tnn.SymmetricLinear(3, 3, activation="x"), ValueError, "SymmetricLinear 'x' 'relu'"),
    ("linear: features", lambda: tnn.SymmetricLinear(3, 3)(X), ValueError, "symmetric_linear (..., 3) (2, 4, 6, 6)"),
    (
        "linear: scalar",
        lambda: tnn.SymmetricLinear(1, 1)(torch.tensor(1.0)),
        ValueError,
        "symmetric_linear (..., 1) ()",
    ),
    (
        "linear: integers",
        lambda: tnn.SymmetricLinear(6, 6)(X.long()),
        TypeError,
        "symmetric_linear torch.int64 torch.float32",
    ),
    (
        "linear: no tensor",
        lambda: tnn.SymmetricLinear(6, 6)(X.numpy()),
        TypeError,
        "symmetric_linear x torch.Tensor ndarray",
    ),
    (
        "linear: full weight",
        lambda: T.symmetric_linear(X, torch.eye(6)),
        ValueError,
        "symmetric_linear (6, 6) tritonsym.pack(S)",
    ),
    (
        "linear: vector weight",
        lambda: T.symmetric_linear(X, torch.ones(21)),
        ValueError,
        "symmetric_linear (21,) n = 6 (7, 3) pack_tril",
    ),
    (
        "linear: no weight",
        lambda: T.symmetric_linear(X, None),
        TypeError,
        "symmetric_linear packed torch.Tensor NoneType",
    ),
    (
        "linear: bias",
        lambda: T.symmetric_linear(X[..., :3], PACKED, torch.ones(4)),
        ValueError,
        "symmetric_linear (3,) (4,)",
    ),
    (
        "matmul: rank",
        lambda: T.symmetric_matmul(PACKED, torch.ones(3), True),
        ValueError,
        "symmetric_matmul (..., n, m) (3,)",
    ),
    (
        "matmul: no tensor",
        lambda: T.symmetric_matmul(PACKED, np.ones((3, 3)), True),
        TypeError,
        "x torch.Tensor ndarray",
    ),
    (
        "from_packed: shape",
        lambda: tnn.SymmetricLinear.from_packed(torch.ones(2, 5)),
        ValueError,
        "SymmetricLinear.from_packed (2, 5) n = 4 (5, 2)",
    ),
    (
        "from_packed: bias",
        lambda: tnn.SymmetricLinear.from_packed(PACKED, torch.ones(1)),
        ValueError,
        "SymmetricLinear.from_packed bias (3,) (1,)",
    ),
    ("pack: not square", lambda: tritonsym.pack(torch.ones(2, 3)), ValueError, "pack square (2, 3)"),
    (
        "pack: not symmetric",
        lambda: tritonsym.pack(torch.ones(2, 2).triu()),
        ValueError,
        "pack reaches 1 'average' tolerance",
    ),
    (
        "pack: one nan",
        lambda: tritonsym.pack(torch.eye(2) * torch.tensor([1, torch.nan])),
        ValueError,
        "pack reaches nan",
    ),
    ("pack: symmetrize", lambda: tritonsym.pack(torch.eye(2), "mean"), ValueError, "pack symmetrize 'lower' 'mean'"),
    (
        "pack: average of integers",
        lambda: tritonsym.pack(torch.eye(2).int(), "average"),
        TypeError,
        "pack matrix floating torch.int32",
    ),
    (
        "pack: unsigned",
        lambda: tritonsym.pack(torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8)),
        ValueError,
        "pack reaches 1, tolerance",
    ),
    (
        "from_packed: integers",
        lambda: tnn.SymmetricLinear.from_packed(tritonsym.pack(torch.eye(2).int())),
        TypeError,
        "SymmetricLinear.from_packed packed floating torch.int32",
    ),
    ("gram: integers", lambda: T.gram(torch.eye(2).int()), TypeError, "gram x floating torch.int32"),
    ("symmetric_mm: integers", lambda: T.symmetric_mm(torch.eye(2).int()), TypeError, "symmetric_mm matrix floating"),
    (
        "reorder: floats",
        lambda: wrap([(0.0, 1.0), (1.0, 0.0)]),
        TypeError,
        "Symmetrize permutations integers [(0.0, 1.0), (1.0, 0.0)]",
    ),
    ("pack: no tensor", lambda: tritonsym.pack(np.eye(2)), TypeError, "pack matrix torch.Tensor ndarray"),
    ("unpack: full", lambda: tritonsym.unpack(torch.eye(4)), ValueError, "unpack (4, 4) tritonsym.pack(S)"),
    ("unpack: no n", lambda: tritonsym.unpack(torch.ones(7, 1)), ValueError, "unpack (7, 1) n = 3 (3, 2) n = 4 (5, 2)"),
    ("unpack: none", lambda: tritonsym.unpack(None), TypeError, "unpack packed torch.Tensor NoneType"),
    ("unpack_tril", lambda: tritonsym.unpack_tril(torch.eye(2)), ValueError, "unpack_tril (2, 2) tritonsym.pack(S)"),
    ("unpack_triu", lambda: tritonsym.unpack_triu(torch.eye(2)), ValueError, "unpack_triu (2, 2) tritonsym.pack(S)"),
    ("pack_tril: length", lambda: tritonsym.pack_tril(torch.ones(5)), ValueError, "pack_tril (5,) 3 (n = 2) 6 (n = 3)"),
    ("pack_triu: rank", lambda: tritonsym.pack_triu(torch.ones(3, 2)), ValueError, "pack_triu (3, 2) vector"),
    ("pack_tril: list", lambda: tritonsym.pack_tril([1.0]), TypeError, "pack_tril vector torch.Tensor list"),
    # sequences and sets
    ("global: channels", lambda: tnn.GlobalConv1d(0, 1), ValueError, "GlobalConv1d in_channels at least 1 0"),
    ("global: words", lambda: tnn.GlobalConv1d("2", 2), TypeError, "GlobalConv1d in_channels integer '2'"),
    ("linear: words", lambda: tnn.SymmetricLinear("3", "3"), TypeError, "SymmetricLinear in_features integer '3'"),
    ("global: activation", lambda: tnn.GlobalConv1d(2, 1, activation="x"), ValueError, "GlobalConv1d 'x' 'relu'"),
    (
        "global: input",
        lambda: tnn.GlobalConv1d(3, 1)(SEQUENCE),
        ValueError,
        "global_conv1d 4 channels (2, 4, 6) expects 3",
    ),
    ("global: rank", lambda: tnn.GlobalConv1d(3, 1)(X), ValueError, "global_conv1d (N, C_in, L) (2, 4, 6, 6)"),
    (
        "global: dtype",
        lambda: tnn.GlobalConv1d(4, 1)(SEQUENCE.double()),
        TypeError,
        "global_conv1d torch.float64 center",
    ),
    (
        "global: rank of center",
        lambda: T.global_conv1d(SEQUENCE, torch.ones(2, 4, 1), torch.ones(2, 4)),
        ValueError,
        "global_conv1d center (C_out, C_in) (2, 4, 1)",
    ),
    (
        "global: surround",
        lambda: T.global_conv1d(SEQUENCE, torch.ones(2, 4), torch.ones(2, 3)),
        ValueError,
        "global_conv1d (2, 4) surround (2, 3) equal",
    ),
    (
        "global: no surround",
        lambda: T.global_conv1d(SEQUENCE, torch.ones(2, 4), None),
        TypeError,
        "global_conv1d surround torch.Tensor NoneType",
    ),
    ("top-k: float", lambda: tnn.TopKPool1d(1.0), TypeError, "TopKPool1d k integer 1.0"),
    ("top-k: bool", lambda: tnn.TopKPool1d(True), TypeError, "TopKPool1d k integer True"),
    ("top-k: none", lambda: tnn.TopKPool1d(0), ValueError, "TopKPool1d k at least 1 0"),
    ("top-k: more than all", lambda: tnn.TopKPool1d(7)(SEQUENCE), ValueError, "topk_pool1d k=7 length (2, 4, 6)"),
    ("top-k: k float", lambda: T.topk_pool1d(SEQUENCE, 1.0), TypeError, "topk_pool1d k integer 1.0"),
    (
        "top-k: complex",
        lambda: T.topk_pool1d(SEQUENCE.to(torch.complex64), 1),
        TypeError,
        "topk_pool1d order torch.complex64",
    ),
    ("top-k: no tensor", lambda: T.topk_pool1d([1.0], 1), TypeError, "topk_pool1d x torch.Tensor list"),
    # re-orderings
    ("reorder: inner", lambda: tnn.Symmetrize(torch.relu), TypeError, "Symmetrize inner torch.nn.Module builtin"),
    ("reorder: over", lambda: wrap("perm"), ValueError, "Symmetrize over 'perm' 'permutations'"),
    ("reorder: over none", lambda: wrap(None), TypeError, "Symmetrize over 'swap' permutations None"),
    ("reorder: over a number", lambda: wrap(3), TypeError, "Symmetrize over permutations 3"),
    ("reorder: one permutation", lambda: wrap([0, 1]), TypeError, "Symmetrize over permutations [0, 1]"),
    ("reorder: no permutations", lambda: wrap([]), ValueError, "Symmetrize permutations empty"),
    ("reorder: not one", lambda: wrap([[0, 1], [1, 1]]), ValueError, "Symmetrize (1, 1) permutation 0..1"),
    ("reorder: not closed", lambda: wrap([[0, 1, 2], [1, 2, 0]]), ValueError, "Symmetrize closed (2, 0, 1) add"),
    ("reorder: of another axis", lambda: wrap([[0, 1], [1, 0]]), ValueError, "symmetrize (0, 1) permutation 0..3"),
    ("reorder: reduce", lambda: wrap(reduce="prod"), ValueError, "Symmetrize reduce 'prod' 'logsumexp'"),
    ("reorder: the batch", lambda: wrap(dim=0), ValueError, "Symmetrize dim=0 batch"),
    ("reorder: the batch, counted back", lambda: wrap(dim=-3), ValueError, "symmetrize dim=-3 (2, 4, 6) batch"),
    ("reorder: no such axis", lambda: wrap(dim=3), ValueError, "symmetrize dim=3 (2, 4, 6)"),
    ("reorder: dim float", lambda: wrap(dim=1.0), TypeError, "Symmetrize dim integer 1.0"),
    ("reorder: odd halves", lambda: wrap(x=SEQUENCE[:, :3]), ValueError, "symmetrize 'swap' odd 3"),
    ("reorder: too many", lambda: wrap("permutations", torch.ones(1, 8)), ValueError, "symmetrize 8 40320 7"),
    ("reorder: no tensor", lambda: wrap(x=SEQUENCE.numpy()), TypeError, "symmetrize x torch.Tensor ndarray"),
    (
        "reorder: complex",
        lambda: wrap(x=SEQUENCE.to(torch.complex64)),
        TypeError,
        "symmetrize 'max' torch.complex64 'sum'",
    ),
    ("reorder: function: dim", lambda: T.symmetrize(abs, SEQUENCE, dim=None), TypeError, "symmetrize dim integer None"),
    ("reorder: function: inner", lambda: T.symmetrize(None, SEQUENCE), TypeError, "symmetrize inner callable NoneType"),
    (
        "reorder: a tuple",
        lambda: T.symmetrize(lambda z: (z,), SEQUENCE),
        TypeError,
        "symmetrize inner batch of 4 tuple",
    ),
    ("reorder: another batch", lambda: T.symmetrize(torch.sum, SEQUENCE), TypeError, "symmetrize inner batch of 4 ()"),
    # symmetric matrices
    ("matmul: length", lambda: T.symmetric_matmul(torch.ones(6), torch.ones(2, 3)), ValueError, "6 n = 3 (3, 2)"),
    (
        "matmul: dtypes",
        lambda: T.symmetric_matmul(PACKED, torch.ones(2, 3).double()),
        TypeError,
        "symmetric_linear torch.float64 torch.float32 convert",
    ),
    (
        "matmul: devices",
        lambda: T.symmetric_matmul(PACKED, torch.ones(2, 3, device="meta")),
        ValueError,
        "symmetric_linear meta cpu move",
    ),
    (
        "linear: never unpacked on a CPU",
        lambda: T.symmetric_linear(torch.ones(2, 3), PACKED, never_unpack=True),
        NotImplementedError,
        "SymmetricLinear never_unpack=True float32 cpu GPU never_unpack=False",
    ),
    (
        "linear: never unpacked in float64",
        lambda: tritonsym.explain(
            tnn.SymmetricLinear(3, 3, dtype=torch.float64, never_unpack=True), torch.ones(3).double(), "sm_90"
        ),
        NotImplementedError,
        "SymmetricLinear never_unpack=True float64 sm_90 float32",
    ),
    (
        "linear: never unpacked under vmap",
        lambda: torch.func.vmap(lambda x: T.symmetric_linear(x, PACKED, never_unpack=True))(torch.ones(2, 3)),
        NotImplementedError,
        "never_unpack=True torch.func",
    ),
    (
        "linear: by shifts",
        lambda: forced(tritonsym.path("shift"), lambda: T.symmetric_linear(torch.ones(2, 3), PACKED)),
        ValueError,
        "'shift' forced SymmetricLinear float32 cpu remove",
    ),
    ("gram: list", lambda: T.gram([[1.0]]), TypeError, "gram x torch.Tensor list"),
    ("gram: vector", lambda: T.gram(torch.ones(3)), ValueError, "gram (..., m, k) (3,)"),
    ("symmetric_mm: array", lambda: T.symmetric_mm(X.numpy()), TypeError, "symmetric_mm matrix torch.Tensor ndarray"),
    ("symmetric_mm: rectangle", lambda: T.symmetric_mm(PACKED), ValueError, "symmetric_mm (..., n, n) (3, 2)"),
    ("symmetric_mm: alpha", lambda: T.symmetric_mm(X, None), TypeError, "symmetric_mm alpha number None"),
    ("symmetric_mm: beta", lambda: T.symmetric_mm(X, beta="1"), TypeError, "symmetric_mm beta number '1'"),
    ("newton_schulz: none", lambda: T.newton_schulz(None), TypeError, "newton_schulz gradient torch.Tensor NoneType"),
    ("newton_schulz: vector", lambda: T.newton_schulz(X[0, 0, 0]), ValueError, "newton_schulz (..., m, k) (6,)"),
    ("newton_schulz: ints", lambda: T.newton_schulz(X.int()), TypeError, "newton_schulz real floating int32 convert"),
    ("newton_schulz: steps", lambda: T.newton_schulz(X, 2.0), TypeError, "newton_schulz steps integer 2.0"),
    ("newton_schulz: backwards", lambda: T.newton_schulz(X, -1), ValueError, "newton_schulz steps at least 0 -1"),
    (
        "newton_schulz: coefficients",
        lambda: T.newton_schulz(X, 2, (1.5, -0.5)),
        ValueError,
        "newton_schulz coefficients three (a, b, c) (1.5, -0.5)",
    ),
    (
        "newton_schulz: a coefficient",
        lambda: T.newton_schulz(X, 2, (1.5, None, 0)),
        TypeError,
        "newton_schulz coefficients number None",
    ),
    ("newton_schulz: eps", lambda: T.newton_schulz(X, eps=None), TypeError, "newton_schulz eps number None"),
    # switches and plans
    ("backend", lambda: enter(tritonsym.backend("cuda")), ValueError, "backend 'cuda' 'auto', 'reference', 'triton'"),
    ("backend: none", lambda: enter(tritonsym.backend(None)), ValueError, "backend None 'auto'"),
    ("path", lambda: enter(tritonsym.path("fast")), ValueError, "path 'fast' 'reference', 'expand', 'shift'"),
    (
        "tiles that do not fit",
        lambda: forced(tritonsym.path("shift", ((4096, 64, 4), (64, 32, 4))), conv),
        ValueError,
        "'shift' tiles (4096, 64, 4) float32 cpu Plan.tiles",
    ),
    (
        "tiles of a matrix that do not fit",
        lambda: forced(tritonsym.path("expand", ((64, 32, 32, 4, 2),)), lambda: kernels(T.gram, torch.ones(3, 4))),
        ValueError,
        "'expand' tiles (64, 32, 32, 4, 2) float32 cpu Plan.tiles",
    ),
    (
        "shifts of a matrix",
        lambda: forced(tritonsym.path("shift"), lambda: T.gram(torch.ones(3, 4))),
        ValueError,
        "'shift' forced gram float32 cpu remove",
    ),
    ("environment", lambda: with_environment("gpu"), ValueError, "TRITONSYM_BACKEND='gpu' auto, reference, triton"),
    ("kernels on a CPU", lambda: forced(tritonsym.path("expand"), conv), RuntimeError, "cpu TRITON_INTERPRET=1 auto"),
    (
        "expand in float64",
        lambda: forced(tritonsym.path("expand"), lambda: conv(X.double(), W.double())),
        ValueError,
        "'expand' forced SymmetricConv float64 remove",
    ),
    (
        "a kernel that fails",
        failing_kernel,
        RuntimeError,
        "'expand' [1, 2] (2, 4, 6, 6) float32 cpu broken 'reference'",
    ),
    (
        "shifts of complex numbers",
        lambda: forced(tritonsym.path("shift"), lambda: conv(X.to(torch.complex64), W.to(torch.complex64))),
        ValueError,
        "'shift' forced SymmetricConv complex64 remove",
    ),
    ("explain: module", lambda: tritonsym.explain(nn.Conv2d(4, 4, 3), X), TypeError, "explain tritonsym.nn Conv2d"),
    ("explain: no weights", lambda: tritonsym.explain(tnn.TopKPool1d(1), X), TypeError, "explain weights TopKPool1d"),
    ("explain: target", lambda: tritonsym.explain(layer(), X, "h100"), ValueError, "explain target 'h100' 'sm_..'"),
    ("explain: small", lambda: tritonsym.explain(layer(), X[..., :2]), ValueError, "SymmetricConv2d (2, 4, 6, 2) pad"),
    (
        "explain: target of letters",
        lambda: tritonsym.explain(layer(), X, "sm_9x"),
        ValueError,
        "target 'sm_9x' 'sm_..'",
    ),
    ("explain: target number", lambda: tritonsym.explain(layer(), X, 90), ValueError, "explain target 90 'sm_..'"),
    ("explain: input", lambda: tritonsym.explain(layer(), X[0, 0]), ValueError, "SymmetricConv2d (N, 4, ...) (6, 6)"),
    ("explain: no input", lambda: tritonsym.explain(layer(), (2, 4, 6, 6)), TypeError, "explain x torch.Tensor tuple"),
    (
        "explain: linear",
        lambda: tritonsym.explain(tnn.SymmetricLinear(3, 3), X),
        ValueError,
        "SymmetricLinear (..., 3) (2, 4, 6, 6)",
    ),
    (
        "explain: global",
        lambda: tritonsym.explain(tnn.GlobalConv1d(3, 3), X),
        ValueError,
        "GlobalConv1d (N, 3, L) (2, 4, 6, 6)",
    ),
    # conversions
    (
        "from_dense: class",
        lambda: tnn.SymmetricConv2d.from_dense(nn.Conv1d(4, 4, 3), symmetry="h"),
        TypeError,
        "SymmetricConv2d.from_dense torch.nn.Conv2d Conv1d",
    ),
    (
        "from_dense: already",
        lambda: tnn.SymmetricConv2d.from_dense(layer(), symmetry="h"),
        TypeError,
        "SymmetricConv2d.from_dense torch.nn.Conv2d SymmetricConv2d",
    ),
    (
        "from_dense: init",
        lambda: tnn.TiedConv2d.from_dense(nn.Conv2d(4, 4, 3), symmetry="h", init="copy"),
        ValueError,
        "TiedConv2d.from_dense init 'copy' 'project', 'keep', 'reset'",
    ),
    (
        "from_dense: linear",
        lambda: tnn.SymmetricLinear.from_dense(nn.Conv2d(4, 4, 3)),
        TypeError,
        "SymmetricLinear.from_dense torch.nn.Linear Conv2d",
    ),
    (
        "from_dense: rectangle",
        lambda: tnn.SymmetricLinear.from_dense(nn.Linear(4, 3)),
        ValueError,
        "SymmetricLinear in_features=4 out_features=3",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.filterwarnings("ignore:.*identical copies")
def test_message(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    message = str(caught.value)
    assert not missing(words, message), message


LOADS = {
    "a dense checkpoint": (
        layer,
        lambda: nn.Conv2d(4, 8, 3),
        "weight (8, 4, 3, 3) (4, 4, 3, 3) dense SymmetricConv2d.from_dense",
    ),
    "a dense transposed one": (
        up,
        lambda: nn.ConvTranspose2d(4, 8, 3),
        "SymmetricConvTranspose2d.from_dense (4, 8, 3, 3)",
    ),
    "a dense tied one": (tied_layer, lambda: nn.Conv2d(4, 8, 3), "TiedConv2d.from_dense weight (8, 4, 3, 3) (8, 4, 6)"),
    "a dense linear one": (
        lambda: tnn.SymmetricLinear(4, 4),
        lambda: nn.Linear(4, 4),
        "SymmetricLinear.from_dense weight (4, 4) (5, 2)",
    ),
    "another symmetry": (
        layer,
        lambda: layer(symmetry="hv"),
        "SymmetricConv2d weight (2, 4, 3, 3) (4, 4, 3, 3) symmetry",
    ),
    "a bias per channel": (lambda: layer(share_bias=True), layer, "SymmetricConv2d bias (8,) (4,)"),
    "other free filters": (
        lambda: tied_layer(free=2),
        lambda: tied_layer(free=4),
        "TiedConv2d weight (4, 4, 6) (6, 4, 6)",
    ),
    "other channels": (
        lambda: tnn.GlobalConv1d(2, 3),
        lambda: tnn.GlobalConv1d(2, 4),
        "GlobalConv1d center (4, 2) (3, 2)",
    ),
}


@pytest.mark.parametrize(("make", "saved", "words"), LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_wrong_checkpoint_changes_nothing(make, saved, words, assign):
    module = make()
    state = dict(reversed(saved().state_dict().items()))  # what fits comes first
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError) as caught:
        module.load_state_dict(state, assign=assign)
    message = str(caught.value)
    assert not missing(f"load_state_dict {words}", message), message
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def raises(path):
    """First and last line of every statement that raises an error with a message."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.lineno, node.end_lineno


@pytest.mark.filterwarnings("ignore:.*identical copies")
def test_every_message_has_a_case():
    source = Path(tritonsym.__file__).parent
    files = [source / f"{name}.py" for name in ("symmetry", "packing", "functional", "dispatch", "tuned")]
    files += [source / "launch.py"]
    files += sorted((source / "nn").glob("*.py"))
    reached = set()
    calls = [case[1] for case in CASES] + [
        lambda m=m, s=s: m().load_state_dict(s().state_dict()) for m, s, _ in LOADS.values()
    ]
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

"""Layers of escnn, which neither the library nor these tests import: `Theirs` stands in for ``escnn.nn.R2Conv``.

numpy makes its filters from base filters in the order of escnn 1.0.11, of which `RECORDED` holds a sample.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonsym.nn as tnn
from tritonsym import load_escnn

TURN, MIRROR, TURN8 = np.array([[0, -1], [1, 0]]), np.diag([-1, 1]), np.array([[1, -1], [1, 1]]) / 2**0.5


def turned(k, start=0):
    return lambda w: np.rot90(w, k, (-2, -1)), np.linalg.matrix_power(TURN, k)


def mirrored(k):
    """escnn's (-, k): a mirror image, then k quarter turns."""
    return lambda w: np.rot90(w[..., ::-1], k, (-2, -1)), np.linalg.matrix_power(TURN, k) @ MIRROR


GROUPS = {
    "h": [turned(0), mirrored(0)],
    "v": [turned(0), mirrored(2)],
    "hv": [turned(0), turned(2), mirrored(0), mirrored(2)],
    "c2": [turned(0), turned(2)],
    "c4": [turned(k) for k in range(4)],
    "d4": [turned(k) for k in range(4)] + [mirrored(k) for k in range(4)],
    "d4 about a diagonal": [turned(k) for k in range(4)] + [mirrored(k % 4) for k in range(3, 7)],
}
# the filters of a field, times 100, of R2Conv(1 trivial, 1 regular, 3) on flipRot2dOnR2(4)
RECORDED = [
    [62, 102, 0, -27, -48, -22, -58, -32, 9], [0, -22, 9, 102, -48, -32, 62, -27, -58],
    [9, -32, -58, -22, -48, -27, 0, 102, 62], [-58, -27, 62, -32, -48, 102, 9, -22, 0],
    [0, 102, 62, -22, -48, -27, 9, -32, -58], [62, -27, -58, 102, -48, -32, 0, -22, 9],
    [-58, -32, 9, -27, -48, -22, 62, 102, 0], [9, -22, 0, -32, -48, 102, -58, -27, 62],
]  # fmt: skip


class Theirs(nn.Module):
    def __init__(self, elements, fields=3, into=2, kernel_size=3, bias=True, **options):
        super().__init__()
        moves, matrices = zip(*elements, strict=True)
        defaults = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
        self.__dict__.update(defaults | {"kernel_size": kernel_size} | options)
        base = np.random.default_rng(0).normal(size=(fields, into // self.groups, kernel_size, kernel_size))
        self.filter = nn.Parameter(torch.tensor(np.stack([move(base) for move in moves], 1)).flatten(0, 1))
        self.bias = nn.Parameter(torch.randn(fields, dtype=torch.double)) if bias else None
        self.order = len(moves)
        named = range(self.order)

        def regular(g):
            images = [[np.allclose(matrices[g] @ matrices[h], a) for h in named] for a in matrices]
            return np.array(images, dtype=float)

        gspace = SimpleNamespace(
            fibergroup=SimpleNamespace(elements=list(named)), basespace_action=matrices.__getitem__
        )
        self.in_type = SimpleNamespace(representations=[lambda g: np.eye(1)] * into, gspace=gspace)
        self.out_type = SimpleNamespace(representations=[regular] * fields, gspace=gspace)

    def expand_parameters(self):
        return self.filter * 1, None if self.bias is None else self.bias.repeat_interleave(self.order)

    def forward(self, x):
        return F.conv2d(x, *self.expand_parameters(), self.stride, self.padding, self.dilation, self.groups)


OPTIONS = [{}, {"kernel_size": 4, "stride": 2, "bias": False}, {"groups": 2, "fields": 4, "into": 4, "dilation": 2}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", GROUPS)
def test_outputs_equal_those_of_escnn_in_its_order(name, options):
    theirs = Theirs(GROUPS[name], **options).eval()
    layer, order = load_escnn(theirs)
    x = torch.randn(2, len(theirs.in_type.representations), 9, 9, dtype=torch.double)
    torch.testing.assert_close(layer(x)[:, order], theirs(x), rtol=1e-5, atol=1e-5)
    assert layer.symmetry == name.split()[0] and layer.weight.shape[0] * theirs.order == theirs.filter.shape[0]
    assert not layer.training and layer.weight.requires_grad
    assert (layer.bias is None) == (theirs.bias is None)


def test_filters_that_escnn_gave():
    theirs = Theirs(GROUPS["d4"], fields=1, into=1, bias=False)
    theirs.filter.data = torch.tensor(RECORDED, dtype=torch.double).view(8, 1, 3, 3)
    theirs.filter.requires_grad_(False)
    layer, order = load_escnn(theirs)
    assert torch.equal(layer.expanded_weight()[order], theirs.filter) and not layer.weight.requires_grad


def spoiled(elements=None, **changes):
    theirs = Theirs(elements or GROUPS["c4"])
    for key, value in changes.items():
        getattr(theirs, key).representations[-1] = value
    return theirs


def moved(theirs, parameter):
    filters, bias = theirs.expand_parameters()
    (filters if parameter == "filter" else bias).data[5] += 1e-3
    theirs.expand_parameters = lambda: (filters, bias)
    return theirs


def continuous(theirs):
    theirs.out_type.gspace.fibergroup.elements = None
    return theirs


EIGHTH = [(lambda w: w, np.linalg.matrix_power(TURN8, k)) for k in range(8)]
SPACE = [(lambda w: w, a) for a in (np.eye(3), np.diag([1, 1, -1]))]
REFUSED = {
    "eight turns": (lambda: spoiled(EIGHTH), ValueError, "the group is .*'c4' or 'd4' fit"),
    "diagonal": (lambda: spoiled([turned(0), mirrored(1)]), ValueError, "the group is .*otherwise; .* fit"),
    "3-D": (lambda: spoiled(SPACE), ValueError, "the group is"),
    "one element": (lambda: spoiled([turned(0)]), ValueError, "the group is"),
    "continuous": (lambda: continuous(spoiled()), ValueError, "the group is"),
    "regular in": (lambda: spoiled(in_type=lambda g: np.eye(4)), ValueError, "in_type has .*not trivial; .* fit"),
    "sign": (lambda: spoiled(in_type=lambda g: np.array([[(-1.0) ** g]])), ValueError, "in_type has .*not trivial"),
    "trivial out": (lambda: spoiled(out_type=lambda g: np.eye(1)), ValueError, "out_type has .*not regular; .* fit"),
    "irreducible out": (lambda: spoiled(out_type=turned(1)[1].__mul__), ValueError, "out_type has .*not regular"),
    "filter": (lambda: moved(spoiled(), "filter"), ValueError, "a filter differs .* by 0.001; .* fit"),
    "bias": (lambda: moved(spoiled(), "bias"), ValueError, "a bias differs .* by 0.00075"),
    "torch": (lambda: nn.Conv2d(1, 4, 3), TypeError, "expected an escnn.nn.R2Conv, got Conv2d"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layers_are_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=f"load_escnn: {message}"):
        load_escnn(make())


@pytest.mark.parametrize("cls", [tnn.SymmetricConv2d, tnn.SymmetricConvTranspose2d])
def test_dense_layers_with_every_orbit_in_one_piece(cls):
    ours = cls(4, 24, 3, groups=2, symmetry={"hv": 16, "h": 4}, dtype=torch.double)
    dense, by_field = ours.to_dense(), list(ours.layout.by_field)
    assert (
        by_field[12:]
        == [12 + channel for channel in by_field[:12]]
        == [12 + c for c in (0, 5, 1, 6, 8, 10, 2, 7, 9, 11, 3, 4)]
    )
    with torch.no_grad():
        if ours.transposed:
            dense.weight.copy_(dense.weight[:, by_field[:12]].clone())
        else:
            dense.weight.copy_(dense.weight[by_field].clone())
        dense.bias.copy_(dense.bias[by_field].clone())
    x = torch.randn(1, 4, 6, 6, dtype=torch.double)
    for init in ("rescale", "keep"):
        layer = cls.from_dense(dense, symmetry=ours.symmetry, init=init, order="field")
        torch.testing.assert_close(layer(x)[:, by_field], dense(x))
        torch.testing.assert_close(layer(x), ours(x))

"""Draw README's figure of the symmetries: a filter and its orbit, a filter that is its own image, a symmetric matrix.

The weights are those of layers of `tritonsym.nn`, filled with few distinct values; the picture is an SVG with the same
text on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tritonsym.nn as tnn

CELL, GAP = 16, 20  # sizes of a weight, and between two filters
STORED, TEXT = "#111111", "#333333"
LETTER = ("1111.", "1....", "111..", "1....", "1....")  # an F: no two of its mirror images look alike


def _colour(value: float) -> str:
    """From blue through white to orange, for -1 to 1."""
    low, high = (255, 255, 255), (214, 96, 20) if value > 0 else (33, 102, 172)
    return "#" + "".join(f"{round(a + (b - a) * min(abs(value), 1)):02x}" for a, b in zip(low, high, strict=True))


def _grid(matrix: Tensor, x: int, y: int, stored: Tensor, title: str) -> list[str]:
    """The cells of a matrix; stored ones have a dark rim."""
    side = CELL * matrix.shape[1]
    parts = [f'<text x="{x + side // 2}" y="{y - 8}" text-anchor="middle">{title}</text>']
    for i, line in enumerate(matrix.tolist()):
        for j, value in enumerate(line):
            at = f'x="{x + CELL * j}" y="{y + CELL * i}" width="{CELL}" height="{CELL}"'
            parts.append(f'<rect {at} fill="{_colour(value)}" stroke="#dddddd"/>')
    for i, j in stored.nonzero().tolist():
        at = f'x="{x + CELL * j + 1}" y="{y + CELL * i + 1}" width="{CELL - 2}" height="{CELL - 2}"'
        parts.append(f'<rect {at} fill="none" stroke="{STORED}" stroke-width="1.5"/>')
    return parts


def _values(count: int) -> Tensor:
    """`count` different numbers of both signs, without a visible order."""
    return torch.tensor([((7 * i) % count + 0.5) / count * 2 - 1 for i in range(count)])


@torch.no_grad()
def drawn() -> str:
    """The picture as SVG text."""
    orbit = tnn.SymmetricConv2d(1, 4, 5, symmetry="hv")
    letter = torch.tensor([[float(dot == "1") for dot in line] for line in LETTER])
    orbit.weight.copy_(0.25 * _values(25).view_as(orbit.weight) + 1.05 * letter - 0.3)
    tied = tnn.TiedConv2d(1, 1, 5, symmetry="hv")
    tied.weight.copy_(_values(tied.weight.numel()).view_as(tied.weight))
    linear = tnn.SymmetricLinear(5, 5)
    linear.weight.copy_(_values(15).view_as(linear.weight))

    whole, none = torch.ones(5, 5), torch.zeros(5, 5)
    quadrant = none.clone()
    quadrant[:3, :3] = 1
    images = orbit.expanded_weight()[:, 0]
    # the orbit in the order of its elements: as it is, mirrored left-right, up-down, and both
    filters = [(images[0], whole, "filter"), (images[1], none, "h"), (images[2], none, "v"), (images[3], none, "hv")]
    tied_image, matrix = tied.expanded_weight()[0, 0], linear.expanded_weight()
    filters += [(tied_image, quadrant, "tied filter"), (matrix, whole.tril(), "S = Sᵀ")]
    parts, x, top = [], GAP, 56
    step = 5 * CELL + GAP
    heads = [
        (0, 4, "SymmetricConv2d, symmetry='hv': 1 stored, 4 used"),
        (4, 1, "TiedConv2d"),
        (5, 1, "SymmetricLinear"),
    ]
    for i, (values, stored, title) in enumerate(filters):
        parts += _grid(values, x + i * step + GAP * max(0, i - 3), top, stored, title)
    for first, count, title in heads:
        middle = x + first * step + GAP * max(0, first - 3) + (count * step - GAP) // 2
        parts.append(f'<text x="{middle}" y="20" text-anchor="middle" font-weight="bold">{title}</text>')
    width, height = 2 * GAP + 6 * step + GAP, top + 5 * CELL + 34
    parts.append(f'<text x="{GAP}" y="{height - 10}">Dark rims: what is stored and trained.</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    style = f'font-family="sans-serif" font-size="12" fill="{TEXT}">'
    return "\n".join([f"{head} {style}", f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>\n"])

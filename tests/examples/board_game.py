"""A tower for 19 x 19 boards: policy and value follow all 8 symmetries of the square without learning them."""

import torch
from torch import Tensor, nn

import tritonsym.nn as tnn

G = "d4"


def convolution(into: int, out: int) -> nn.Sequential:
    conv = tnn.GroupConv2d(into, out, 3, padding=1, bias=False, symmetry=G)
    return nn.Sequential(conv, tnn.GroupBatchNorm2d(out, G))


class Residual(nn.Module):
    def __init__(self, fields: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(fields, fields), nn.ReLU(), convolution(fields, fields))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Tower(nn.Module):
    """Boards (N, planes, 19, 19) to the logits of all points and a pass (N, 362), and a value (N,)."""

    def __init__(self, planes: int = 17, fields: int = 8, blocks: int = 4) -> None:
        super().__init__()
        lift = tnn.SymmetricConv2d(planes, 8 * fields, 3, padding=1, symmetry=G, share_bias=True)
        self.trunk = nn.Sequential(
            lift, nn.ReLU(), *(Residual(fields) for _ in range(blocks)), tnn.GroupPool(G, "mean")
        )
        self.points = nn.Conv2d(fields, 1, 1)
        self.rest = nn.Linear(fields, 2)

    def forward(self, boards: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(boards)
        skip, value = self.rest(x.mean((2, 3))).unbind(1)
        return torch.cat([self.points(x).flatten(1), skip[:, None]], 1), value.tanh()

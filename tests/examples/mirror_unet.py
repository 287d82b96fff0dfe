"""A 3-D U-Net whose output for a mirrored volume is the mirrored output: the 8 passes of mirrored test-time
augmentation would be equal, so one is enough. Every layer but the first and the last takes fields of 'hvz'."""

import torch
from torch import Tensor, nn

import tritonsym.nn as tnn

G = "hvz"  # 8 elements


def block(into: int, out: int) -> nn.Sequential:
    conv = tnn.GroupConv3d(into, out, 3, padding=1, bias=False, symmetry=G)
    return nn.Sequential(conv, tnn.GroupBatchNorm3d(out, G), nn.ReLU())


class Residual(nn.Module):
    """A residual block of fields."""

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.body = nn.Sequential(block(fields, fields), tnn.GroupConv3d(fields, fields, 3, padding=1, symmetry=G))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def joined(a: Tensor, b: Tensor) -> Tensor:
    """The fields of a and b; channels are ordered by element first."""
    return torch.cat([a.unflatten(1, (8, -1)), b.unflatten(1, (8, -1))], 2).flatten(1, 2)


class UNet(nn.Module):
    """Volumes (N, channels, D, H, W), sides divisible by 4, to logits (N, classes, D, H, W)."""

    def __init__(self, channels: int, classes: int, fields: int = 4) -> None:
        super().__init__()
        f = fields
        self.lift = tnn.SymmetricConv3d(channels, 8 * f, 3, padding=1, symmetry=G, share_bias=True)
        self.down = nn.ModuleList([Residual(f), Residual(2 * f), Residual(4 * f)])
        self.widen = nn.ModuleList([block(f, 2 * f), block(2 * f, 4 * f)])
        self.up = nn.ModuleList([block(6 * f, 2 * f), block(3 * f, f)])
        self.head = nn.Sequential(tnn.GroupPool(G, "mean"), nn.Conv3d(f, classes, 1))
        self.pool, self.larger = nn.MaxPool3d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down[0](self.lift(x))
        middle = self.down[1](self.widen[0](self.pool(fine)))
        coarse = self.down[2](self.widen[1](self.pool(middle)))
        middle = self.up[0](joined(self.larger(coarse), middle))
        return self.head(self.up[1](joined(self.larger(middle), fine)))

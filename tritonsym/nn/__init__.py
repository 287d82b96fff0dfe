"""Layers with weights tied by a symmetry, as drop-ins for their `torch.nn` counterparts."""

from tritonsym.nn.conv import (
    OrbitPoolConv1d,
    OrbitPoolConv2d,
    OrbitPoolConv3d,
    SymmetricConv1d,
    SymmetricConv2d,
    SymmetricConv3d,
    SymmetricConvTranspose1d,
    SymmetricConvTranspose2d,
    SymmetricConvTranspose3d,
    TiedConv1d,
    TiedConv2d,
    TiedConv3d,
)
from tritonsym.nn.group import (
    GroupBatchNorm1d,
    GroupBatchNorm2d,
    GroupBatchNorm3d,
    GroupConv1d,
    GroupConv2d,
    GroupConv3d,
    GroupDropout,
    GroupLinear,
    GroupPool,
)
from tritonsym.nn.linear import SkewLinear, SymmetricLinear
from tritonsym.nn.pool import GlobalConv1d, TopKPool1d
from tritonsym.nn.symmetrize import Symmetrize

__all__ = [
    "GlobalConv1d",
    "GroupBatchNorm1d",
    "GroupBatchNorm2d",
    "GroupBatchNorm3d",
    "GroupConv1d",
    "GroupConv2d",
    "GroupConv3d",
    "GroupDropout",
    "GroupLinear",
    "GroupPool",
    "OrbitPoolConv1d",
    "OrbitPoolConv2d",
    "OrbitPoolConv3d",
    "SkewLinear",
    "SymmetricConv1d",
    "SymmetricConv2d",
    "SymmetricConv3d",
    "SymmetricConvTranspose1d",
    "SymmetricConvTranspose2d",
    "SymmetricConvTranspose3d",
    "SymmetricLinear",
    "Symmetrize",
    "TiedConv1d",
    "TiedConv2d",
    "TiedConv3d",
    "TopKPool1d",
]

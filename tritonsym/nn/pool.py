"""Layers for sets and sequences whose order does not matter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tritonsym import functional, plan
from tritonsym.nn.conv import Checkpoints


class GlobalConv1d(Checkpoints):
    """Permutation-equivariant layer: y_i = act(W_c x_i + W_s sum_{j != i} x_j + b), O(L) in the length L.

    `center` and `surround` are (out, in). See `tritonsym.functional.global_conv1d`.

    Args:
        in_channels, out_channels, bias, device, dtype: as in a `torch.nn.Conv1d` with kernel size 1.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.

    >>> layer, x, order = nn.GlobalConv1d(2, 3), torch.randn(1, 2, 5), torch.randperm(5)
    >>> torch.testing.assert_close(layer(x[..., order]), layer(x)[..., order])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: functional.Activation | None = None,
    ) -> None:
        super().__init__()
        functional.check_activation("GlobalConv1d", activation)
        in_channels, out_channels = functional.check_counts(
            "GlobalConv1d", 1, in_channels=in_channels, out_channels=out_channels
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.activation = activation
        options = {"device": device, "dtype": dtype}
        self.center = nn.Parameter(torch.empty(out_channels, in_channels, **options))
        self.surround = nn.Parameter(torch.empty(out_channels, in_channels, **options))
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-a, a) with a = 1 / sqrt(in_channels): each matrix as in a convolution with kernel size 1.

        The fan-in of the equivalent wrap-around kernel depends on the length, which the layer does not know.
        """
        bound = 1 / math.sqrt(self.in_channels)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return functional.global_conv1d(x, self.center, self.surround, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}"
        return text + (f", activation={self.activation!r}" if self.activation else "")

    def problem(self, x: Tensor, target: str, training: bool) -> plan.FixedProblem:
        """The problem to plan for a call on x; the dense layer is the wrap-around convolution."""
        if x.ndim not in (2, 3) or x.shape[-2] != self.in_channels:
            expected = f"(N, {self.in_channels}, L) or ({self.in_channels}, L)"
            raise ValueError(f"GlobalConv1d: expected an input {expected}, got {tuple(x.shape)}")
        one, length = math.prod(x.shape[:-2]) * self.in_channels * self.out_channels, x.shape[-1]
        dense, cheap = one * length * (2 * length + 1), one * (length + 1)
        return plan.FixedProblem("GlobalConv1d", target, plan.dtype_name(x), dense, cheap)

    def expanded_weight(self, length: int) -> Tensor:
        """The kernel (out, in, 2 length + 1) of the equivalent convolution, with padding = length; differentiable."""
        surround = self.surround[..., None].expand(-1, -1, length)
        return torch.cat([surround, self.center[..., None], surround], -1)

    def expanded_bias(self) -> Tensor | None:
        return self.bias


class TopKPool1d(nn.Module):
    """The k largest values of every channel, in descending order: (..., L) -> (..., k). k = 1 is global max pooling.

    >>> nn.TopKPool1d(2)(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([[3., 2.]])
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        (self.k,) = functional.check_counts("TopKPool1d", 1, k=k)

    def forward(self, x: Tensor) -> Tensor:
        return functional.topk_pool1d(x, self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}"

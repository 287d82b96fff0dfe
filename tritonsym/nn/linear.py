"""Linear layers whose weight is exactly symmetric or skew-symmetric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tritonsym import functional, packing, plan
from tritonsym.nn.conv import INITS, Checkpoints, Init, check_normalized, learns, with_activation

if TYPE_CHECKING:
    from typing_extensions import Self


class SymmetricLinear(Checkpoints):
    """y = act(x S + b) with an exactly symmetric S (S = S^T to the bit), stored as n(n+1)/2 values.

    `weight` is S in rectangular full packed storage, shape `tritonsym.packing.packed_shape(n)`. `torch.optim.Muon`
    would take that rectangle for a matrix and orthogonalise it, which is meaningless for S: give the weight to AdamW.

    Args:
        in_features, out_features: both n. (There are two, so that the layer drops in for `torch.nn.Linear`.)
        bias, device, dtype: as in `torch.nn.Linear`.
        activation: None, 'relu', 'gelu', 'silu', 'sigmoid' or 'tanh'.
        never_unpack: as in `functional.symmetric_linear`: S is never built, even where that is slower.

    Raises:
        ValueError: in_features != out_features.

    A product with S takes as many multiply-adds as a dense one; only memory is saved. On a GPU, where nothing was
    measured, S is unpacked in every call by default for n <= 2048, for n not divisible by 16, and in float32.

    >>> layer = nn.SymmetricLinear(4, 4)
    >>> layer.weight.numel(), torch.equal(layer.expanded_weight(), layer.expanded_weight().T)
    (10, True)
    """

    bias: nn.Parameter | None
    _skew: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: functional.Activation | None = None,
        never_unpack: bool = False,
    ) -> None:
        super().__init__()
        in_features, out_features = functional.check_counts(
            type(self).__name__, 1, in_features=in_features, out_features=out_features
        )
        if in_features != out_features:
            raise ValueError(
                f"{type(self).__name__}: a symmetric weight is square, but in_features={in_features} and "
                f"out_features={out_features}; make them equal or use torch.nn.Linear"
            )
        functional.check_activation(type(self).__name__, activation)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.never_unpack = never_unpack
        self.weight = nn.Parameter(
            torch.empty(packing.packed_shape(in_features - self._skew), device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(in_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-a, a) with a = 1 / sqrt(n), as `torch.nn.Linear` initialises."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        if self._modules or self._forward_pre_hooks:
            check_normalized(self)
        if tuple(self.weight.shape) != (expected := packing.packed_shape(self.in_features - self._skew)):
            raise ValueError(
                f"{type(self).__name__}: weight has shape {tuple(self.weight.shape)}, expected {expected}: the packed "
                f"rectangle; pack a full matrix by tritonsym.pack(S{', skew=True' if self._skew else ''})"
            )
        return functional.symmetric_linear(
            input,
            self.weight,
            self.bias,
            activation=self.activation,
            never_unpack=self.never_unpack,
            skew=self._skew,
        )

    def _dense_shapes(self) -> Mapping[str, Sequence[int]]:
        return {"weight": self._dense_shape()}

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", activation={self.activation!r}" if self.activation else ""
        return text + (", never_unpack=True" if self.never_unpack else "")

    def expanded_weight(self) -> Tensor:
        """S, (n, n), differentiable."""
        return packing.unpack(packing.gathered(self.weight), skew=self._skew)

    def expanded_bias(self) -> Tensor | None:
        return self.bias

    def problem(self, x: Tensor, target: str, training: bool) -> plan.LinearProblem:
        """The problem to plan for a call on x; x S takes n^2 multiply-adds per row, however S is stored."""
        n = self.in_features
        if x.ndim == 0 or x.shape[-1] != n:
            raise ValueError(f"{type(self).__name__}: expected an input (..., {n}), got {tuple(x.shape)}")
        return plan.linear_problem(x.shape, target, plan.dtype_name(x), self.never_unpack, training, self._skew)

    def to_dense(self) -> nn.Module:
        """The plain `torch.nn.Linear` with equal outputs (followed by the activation's module, if there is one)."""
        n = self.in_features
        layer = nn.Linear(n, n, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.expanded_weight().detach(), learns(self))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), learns(self, bias=True))
        return with_activation(layer.train(self.training), self.activation)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        *,
        activation: functional.Activation | None = None,
        never_unpack: bool = False,
        init: Init = "rescale",
    ) -> Self:
        """Convert a `torch.nn.Linear`, whose weight W is projected, rescaled, kept or reset as `init` says.

        'project' stores (W + W^T) / 2; 'rescale' scales that to the norm of W; 'keep' keeps the lower triangle of W.

        Raises:
            TypeError: not a `torch.nn.Linear`.
            ValueError: in_features != out_features, or an unknown `init`.
        """
        functional.check_choice(f"{cls.__name__}.from_dense", "init", init, INITS)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{cls.__name__}.from_dense: expected torch.nn.Linear, got {type(layer).__name__}")
        weight, bias = layer.weight, layer.bias
        options: dict[str, Any] = {"activation": activation, "never_unpack": never_unpack}
        self = cls(layer.in_features, layer.out_features, bias is not None, weight.device, weight.dtype, **options)
        with torch.no_grad():
            if init != "reset":
                self._adopt(weight, bias, init)
        self.weight.requires_grad_(weight.requires_grad)
        if bias is not None:
            self.bias.requires_grad_(bias.requires_grad)  # type: ignore[union-attr]
        return self.train(layer.training)

    def _dense_shape(self) -> tuple[int, int]:
        return self.in_features, self.in_features

    def _adopt(self, weight: Tensor, bias: Tensor | None, init: str) -> None:
        if bias is not None:
            self.bias.copy_(bias)  # type: ignore[union-attr]
        self.weight.copy_(packing.pack(weight, "lower" if init == "keep" else "average", skew=self._skew))
        if init == "rescale":
            wide = torch.promote_types(weight.dtype, torch.float64)
            before, after = (
                torch.linalg.vector_norm(w.contiguous().to(wide)) for w in (weight, self.expanded_weight())
            )
            is_left = after > torch.finfo(weight.dtype).eps * before  # else the projection is zero up to rounding
            self.weight.mul_(torch.where(is_left, before / after, 1.0))

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        bias: Tensor | None = None,
        *,
        activation: functional.Activation | None = None,
        never_unpack: bool = False,
    ) -> Self:
        """A layer that stores these values: ``from_packed(pack_tril(v))``, ``from_packed(pack(S, 'average'))``, ...

        Raises:
            ValueError: `packed` has the `packed_shape` of no n, or the bias is not (n,).
            TypeError: `packed` holds integers.
        """
        where = f"{cls.__name__}.from_packed"
        n = packing.order_of(packed, where) + cls._skew
        packing.check_inexact(where, "packed", packed)
        functional.check_bias(where, bias, n)
        options: dict[str, Any] = {"activation": activation, "never_unpack": never_unpack}
        self = cls(n, n, bias is not None, packed.device, packed.dtype, **options)
        with torch.no_grad():
            self.weight.copy_(packed)
            if bias is not None:
                self.bias.copy_(bias)  # type: ignore[union-attr]
        return self


class SkewLinear(SymmetricLinear):
    """y = act(x W^T + b) with an exactly skew-symmetric W (W = -W^T to the bit), stored as n(n-1)/2 values.

    `weight` is W as `tritonsym.pack` packs it with ``skew=True``, shape `tritonsym.packing.packed_shape(n - 1)`. The
    rest is as in `SymmetricLinear`; `from_dense` projects to (W - W^T) / 2. On a GPU its Triton kernel runs only on
    request (``tritonsym.backend("triton")``, `never_unpack`).

    >>> layer = nn.SkewLinear(4, 4)
    >>> layer.weight.numel(), torch.equal(layer.expanded_weight(), -layer.expanded_weight().T)
    (6, True)
    """

    _skew = True

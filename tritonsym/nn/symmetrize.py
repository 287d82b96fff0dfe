"""A wrapper that makes any model independent of the order of its inputs."""

from __future__ import annotations

from torch import Tensor, nn

from tritonsym import functional
from tritonsym.reference import REDUCTIONS


class Symmetrize(nn.Module):
    """f(x, y) = f(y, x), hard-wired: run `inner` on every re-ordering of its input, in one batched call, and reduce.

    The outputs for re-ordered inputs are equal to the bit for every reduction, as long as `inner` is deterministic:
    see `tritonsym.functional.symmetrize`, also for the arguments.

    Raises:
        ValueError: an unknown `over` or `reduce`, or `dim` is the batch axis 0.
        TypeError: `inner` is not a module.

    >>> model = nn.Symmetrize(torch.nn.Linear(6, 3), over="swap")
    >>> x, y = torch.randn(2, 8, 3)
    >>> torch.equal(model(torch.cat([x, y], 1)), model(torch.cat([y, x], 1)))
    True
    """

    def __init__(self, inner: nn.Module, over: functional.Orders = "swap", dim: int = 1, reduce: str = "max") -> None:
        super().__init__()
        if not isinstance(inner, nn.Module):
            raise TypeError(f"Symmetrize: inner must be a torch.nn.Module, got {type(inner).__name__}")
        functional.check_choice("Symmetrize", "reduce", reduce, tuple(REDUCTIONS))
        if isinstance(over, str):
            functional.check_choice("Symmetrize", "over", over, functional.ORDERS)
        else:
            over = functional.orders_of(over, functional.order_length(over), "Symmetrize")
        if not functional.is_count(dim):
            raise TypeError(f"Symmetrize: dim must be an integer, got {dim!r}")
        if dim == 0:
            raise ValueError("Symmetrize: dim=0 is the batch axis; name the axis of the inputs to re-order")
        self.inner = inner
        self.over = over
        self.dim = dim
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        return functional.symmetrize(self.inner, x, self.over, self.dim, self.reduce)

    def extra_repr(self) -> str:
        return f"over={self.over!r}, dim={self.dim}, reduce={self.reduce!r}"

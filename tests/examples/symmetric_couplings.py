"""Couplings J = J^T from data: a network of spins s = +-1 (Ising, Boltzmann, Hopfield) fitted by pseudo-likelihood.

Every spin sees the field sum_j J_ij s_j of the others. `SymmetricLinear` stores J_ij = J_ji once, so J stays symmetric
to the bit, and the energy -s J s / 2 exists.
"""

import torch
from torch import Tensor, nn

import tritonsym.nn as tnn
from tritonsym.functional import quadratic_form


class Couplings(nn.Module):
    def __init__(self, spins: int) -> None:
        super().__init__()
        self.couplings = tnn.SymmetricLinear(spins, spins)
        nn.init.zeros_(self.couplings.weight)
        nn.init.zeros_(self.couplings.bias)

    def field(self, s: Tensor) -> Tensor:
        """The field (N, spins) at every spin, without the spin's own."""
        own = self.couplings.expanded_weight().diagonal()
        return self.couplings(s) - own * s

    def energy(self, s: Tensor) -> Tensor:
        """(N,), up to a constant, since s_i^2 = 1."""
        return -quadratic_form(self.couplings.weight, s) / 2 - s @ self.couplings.bias

    def loss(self, s: Tensor) -> Tensor:
        """Minus the log-likelihood of every spin, given all others."""
        return nn.functional.softplus(-2 * s * self.field(s)).mean()

    @torch.no_grad()
    def recall(self, s: Tensor, sweeps: int = 5) -> Tensor:
        """Spins follow their fields, one after the other: the energy only falls."""
        s = s.clone()
        for i in list(range(s.shape[1])) * sweeps:
            s[:, i] = self.field(s)[:, i].sign()
        return s


def fit(model: Couplings, patterns: Tensor, steps: int = 200) -> list[float]:
    """Fit the model; return the losses."""
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(patterns)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

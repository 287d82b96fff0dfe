"""Muon in 30 lines: `torch.optim.Muon`, with all matrices of a step orthogonalised together.

Run as a script it trains a small model with both and prints the time of a step and the losses.
"""

import torch
from torch import nn

from tritonsym.functional import newton_schulz


class Muon(torch.optim.Optimizer):
    """For matrices of any shapes; the other parameters want another optimiser (Adam, usually)."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, steps=5):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            params = [p for p in group["params"] if p.grad is not None]
            updates = []
            for p in params:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(buffer, momentum).bfloat16())
            for p, update in zip(params, newton_schulz(updates, group["steps"]), strict=True):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
        return loss


if __name__ == "__main__":
    import json
    import statistics
    import time

    MODELS = {
        "126 small matrices of 42 shapes": [(16 + 2 * i, 40 + 3 * i) for i in range(42)] * 3,
        "12 layers of a transformer, d = 256": [(768, 256), (256, 256), (1024, 256), (256, 1024)] * 12,
        "a layer of a transformer, d = 1024": [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)],
    }
    for name, shapes in MODELS.items():
        found = {}
        for optimiser in (torch.optim.Muon, Muon):
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(shape) / shape[1] ** 0.5) for shape in shapes]
            targets = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
            found[optimiser] = ([], [], params, targets, optimiser(params, lr=0.01))
        for _ in range(6):
            for seconds, losses, params, targets, optimiser in found.values():
                loss = sum((p - t).square().sum() for p, t in zip(params, targets, strict=True))
                optimiser.zero_grad()
                loss.backward()
                start = time.perf_counter()
                optimiser.step()
                seconds.append(round(time.perf_counter() - start, 5))
                losses.append(round(loss.item(), 3))
        (theirs, their_loss, *_), (ours, our_loss, *_) = found.values()
        row = {"torch.optim.Muon": theirs, "ours": ours, "losses": [their_loss[-1], our_loss[-1]]}
        print(json.dumps({"model": name, "speedup": statistics.median(theirs) / statistics.median(ours), **row}))

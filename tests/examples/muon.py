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
    import statistics
    import time

    from tritonsym.perf import bench

    MODELS = {
        "126 small matrices of 42 shapes": [(16 + 2 * i, 40 + 3 * i) for i in range(42)] * 3,
        "12 layers of a transformer, d = 256": [(768, 256), (256, 256), (1024, 256), (256, 1024)] * 12,
        "a layer of a transformer, d = 1024": [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)],
    }
    rows = []
    for name, shapes in MODELS.items():
        found = {}
        for kind in (torch.optim.Muon, Muon):
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(shape) / shape[1] ** 0.5) for shape in shapes]
            targets = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
            found[kind] = ([], [], params, targets, kind(params, lr=0.01))
        for _ in range(6):
            for seconds, losses, params, targets, optimiser in found.values():
                loss = sum((p - t).square().sum() for p, t in zip(params, targets, strict=True))
                optimiser.zero_grad()
                loss.backward()
                start = time.perf_counter()
                optimiser.step()
                seconds.append(round(time.perf_counter() - start, 5))
                losses.append(round(loss.item(), 3))
        (torchs, their_losses, *_), (ours, our_losses, *_) = found.values()
        speedup = round(statistics.median(torchs) / statistics.median(ours), 2)
        rows.append({"model": name, "speedup": speedup, "torch.optim.Muon": torchs, "ours": ours})
        rows[-1] |= {"last losses": [their_losses[-1], our_losses[-1]]}
    command = {"command": ["python", "tests/examples/muon.py"]}
    print(bench.dumped({**bench.machine("", None, torch.device("cpu")), **command, "rows": rows}), end="")

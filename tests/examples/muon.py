"""`torch.optim.Muon` with all matrices of a step orthogonalised together; as a script, it times both."""

import torch
from torch import nn

from tritonsym.functional import newton_schulz


class Muon(torch.optim.Optimizer):
    """For matrices of any shapes; other parameters need another optimiser, usually Adam."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, steps=5):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            params = [p for p in group["params"] if p.grad is not None]
            updates = []
            for p in params:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(buffer, momentum).bfloat16())
            for p, update in zip(params, newton_schulz(updates, group["steps"]), strict=True):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
        return loss


if __name__ == "__main__":
    from statistics import median
    from time import perf_counter

    from tritonsym.perf import bench

    MODELS = {
        "126 small matrices of 42 shapes": [(16 + 2 * i, 40 + 3 * i) for i in range(42)] * 3,
        "12 layers of a transformer, d = 256": [(768, 256), (256, 256), (1024, 256), (256, 1024)] * 12,
        "a layer of a transformer, d = 1024": [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)],
    }
    rows, command = [], {"command": ["python", "tests/examples/muon.py"]}
    for name, shapes in MODELS.items():
        start, targets = ([torch.randn(shape) / shape[1] ** 0.5 for shape in shapes] for _ in range(2))
        params = {kind: [nn.Parameter(p.clone()) for p in start] for kind in (torch.optim.Muon, Muon)}
        optimizers = {kind: kind(params[kind], lr=0.01) for kind in params}
        seconds, losses = ({kind: [] for kind in params} for _ in range(2))
        for kind in [*params] * 6:
            loss = sum((p - t).square().sum() for p, t in zip(params[kind], targets, strict=True))
            optimizers[kind].zero_grad()
            loss.backward()
            begin = perf_counter()
            optimizers[kind].step()
            seconds[kind].append(round(perf_counter() - begin, 5))
            losses[kind].append(round(loss.item(), 3))
        (torchs, ours), last = seconds.values(), [found[-1] for found in losses.values()]
        row = {"model": name, "speedup": round(median(torchs) / median(ours), 2), "torch.optim.Muon": torchs}
        rows.append({**row, "ours": ours, "last losses": last})
    print(bench.dumped({**bench.machine("", None, torch.device("cpu")), **command, "rows": rows}), end="")

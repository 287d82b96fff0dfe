"""How much more than the dense convolution the shift path rounds on this machine's CPU, in float32.

    python -m tritonsym.perf.rounding --output perf/results/NAME.json

For one image of every case, in both memory formats: the error against float64 of the output and of the gradients to the
input and the weight, over that of the dense convolution on the expanded weight, as a maximum and as a root mean square,
and the maximum over what `tritonsym.testing.assert_matches_reference` allows ("rule": twice the dense error, plus eps).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tritonsym
from tritonsym.perf.bench import machine
from tritonsym.perf.cases import CPU, Case

NORMS = ("max", "rms", "rule")


def _results(layer: nn.Module, x: Tensor, path: str) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    with tritonsym.path(path):
        y = layer(x)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator).to(y.dtype)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), upstream)
    return {"output": y.detach(), "dx": dx, "dw": dw}


def ratios(case: Case, seed: int, last: bool) -> dict[str, dict[str, float]]:
    """Error of the shift path over that of the reference, for every result."""
    torch.manual_seed(seed)
    layer, x = case.build(), torch.randn(1, *case.shape[1:])
    if last:
        x = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    truth = _results(copy.deepcopy(layer).double(), x.double(), "reference")
    ours, dense = (_results(layer, x, path) for path in ("shift", "reference"))
    found = {}
    for name, exact in truth.items():
        error, allowed = ((result[name] - exact).abs() for result in (ours, dense))
        rms = (error.square().mean() / allowed.square().mean()).sqrt()
        rule = 2 * allowed.max() + torch.finfo(x.dtype).eps * exact.abs().max()
        found[name] = {
            "max": (error.max() / allowed.max()).item(),
            "rms": rms.item(),
            "rule": (error.max() / rule).item(),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonsym.perf.rounding", description=__doc__)
    parser.add_argument("--output", type=Path, help="write the ratios to this JSON file")
    args = parser.parse_args(argv)
    # a max over images sends its gradient to one of two nearly equal ones: rounding decides which
    cases = [case for case in CPU if "pool" not in case.name]
    rows: list[dict[str, Any]] = []
    for case in tqdm(cases, disable=not sys.stderr.isatty()):
        for seed in (0, 1):
            for last in (False, True):
                form = "channels_last" if last else "nchw"
                rows.append({"case": case.name, "seed": seed, "format": form, "ratios": ratios(case, seed, last)})
    for name in ("output", "dx", "dw"):
        worst = [max(rows, key=lambda row, kind=kind: row["ratios"][name][kind]) for kind in NORMS]
        shown = [
            f"{kind} {row['ratios'][name][kind]:.2f} ({row['case']})" for kind, row in zip(NORMS, worst, strict=True)
        ]
        print(f"{name:7} worst over the dense convolution: {', '.join(shown)}")
    if args.output:
        args.output.write_text(json.dumps({**machine("rounding", argv), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a module call costs on the CPU beside the plain torch layer with a pre-expanded weight.

The aim is 5% for inference of a 64-channel 3x3 layer on a 32x32 image, batch 8. The bound of the test is wider, so that
a busy machine cannot break it. `pytest tests/test_overhead.py --benchmark-only` prints the times.
"""

import statistics
import time

import pytest
import torch
from torch import nn

import tritonsym

#: Times of the torch layer that a call may take; a second convolution would take 2.
BOUND = 1.6
X = torch.randn(8, 64, 32, 32)


def build():
    torch.manual_seed(0)
    return tritonsym.nn.SymmetricConv2d(64, 64, 3, padding=1, symmetry="hv").eval()


def ratio(module, dense, rounds=41):
    """Median of the times of `module` over those of `dense` called next to it."""

    def seconds(layer):
        start = time.perf_counter()
        layer(X)
        return time.perf_counter() - start

    with torch.no_grad():
        seconds(module), seconds(dense)
        return statistics.median(seconds(module) / seconds(dense) for _ in range(rounds))


def test_a_call_costs_little_more_than_that_of_the_torch_layer():
    module = build()
    assert ratio(module, module.to_dense()) < BOUND


def test_twice_the_work_is_seen():
    module = build()
    assert ratio(nn.Sequential(module, build()), module.to_dense()) > BOUND


@pytest.mark.parametrize("kind", ["symmetric", "dense"])
def test_time(benchmark, kind):
    module = build()
    layer = module if kind == "symmetric" else module.to_dense()
    with torch.no_grad():
        benchmark.pedantic(layer, (X,), rounds=20, warmup_rounds=2)

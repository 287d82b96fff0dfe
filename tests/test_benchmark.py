"""A layer's call and training step beside those of torch's dense layer, to compare runs and machines:

    pytest tests/test_benchmark.py --benchmark-only -n 0

An ordinary test run takes every step once and only checks its results.
"""

import pytest
import torch

from tritonsym.perf.cases import Case
from tritonsym.perf.measure import make_step

CASES = [Case("hv", 8, 64, (32, 32)), Case("d4", 8, 128, (28, 28)), Case("tied-hv", 8, 64, (56, 56))]


@pytest.mark.parametrize("layer", ["tritonsym", "dense"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark, request, case, mode, layer):
    symmetric, x = case.build("float32", "cpu"), case.input("float32", "cpu")["channels_last"]
    modules = {"tritonsym": symmetric, "dense": symmetric.to_dense()}
    steps = {
        name: make_step(m.to(memory_format=torch.channels_last), x, mode == "training") for name, m in modules.items()
    }
    benchmark.group = f"{case.name} {mode}"
    benchmark.disabled |= not request.config.getoption("benchmark_only")
    benchmark.pedantic(steps[layer], rounds=25, warmup_rounds=5)
    result, expected = steps["tritonsym"](), steps["dense"]()
    if mode == "training":  # dx; dw has another shape
        result, expected = result[0], expected[0]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)

"""What a repeated call on the CPU does beside the work of the plain torch layer with a pre-expanded weight.

Counted are torch's operators and the calls of functions: a clock would also see what else the machine does.
`pytest tests/test_overhead.py --benchmark-only` prints the times.
"""

import gc
import sys
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tritonsym

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
#: Functions that a repeated call may enter: 44 to 47 as this was written, 9 in the torch layer, hundreds in a new call.
BOUND = 60


def build():
    torch.manual_seed(0)
    return tritonsym.nn.SymmetricConv2d(64, 64, 3, padding=1, symmetry="hv").eval()


def draw(layout="contiguous"):
    return torch.randn(8, 64, 32, 32).to(memory_format=LAYOUTS[layout])


def operators(layer, x):
    """How often a call runs each of torch's operators."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        layer(x)
    return Counter(event.name for event in found.events())


def calls(layer, x):
    """The calls of Python and C functions in a call of the layer."""
    events = []
    gc.disable()  # it calls what waits for the death of a tensor
    sys.setprofile(lambda frame, event, of: events.append(event))
    try:
        layer(x)
    finally:
        sys.setprofile(None)
        gc.enable()
    return sum(event in ("call", "c_call") for event in events)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_runs_no_more_operators_than_the_torch_layer(layout):
    module, x = build(), draw(layout)
    with torch.no_grad():
        module(x)
        allowed = operators(module.to_dense(), x).total()
        found = operators(module, x)
        assert found.total() <= allowed
        assert found["aten::convolution"] + found["mkldnn::_convolution_pointwise"] == 1
        module.weight.mul_(2)
        assert operators(module, x).total() > allowed, "the weight was not expanded anew"
        assert operators(module, x).total() <= allowed


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repeated_call_enters_few_functions(layout, trains):
    module, x = build(), draw(layout)
    with torch.set_grad_enabled(trains):
        assert calls(module, x) > BOUND
        assert calls(module, x) <= BOUND


@pytest.mark.parametrize("kind", ["symmetric", "dense"])
def test_time(benchmark, kind):
    module, x = build(), draw()
    layer = module if kind == "symmetric" else module.to_dense()
    with torch.no_grad():
        y = benchmark.pedantic(layer, (x,), rounds=20, warmup_rounds=2)
    torch.testing.assert_close(y, module.to_dense()(x))

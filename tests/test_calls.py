"""A call that repeats the last one skips checks and plans: everything that these look at has to be noticed."""

import contextlib
import copy
import gc

import numpy as np
import pytest
import torch

import tritonsym
import tritonsym.functional as T
from tritonsym import calls, dispatch

X = torch.randn(2, 4, 7, 7)


@pytest.fixture
def count(monkeypatch):
    """How often a call was planned, and run as planned."""
    count = {"plan": 0, "run": 0}

    def counted(name, function):
        def call(*args, **options):
            count[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(calls, "plan", counted("plan", calls.plan))
    monkeypatch.setattr(calls.Call, "run", counted("run", calls.Call.run))
    return count


def layer(**options):
    return tritonsym.nn.SymmetricConv2d(4, 8, 3, padding=1, symmetry="hv", **options)


def set_bias(module):
    module.bias = torch.nn.Parameter(torch.randn(8))


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


#: What may happen between two calls, and the context of the second.
CHANGES = {
    "nothing": (lambda m, x: x, contextlib.nullcontext, True),
    "another tensor": (lambda m, x: x.clone(), contextlib.nullcontext, True),
    "other values": (lambda m, x: x.mul_(2), contextlib.nullcontext, True),
    "another size": (lambda m, x: x[..., 1:], contextlib.nullcontext, False),
    "another layout": (lambda m, x: x.to(memory_format=torch.channels_last), contextlib.nullcontext, False),
    "another dtype": (lambda m, x: (m.double(), x.double())[1], contextlib.nullcontext, False),
    "no batch": (lambda m, x: x[0], contextlib.nullcontext, False),
    "gradient": (lambda m, x: x.clone().requires_grad_(), contextlib.nullcontext, False),
    "frozen": (lambda m, x: (m.requires_grad_(False), x)[1], contextlib.nullcontext, False),
    "stride": (lambda m, x: (setattr(m, "stride", (2, 2)), x)[1], contextlib.nullcontext, False),
    "activation": (lambda m, x: (setattr(m, "activation", "relu"), x)[1], contextlib.nullcontext, False),
    "same padding": (lambda m, x: (setattr(m, "padding", "same"), x)[1], contextlib.nullcontext, False),
    "bias": (lambda m, x: (set_bias(m), x)[1], contextlib.nullcontext, True),
    "no bias": (lambda m, x: (setattr(m, "bias", None), x)[1], contextlib.nullcontext, False),
    "no gradients": (lambda m, x: x, torch.no_grad, False),
    "autocast": (lambda m, x: x, lambda: torch.autocast("cpu", torch.bfloat16), False),
    "backend": (lambda m, x: x, lambda: tritonsym.backend("reference"), False),
    "path": (lambda m, x: x, lambda: tritonsym.path("shift"), False),
    "threads": (lambda m, x: x, lambda: threads(torch.get_num_threads() + 1), False),
    "tables": (lambda m, x: (dispatch.forget(), x)[1], contextlib.nullcontext, False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_repeats_unless_something_changed(name, count):
    change, context, repeats = CHANGES[name]
    module, x = layer(), X.clone()
    module(x)
    module(x)
    assert count == {"plan": 1, "run": 2}
    x = change(module, x)
    fresh = copy.deepcopy(module)
    with context():
        y = module(x)
        assert count["plan"] == 1 + (not repeats)
        torch.testing.assert_close(y, fresh(x), rtol=0, atol=0)
    assert y.requires_grad == (name not in ("no gradients", "frozen"))


@pytest.mark.parametrize(
    "module, x",
    [
        (layer(), X[0]),
        (tritonsym.nn.SymmetricConv2d(4, 8, 2, padding="same", symmetry="h"), X),
        (tritonsym.nn.SymmetricConv2d(4, 8, 3, padding=1, padding_mode="circular", symmetry="h"), X),
    ],
    ids=["without a batch", "uneven padding", "circular padding"],
)
def test_inputs_that_are_prepared(module, x):
    expected = module.to_dense()(x)
    for _ in range(3):
        torch.testing.assert_close(module(x), expected)


def test_errors_come_again():
    module = layer()
    module(X)
    for wrong, error in ((X[:, 1:], ValueError), (X.double(), TypeError), (None, TypeError)):
        for _ in range(2):
            with pytest.raises(error):
                module(wrong)
    module(X)


def test_errors_do_not_depend_on_the_call_before():
    weight = torch.nn.Parameter(torch.randn(2, 4, 3, 3))
    T.symmetric_conv2d(X, weight, symmetry="hv")
    with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor"):
        T.symmetric_conv2d(X, weight, np.zeros(8), symmetry="hv")
    for stride in (np.ones(2), torch.ones(2)):
        with pytest.raises(TypeError, match="stride must be 2 integers"):
            T.symmetric_conv2d(X, weight, stride=stride, symmetry="hv")


def test_sizes_of_numpy():
    weight, two = torch.nn.Parameter(torch.randn(2, 4, 3, 3)), np.int64(2)
    expected = T.symmetric_conv2d(X, weight.detach(), stride=2, padding=(2, 1), groups=1, symmetry="hv")
    y = T.symmetric_conv2d(X, weight, stride=two, padding=(two, 1), groups=np.int8(1), symmetry="hv")
    assert torch.equal(y, expected)
    assert torch.equal(T.topk_pool1d(X, two), T.topk_pool1d(X, 2))


def test_a_list_that_changes():
    weight, stride = torch.nn.Parameter(torch.randn(2, 4, 3, 3)), [1, 1]
    assert T.symmetric_conv2d(X, weight, stride=stride, symmetry="hv").shape[-1] == 5
    stride[:] = [2, 2]
    assert T.symmetric_conv2d(X, weight, stride=stride, symmetry="hv").shape[-1] == 3


def test_a_list_of_another_kind_that_changes():
    class Sizes(list):
        pass

    module = layer()
    module.stride = Sizes([1, 1])
    assert module(X).shape[-1] == 7
    module.stride[:] = [2, 2]
    assert module(X).shape[-1] == 4


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: tritonsym.nn.SymmetricConv2d(1, 8, 3, symmetry="h"), (2, 1, 6, 7)),
        (lambda: tritonsym.nn.SymmetricConv3d(1, 8, 3, symmetry="h"), (2, 1, 6, 7, 5)),
        (lambda: tritonsym.nn.TiedConv2d(6, 6, 3, groups=6, symmetry="d4"), (2, 6, 6, 7)),
        (lambda: tritonsym.nn.OrbitPoolConv2d(1, 4, 3, symmetry="hv"), (2, 1, 6, 7)),
        (lambda: tritonsym.nn.SymmetricConv2d(4, 6, 1, symmetry=None), (2, 4, 6, 7)),
        (lambda: tritonsym.nn.SymmetricConvTranspose2d(1, 8, 3, symmetry="h"), (2, 1, 6, 7)),
        (lambda: tritonsym.nn.SymmetricConv2d(4, 8, 3, symmetry="h"), (2, 4, 6, 7)),
    ],
)
def test_contiguous_stays_contiguous(make, shape, mode):
    module, x = make(), torch.randn(shape)
    with mode():
        for _ in range(2):
            assert module(x).is_contiguous()


def test_a_layout_that_torch_does_not_call_channels_last():
    """With a channels-last weight torch's float64 convolution of such an x gives it a wrong gradient."""
    x = torch.randn(1, 2, 4, 1, dtype=torch.float64).permute(3, 2, 0, 1)
    module = tritonsym.nn.SymmetricConv2d(4, 4, (1, 2), groups=2, symmetry="h", dtype=torch.float64)
    tritonsym.testing.assert_matches_reference(module, x)
    tritonsym.testing.assert_matches_reference(module, x[0])


def test_only_free_filters():
    module = tritonsym.nn.TiedConv2d(4, 8, 3, symmetry="h", free=8)
    for path in ("reference", "shift"):
        with tritonsym.path(path):
            for _ in range(3):
                torch.testing.assert_close(module(X), module.to_dense()(X))


def test_no_channels():
    x = torch.randn(2, 0, 6, 6)
    for module in (
        tritonsym.nn.SymmetricConv2d(0, 4, 3, symmetry="h"),
        tritonsym.nn.TiedConv2d(0, 4, 3, symmetry="h", parity="odd"),
    ):
        torch.testing.assert_close(module(x), module.to_dense()(x))


def test_forward_over_backward_of_signed_taps():
    module = tritonsym.nn.TiedConv2d(4, 8, 3, symmetry="hv", parity="odd", free=2)
    y = module(X)
    with torch.autograd.forward_ad.dual_level():
        dy = torch.autograd.forward_ad.make_dual(torch.randn_like(y), torch.randn_like(y))
        torch.autograd.grad(y, module.weight, dy, create_graph=True)


def test_two_functions_of_one_weight():
    weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3))
    for _ in range(2):
        for symmetry, channels in (("h", 8), ("d4", 32), ({"h": 4}, 6)):
            assert T.symmetric_conv2d(X, weight, symmetry=symmetry).shape[1] == channels
        assert T.orbit_pool_conv2d(X, weight, symmetry="h").shape[1] == 4
        assert T.symmetric_conv_transpose2d(X, weight, symmetry="h").shape == (2, 8, 9, 9)


def test_transforms_and_compilers_do_not_repeat(count):
    module = layer().requires_grad_(False)
    expected = module(X)
    torch.testing.assert_close(torch.func.vmap(module)(X[:, None])[:, 0], expected)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(X), expected)
    assert count["run"] == 1
    torch.testing.assert_close(torch.jit.trace(module, X)(X), expected)


def test_traces_leave_nothing_behind():
    module, counts = layer(), []
    for _ in range(3):
        torch.jit.trace(module, X, check_trace=False)
        gc.collect()
        counts.append(sum(type(t) is torch.Tensor for t in gc.get_objects()))
    assert counts[1] == counts[2], "sizes of a trace are tensors"


def test_nothing_outlives_its_weight():
    module = layer()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            module(X), module(X)
    key = id(module.weight)
    assert key in calls._calls and key in calls._kept
    del module
    gc.collect()
    assert key not in calls._calls and key not in calls._kept

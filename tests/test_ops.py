"""The ops behind the layers under every transform that torch has: autograd, compile, export, functorch, autocast."""

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import tritonsym
import tritonsym.functional as T
import tritonsym.nn as tnn
from tritonsym import ops, plan, reference, shift
from tritonsym.plan import current_backend


class AtenRecorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def aten_ops(function, *args):
    with AtenRecorder() as recorder:
        function(*args)
    return recorder.names


def per_sample(module):
    """The module as a function of one sample."""
    return lambda sample: module(sample[None])[0]


def gradients(y, module, x):
    return torch.autograd.grad(y, [x, *module.parameters()])


# --- ops --------------------------------------------------------------------------------------------------------------


def test_opcheck(convolution, monkeypatch):
    found = []
    monkeypatch.setattr(ops._Conv, "apply", lambda *args: found.append(args) or ops._fprop(*args))
    with tritonsym.path("shift"):
        convolution.make(dtype=torch.float64)(convolution.input(2, dtype=torch.float64))
    ((x, weight, free_weight, bias, call),) = found
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, free_weight, bias)]
    torch.library.opcheck(torch.ops.tritonsym.conv, (*leaves, call))
    dy = torch.ops.tritonsym.conv(*leaves, call)[0].detach()
    args = (dy, *leaves[:3], torch.empty(0, dtype=torch.uint8), call, True, True)
    torch.library.opcheck(torch.ops.tritonsym.conv_backward, [leaf(a) for a in args])


def leaf(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def test_gradients_of_first_and_second_order(any_layer):
    module, x = any_layer.make(dtype=torch.float64), any_layer.input(2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())

    def function(x, *parameters):
        return functional_call(module, dict(zip(names, parameters, strict=True)), x)

    gradcheck(function, (x, *parameters), fast_mode=True, check_forward_ad=True)
    gradgradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: torch.cat([y, 2 * y.square()], 1).square().sum(),
        lambda y: y.sum(),
        lambda y: (y.movedim(0, -1) * torch.arange(y.shape[0])).sum(),
    ],
    ids=["cat", "expanded", "permuted"],
)
def test_upstream_gradients_of_any_strides(any_layer, loss):
    module, x = any_layer.make(dtype=torch.float64), any_layer.input(dtype=torch.float64, requires_grad=True)
    y, twin = module(x), module(x)
    twin.register_hook(lambda upstream: upstream.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(gradients(loss(y), module, x), gradients(loss(twin), module, x))


# --- compile and export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(any_layer, dynamic):
    torch._dynamo.reset()
    module = any_layer.make(dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 13) if dynamic else (3,):
            x = any_layer.input(batch, dtype=torch.float64, requires_grad=True)
            y, expected = compiled(x), module(x)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(
                gradients(y.square().sum(), module, x), gradients(expected.square().sum(), module, x)
            )


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_keeps_the_fast_path_when_sizes_change(dynamic, monkeypatch):
    """A second batch size, and with dynamic=True a second image size, run the paths that eager runs."""
    wide, narrow = (tnn.SymmetricConv2d(c, c, 3, padding=1, symmetry="d4", bias=False) for c in (128, 8))
    fprop, seen = shift.fprop, []
    monkeypatch.setattr(shift, "fprop", lambda x, *args: seen.append(x.shape) or fprop(x, *args))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: wide(narrow(x[:, :8]).repeat(1, 16, 1, 1)), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for shape in ((8, 8, 28, 28), (6, 8, 28, 28), (5, 8, 28, 28), (5, 8, 20, 24)):
        x = torch.randn(shape)
        y = compiled(x)
        assert seen == [torch.Size((shape[0], 128, *shape[2:]))]
        seen.clear()
        torch.testing.assert_close(y, wide(narrow(x).repeat(1, 16, 1, 1)), rtol=1e-4, atol=1e-5)
        assert tritonsym.explain(wide, torch.randn(shape[0], 128, *shape[2:])).path == "shift"
        seen.clear()
        gradient = torch.autograd.grad(compiled(x).square().sum(), wide.weight)
        expected = torch.autograd.grad(wide(narrow(x).repeat(1, 16, 1, 1)).square().sum(), wide.weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-2)
        seen.clear()


@pytest.mark.slow
def test_inductor():
    """One compilation of a network of many layers: the default backend generates and runs code for each."""
    torch.manual_seed(0)
    network = nn.Sequential(
        tnn.SymmetricConv2d(2, 8, 3, padding="same", symmetry={"d4": 8}, activation="relu"),
        tnn.TiedConv2d(8, 6, 3, padding=1, padding_mode="circular", symmetry="hv", parity={"h": "odd"}, free=2),
        tnn.OrbitPoolConv2d(6, 4, 3, symmetry="c4", activation="silu"),
        tnn.SymmetricConvTranspose2d(4, 4, 2, stride=2, symmetry="hv", share_bias=True),
        nn.Flatten(2),
        tnn.GlobalConv1d(4, 4, activation="tanh"),
        tnn.TopKPool1d(4),
        tnn.Symmetrize(tnn.SymmetricLinear(4, 4), over="cyclic", dim=2, reduce="logsumexp"),
    )
    x = torch.randn(3, 2, 6, 6, requires_grad=True)
    torch._dynamo.reset()
    y, expected = torch.compile(network, fullgraph=True)(x), network(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        gradients(y.square().sum(), network, x), gradients(expected.square().sum(), network, x), rtol=1e-4, atol=1e-5
    )


X, W = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
FUNCTIONS = {
    "symmetric_conv2d": lambda x, w: T.symmetric_conv2d(x, w, symmetry="hv", padding="same"),
    "symmetric_conv2d counts": lambda x, w: T.symmetric_conv2d(x, w, symmetry={"h": 2, "d4": 8}),
    "symmetric_conv_transpose2d": lambda x, w: T.symmetric_conv_transpose2d(x, w, symmetry="c4", stride=2),
    "tied_conv2d": lambda x, w: T.tied_conv2d(x, w[..., :2].flatten(2), symmetry="d4", kernel_size=5),
    "tied_conv2d radial": lambda x, w: T.tied_conv2d(x, w[..., 0], symmetry="radial", kernel_size=3),
    "tied_conv2d odd": lambda x, w: T.tied_conv2d(x, w[..., 0, :1], symmetry="hv", parity="odd", kernel_size=3),
    "orbit_pool_conv2d": lambda x, w: T.orbit_pool_conv2d(x, w, symmetry="d4"),
    "symmetric_linear": lambda x, w: T.symmetric_linear(x[..., :3], w[0, 0, :, :2]),
    "symmetric_matmul": lambda x, w: T.symmetric_matmul(w[0, 0, :, :2], x[..., :3, :], left=True),
    "gram": lambda x, w: T.gram(x[0]),
    "symmetric_mm": lambda x, w: T.symmetric_mm(T.gram(x), 0.5, -2.0),
    "newton_schulz": lambda x, w: T.newton_schulz(x[..., :3]),
    "global_conv1d": lambda x, w: T.global_conv1d(x[..., 0], w[..., 0, 0], w[..., 0, 1]),
    "topk_pool1d": lambda x, w: T.topk_pool1d(x, 2),
    "symmetrize": lambda x, w: T.symmetrize(lambda z: z.cumsum(1), x, [[0, 1, 2, 3], [3, 2, 1, 0]]),
}


@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_without_graph_breaks(name, dynamic):
    torch._dynamo.reset()
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(X, W), function(X, W))


@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_export(any_layer):
    """With a dynamic batch, except on the shift path, whose plan needs all sizes."""
    module, dynamic = any_layer.make(), any_layer.path != "shift"
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    program = torch.export.export(module, (any_layer.input(3),), dynamic_shapes=shapes)
    core = program.run_decompositions()
    assert not [node for node in core.graph.nodes if "tritonsym" in str(node.target)]
    x = any_layer.input(13 if dynamic else 3)
    for exported in (program, core):
        torch.testing.assert_close(exported.module()(x), module(x))


def test_fake_and_meta_tensors(any_layer):
    y = any_layer.make()(any_layer.input())
    with FakeTensorMode():
        fake = any_layer.make()(any_layer.input())
    meta = any_layer.make().to("meta")(any_layer.input(device="meta"))
    for z in (fake, meta):
        assert (z.shape, z.dtype, z.stride()) == (y.shape, y.dtype, y.stride())


def test_inference_mode(any_layer):
    module, x = any_layer.make(), any_layer.input()
    with torch.inference_mode():
        y = module(x)
    assert y.is_inference()
    torch.testing.assert_close(y.clone(), module(x))


# --- torch.func -------------------------------------------------------------------------------------------------------


def test_functional_call_and_grad(any_layer):
    module, x = any_layer.make(dtype=torch.float64), any_layer.input(dtype=torch.float64)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    weights = {name: p.detach() for name, p in other.named_parameters()}
    torch.testing.assert_close(functional_call(module, weights, x), other(x))

    def loss(weights, x):
        return functional_call(module, weights, x).square().sum()

    dw, dx = grad(loss, argnums=(0, 1))(weights, x)
    x.requires_grad_()
    expected = gradients(other(x).square().sum(), other, x)
    torch.testing.assert_close([dx, *dw.values()], list(expected))


def test_vmap_over_the_batch(any_layer):
    module, x = any_layer.make(dtype=torch.float64), any_layer.input(dtype=torch.float64)
    torch.testing.assert_close(vmap(per_sample(module))(x), module(x))
    assert aten_ops(vmap(per_sample(module)), x) == aten_ops(vmap(per_sample(module)), x[:2])  # no loop over samples
    torch.testing.assert_close(
        vmap(module, in_dims=1, out_dims=1)(torch.stack([x, -x], 1)), torch.stack([module(x), module(-x)], 1)
    )


def test_gradients_per_sample(any_layer):
    module, x = any_layer.make(dtype=torch.float64), any_layer.input(dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights, sample):
        return functional_call(module, weights, sample[None]).square().sum()

    dw, dx = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(weights, x)
    for n, sample in enumerate(x):
        sample = sample[None].requires_grad_()
        expected = gradients(module(sample).square().sum(), module, sample)
        torch.testing.assert_close([dx[n, None], *(d[n] for d in dw.values())], list(expected))


def test_ensemble_by_vmap_over_stacked_weights(weighted_layer):
    first, x = weighted_layer.make(dtype=torch.float64), weighted_layer.input(dtype=torch.float64)
    modules = [first, copy.deepcopy(first), copy.deepcopy(first)]
    for module in modules[1:]:
        module.reset_parameters()
    weights, buffers = stack_module_state(modules)
    y = vmap(functools.partial(functional_call, first), in_dims=((0, 0), None))((weights, buffers), (x,))
    torch.testing.assert_close(y, torch.stack([module(x) for module in modules]))


def test_jvp(any_layer):
    module, x = any_layer.make(dtype=torch.float64), any_layer.input(dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in weights.items()}
    dx = torch.randn_like(x)

    def f(weights, x):
        return functional_call(module, weights, x)

    y, dy = jvp(f, (weights, x), (directions, dx))
    step = 1e-6

    def at(t):
        return f({name: p + t * directions[name] for name, p in weights.items()}, x + t * dx)

    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close(dy, (at(step) - at(-step)) / (2 * step), rtol=1e-6, atol=1e-7)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_torch_does(weighted_layer, dtype):
    module, x = weighted_layer.make(), weighted_layer.input(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = module(x), weighted_layer.dense(module, x)
    assert y.dtype == expected.dtype
    truth = weighted_layer.dense(copy.deepcopy(module).double(), x.double())
    error, allowed = (y - truth).abs().max(), (expected - truth).abs().max()
    assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * truth.abs().max()
    y.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in module.parameters())


def test_autocast_leaves_float64_alone_as_torch_does(weighted_layer):
    module, x = weighted_layer.make(dtype=torch.float64), weighted_layer.input(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert nn.Conv1d(4, 4, 3, dtype=torch.float64)(torch.ones(4, 3, dtype=torch.float64)).dtype == y.dtype
    torch.testing.assert_close(y, module(x))


def test_autocast_within_other_modules():
    wrapped, pool = tnn.Symmetrize(nn.Linear(4, 5)), tnn.TopKPool1d(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert wrapped(torch.randn(3, 4)).dtype == torch.bfloat16
        assert pool(torch.randn(3, 4)).dtype == torch.float32


def test_autocast_switched_off_is_full_precision():
    layer, x = tnn.SymmetricConv2d(2, 4, 3, symmetry="h"), torch.randn(1, 2, 5, 5)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_complex_numbers(linear_layer):
    layer = linear_layer.but(activation=None)
    module, x = layer.make(dtype=torch.complex128), layer.input(dtype=torch.complex128, requires_grad=True)
    y, expected = module(x), layer.dense(module, x)
    torch.testing.assert_close(y, expected)
    upstream, inputs = torch.randn_like(y), [x, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


# --- switches ---------------------------------------------------------------------------------------------------------


LAYER, X2D = tnn.SymmetricConv2d(2, 4, 3, symmetry="h"), torch.randn(1, 2, 5, 5)


def test_switches_nest_and_are_restored(monkeypatch):
    monkeypatch.setattr(plan, "ENVIRONMENT", "auto")
    expected = LAYER(X2D)
    with tritonsym.backend("triton"):
        assert current_backend() == "triton" and tritonsym.explain(LAYER, X2D).tiles
        with tritonsym.backend("reference"):
            assert (current_backend(), tritonsym.explain(LAYER, X2D).path) == ("reference", "reference")
            assert torch.equal(LAYER(X2D), expected)
        assert current_backend() == "triton"
    assert current_backend() == "auto"
    with tritonsym.path("implicit_gemm"):
        assert tritonsym.explain(LAYER, X2D).path == "implicit_gemm"
        with tritonsym.path("shift"):
            assert tritonsym.explain(LAYER, X2D).path == "shift"
            torch.testing.assert_close(LAYER(X2D), expected)
        assert tritonsym.explain(LAYER, X2D).path == "implicit_gemm"
    assert torch.equal(LAYER(X2D), expected)


def test_switches_are_restored_after_an_exception():
    for switch in (tritonsym.backend("triton"), tritonsym.path("implicit_gemm")):
        with pytest.raises(KeyError), switch:
            raise KeyError
        assert current_backend() != "triton"
        LAYER(X2D)


@pytest.mark.parametrize("value, backend", [("triton", "triton"), ("reference", "reference"), ("", "auto")])
def test_environment_variable(value, backend):
    code = """
from tritonsym.plan import backend, current_backend
with backend("auto"):  # a block overrides the variable
    inside = current_backend()
print(current_backend(), inside)
"""
    environment = {**os.environ, "TRITONSYM_BACKEND": value}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert printed.stdout.split() == [backend, "auto"]


def test_kernels_on_a_cpu_without_the_interpreter_say_so():
    code = """
import torch, tritonsym, tritonsym.nn
with tritonsym.backend("triton"):
    tritonsym.nn.SymmetricConv2d(2, 4, 3, symmetry="h")(torch.ones(1, 2, 5, 5))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/", env=environment
    )
    assert result.returncode == 1
    assert "TRITON_INTERPRET=1" in result.stderr.splitlines()[-1]


def test_many_gradients_at_once(convolution):
    """`is_grads_batched` maps the backward pass over gradients; so do vectorised Jacobians."""
    module, x = convolution.make(dtype=torch.float64), convolution.input(dtype=torch.float64).requires_grad_()
    y = module(x)
    inputs = [x, *module.parameters()]
    many = torch.randn(2, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(many):
        for found, expected in zip(batched, torch.autograd.grad(y, inputs, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(found[i], expected)


# --- dense weights by look-up -----------------------------------------------------------------------------------------

# how the dense weight is looked up if the stored one is contiguous, and if it is channels-last
LOOKED_UP = {
    "orbits": (lambda: tnn.SymmetricConv2d(4, 16, 3, symmetry="d4"), "values", "values"),
    "mixed": (lambda: tnn.SymmetricConv2d(4, 32, 3, groups=2, symmetry={"d4": 16, "h": 4}), "values", "values"),
    "many": (lambda: tnn.SymmetricConv2d(64, 64, 3, symmetry="h"), None, "rows"),
    "many images": (lambda: tnn.SymmetricConv2d(32, 128, 3, groups=2, symmetry="d4"), "rows", "rows"),
    "many values of ties": (lambda: tnn.TiedConv2d(64, 64, 5, symmetry="radial"), None, None),
    "transposed": (lambda: tnn.SymmetricConvTranspose2d(4, 16, 3, symmetry="hv"), "values", "values"),
    "many transposed": (lambda: tnn.SymmetricConvTranspose2d(64, 64, 3, symmetry="hv"), None, None),
    "ties": (lambda: tnn.TiedConv2d(4, 16, 5, symmetry="radial"), "values", "values"),
    "odd ties": (lambda: tnn.TiedConv2d(4, 16, 5, symmetry="hv", parity="odd"), None, None),
    "ties and free": (lambda: tnn.TiedConv2d(4, 16, 5, symmetry="hv", free=4), None, None),
    "free": (lambda: tnn.SymmetricConv2d(4, 16, 3, symmetry=None), None, None),
    "one axis": (lambda: tnn.SymmetricConv1d(4, 16, 5, symmetry="h"), "values", "values"),
    "volumes": (lambda: tnn.SymmetricConv3d(4, 16, 3, symmetry="hvz"), "values", "values"),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("layer, first_by, last_by", LOOKED_UP.values(), ids=LOOKED_UP.keys())
def test_dense_weights_are_looked_up(layer, first_by, last_by, last):
    """The look-up and its derivatives equal those of the images one by one, up to the order of sums."""
    layer = layer().double()
    if last and layer.weight.ndim > 3:
        layer = layer.to(memory_format=(torch.channels_last, torch.channels_last_3d)[layer.weight.ndim - 4])
    weights = layer._stored()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        dense = reference.look_up(layer._spec(), weights)
    called = {event.key for event in seen.key_averages()}
    by = last_by if last else first_by
    assert {"aten::take", "aten::embedding"} & called == {
        None: set(),
        "values": {"aten::take"},
        "rows": {"aten::embedding"},
    }[by]
    expected = reference.expand(layer.spec, weights)
    assert torch.equal(dense, expected) and dense.is_contiguous() is weights[0].is_contiguous()
    upstream = torch.randn_like(dense).requires_grad_()
    (got,), (truth,) = (torch.autograd.grad(d, weights[0], upstream, create_graph=True) for d in (dense, expected))
    torch.testing.assert_close(got, truth)
    again = torch.randn_like(got)
    got, truth = (torch.autograd.grad(d, upstream, again)[0] for d in (got, truth))
    torch.testing.assert_close(got, truth, rtol=0, atol=0)
    basis = torch.randn(3, *dense.shape, dtype=torch.float64)
    got, truth = (
        torch.autograd.grad(d, weights[0], basis, is_grads_batched=True)[0]
        for d in (reference.look_up(layer._spec(), weights), reference.expand(layer.spec, weights))
    )
    torch.testing.assert_close(got, truth)

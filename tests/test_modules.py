"""The contract of modules: whatever a torch layer accepts and does, the layer that replaces it accepts and does."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tritonsym
import tritonsym.nn as tnn
from tritonsym.plan import PATHS


def run(function, x, inputs):
    """The output and the gradients of the sum of its squares."""
    y = function(x)
    return y, *torch.autograd.grad(y.square().sum(), inputs)


def assert_equals_dense(layer):
    """Check the output and all gradients in float64."""
    module, x = layer.make(dtype=torch.float64), layer.input(dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    torch.testing.assert_close(run(module, x, inputs), run(lambda x: layer.dense(module, x), x, inputs))


def assert_as_close_as_torch(got, naive, truth, times=2):
    """Check that errors are at most `times` those of torch in the same dtype, plus one rounding."""
    error, allowed = ((t.double() - truth).abs() for t in (got, naive))
    rounding = torch.finfo(got.dtype).eps * truth.abs().max()
    assert error.max() <= times * allowed.max() + rounding
    assert error.square().mean().sqrt() <= times * allowed.square().mean().sqrt() + rounding


# --- as the torch layer -----------------------------------------------------------------------------------------------


def test_is_the_torch_layer_and_takes_its_arguments(convolution):
    assert isinstance(convolution.make(), convolution.torch_class)
    assert_same_arguments(convolution.build, convolution.torch_class)


def test_linear_takes_the_arguments_of_the_torch_layer():
    assert_same_arguments(tnn.SymmetricLinear, nn.Linear)


def assert_same_arguments(cls, torch_class):
    ours, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(c).parameters.values()] for c in (cls, torch_class)
    )
    assert ours[: len(theirs)] == theirs
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, _, kind in ours[len(theirs) :])


FORWARD_OPTIONS = {
    "same": {"padding": "same", "stride": 1},
    "same, dilated": {"padding": "same", "stride": 1, "dilation": 2},
    "same, even kernel": {"padding": "same", "stride": 1, "kernel_size": 4},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular, same, even kernel": {"padding": "same", "stride": 1, "kernel_size": 2, "padding_mode": "circular"},
    "stride": {"stride": 3},
    "no bias": {"bias": False},
}
TRANSPOSED_OPTIONS = {
    "stride": {"stride": 3, "padding": 0, "output_padding": 2},
    "dilation": {"dilation": 2, "output_padding": 1},
    "even kernel": {"stride": 2, "kernel_size": 2, "padding": 0, "output_padding": 0},
    "no bias": {"bias": False},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", FORWARD_OPTIONS)
def test_every_option_of_the_torch_layer(forward_convolution, name):
    assert_equals_dense(forward_convolution.but(**FORWARD_OPTIONS[name]))


@pytest.mark.parametrize("name", TRANSPOSED_OPTIONS)
def test_every_option_of_the_transposed_torch_layer(transposed_convolution, name):
    assert_equals_dense(transposed_convolution.but(**TRANSPOSED_OPTIONS[name]))


def test_one_value_per_axis(convolution):
    ndim = len(convolution.shape) - 1
    options = {"stride": (2, 1, 3), "padding": (0, 2, 1), "dilation": (1, 2, 1)}
    assert_equals_dense(convolution.but(**{name: values[:ndim] for name, values in options.items()}))


@pytest.mark.parametrize(
    "layer",
    [
        tnn.SymmetricConv2d(8, 32, 3, groups=8, symmetry="hv"),
        tnn.SymmetricConvTranspose2d(8, 16, 3, groups=8, symmetry="h"),
        tnn.TiedConv2d(8, 8, 3, groups=8, symmetry="d4"),
        tnn.OrbitPoolConv2d(8, 8, 3, groups=8, symmetry="c4", reduce="mean"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_depthwise(layer):
    layer, x = layer.double(), torch.randn(2, 8, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_output_size_of_a_transposed_convolution():
    for size in (11, 12):
        module = tnn.SymmetricConvTranspose2d(2, 4, 3, stride=2, padding=1, symmetry="h")
        plain, x = module.to_dense(), torch.randn(1, 2, 6, 6)
        torch.testing.assert_close(module(x, output_size=[size, 11]), plain(x, output_size=[size, 11]))


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_unbatched_input(weighted_layer):
    module, x = weighted_layer.make(dtype=torch.float64), weighted_layer.input(dtype=torch.float64)
    torch.testing.assert_close(module(x[0]), module(x)[0])


def test_empty_batch(any_layer):
    module, x = any_layer.make(), any_layer.input(0, requires_grad=True)
    y = module(x)
    assert y.shape == (0, *module(any_layer.input()).shape[1:])
    dx, *dw = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert dx.shape == x.shape
    assert not any(d.any() for d in dw)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda x: x[:1].expand(3, *x.shape[1:]),
        lambda x: torch.cat([x, x])[2:5],
    ],
    ids=["every other", "batch last", "expanded", "offset"],
)
def test_input_of_any_strides(any_layer, view):
    module, x = any_layer.make(dtype=torch.float64), view(any_layer.input(dtype=torch.float64))
    torch.testing.assert_close(module(x), module(x.clone(memory_format=torch.contiguous_format)))


def test_channels_last_stays_channels_last(planar_convolution):
    last = torch.channels_last if len(planar_convolution.shape) == 3 else torch.channels_last_3d
    module, x = planar_convolution.make(), planar_convolution.input().to(memory_format=last)
    y, expected = module(x), planar_convolution.dense(module, x)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=last)
    assert module(x.contiguous()).is_contiguous()
    assert module.to(memory_format=last)(x).is_contiguous(memory_format=last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_exact_as_torch(weighted_layer, dtype):
    module, x = weighted_layer.make(dtype=dtype), weighted_layer.input(dtype=dtype, requires_grad=True)
    exact, x64 = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    y = module(x)
    naive = weighted_layer.dense(module, x)
    truth = weighted_layer.dense(exact, x64)
    assert y.dtype == dtype
    assert_as_close_as_torch(y, naive, truth)
    if weighted_layer.options.get("reduce") in ("max", "min"):
        return  # rounding decides which of two nearly equal images gets the gradient
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *module.parameters()], upstream)
    plain = torch.autograd.grad(naive, [x, *module.parameters()], upstream)
    true = torch.autograd.grad(truth, [x64, *exact.parameters()], upstream.double())
    # the backward pass of the shift path multiplies sums that are rounded already
    times = 4 if weighted_layer.path == "shift" else 2
    for ours, theirs, value in zip(got, plain, true, strict=True):
        assert ours.dtype == dtype
        assert_as_close_as_torch(ours, theirs, value, times)


# --- parameters -------------------------------------------------------------------------------------------------------


def test_initialisation_is_reproducible_and_can_be_deferred(weighted_layer):
    module, twin = weighted_layer.make(), weighted_layer.make()
    deferred = weighted_layer.make(device="meta")
    assert all(p.is_meta for p in deferred.parameters())
    deferred.to_empty(device="cpu")
    torch.manual_seed(0)
    deferred.reset_parameters()
    for other in (twin, deferred):
        assert_same_state(module, other)


def assert_same_state(module, other):
    ours, theirs = module.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])
        assert value.dtype == theirs[name].dtype


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: saved(module, False)]
)
def test_copies_and_pickles(any_layer, copied):
    module, x = any_layer.make().eval(), any_layer.input()
    other = copied(module)
    assert repr(other) == repr(module)
    assert not other.training
    assert_same_state(module, other)
    assert torch.equal(other(x), module(x))
    before = module(x)
    for p in other.parameters():
        p.data.zero_()
    assert torch.equal(module(x), before)


def saved(value, weights_only):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_state_dict_never_changes(weighted_layer):
    module = weighted_layer.make()
    state = copy.deepcopy(module.state_dict())
    for step in (module.eval, lambda: module(weighted_layer.input()).sum().backward(), module.train):
        step()
        assert list(module.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(weighted_layer, assign):
    module, other = weighted_layer.make(), weighted_layer.make()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    state = saved(module.state_dict(), weights_only=True)
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert_same_state(module, other)
    x = weighted_layer.input()
    assert torch.equal(other(x), module(x))
    name = next(iter(state))
    del state[name]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        other.load_state_dict(state)
    assert other.load_state_dict({**state, "more": torch.ones(1)}, strict=False) == ([name], ["more"])


def test_load_into_a_meta_module(weighted_layer):
    module, other = weighted_layer.make(), weighted_layer.make(device="meta")
    other.load_state_dict(module.state_dict(), assign=True)
    x = weighted_layer.input()
    assert torch.equal(other(x), module(x))


def test_conversions_and_freezing(weighted_layer):
    for convert, dtype in (("double", torch.float64), ("half", torch.float16), ("bfloat16", torch.bfloat16)):
        module = getattr(weighted_layer.make(), convert)()
        assert module(weighted_layer.input(dtype=dtype)).dtype == dtype
        assert {p.dtype for p in module.parameters()} == {dtype}
    module = weighted_layer.make().to(torch.float64).requires_grad_(False)
    assert not module(weighted_layer.input(dtype=torch.float64)).requires_grad
    module.requires_grad_()
    module(weighted_layer.input(dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def stored_elements(layer, module):
    """The number of stored elements, counted by hand."""
    o = layer.options
    if isinstance(module, tnn.SkewLinear):
        return 6 * 5 // 2 + 6
    if isinstance(module, tnn.SymmetricLinear):
        return 7 * 8 // 2 + 7
    if isinstance(module, tnn.GlobalConv1d):
        return 2 * 4 * 8 + 8
    if "in_fields" in o:
        return {"GroupConv2d": 2 * 3 * 8 * 9 + 3, "GroupConv3d": 2 * 3 * 4 * 27, "GroupLinear": 3 * 2 * 8 + 2}[
            type(module).__name__
        ]
    return {
        "SymmetricConv1d h": 4 * 4 * 3 + 8,
        "SymmetricConv2d {'h': 4, 'v': 2}": (2 + 1 + 2) * 4 * 9 + 8,
        "SymmetricConv2d d4": 4 * 9 + 1,
        "SymmetricConv3d {'hvz': 8}": (1 + 2) * 4 * 27 + 10,
        "SymmetricConvTranspose1d h": 4 * 4 * 3 + 8,
        "SymmetricConvTranspose2d {'c4': 4}": 4 * (1 + 4) * 9 + (1 + 4),
        "SymmetricConvTranspose3d hv": 4 * 1 * 27 + 8,
        "TiedConv1d h odd": 8 * 4 * 1 + 8,
        "TiedConv2d hv {'h': 'odd'}": 6 * 2 * 2 + 2 * 2 * 9 + 8,
        "TiedConv2d radial:0.5": 8 * 4 * 3 + 8,
        "TiedConv3d hvz": 8 * 4 * 8,
    }.get(
        layer.name.removesuffix(" by shifts"),
        o["out_channels"] * o["in_channels"] // o.get("groups", 1) * 3 ** (len(layer.shape) - 1) + 8,
    )


def test_holds_the_stored_numbers_and_nothing_else(weighted_layer):
    module = weighted_layer.make()
    module(weighted_layer.input()).sum().backward()
    stored = stored_elements(weighted_layer, module)
    assert sum(p.numel() for p in module.parameters()) == stored
    assert sum(p.untyped_storage().nbytes() for p in module.parameters()) == 4 * stored
    assert not list(module.buffers())
    assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            tnn.SymmetricConv2d(3, 16, 3, stride=2, symmetry={"h": 4, "hv": "50%"}, share_bias=True),
            "SymmetricConv2d(3, 16, kernel_size=(3, 3), stride=(2, 2), symmetry='h:4 hv:8 free:4', share_bias=True)",
        ),
        (
            tnn.SymmetricConvTranspose1d(3, 4, 2, output_padding=1, dilation=2, symmetry="h", activation="relu"),
            "SymmetricConvTranspose1d(3, 4, kernel_size=(2,), stride=(1,), dilation=(2,), output_padding=(1,), "
            "symmetry='h:4', activation='relu')",
        ),
        (
            tnn.TiedConv3d(2, 4, 3, groups=2, bias=False, symmetry="zvh", parity={"z": "odd"}, free=2),
            "TiedConv3d(2, 4, kernel_size=(3, 3, 3), stride=(1, 1, 1), groups=2, bias=False, symmetry='hvz', "
            "parity={'z': 'odd'}, free=2)",
        ),
        (
            tnn.OrbitPoolConv2d(2, 4, 3, padding="same", padding_mode="circular", symmetry="d4", reduce="min"),
            "OrbitPoolConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), padding=same, padding_mode=circular, "
            "symmetry='d4', reduce='min')",
        ),
        (
            tnn.SymmetricLinear(3, 3, activation="tanh"),
            "SymmetricLinear(in_features=3, out_features=3, bias=True, activation='tanh')",
        ),
        (tnn.GlobalConv1d(3, 4, bias=False), "GlobalConv1d(3, 4, bias=False)"),
        (tnn.TopKPool1d(3), "TopKPool1d(k=3)"),
        (
            tnn.Symmetrize(nn.Identity(), "flip", 2, "sum"),
            "Symmetrize( over='flip', dim=2, reduce='sum' (inner): Identity() )",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_repr_shows_the_symmetry(layer, text):
    assert re.sub(r"\s+", " ", repr(layer)) == text


# --- symmetry through training ----------------------------------------------------------------------------------------


def image(w, element):
    """The image of a filter as documented: turn first, then flip."""
    return torch.rot90(w, element.turns, (-2, -1)).flip([{"h": -1, "v": -2, "z": -3}[axis] for axis in element.flips])


def train(module, x):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    before = copy.deepcopy(module.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        (module(x) - 1).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return module.expanded_weight().detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_filters_images_of_each_other(dtype):
    for symmetry in ("d4", {"h": 4, "v": 2, "hv": 8, "c4": 4}):
        module = tnn.SymmetricConv2d(3, 24, 3, symmetry=symmetry, dtype=dtype)
        w = train(module, torch.randn(4, 3, 6, 6, dtype=dtype))
        for o, (u, element) in enumerate(module.layout.filters):
            assert torch.equal(w[o], image(w[u], element) if element.turns or element.flips else w[o])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("symmetry", "parity", "sign"),
    [("hv", "even", 1), ("d4", "odd", -1), ("h", "odd", -1), ("radial", "even", 1)],
)
def test_training_keeps_tied_filters_their_own_image(symmetry, parity, sign, dtype):
    module = tnn.TiedConv2d(3, 4, 5, symmetry=symmetry, parity=parity, dtype=dtype)
    w = train(module, torch.randn(4, 3, 7, 7, dtype=dtype))
    assert torch.equal(w.flip(-1), sign * w)
    if symmetry in ("d4", "radial"):
        assert torch.equal(torch.rot90(w, 1, (-2, -1)), w)


def test_training_keeps_matrices_symmetric():
    for n in (1, 4, 7):
        s = train(tnn.SymmetricLinear(n, n), torch.randn(5, n))
        assert torch.equal(s, s.T)
        s = train(tnn.SkewLinear(n + 1, n + 1), torch.randn(5, n + 1))
        assert torch.equal(s, -s.T)


# --- explain ----------------------------------------------------------------------------------------------------------


def counted_flops(function, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(x)
    return counter.get_total_flops()


def test_explain_counts_what_runs(weighted_layer):
    module, x = weighted_layer.make(), weighted_layer.input()
    plan = tritonsym.explain(module, x)
    assert plan.path in PATHS
    assert plan.flops == counted_flops(module, x) > 0
    assert plan.why
    assert (", as the dense layer" in str(plan)) == (plan.flops == plan.dense_flops)
    for fact in (type(module).__name__, plan.path, f"{plan.flops:,}", f"{plan.dense_flops:,}", plan.why):
        assert fact in str(plan)


def test_explain_counts_the_dense_layer(weighted_layer):
    module, x = weighted_layer.make(), weighted_layer.input()
    o = weighted_layer.options
    orbit = module.symmetry.order if o.get("reduce") in ("sum", "mean") else 1  # convolved one by one, then reduced
    assert tritonsym.explain(module, x).dense_flops == orbit * counted_flops(
        lambda x: weighted_layer.dense(module, x), x
    )


def test_explain_needs_only_the_shape(weighted_layer):
    module, x = weighted_layer.make(), weighted_layer.input()
    plan = tritonsym.explain(module, x, "cpu")
    assert tritonsym.explain(module, x.to("meta"), "cpu") == plan
    assert tritonsym.explain(module, x.to("meta")) == plan
    assert tritonsym.explain(module, x[0], "cpu").dense_flops * len(x) == plan.dense_flops


def test_explain_for_a_gpu_that_is_not_there(weighted_layer):
    plan = tritonsym.explain(weighted_layer.make(device="meta"), weighted_layer.input(device="meta"), target="sm_90")
    assert "sm_90" in str(plan)
    assert plan.dense_flops == tritonsym.explain(weighted_layer.make(), weighted_layer.input()).dense_flops


def test_explain_of_an_empty_batch():
    plan = tritonsym.explain(tnn.SymmetricConv2d(2, 4, 3, symmetry="h"), torch.empty(0, 2, 5, 5))
    assert plan.flops == plan.dense_flops == 0
    assert "0 FLOPs" in str(plan)


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tnn.SymmetricConv2d(2, 4, (3, 1), symmetry="hv"),
            r"SymmetricConv2d: kernel_size=\(3, 1\) is 1 along axis 'h' of symmetry 'hv'.*identical copies",
        ),
        (
            lambda: tnn.SymmetricConvTranspose1d(2, 4, 1, symmetry={"h": 2}),
            r"SymmetricConvTranspose1d: kernel_size=\(1,\) is 1 along axis 'h' of symmetry 'h'",
        ),
        (
            lambda: tnn.TiedConv2d(2, 4, 3, symmetry="c4", parity="odd"),
            "TiedConv2d: 'c4' has no reflections, so parity='odd' is the same as 'even'",
        ),
    ],
)
def test_warnings_name_the_layer_and_point_at_the_caller(make, message):
    with pytest.warns(UserWarning, match=message) as caught:
        make()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.filterwarnings("error")
def test_no_warning_without_a_reason(any_layer):
    any_layer.make()


@pytest.mark.parametrize("autocast", [False, True])
def test_sums_over_positions_do_not_overflow(autocast):
    module, x = tnn.GlobalConv1d(4, 4), torch.full((1, 4, 3000), 60.0)
    with torch.no_grad():
        module.center.fill_(1e-3), module.surround.fill_(1e-3)
        expected = module(x)
        assert 4 * x[0, 0].sum() > torch.finfo(torch.float16).max
        if autocast:
            with torch.autocast("cpu", torch.float16):
                y = module(x)
        else:
            y = module.half()(x.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def test_inputs_are_named_as_in_torch():
    x = torch.randn(2, 3, 5, 5)
    for module in (
        tnn.SymmetricConv2d(3, 8, 3, symmetry="h"),
        tnn.SymmetricConvTranspose2d(3, 8, 3, symmetry="h"),
        tnn.TiedConv2d(3, 8, 3, symmetry="h"),
        tnn.OrbitPoolConv2d(3, 8, 3, symmetry="h"),
        tnn.SymmetricLinear(5, 5),
    ):
        assert torch.equal(module(input=x), module(x))


def test_a_wrong_bias_changes_nothing_of_a_matrix():
    module = tnn.SymmetricLinear(4, 4)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for bias: SymmetricLinear expected \(4,\), got \(5,\)"):
        module.load_state_dict({"weight": before["weight"] + 1, "bias": torch.zeros(5)})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_nobody_waits_for_the_gradient_of_no_filters():
    module = tnn.TiedConv2d(3, 8, 3, symmetry="hv", free=8)
    module(torch.randn(1, 3, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("symmetry", ["c2", "c4", "d4"])
def test_turns_of_a_single_tap_are_warned_of(symmetry):
    with pytest.warns(UserWarning, match="identical copies"):
        tnn.SymmetricConv2d(3, 8, 1, symmetry=symmetry)

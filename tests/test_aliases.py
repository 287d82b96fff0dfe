"""Layers that a model reaches other than by its submodules: followed where that is certain, else left alone."""

import copy
import functools
import weakref
from collections import deque, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import tritonsym.nn as tnn
from tritonsym import materialize, replace_layers

Pair = namedtuple("Pair", "conv scale")


class Model(nn.Module):
    """`hold` keeps a reference to the first convolution, through which forward calls it before the second one."""

    def __init__(self, hold, call=lambda held, x: held(x)):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.held, self.call = hold(self.conv), call

    def forward(self, x):
        return self.other(self.call(self.held, x))


class Unknown:
    def __init__(self, conv):
        self.inner = {"conv": conv}


class Wrapper(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def closure(conv):
    return lambda x: conv(x)


def default(conv):
    def function(x, layer=conv):
        return layer(x)

    return function


FOLLOWED = {
    "list": (lambda conv: [conv], lambda held, x: held[0](x)),
    "tuple": (lambda conv: (1, (conv,)), lambda held, x: held[1][0](x)),
    "named tuple": (lambda conv: Pair(conv, 2), lambda held, x: held.conv(x)),
    "dict": (lambda conv: {"a": [conv]}, lambda held, x: held["a"][0](x)),
    "forward": (lambda conv: conv.forward,),
    "call": (lambda conv: conv.__call__,),
    "partial": (lambda conv: functools.partial(conv),),
    "partial of a method": (lambda conv: [functools.partial(conv.forward)], lambda held, x: held[0](x)),
    "unregistered parent": (lambda conv: [Wrapper(conv)], lambda held, x: held[0](x)),
    "itself": (lambda conv: conv,),
}
HIDDEN = {
    "closure": (closure,),
    "default": (default,),
    "object": (Unknown, lambda held, x: held.inner["conv"](x)),
    "namespace": (lambda conv: SimpleNamespace(a=[conv]), lambda held, x: held.a[0](x)),
    "set": (lambda conv: {conv}, lambda held, x: next(iter(held))(x)),
    "deque": (lambda conv: deque([conv]), lambda held, x: held[0](x)),
    "key": (lambda conv: {conv: 1}, lambda held, x: next(iter(held))(x)),
    "other method": (lambda conv: conv._conv_forward, lambda held, x: held(x, torch.ones(4, 4, 3, 3), None)),
    "compiled": (lambda conv: torch.compile(conv, backend="eager"),),
}
both_places = pytest.mark.parametrize("inplace", [False, True])


def outputs_of_the_registered_layers(model, x):
    return model.other(model.conv(x))


@both_places
@pytest.mark.parametrize("held", FOLLOWED.values(), ids=FOLLOWED)
def test_what_is_certain_is_followed_there_and_back(held, inplace):
    model, x = Model(*held), torch.randn(2, 4, 5, 5)
    dense = copy.deepcopy(model)
    converted, report = replace_layers(model, conv="hv", inplace=inplace)
    assert [row.name for row in report] == ["conv", "other"] and not report.skipped
    assert torch.equal(converted(x), outputs_of_the_registered_layers(converted, x))
    assert not torch.allclose(converted(x), dense(x))
    if not inplace:
        assert torch.equal(model(x), dense(x))
    plain = materialize(converted, inplace=inplace)
    assert type(plain.conv) is nn.Conv2d and torch.equal(plain(x), outputs_of_the_registered_layers(plain, x))
    with torch.no_grad():
        converted.conv.weight.zero_()
    assert inplace or plain(x).ne(converted(x)).any()


@both_places
@pytest.mark.parametrize("held", HIDDEN.values(), ids=HIDDEN)
def test_what_is_not_certain_is_left_alone_with_a_reason(held, inplace):
    model, x = Model(*held), torch.randn(2, 4, 5, 5)
    dense = model.conv
    converted, report = replace_layers(model, conv="hv", inplace=inplace)
    assert [row.name for row in report] == ["other"]
    [skip] = report.skipped
    assert skip.name == "conv" and "held" in skip.reason
    assert type(converted.conv) is nn.Conv2d and (converted.conv is dense) == inplace
    assert torch.equal(converted(x), converted.other(converted.call(converted.held, x)))


@pytest.mark.parametrize("held", HIDDEN.values(), ids=HIDDEN)
def test_materialize_refuses_what_is_not_certain(held):
    model = Model(lambda conv: None)
    model, _ = replace_layers(model, conv="hv")
    model.held = held[0](model.conv)
    before = model.conv, model.other
    with pytest.raises(ValueError, match=r"materialize: conv.* \(SymmetricConv2d\): .*held"):
        materialize(model, inplace=True)
    assert (model.conv, model.other) == before


def test_a_function_that_holds_the_model_works_in_place_but_not_in_a_copy():
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3)), torch.randn(1, 4, 5, 5)
    model.again = lambda x: model[0](x)
    with pytest.warns(UserWarning, match="nothing was replaced .*pass inplace=True"):
        converted, report = replace_layers(model, conv="hv")
    assert not report and type(converted[0]) is nn.Conv2d
    converted, report = replace_layers(model, conv="hv", inplace=True)
    assert len(report) == 1 and torch.equal(converted.again(x), converted[0](x))


def test_layers_that_are_no_submodules_are_named():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    model.hidden = [nn.Conv2d(4, 4, 3), nn.Sequential(nn.Linear(3, 3))]
    _, report = replace_layers(model, conv="hv")
    assert [(s.name, s.layer) for s in report.skipped] == [("hidden[0]", "Conv2d")]
    assert "no submodule of the model; hold it in a torch.nn.ModuleList" in report.skipped[0].reason
    _, report = replace_layers(model, conv="hv", linear=True)
    assert [s.name for s in report.skipped] == ["hidden[0]", "hidden[1].0"]


def test_weak_references_and_cycles_end():
    model = Model(lambda conv: weakref.ref(conv), lambda held, x: held()(x))
    model.cycle = [model]
    model.cycle.append(model.cycle)
    _, report = replace_layers(model, conv="hv", inplace=True)
    assert [row.name for row in report] == ["other"] and "held" in report.skipped[0].reason


def test_a_compiled_model_runs_the_new_layers():
    net, x = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), torch.randn(1, 4, 5, 5)
    compiled = torch.compile(net, backend="eager")
    before = compiled(x)
    converted, report = replace_layers(compiled, conv="hv", inplace=True)
    assert converted is compiled and len(report) == 1
    assert torch.equal(compiled(x), net(x)) and not torch.allclose(compiled(x), before)
    net.compile(backend="eager")
    net(x)
    materialize(net, inplace=True)
    assert type(net[0]) is nn.Conv2d
    torch.testing.assert_close(net(x), net[1](net[0](x)))


# --- weights that are read --------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Calls its first layer and reads the weights of the others, some in a method and a comprehension."""

    def __init__(self):
        super().__init__()
        self.called = nn.Conv2d(4, 4, 3)
        self.read = nn.Conv2d(4, 4, 3)
        self.block = nn.ModuleDict({"x": nn.Conv2d(4, 4, 3)})
        self.block.inner = nn.Conv2d(4, 4, 3)
        self.looked = nn.Conv2d(4, 4, 3)
        self.listed = nn.Conv2d(4, 4, 3)

    def helper(self, x):
        return F.conv2d(x, self.block.inner.weight)

    def forward(self, x):
        x = self.called(x).to(self.looked.weight.dtype)
        return self.helper(F.conv2d(x, self.read.weight)) + sum(b for b in [self.listed.bias.sum()])


def test_layers_whose_weight_a_forward_reads_are_left_alone():
    model = Reader()
    _, report = replace_layers(model, conv="hv")
    assert {row.name for row in report} == {"called", "block.x", "looked"}
    assert {skip.name: skip.reason for skip in report.skipped} == dict.fromkeys(
        ("read", "block.inner", "listed"), "Reader reads its weight directly"
    )


def test_layers_whose_weight_a_graph_reads_are_left_alone():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    graph = fx.symbolic_trace(net)
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        weight = graph.graph.get_attr("1.weight")
    output = next(node for node in graph.graph.nodes if node.op == "output")
    output.args = ((output.args[0], weight),)
    graph.recompile()
    converted, report = replace_layers(graph, conv="hv")
    assert [row.name for row in report] == ["0"] and "reads its weight" in report.skipped[0].reason
    assert converted(torch.randn(1, 4, 9, 9))[1].shape == (4, 4, 3, 3)


# --- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversion", [functools.partial(replace_layers, conv="hv"), materialize])
def test_an_optimizer_of_old_parameters_is_warned_of(conversion):
    layer = (
        nn.Conv2d(4, 4, 3) if isinstance(conversion, functools.partial) else tnn.SymmetricConv2d(4, 4, 3, symmetry="h")
    )
    model = nn.Sequential(layer, nn.BatchNorm2d(4))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    optimizer = torch.optim.Adam(model.parameters())
    conversion(model)  # converts a copy: the optimizer's model stays as it is
    with pytest.warns(UserWarning, match="a Adam holds 2 of the old ones.*make the optimizer after"):
        conversion(model, inplace=True)
    assert len(optimizer.param_groups) == len(other.param_groups) == 1


def test_layers_wrapped_for_parallel_training_are_left_alone():
    class DistributedDataParallel(nn.Module):
        """Recognised by its name."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    model = nn.Sequential(DistributedDataParallel(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    _, report = replace_layers(model, conv="hv")
    assert [row.name for row in report] == ["1"]
    assert report.skipped[0].reason.endswith("convert the model before wrapping it")

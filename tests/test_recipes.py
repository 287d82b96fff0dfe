"""A converted model is rebuilt from the recipe in its report, then loads its checkpoint."""

import json

import pytest
import torch
from torch import nn

import tritonsym.nn as tnn
from tritonsym import replace_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.wide = nn.Conv2d(16, 8, (1, 3))
        self.pool = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.up(self.pool(self.wide(self.depthwise(self.stem(x)))))
        return self.head(self.mix(x.mean((2, 3))))


CHOICES = {
    "stem": "h:4 hv:8 free:4",
    "depthwise": "tied:hv odd:h",
    "wide": "hv",
    "pool": "pool:d4 mean",
    "up": {"c4": "50%"},
    "mix": True,
    "head": False,
}


def test_a_recipe_survives_json_and_builds_the_same_model():
    torch.manual_seed(0)
    model, report = replace_layers(Net(), "hv", True, rule=lambda name, _: CHOICES[name])
    recipe = json.loads(json.dumps(report.recipe))
    again, second = replace_layers(Net(), recipe)
    assert repr(again) == repr(model) and second.recipe == report.recipe
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(again(x), model(x))
    with torch.device("meta"):
        later = Net()
    later, _ = replace_layers(later, recipe, inplace=True)
    later.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(later(x), model(x))


def test_the_text_of_a_report_is_a_spec():
    _, report = replace_layers(Net(), "hv", True, rule=lambda name, _: CHOICES[name])
    texts = {row.name: row.symmetry for row in report}
    assert texts == {
        "stem": "h:4 hv:8 free:4",
        "depthwise": "tied:hv odd:h",
        "wide": "h:8",
        "pool": "pool:d4 mean",
        "up": "c4:4 free:4",
        "mix": "symmetric",
    }
    _, second = replace_layers(Net(), rule=lambda name, _: texts.get(name))
    assert second.recipe == report.recipe


def test_options_that_only_a_rule_chooses_are_kept():
    choices = [
        lambda layer: tnn.SymmetricConv2d.from_dense(layer, symmetry="h", share_bias=True, activation="silu"),
        lambda layer: tnn.TiedConv2d.from_dense(layer, symmetry="radial:0.5", free=2),
        lambda layer: tnn.OrbitPoolConv2d.from_dense(layer, symmetry="hv", reduce="min", activation="relu"),
        lambda layer: tnn.SymmetricLinear.from_dense(layer, never_unpack=True),
        lambda layer: tnn.TiedConv2d.from_dense(layer, symmetry="hv", parity="odd"),
    ]
    dense = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)), nn.Linear(4, 4), nn.Conv2d(4, 4, 3))
    model, report = replace_layers(dense, rule=lambda name, layer: choices[int(name)](layer))
    again, _ = replace_layers(dense, json.loads(json.dumps(report.recipe)), init="reset")
    assert repr(again) == repr(model)
    again.load_state_dict(model.state_dict())


def test_subclasses_in_a_recipe_are_replaced():
    class Named(nn.Conv2d):
        pass

    model = nn.Sequential(Named(4, 4, 3))
    _, report = replace_layers(model, "hv", subclasses=True)
    again, _ = replace_layers(model, report.recipe)
    assert type(again[0]) is tnn.SymmetricConv2d


WRONG = {
    "version": (lambda r: r.update(tritonsym=0), ValueError, "the recipe has version 0, expected 1"),
    "layers": (lambda r: r.update(layers=[1]), TypeError, "map names to options, got list"),
    "no layer": (lambda r: r["layers"].update(stem={"symmetry": "h"}), ValueError, "recipe of 'stem' names no layer"),
    "kind": (lambda r: r["layers"]["stem"].update(layer="GlobalConv1d"), ValueError, "names no layer of tritonsym.nn"),
    "class": (lambda r: r["layers"]["stem"].update(layer="SymmetricConv1d"), ValueError, "expected torch.nn.Conv1d"),
    "option": (lambda r: r["layers"]["stem"].update(color="red"), ValueError, "stem: .*unexpected keyword"),
    "symmetry": (lambda r: r["layers"]["stem"].update(symmetry="h:3"), ValueError, "do not fill whole orbits of 2"),
    "unknown": (lambda r: r["layers"].update(tail=r["layers"]["stem"]), ValueError, "tail: there is no such layer"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("spoil", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_recipe_that_does_not_fit_is_refused_and_changes_nothing(spoil, error, message, inplace):
    model = Net()
    recipe = replace_layers(model, "h", True)[1].recipe
    spoil(recipe)
    before = list(model.modules())
    with pytest.raises(error, match=f"(?s)replace_layers: .*{message}"):
        replace_layers(model, recipe, inplace=inplace)
    assert all(now is then for now, then in zip(model.modules(), before, strict=True))


def test_a_recipe_says_all():
    recipe = replace_layers(Net(), "h")[1].recipe
    for more in ({"linear": True}, {"rule": lambda *_: None}):
        with pytest.raises(ValueError, match="a recipe names all that is replaced; pass no linear and no rule with it"):
            replace_layers(Net(), recipe, **more)


def test_what_no_recipe_describes_is_refused():
    class Own(tnn.SymmetricConv2d):
        pass

    for new in (nn.Sequential(nn.Conv2d(4, 4, 3)), Own(4, 4, 3, symmetry="h")):
        _, report = replace_layers(nn.Sequential(nn.Conv2d(4, 4, 3)), rule=lambda *_, new=new: new)
        with pytest.raises(ValueError, match=f"recipe: 0 was replaced by a {type(new).__name__}, which no recipe"):
            report.recipe  # noqa: B018


def test_words_of_a_spec_that_are_unknown_are_refused():
    for spec in ("tied:hv even", "tied:hv free:x", "pool:hv median", "pool:hv free:2"):
        with pytest.raises(ValueError, match=r"is unknown; expected such as 'tied:hv odd:h free:4' or 'pool:hv max'"):
            replace_layers(Net(), spec)
    with pytest.raises(ValueError, match="unknown name 'hw'"):
        replace_layers(Net(), "tied:hw")


def test_a_dense_checkpoint_names_every_key_with_its_path_and_the_fix():
    dense = nn.Sequential(Net(), nn.BatchNorm1d(2))
    model, report = replace_layers(dense, "hv", True)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(dense.state_dict())
    lines = [line.strip() for line in str(caught.value).splitlines() if "size mismatch" in line]
    assert [line.split(":")[0] for line in lines] == [f"size mismatch for {row.name}.weight" for row in report]
    assert all("that is the dense shape: load it into the plain model, then convert" in line for line in lines)
    state = model.state_dict()
    del state["0.stem.bias"]
    state["0.stem.more"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0.stem.bias.*Unexpected key.*0.stem.more"):
        model.load_state_dict(state)

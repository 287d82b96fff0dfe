"""Models and exporters of other packages (extra 'models'; run by -m models): random weights, no downloads.

Every model is converted, called, trained for one step and materialized, and keeps the keys of its state_dict.
"""

import copy
import importlib
import io
import json
import logging
import os

import pytest
import torch
from torch import nn

import tritonsym
import tritonsym.nn as tnn
from tritonsym import materialize, replace_layers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")
pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def timm():
    """timm imports torchvision and calls none of its operators. Beside a torch for CPUs those of the wheel on PyPI
    cannot be loaded; the import then needs two of them declared."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def round_trip(model, x, symmetry, least):
    """Check what every model must do and return the report; at least `least` layers must be replaced."""
    keys, shapes = list(model.state_dict()), first_tensor(model.eval()(x)).shape
    dense = copy.deepcopy(model)
    converted, report = replace_layers(model, {symmetry: "100%"})
    assert len(report) >= least, str(report)
    assert first_tensor(converted.eval()(x)).shape == shapes
    converted.train()
    optimizer = torch.optim.SGD(converted.parameters(), lr=1e-3)
    before = copy.deepcopy(converted.state_dict())
    first_tensor(converted(x)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in report_parameters(converted, report))
    optimizer.step()
    assert any(
        not torch.equal(before[f"{row.name}.weight"], converted.state_dict()[f"{row.name}.weight"]) for row in report
    )
    for row in report:
        tritonsym.testing.assert_symmetric(converted.get_submodule(row.name))
    plain = materialize(converted.eval())
    assert not any(type(m).__module__.startswith("tritonsym") for m in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(first_tensor(plain(x)), first_tensor(converted(x)), rtol=1e-3, atol=1e-4)
    assert list(plain.state_dict()) == keys and list(converted.state_dict()) == keys
    dense.load_state_dict(plain.state_dict())
    again, _ = replace_layers(dense, json.loads(json.dumps(report.recipe)))
    again.load_state_dict(converted.state_dict())
    return report


def report_parameters(model, report):
    return [p for row in report for p in model.get_submodule(row.name).parameters()]


class Basic(nn.Module):
    """A block of torchvision's ResNets."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        short = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.downsample = short if stride > 1 else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def test_a_resnet_as_in_torchvision():
    stem = [nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Basic(16, 16, 1), Basic(16, 32, 2), Basic(32, 32, 1)]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    report = round_trip(model, torch.randn(2, 3, 48, 48), "hv", 7)
    assert [skip.name for skip in report.skipped] == ["5.downsample.0"]


def test_monai_unet():
    from monai.networks.nets import UNet

    model = UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    round_trip(model, torch.randn(1, 1, 16, 16, 16), "hvz", 5)


def test_monai_segresnet():
    from monai.networks.nets import SegResNet

    model = SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=2)
    round_trip(model, torch.randn(1, 1, 16, 16, 16), "hvz", 10)


def hf_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification, config


def test_transformers_resnet():
    cls, config = hf_resnet()
    round_trip(cls(config), torch.randn(2, 3, 32, 32), "hv", 5)


def test_transformers_convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    model = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]))
    report = round_trip(model, torch.randn(2, 3, 64, 64), "hv", 4)
    assert any("one filter per group" in skip.reason for skip in report.skipped)
    tied, report = replace_layers(model, rule=lambda name, layer: "tied:d4" if "dwconv" in name else None)
    assert len(report) == 4 and {row.parameters_after for row in report} == {8 * 10 + 8, 16 * 10 + 16}
    assert first_tensor(tied(torch.randn(1, 3, 64, 64))).shape == (1, 2)


def test_transformers_save_and_load(tmp_path):
    base, config = hf_resnet()

    class Symmetric(base):
        """Built dense, then converted by the recipe in its config, before the weights are loaded."""

        def __init__(self, config):
            super().__init__(config)
            if getattr(config, "recipe", None):
                replace_layers(self, config.recipe, inplace=True)

    dense = base(config)
    config.recipe = replace_layers(dense, "hv")[1].recipe
    model = Symmetric(config).eval()
    model.save_pretrained(tmp_path)
    loaded, x = Symmetric.from_pretrained(tmp_path).eval(), torch.randn(2, 3, 32, 32)
    assert isinstance(loaded.resnet.embedder.embedder.convolution, tnn.SymmetricConv2d)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_diffusers_save_and_load(tmp_path):
    from diffusers import UNet2DModel
    from diffusers.configuration_utils import register_to_config

    sizes = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    sizes |= {"in_channels": 3, "out_channels": 3, **blocks}

    class Symmetric(UNet2DModel):
        @register_to_config
        def __init__(self, recipe=None, sizes=None):
            super().__init__(**sizes)
            self.register_to_config(recipe=recipe, sizes=sizes)
            if recipe:
                replace_layers(self, dict(recipe), inplace=True)

    recipe = replace_layers(UNet2DModel(**sizes), {"hv": "100%"})[1].recipe
    model, x = Symmetric(recipe, sizes).eval(), torch.randn(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = Symmetric.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    counts = [sum(isinstance(module, tnn.SymmetricConv2d) for module in m.modules()) for m in (loaded, model)]
    assert counts[0] == counts[1] > 5
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with torch.no_grad():  # MKL rounds by where tensors lie in memory
        torch.testing.assert_close(loaded(x, 1).sample, model(x, 1).sample)


@pytest.mark.parametrize(("name", "least"), [("resnet18", 15), ("efficientnet_b0", 1)])
def test_timm(timm, name, least):
    round_trip(timm.create_model(name, num_classes=5), torch.randn(2, 3, 64, 64), "hv", least)


def test_timm_convolutions_with_a_forward_of_their_own_are_left_alone(timm):
    model = timm.create_model("tf_efficientnet_b0", num_classes=5)
    with pytest.warns(UserWarning, match="nothing was replaced"):
        _, report = replace_layers(model, "hv", subclasses=True)
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert reasons["conv_stem"] == "Conv2dSame has a forward of its own, which its replacement would lose"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_onnx(any_layer, plain, dynamic):
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    layer = any_layer.make().eval()
    model, x = materialize(layer) if plain else layer, any_layer.input(5)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    file = io.BytesIO()
    example = any_layer.input(2 if dynamic else 5)
    torch.onnx.export(model, (example,), file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    [y] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-3, atol=1e-4)


def test_keras_on_torch():
    import keras
    from keras.layers import TorchModuleWrapper

    if keras.backend.backend() != "torch":
        pytest.fail("KERAS_BACKEND must be torch")
    conv = nn.Sequential(tnn.SymmetricConv2d(1, 8, 3, symmetry="hv"), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pair = tnn.Symmetrize(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), over="swap")
    model = keras.Sequential([
        TorchModuleWrapper(conv),
        TorchModuleWrapper(tnn.SymmetricLinear(8, 8)),
        keras.layers.Reshape((2, 4)),
        keras.layers.Dense(8),
        TorchModuleWrapper(pair),
    ])  # fmt: skip
    x, y = torch.randn(16, 1, 9, 9).numpy(), torch.randn(16, 4).numpy()
    model.compile("sgd", "mse")
    before = conv[0].weight.detach().clone()
    losses = model.fit(x, y, epochs=8, verbose=0, batch_size=16).history["loss"]
    assert losses[-1] < losses[0] and not torch.equal(conv[0].weight.cpu(), before.cpu())
    tritonsym.testing.assert_symmetric(conv[0])
    z = torch.randn(3, 2, 8, device=next(pair.parameters()).device)
    assert torch.equal(model.layers[-1](z), model.layers[-1](z.flip(1)))

"""From a trained symmetric model to ONNX Runtime: a process that knows neither torch nor tritonsym.

Needs the extra `models`. `materialize` gives plain torch layers, whose weights are dense; every batch size will do.
"""

import os

import onnxruntime
import torch
from torch import Tensor, nn

import tritonsym


def trained() -> nn.Module:
    """In the place of your model."""
    stem = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    rest = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model, _ = tritonsym.replace_layers(nn.Sequential(*stem, *rest), conv="hv")
    return model.eval()


def export(model: nn.Module, x: Tensor, file: str | os.PathLike[str]) -> None:
    """Write a model for batches of any size of inputs like x, which are two at least."""
    plain = tritonsym.materialize(model.eval())
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(plain, (x,), file, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)


def run(file: str | os.PathLike[str], x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(os.fspath(file))
    [y] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)

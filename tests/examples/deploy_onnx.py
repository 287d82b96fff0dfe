"""From a trained symmetric model to ONNX Runtime, which needs neither torch nor tritonsym.

Needs the extra `models`. `materialize` makes plain torch layers with dense weights; the export takes any batch size.
"""

import os

import onnxruntime
import torch
from torch import Tensor, nn

import tritonsym


def trained() -> nn.Module:
    """Stands in for your model."""
    stem = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    rest = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model, _ = tritonsym.replace_layers(nn.Sequential(*stem, *rest), conv="hv")
    return model.eval()


def export(model: nn.Module, x: Tensor, file: str | os.PathLike[str]) -> None:
    """Write a model for batches of any size; the example x needs at least two samples."""
    plain = tritonsym.materialize(model.eval())
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(plain, (x,), file, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)


def run(file: str | os.PathLike[str], x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(os.fspath(file))
    [y] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)

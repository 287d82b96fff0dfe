"""A Keras model (torch backend) of a pair: f(x, y) = f(y, x) to the bit, whatever it has learnt.

Needs the extra `models`. `Symmetrize` evaluates both orders in one batch; `TorchModuleWrapper` makes it a Keras layer.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import torch
from keras.layers import TorchModuleWrapper
from torch import nn

import tritonsym.nn as tnn


def network(features: int) -> keras.Model:
    """From pairs (N, 2, features) to (N, 1)."""
    inner = nn.Sequential(nn.Flatten(), nn.Linear(2 * features, 32), nn.Tanh(), nn.Linear(32, 8))
    pair = tnn.Symmetrize(inner, over="swap", dim=1, reduce="mean")
    model = keras.Sequential([keras.Input((2, features)), TorchModuleWrapper(pair), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def distances(samples: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of points and their squared distances, which do not depend on the order."""
    pairs = torch.randn(samples, 2, features)
    return pairs, (pairs[:, 0] - pairs[:, 1]).square().sum(1, keepdim=True)

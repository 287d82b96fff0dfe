"""Checkpoints of other packages."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tritonsym import functional, reference
from tritonsym.nn.conv import _OrbitConv

# --- checkpoints of CNN-Symmetry --------------------------------------------------------------------------------------


def load_cnn_symmetry(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a checkpoint of the CNN-Symmetry package (github.com/treder/CNN-Symmetry) into a layer or a whole model.

    Its SymmetricConv2d and SymmetricConv3d store the same weights in the same order as ours. Their bias has one value
    per output channel, also with ``share_bias=True``: a layer of ours with ``share_bias=True`` takes it if it is equal
    within every orbit. All other layers load as usual.

    Args:
        module: a layer, or a model whose layers have the names of the checkpoint's.
        state_dict: what ``model.state_dict()`` gave there. Its keys must be exactly those of `module`.
    Raises:
        ValueError: keys or shapes differ, or a bias that we share differs within an orbit. Nothing is changed.
        TypeError: `module` is not a module, or `state_dict` is not a mapping.
    """
    where = "load_cnn_symmetry"
    functional.check_module(where, module)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{where}: expected a state_dict, got {type(state_dict).__name__}")
    expected = module.state_dict()
    if expected.keys() != state_dict.keys():
        missing, unexpected = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
        raise ValueError(
            f"{where}: the keys differ: missing {sorted(missing)}, unexpected {sorted(unexpected)}; "
            "rename the keys, or build the model with the layers of the checkpoint"
        )
    sharing = {
        f"{path}.bias".lstrip("."): layer
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, _OrbitConv) and layer.share_bias and layer.bias is not None
    }
    converted = copy.copy(state_dict)  # a plain dict would lose the versions that a state_dict carries
    for key, own in expected.items():
        if not isinstance(own, Tensor):
            continue
        value, layer = state_dict[key], sharing.get(key)
        shape = tuple(own.shape) if layer is None else (layer.out_channels,)
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if got != shape:
            raise ValueError(
                f"{where}: {key} must have shape {shape}, got {got}; "
                "build the layer with the sizes and the symmetry of the checkpoint"
            )
        if layer is not None:
            converted[key] = _shared_bias(key, value, layer)  # type: ignore[index]
    module.load_state_dict(converted)


def _shared_bias(key: str, bias: Tensor, layer: _OrbitConv) -> Tensor:
    """One value per stored filter of a bias per output channel."""
    stored = bias.unflatten(0, (layer.groups, -1))[:, : layer.layout.stored_per_group].flatten()
    expected = reference.expand_bias(stored, layer.spec)
    if (differs := expected != bias).any():
        channel = int(differs.int().argmax())
        raise ValueError(
            f"load_cnn_symmetry: {key} differs within an orbit: channel {channel} has {bias[channel].item():.6g}, its "
            f"base filter {expected[channel].item():.6g}; the package does not share the "
            "bias, even with share_bias=True: build the layer with share_bias=False"
        )
    return stored

"""Checkpoints of other packages."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritonsym import functional, reference
from tritonsym.nn.conv import SymmetricConv2d, _OrbitConv
from tritonsym.symmetry import Symmetry, taps

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

    >>> layer = nn.SymmetricConv2d(3, 8, 3, symmetry={"hv": 8})
    >>> checkpoint = {"weight": torch.ones(2, 3, 3, 3), "bias": torch.ones(8)}  # torch.load(...)
    >>> tritonsym.load_cnn_symmetry(layer, checkpoint)
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


# --- layers of escnn --------------------------------------------------------------------------------------------------


def load_escnn(r2conv: Any) -> tuple[SymmetricConv2d, Tensor]:
    """The layer that equals an ``escnn.nn.R2Conv`` from trivial to regular representations, and the channels' order.

    For groups of flips and quarter turns every filter of a field is an image of the field's first. Ours orders the
    output channels by elements (element * fields + field, elements as in ``Symmetry.elements``), escnn by fields
    (field * elements + element, its own elements): ``layer(x)[:, order]`` equals ``r2conv(x).tensor``. With conv groups
    that holds inside every group. The layer trains every tap; escnn's basis may span fewer filters (`rings`, `sigma`).
    escnn itself (github.com/QUVA-Lab/escnn) is not imported.

    Args:
        r2conv: the layer, whose group flips an axis or both, or turns by 180 or 90 degrees with or without flips
            (``'h'``, ``'v'``, ``'hv'``, ``'c2'``, ``'c4'``, ``'d4'``).
    Returns:
        ``(layer, order)``: the layer with one bias per field, and the indices (out_channels,).
    Raises:
        ValueError: another group, other representations, or filters or biases that are no images of each other to 1e-5
            of the largest.
        TypeError: no `R2Conv`.

    >>> layer, order = tritonsym.load_escnn(r2conv)  # doctest: +SKIP
    >>> torch.testing.assert_close(layer(x)[:, order], r2conv(x).tensor)  # doctest: +SKIP
    """
    options = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    if hasattr(r2conv, "output_padding") or not all(
        hasattr(r2conv, name) for name in ("expand_parameters", "in_type", "out_type", *options)
    ):
        raise TypeError(f"load_escnn: expected an escnn.nn.R2Conv, got {type(r2conv).__name__}")
    into, out, gspace = r2conv.in_type.representations, r2conv.out_type.representations, r2conv.out_type.gspace
    fits = "only layers from trivial to regular representations of 'h', 'v', 'hv', 'c2', 'c4' or 'd4' fit"
    theirs = gspace.fibergroup.elements or ()
    found = _symmetry_of([_matrix(gspace.basespace_action(g)) for g in theirs])
    if found is None:
        raise ValueError(f"load_escnn: the group is {gspace}, which flips or turns otherwise; {fits}")
    symmetry, position = found
    elements = [theirs[at] for at in position]
    for representation in into:
        if not all(_equal(_matrix(representation(g)), torch.eye(1)) for g in elements):
            raise ValueError(f"load_escnn: in_type has {representation}, which is not trivial; {fits}")
    rows: list[int] = []  # of the filters: fields with our elements
    for representation in out:  # g moves the first channel to the one of g
        columns = torch.stack([_matrix(representation(g))[:, 0] for g in elements])
        if not _equal(columns, torch.eye(columns.shape[1])[columns.argmax(1)]) or columns.shape[1] != len(elements):
            raise ValueError(f"load_escnn: out_type has {representation}, which is not regular; {fits}")
        rows.extend((len(rows) + columns.argmax(1)).tolist())
    with torch.enable_grad():
        weight, bias = r2conv.expand_parameters()
    sizes = {name: getattr(r2conv, name) for name in options}
    dense = nn.Conv2d(len(into), len(rows), **sizes, bias=bias is not None, device="meta").train(r2conv.training)
    dense.weight = nn.Parameter(weight[rows].detach(), weight.requires_grad)
    if bias is not None:
        dense.bias = nn.Parameter(bias[rows].detach(), bias.requires_grad)
    layer = SymmetricConv2d.from_dense(dense, symmetry=symmetry, share_bias=True, init="keep", order="field")
    order = torch.empty(len(rows), dtype=torch.long, device=weight.device)
    order[rows] = order.new_tensor(layer.layout.by_field)
    for name, ours, given in (("filter", layer.expanded_weight(), weight), ("bias", layer.expanded_bias(), bias)):
        if ours is not None and not (error := (ours[order] - given).abs().max()) <= 1e-5 * given.abs().max():
            raise ValueError(f"load_escnn: a {name} differs from the image of its field's first by {error:.3g}; {fits}")
    return layer, order


def _matrix(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to rounding."""
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def _symmetry_of(matrices: list[Any]) -> tuple[str, list[int]] | None:
    """The symmetry whose elements move points (x, y) by these matrices, and where each of its elements stands there."""
    points = torch.tensor([(j - 1.0, 1.0 - i) for i, j in taps((3, 3))])
    for name in ("h", "v", "hv", "c2", "c4", "d4"):
        ours = [points[list(g.slots((3, 3)))] for g in Symmetry(name).elements]  # tap p of an image is A^-1 p
        if len(ours) == len(matrices) and all(a.shape == (2, 2) for a in matrices):
            same = [[k for k, a in enumerate(matrices) if _equal(points @ a, moved)] for moved in ours]
            if all(len(k) == 1 for k in same):
                return name, [k for (k,) in same]
    return None

"""`replace_layers(model, group='hv')`: turn a plain stack of torch layers into an equivariant network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

from torch import nn

from tritonsym import nn as tnn
from tritonsym.aliases import attached
from tritonsym.nn.conv import Init
from tritonsym.nn.group import _fields, _order
from tritonsym.symmetry import AXES, Symmetry


def _kinds(*stems: str) -> tuple[type[nn.Module], ...]:
    return tuple(getattr(nn, f"{stem}{n}d") for stem in stems for n in (1, 2, 3))


_CONVS, _NORMS, _DROPOUTS = _kinds("Conv"), _kinds("BatchNorm"), (nn.Dropout, *_kinds("Dropout"))
_ADAPTIVE = _kinds("AdaptiveAvgPool", "AdaptiveMaxPool")
_SPATIAL = (*_CONVS, *_kinds("AvgPool", "MaxPool"), *_ADAPTIVE)
_ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_HEAD = (nn.Linear, nn.Flatten, nn.BatchNorm1d, nn.LayerNorm, nn.Softmax, nn.LogSoftmax, *_DROPOUTS, *_ELEMENTWISE)


def _stack(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and layer, in calling order; any module other than a Sequential is one layer."""
    if type(module).forward is nn.Sequential.forward and not attached(module):
        for name, child in module._modules.items():
            yield from _stack(child, f"{path}.{name}".lstrip("."))  # type: ignore[arg-type]
    else:
        yield path, module


def _note(layer: Any, symmetry: Symmetry) -> str:
    """On which sizes a strided layer is equivariant: where its last window ends at the end of the padded input.

    Raises:
        ValueError: the group does not act on the layer.
    """
    where, found = type(layer).__name__, {}
    for name in ("kernel_size", "stride", "padding", "dilation", "output_size"):
        value = getattr(layer, name, 1)
        if isinstance(value, str):
            if value == "same" and any((k - 1) * d % 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)):
                raise ValueError(f"{where}: padding='same' of an even kernel pads one side more; use an odd kernel")
            value = 0
        found[name] = value if isinstance(value, tuple | list) else (value,) * int(where[-2])
    symmetry.check_kernel(tuple(found["kernel_size"]), where)
    axes = [AXES[letter] for letter in symmetry.name] if symmetry.only_flips else [-2, -1]
    moved = {name: [value[axis] for axis in axes] for name, value in found.items()}
    if any(g.turns % 2 for g in symmetry.elements) and (uneven := [name for name, (a, b) in moved.items() if a != b]):
        raise ValueError(
            f"{where}: {symmetry.name!r} turns the axes, whose {', '.join(uneven)} differ; make them equal"
        )
    rows = zip(*list(moved.values())[:4], strict=True)
    rests = dict.fromkeys((s, (d * (k - 1) + 1 - 2 * p) % s) for k, s, p, d in rows if s > 1)
    return "; ".join(f"stride {s}: equivariant on sizes n with n % {s} == {rest}" for s, rest in rests)


def _filled(new: Any, layer: nn.Module, state: Mapping[str, Any], init: Init) -> Any:
    new.load_state_dict(state, assign=True)
    if init == "reset":
        new.reset_parameters()
    for key, parameter in new.named_parameters():
        parameter.requires_grad_(layer.get_parameter(key).requires_grad)
    return new


def _norm(layer: Any, group: str, init: Init) -> nn.Module:
    """`GroupBatchNorm*d` whose weight, bias and statistics are means over the elements of each field."""
    name = type(layer).__name__
    fields = _fields(name, "num_features", layer.num_features, group)
    options = (layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    state = {k: v.unflatten(0, (-1, fields)).mean(0) if v.ndim else v.clone() for k, v in layer.state_dict().items()}
    norm: nn.Module = _filled(getattr(tnn, f"Group{name}")(fields, group, *options), layer, state, init)
    return norm


def _linear(layer: nn.Linear, group: str, init: Init) -> nn.Module:
    """The nearest linear map from fields to scalars: it acts on their means, with weights summed over the elements."""
    fields = _fields("Linear", "in_features", layer.in_features, group)
    new = nn.Linear(fields, layer.out_features, layer.bias is not None, device="meta")
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state["weight"] = state["weight"].unflatten(1, (-1, fields)).sum(1)
    return nn.Sequential(tnn.GroupPool(group, "mean"), _filled(new, layer, state, init))


def _conv(layer: Any, group: str, lifts: bool, init: Init) -> Any:
    if layer.groups > 1:
        raise ValueError(f"groups={layer.groups} divide the channels of fields; only groups=1 is known")
    if not lifts:
        return getattr(tnn, f"Group{type(layer).__name__}").from_dense(layer, symmetry=group, init=init)
    _fields(type(layer).__name__, "out_channels", layer.out_channels, group)
    if idle := Symmetry(group).idle_axes(layer.kernel_size):
        raise ValueError(f"its kernel has size 1 along {idle!r}: the images of a filter are equal to it")
    cls = getattr(tnn, f"Symmetric{type(layer).__name__}")
    return cls.from_dense(layer, symmetry=group, share_bias=True, init=init)


def counterparts(
    model: nn.Module, group: str, init: Init, obstacle: Callable[[str, nn.Module], Any], hidden: Mapping[str, str]
) -> tuple[list[tuple[str, nn.Module, Any, str]], list[tuple[str, str, str]], dict[str, nn.Module]]:
    """The replacements in a plain stack (path, layer, replacement, note), strided pooling that stays, what to append.

    Up to the first linear layer, channels are fields in the library's order, channel = element * fields + field, and
    every layer becomes the nearest equivariant one. That linear layer acts on the means of the fields; nothing after it
    depends on the group. To a stack without one, a `GroupPool` that takes these means is appended.

    Raises:
        ValueError: layers have no counterpart; the message gives the reason for each, and nothing is changed.
    """
    where, group = f"replace_layers: group={group!r}", Symmetry(group).name
    order = _order("replace_layers", group)
    rows: list[tuple[str, nn.Module, Any, str]] = []
    stay, refused, seen = [], {}, set()
    lifted = is_single = is_flat = is_invariant = False
    layer: Any
    for name, layer in _stack(model):
        kind, new, note = type(layer), None, ""
        why = f"it has {has}, which its replacement would lose" if (has := attached(layer)) else hidden.get(name)
        try:
            if is_invariant:
                why = why or (None if kind in _HEAD else "no layer of vectors, as the first Linear makes them")
            elif why:
                pass
            elif kind in _SPATIAL:
                note = _note(layer, Symmetry(group))
                if is_flat or getattr(layer, "return_indices", False):
                    why = "Flatten has left no positions" if is_flat else "return_indices=True: it returns two tensors"
                elif kind not in _CONVS:
                    stay += [(name, kind.__name__, note)] * bool(note)
                elif not (why := obstacle(name, layer)):
                    new = _conv(layer, group, not lifted, init)
            elif kind is nn.Linear:
                why = obstacle(name, layer) if is_flat else "it acts on the last axis; put Flatten before it"
                new, note = (None if why else _linear(layer, group, init)), "of the means of the fields"
            elif kind is nn.Flatten:
                if not is_single or (layer.start_dim, layer.end_dim) != (1, -1):
                    why = (
                        "it turns positions into channels; pool to one position before: AdaptiveAvgPool2d(1), Flatten()"
                    )
            elif lifted and kind in _NORMS:
                new = _norm(layer, group, init)
            elif lifted and kind in _DROPOUTS:
                new = tnn.GroupDropout(layer.p, symmetry=group)
            elif kind not in (*_NORMS, *_DROPOUTS, *_ELEMENTWISE):
                why = "it has no equivariant counterpart; put one in its place, or convert the stack without it"
        except ValueError as error:
            why = str(error)
        if new is not None and id(layer) in seen:
            why = "it is called more than once; give every place a layer of its own"
        if why:
            refused[name] = f"  {name or '(model)'} ({kind.__name__}): {why}"
        elif new is not None:
            rows.append((name, layer, new.train(layer.training), note))
        seen.add(id(layer))
        lifted = lifted or kind in _CONVS
        is_flat, is_invariant = is_flat or kind is nn.Flatten, is_invariant or kind is nn.Linear
        if kind in _SPATIAL:
            size = getattr(layer, "output_size", None)
            is_single = kind in _ADAPTIVE and (set(size) if isinstance(size, tuple | list) else {size}) == {1}
    if not lifted:
        refused[""] = refused.get("", f"  (model) ({type(model).__name__}): it is no Sequential with a convolution")
    if refused:
        reasons = "\n".join(refused.values())
        raise ValueError(f"{where} is for plain stacks of layers with a counterpart; nothing was changed:\n{reasons}")
    tail: dict[str, nn.Module] = {}
    if not is_invariant:
        key = next(key for key in map(str, count(len(model._modules))) if key not in model._modules)
        tail[key] = tnn.GroupPool(group, "mean").train(model.training)
        name, layer, new, note = rows[-1]
        rows[-1] = (name, layer, new, "; ".join(filter(None, (note, f"{key} (GroupPool) leaves 1/{order} channels"))))
    return rows, stay, tail

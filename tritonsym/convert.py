"""Convert models: replace torch layers by symmetric ones, and symmetric ones by torch layers."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tritonsym import equivariant, fold, functional, reference
from tritonsym import nn as tnn
from tritonsym._compat import assert_at_run_time
from tritonsym._table import aligned
from tritonsym.aliases import attached, references, repoint, warn_of_optimizers, weight_readers
from tritonsym.nn.conv import INITS, Init, _OrbitConv, _OrbitPoolConv, _SharedConv, _TiedConv
from tritonsym.nn.group import GROUP_LAYERS, _GroupConv
from tritonsym.symmetry import FilterLayout, Symmetry, as_mapping

Spec = str | Mapping[str, int | str]
Recipe = Mapping[str, Any]
Rule = Callable[[str, nn.Module], Spec | nn.Module | bool | None]

#: The torch layers that can be replaced, and their replacements.
_REPLACEMENTS: dict[type[nn.Module], Any] = {
    getattr(nn, f"Conv{kind}{n}d"): getattr(tnn, f"SymmetricConv{kind}{n}d")
    for kind, n in product(("", "Transpose"), (1, 2, 3))
} | {nn.Linear: tnn.SymmetricLinear}
_PLAIN_LAYERS = tuple(_REPLACEMENTS)
_TRITONSYM_LAYERS = (_SharedConv, tnn.SymmetricLinear, tnn.GlobalConv1d, tnn.TopKPool1d, tnn.Symmetrize, *GROUP_LAYERS)
# torch wrappers that manage the parameters of what they wrap
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """One replaced layer. Values that a module chosen by a rule does not reveal are None.

    Multiply-adds are per position of the output (of the input, for a transposed convolution) over all channels;
    `multiply_adds_after` counts the stored weights. `tritonsym.explain` says how many the path of a layer executes.
    With d the dense weight, P d its projection and e the expanded weight, in Frobenius norms: `projection_error` is
    |P d - d| / |d|, 0 if the layer was symmetric; `scale` is |e| / |P d|.
    """

    name: str
    before: str
    after: str
    symmetry: str | None  # also a spec for `replace_layers`
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int | None
    projection_error: float | None
    scale: float | None
    note: str = ""
    recipe: Mapping[str, Any] | None = None  # the entry in `Report.recipe`


@dataclass(frozen=True)
class Skipped:
    """One layer left as it was, and why."""

    name: str
    layer: str
    reason: str


@dataclass(frozen=True)
class Report(Sequence[Replacement]):
    """What `replace_layers` did: a sequence of `Replacement`; `skipped` holds the rest; `str` is a table of both.

    Totals cover the replaced layers, `model_parameters_*` the whole model. Multiply-adds count one position per layer.
    """

    rows: tuple[Replacement, ...]
    skipped: tuple[Skipped, ...]
    model_parameters_before: int
    model_parameters_after: int
    group: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Replacement]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def parameters_before(self) -> int:
        return sum(row.parameters_before for row in self)

    @property
    def parameters_after(self) -> int:
        return sum(row.parameters_after for row in self)

    @property
    def multiply_adds_before(self) -> int:
        return sum(row.multiply_adds_before for row in self)

    @property
    def multiply_adds_after(self) -> int | None:
        known = [row.multiply_adds_after for row in self if row.multiply_adds_after is not None]
        return sum(known) if len(known) == len(self) else None

    @property
    def recipe(self) -> dict[str, Any]:
        """What was replaced by what, as JSON data: ``replace_layers(dense_model, recipe)`` makes the same replacements.

        Call it before ``load_state_dict``.

        Raises:
            ValueError: a rule chose a module that is not a layer of `tritonsym.nn` made from the dense one.
        """
        if self.group is not None:
            return {"tritonsym": RECIPE_VERSION, "group": self.group, "layers": [row.name for row in self]}
        for row in self:
            if row.recipe is None:
                raise ValueError(
                    f"recipe: {row.name or '(model)'} was replaced by a {row.after}, which no recipe describes; "
                    "replace this layer in code"
                )
        return {"tritonsym": RECIPE_VERSION, "layers": {row.name: dict(row.recipe or {}) for row in self}}

    def __str__(self) -> str:
        names = (
            "layer",
            "from",
            "to",
            "symmetry",
            "parameters",
            "multiply-adds per position",
            "error",
            "scale",
            "note",
        )
        alike = _grouped(self.rows, lambda row: replace(row, name="", recipe=None, projection_error=None, scale=None))
        parameters = [(rows[0].parameters_before, rows[0].parameters_after) for rows in alike]
        parameters.append((self.parameters_before, self.parameters_after))
        parameters.append((self.model_parameters_before, self.model_parameters_after))
        products = [(rows[0].multiply_adds_before, rows[0].multiply_adds_after) for rows in alike]
        products.append((self.multiply_adds_before, self.multiply_adds_after))
        first = [(_label(rows), rows[0].before, rows[0].after, rows[0].symmetry or "?") for rows in alike]
        first += [(f"total of {len(self)}", "", "", ""), ("whole model", "", "", "")]
        last = [
            (_range([r.projection_error for r in rows]), _range([r.scale for r in rows]), rows[0].note)
            for rows in alike
        ]
        columns = [*zip(*first, strict=True), _changes(parameters), [*_changes(products), ""]]
        columns += zip(*last, ("",) * 3, ("",) * 3, strict=True)
        lines = aligned([names, *zip(*columns, strict=True)], right=(4, 5, 6, 7))
        if self.skipped:
            rest = _grouped(self.skipped, lambda skip: (skip.layer, skip.reason))
            lines += ["", f"skipped {len(self.skipped)}:"]
            lines += aligned([(_label(skips), skips[0].layer, skips[0].reason) for skips in rest])
        return "\n".join(lines)


#: The format of `Report.recipe`.
RECIPE_VERSION = 1


def _grouped(rows: Sequence[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    """Group rows with equal keys, in order of first appearance."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())


def _changes(pairs: Sequence[tuple[float | None, float | None]]) -> list[str]:
    """'before -> after' of every pair."""
    cells = [[_cell(value) for value in pair] for pair in pairs]
    left, right = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [f"{before:>{left}} -> {after:>{right}}" for before, after in cells]


def _label(rows: Sequence[Any]) -> str:
    name = rows[0].name or "(model)"
    return f"{name} and {len(rows) - 1} more" if len(rows) > 1 else name


def _cell(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _range(values: Sequence[float | None]) -> str:
    """'0.71', or '0.69-0.71' if the values differ."""
    low, high = (_cell(pick(values, key=lambda v: -1 if v is None else v)) for pick in (min, max))
    return low if low == high else f"{low}-{high}"


# --- torch layers -> symmetric layers ---------------------------------------------------------------------------------


def replace_layers(
    model: nn.Module,
    conv: Spec | Recipe | None = None,
    linear: bool | Literal["symmetric"] | None = None,
    rule: Rule | None = None,
    inplace: bool = False,
    *,
    group: str | None = None,
    init: Init = "rescale",
    subclasses: bool = False,
) -> tuple[nn.Module, Report]:
    """Replace the convolutions and linear layers of a model by symmetric ones, or make a stack equivariant.

    Hyper-parameters, dtype, device, memory format, training flag, `requires_grad` and bias are kept. A layer used in
    several places is replaced once and stays shared, even if lists, tuples, dicts, `functools.partial` or a bound
    ``forward`` hold it. Create the optimizer afterwards: the parameters are new.

    Args:
        model: any module; it may itself be a layer.
        conv: symmetry of the convolutions and transposed convolutions: a name, a mapping to counts or percents, or
            text, as in `tritonsym.nn.SymmetricConv2d`; percents fit layers of any width. 'tied:hv' (optionally with
            'odd', 'odd:h', 'free:4') makes `TiedConv*d`, also of depthwise layers; 'pool:hv max' `OrbitPoolConv*d`.
            Or the `recipe` of a report, which replaces exactly its layers, or repeats its conversion to a `group`.
        linear: True or 'symmetric' replaces square `torch.nn.Linear` layers by `SymmetricLinear`.
        rule: called as ``rule(name, layer)`` for every convolution and linear layer that could be replaced. It returns
            None or False to leave it alone, True to apply `conv` or `linear` (the default without a rule), a symmetry
            as for `conv` ('symmetric' for a linear layer), or the module to put there, used as it is, e.g.
            ``TiedConv2d.from_dense(layer, symmetry='hv')``.
        inplace: edit `model` instead of a deep copy. A model that is itself a layer cannot become another one: use the
            returned module either way.
        group: the name of a group, to make a plain stack (a `torch.nn.Sequential`, nested or not) equivariant, all or
            nothing. The first convolution lifts, the others become `GroupConv*d`, batch norms `GroupBatchNorm*d` and
            dropout `GroupDropout`; pooling and element-wise activations stay. ``Flatten`` must follow pooling to one
            position. The first ``Linear`` then acts on the means of the fields, with its weights summed over the
            elements; what follows stays. To a stack without one, ``GroupPool(group, 'mean')`` is appended, which leaves
            channels / |G|. All weights are the nearest equivariant ones: equivariant filters keep their outputs. Notes
            in the report say on which sizes strided layers are equivariant.
        init: 'project' (nearest symmetric weight in the Frobenius norm: a mean over filters and taps, which scales
            the norm of random weights by about 1 / sqrt of their number), 'rescale' (the same, then every filter scaled
            back to its norm, root mean square over an orbit), 'keep' (base filters, or the lower triangle, keep their
            values), or 'reset'.
        subclasses: also replace subclasses of the torch layers whose forward is the torch layer's.
    Returns:
        The model, and a `Report` of the replaced layers and of the skipped ones, with the reason. Skipped are layers
        that the symmetry does not fit, convolutions whose kernel is 1 along every axis that it flips, subclasses, and
        layers that are uninitialized, compiled, sharded or wrapped for parallel training, that have parametrizations,
        hooks or further state, that share a parameter with another module, that something other than a list or the
        like holds (closures, sets, objects), or whose weight the code of a ``forward`` visibly reads.
    Raises:
        ValueError: nothing to do (no `conv`, `linear`, `rule` or `group`), a `group` with one of the others or for a
            model with layers that have no counterpart (with the reason for each), an unknown symmetry, a count or
            percent that no layer could have, an unknown `linear` or `init`, a rule that returns True where there is no
            default, or a recipe that does not fit the model.
        TypeError: an argument, or what the rule returned, is of the wrong kind.
        After an error, including one raised by the rule, the model is unchanged.
    Warns:
        UserWarning: nothing was replaced, or (inplace) an optimizer holds replaced parameters.

    >>> model, report = tritonsym.replace_layers(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), conv={"hv": "50%"})
    >>> [(row.name, row.symmetry, row.parameters_before, row.parameters_after) for row in report]
    [('0', 'hv:4 free:4', 224, 143)]
    """
    where = "replace_layers"
    functional.check_module(where, model)
    recipe = _layers_of(conv, where) if isinstance(conv, Mapping) and "layers" in conv else None
    if recipe is not None and "group" in conv:  # type: ignore[operator]
        if group is not None:
            raise ValueError(f"{where}: the recipe has group={conv['group']!r}; pass no other")  # type: ignore[index]
        conv, group = None, conv["group"]  # type: ignore[index]
    if group is not None and (conv is not None or linear or rule is not None):
        raise ValueError(f"{where}: group={group!r} replaces every layer; pass no conv, linear or rule with it")
    if conv is None and not linear and rule is None and group is None:
        raise ValueError(f"{where}: nothing to replace; pass conv='hv', linear=True, group='hv' or a rule")
    if recipe is not None and conv is not None and (linear or rule is not None):
        raise ValueError(f"{where}: a recipe names all that is replaced; pass no linear and no rule with it")
    if conv is not None and recipe is None:
        _check_spec(conv, where)
    if linear not in (None, False, True, "symmetric"):
        raise ValueError(f"{where}: linear must be True, False, 'symmetric' or None, got {linear!r}")
    if rule is not None and not callable(rule):
        raise TypeError(f"{where}: rule must be called as rule(name, layer), got {rule!r}")
    functional.check_choice(where, "init", init, INITS)
    hidden = _hidden(model, copied=not inplace)
    if not inplace:
        model = copy.deepcopy(model)
    before = _count(model)

    obstacle = _obstacles(model, hidden, subclasses or recipe is not None)
    replacements: dict[int, nn.Module] = {}
    rows, skipped = [], []
    tail: dict[str, nn.Module] = {}
    if group is not None:
        found, stay, tail = equivariant.counterparts(model, group, init, obstacle, hidden)
        replacements = {id(layer): new for _, layer, new, _ in found}
        rows = [replace(_row(*row), symmetry=group, recipe=None) for row in found]
        skipped = [Skipped(*row) for row in stay]
    for name, layer in model.named_modules():
        is_linear = isinstance(layer, nn.Linear)
        default = ("symmetric" if linear else None) if is_linear else conv
        has_choice = rule is not None or default is not None if recipe is None else name in recipe
        if (
            group is not None
            or not has_choice
            or not isinstance(layer, _PLAIN_LAYERS)
            or isinstance(layer, _SharedConv)
        ):
            continue
        new, note = obstacle(name, layer), ""
        if new is None and recipe is not None:
            new = _from_recipe(name, layer, recipe[name], init)
        elif new is None:
            choice = default if rule is None else rule(name, layer)
            if choice is True and default is None:
                missing = "linear=True" if is_linear else "conv='hv'"
                raise ValueError(f"{where}: rule({name!r}) returned True, but there is no default; pass {missing}")
            new, note = _build(name, layer, default if choice is True else choice, init)
        if isinstance(new, str):
            skipped.append(Skipped(name, type(layer).__name__, new))
        else:
            replacements[id(layer)] = new
            rows.append(_row(name, layer, new, note))
    if recipe is not None:
        _check_complete(recipe, rows, skipped)
    skipped += _unregistered(model, conv is not None or rule is not None, bool(linear) or rule is not None)
    if not rows:
        why = "; ".join(dict.fromkeys(f"{s.name or '(model)'}: {s.reason}" for s in skipped[:3]))
        warnings.warn(f"{where}: nothing was replaced ({why or 'there is no such layer'})", stacklevel=2)
    model._modules.update(tail)
    model = _replaced(where, model, replacements, inplace)
    after = _count(model)
    return model, Report(tuple(rows), tuple(skipped), before, after, group)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def _check_spec(spec: Any, where: str) -> None:
    """Refuse a symmetry that is wrong for every layer; it may still not fit some."""
    if other := _other_kind(spec, where):
        Symmetry(other[1]["symmetry"])
        return
    spec, _ = as_mapping(spec, where)
    if isinstance(spec, str):
        spec = {spec: 0}
    FilterLayout.parse(dict.fromkeys(spec, 0) if isinstance(spec, Mapping) else spec, 0, where=where)
    for key, value in spec.items():
        count = functional.as_ints(value)
        FilterLayout.parse({key: value}, count if isinstance(count, int) else 0, where=where)


def _other_kind(spec: Any, where: str) -> tuple[str, dict[str, Any]] | None:
    """'tied:hv odd:h free:4' or 'pool:hv max' as the class without its dimension, and the options of its from_dense."""
    if not isinstance(spec, str) or not spec.startswith(("tied:", "pool:")):
        return None
    first, *words = spec.split()
    kind, _, symmetry = first.partition(":")
    options: dict[str, Any] = {"symmetry": symmetry}
    for word in words:
        key, _, value = word.partition(":")
        if kind == "pool" and word in functional.POOL_REDUCTIONS:
            options["reduce"] = word
        elif kind == "tied" and key == "odd":
            options["parity"] = dict.fromkeys(value, "odd") if value else "odd"
        elif kind == "tied" and key == "free" and value.isdecimal():
            options["free"] = int(value)
        else:
            raise ValueError(
                f"{where}: {word!r} in {spec!r} is unknown; expected such as 'tied:hv odd:h free:4' or 'pool:hv max'"
            )
    return ("TiedConv" if kind == "tied" else "OrbitPoolConv"), options


def _hidden(model: nn.Module, copied: bool) -> dict[str, str]:
    """By layer name: why its replacement would not be called, or not everywhere."""
    names = {id(module): name for name, module in model.named_modules()}
    reasons: dict[str, str] = {}
    for module, place, is_certain, in_function in references(model):
        if not is_certain and id(module) in names:
            reason = f"{place} holds it too, and would go on calling the dense layer; convert before that is made"
            reasons.setdefault(names[id(module)], reason)
        if in_function and copied:
            for inner in module.modules():
                if id(inner) in names:
                    reason = f"{place} holds {names[id(module)] or 'the model'}" if id(module) in names else place
                    reason += ", and a copy of the model would go on calling it in the original; pass inplace=True"
                    reasons.setdefault(names[id(inner)], reason)
    return reasons


def _unregistered(model: nn.Module, convs: bool, linears: bool) -> list[Skipped]:
    """Layers that are not submodules but held by a list or the like."""
    registered = {id(module) for module in model.modules()}
    found: dict[int, Skipped] = {}
    for module, place, _, in_function in references(model):
        if in_function:  # functions are not copied: these may be layers of the original
            continue
        wanted = linears if isinstance(module, nn.Linear) else convs
        if id(module) not in registered and isinstance(module, _PLAIN_LAYERS) and wanted:
            reason = "it is no submodule of the model; hold it in a torch.nn.ModuleList or ModuleDict"
            found.setdefault(id(module), Skipped(place, type(module).__name__, reason))
    return list(found.values())


def _obstacles(
    model: nn.Module, hidden: Mapping[str, str], subclasses: bool
) -> Callable[[str, nn.Module], nn.Module | str | None]:
    """A function that says why a layer must not be replaced by anything, or None."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            owners[id(parameter)].append(f"{path}.{key}" if path else key)
    readers = weight_readers(model)
    wrapped = {name: type(m).__name__ for name, m in model.named_modules() if type(m).__name__ in _WRAPPERS}

    def obstacle(name: str, layer: Any) -> str | None:
        if isinstance(layer, LazyModuleMixin) and cast(Any, layer).has_uninitialized_params():
            return "its parameters are not initialized yet; run a batch through the model first"
        if parametrize.is_parametrized(layer):
            return "it has parametrizations; remove them first"
        if id(layer) in readers:
            return f"{readers[id(layer)]} reads its weight directly"
        base: Any = next(c for c in type(layer).__mro__ if c in _PLAIN_LAYERS)
        if type(layer) is not base and not subclasses:
            return f"a subclass of {base.__name__}; pass subclasses=True to replace these too"
        for method in ("forward", "_conv_forward"):
            if getattr(type(layer), method, None) is not getattr(base, method, None):
                return f"{type(layer).__name__} has a {method} of its own, which its replacement would lose"
        for wrapper, kind in wrapped.items():
            if name.startswith(f"{wrapper}." if wrapper else ""):
                return f"{kind} holds its parameters; convert the model before wrapping it"
        if hasattr(layer.weight, "device_mesh"):
            return "its weight is a DTensor; convert the model before sharding it"
        if getattr(layer, "_compiled_call_impl", None) is not None:
            return "it is compiled; convert the model before compiling it"
        if has := attached(layer):
            return f"it has {has}, which its replacement would lose"
        further = [*(layer._parameters.keys() - {"weight", "bias"}), *layer._buffers, *layer._modules]
        if further:
            return f"it holds more than weight and bias: {', '.join(further)}"
        if (dtype := layer.weight.dtype) not in _TRAINABLE:
            return f"its weight is {dtype}"
        if tuple(layer.weight.shape) != (shape := _dense_shape(layer)):
            return f"its weight has shape {tuple(layer.weight.shape)}, not {shape} as a {base.__name__} of its sizes"
        for key, parameter in layer.named_parameters():
            if len(paths := owners[id(parameter)]) > 1:
                return f"its {key} is shared: {', '.join(paths)}"
        return hidden.get(name)

    return obstacle


_TRAINABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


def _dense_shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    ends = (layer.out_channels, layer.in_channels // layer.groups)
    if layer.transposed:
        ends = (layer.in_channels, layer.out_channels // layer.groups)
    return (*ends, *layer.kernel_size)


def _build(name: str, layer: Any, choice: Any, init: Init) -> tuple[Any, str]:
    """The replacement chosen for a layer, or why there is none; and a note."""
    if choice is None or choice is False or choice is layer:
        return "left alone by the rule", ""
    if isinstance(choice, nn.Module):
        return choice, ""
    if isinstance(layer, nn.Linear):
        if choice != "symmetric":
            _check_spec(choice, f"replace_layers, layer {name!r}")
            return f"{choice!r} is a symmetry of filters; a linear layer knows 'symmetric'", ""
        return _from_dense(layer, tnn.SymmetricLinear, {}, init), ""
    where, note = f"replace_layers, layer {name!r}", ""
    _check_spec(choice, where)
    if all(size == 1 for size in layer.kernel_size):
        return "its kernel has size 1: the images of a filter are equal to it", ""
    if other := _other_kind(choice, where):
        stem, options = other
        if layer.transposed:
            return f"there is no transposed {stem}", ""
        cls = getattr(tnn, f"{stem}{len(layer.kernel_size)}d")
    else:
        if layer.out_channels == layer.groups > 1:
            cls = f"TiedConv{len(layer.kernel_size)}d"
            return f"one filter per group, without images beside it: conv='tied:...', or {cls} by a rule, ties taps", ""
        cls = next(new for old, new in _REPLACEMENTS.items() if isinstance(layer, old))
        try:
            choice, note = _without_idle_axes(choice, layer)
        except ValueError as error:
            return str(error), ""
        options = {"symmetry": choice}
    new = _from_dense(layer, cls, options, init)
    if isinstance(new, _OrbitConv) and not new.layout.orbits:
        return f"{choice!r} leaves all of its filters free", ""
    if isinstance(new, _TiedConv) and new.spec.rows * new.groups == new.out_channels * math.prod(new.kernel_size):
        return f"{choice!r} ties no taps of its kernel {tuple(layer.kernel_size)}", ""
    return new, note


def _from_dense(layer: nn.Module, cls: Any, options: Mapping[str, Any], init: Init) -> nn.Module | str:
    try:
        new: nn.Module = cls.from_dense(layer, **options, init=init)
        return new
    except ValueError as error:
        return str(error)


def _without_idle_axes(spec: Spec, layer: Any) -> tuple[Spec, str]:
    """The symmetry without the flips of axes along which the kernel has size 1, and a note if there are any."""
    if 1 not in layer.kernel_size:
        return spec, ""
    where = _REPLACEMENTS[next(c for c in type(layer).__mro__ if c in _PLAIN_LAYERS)].__name__
    counts: dict[str, int] = defaultdict(int)
    dropped = ""
    for symmetry, count in FilterLayout.parse(spec, layer.out_channels, layer.groups, where).counts.items():
        symmetry.check_kernel(layer.kernel_size, where)
        idle = symmetry.idle_axes(layer.kernel_size)
        dropped += "".join(letter for letter in idle if letter not in dropped)
        if rest := "".join(letter for letter in symmetry.name if letter not in idle):
            counts[rest] += count
    if not dropped:
        return spec, ""
    if not counts:
        raise ValueError(f"its kernel has size 1 along {dropped!r}: the images of a filter are equal to it")
    return dict(counts), f"without {dropped!r}, along which the kernel has size 1"


# --- recipes ----------------------------------------------------------------------------------------------------------


def _recipe_of(new: nn.Module) -> dict[str, Any] | None:
    """The class of a layer and the options of its `from_dense` that are not defaults; None for other modules."""
    options: dict[str, Any]
    if isinstance(new, _OrbitConv):
        options = {"symmetry": str(new.layout), "share_bias": new.share_bias}
    elif isinstance(new, _TiedConv):
        options = {"symmetry": new.symmetry.name, "parity": new.parity, "free": new.free}
    elif isinstance(new, _OrbitPoolConv):
        options = {"symmetry": new.symmetry.name, "reduce": new.reduce}
    elif isinstance(new, tnn.SymmetricLinear):
        options = {"never_unpack": new.never_unpack}
    else:
        return None
    if getattr(tnn, type(new).__name__, None) is not type(new):
        return None
    options["activation"] = new.activation
    default = {"share_bias": False, "parity": "even", "free": 0, "never_unpack": False, "activation": None}
    chosen = {key: value for key, value in options.items() if key not in default or value != default[key]}
    return {"layer": type(new).__name__, **chosen}


def _text_of(recipe: Mapping[str, Any] | None) -> str | None:
    """A spec for `replace_layers` that makes such a layer, without its activation and shared bias."""
    if recipe is None:
        return None
    symmetry, free, parity = (recipe.get(key) for key in ("symmetry", "free", "parity"))
    if symmetry is None:
        return "symmetric"
    if recipe["layer"].startswith("Tied"):
        odd = "".join(a for a, p in parity.items() if p == "odd") if isinstance(parity, Mapping) else ""
        words = [
            f"tied:{symmetry}",
            f"odd:{odd}" if odd else "odd" if parity == "odd" else "",
            f"free:{free}" * bool(free),
        ]
        return " ".join(word for word in words if word)
    return f"pool:{symmetry} {recipe['reduce']}" if "reduce" in recipe else str(symmetry)


def _layers_of(recipe: Recipe, where: str) -> Mapping[str, Any]:
    if recipe.get("tritonsym") != RECIPE_VERSION:
        version = recipe.get("tritonsym")
        raise ValueError(f"{where}: the recipe has version {version!r}, expected {RECIPE_VERSION}: see Report.recipe")
    layers = recipe["layers"]
    if isinstance(recipe.get("group"), str) and isinstance(layers, list):
        return dict.fromkeys(layers)
    if not isinstance(layers, Mapping):
        raise TypeError(f"{where}: the 'layers' of a recipe map names to options, got {type(layers).__name__}")
    for name, entry in layers.items():
        kind = entry.get("layer") if isinstance(entry, Mapping) else None
        if not isinstance(kind, str) or not hasattr(getattr(tnn, kind, None), "from_dense"):
            raise ValueError(f"{where}: the recipe of {name!r} names no layer of tritonsym.nn, got {entry!r}")
    return layers


def _from_recipe(name: str, layer: nn.Module, entry: Mapping[str, Any], init: Init) -> nn.Module | str:
    options = {key: value for key, value in entry.items() if key != "layer"}
    try:
        return _from_dense(layer, getattr(tnn, entry["layer"]), options, init)
    except TypeError as error:  # for another class of layer, or with unknown options
        return str(error)


def _check_complete(recipe: Mapping[str, Any], rows: Sequence[Replacement], skipped: Sequence[Skipped]) -> None:
    why = {skip.name: skip.reason for skip in skipped}
    missing = [name for name in recipe if name not in {row.name for row in rows}]
    if missing:
        lines = "\n".join(f"  {name}: {why.get(name, 'there is no such layer')}" for name in missing)
        raise ValueError(
            f"replace_layers: the recipe does not fit this model, which must be the dense one it was made for:\n{lines}"
        )


# --- numbers of one layer ---------------------------------------------------------------------------------------------


def _row(name: str, layer: Any, new: nn.Module, note: str) -> Replacement:
    recipe, dense, multiply_adds = _recipe_of(new), isinstance(layer, _PLAIN_LAYERS), None
    if isinstance(new, _GroupConv):
        multiply_adds = layer.weight.numel() >> len(new.symmetry.mirrors)  # on the path `fold`
    elif isinstance(new, _SharedConv):
        multiply_adds = new.in_channels * new.spec.rows
    elif isinstance(new, tnn.SymmetricLinear):
        multiply_adds = layer.weight.numel()  # storage saves memory here, not arithmetic
    elif _is_head(new):
        multiply_adds = new.get_parameter("1.weight").numel()
    elif not dense:
        multiply_adds = 0
    error, scale = _changes_of(layer.weight, new) if dense else (None, None)
    return Replacement(
        name=name,
        before=type(layer).__name__,
        after=type(new).__name__,
        symmetry=_text_of(recipe),
        parameters_before=_count(layer),
        parameters_after=_count(new),
        multiply_adds_before=layer.weight.numel() if dense else 0,
        multiply_adds_after=multiply_adds,
        projection_error=error,
        scale=scale,
        note=note,
        recipe=recipe,
    )


def _is_head(new: nn.Module) -> bool:
    """Whether this is what `equivariant` makes of a linear layer: one that acts on the means of fields."""
    return isinstance(new, nn.Sequential) and [type(m) for m in new] == [tnn.GroupPool, nn.Linear]


@torch.no_grad()
def _changes_of(weight: Tensor, new: Any) -> tuple[float | None, float | None]:
    """The `projection_error` and the `scale` of a `Replacement`."""
    is_head = _is_head(new)
    if (not isinstance(new, (_SharedConv, tnn.SymmetricLinear)) and not is_head) or weight.is_meta:
        return None, None
    wide, order = torch.promote_types(weight.dtype, torch.float64), new[0].order if is_head else 1
    weights = weight, new[1].weight.repeat(1, order) / order if is_head else new.expanded_weight()
    dense, expanded = (w.cpu().to(wide) for w in weights)
    if expanded.shape != dense.shape:
        return None, None
    if is_head:
        projected = dense.unflatten(1, (order, -1)).mean(1).repeat(1, order)
    elif isinstance(new, _GroupConv):
        projected = fold.expand(fold.project(dense, new.spec), new.spec)
    elif isinstance(new, _SharedConv):
        projected = reference.expand(new.spec, reference.project(new.spec, dense))
    else:
        projected = dense + (dense.mT - dense) / 2
    norm = torch.linalg.vector_norm
    error, left = norm(projected - dense), norm(projected)
    return (error / norm(dense)).item() if error else 0.0, (norm(expanded) / left).item() if left else None


# --- initialisation ---------------------------------------------------------------------------------------------------


def init_(module: nn.Module, initializer: Callable[[Tensor], object]) -> nn.Module:
    """Initialise layers by the dense weight they stand for, as the stored one has other fans and norms.

    For every convolution and `SymmetricLinear` of this library in `module`, ``initializer(weight)`` fills a dense
    weight, for example ``functools.partial(torch.nn.init.kaiming_normal_, mode='fan_out')``. That is projected and
    rescaled as by ``from_dense``. Biases and other layers stay as they are.

    Args:
        module: a layer, or a model.
        initializer: fills a tensor in place.
    Returns:
        The module.
    Raises:
        ValueError: there is no such layer, or one has parametrizations. Nothing is changed.
        TypeError: `module` is not a module, or `initializer` is not callable.

    >>> layer = tritonsym.init_(nn.SymmetricConv2d(8, 8, 3, symmetry="h"), torch.nn.init.kaiming_normal_)
    """
    where = "init_"
    functional.check_module(where, module)
    if not callable(initializer):
        raise TypeError(
            f"{where}: initializer must fill a tensor, as torch.nn.init.orthogonal_ does, got {initializer!r}"
        )
    layers = {name: m for name, m in module.named_modules() if isinstance(m, (_SharedConv, tnn.SymmetricLinear))}
    if not layers:
        raise ValueError(f"{where}: {type(module).__name__} holds no layer of tritonsym.nn with a dense weight")
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer):
            raise ValueError(f"{where}: {name or '(model)'} has parametrizations; initialise it before they are added")
    with torch.no_grad():
        weights = [
            torch.empty(layer._dense_shape(), dtype=layer.weight.dtype, device=layer.weight.device)
            for layer in layers.values()
        ]
        for weight in weights:
            initializer(weight)
        for layer, weight in zip(layers.values(), weights, strict=True):
            layer._adopt(weight, None, "rescale")
    return module


# --- symmetric layers -> plain torch ----------------------------------------------------------------------------------


def materialize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace every tritonsym layer by plain torch layers with equal outputs, for a process without tritonsym.

    Convolutions and `SymmetricLinear` become what their ``to_dense()`` returns; `Symmetrize`, `GlobalConv1d` and
    `TopKPool1d` a `torch.fx.GraphModule` of torch ops. A plain `Symmetrize` brings no input to a canonical order first:
    outputs for re-ordered inputs are equal up to rounding, not to the bit. A layer used in several places stays shared;
    its dtype, device, training flag and `requires_grad` are kept. Calls of `tritonsym.functional` are not replaced.

    Args:
        model: any module; it may itself be a layer.
        inplace: edit `model` instead of a deep copy. A model that is itself a tritonsym layer cannot become another
            one: use the returned module either way.
    Raises:
        ValueError: a layer has hooks or overrides ``forward``, which the plain layer would lose, or something other
            than a list or the like holds it and would go on calling it; nothing is changed.
        TypeError: `model` is not a module.

    >>> type(tritonsym.materialize(nn.SymmetricConv2d(8, 8, 3, symmetry="h")))
    <class 'torch.nn.modules.conv.Conv2d'>
    """
    where = "materialize"
    functional.check_module(where, model)
    for key, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"{where}: {key} is a DTensor; materialize a model that is not sharded, with the full state_dict "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict)"
            )
    hidden = _hidden(model, copied=not inplace)
    for name, module in model.named_modules():
        if isinstance(module, _TRITONSYM_LAYERS) and name in hidden:
            raise ValueError(f"{where}: {name or '(model)'} ({type(module).__name__}): {hidden[name]}")
    if not inplace:
        model = copy.deepcopy(model)
    replacements: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        _materialized(name, module, replacements)
    return _replaced(where, model, replacements, inplace)


def _replaced(where: str, model: nn.Module, new: Mapping[int, nn.Module], inplace: bool) -> nn.Module:
    """The model with the modules of these ids replaced. In place, warn of optimizers that hold old parameters."""
    gone = [p for layer in model.modules() if id(layer) in new for p in layer.parameters()]
    model = repoint(model, new)
    if inplace:
        kept = {id(p) for p in model.parameters()}
        warn_of_optimizers(where, [p for p in gone if id(p) not in kept])
    return model


def _materialized(name: str, module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """The plain form of a tritonsym layer, recorded in `done`; any other module as it is."""
    if id(module) in done or not isinstance(module, _TRITONSYM_LAYERS):
        return done.get(id(module), module)
    has = attached(module)
    if not type(module).forward.__module__.startswith("tritonsym."):
        has = "a forward of its own"
    if has:
        raise ValueError(
            f"materialize: {name or '(model)'} ({type(module).__name__}) has {has}, which plain layers would lose; "
            "remove it, or replace this layer yourself first"
        )
    if isinstance(module, tnn.Symmetrize):
        inner = _materialized(f"{name}.inner".lstrip("."), module.inner, done)
        plain = _traced(_symmetrize, module, inner=inner, over=module.over, dim=module.dim, reduce=module.reduce)
    elif isinstance(module, tnn.GlobalConv1d):
        plain = _traced(_global_conv1d, module, **copy.deepcopy(module._parameters), activation=module.activation)
    elif isinstance(module, tnn.GroupPool | tnn.GroupDropout):
        attributes = {key: value for key, value in vars(module).items() if key in ("order", "reduce")}
        plain = _traced(type(module).plain, module, **attributes, **module._modules)
    elif isinstance(module, tnn.TopKPool1d):
        plain = _traced(lambda self, x: reference.topk_pool1d(x, self.k), module, k=module.k)
    else:
        plain = module.to_dense().train(module.training)
    done[id(module)] = plain
    return plain


class _Plain(nn.Module):
    """A module with these attributes and a forward for `torch.fx` to trace."""

    def __init__(self, forward: Callable[[Any, Any], Any], attributes: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self._function = forward

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


def _traced(forward: Callable[[Any, Any], Any], module: nn.Module, **attributes: Any) -> nn.Module:
    """A `torch.fx.GraphModule` that replaces `module` and needs only torch; it calls inner modules."""

    class Tracer(fx.Tracer):  # local, because a pickled GraphModule names its tracer otherwise
        def is_leaf_module(self, *_: Any) -> bool:
            return True

    plain = _Plain(forward, attributes)
    plain.training = module.training
    graph = Tracer().trace(plain)
    for node in graph.nodes:
        node.type = None  # annotations are strings here, which a GraphModule cannot pickle
    return fx.GraphModule(plain, graph, type(module).__name__)


def _symmetrize(self: Any, x: Tensor) -> Any:
    orders = _orders(self.over, x, x.size(self.dim))  # [G, n]
    images = x.movedim(self.dim, 1)[:, orders].transpose(0, 1)  # [G, B, n, ...]
    y = self.inner(images.flatten(0, 1).movedim(1, self.dim))
    return reference.REDUCTIONS[self.reduce](y.unflatten(0, (orders.size(0), x.size(0))))


def _orders(over: str | Sequence[Sequence[int]], x: Tensor, n: int) -> Tensor:
    """`tritonsym.functional.orders_of` in torch ops, for a size known only at run time."""
    if not isinstance(over, str):
        assert_at_run_time(n == len(over[0]), f"Symmetrize: the axis must have {len(over[0])} entries")
        return x.new_tensor(over, dtype=torch.long)
    i = x.new_ones(n, dtype=torch.long).cumsum(0) - 1
    if over == "flip":
        return torch.stack([i, i.flip(0)])
    if over == "swap":
        assert_at_run_time(n % 2 == 0, "Symmetrize: 'swap' exchanges two halves, but the axis has odd size")
        return torch.stack([i, i.roll(n // 2)])
    if over == "cyclic":
        return (i[:, None] + i) % n
    assert_at_run_time(n <= 7, "Symmetrize: 7 entries (5040 permutations) are the most")
    orders = i[None]
    for m in range(2, 8):  # every permutation is exactly one product of turns of the first 2, 3, ..., n entries
        turns = 1 + (m - 1) * torch.sym_min(torch.sym_max(n - m + 1, 0), 1)  # m, or 1 if m > n
        turn = x.new_ones(turns, dtype=torch.long).cumsum(0) - 1
        orders = torch.where(i < m, (i + turn[:, None]) % m, i)[:, orders].flatten(0, 1)
    return orders


def _global_conv1d(self: Any, x: Any) -> Any:
    y = (self.center - self.surround) @ x
    # the dtype is known only at run time: a node of its own, as torch's function cannot be traced
    wide = x.tracer.create_proxy("call_function", torch.promote_types, (y.dtype, torch.float32), {})
    return reference.add_all_positions(y, x, self.surround, self.bias, self.activation, wide)

"""Convert models: torch layers to symmetric ones and back, and checkpoints of the CNN-Symmetry package."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrizations, parametrize

from tritonsym import functional, reference
from tritonsym import nn as tnn
from tritonsym._compat import assert_at_run_time
from tritonsym._table import aligned
from tritonsym.nn.conv import INITS, Init, _OrbitConv, _SharedConv
from tritonsym.symmetry import FilterLayout, as_mapping

Spec = str | Mapping[str, int | str]
Rule = Callable[[str, nn.Module], Spec | nn.Module | bool | None]

#: The torch layers to replace, by what.
_REPLACEMENTS: dict[type[nn.Module], Any] = {
    getattr(nn, f"Conv{kind}{n}d"): getattr(tnn, f"SymmetricConv{kind}{n}d")
    for kind, n in product(("", "Transpose"), (1, 2, 3))
} | {nn.Linear: tnn.SymmetricLinear}
_PLAIN_LAYERS = tuple(_REPLACEMENTS)
_TRITONSYM_LAYERS = (_SharedConv, tnn.SymmetricLinear, tnn.GlobalConv1d, tnn.TopKPool1d, tnn.Symmetrize)
# torch modules whose forward reads the weights of their children instead of calling them
_WEIGHT_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """One replaced layer. What a module chosen by a rule does not tell is None.

    Multiply-adds are those of one position of the output (of the input, for a transposed convolution) over all
    channels; afterwards those with the stored weights. `tritonsym.explain` says what the path of a layer executes.
    """

    name: str
    before: str
    after: str
    symmetry: str | None
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int | None
    weight_change: float | None  # |expanded - dense| / |dense|, Frobenius norms


@dataclass(frozen=True)
class Skipped:
    """One layer left as it was, and why."""

    name: str
    layer: str
    reason: str


@dataclass(frozen=True)
class Report(Sequence[Replacement]):
    """What `replace_layers` did: a sequence of `Replacement`; `skipped` holds the rest; `str` is a table of both.

    Totals are over the replaced layers. Those of multiply-adds count one position of every layer.
    """

    rows: tuple[Replacement, ...]
    skipped: tuple[Skipped, ...]

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

    def __str__(self) -> str:
        names = ("layer", "from", "to", "symmetry", "parameters", "multiply-adds per position", "weight change")
        changes = self._changes("parameters"), self._changes("multiply_adds")
        first = [(r.name or "(model)", r.before, r.after, r.symmetry or "?") for r in self]
        last = [_cell(r.weight_change) for r in self]
        rows = zip([*first, (f"total of {len(self)}", "", "", "")], *changes, [*last, ""], strict=True)
        lines = aligned([names, *((*row[0], *row[1:]) for row in rows)], right=(4, 5, 6))
        if self.skipped:
            rest = [(s.name or "(model)", s.layer, s.reason) for s in self.skipped]
            lines += ["", f"skipped {len(self.skipped)}:", *aligned(rest)]
        return "\n".join(lines)

    def _changes(self, what: str) -> list[str]:
        """'before -> after' of every row and of the total."""
        pairs = [[_cell(getattr(row, f"{what}_{when}")) for when in ("before", "after")] for row in (*self, self)]
        left, right = (max(map(len, column)) for column in zip(*pairs, strict=True))
        return [f"{before:>{left}} -> {after:>{right}}" for before, after in pairs]


def _cell(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


# --- torch layers -> symmetric layers ---------------------------------------------------------------------------------


def replace_layers(
    model: nn.Module,
    conv: Spec | None = None,
    linear: bool | Literal["symmetric"] | None = None,
    rule: Rule | None = None,
    inplace: bool = False,
    *,
    init: Init = "project",
    subclasses: bool = False,
) -> tuple[nn.Module, Report]:
    """Replace the convolutions and linear layers of a model by symmetric ones.

    Hyper-parameters, dtype, device, training flag, `requires_grad` and bias are kept. A layer used in several places is
    replaced once and stays shared. Make the optimizer afterwards: the parameters are new.

    Args:
        model: any module; it may itself be a layer.
        conv: symmetry of the convolutions and transposed convolutions, a name or a mapping to counts or percents as in
            `tritonsym.nn.SymmetricConv2d`. Percents fit layers of every width.
        linear: True or 'symmetric' replaces square `torch.nn.Linear` layers by `SymmetricLinear`.
        rule: called as ``rule(name, layer)`` for every convolution and linear layer that could be replaced. Returns
            None or False to leave it alone, True to apply `conv` or `linear` (the default without a rule), a symmetry
            as for `conv` ('symmetric' for a linear layer), or the module to put there, which is taken as it is, e.g.
            ``TiedConv2d.from_dense(layer, symmetry='hv')``.
        inplace: edit `model` instead of a deep copy. A model that is itself a layer cannot become another one: use the
            returned module either way.
        init: 'project' (nearest symmetric weight in the Frobenius norm), 'keep' (base filters, or the lower triangle,
            keep their values), or 'reset'.
        subclasses: also replace subclasses of the torch layers; what they do beyond the torch layer is lost.
    Returns:
        The model, and a `Report` of replaced layers and of those skipped, with the reason: layers that the symmetry
        does not fit, convolutions whose kernel is 1 along every axis, subclasses, layers not initialized yet, with
        parametrizations, hooks or further state, that share a parameter with another module, or whose parent reads
        their weight. (That is known of `torch.nn.MultiheadAttention` and `TransformerEncoderLayer`; leave alone by rule
        what code of your own reads like that.)
    Raises:
        ValueError: nothing to do (no `conv`, `linear` or `rule`), an unknown symmetry, a count or percent that no layer
            could have, an unknown `linear` or `init`, or a rule that returns True where there is no default.
        TypeError: an argument, or what the rule returned, is of the wrong kind.
        After an error, also one raised by the rule, the model is as it was.
    """
    where = "replace_layers"
    _check_module(where, model)
    if conv is None and not linear and rule is None:
        raise ValueError(f"{where}: nothing to replace; pass conv='hv', linear=True or a rule")
    if conv is not None:
        _check_spec(conv, where)
    if linear not in (None, False, True, "symmetric"):
        raise ValueError(f"{where}: linear must be True, False, 'symmetric' or None, got {linear!r}")
    if rule is not None and not callable(rule):
        raise TypeError(f"{where}: rule must be called as rule(name, layer), got {rule!r}")
    functional.check_choice(where, "init", init, INITS)
    if not inplace:
        model = copy.deepcopy(model)

    parents, owners = _surroundings(model)
    replacements: dict[int, nn.Module] = {}
    rows, skipped = [], []
    for name, layer in model.named_modules():
        is_linear = isinstance(layer, nn.Linear)
        default = ("symmetric" if linear else None) if is_linear else conv
        has_choice = rule is not None or default is not None
        if not has_choice or not isinstance(layer, _PLAIN_LAYERS) or isinstance(layer, _SharedConv):
            continue
        new: nn.Module | str | None = _obstacle(layer, parents[id(layer)], owners, subclasses)
        if new is None:
            choice = default if rule is None else rule(name, layer)
            if choice is True and default is None:
                missing = "linear=True" if is_linear else "conv='hv'"
                raise ValueError(f"{where}: rule({name!r}) returned True, but there is no default; pass {missing}")
            new = _build(name, layer, default if choice is True else choice, init)
        if isinstance(new, str):
            skipped.append(Skipped(name, type(layer).__name__, new))
        else:
            replacements[id(layer)] = new
            rows.append(_row(name, layer, new))
    return _swap(model, replacements), Report(tuple(rows), tuple(skipped))


def _check_module(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: expected a torch.nn.Module, got {type(model).__name__}")


def _check_spec(spec: Any, where: str) -> None:
    """Refuse a symmetry that is wrong whatever the layer; one layer may still not fit it."""
    spec, _ = as_mapping(spec, where)
    if isinstance(spec, str):
        spec = {spec: 0}
    FilterLayout.parse(dict.fromkeys(spec, 0) if isinstance(spec, Mapping) else spec, 0, where=where)
    for key, value in spec.items():
        count = functional.as_ints(value)
        FilterLayout.parse({key: value}, count if isinstance(count, int) else 0, where=where)


def _surroundings(model: nn.Module) -> tuple[dict[int, list[nn.Module]], dict[int, list[str]]]:
    """By id: the parents of every module, and the names of every parameter."""
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for child in module.children():
            parents[id(child)].append(module)
        for key, parameter in module._parameters.items():
            owners[id(parameter)].append(f"{path}.{key}" if path else key)
    return parents, owners


def _obstacle(
    layer: nn.Module, parents: Sequence[nn.Module], owners: Mapping[int, Sequence[str]], subclasses: bool
) -> str | None:
    """Why a layer must not be replaced, whatever by."""
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return "its parameters are not initialized yet; run a batch through the model first"
    if parametrize.is_parametrized(layer):
        return "it has parametrizations; remove them first"
    for parent in parents:
        if isinstance(parent, _WEIGHT_READERS):
            return f"{type(parent).__name__} reads its weight directly"
    if type(layer) not in _PLAIN_LAYERS and not subclasses:
        base = next(c.__name__ for c in type(layer).__mro__ if c in _PLAIN_LAYERS)
        return f"a subclass of {base}; pass subclasses=True to replace these too"
    if has := _attached(layer):
        return f"it has {has}, which its replacement would lose"
    further = [*(layer._parameters.keys() - {"weight", "bias"}), *layer._buffers, *layer._modules]
    if further:
        return f"it holds more than weight and bias: {', '.join(further)}"
    if (dtype := layer.weight.dtype) not in _TRAINABLE:
        return f"its weight is {dtype}"
    for key, parameter in layer.named_parameters():
        if len(names := owners[id(parameter)]) > 1:
            return f"its {key} is shared: {', '.join(names)}"
    return None


_TRAINABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


def _attached(module: nn.Module) -> str | None:
    """What somebody has attached to this very module and no other module would do."""
    if "forward" in vars(module):
        return "a patched forward"
    hooks = [hook for kind, held in vars(module).items() if kind.endswith("_hooks") for hook in held.values()]
    ours = [getattr(hook, "hook", hook) for hook in hooks]
    # torch's weight_norm leaves one, to load old checkpoints
    return "hooks" if any(getattr(hook, "__module__", "") != parametrizations.__name__ for hook in ours) else None


def _build(name: str, layer: Any, choice: Any, init: Init) -> Any:
    """The replacement that was chosen for a layer, or why there is none."""
    if choice is None or choice is False or choice is layer:
        return "left alone by the rule"
    if isinstance(choice, nn.Module):
        return choice
    is_linear, options = isinstance(layer, nn.Linear), {"init": init}
    if not is_linear or choice != "symmetric":
        _check_spec(choice, f"replace_layers, layer {name!r}")
        if is_linear:
            return f"{choice!r} is a symmetry of filters; a linear layer knows 'symmetric'"
        if all(size == 1 for size in layer.kernel_size):
            return "its kernel has size 1: the images of a filter are equal to it"
        options["symmetry"] = choice
    try:
        new = next(new for old, new in _REPLACEMENTS.items() if isinstance(layer, old)).from_dense(layer, **options)
    except ValueError as error:
        return str(error)
    if isinstance(new, _OrbitConv) and not new.layout.orbits:
        return f"{choice!r} leaves all of its filters free"
    return new


def _row(name: str, layer: Any, new: nn.Module) -> Replacement:
    symmetry, multiply_adds = None, None
    if isinstance(new, _SharedConv):
        symmetry = str(new.layout if isinstance(new, _OrbitConv) else new.symmetry)
        multiply_adds = new.in_channels * new.spec.rows
    elif isinstance(new, tnn.SymmetricLinear):
        symmetry = "symmetric"
        multiply_adds = layer.weight.numel()  # storage saves memory here, not arithmetic
    return Replacement(
        name=name,
        before=type(layer).__name__,
        after=type(new).__name__,
        symmetry=symmetry,
        parameters_before=sum(p.numel() for p in layer.parameters()),
        parameters_after=sum(p.numel() for p in new.parameters()),
        multiply_adds_before=layer.weight.numel(),
        multiply_adds_after=multiply_adds,
        weight_change=_weight_change(layer.weight, new),
    )


@torch.no_grad()
def _weight_change(dense: Tensor, new: nn.Module) -> float | None:
    if not isinstance(new, (_SharedConv, tnn.SymmetricLinear)):
        return None
    expanded: Tensor = new.expanded_weight()
    if expanded.shape != dense.shape or expanded.is_meta or dense.is_meta:
        return None
    wide = torch.promote_types(dense.dtype, torch.float64)
    dense, expanded = dense.cpu().to(wide), expanded.cpu().to(wide)
    change = torch.linalg.vector_norm(expanded - dense)
    return (change / torch.linalg.vector_norm(dense)).item() if change else 0.0


def _swap(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put the replacement of every module, by its id, into all the places where the module stands."""
    for module in list(model.modules()):
        if id(module) not in replacements:
            for key, child in module._modules.items():
                if id(child) in replacements:
                    module._modules[key] = replacements[id(child)]
    return replacements.get(id(model), model)


# --- symmetric layers -> plain torch ----------------------------------------------------------------------------------


def materialize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace every tritonsym layer by plain torch layers with equal outputs, for a process without tritonsym.

    Convolutions and `SymmetricLinear` become what their ``to_dense()`` returns; `Symmetrize`, `GlobalConv1d` and
    `TopKPool1d` a `torch.fx.GraphModule` of torch ops. `Symmetrize` then stacks the re-orderings as they come: outputs
    for re-ordered inputs are equal to rounding, no longer to the bit. A layer used in several places stays shared; its
    dtype, device, training flag and `requires_grad` are kept. Calls of `tritonsym.functional` stay what they are.

    Args:
        model: any module; it may itself be a layer.
        inplace: edit `model` instead of a deep copy. A model that is itself a tritonsym layer cannot become another
            one: use the returned module either way.
    Raises:
        ValueError: a layer has hooks or overrides ``forward``, which the plain layer would lose; nothing is changed.
        TypeError: not a module.
    """
    _check_module("materialize", model)
    if not inplace:
        model = copy.deepcopy(model)
    replacements: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        _materialized(name, module, replacements)
    return _swap(model, replacements)


def _materialized(name: str, module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """The plain form of a tritonsym layer, noted in `done`; any other module as it is."""
    if id(module) in done or not isinstance(module, _TRITONSYM_LAYERS):
        return done.get(id(module), module)
    has = _attached(module)
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
    elif isinstance(module, tnn.TopKPool1d):
        plain = _traced(lambda self, x: reference.topk_pool1d(x, self.k), module, k=module.k)
    else:
        plain = module.to_dense().train(module.training)
    done[id(module)] = plain
    return plain


class _Plain(nn.Module):
    """A module with these attributes, and a forward for `torch.fx` to trace."""

    def __init__(self, forward: Callable[[Any, Any], Any], attributes: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self._function = forward

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


def _traced(forward: Callable[[Any, Any], Any], module: nn.Module, **attributes: Any) -> nn.Module:
    """A `torch.fx.GraphModule` that needs only torch, in place of `module`; inner modules are called."""

    class Tracer(fx.Tracer):  # local: a pickled GraphModule names its tracer unless that is local
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
    """`tritonsym.functional.orders_of` in torch ops, for a size known at run time."""
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
    for m in range(2, 8):  # every permutation is one product of turns of the first 2, 3, ..., n entries
        turns = 1 + (m - 1) * torch.sym_min(torch.sym_max(n - m + 1, 0), 1)  # m, or 1 if m > n
        turn = x.new_ones(turns, dtype=torch.long).cumsum(0) - 1
        orders = torch.where(i < m, (i + turn[:, None]) % m, i)[:, orders].flatten(0, 1)
    return orders


def _global_conv1d(self: Any, x: Any) -> Any:
    y = (self.center - self.surround) @ x
    # of the dtype at run time: a node of its own, as torch's function cannot be traced
    wide = x.tracer.create_proxy("call_function", torch.promote_types, (y.dtype, torch.float32), {})
    return reference.add_all_positions(y, x, self.surround, self.bias, self.activation, wide)


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
    _check_module(where, module)
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

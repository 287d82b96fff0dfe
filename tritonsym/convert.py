"""Convert models: torch layers to symmetric ones and back, and checkpoints of the CNN-Symmetry package."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrizations, parametrize

from tritonsym import functional, reference
from tritonsym.nn.conv import (
    INITS,
    Init,
    SymmetricConv1d,
    SymmetricConv2d,
    SymmetricConv3d,
    SymmetricConvTranspose1d,
    SymmetricConvTranspose2d,
    SymmetricConvTranspose3d,
    _OrbitConv,
    _SharedConv,
)
from tritonsym.nn.linear import SymmetricLinear
from tritonsym.nn.pool import GlobalConv1d, TopKPool1d
from tritonsym.nn.symmetrize import Symmetrize
from tritonsym.symmetry import FilterLayout

Spec = str | Mapping[str, int | str]
Rule = Callable[[str, nn.Module], Spec | nn.Module | bool | None]

_CONVOLUTIONS: dict[type[_ConvNd], Any] = {
    nn.Conv1d: SymmetricConv1d,
    nn.Conv2d: SymmetricConv2d,
    nn.Conv3d: SymmetricConv3d,
    nn.ConvTranspose1d: SymmetricConvTranspose1d,
    nn.ConvTranspose2d: SymmetricConvTranspose2d,
    nn.ConvTranspose3d: SymmetricConvTranspose3d,
}
_PLAIN_LAYERS: tuple[type[nn.Module], ...] = (*_CONVOLUTIONS, nn.Linear)
_TRITONSYM_LAYERS = (_SharedConv, SymmetricLinear, GlobalConv1d, TopKPool1d, Symmetrize)
# torch modules whose forward reads the weights of their children instead of calling them
_WEIGHT_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """One replaced layer.

    Multiply-adds are those of one position of the output (of the input, for a transposed convolution) over all
    channels. For a convolution `multiply_adds_after` counts the stored weights, which is what a path that exploits the
    symmetry executes at stride 1; the reference path executes the dense count, and `tritonsym.explain` says which path
    a layer takes. What a module chosen by a rule does not tell is None.
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
        columns = [
            ("layer", *(_shown(row.name) for row in self), f"total of {len(self)}"),
            ("from", *(row.before for row in self), ""),
            ("to", *(row.after for row in self), ""),
            ("symmetry", *(row.symmetry or "?" for row in self), ""),
            ("parameters", *self._changes("parameters")),
            ("multiply-adds per position", *self._changes("multiply_adds")),
            ("weight change", *(_cell(row.weight_change) for row in self), ""),
        ]
        lines = _aligned(columns, left=4)
        if self.skipped:
            lines += ["", f"skipped {len(self.skipped)}:"]
            lines += _aligned([*zip(*((_shown(s.name), s.layer, s.reason) for s in self.skipped), strict=True)], left=3)
        return "\n".join(lines)

    def _changes(self, what: str) -> list[str]:
        """'before -> after' of every row and of the total."""
        before = [_cell(getattr(row, f"{what}_before")) for row in (*self, self)]
        after = [_cell(getattr(row, f"{what}_after")) for row in (*self, self)]
        left, right = max(map(len, before)), max(map(len, after))
        return [f"{b:>{left}} -> {a:>{right}}" for b, a in zip(before, after, strict=True)]


def _cell(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _shown(name: str) -> str:
    return name or "(model)"


def _aligned(columns: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a table; the first `left` columns are left-aligned."""
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [cell.ljust(width) if i < left else cell.rjust(width) for cell in column]
        for i, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


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
        conv: symmetry of the convolutions and transposed convolutions: a name ('hv') or a mapping from names to counts
            of output filters or percents (``{'h': '50%', 'd4': 16}``), see `tritonsym.nn.SymmetricConv2d`. Percents
            fit layers of every width.
        linear: True or 'symmetric' replaces square `torch.nn.Linear` layers by `SymmetricLinear`.
        rule: called as ``rule(name, layer)`` for every convolution and linear layer that could be replaced. Returns
            None or False to leave it alone, True to apply `conv` or `linear`, a symmetry as for `conv` ('symmetric' for
            a linear layer), or the module to put there, which is taken as it is, e.g.
            ``TiedConv2d.from_dense(layer, symmetry='hv')``. Without a rule `conv` and `linear` apply to every layer.
        inplace: edit `model` instead of a deep copy. A model that is itself a layer cannot become another one: use the
            returned module either way.
        init: 'project' (nearest symmetric weight in the Frobenius norm), 'keep' (base filters, or the lower triangle,
            keep their values), or 'reset'.
        subclasses: also replace subclasses of the torch layers; what they do beyond the torch layer is lost.
    Returns:
        The model, and a `Report` of replaced layers and of those skipped, with the reason: layers that the symmetry
        does not fit, convolutions whose kernel is 1 along every axis, subclasses, layers not initialised yet, with
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
        if not isinstance(layer, _PLAIN_LAYERS) or isinstance(layer, _SharedConv):
            continue
        is_linear = isinstance(layer, nn.Linear)
        default = ("symmetric" if linear else None) if is_linear else conv
        if rule is None and default is None:
            continue
        new: nn.Module | str | None = _obstacle(layer, parents[id(layer)], owners, subclasses)
        if new is None:
            choice = default if rule is None else rule(name, layer)
            if choice is True:
                choice = default
                if choice is None:
                    missing = "linear=True" if is_linear else "conv='hv'"
                    raise ValueError(f"{where}: rule({name!r}) returned True, but there is no default; pass {missing}")
            new = _build(name, layer, choice, init)
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
        return "its parameters are not initialised yet; run a batch through the model first"
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
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _attached(module: nn.Module) -> str | None:
    """What somebody has attached to this very module and no other module would do."""
    if "forward" in vars(module):
        return "a patched forward"
    hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
    ours = [getattr(hook, "hook", hook) for hook in hooks]
    # torch's weight_norm leaves one, to load old checkpoints
    return "hooks" if any(getattr(hook, "__module__", "") != parametrizations.__name__ for hook in ours) else None


def _build(name: str, layer: Any, choice: Any, init: Init) -> nn.Module | str:
    """The replacement that was chosen for a layer, or why there is none."""
    if choice is None or choice is False or choice is layer:
        return "left alone by the rule"
    if isinstance(choice, nn.Module):
        return choice
    is_linear = isinstance(layer, nn.Linear)
    if is_linear and choice == "symmetric":
        return _fitted(SymmetricLinear, layer, init=init)
    _check_spec(choice, f"replace_layers, layer {name!r}")
    if is_linear:
        return f"{choice!r} is a symmetry of filters; a linear layer knows 'symmetric'"
    if all(size == 1 for size in layer.kernel_size):
        return "its kernel has size 1: the images of a filter are equal to it"
    symmetric = next(new for old, new in _CONVOLUTIONS.items() if isinstance(layer, old))
    new = _fitted(symmetric, layer, init=init, symmetry=choice)
    if isinstance(new, _OrbitConv) and not new.layout.orbits:
        return f"{choice!r} leaves all of its filters free"
    return new


def _fitted(cls: Any, layer: nn.Module, **options: Any) -> nn.Module | str:
    try:
        return cls.from_dense(layer, **options)
    except ValueError as error:
        return str(error)


def _row(name: str, layer: Any, new: nn.Module) -> Replacement:
    symmetry, multiply_adds = None, None
    if isinstance(new, _SharedConv):
        symmetry = str(new.layout if isinstance(new, _OrbitConv) else new.symmetry)
        multiply_adds = new.in_channels * sum(block.filters * block.slots for block in new._blocks())
    elif isinstance(new, SymmetricLinear):
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
    if not isinstance(new, (_SharedConv, SymmetricLinear)):
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
    `TopKPool1d` become a `torch.fx.GraphModule` of torch ops. `Symmetrize` then stacks the re-orderings as they come,
    without bringing them to a canonical order first: its outputs are equal to rounding, and no longer to the bit for
    re-ordered inputs. A layer used in several places stays shared; its hyper-parameters, dtype, device, training flag
    and `requires_grad` are kept. Calls of `tritonsym.functional` in code of your own stay what they are.

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
            f"materialize: {_shown(name)} ({type(module).__name__}) has {has}, which plain layers would lose; "
            "remove it, or replace this layer yourself first"
        )
    if isinstance(module, Symmetrize):
        inner = _materialized(f"{name}.inner".lstrip("."), module.inner, done)
        plain = _traced(_PlainSymmetrize(inner, module.over, module.dim, module.reduce), module)
    elif isinstance(module, GlobalConv1d):
        plain = _traced(_PlainGlobalConv1d(module), module)
    elif isinstance(module, TopKPool1d):
        plain = _traced(_PlainTopKPool1d(module.k), module)
    else:
        plain = module.to_dense().train(module.training)
    done[id(module)] = plain
    return plain


def _traced(plain: nn.Module, module: nn.Module) -> nn.Module:
    """`plain` as a `torch.fx.GraphModule` that needs only torch, in place of `module`; inner modules are called."""

    class Tracer(fx.Tracer):  # local: a pickled GraphModule names its tracer unless that is local
        def is_leaf_module(self, *_: Any) -> bool:
            return True

    plain.training = module.training
    graph = Tracer().trace(plain)
    for node in graph.nodes:
        node.type = None  # annotations are strings here, which a GraphModule cannot pickle
    return fx.GraphModule(plain, graph, type(module).__name__)


class _PlainSymmetrize(nn.Module):
    def __init__(self, inner: nn.Module, over: str | Sequence[Sequence[int]], dim: int, reduce: str) -> None:
        super().__init__()
        self.inner = inner
        self.over = over
        self.dim = dim
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        orders = self.orders(x, x.size(self.dim))  # [G, n]
        images = x.movedim(self.dim, 1)[:, orders].transpose(0, 1)  # [G, B, n, ...]
        y = self.inner(images.flatten(0, 1).movedim(1, self.dim))
        return reference.REDUCTIONS[self.reduce](y.unflatten(0, (orders.size(0), x.size(0))))

    def orders(self, x: Tensor, n: int) -> Tensor:
        """`tritonsym.functional.orders_of` in torch ops, for a size known at run time."""
        if not isinstance(self.over, str):
            torch._assert(n == len(self.over[0]), f"Symmetrize: the axis must have {len(self.over[0])} entries")
            return x.new_tensor(self.over, dtype=torch.long)
        i = x.new_ones(n, dtype=torch.long).cumsum(0) - 1
        if self.over == "flip":
            return torch.stack([i, i.flip(0)])
        if self.over == "swap":
            torch._assert(n % 2 == 0, "Symmetrize: 'swap' exchanges two halves, but the axis has odd size")
            return torch.stack([i, i.roll(n // 2)])
        if self.over == "cyclic":
            return (i[:, None] + i) % n
        torch._assert(n <= 7, "Symmetrize: 7 entries (5040 permutations) are the most")
        orders = i[None]
        for m in range(2, 8):  # every permutation is one product of turns of the first 2, 3, ..., n entries
            turns = 1 + (m - 1) * torch.sym_min(torch.sym_max(n - m + 1, 0), 1)  # m, or 1 if m > n
            turn = x.new_ones(turns, dtype=torch.long).cumsum(0) - 1
            orders = torch.where(i < m, (i + turn[:, None]) % m, i)[:, orders].flatten(0, 1)
        return orders


class _PlainGlobalConv1d(nn.Module):
    center: nn.Parameter
    surround: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: GlobalConv1d) -> None:
        super().__init__()
        for name in ("center", "surround", "bias"):
            value = getattr(layer, name)
            copied = None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
            self.register_parameter(name, copied)
        self.activation = layer.activation

    def forward(self, x: Any) -> Any:
        y = (self.center - self.surround) @ x
        # of the dtype at run time: a node of its own, as torch's function cannot be traced
        wide = x.tracer.create_proxy("call_function", torch.promote_types, (y.dtype, torch.float32), {})
        return reference.add_all_positions(y, x, self.surround, self.bias, self.activation, wide)


class _PlainTopKPool1d(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return reference.topk_pool1d(x, self.k)


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
        f"{path}.bias" if path else "bias": layer.layout
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, _OrbitConv) and layer.share_bias and layer.bias is not None
    }
    converted = copy.copy(state_dict)  # a plain dict would lose the versions that a state_dict carries
    for key, own in expected.items():
        if not isinstance(own, Tensor):
            continue
        value, layout = state_dict[key], sharing.get(key)
        shape = tuple(own.shape) if layout is None else (layout.out_channels,)
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if got != shape:
            raise ValueError(
                f"{where}: {key} must have shape {shape}, got {got}; "
                "build the layer with the sizes and the symmetry of the checkpoint"
            )
        if layout is not None:
            converted[key] = _shared_bias(key, value, layout)  # type: ignore[index]
    module.load_state_dict(converted)


def _shared_bias(key: str, bias: Tensor, layout: FilterLayout) -> Tensor:
    """One value per stored filter of a bias per output channel."""
    stored = bias.unflatten(0, (layout.groups, -1))[:, : layout.stored_per_group].flatten()
    differs = reference.expand_bias(stored, layout) != bias
    if differs.any():
        channel = int(differs.int().argmax())
        raise ValueError(
            f"load_cnn_symmetry: {key} differs within an orbit: channel {channel} has {bias[channel].item():.6g}, its "
            f"base filter {reference.expand_bias(stored, layout)[channel].item():.6g}; the package does not share the "
            "bias, even with share_bias=True: build the layer with share_bias=False"
        )
    return stored

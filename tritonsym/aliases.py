"""Where else than in `_modules` a model holds a layer: containers, methods, closures; and who reads its weight."""

from __future__ import annotations

import dis
import gc
import inspect
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

#: Methods of a layer that its replacement answers to in the same way.
_CALLS = ("forward", "_wrapped_call_impl", "_call_impl")
_OPAQUE = (type, ModuleType, Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)
_MAPPINGS = (dict, OrderedDict, defaultdict)
#: What `vars` of every module holds, and what belongs to `torch.compile`, which makes it anew.
_OWN = {"_modules", "_parameters", "_buffers", "_compiled_call_impl", "dynamo_ctx"}


class Reference(NamedTuple):
    """A place that holds a module: whether `repoint` can change it, and whether a function holds it, of which
    ``copy.deepcopy`` makes no copy."""

    module: nn.Module
    place: str
    is_certain: bool
    in_function: bool


def attached(module: nn.Module) -> str | None:
    """What somebody has attached to this very module and no other module would do."""
    if "forward" in vars(module):
        return "a patched forward"
    hooks = [hook for kind, held in vars(module).items() if kind.endswith("_hooks") for hook in held.values()]
    ours = [getattr(hook, "hook", hook) for hook in hooks]
    # torch's weight_norm leaves one, to load old checkpoints
    return "hooks" if any(getattr(hook, "__module__", "") != parametrizations.__name__ for hook in ours) else None


def is_compiled(module: nn.Module) -> bool:
    """Whether this is what `torch.compile` made of a module."""
    return type(module).__name__ == "OptimizedModule"


def references(model: nn.Module) -> Iterator[Reference]:
    """All places besides `_modules` where a model holds modules."""
    seen = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        yield from _inside(module, path, seen)


def _inside(module: nn.Module, path: str, seen: set[int]) -> Iterator[Reference]:
    if is_compiled(module):
        for child in module.children():
            yield Reference(child, f"{path or '(model)'} (made by torch.compile)", False, False)
        return
    for key, value in vars(module).items():
        if key not in _OWN:
            yield from _walk(value, f"{path}.{key}".lstrip("."), True, False, seen)


def _walk(value: Any, place: str, certain: bool, function: bool, seen: set[int]) -> Iterator[Reference]:
    """Every module that is reached from a value; those that the model does not know are looked into."""
    if isinstance(value, _OPAQUE):
        return
    if isinstance(value, nn.Module):
        yield Reference(value, place, certain, function)
        if id(value) not in seen:
            seen.add(id(value))
            for name, module in value.named_modules(prefix=place):
                if module is not value:
                    yield Reference(module, name, True, function)
                seen.add(id(module))
                yield from _inside(module, name, seen)
        return
    if isinstance(value, MethodType):
        name = value.__name__
        yield from _walk(value.__self__, f"{place} (the method {name!r})", certain and name in _CALLS, function, seen)
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    kind = type(value)
    if isinstance(value, (list, tuple, deque)):
        certain = certain and (kind in (list, tuple) or hasattr(value, "_fields"))
        for i, item in enumerate(value):
            yield from _walk(item, f"{place}[{i}]", certain, function, seen)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(key, f"a key of {place}", False, function, seen)
            yield from _walk(item, f"{place}[{key!r}]", certain and kind in _MAPPINGS, function, seen)
    elif isinstance(value, (set, frozenset)):
        for item in value:
            yield from _walk(item, place, False, function, seen)
    elif kind is partial:
        for item in (value.func, value.args, value.keywords):
            yield from _walk(item, place, certain, function, seen)
    elif kind is weakref.ReferenceType:
        yield from _walk(value(), place, False, function, seen)
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        for item in (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield from _walk(item, f"{place} (a function)", False, True, seen)
    elif isinstance(getattr(value, "__dict__", None), dict):
        for key, item in vars(value).items():
            yield from _walk(item, f"{place}.{key}", False, function, seen)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def repoint(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put the replacement of every module, by its id, into all the places where the module stands for certain."""
    found = {id(r.module): r.module for r in references(model)}
    for module in {**found, **{id(m): m for m in model.modules()}}.values():
        if id(module) not in new:
            for key, value in vars(module).items():
                if key == "_modules" or key not in _OWN:
                    vars(module)[key] = _repointed(value, new, set())
    return new.get(id(model), model)


def _repointed(value: Any, new: Mapping[int, nn.Module], seen: set[int]) -> Any:
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if isinstance(value, MethodType):
        owner = new.get(id(value.__self__))
        return value if owner is None else getattr(owner, value.__name__)
    if id(value) in seen:
        return value
    seen = {*seen, id(value)}
    if type(value) is list:
        value[:] = [_repointed(item, new, seen) for item in value]
    elif type(value) in _MAPPINGS:
        for key, item in value.items():
            value[key] = _repointed(item, new, seen)
    elif isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_fields")):
        items = [_repointed(item, new, seen) for item in value]
        if any(now is not then for now, then in zip(items, value, strict=True)):
            return tuple(items) if type(value) is tuple else value._make(items)  # type: ignore[attr-defined]
    elif type(value) is partial:
        function, args = _repointed(value.func, new, seen), _repointed(value.args, new, seen)
        keywords = {key: _repointed(item, new, seen) for key, item in value.keywords.items()}
        return partial(function, *args, **keywords)
    return value


# --- weights that are read --------------------------------------------------------------------------------------------


def weight_readers(model: nn.Module) -> dict[int, str]:
    """By id of a module: who reads its weight or bias in `forward`, as far as the code shows it."""
    readers: dict[int, str] = {}
    for module in reversed(list(model.modules())):  # the nearest first
        for chain in _chains(module):
            target: Any = module
            for name in chain:
                target = target._modules.get(name) if isinstance(target, nn.Module) else None
            if isinstance(target, nn.Module):
                readers.setdefault(id(target), type(module).__name__)
    return readers


def _chains(module: nn.Module) -> Iterator[tuple[str, ...]]:
    """('block', 'conv') where a module's forward reads ``self.block.conv.weight``."""
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if node.op == "get_attr":
                yield tuple(str(node.target).split(".")[:-1])
        return
    todo, done = ["forward"], set()
    while todo:
        name = todo.pop()
        code = getattr(inspect.unwrap(getattr(module, name)), "__code__", None)
        if code is None or code in done:
            continue
        done.add(code)
        chains, called = _reads(code)
        yield from chains
        todo += [name for name in called if not hasattr(nn.Module, name) and hasattr(type(module), name)]


@lru_cache(maxsize=4096)
def _reads(code: CodeType) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The chains of attributes of self whose weight or bias is read, and the attributes of self that stand alone."""
    found: set[tuple[str, ...]] = set()
    alone: set[str] = set()
    for part in (code, *(c for c in code.co_consts if isinstance(c, CodeType))):
        chain: list[str] | None = None
        instructions = [i for i in dis.get_instructions(part) if i.opname != "CACHE"]
        for i, after in zip(instructions, [*instructions[1:], None], strict=True):
            if i.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
                last = i.argval[-1] if isinstance(i.argval, tuple) else i.argval
                chain = [] if last == "self" else None
            elif i.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and chain is not None:
                looked_at = after is not None and after.argval in ("dtype", "device", "requires_grad", "is_cuda")
                if i.argval in ("weight", "bias") and chain and not looked_at:
                    found.add(tuple(chain))
                elif not chain:
                    alone.add(i.argval)
                chain.append(i.argval)
            else:
                chain = None
    return tuple(sorted(found)), tuple(sorted(alone))


# --- parameters that are gone -----------------------------------------------------------------------------------------


def warn_of_optimizers(where: str, gone: Iterable[Tensor]) -> None:
    """Say so if an optimizer holds parameters that a model no longer has."""
    old = {id(parameter) for parameter in gone}
    for item in gc.get_objects():
        if issubclass(type(item), Optimizer):
            groups = getattr(item, "param_groups", ())
            held = sum(id(parameter) in old for group in groups for parameter in group["params"])
            if held:
                warnings.warn(
                    f"{where}: the parameters are new, but a {type(item).__name__} holds {held} of the old ones and "
                    "would go on changing those; make the optimizer after the conversion",
                    stacklevel=4,
                )

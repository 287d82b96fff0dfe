"""Which path computes a layer: one pure function of the problem, and the switches that override it.

Paths: ``reference`` (expand the weight with torch ops, call the torch convolution or matmul; every device and dtype),
``expand`` and ``shift`` (kernels that never build the expanded weight). This version has the reference path only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

BACKENDS = ("auto", "reference", "triton")
PATHS = ("reference", "expand", "shift")

_backend: ContextVar[str | None] = ContextVar("tritonsym_backend", default=None)
_path: ContextVar[str | None] = ContextVar("tritonsym_path", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block use only the 'reference', only 'triton' kernels, or choose ('auto', the default).

    The environment variable TRITONSYM_BACKEND sets the same outside of any block. A function that `torch.compile` or
    `torch.export` has traced keeps the choice in force when it was traced.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def path(name: str) -> Iterator[None]:
    """Within the block force one path, 'reference', 'expand' or 'shift', for tests and benchmarks."""
    if name not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(map(repr, PATHS))}, got {name!r}")
    token = _path.set(name)
    try:
        yield
    finally:
        _path.reset(token)


def current_backend() -> str:
    """The backend in force: of the innermost `backend` block, else of TRITONSYM_BACKEND, else 'auto'."""
    name = _backend.get() or os.environ.get("TRITONSYM_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"TRITONSYM_BACKEND={name!r}: expected one of {', '.join(BACKENDS)}")
    return name


def require_reference() -> None:
    """Raise unless the switches allow the reference path, the only one this version has."""
    if _path.get() in (None, "reference") and current_backend() != "triton":
        return
    asked = f"path {_path.get()!r}" if _path.get() not in (None, "reference") else "backend 'triton'"
    raise NotImplementedError(f"{asked} is forced, but this version has only the reference path; remove the switch")


@dataclass(frozen=True)
class Problem:
    """What `plan` decides on. Multiply-adds are those of the whole layer on the whole batch."""

    layer: str
    target: str  # 'cpu', 'cuda', or an architecture such as 'sm_90'
    dtype: str
    dense: int  # multiply-adds of the dense layer it replaces
    expanded: int  # multiply-adds of the reference path
    stored: int  # one multiply-add per stored weight and position: what the shift path needs


@dataclass(frozen=True)
class Plan:
    """How a layer will be computed; `str` is the plan in words."""

    problem: Problem
    path: str
    flops: int
    dense_flops: int
    why: str
    tile: None = None

    def __str__(self) -> str:
        p = self.problem
        ratio = f", {self.dense_flops / self.flops:.3g}x fewer than" if 0 < self.flops < self.dense_flops else ", as in"
        return (
            f"{p.layer} ({p.dtype} on {p.target}): {self.path} path, {self.flops:,} FLOPs{ratio} "
            f"the dense layer ({self.dense_flops:,}). {self.why}"
        )


def plan(problem: Problem) -> Plan:
    """Choose the path. Pure but for the switches `backend`, `path` and TRITONSYM_BACKEND."""
    require_reference()
    why = (
        "The only path of this version: the stored weight is expanded and the torch op does the rest. "
        f"Stored weights x positions would be {2 * problem.stored:,} FLOPs."
    )
    return Plan(problem, "reference", 2 * problem.expanded, 2 * problem.dense, why)


def explain(module: nn.Module, x: Tensor, target: str | None = None) -> Plan:
    """The plan for one tritonsym layer on one input; ``print(explain(layer, x))`` says it in words.

    Args:
        module: a layer of `tritonsym.nn` with weights.
        x: an input; only its shape, dtype and device matter, so a meta tensor will do.
        target: plan for another device: 'cpu', 'cuda' or an architecture that is not there, such as 'sm_90'.
    Raises:
        TypeError: the module is not such a layer.
        ValueError: x does not fit the layer, or the target is unknown.
    """
    if not hasattr(module, "multiply_adds"):
        raise TypeError(
            f"explain: expected a layer of tritonsym.nn with weights, got {type(module).__name__}; "
            "for a whole model call explain on its layers"
        )
    if target is not None and target not in ("cpu", "cuda") and not target.startswith(("sm_", "gfx")):
        raise ValueError(f"explain: target must be 'cpu', 'cuda', 'sm_..' or 'gfx..', got {target!r}")
    where = target or ("cpu" if x.device.type == "meta" else x.device.type)
    dtype = str(x.dtype).removeprefix("torch.")
    return plan(Problem(type(module).__name__, where, dtype, *module.multiply_adds(tuple(x.shape))))

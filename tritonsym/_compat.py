"""The few private names of torch that have no public equivalent, all of them seen in torch 2.11 and 2.13.

If one is missing, something small is lost, and `import tritonsym` still works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.autograd.forward_ad as fwAD
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.conv import _ConvNd as ConvNd
else:
    #: The base class of torch's batch normalisations.
    BatchNorm = getattr(nn.modules.batchnorm, "_BatchNorm", nn.BatchNorm1d.__mro__[1])
    #: The base class of torch's convolutions.
    ConvNd = getattr(nn.modules.conv, "_ConvNd", nn.Conv1d.__mro__[1])


def constant(function: Function) -> Function:
    """Let Dynamo call this function of plain values instead of tracing it.

    The same as `torch.compiler.assume_constant_result`, which would import all of Dynamo. If Dynamo ignores the mark,
    it traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which Dynamo of torch 2.11 takes to be true while it compiles."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


@constant
def is_exporting_onnx() -> bool:
    """`torch.onnx.is_in_onnx_export`, without importing `torch.onnx`."""
    onnx = getattr(torch, "onnx", None)
    return bool(onnx is not None and onnx.is_in_onnx_export())


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 matrix instructions, or torch cannot tell."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is None or bool(supported())


def transforms_are_active() -> bool:
    """Whether `torch.func` transforms, or forward-mode differentiation, are active."""
    return bool(_transforms()) or getattr(fwAD, "_current_level", -1) >= 0


def is_mapped(gradient: torch.Tensor) -> bool:
    """Whether ``is_grads_batched`` maps the backward pass over this gradient, as for Jacobians."""
    return _batched is not None and torch._C._dispatch_keys(gradient).has(_batched)


_batched: Any = None
if hasattr(torch._C, "_dispatch_keys") and hasattr(torch._C, "_parse_dispatch_key"):
    _batched = torch._C._parse_dispatch_key("Batched")
_transforms: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
#: An assertion that `torch.fx` keeps in a graph.
assert_at_run_time: Any = getattr(torch, "_assert", lambda condition, message: None)

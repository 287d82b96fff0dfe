"""What a layer remembers from one call to the next, so that small layers cost little more than their convolution.

The plan of a convolution, for a call with equal arguments; and on the CPU, for inference, its expanded weight.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from tritonsym import convolution, dispatch, reference
from tritonsym.dispatch import needs_gradient
from tritonsym.shift import Conv, is_compiling, is_last
from tritonsym.symmetry import FilterLayout

Function = TypeVar("Function", bound=Callable[..., Any])

#: Dtypes of the rows that PyTorch's kernels add up well, by the type of the device.
_GATHERED: dict[str, tuple[torch.dtype, ...]] = defaultdict(
    tuple,
    cpu=(torch.float32, torch.float64),
    cuda=(torch.float32, torch.float64, torch.float16, torch.bfloat16),
)


_transforms, _traces = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def is_eager() -> bool:
    """Whether tensors are what they seem: nothing compiles, traces, transforms or intercepts."""
    intercepted = _transforms() or _modes() or _function_modes() or _traces() or fwAD._current_level >= 0
    return not (intercepted or is_compiling())


def constant(function: Function) -> Function:
    """Let Dynamo call this function instead of tracing it: what `torch.compiler.assume_constant_result` does.

    (Which would import all of Dynamo to do so.) The arguments must be plain values.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Call:
    """A convolution as planned: act(conv(x) + bias) of prepared weights."""

    layer: str
    conv: Conv
    plan: dispatch.Plan
    activation: str | None
    shape: torch.Size  # of x
    last: bool  # whether x is channels-last, to torch too
    dtype: torch.dtype  # to compute in
    gathers: bool  # whether the reference's weight can be gathered from rows
    keeps: bool  # whether that weight is kept
    packs: bool  # whether it is kept as oneDNN wants it
    prepare: partial[Tensor] | None = None  # the weights
    shared: FilterLayout | None = None  # where a bias may be shared by the images of a filter

    @property
    def runs(self) -> bool:
        """Whether it can run as planned, or the plain reference has to."""
        return self.plan.path != "reference" or self.gathers

    def run(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if self.shared is not None:
            bias = reference.full_bias(bias, self.shared)
        if self.plan.path != "reference":
            rows = convolution.stored_rows(self.conv, *self._prepared(weights))
            return convolution.conv(x, rows, bias, self.conv, self.plan, self.activation)
        dense = _recall(self.what, self._make, weights) if self.keeps else self._expand(weights)
        return reference.activate(convolution.dense_conv(x, dense, bias, self.conv), self.activation)

    @cached_property
    def what(self) -> tuple[Any, ...]:
        """What the expanded weight depends on beside the stored one."""
        return self.layer, self.conv, self.last, self.dtype, self.packs, self.prepare and self.prepare.keywords

    def _prepared(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        return weights if self.prepare is None else [self.prepare(w) for w in weights]

    def _expand(self, weights: Sequence[Tensor]) -> Tensor:
        return convolution.expand(self.conv, self.last, *[w.to(self.dtype) for w in self._prepared(weights)])

    def _make(self, weights: Sequence[Tensor]) -> Tensor:
        dense = self._expand(weights)
        return convolution.pack(dense, self.conv, self.shape) if self.packs else dense


class _ByTensor(dict[int, Any]):
    """Values by the identity of a tensor, while it lives."""

    def find(self, t: Tensor) -> Any:
        owner, value = self.get(id(t), (None, None))
        return value if owner is not None and owner() is t else None

    def remember(self, t: Tensor, value: Any) -> None:
        key = id(t)
        self[key] = weakref.ref(t, lambda _: self.pop(key, None)), value

    def forget(self, t: Tensor) -> None:
        self.pop(id(t), None)


class _Latest(threading.local):
    """The call planned last in this thread."""

    call: Call | None = None


_latest = _Latest()
_calls = _ByTensor()  # by the first weight: key and call
_kept = _ByTensor()  # by the first weight: what of it, all stored values, dense weight


def plan(layer: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, conv: Conv, **options: Any) -> Call:
    """The call act(conv(x) + bias) as planned now."""
    dtype = dispatch.computing_dtype(x)
    chosen = dispatch.conv_plan(
        layer,
        x.device.type,
        str(dtype).removeprefix("torch."),
        x.shape[0],
        x.shape[1] // conv.groups,
        tuple(x.shape[2:]),
        conv,
        1,
        needs_gradient(x, bias, *weights),
        is_compiling(),
        is_last(x),
    )
    are_plain = all(type(t) in (Tensor, Parameter) for t in (x, *weights))
    gathers = are_plain and is_eager() and dtype in _GATHERED[x.device.type]
    keeps = gathers and chosen.path == "reference" and _keeps(weights)
    if not keeps:
        _kept.forget(weights[0])
    packs = keeps and not needs_gradient(x, bias) and convolution.can_pack(x, conv)
    call = Call(
        layer,
        conv,
        chosen,
        shape=x.shape,
        last=is_last(x) and _is_last_to_torch(x),
        dtype=dtype,
        gathers=gathers,
        keeps=keeps,
        packs=packs,
        **options,
    )
    _latest.call = call if call.runs else None
    return call


def _is_last_to_torch(x: Tensor) -> bool:
    """Whether torch's convolutions take x for channels-last. With any other x and a channels-last weight, those of
    float64 in groups may give a wrong gradient (torch 2.13)."""
    order = (1, *reversed(range(2, x.ndim)), 0)  # from the innermost axis
    return all(x.stride(b) >= x.stride(a) * x.shape[a] for a, b in pairwise(order))


def repeating(function: Function) -> Function:
    """Let a function of (where, x, stored weights, bias, options...) repeat its last call for its first weight, if that
    had equal arguments, without checking and planning anew."""

    @wraps(function)
    def call(where: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, *options: Any) -> Tensor:
        are_plain = type(x) is Tensor and type(weights[0]) is type(weights[-1]) is Parameter  # one or two weights
        if is_dynamo_compiling() or not are_plain:
            return function(where, x, weights, bias, *options)
        # all that checks and plans look at, asked for in few steps: behind a convolution their code is cold
        key = (
            *(function, options, _form(x), x.stride(), _form(bias) if isinstance(bias, Tensor) else bias),
            *map(_form, weights),
            *(_has_gradients(), _threads(), _backend(), _path(), _autocasts() and dispatch.computing_dtype(x)),
            *(_transforms(), _modes(), _function_modes(), _traces(), fwAD._current_level),
            *(_onednn_is_enabled(), dispatch.generation),
        )
        known = _calls.find(weights[0])
        try:
            is_known = known is not None and known[0] == key
        except (ValueError, RuntimeError):  # an array or a tensor among the options
            is_known = False
        if is_known:
            stored = weights if len(weights) == 1 else [w for w in weights if w.shape[0]] or weights[:1]
            return known[1].run(x, stored, bias)
        _latest.call = None
        y = function(where, x, weights, bias, *options)
        latest = _latest.call
        # x as it was (not padded, with a batch), and no arguments that may change while they are remembered
        is_fixed = not any(isinstance(option, list) for option in options)
        if latest is not None and latest.shape == x.shape and is_fixed and is_eager():
            _calls.remember(weights[0], (key, latest))
        return y

    return call  # type: ignore[return-value]


_form = attrgetter("shape", "dtype", "device", "requires_grad")
_has_gradients, _threads, _autocasts = torch.is_grad_enabled, torch.get_num_threads, torch._C._is_any_autocast_enabled
_backend, _path = dispatch._backend.get, dispatch._path.get
_onednn_is_enabled = torch._C._get_mkldnn_enabled


def forget(*tensors: Tensor) -> None:
    """Forget all that is remembered of these tensors: `torch.utils.swap_tensors` takes none with weak references."""
    for t in tensors:
        _calls.forget(t)
        _kept.forget(t)


def kept(what: object, make: Callable[[Sequence[Tensor]], Tensor], *weights: Tensor) -> Tensor | None:
    """make(weights), kept for inference on the CPU; None where it is not kept.

    It is used again only while the stored values are bitwise those it was made of, which costs a fraction of making it
    again: no change of the parameters, however it comes about, can be missed. Training drops it, unless compiled.
    """
    if _keeps(weights) and is_eager():
        return _recall(what, make, weights)
    _kept.forget(weights[0])
    return None


def _keeps(weights: Sequence[Tensor]) -> bool:
    """Whether what is made of these weights may be kept."""
    weight = weights[0]
    is_there = type(weight) is Parameter and weight.device.type == "cpu"
    return is_there and not needs_gradient(*weights) and not weight.is_inference()


def _recall(what: object, make: Callable[[Sequence[Tensor]], Tensor], weights: Sequence[Tensor]) -> Tensor:
    known, values, made = _kept.find(weights[0]) or (None, (), weights[0])
    if known != what or not all(map(_Values.are_in, values, weights)):
        with torch.inference_mode(False), torch.no_grad():
            there = [w.detach().as_strided(w.shape, w.stride()) for w in weights]  # raises if their memory was freed
            copies = [w.clone() for w in there]  # another thread may write to the weights at any time
            made = make(copies)
            pairs = [*zip(copies, weights, strict=True)]
            if all(copy.stride() == w.stride() for copy, w in pairs):  # neither gaps nor overlaps
                _kept.remember(weights[0], (what, [_Values(*pair) for pair in pairs], made))
    return made


class _Values:
    """The values of a tensor on the CPU, to be compared by their bits: `copy` has the same strides as `t`."""

    def __init__(self, copy: Tensor, t: Tensor) -> None:
        self.form, self.end = self._form(t), t.storage_offset() * t.itemsize + copy.nbytes
        self.copy, self.memory = bytearray(_memory(copy)), _memory(t)

    def are_in(self, t: Tensor) -> bool:
        if self._form(t) != self.form or t.untyped_storage().nbytes() < self.end:  # it may have been freed
            return False
        return self.copy == self.memory  # by memcmp, which takes longer to call through ctypes

    @staticmethod
    def _form(t: Tensor) -> tuple[Any, ...]:
        return t.data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype, t.is_neg(), t.is_conj()


def _memory(t: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a tensor without gaps, which is not kept alive."""
    return (ctypes.c_char * t.nbytes).from_address(t.data_ptr())

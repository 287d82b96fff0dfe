"""The `torch.library` ops behind every layer: ``torch.ops.tritonsym.*``.

One op per layer. Each is composite: its body is made of torch ops (the reference) or, where `dispatch` chooses a
kernel, of opaque kernel ops. Autograd of every order, `torch.func` transforms (grad, vmap, jvp), fake tensors,
complex dtypes, `torch.compile` and `torch.export` therefore follow from the body, and Inductor sees and fuses it.
Ops take batched inputs and checked arguments; the public functions are in `tritonsym.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from tritonsym import convolution, dispatch, reference, symm
from tritonsym.dispatch import needs_gradient
from tritonsym.shift import Conv, Geometry
from tritonsym.symmetry import FilterLayout, Symmetry, tap_orbits, tied_blocks

_library = torch.library.Library("tritonsym", "DEF")


def _op(schema: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Define a composite op; the decorated function is its body."""

    def define(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, body, "CompositeImplicitAutograd")
        # the same body under vmap: without it functorch runs a composite op sample by sample
        _library.impl(name, body, "FuncTorchBatchedDecomposition")
        return getattr(torch.ops.tritonsym, name)

    return define


_layout = cache(FilterLayout.from_string)
_conv = lru_cache(maxsize=4096)(Conv)  # one object of equal ones: it keeps its text and table


def _takes_reference(*tensors: Tensor | None) -> bool:
    """Whether no plan can be made: sizes are symbolic, or transforms are at work that an autograd.Function inside a
    composite op would stop."""
    is_symbolic = any(isinstance(size, torch.SymInt) for t in tensors if t is not None for size in t.shape)
    return is_symbolic or torch._C._are_functorch_transforms_active() or fwAD._current_level >= 0


def _plan(layer: str, tensors: Sequence[Tensor | None], conv: Conv) -> dispatch.Plan | None:
    """The plan for this convolution, or None for the reference."""
    x = tensors[0]
    assert x is not None
    if _takes_reference(x):
        return None
    problem = dispatch.conv_problem(
        layer,
        x.device.type,
        dispatch.dtype_name(x),
        x.shape[0],
        x.shape[1] // conv.groups,
        tuple(x.shape[2:]),
        conv,
        training=dispatch.needs_gradient(*tensors),
    )
    plan = dispatch.plan(problem)
    return None if plan.path == "reference" else plan


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> (what of it, stored values, dense weight)


def _dense(what: object, make: Callable[[], Tensor], *weights: Tensor | None) -> Tensor | None:
    """The expanded weight, kept for inference on the CPU; None where it is not kept.

    It is used again only while the stored values are bitwise those it was made of, which costs a fraction of expanding
    them: no change of the parameters, however it comes about, can be missed. Training drops it.
    """
    weight = weights[0]
    stored = [w for w in weights if w is not None]
    if not isinstance(weight, Parameter) or weight.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if needs_gradient(*stored) or weight.is_inference() or torch._C._are_functorch_transforms_active():
        _kept.pop(weight, None)
        return None
    known, values, dense = _kept.get(weight, (None, [], None))
    if known != what or not all(map(_same, stored, values)):
        with torch.inference_mode(False), torch.no_grad():
            dense = make()
            _kept[weight] = (what, [w.detach().clone() for w in stored], dense)
    return dense


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _geometry(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None = None,
) -> Geometry:
    kernel, strides, pads, dilations = (tuple(map(int, sizes)) for sizes in (kernel_size, stride, padding, dilation))
    if output_padding is None:
        return Geometry(kernel, strides, pads, dilations)
    return Geometry(kernel, strides, pads, dilations, True, tuple(map(int, output_padding)))


@_op(
    "symmetric_conv(Tensor x, Tensor weight, Tensor? bias, str layout, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, int groups, str? activation=None) -> Tensor"
)
def symmetric_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    filters = _layout(layout, groups)
    geometry = _geometry(weight.shape[2:], stride, padding, dilation)
    conv = _conv(filters.blocks(geometry.kernel_size), groups, geometry)
    if plan := _plan("SymmetricConv", (x, weight, bias), conv):
        rows = convolution.orbit_rows(weight, filters, conv.blocks, False)
        return convolution.conv(x, rows, reference.full_bias(bias, filters), conv, plan, activation)
    dense = _dense(filters, lambda: reference.expand_orbits(weight, filters), weight)
    return reference.symmetric_conv(x, weight, bias, filters, stride, padding, dilation, activation, dense)


@_op(
    "symmetric_conv_transpose(Tensor x, Tensor weight, Tensor? bias, str layout, SymInt[] stride, SymInt[] padding, "
    "SymInt[] output_padding, SymInt[] dilation, int groups, str? activation=None) -> Tensor"
)
def symmetric_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    filters = _layout(layout, groups)
    geometry = _geometry(weight.shape[2:], stride, padding, dilation, output_padding)
    conv = _conv(filters.blocks(geometry.kernel_size), groups, geometry)
    if plan := _plan("SymmetricConvTranspose", (x, weight, bias), conv):
        rows = convolution.orbit_rows(weight, filters, conv.blocks, True)
        return convolution.conv(x, rows, reference.full_bias(bias, filters), conv, plan, activation)
    dense = _dense(filters, lambda: reference.expand_orbits(weight, filters, transposed=True), weight)
    return reference.symmetric_conv_transpose(
        x, weight, bias, filters, stride, padding, output_padding, dilation, activation, dense
    )


@_op(
    "tied_conv(Tensor x, Tensor weight, Tensor? free_weight, Tensor? bias, str symmetry, str odd, int[] kernel_size, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, int groups, str? activation=None) -> Tensor"
)
def tied_conv(
    x: Tensor,
    weight: Tensor,
    free_weight: Tensor | None,
    bias: Tensor | None,
    symmetry: str,
    odd: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    orbits = tap_orbits(Symmetry(symmetry), tuple(map(int, kernel_size)), odd)
    geometry = _geometry(kernel_size, stride, padding, dilation)
    blocks = tied_blocks(
        orbits, int(weight.shape[0]) // groups, 0 if free_weight is None else int(free_weight.shape[0]) // groups
    )
    conv = _conv(blocks, groups, geometry)
    if plan := _plan("TiedConv", (x, weight, free_weight, bias), conv):
        rows = convolution.tied_rows(weight, free_weight, groups)
        return convolution.conv(x, rows, bias, conv, plan, activation)

    def expand() -> Tensor:
        return reference.beside_free(reference.expand_ties(weight, orbits, geometry.kernel_size), free_weight, groups)

    dense = _dense((orbits, groups), expand, weight, free_weight)
    return reference.tied_conv(
        x, weight, free_weight, bias, orbits, geometry.kernel_size, stride, padding, dilation, groups, activation, dense
    )


@_op(
    "orbit_pool_conv(Tensor x, Tensor weight, Tensor? bias, str symmetry, str reduce, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, int groups, str? activation=None) -> Tensor"
)
def orbit_pool_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symmetry: str,
    reduce: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
) -> Tensor:
    group = Symmetry(symmetry)
    geometry = _geometry(weight.shape[2:], stride, padding, dilation)
    filters = int(weight.shape[0]) // groups
    if reduce in ("sum", "mean"):
        conv = _conv(tied_blocks(tap_orbits(group, geometry.kernel_size), filters, 0), groups, geometry)
        if plan := _plan("OrbitPoolConv", (x, weight, bias), conv):
            rows = convolution.tied_rows(reference.orbit_mean(weight, group, reduce), None, groups)
            return convolution.conv(x, rows, bias, conv, plan, activation)
    else:
        layout = FilterLayout(((group, filters),), 0, groups)
        conv = _conv(layout.blocks(geometry.kernel_size), groups, geometry, reduce)
        if plan := _plan("OrbitPoolConv", (x, weight, bias), conv):
            rows = convolution.orbit_rows(weight, layout, conv.blocks, False)
            return convolution.conv(x, rows, bias, conv, plan, activation)
    dense = _dense((group, reduce), lambda: reference.expand_pool(weight, group, reduce), weight)
    return reference.orbit_pool_conv(
        x, weight, bias, group, reduce, stride, padding, dilation, groups, activation, dense
    )


def _cast(t: Tensor) -> Tensor:
    """As torch.autocast does."""
    return t.to(dispatch.computing_dtype(t))


@_op("symmetric_linear(Tensor x, Tensor packed, Tensor? bias, str? activation=None, bool never_unpack=False) -> Tensor")
def symmetric_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None = None, never_unpack: bool = False
) -> Tensor:
    if not _takes_reference(x, packed):
        training = needs_gradient(x, packed, bias)
        dtype = dispatch.dtype_name(x)
        plan = dispatch.plan(dispatch.linear_problem(x.shape, x.device.type, dtype, never_unpack, training))
        if plan.tiles:
            fused = None if training else activation
            y = symm.linear(_cast(x), _cast(packed), None if bias is None else _cast(bias), fused, *plan.tiles)
            return y if fused else reference.activate(y, activation)
    elif never_unpack:
        raise dispatch.cannot_stay_packed("symbolic sizes or torch.func transforms")
    dense = _dense("unpacked", lambda: reference.unpack(packed), packed)
    return reference.symmetric_linear(x, packed, bias, activation, dense)


@_op("gram(Tensor x, Tensor? a, float alpha, float beta) -> Tensor")
def gram(x: Tensor, a: Tensor | None, alpha: float, beta: float) -> Tensor:
    if not _takes_reference(x, a):
        plan = dispatch.plan(dispatch.gram_problem(x.shape, x.device.type, dispatch.dtype_name(x)))
        if plan.tiles:
            return symm.gram(_cast(x), None if a is None else _cast(a), alpha, beta, *plan.tiles)
    return reference.gram(x, a, alpha, beta)


global_conv1d = _op(
    "global_conv1d(Tensor x, Tensor center, Tensor surround, Tensor? bias, str? activation=None) -> Tensor"
)(reference.global_conv1d)
topk_pool1d = _op("topk_pool1d(Tensor x, int k) -> Tensor")(reference.topk_pool1d)


reorder = _op("reorder(Tensor x, Tensor orders, int dim) -> Tensor")(reference.reorder)
reduce_orders = _op("reduce_orders(Tensor y, int count, str reduce) -> Tensor")(reference.reduce_orders)

"""Random layers against the dense torch layer, in float64: outputs and every gradient.

The dense weight is expanded here by definition: numpy makes the images of an array that holds the index of every
stored weight. The package's own algebra takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tritonsym
import tritonsym.nn as tnn

EACH = 100, 400  # random layers of every family: quick, slow
LAYERS = {
    "SymmetricConv": "Conv",
    "SymmetricConvTranspose": "ConvTranspose",
    "TiedConv": "Conv",
    "OrbitPoolConv": "Conv",
}
AXIS = {"h": -1, "v": -2, "z": -3}
# symmetries in the order of base filters, images in the order of output filters
IMAGES = {
    "h": ["h"],
    "v": ["v"],
    "z": ["z"],
    "hv": ["h", "v", "hv"],
    "hz": ["h", "z", "hz"],
    "vz": ["v", "z", "vz"],
    "hvz": ["h", "v", "z", "vz", "hz", "hv", "hvz"],
    "c2": ["r180"],
    "c4": ["r90", "r180", "r270"],
    "d4": ["r90", "r180", "r270", "h", "h r90", "h r180", "h r270"],
}
ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


# --- the definition ---------------------------------------------------------------------------------------------------


def image(array: np.ndarray, element: str) -> np.ndarray:
    """The element's factors, read right to left, applied to the last axes of an array."""
    for factor in reversed(element.split()):
        if factor.startswith("r"):
            array = np.rot90(array, int(factor[1:]) // 90, (-2, -1))
        else:
            array = np.flip(array, [AXIS[letter] for letter in factor])
    return array


def gather(stored: Tensor, index: np.ndarray, sign: np.ndarray | None = None) -> Tensor:
    """stored[index], with a sign."""
    dense = stored.flatten()[torch.from_numpy(index.copy())]
    return dense if sign is None else dense * torch.from_numpy(sign.astype(np.float64))


def orbit_index(stored: np.ndarray, bases: dict[str, int]) -> np.ndarray:
    """The filters of one group, from the indices of its stored ones (filters first)."""
    filters = list(stored)
    first = 0
    for name in IMAGES:
        for element in IMAGES[name]:
            filters += [image(stored[first + n], element) for n in range(bases.get(name, 0))]
        first += bases.get(name, 0)
    return np.stack(filters)


def tied_slots(symmetry: str, kernel: tuple[int, ...], odd: str) -> tuple[np.ndarray, np.ndarray, int]:
    """slot and sign of every tap, and how many values are stored; a sign of 0 where the tap is forced to zero."""
    slot, sign = np.full(kernel, -1), np.zeros(kernel, int)
    position = np.arange(math.prod(kernel)).reshape(kernel)
    count = 0
    for tap in np.ndindex(*kernel):
        if slot[tap] >= 0:
            continue
        signs: dict[int, set[int]] = {}  # of every tap of the orbit
        if symmetry.startswith("radial"):
            for other in np.ndindex(*kernel):
                if ring(symmetry, other, kernel) == ring(symmetry, tap, kernel):
                    signs[position[other]] = {1}
        else:
            for element in ["", *IMAGES[symmetry]]:
                chi = (-1) ** sum(letter in odd for letter in element)
                signs.setdefault(int(image(position, element)[tap]), set()).add(chi)
        if all(len(chis) == 1 for chis in signs.values()):
            for other, (chi,) in signs.items():
                slot.flat[other], sign.flat[other] = count, chi
            count += 1
    return np.maximum(slot, 0), sign, count


def ring(symmetry: str, tap: tuple[int, ...], kernel: tuple[int, ...]) -> Fraction | int:
    squared = sum((Fraction(size - 1, 2) - k) ** 2 for k, size in zip(tap, kernel, strict=True))
    if symmetry == "radial":
        return squared
    width = Fraction(symmetry.removeprefix("radial:"))
    return next(m for m in range(100) if ((m + 1) * width) ** 2 > squared)


# --- random layers ----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A layer, what its stored weights mean, and how it is fed."""

    family: str
    ndim: int
    arguments: dict[str, Any]
    expand: Callable[[nn.Module], tuple[Tensor, Tensor | None]]  # dense weight and bias
    pool: tuple[int, str] | None  # images of a filter, next to each other, and the reduction over them
    shape: tuple[int, ...]
    layout: str
    upstream: str
    path: str | None
    seed: int

    def __repr__(self) -> str:
        fed = f"x {self.shape} {self.layout}, gradient {self.upstream}, path {self.path}"
        return f"{self.family}{self.ndim}d({self.arguments}) on {fed}"


def acts(name: str, kernel: tuple[int, ...]) -> bool:
    if name in ("c2", "c4", "d4"):
        return len(kernel) == 2 and (name == "c2" or kernel[0] == kernel[1])
    return all(-AXIS[letter] <= len(kernel) for letter in name)


@st.composite
def cases(draw: Any, family: str) -> Case:
    ndim = draw(st.sampled_from([1, 2, 2, 3]))
    side = st.integers(1, {1: 6, 2: 4, 3: 3}[ndim])
    kernel = (draw(side),) * ndim if draw(st.booleans()) else tuple(draw(side) for _ in range(ndim))
    names = [name for name in IMAGES if acts(name, kernel)]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = draw(st.sampled_from([1, 1, 2, 3]))  # per group; depthwise where it is 1
    arguments: dict[str, Any] = {"in_channels": groups * channels, "kernel_size": kernel, "groups": groups}
    own = {"TiedConv": tied, "OrbitPoolConv": pooled}.get(family, orbits)
    out, expand, pool = own(draw, kernel, names, groups, arguments)
    arguments |= {"out_channels": out, "bias": draw(st.booleans())}
    arguments["activation"] = draw(st.sampled_from([None, *ACTIVATIONS]))

    arguments["dilation"] = dilation = per_axis(draw, ndim, 1, 2)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    arguments["stride"] = stride = per_axis(draw, ndim, 1, 3)
    padding: Any = per_axis(draw, ndim, 0, 2)
    smallest = [max(r + 1 - 2 * p, 1) for r, p in zip(reach, padding, strict=True)]
    if family == "SymmetricConvTranspose":
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        arguments["output_padding"] = extra
        axes = zip(stride, padding, reach, extra, strict=True)
        smallest = [max(math.ceil((2 * p - r - e) / s) + 1, 1) for s, p, r, e in axes]
    else:
        if draw(st.integers(0, 3)) == 0:
            padding = draw(st.sampled_from(["same", "valid"]))
            smallest = [r + 1 if padding == "valid" else 1 for r in reach]
            if padding == "same":
                arguments["stride"] = 1
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        arguments["padding_mode"] = mode
        if mode in ("reflect", "circular"):  # these cannot pad by more than the input
            pads = reach if padding == "same" else [0] * ndim if padding == "valid" else padding
            smallest = [max(n, p + 1) for n, p in zip(smallest, pads, strict=True)]
    arguments["padding"] = padding

    sizes = tuple(n + draw(st.integers(0, 3)) for n in smallest)
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,)]))
    return Case(
        family,
        ndim,
        arguments,
        expand,
        pool,
        (*batch, groups * channels, *sizes),
        draw(st.sampled_from(["contiguous", "channels last", "reversed", "sliced", "expanded"])),
        draw(st.sampled_from(["contiguous", "reversed", "sliced", "expanded", "constant"])),
        draw(st.sampled_from([None, "reference", "shift"])),
        draw(st.integers(0, 2**16)),
    )


def per_axis(draw: Any, ndim: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(ndim))


def orbits(draw: Any, kernel: Any, names: Any, groups: int, arguments: dict[str, Any]) -> Any:
    """SymmetricConv and SymmetricConvTranspose: one symmetry, or a mixture in counts and percents, and free filters."""
    kind = draw(st.sampled_from(["name", "counts", "counts", "percent", "none"]))
    number = draw(st.sampled_from({"name": [1], "none": [0]}.get(kind, [1, 2, 3])))
    mixture = draw(st.permutations(names))[:number]
    bases = {name: draw(st.sampled_from([1, 2])) for name in mixture}
    free = 0 if kind == "name" else draw(st.sampled_from([1, 2] if kind == "none" else [0, 1, 2]))
    order = {name: len(IMAGES[name]) + 1 for name in bases}
    out = groups * (sum(order[name] * n for name, n in bases.items()) + free)
    spec: Any = {name: groups * order[name] * n for name, n in bases.items()} or None
    if kind == "name":
        (spec,) = bases
    elif kind == "percent":
        name = mixture[0]
        percent = draw(st.integers(0, 100))
        count = round(Fraction(percent * out, 100)) // (groups * order[name])
        spec[name] = f"{percent}%"
        free += order[name] * (bases[name] - count)
        bases[name] = count
        assume(free >= 0)
    share_bias = draw(st.booleans())
    arguments |= {"symmetry": spec, "share_bias": share_bias}

    def expand(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        index = np.arange(layer.weight.numel()).reshape(layer.weight.shape)
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (in, stored, ...): every input channel by itself
            index = np.stack([orbit_index(row, bases) for row in index])
        else:
            index = np.concatenate([orbit_index(group, bases) for group in np.split(index, groups)])
        bias = layer.bias
        if bias is not None and share_bias:
            owners = np.arange(len(bias)).reshape(groups, -1)
            constant = owners.reshape(*owners.shape, *(1,) * len(kernel))  # a filter of one tap that names its owner
            bias = gather(bias, np.stack([orbit_index(group, bases).ravel() for group in constant]).ravel())
        return gather(layer.weight, index), bias

    return out, expand, None


def tied(draw: Any, kernel: Any, names: Any, groups: int, arguments: dict[str, Any]) -> Any:
    """TiedConv: every symmetry, radial ties, every parity, free filters."""
    symmetry = draw(st.sampled_from([*names, "radial", *names, "radial:0.7", "radial:1", *names]))
    flips = set(symmetry) <= set(AXIS)
    parity: Any = draw(st.sampled_from(["even", *["odd"] * (flips or symmetry == "d4"), *["by axis"] * flips]))
    odd = ""
    if parity == "odd":
        odd = symmetry if flips else "h"
    elif parity == "by axis":
        odd = "".join(letter for letter in symmetry if draw(st.booleans()))
        parity = {letter: "odd" if letter in odd else "even" for letter in symmetry}
    slot, sign, count = tied_slots(symmetry, kernel, odd)
    assume(count)
    per_group, free = draw(st.integers(1, 3)), groups * draw(st.integers(0, 2))
    arguments |= {"symmetry": symmetry, "parity": parity, "free": free}

    def expand(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        index = np.arange(layer.weight.numel()).reshape(layer.weight.shape)
        dense = gather(layer.weight, index[..., slot], np.broadcast_to(sign, (*index.shape[:2], *kernel)))
        if free:
            pairs = zip(dense.chunk(groups), layer.free_weight.chunk(groups), strict=True)
            dense = torch.cat([part for pair in pairs for part in pair])
        return dense, layer.bias

    return groups * per_group + free, expand, None


def pooled(draw: Any, kernel: Any, names: Any, groups: int, arguments: dict[str, Any]) -> Any:
    """OrbitPoolConv: a dense layer of all images, then the reduction."""
    symmetry, reduce = draw(st.sampled_from(names)), draw(st.sampled_from(["max", "min", "sum", "mean"]))
    elements = ["", *IMAGES[symmetry]]
    arguments |= {"symmetry": symmetry, "reduce": reduce}

    def expand(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        index = np.arange(layer.weight.numel()).reshape(layer.weight.shape)
        images = np.stack([image(row, element) for row in index for element in elements])
        return gather(layer.weight, images), None

    return groups * draw(st.integers(1, 3)), expand, (len(elements), reduce)


# --- the check --------------------------------------------------------------------------------------------------------

REDUCE = {
    "max": lambda y, axis: y.amax(axis),
    "min": lambda y, axis: y.amin(axis),
    "sum": lambda y, axis: y.sum(axis),
    "mean": lambda y, axis: y.mean(axis),
}


def strided(shape: tuple[int, ...], layout: str) -> Tensor:
    """Random numbers in a given layout of memory."""
    if layout == "reversed":
        return torch.randn(shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=torch.float64)[..., 1::2]
    if layout == "expanded":
        return torch.randn((*shape[:-1], 1), dtype=torch.float64).expand(shape)
    if layout == "constant":  # as the gradient of a sum
        return torch.randn((), dtype=torch.float64).expand(shape)
    x = torch.randn(shape, dtype=torch.float64)
    if layout == "channels last" and len(shape) in (4, 5):
        return x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    return x


def dense_output(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The torch layer with the dense weight, then the reduction over images, bias and activation; and its kinks.

    At a kink, within rounding, either of two gradients is right: images share the maximum, or relu starts.
    """
    own = ("symmetry", "share_bias", "parity", "free", "reduce", "activation")
    arguments = {key: value for key, value in case.arguments.items() if key not in own}
    arguments |= {"out_channels": weight.shape[0], "bias": bias is not None, "dtype": torch.float64}
    if case.family == "SymmetricConvTranspose":
        arguments["out_channels"] = weight.shape[1] * arguments["groups"]
    dense = getattr(nn, f"{LAYERS[case.family]}{case.ndim}d")(**arguments)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    y = torch.func.functional_call(dense, parameters, x)
    kink = torch.tensor(False)
    if case.pool is not None:
        order, reduce = case.pool
        channel = y.ndim - case.ndim - 1
        responses = y.unflatten(channel, (-1, order))
        y = REDUCE[reduce](responses, channel + 1)
        if reduce in ("max", "min"):
            kink = ((responses - y.unsqueeze(channel + 1)).abs() < 1e-9).sum(channel + 1) > 1
        if layer.bias is not None:
            y = y + layer.bias.reshape(-1, *(1,) * case.ndim)
    if case.arguments["activation"] == "relu":
        kink = kink | (y.abs() < 1e-9)
    return ACTIVATIONS[case.arguments["activation"]](y), kink


def assert_close(got: Tensor, truth: Tensor, what: str) -> None:
    assert got.shape == truth.shape, what
    if truth.numel():
        error, scale = (got - truth).abs().max().item(), truth.abs().max().item()
        assert error <= 1e-10 * max(scale, 1), f"{what}: error {error:.3e} of {scale:.3e}"


def check(case: Case) -> None:
    torch.manual_seed(case.seed)
    layer = getattr(tnn, f"{case.family}{case.ndim}d")(**case.arguments, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    weight, bias = case.expand(layer)
    if case.pool is None or case.pool[1] in ("max", "min"):
        assert torch.equal(layer.expanded_weight(), weight), "expanded_weight"

    x = strided(case.shape, case.layout).requires_grad_()
    if case.path is None:
        y = layer(x)
    else:
        with tritonsym.path(case.path):
            y = layer(x)
    truth, kink = dense_output(case, x, weight, bias, layer)
    assert_close(y, truth, "output")
    upstream = strided(tuple(y.shape), case.upstream)
    if kink.any():
        upstream = upstream.masked_fill(kink, 0)
    tensors = {"x": x, **parameters}
    gradients = [torch.autograd.grad(out, list(tensors.values()), upstream) for out in (y, truth)]
    for name, got, expected in zip(tensors, *gradients, strict=True):
        assert_close(got, expected, f"gradient of {name}")


@pytest.fixture
def one_thread():
    """Convolutions this small gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, about its own copy of x
@pytest.mark.filterwarnings("ignore:.*is 1 along axis")  # ours, which test_layers checks
@pytest.mark.parametrize("each", [EACH[0], pytest.param(EACH[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", LAYERS)
def test_random_layers_equal_the_dense_layer(family, each):
    ran = set()

    @settings(max_examples=each, suppress_health_check=list(HealthCheck))
    @given(cases(family))
    def every(case: Case) -> None:
        check(case)
        ran.add(repr(case))

    every()
    print(f"{family}: {len(ran)} different layers")
    assert 2 * len(ran) >= each

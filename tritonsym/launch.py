"""Convolutions by Triton kernels: memory layouts, and launches that are prepared once and kept.

There are three paths. `shift`: the vendor's library multiplies, and `kernels.shift` sums the products to y, adds the
bias, applies the activation and pools. `fused`: the forward pass of `shift` as one kernel, `kernels.fused`.
`implicit_gemm`: one kernel that reads the stored rows through `ConvSpec.row_table`, `kernels.conv` or, with one input
channel per group, `kernels.depthwise`. The backward pass needs only x and the weights (and one byte per value of a
pooled orbit).

What depends only on the spec, shapes, strides, dtype and device is prepared on meta tensors and kept: a repeated call
is a look-up, a few views and the launches. Before capturing a call in a CUDA graph, run it once, with its backward pass
if that is captured too; nothing else is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tritonsym.reference import block_filters
from tritonsym.shift import Part, channels_last, is_last, like, parts
from tritonsym.spec import ConvSpec, Geometry, Ints

#: Most bytes of z, or of its gradient, at a time: the batch is computed in chunks of as many images as fit, at least
#: one. Every chunk has its own launches.
SCRATCH_BYTES = 1 << 30
#: The channels of z are padded to a multiple of this, since kernels read 128 bits at a time.
PITCH = 16


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def check_device(x: Tensor) -> None:
    """Raise RuntimeError unless Triton kernels run on x."""
    if not runs_on(x.device):
        raise RuntimeError(
            f"tritonsym: Triton kernels cannot run on {x.device} tensors; move them to a GPU, set "
            "TRITON_INTERPRET=1 before Python starts (slow, for tests), or use tritonsym.backend('auto')"
        )


class launching:
    """Launch on the device of the operands; if that fails, except for lack of memory, say what was launched."""

    def __init__(self, path: str, tiles: Sequence[int], *operands: Tensor) -> None:
        self.path, self.tiles, self.operands = path, tiles, operands

    def __enter__(self) -> None:
        check_device(self.operands[0])
        self.device = torch.cuda.device_of(self.operands[0])
        self.device.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        self.device.__exit__(None, None, None)
        if isinstance(error, Exception) and not isinstance(error, torch.OutOfMemoryError):
            x = self.operands[0]
            raise RuntimeError(
                f"tritonsym: the kernels of path {self.path!r} with tiles {list(self.tiles)} failed for {x.dtype} "
                f"tensors {', '.join(str(tuple(t.shape)) for t in self.operands)} on {x.device}: {error}; "
                "tritonsym.backend('reference') avoids them"
            ) from error


def fprop(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    spec: str,
    path: str,
    tiles: Sequence[int],
    inner: bool,
    activation: str | None,
    last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """act(conv(x) + bias), channels-last if `last`, and with `keep` the images that won: bit i of a byte for image i.

    `tiles`: the numbers of the path's tiles (`kernels.tiles.as_tiles`). `inner`: axes that no image moves stay inside
    the products of `shift`.
    """
    with launching(path, tiles, x, *weights):
        form = spec, path, tuple(tiles), inner, *_forms(x, weights)
        layer, run, shape, stride = _forward(form, _form(x), bias is None, activation, last, keep)
        y = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
        winners = torch.empty_like(y, dtype=torch.uint8) if keep else None
        run(x, layer.rows(weights), None if bias is None else bias.contiguous(), y, winners)
        return y, winners


def backward(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    winners: Tensor | None,
    spec: str,
    path: str,
    tiles: Sequence[int],
    inner: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """The gradients with respect to x and the weights; the path 'fused' takes those of `shift`."""
    path = "shift" if path == "fused" else path
    with launching(path, tiles, x, *weights):
        form = spec, path, tuple(tiles), inner, *_forms(x, weights)
        if winners is not None:  # all winners share the gradient, as in torch.amax
            winners = channels_last(winners)
            dy = torch.div(dy, _bits(winners), out=torch.empty_like(winners, dtype=dy.dtype))
        layer, run = _backward(form, _form(x), _form(dy), need_x, need_weights)
        dx, drows = run(dy, x, layer.rows(weights), winners)
        return dx, None if drows is None else layer.gradients(weights, drows)


Form = tuple[Sequence[int], Sequence[int]]
Found = tuple[Tensor | None, list[Tensor] | None]


def _form(t: Tensor) -> Form:
    """Shape and strides of a tensor."""
    return t.shape, t.stride()


def _forms(x: Tensor, weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a layer's launches are prepared for, besides its spec, its path and the form of x."""
    return _precision(x), x.dtype, x.device, SCRATCH_BYTES, *map(_form, weights)


def _meta(form: Form, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(*form, dtype=dtype, device="meta")


def _precision(x: Tensor) -> str:
    """The precision of float32 products: torch's switch for convolutions."""
    is_float32 = x.dtype == torch.float32
    return "tf32" if is_float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


# --- memory layouts ---------------------------------------------------------------------------------------------------


class View:
    """The view that `t`, on the meta device, is of its base; `of` takes the same view of another tensor."""

    def __init__(self, t: Tensor) -> None:
        self.size, self.stride, self.offset = tuple(t.shape), t.stride(), t.storage_offset()

    def of(self, t: Tensor) -> Tensor:
        return t.as_strided(self.size, self.stride, t.storage_offset() + self.offset)

    def new(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor of this shape and these strides."""
        return torch.empty_strided(self.size, self.stride, dtype=dtype or x.dtype, device=x.device)


class Rows:
    """The stored weights of some blocks as the rows (groups, R, C, *kernel of the axes inside) of products, and back.

    The rows of a group are ordered by block, then slot, then filter.
    """

    def __init__(
        self, spec: ConvSpec, blocks: Sequence[int], inside: Sequence[bool], weights: Sequence[Tensor]
    ) -> None:
        is_tied = [block.orbits is not None for block in spec.blocks]
        self.number = [sum(is_tied[:b]) if is_tied[b] else len(weights) - 1 for b in blocks]
        axes = range(3, 3 + len(inside))
        moved, stay = ([a for a, i in zip(axes, inside, strict=True) if i == which] for which in (False, True))
        self.views = []
        for of in (weights, [torch.empty_like(w) for w in weights]):
            every = block_filters(spec, of)
            ordered = [
                every[b].permute(0, 3, 1, 2) if is_tied[b] else every[b].permute(0, *moved, 1, 2, *stay) for b in blocks
            ]
            self.views.append([View(w) for w in ordered])
        self.after = 1 + len(stay)  # axes after those of the rows
        self.counts = [math.prod(w.shape[1 : -self.after]) for w in ordered]
        self.shape = (spec.groups, sum(self.counts), *ordered[0].shape[-self.after :])

    def of(self, weights: Sequence[Tensor]) -> Tensor:
        """The rows of these weights, contiguous."""
        if len(self.number) == 1:
            return self.views[0][0].of(weights[self.number[0]]).reshape(self.shape).contiguous()
        rows = weights[0].new_empty(self.shape)
        for number, view, part in zip(self.number, self.views[0], rows.split(self.counts, 1), strict=True):
            part.unflatten(1, view.size[1 : -self.after]).copy_(view.of(weights[number]))
        return rows

    def write(self, weights: Sequence[Tensor], rows: Tensor) -> None:
        """Write the gradients of the rows into those of the weights."""
        if len(self.number) == 1:
            view = self.views[1][0]
            view.of(weights[self.number[0]]).copy_(rows.view(view.size))
            return
        for number, view, part in zip(self.number, self.views[1], rows.split(self.counts, 1), strict=True):
            view.of(weights[number]).copy_(part.unflatten(1, view.size[1 : -self.after]))


def _like(x: Tensor) -> View:
    """The layout of the gradient of x: channels-last if x is, else contiguous."""
    return View(like(x, x.shape) if is_last(x) else x.new_empty(x.shape))


def _to_3d(x: Tensor) -> Tensor:
    """x (N, C, *sizes) with three spatial axes: those that are missing are put first, with size 1."""
    return x[(slice(None),) * 2 + (None,) * (5 - x.ndim)]


def _three(values: Sequence[int], fill: int) -> Any:
    """The values of three axes: `fill` for the first ones, where they are missing."""
    return (fill,) * (3 - len(values)) + tuple(values)


# --- prepared layers --------------------------------------------------------------------------------------------------


class Layer:
    """A convolution by one path with weights of one form; its passes are prepared for the forms of x and dy."""

    def __init__(
        self, spec: ConvSpec, tiles: Sequence[Any], weights: Sequence[Tensor], device: torch.device, scratch: int
    ) -> None:
        self.spec, self.tiles, self.device, self.scratch = spec, tiles, device, scratch
        self.dtype = weights[0].dtype
        self.stored: list[Rows] = []

    def rows(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [stored.of(weights) for stored in self.stored]

    def gradients(self, weights: Sequence[Tensor], drows: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the weights, from those of the rows."""
        found = [torch.empty_like(w) for w in weights]
        for stored, part in zip(self.stored, drows, strict=True):
            stored.write(found, part)
        return found

    def prepare_fprop(self, x: Tensor, y: Tensor, act: str | None) -> Callable[..., None]:
        """A function run(x, rows, bias, y, winners) that fills y and the winners."""
        raise NotImplementedError

    def prepare_backward(self, dy: Tensor, x: Tensor, need_x: bool, need_rows: bool) -> Callable[..., Found]:
        """A function run(dy, x, rows, winners) -> the gradients with respect to x and, in float32, the rows."""
        raise NotImplementedError


@lru_cache(maxsize=1024)
def _layer(
    spec: str,
    path: str,
    tiles: Ints,
    inner: bool,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    scratch: int,
    *weights: Form,
) -> Layer:
    from tritonsym.kernels.tiles import as_tiles

    common = ConvSpec.of(spec), as_tiles(tiles), [_meta(form, dtype) for form in weights], device, scratch
    inner = inner and dtype != torch.float16  # its convolutions can neither keep z in float32 nor scale
    if path == "fused":
        return Fused(*common, precision)
    return Shift(*common, inner) if path == "shift" else ImplicitGemm(*common, precision)


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _forward(
    layer_form: Any, x_form: Form, no_bias: bool, activation: str | None, last: bool, keep: bool
) -> tuple[Layer, Callable[..., None], Sequence[int], Sequence[int]]:
    layer = _layer(*layer_form)
    x = _meta(x_form, layer.dtype)
    shape = (x.shape[0], layer.spec.out_channels, *layer.spec.geometry.out_sizes(x.shape[2:]))
    y = like(x, shape) if last else x.new_empty(shape)
    return layer, layer.prepare_fprop(x, y, activation), *_form(y)


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _backward(
    layer_form: Any, x_form: Form, dy_form: Form, need_x: bool, need_rows: bool
) -> tuple[Layer, Callable[..., Found]]:
    layer = _layer(*layer_form)
    metas = _meta(dy_form, layer.dtype), _meta(x_form, layer.dtype)
    return layer, layer.prepare_backward(*metas, need_x, need_rows)


def forget() -> None:
    """Forget all that was prepared."""
    for prepared in (_layer, _forward, _backward, stages):
        prepared.cache_clear()


# --- shift ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Blocks with the same axes inside their products, and the tables of the sums of these products.

    On the other axes, tap k reads residue (dilation k - padding) mod stride. Every residue class of positions, a phase,
    has its own product with the rows needed there; transposed convolutions have one phase. The z of all phases lie side
    by side: (N, groups width, *sizes of the largest).
    """

    inside: tuple[bool, ...]
    blocks: Ints
    phases: tuple[tuple[Ints, Ints], ...]  # residues, rows
    count: int  # rows of a group
    to_y: Any  # `kernels.shift.Table` of the sums from z to y
    to_d: Any  # and of their adjoint from dy to d

    @property
    def width(self) -> int:
        """Channels of z per group, a multiple of `PITCH`."""
        return int(self.to_y.source_channels)


@lru_cache(maxsize=1024)
def stages(spec: ConvSpec, inner: bool) -> tuple[Stage, ...]:
    """One stage for all blocks; with `inner`, one for every set of axes that stay inside the products."""
    ndim = len(spec.geometry.kernel_size)
    found = parts(spec, inner)
    insides = [part.inside[:ndim] if inner else (False,) * ndim for part in found]
    result = []
    for inside in dict.fromkeys(insides):
        blocks = tuple(b for b, other in enumerate(insides) if other == inside)
        result.append(_stage(spec, inside, blocks, found if inner else None))
    return tuple(result)


def _stage(spec: ConvSpec, inside: tuple[bool, ...], blocks: Ints, found: Sequence[Part] | None) -> Stage:
    from tritonsym.kernels.shift import Table

    geometry, dims = spec.geometry, range(len(inside))
    moduli = [1 if geometry.transposed or i else s for i, s in zip(inside, geometry.stride, strict=True)]
    taps = list(product(*(range(1 if i else k) for i, k in zip(inside, geometry.kernel_size, strict=True))))
    reads: dict[Ints, list[tuple[int, int, int, int, Ints, int]]] = {}  # (block, slot, image, first, shift, sign)
    starts, count = {}, 0
    for b in blocks:
        images = found[b].images if found else spec.slot_table[b]
        for image, (first, slots, signs) in enumerate(images):
            for k, slot, sign in zip(taps, slots, signs, strict=True):
                at = [0 if inside[a] else geometry.dilation[a] * k[a] - geometry.padding[a] for a in dims]
                residue = tuple(at[a] % moduli[a] for a in dims)
                shift = tuple(-at[a] if geometry.transposed else at[a] // moduli[a] for a in dims)
                if sign:
                    reads.setdefault(residue, []).append((b, slot, image, first, shift, sign))
        starts[b] = count
        count += spec.blocks[b].filters * (len(found[b].order) if found else spec.slots(spec.blocks[b]))
    phases: list[tuple[Ints, Ints]] = []
    to_y: dict[tuple[int, int], list[Any]] = {
        (first, spec.blocks[b].filters): [] for b in blocks for first, _ in spec.blocks[b].images
    }
    to_d: dict[tuple[int, int], list[Any]] = {}
    done = 0
    for residue in sorted(reads):
        rows: list[int] = []
        place = {}
        for b, slot in sorted({read[:2] for read in reads[residue]}):
            filters = spec.blocks[b].filters
            place[b, slot] = done + len(rows)
            rows += range(starts[b] + slot * filters, starts[b] + (slot + 1) * filters)
        for b, slot, image, first, shift, sign in reads[residue]:
            row, filters = place[b, slot], spec.blocks[b].filters
            to_y[first, filters].append((row, _three(shift, 0), sign, 0))
            back = _three([-s for s in shift], 0)
            to_d.setdefault((row, filters), []).append((0 if spec.pool else first, back, sign, image))
        phases.append((residue, tuple(rows)))
        done += len(rows)
    sums_y, sums_d = (tuple((*key, tuple(sums[key])) for key in sorted(sums)) for sums in (to_y, to_d))
    one, width, channels = (1, 1, 1), -(-done // PITCH) * PITCH, spec.out_channels // spec.groups
    apart = [1 if i else s for i, s in zip(inside, geometry.stride, strict=True)]
    div = _three(apart, 1) if geometry.transposed else one
    to = Table(len(inside), width, channels, sums_y, one, div, spec.pool or "")
    adjoint = Table(len(inside), channels, width, sums_d, div, one, won=spec.pool is not None)
    return Stage(inside, blocks, tuple(phases), count, to, adjoint)


class Shift(Layer):
    """The path `shift`: products and their sums, stage by stage."""

    def __init__(self, *common: Any) -> None:
        *of_layer, inner = common
        super().__init__(*of_layer)
        self.stages = stages(self.spec, inner)
        self.stored = [Rows(self.spec, stage.blocks, stage.inside, of_layer[2]) for stage in self.stages]

    def z(self, stage: Stage, x: Tensor, dtype: torch.dtype) -> Tensor:
        """z of a stage, empty; no size is 0, since torch cannot convolve size 0."""
        geometry = self.spec.geometry
        steps = (1 if geometry.transposed else s for s in geometry.stride)
        each = zip(stage.inside, x.shape[2:], geometry.out_sizes(x.shape[2:]), steps, strict=True)
        sizes = (out if inside else max(1, -(-size // step)) for inside, size, out, step in each)
        return like(x, (x.shape[0], self.spec.groups * stage.width, *sizes)).to(dtype)

    def chunks(self, x: Tensor, dtype: torch.dtype) -> list[slice]:
        """Slices of the batch whose z fits the scratch memory."""
        image = max(max(self.z(stage, x, dtype).nbytes for stage in self.stages) // max(x.shape[0], 1), 1)
        count = max(1, self.scratch // image)
        return [slice(n, min(n + count, x.shape[0])) for n in range(0, x.shape[0], count)]

    def prepare_fprop(self, x: Tensor, y: Tensor, act: str | None) -> Callable[..., None]:
        from tritonsym.kernels import shift

        # a product may overflow float16 where the sums do not
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        if len(chunks := self.chunks(x, dtype)) > 1:
            of = {at.stop - at.start: self.prepare_fprop(x[at], y[at], act) for at in chunks[::-1]}

            def by_chunks(x: Tensor, rows: Any, bias: Tensor | None, y: Tensor, winners: Tensor | None) -> None:
                for at in chunks:
                    won = None if winners is None else winners[at]
                    of[at.stop - at.start](x[at], rows, bias, y[at], won)

            return by_chunks
        work = []
        for stage in self.stages:
            z = self.z(stage, x, dtype)
            products = [Product(self.spec, stage, phase, x, z, self.device) for phase in range(len(stage.phases))]
            kernel = shift.sums(_to_3d(z), _to_3d(y), stage.to_y, self.tiles[0], activation=act)
            work.append((View(z), products, kernel))

        def run(x: Tensor, rows: list[Tensor], bias: Tensor | None, y: Tensor, winners: Tensor | None) -> None:
            for (view, products, kernel), w in zip(work, rows, strict=True):
                if products and products[0].is_z:
                    z = products[0].convolve(x, w)
                else:
                    z = view.new(x, dtype)
                    for of in products:
                        of.fprop(x, w, z)
                kernel(z, y, bias, winners)

        return run

    def prepare_backward(self, dy: Tensor, x: Tensor, need_x: bool, need_rows: bool) -> Callable[..., Found]:
        from tritonsym.kernels import shift

        target = _like(x)
        if len(chunks := self.chunks(x, x.dtype)) > 1:
            of = {at.stop - at.start: self.prepare_backward(dy[at], x[at], need_x, need_rows) for at in chunks[::-1]}

            def by_chunks(dy: Tensor, x: Tensor, rows: list[Tensor], winners: Tensor | None) -> Found:
                dx, total = target.new(x) if need_x else None, None
                for at in chunks:
                    won = None if winners is None else winners[at]
                    found, drows = of[at.stop - at.start](dy[at], x[at], rows, won)
                    if dx is not None and found is not None:
                        dx[at] = found
                    if drows is not None:
                        total = drows if total is None else [a.add_(b) for a, b in zip(total, drows, strict=True)]
                return dx, total

            return by_chunks
        work = []
        for stage in self.stages:
            d = self.z(stage, x, x.dtype)
            products = [Product(self.spec, stage, phase, x, d, self.device) for phase in range(len(stage.phases))]
            scaled = x.dtype == torch.float16  # d may overflow where its products do not
            kernel = shift.sums(_to_3d(dy), _to_3d(d), stage.to_d, self.tiles[1], scaled=scaled)
            scale = 1 / stage.to_d.scale if scaled else 1
            work.append((View(d), products, kernel, any(of.pad for of in products), scale))
        whole = len(work) == len(work[0][1]) == 1 and work[0][1][0].whole

        def run(dy: Tensor, x: Tensor, rows: list[Tensor], winners: Tensor | None) -> Found:
            dx = target.new(x).zero_() if need_x and not whole else None
            drows: list[Tensor] = []
            for (view, products, kernel, padded, scale), w in zip(work, rows, strict=True):
                d = view.new(x)
                if padded:  # the channels that meet the rows' padding must be finite
                    d.zero_()
                kernel(dy, d, None, winners)
                total = None
                for of in products:
                    found, dw = of.backward(d, x, w, scale, need_x, need_rows)
                    if whole and found is not None:
                        dx = found if found.stride() == target.stride else target.new(x).copy_(found)
                    elif dx is not None and found is not None:
                        dx[of.at] += found[_corner(dx[of.at])]
                    if dw is not None and of.picked is not None:
                        total = torch.zeros_like(w, dtype=torch.float32) if total is None else total
                        total[:, of.picked] += dw
                    elif dw is not None:
                        total = dw if total is None else total.add_(dw)
                if need_rows:
                    drows.append(torch.zeros_like(w, dtype=torch.float32) if total is None else total)
            return dx, drows if need_rows else None

        return run


class Fused(Layer):
    """The path `fused`: one kernel for y; the gradients are those of `Shift`."""

    def __init__(self, *common: Any) -> None:
        *of_layer, self.precision = common
        super().__init__(*of_layer)
        (self.stage,) = stages(self.spec, False)
        self.stored = [Rows(self.spec, self.stage.blocks, self.stage.inside, of_layer[2])]

    def prepare_fprop(self, x: Tensor, y: Tensor, act: str | None) -> Callable[..., None]:
        from tritonsym.kernels import fused

        shape: Any = self.stored[0].shape
        kernel = fused.conv(_to_3d(x), shape, _to_3d(y), self.stage.to_y, self.tiles[0], act, self.precision)
        return lambda x, rows, bias, y, winners: kernel(x, rows[0], y, bias, winners)


class Product:
    """The product of x and the rows (groups, R, C, ...) for one phase of a stage, and its gradients."""

    def __init__(self, spec: ConvSpec, stage: Stage, number: int, x: Tensor, z: Tensor, device: torch.device) -> None:
        geometry, self.groups = spec.geometry, spec.groups
        residue, picked = stage.phases[number]
        before, self.count = sum(len(rows) for _, rows in stage.phases[:number]), len(picked)
        self.picked = None if self.count == stage.count else torch.tensor(picked, device=device)
        steps = [1 if i or geometry.transposed else s for i, s in zip(stage.inside, geometry.stride, strict=True)]
        self.at: Any = (..., *(slice(r, None, step) for r, step in zip(residue, steps, strict=True)))
        self.whole = all(step == 1 for step in steps)
        each = zip(stage.inside, x.shape[2:], z.shape[2:], strict=True)
        self.shape = (*x.shape[:2], *(size if i else of_z for i, size, of_z in each))
        part = z.unflatten(1, (self.groups, -1))[:, :, before : before + self.count]  # [N, G, R, ...]
        self.part = View(part)
        # a convolution in float32, too, so that torch's switches for convolutions hold
        self.is_conv = x.dtype == torch.float32 or any(stage.inside)
        self.is_z = self.is_conv and len(stage.phases) == 1
        self.pad = stage.width - self.count if self.is_z else 0
        at_inside = [
            [value if i else plain for i, value in zip(stage.inside, values, strict=True)]
            for values, plain in ((geometry.stride, 1), (geometry.padding, 0), (geometry.dilation, 1))
        ]
        self.options: Any = (*at_inside, False, [0] * len(residue), self.groups)
        self.kernel = [k if i else 1 for i, k in zip(stage.inside, geometry.kernel_size, strict=True)]
        positions = math.prod(x.shape[2:])
        # one product per image reads or writes channels-first x without a copy
        self.by_image = self.groups == 1 and self.whole and not is_last(x) and x.is_contiguous() and positions % 8 == 0
        self.direct = self.by_image or (self.whole and x.movedim(1, -1).is_contiguous())
        copied = like(x, self.shape)
        self.copied = View(copied)
        self.a, self.z = self._matrices(copied.unflatten(1, (self.groups, -1))), self._matrices(part)
        if self.by_image:
            self.a_images, self.z_images = View(x.flatten(2).mT), View(part[:, 0].flatten(2).mT)
            # this writes and reads an R x C matrix for every image; otherwise x is copied
            self.adds_images = positions >= 2 * self.count

    def _matrices(self, t: Tensor) -> View:
        """t (N, G, C, *sizes), channels-last, as (G, positions, C), or (positions, C) if G is 1."""
        found = t.movedim((1, 2), (-2, -1)).flatten(0, -3).movedim(-2, 0)
        return View(found[0] if self.groups == 1 else found)

    def _weights(self, rows: Tensor) -> Tensor:
        """The rows of this phase, as its product takes them."""
        w = rows if self.picked is None else rows[:, self.picked]
        if not self.is_conv:
            return w[0] if self.groups == 1 else w
        if self.pad:
            w = torch.cat([w, w.new_zeros(self.groups, self.pad, *w.shape[2:])], 1)
        return w.view(-1, w.shape[2], *self.kernel)

    def _phase(self, x: Tensor) -> Tensor:
        """x at the positions of this phase, channels-last, padded with zeros to the sizes of z."""
        there = x if self.whole else x[self.at]
        if there.shape == self.shape:
            return channels_last(there)
        padded = like(x, self.shape).zero_()
        padded[_corner(there)] = there
        return padded

    def convolve(self, x: Tensor, rows: Tensor) -> Tensor:
        return channels_last(torch.convolution(self._phase(x), self._weights(rows), None, *self.options))

    def fprop(self, x: Tensor, rows: Tensor, z: Tensor) -> None:
        """Fill this phase's part of z."""
        if self.is_conv:
            self.part.of(z).copy_(self.convolve(x, rows).unflatten(1, (self.groups, -1)))
        elif self.by_image:
            w = self._weights(rows).mT.expand(x.shape[0], -1, -1)
            _multiply(self.a_images.of(x), w, self.z_images.of(z))
        else:
            _multiply(self.a.of(x if self.direct else self._phase(x)), self._weights(rows).mT, self.z.of(z))

    def backward(
        self, d: Tensor, x: Tensor, rows: Tensor, scale: float, need_x: bool, need_rows: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to x at this phase and, in float32, to its rows, from d times `scale`."""
        w, dx, dw = self._weights(rows), None, None
        if self.is_conv:
            part = d if self.is_z else self.part.of(d).flatten(1, 2)
            needs = [need_x, need_rows, False]
            dx, dw, _ = torch.ops.aten.convolution_backward(part, self._phase(x), w, None, *self.options, needs)
            if dw is not None:
                dw = dw.view(self.groups, self.count + self.pad, *rows.shape[2:])[:, : self.count].float()
            return dx, dw
        d_rows = self.z.of(d)
        if need_x and self.by_image:
            dx = x.new_empty(x.shape)
            _multiply(w.mT.expand(x.shape[0], -1, -1), self.z_images.of(d).mT, self.a_images.of(dx).mT, scale)
        elif need_x:
            dx = self.copied.new(x)
            _multiply(d_rows, w, self.a.of(dx), scale)
        if need_rows and self.by_image and self.adds_images:
            dw = x.new_empty(x.shape[0], *w.shape, dtype=torch.float32)
            _multiply(self.z_images.of(d).mT, self.a_images.of(x), dw)
            dw = dw.sum(0)
        elif need_rows:
            dw = torch.empty(w.shape, dtype=torch.float32, device=x.device)
            _multiply(d_rows.mT, self.a.of(x if self.direct and not self.by_image else self._phase(x)), dw)
        if dw is not None:
            dw = dw.view(self.groups, self.count, -1)
            dw = dw if scale == 1 else dw.mul_(scale)
        return dx, dw


def _multiply(a: Tensor, b: Tensor, out: Tensor, scale: float = 1) -> None:
    """Fill `out`, which may have another dtype, with scale a b, for matrices or batches of them."""
    if a.dtype != out.dtype and a.is_cuda and not torch.version.hip:
        (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = (a, b) if a.dtype == out.dtype else (a.to(out.dtype), b.to(out.dtype))
    if scale != 1:
        (torch.addmm if a.ndim == 2 else torch.baddbmm)(out, a, b, beta=0, alpha=scale, out=out)
    else:
        (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out=out)


def _corner(x: Tensor) -> tuple[Any, ...]:
    """The index of the first positions of every spatial axis, as many as x has."""
    return (..., *map(slice, x.shape[2:]))


def _bits(winners: Tensor) -> Tensor:
    """The number of bits set in every byte."""
    pairs = winners - (winners >> 1 & 0x55)
    quads = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return quads + (quads >> 4) & 0x0F


# --- implicit_gemm ----------------------------------------------------------------------------------------------------


class ImplicitGemm(Layer):
    """The path `implicit_gemm`: one kernel for y, one for dx and one for the gradient of the rows."""

    def __init__(self, *common: Any) -> None:
        from tritonsym.kernels import conv, depthwise

        *of_layer, precision = common
        super().__init__(*of_layer)
        spec, weights, device = self.spec, of_layer[2], self.device
        self.stored = [Rows(spec, range(len(spec.blocks)), [False] * len(spec.geometry.kernel_size), weights)]
        self.shape = self.stored[0].shape
        self.is_product = self.shape[2] > 1
        self.kernels: Any = conv if self.is_product else depthwise
        signed = any(entry < 0 for taps in spec.row_table for entry in taps)
        self.options = {"signed": signed, "precision": precision} if self.is_product else {"signed": signed}
        self.table = torch.tensor(spec.row_table, dtype=torch.int32, device=device)
        self.grid = grid(spec.geometry)

    def rows(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The rows; (R, groups) with one channel per group."""
        (rows,) = super().rows(weights)
        return [rows if self.is_product else rows[..., 0].mT.contiguous()]

    def prepare_fprop(self, x: Tensor, y: Tensor, act: str | None) -> Callable[..., None]:
        where = self.grid.reversed if self.spec.geometry.transposed else self.grid
        options = {"activation": act, **self.options}
        kernel = self.kernels.fprop(_to_3d(x), self.shape, _to_3d(y), where, self.tiles[0], **options)
        return lambda x, rows, bias, y, winners: kernel(x, rows[0], self.table, bias, y)

    def prepare_backward(self, dy: Tensor, x: Tensor, need_x: bool, need_rows: bool) -> Callable[..., Found]:
        transposed = self.spec.geometry.transposed
        where = self.grid if transposed else self.grid.reversed
        target = _like(x)
        of_x = self.kernels.dgrad(_to_3d(dy), self.shape, _to_3d(target.new(x)), where, self.tiles[1], **self.options)
        tile = self.tiles[2]
        images, align = _images(self.spec, tile.block_m if self.is_product else 1)
        options = self.options | {"align": align} if self.is_product else {}
        of_rows, workspace = self.kernels.wgrad(
            _to_3d(dy), _to_3d(x), images, self.shape, self.grid, tile,
            transposed=transposed, most_bytes=self.scratch, **options,
        )  # fmt: skip
        table = torch.tensor(images, dtype=torch.int32, device=self.device)

        def run(dy: Tensor, x: Tensor, rows: list[Tensor], winners: Tensor | None) -> Found:
            dx = target.new(x) if need_x else None
            if dx is not None:
                of_x(dy, rows[0], self.table, None, dx)
            if not need_rows:
                return dx, None
            parts = torch.zeros(workspace, dtype=torch.float32, device=x.device)
            of_rows(dy, x, table, parts)
            return dx, [parts.sum(0)]

        return run


def _images(spec: ConvSpec, height: int) -> tuple[list[list[int]], int]:
    """For every tile of stored rows with equal taps: first row, count, then (first filter, tap, sign) of every image.

    Also a number that divides the count of every tile and the first filter of every image.
    """
    tiles = []
    row = 0
    for block, table in zip(spec.blocks, spec.slot_table, strict=True):
        for slot in range(spec.slots(block)):
            images = [
                (first, tap, sign)
                for first, slots, signs in table
                for tap, (s, sign) in enumerate(zip(slots, signs, strict=True))
                if s == slot and sign
            ]
            for u in range(0, block.filters, height):
                shifted = [number for first, tap, sign in images for number in (first + u, tap, sign)]
                tiles.append([row + u, min(height, block.filters - u), *shifted])
            row += block.filters
    most = max(map(len, tiles))
    align = math.gcd(16, *(n for block in spec.blocks for n in (block.filters, *(first for first, _ in block.images))))
    return [t + [0] * (most - len(t)) for t in tiles], align


def grid(geometry: Geometry) -> Any:
    """Where position p of a convolution, if not transposed, reads for tap k: at stride p + dilation k - padding."""
    from tritonsym.kernels.address import Grid

    kernel, stride, dilation = (_three(v, 1) for v in (geometry.kernel_size, geometry.stride, geometry.dilation))
    shift = _three([-p for p in geometry.padding], 0)
    return Grid(len(geometry.kernel_size), kernel, stride, dilation, shift, (1, 1, 1))

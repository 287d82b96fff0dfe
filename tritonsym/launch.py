"""Convolutions by Triton kernels: opaque ops that lay out the tensors, bound the scratch and launch.

Two paths. `shift`: the GEMMs of `tritonsym.shift` by the vendor's library, its additions by `kernels.shift`, which also
adds the bias, applies the activation and pools. `expand`: one kernel that reads the stored rows through `Conv.table`,
the implicit GEMM `kernels.conv` or, with one input channel per group, `kernels.depthwise`. Both save nothing but x and
the rows (and one byte per value of a pooled orbit).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tritonsym import shift
from tritonsym.shift import Additions, Conv, Gemm, channels_last, is_last


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


@contextmanager
def launching(path: str, tiles: Sequence[int], *operands: Tensor) -> Iterator[None]:
    """Launch on the device of the operands, and say what was launched if that fails."""
    x = operands[0]
    check_device(x)
    try:
        with torch.cuda.device_of(x):
            yield
    except Exception as error:
        raise RuntimeError(
            f"tritonsym: the kernels of path {path!r} with tiles {list(tiles)} failed for {x.dtype} tensors "
            f"{', '.join(str(tuple(t.shape)) for t in operands)} on {x.device}: {error}; "
            "tritonsym.backend('reference') does without"
        ) from error


@torch.library.custom_op("tritonsym::conv_forward", mutates_args=())
def forward(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    conv: str,
    path: str,
    tiles: Sequence[int],
    activation: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """act(conv(x) + bias), and the images that won if `keep`: bit i of a byte per value stands for image i.

    `tiles`: those of the path's kernels one after the other (`Plan.tiles`).
    """
    layer = Conv.from_text(conv)
    y = _like(x, layer.out_shape(x))
    winners = torch.empty_like(y, dtype=torch.uint8) if keep else y.new_empty(0, dtype=torch.uint8)
    bias = None if bias is None else bias.contiguous()
    with launching(path, tiles, x, rows):
        run = _shift_forward if path == "shift" else _expand_forward
        run(x, rows, bias, layer, tiles, activation, y, winners if keep else None)
    return y, winners


@forward.register_fake
def _(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    conv: str,
    path: str,
    tiles: Sequence[int],
    activation: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y = _like(x, Conv.from_text(conv).out_shape(x))
    return y, torch.empty_like(y, dtype=torch.uint8) if keep else y.new_empty(0, dtype=torch.uint8)


@torch.library.custom_op("tritonsym::conv_backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    winners: Tensor,
    conv: str,
    path: str,
    tiles: Sequence[int],
    need_x: bool,
    need_rows: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to x and rows; empty where not needed."""
    layer = Conv.from_text(conv)
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    drows = torch.empty_like(rows) if need_rows else rows.new_empty(0)
    with launching(path, tiles, x, rows):
        run = _shift_backward if path == "shift" else _expand_backward
        run(
            dy,
            x,
            rows,
            winners if layer.pool else None,
            layer,
            tiles,
            dx if need_x else None,
            drows if need_rows else None,
        )
    return dx, drows


@backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    winners: Tensor,
    conv: str,
    path: str,
    tiles: Sequence[int],
    need_x: bool,
    need_rows: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    return dx, torch.empty_like(rows) if need_rows else rows.new_empty(0)


def _like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor, channels-last if x is."""
    return shift.like(x, shape) if is_last(x) else x.new_empty(shape)


def _to_3d(x: Tensor) -> Tensor:
    """(N, C, *sizes) with axes of size 1 put in front of the spatial ones."""
    for _ in range(5 - x.ndim):
        x = x.unsqueeze(2)
    return x


# --- shift ------------------------------------------------------------------------------------------------------------


def _shift_forward(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    conv: Conv,
    tiles: Sequence[int],
    activation: str | None,
    y: Tensor,
    winners: Tensor | None,
) -> None:
    import tritonsym.kernels.shift as kernel
    from tritonsym.kernels.tiles import Tile

    gemms, additions = shift.schedule(conv, tuple(x.shape[2:]))
    table = kernel.Table(*table_fields(conv, tuple(x.shape[2:]), adjoint=False))
    for n in shift.chunks(x, additions, conv.groups):
        z = _multiply(x[n], rows, gemms, additions, conv.groups)
        kernel.add(
            _to_3d(z),
            table,
            _to_3d(y[n]),
            conv.groups,
            Tile(*tiles[:3]),
            bias=bias,
            activation=activation,
            kept=None if winners is None else winners[n],
        )


def _shift_backward(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    winners: Tensor | None,
    conv: Conv,
    tiles: Sequence[int],
    dx: Tensor | None,
    drows: Tensor | None,
) -> None:
    import tritonsym.kernels.shift as kernel
    from tritonsym.kernels.tiles import Tile

    gemms, additions = shift.schedule(conv, tuple(x.shape[2:]))
    table = kernel.Table(*table_fields(conv, tuple(x.shape[2:]), adjoint=True))
    total = None if drows is None else torch.zeros_like(rows, dtype=torch.float32)
    for n in shift.chunks(x, additions, conv.groups):
        d = _scratch(x[n], additions, conv.groups)
        dy_n, won = dy[n], None
        if winners is not None:  # the gradient is shared by all winners, as that of torch.amax
            won = channels_last(winners[n])
            dy_n = torch.div(dy_n, _bits(won), out=torch.empty_like(won, dtype=dy.dtype))
        kernel.add(_to_3d(dy_n), table, _to_3d(d), conv.groups, Tile(*tiles[3:]), won=won)
        _multiply_backward(d, x[n], rows, gemms, additions, conv.groups, None if dx is None else dx[n], total)
    if drows is not None and total is not None:
        drows.copy_(total)


def _bits(winners: Tensor) -> Tensor:
    """How many bits of every byte are set."""
    pairs = winners - (winners >> 1 & 0x55)
    quads = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return quads + (quads >> 4) & 0x0F


@lru_cache(maxsize=1024)
def table_fields(conv: Conv, sizes: tuple[int, ...], adjoint: bool) -> tuple[Any, ...]:
    """The fields of the kernel's `Table`, for all z side by side: a target reads position (mul p + shift) / div."""
    _, additions = shift.schedule(conv, sizes)
    rows = [0, *accumulate(channels for channels, _ in additions.sources)]
    mul, div = [1, 1, 1], [1, 1, 1]
    sums: dict[tuple[int, int], list[Any]] = {}
    if not adjoint:  # images without a tap inside x are sums without terms
        sums = {(first, block.filters): [] for block in conv.blocks for first, _, _ in block.images}
    for m in additions.moves:
        shift_by = [0, 0, 0]
        for axis, (of, to) in enumerate(zip(m.of_at[:0:-1], m.to_at[:0:-1], strict=True), start=1):
            mul[-axis], div[-axis] = of.step or 1, to.step or 1
            shift_by[-axis] = div[-axis] * of.start - mul[-axis] * to.start
        filters = m.to.stop - m.to.start
        image, first = (m.to.start // filters, 0) if conv.pool else (0, m.to.start)
        z = rows[m.source] + m.of.start
        if adjoint:
            term = (first, tuple(-by for by in shift_by), m.sign, image)
            sums.setdefault((z, filters), []).append(term)
        else:
            sums[m.to.start, filters].append((z, tuple(shift_by), m.sign, image))
    if adjoint:
        mul, div = div, mul
    ordered = sorted(sums)
    first, filters = zip(*ordered, strict=True)
    pool = "" if adjoint else conv.pool or ""
    return first, filters, tuple(tuple(sums[key]) for key in ordered), tuple(mul), tuple(div), pool


def _scratch(x: Tensor, additions: Additions, groups: int) -> Tensor:
    """An empty z of all GEMMs side by side: (N, groups rows, *sizes), the sizes of the largest, channels-last."""
    sizes = [max(sizes) for sizes in zip(*(sizes for _, sizes in additions.sources), strict=True)]
    return shift.like(x, (x.shape[0], groups * sum(channels for channels, _ in additions.sources), *sizes))


def _multiply(x: Tensor, rows: Tensor, gemms: Sequence[Gemm], additions: Additions, groups: int) -> Tensor:
    """z of all GEMMs side by side, 0 beyond the smaller ones."""
    if x.dtype == torch.float32:  # by convolutions, so that torch's switches for their precision hold
        weights = [shift.as_1x1(rows, g, x.ndim - 2) for g in gemms]
        parts = shift.multiply(channels_last(x), gemms, weights, groups)
        if len(parts) == 1:
            return channels_last(parts[0])
        z = _scratch(x, additions, groups).zero_()
        for to, part in zip(_parts(z, additions, groups), parts, strict=True):
            to[shift.corner(part.shape[2:])] = part.unflatten(1, (groups, -1))
        return z
    z = _scratch(x, additions, groups)
    for g, to in zip(gemms, _parts(z, additions, groups), strict=True):
        w = shift.pick(rows, g.rows)  # [G, R, C]
        if _by_image(x, g, groups):
            torch.bmm(x.flatten(2).mT, w.mT.expand(x.shape[0], -1, -1), out=to[:, 0].flatten(2).mT)
        else:
            torch.bmm(_matrices(x, g, z.shape[2:], groups), w.mT, out=_by_group(to))
    return z


def _multiply_backward(
    d: Tensor,
    x: Tensor,
    rows: Tensor,
    gemms: Sequence[Gemm],
    additions: Additions,
    groups: int,
    dx: Tensor | None,
    drows: Tensor | None,
) -> None:
    """Fill dx and add to drows, from d of all GEMMs side by side."""
    parts = _parts(d, additions, groups)
    if x.dtype == torch.float32:
        weights = [shift.as_1x1(rows, g, x.ndim - 2) for g in gemms]
        d_parts = [
            part[shift.corner(sizes)].flatten(1, 2) for part, (_, sizes) in zip(parts, additions.sources, strict=True)
        ]
        found = shift.multiply_backward(d_parts, channels_last(x), gemms, weights, groups, dx is not None, drows)
        if dx is not None:
            dx.copy_(found)
        return
    if dx is not None and not (len(gemms) == 1 and gemms[0].whole):
        dx.zero_()
    for g, part, (_, sizes) in zip(gemms, parts, additions.sources, strict=True):
        d_g = _by_group(part)  # [G, P, R]
        if dx is not None:
            w = shift.pick(rows, g.rows)
            if g.whole and is_last(dx) and dx.movedim(1, -1).is_contiguous():
                torch.bmm(d_g, w, out=_by_group(dx.unflatten(1, (groups, -1))))
            elif _by_image(dx, g, groups):
                torch.bmm(w.mT.expand(x.shape[0], -1, -1), part[:, 0].flatten(2), out=dx.flatten(2))
            else:
                found = torch.bmm(d_g, w).transpose(0, 1)  # [P, G, C]
                found = found.reshape(x.shape[0], *d.shape[2:], -1).movedim(-1, 1)
                dx[g.x_at] = found[shift.corner(sizes)]
        if drows is not None:
            # an R x C matrix is written and read for every image, or else a channels-first x is copied
            if _by_image(x, g, groups) and math.prod(x.shape[2:]) >= 2 * len(g.rows):
                found = _products(part[:, 0].flatten(2), x.flatten(2).mT).sum(0, keepdim=True)
            else:
                found = _products(d_g.mT, _matrices(x, g, d.shape[2:], groups))
            shift.add_rows(drows, found, g.rows)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices, in float32."""
    if a.is_cuda and not torch.version.hip:
        return torch.bmm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a.float(), b.float())


def _parts(z: Tensor, additions: Additions, groups: int) -> Sequence[Tensor]:
    """The z of every GEMM: (N, groups, rows, *sizes)."""
    return z.unflatten(1, (groups, -1)).split([channels for channels, _ in additions.sources], 2)


def _by_image(x: Tensor, gemm: Gemm, groups: int) -> bool:
    """Whether x is channels-first, so that one product per image reads, or writes, it as it lies."""
    return groups == 1 and gemm.whole and not is_last(x) and x.is_contiguous()


def _by_group(z: Tensor) -> Tensor:
    """(N, G, C, *sizes), channels-last -> a view (G, positions, C)."""
    return z.movedim((1, 2), (-2, -1)).flatten(0, -3).movedim(-2, 0)


def _matrices(x: Tensor, gemm: Gemm, sizes: Sequence[int], groups: int) -> Tensor:
    """The positions of one GEMM as matrices (G, positions of z, C), 0 where z is larger."""
    there = x[gemm.x_at]
    if there.shape[2:] != tuple(sizes):
        padded = shift.like(x, (*x.shape[:2], *sizes)).zero_()
        padded[shift.corner(there.shape[2:])] = there
        there = padded
    return _by_group(channels_last(there).unflatten(1, (groups, -1)))


# --- expand -----------------------------------------------------------------------------------------------------------


def _expand_forward(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    conv: Conv,
    tiles: Sequence[int],
    activation: str | None,
    y: Tensor,
    winners: Tensor | None,
) -> None:
    _expand(x, rows, y, conv, tiles[: len(tiles) // 3], gradient=False, bias=bias, activation=activation)


def _expand(
    source: Tensor, rows: Tensor, target: Tensor, conv: Conv, tile: Sequence[int], gradient: bool, **epilogue: Any
) -> None:
    """Fill y from x, or dx from dy."""
    import tritonsym.kernels.conv as kernel
    from tritonsym.kernels import depthwise
    from tritonsym.kernels.tiles import GemmTile, Tile

    table, epilogue["signed"] = _device_table(conv, source.device)
    source, target = _to_3d(source), _to_3d(target)
    where = grid(conv.geometry, conv.geometry.transposed != gradient)
    if rows.shape[2] == 1:
        depthwise.conv(source, rows[..., 0].mT.contiguous(), table, target, where, Tile(*tile), **epilogue)
    else:
        epilogue |= {"gradient": gradient, "precision": _precision()}
        kernel.conv(source, rows, table, target, where, GemmTile(*tile), **epilogue)


def _expand_backward(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    winners: Tensor | None,
    conv: Conv,
    tiles: Sequence[int],
    dx: Tensor | None,
    drows: Tensor | None,
) -> None:
    import tritonsym.kernels.conv as kernel
    from tritonsym.kernels import depthwise
    from tritonsym.kernels.tiles import GemmTile, Tile

    third = len(tiles) // 3
    if dx is not None:
        _expand(dy, rows, dx, conv, tiles[third : 2 * third], gradient=True)
    if drows is None:
        return
    transposed = conv.geometry.transposed
    batch, _, *sizes = (x if transposed else dy).shape
    tile: Any
    if rows.shape[2] == 1:
        tile = Tile(*tiles[2 * third :])
        height, columns, blocks = 1, -(-conv.groups // tile.block_u), batch * math.prod(sizes) // tile.block_p
    else:
        tile = GemmTile(*tiles[2 * third :])
        height, columns = tile.block_m, conv.groups * -(-rows.shape[2] // tile.block_n)
        of_image = -(-math.prod(sizes) // tile.block_k)
        blocks = batch * of_image
    images = _device_images(conv, height, x.device)
    # programs that share the positions: about 512 in all, 16 blocks each at least
    splits = min(512 // max(images.shape[0] * columns, 1), blocks // 16)
    splits = max(1, min(splits, shift.SCRATCH_BYTES // (4 * max(rows.numel(), 1))))
    where: dict[str, Any] = {"grid": grid(conv.geometry, False), "tile": tile, "transposed": transposed}
    if rows.shape[2] == 1:
        work = rows.new_zeros(splits, *rows.shape, dtype=torch.float32)
        depthwise.weight_gradient(_to_3d(dy), _to_3d(x), images, work, **where)
    else:
        batches = max(1, min(splits, batch // 16))
        work = rows.new_zeros(batches, max(1, min(splits // batches, of_image)), *rows.shape, dtype=torch.float32)
        firsts = (first for block in conv.blocks for first, _, _ in block.images)
        where["align"] = math.gcd(16, *firsts, *(block.filters for block in conv.blocks))
        where["signed"], where["precision"] = _device_table(conv, x.device)[1], _precision()
        kernel.weight_gradient(_to_3d(dy), _to_3d(x), images, work, **where)
    drows.copy_(work.flatten(0, -4).sum(0))


def _precision() -> str:
    """Of float32 products: torch's switch for convolutions."""
    switch = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if switch == "tf32" else "ieee"


@lru_cache(maxsize=1024)
def _device_table(conv: Conv, device: torch.device) -> tuple[Tensor, bool]:
    """`Conv.table` on the device, and whether it has a negative sign."""
    signed = any(entry < 0 for filter_ in conv.table for entry in filter_)
    return torch.tensor(conv.table, dtype=torch.int32, device=device), signed


@lru_cache(maxsize=1024)
def _device_images(conv: Conv, tile: int, device: torch.device) -> Tensor:
    """Of every tile of stored rows with equal taps: first row, rows, then (first filter, tap, sign) of every image."""
    tiles = []
    row = 0
    for block in conv.blocks:
        for slot in range(block.slots):
            images = [
                (first, tap, sign)
                for first, slots, signs in block.images
                for tap, (s, sign) in enumerate(zip(slots, signs, strict=True))
                if s == slot and sign
            ]
            for u in range(0, block.filters, tile):
                shifted = [number for first, tap, sign in images for number in (first + u, tap, sign)]
                tiles.append([row + u, min(tile, block.filters - u), *shifted])
            row += block.filters
    most = max(map(len, tiles))
    return torch.tensor([t + [0] * (most - len(t)) for t in tiles], dtype=torch.int32, device=device)


def grid(geometry: shift.Geometry, reverse: bool) -> Any:
    """Where positions read: x at stride p + dilation k - padding; with `reverse` the p for which that is x's."""
    from tritonsym.kernels.conv import Grid

    def three(values: Sequence[int], fill: int) -> tuple[int, ...]:
        return (fill,) * (3 - len(values)) + tuple(values)

    kernel, stride, dilation = (three(v, 1) for v in (geometry.kernel_size, geometry.stride, geometry.dilation))
    padding = three(geometry.padding, 0)
    one = (1, 1, 1)
    if reverse:
        return Grid(kernel, one, tuple(-d for d in dilation), padding, stride)
    return Grid(kernel, stride, dilation, tuple(-p for p in padding), one)

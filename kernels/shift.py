"""The sums of the shift path as one Triton kernel: forward and adjoint, any symmetry, one to three axes.

Images of a filter read the same values of z and share partial sums of them: the host turns the sums of a `Table` into
straight-line programs that load every value once (`compile_sums`, greedy common subexpressions as in Paar 1997,
"Optimized arithmetic for Reed-Solomon encoders").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tritonsym.kernels.address import Three, positions, read_at, strides, strides_of, wide
from tritonsym.kernels.epilogue import activate
from tritonsym.kernels.prepared import Launch
from tritonsym.kernels.tiles import Tile

Term = tuple[int, Three, int, int]
Sum = tuple[int, int, tuple[Term, ...]]
Code = tuple[int, int, int]


@dataclass(frozen=True, eq=False)  # tables are kept, so that as keys they are compared by identity
class Table:
    """Which sums fill which target channels of a group.

    A sum (first, filters, terms) fills the target channels first + u, u < filters. Each of its terms (channel, shift,
    sign, image) is sign times source channel channel + u at position (mul p + shift) / div of every axis. `image` is
    used only with `won`: the source is the gradient of a pooled orbit, which only images that won receive. With `pool`
    each sum is one image of a filter, and only the largest ('max') or smallest ('min') is stored.
    """

    axes: int  # of an image; positions have three, of which only the last `axes` are used
    source_channels: int  # of a group
    target_channels: int
    sums: tuple[Sum, ...]
    mul: Three
    div: Three
    pool: str = ""
    won: bool = False

    @cached_property
    def scale(self) -> float:
        """A power of two, at most 1 / (terms of the longest sum): scaled by it, no sum of finite values overflows."""
        return 0.5 ** max(len(terms) - 1 for *_, terms in self.sums).bit_length()


#: Instructions (op, a, b), each of which makes one more value: channel b of the source at position a; a + b; a - b; -a;
#: a where image b has won, else 0.
LOAD, ADD, SUBTRACT, NEGATE, PICK = range(5)


def compile_sums(sums: Sequence[Sequence[Term]], won: bool) -> tuple[list[Three], list[Code], list[int]]:
    """Positions, instructions, and for every sum the number of its value, -1 if it has no terms."""
    keys = sorted({(channel, shift) for terms in sums for channel, shift, *_ in terms})
    places = sorted({shift for _, shift in keys})
    # values linked by equal channels or positions are an orbit; orbits are added one by one, so few values are alive
    parent = {key: key for key in keys}

    def root(key: tuple[int, Three]) -> tuple[int, Three]:
        while parent[key] != key:
            key = parent[key]
        return key

    for part in map(itemgetter, (0, 1)):
        for _, same in groupby(sorted(keys, key=part), part):
            first, *others = same
            for key in others:
                parent[root(key)] = root(first)
    members: dict[Any, set[Any]] = {}
    for key in keys:
        members.setdefault(root(key), set()).add(key)
    code: list[Code] = []
    known: dict[Any, int] = {}

    def value(*instruction: Any) -> int:
        """The number of an instruction's value; the instruction is emitted when first needed."""
        if instruction not in known:
            op, a, *b = instruction
            if op == LOAD:
                code.append((LOAD, places.index(a), b[0]))
            else:
                code.append((op, value(*a), value(*b[0]) if op in (ADD, SUBTRACT) else b[0] if b else 0))
            known[instruction] = len(code) - 1
        return known[instruction]

    totals: list[Any] = [None] * len(sums)
    for orbit in sorted(members.values(), key=lambda orbit: (-len(orbit), min(orbit))):
        left: list[dict[Any, int]] = []
        for terms in sums:
            signs: dict[Any, int] = {}
            for channel, shift, sign, image in terms:
                if (channel, shift) in orbit:
                    load = (LOAD, shift, channel)
                    signs[(PICK, load, image) if won else load] = sign
            left.append(signs)
        order: dict[Any, int] = {
            term: n for n, term in enumerate(sorted({term for signs in left for term in signs}, key=str))
        }
        while True:  # the pair with a relative sign that most sums share becomes a value
            pairs = Counter(
                (i, j, signs[i] * signs[j])
                for signs in left
                for i, j in combinations(sorted(signs, key=order.__getitem__), 2)
            )
            most = max(pairs.values(), default=0)
            if most < 2:
                break
            common = [pair for pair, count in pairs.items() if count == most]
            i, j, relative = min(common, key=lambda pair: order[pair[0]] + order[pair[1]])
            new = (ADD if relative > 0 else SUBTRACT, i, j)
            order[new] = len(order)
            for signs in left:
                if i in signs and j in signs and signs[i] * signs[j] == relative:
                    signs[new] = signs.pop(i)
                    del signs[j]
        for number, signs in enumerate(left):
            # a new total begins with a positive value if it has one; else the latest values come first
            for term, sign in sorted(
                signs.items(), key=lambda item: (totals[number] is None and item[1] < 0, -order[item[0]])
            ):
                if totals[number] is None:
                    totals[number] = term if sign > 0 else (NEGATE, term)
                else:
                    totals[number] = (ADD if sign > 0 else SUBTRACT, totals[number], term)
                value(*totals[number])
    return places, code, [-1 if total is None else value(*total) for total in totals]


@triton.jit
def _float32(values):
    """The values in float32; bfloat16 by a bit shift, since Triton's conversion takes more instructions."""
    if values.dtype == tl.bfloat16:
        return (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def combine(values, OP: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The value of an instruction ADD, SUBTRACT or NEGATE."""
    if OP == 1:
        return values[A] + values[B]
    elif OP == 2:
        return values[A] - values[B]
    else:
        return -values[A]


@triton.jit
def store_sums(
    values,  # [U, P] each
    target_ptr, bias_ptr, winners_ptr,
    target,  # offsets of the positions [P], of the group's first channel
    target_c,
    channel,  # the group's first channel
    u, has, live,
    RUN: tl.constexpr, TOTAL: tl.constexpr, FIRST: tl.constexpr, POOL: tl.constexpr, SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Store a run's totals, or their extremum and the images that attain it, with bias and activation."""
    mask = has[:, None] & live[None, :]
    if POOL != "":
        best = values[TOTAL[0][0]]
        bits = tl.full((BLOCK_U, BLOCK_P), 1, tl.int32)
        for o in tl.static_range(1, len(TOTAL[0])):
            total = values[TOTAL[0][o]]
            if POOL == "max":
                better = (total > best) | ((total != total) & (best == best))  # a NaN wins, as in torch.amax
            else:
                better = (total < best) | ((total != total) & (best == best))
            equal = (total == best) | ((total != total) & (best != best))
            best = tl.where(better, total, best)
            bits = tl.where(better, 1 << o, tl.where(equal, bits | (1 << o), bits))
        if winners_ptr is not None:
            tl.store(winners_ptr + (u * target_c)[:, None] + target[None, :], bits.to(tl.uint8), mask=mask)
    for o in tl.static_range(1 if POOL != "" else len(TOTAL[RUN])):
        if POOL != "":
            total = best
        elif TOTAL[RUN][o] < 0:
            total = tl.zeros((BLOCK_U, BLOCK_P), tl.float32)
        else:
            total = values[TOTAL[RUN][o]]
        if SCALE != 1:
            total *= SCALE
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + channel + FIRST[RUN][o] + u, mask=has, other=0.0)
            total += bias.to(tl.float32)[:, None]
        place = ((u + FIRST[RUN][o]) * target_c)[:, None] + target[None, :]
        tl.store(target_ptr + place, activate(total, ACTIVATION).to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "M", "TD", "TH", "TW", "SD", "SH", "SW",
        "source_n", "source_c", "source_d", "source_h", "source_w",
        "target_n", "target_c", "target_d", "target_h", "target_w",
    ]
)  # fmt: skip
def _shift_sum_kernel(
    source_ptr,  # [N, groups * SOURCE_C, SD, SH, SW], any strides
    target_ptr,  # [N, groups * TARGET_C, TD, TH, TW], any strides
    bias_ptr,  # [groups * TARGET_C] or None
    winners_ptr,  # bits of the images that won, strides of the pooled tensor; None if not kept or needed
    M,  # N * TD * TH * TW
    TD, TH, TW, SD, SH, SW,
    source_n, source_c, source_d, source_h, source_w, target_n, target_c, target_d, target_h, target_w,
    SOURCE_ALIGN: tl.constexpr, SOURCE_UNIT: tl.constexpr, TARGET_ALIGN: tl.constexpr, TARGET_UNIT: tl.constexpr,
    SOURCE_C: tl.constexpr, TARGET_C: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,  # filter tiles of one group
    TILE_AT: tl.constexpr,  # per run of sums of equally many filters: its first tile
    FILTERS: tl.constexpr,  # per run
    SHIFT_D: tl.constexpr, SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,  # per run and position
    OP: tl.constexpr, A: tl.constexpr, B: tl.constexpr,  # per run and instruction
    TOTAL: tl.constexpr, FIRST: tl.constexpr,  # per run and sum: its value, its first channel
    MUL: tl.constexpr, DIV: tl.constexpr, AXES: tl.constexpr,
    POOL: tl.constexpr,
    WON: tl.constexpr,  # the source is the gradient of a pooled orbit: only images that won receive it
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within an image need 64 bits
    BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """target[n, first[o] + u, p] = act(bias + SCALE sum_t sign[o, t] source[n, channel[o, t] + u, at(p, o, t)]).

    at(p, o, t) = (MUL p + shift[o, t]) / DIV; the source is 0 outside the image and where DIV does not divide. POOL:
    the extremum over o, and winners[n, u, p] = sum of 2^o over the o that attain it. WON: only terms count whose image
    has its bit set in the winners where the term reads. Positions are the last axis of a tile: where Triton knows no
    stride to be 1 (channels-first, sizes that 16 does not divide), it gives a warp neighbours along that axis.
    """
    source_n, source_c, source_d, source_h, source_w = strides(
        source_n, source_c, source_d, source_h, source_w, SOURCE_ALIGN, SOURCE_UNIT
    )
    target_n, target_c, target_d, target_h, target_w = strides(
        target_n, target_c, target_d, target_h, target_w, TARGET_ALIGN, TARGET_UNIT
    )
    tile = tl.program_id(0) % (GROUPS * TILES)  # neighbours read the same positions
    n, d, h, w, live = positions(tl.program_id(0) // (GROUPS * TILES), M, TD, TH, TW, BLOCK_P, WIDE, AXES)  # [P]
    group = (tile // TILES).to(tl.int64)
    tile = tile % TILES
    source = n * source_n + group * SOURCE_C * source_c  # [P]
    target = n * target_n + group * TARGET_C * target_c  # [P]
    target += d * target_d + h * target_h + w * target_w
    for run in tl.static_range(len(FILTERS)):
        if (tile >= TILE_AT[run]) & (tile < TILE_AT[run + 1]):
            u = (tile - TILE_AT[run]) * BLOCK_U + tl.arange(0, BLOCK_U)  # [U]
            has = u < FILTERS[run]
            if WIDE:
                u = u.to(tl.int64)
            places = ()
            insides = ()
            for k in tl.static_range(len(SHIFT_D[run])):
                place, inside = read_at(
                    d, h, w, SHIFT_D[run][k], SHIFT_H[run][k], SHIFT_W[run][k], live,
                    SD, SH, SW, source_d, source_h, source_w, MUL, DIV, AXES,
                )  # fmt: skip
                places = places + (source + place,)
                insides = insides + (inside,)
            values = ()  # [U, P]
            winners = ()
            for i in tl.static_range(len(OP[run])):
                won = 0
                if OP[run][i] == 0:
                    place = ((u + B[run][i]) * source_c)[:, None] + places[A[run][i]][None, :]
                    mask = has[:, None] & insides[A[run][i]][None, :]
                    value = _float32(tl.load(source_ptr + place, mask=mask, other=0.0))
                    if WON:
                        won = tl.load(winners_ptr + place, mask=mask, other=0).to(tl.int32)
                elif OP[run][i] == 4:
                    value = tl.where(((winners[A[run][i]] >> B[run][i]) & 1) != 0, values[A[run][i]], 0.0)
                else:
                    value = combine(values, OP[run][i], A[run][i], B[run][i])
                values = values + (value,)
                winners = winners + (won,)
            store_sums(
                values, target_ptr, bias_ptr, winners_ptr, target, target_c, group * TARGET_C, u, has, live,
                run, TOTAL, FIRST, POOL, SCALE, ACTIVATION, BLOCK_P, BLOCK_U,
            )  # fmt: skip


#: Most terms of a run whose sums share no values: more would cost registers and time to compile.
RUN_TERMS = 36


def _runs(table: Table) -> list[list[Sum]]:
    """Runs of neighbouring sums of equally many filters, one program each; shorter runs where sums share no values."""
    runs = []
    for _, group in groupby(table.sums, lambda a_sum: a_sum[1]):
        run = list(group)
        terms = [term[:2] for *_, terms in run for term in terms]
        parts = 1 if table.pool or len(set(terms)) < len(terms) else -(-len(terms) // RUN_TERMS)
        size = max(1, -(-len(run) // max(parts, 1)))
        runs += [run[i : i + size] for i in range(0, len(run), size)]
    return runs


def _by_source(table: Table) -> list[list[Sum]]:
    """Runs of all sums of the same source channels, so that only one run reads them."""
    runs: dict[tuple[int, int], list[Sum]] = {}
    for a_sum in table.sums:
        runs.setdefault((a_sum[1], min((channel for channel, *_ in a_sum[2]), default=-1)), []).append(a_sum)
    return list(runs.values())


@lru_cache(maxsize=1024)
def constants(table: Table, block_u: int, by_source: bool = False) -> dict[str, Any]:
    """The constexpr arguments of the kernel for one table and tile width; `by_source`: for `kernels.fused`."""
    tile_at, filters, first = [0], [], []
    programs = []
    for run in _by_source(table) if by_source else _runs(table):
        programs.append(compile_sums([terms for *_, terms in run], table.won))
        tile_at.append(tile_at[-1] + triton.cdiv(run[0][1], block_u))
        filters.append(run[0][1])
        first.append(tuple(channel for channel, *_ in run))
    shifts, codes, totals = zip(*programs, strict=True)
    shift_d, shift_h, shift_w = zip(*(zip(*places, strict=True) for places in shifts), strict=True)
    op, a, b = zip(*(zip(*code, strict=True) for code in codes), strict=True)
    return {
        "SOURCE_C": table.source_channels,
        "TARGET_C": table.target_channels,
        "TILES": tile_at[-1],
        "TILE_AT": tuple(tile_at),
        "FILTERS": tuple(filters),
        "SHIFT_D": shift_d,
        "SHIFT_H": shift_h,
        "SHIFT_W": shift_w,
        "OP": op,
        "A": a,
        "B": b,
        "TOTAL": tuple(map(tuple, totals)),
        "FIRST": tuple(first),
        "MUL": table.mul,
        "DIV": table.div,
        "AXES": table.axes,
        "POOL": table.pool,
        "WON": table.won,
    }


def sums(
    source: Tensor, target: Tensor, table: Table, tile: Tile, *, activation: str | None = None, scaled: bool = False
) -> Launch:
    """A launch that fills `target` (N, groups * channels, D, H, W) with the sums of `table` over `source`; any strides.

    Call it with source, target, a bias or None, and None or the winners of a pooled orbit: written, in the strides of
    the target, or with `table.won` read, in the strides of the source. `scaled`: times `table.scale`.
    """
    batch, channels, *sizes = target.shape
    count = batch * math.prod(sizes)
    fixed = constants(table, tile.block_u)
    groups = channels // table.target_channels
    (of_source, source_fixed), (of_target, target_fixed) = strides_of(source, "SOURCE"), strides_of(target, "TARGET")
    more = {"GROUPS": groups, "SCALE": table.scale if scaled else 1.0, "ACTIVATION": activation or ""}
    return Launch(
        _shift_sum_kernel,
        (triton.cdiv(count, tile.block_p) * groups * fixed["TILES"],) if target.numel() else (),
        (count, *sizes, *source.shape[2:], *of_source, *of_target),
        fixed | source_fixed | target_fixed | more | tile.constants | {"WIDE": wide(source, target)},
        tile.options,
    )

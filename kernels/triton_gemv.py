"""The product of one token or a few on a GPU, in one launch, with the same bits from run to run.

The grid has three kinds of programs. The first ones compute z = B^T (x - s(x)), each over some ranks and a stretch of
channels. The next ones, one per block of columns and stretch of channels, read the kept channels' rows of W^T. The last
ones, one per block of columns and tile of ranks, read A^T's rows, which they load before they wait for z. Whoever is
the last to arrive at a block of columns adds up what all have left there, in a fixed order: no floating-point atomics.

Waiting assumes that programs start in the order of their numbers, which the z programs come first in. The workspace
belongs to one launch at a time: it must not be shared between streams.
"""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import triton_tiles as tiles
from kernels.packing import COLUMNS, Packed
from kernels.quantized import GROUP

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_SEGMENTS = 3
MOST_TOKENS = 16
"""Tokens of one launch."""
MOST_REGISTERS = 128
"""Of a thread where programs are one warp: a few spilled ones cost less than the warp that they would displace. INT4
beside float32 is plain arithmetic, and needs more."""
Z_RANKS = tl.constexpr(4)
"""Ranks of a program that computes z."""
Z_STRETCH = 2048
"""Channels of one such program."""
LIST = tl.constexpr(256)
"""Channels that are compacted at once, for one token."""
BATCH_LIST = tl.constexpr(128)
"""The same for several."""


@dataclass(frozen=True)
class Configuration:
    """How a launch is cut up; results differ between configurations by rounding only.

    columns: of a block. rows: of a tile. splits: stretches of channels per block of columns.
    warps: per program. listed: kept channels are compacted into a list first, so that all loads of a tile are in
    flight; else tiles are masked.
    """

    columns: int = 64
    rows: int = 32
    splits: int = 16
    warps: int = 1
    listed: bool = False

    def __post_init__(self) -> None:
        for name in ("columns", "rows", "splits", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1) and name != "splits":
                raise ValueError(f"{name} is {value}; expected a power of two" + (" or any count" * (name == "splits")))

    def numbers(self) -> list[int]:
        """For an operation's arguments."""
        return [int(value) for value in astuple(self)]

    @classmethod
    def of(cls, numbers: list[int]) -> Configuration:
        *sizes, listed = numbers
        return cls(*sizes, bool(listed))


_NOT_SPECIALIZED = ["m0", "m1", "m2", "splits", "stretch", "rank_tiles", "z_programs", "z_blocks", "z_stretches",
                    "blocks", "first", "second", "places"]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _gemv(
    x, table, A, B, scales, ranks, thresholds, norms, bias, front, residual, y, next, weighted, squares, partial, z,
    flags, scratch, eps, n, m, r, m0, m1, m2, splits, stretch, rank_tiles, z_programs, z_blocks, z_stretches, blocks,
    first, second, places,
    TOKENS: tl.constexpr, PAD: tl.constexpr, SEGMENTS: tl.constexpr, NORMS: tl.constexpr, BIAS: tl.constexpr,
    FRONT: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr, GATED: tl.constexpr, INT4: tl.constexpr,
    LISTED: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SUB: tl.constexpr, RANK_ROWS: tl.constexpr, PARTS: tl.constexpr,
    Z_WIDTH: tl.constexpr, NORM_WIDTH: tl.constexpr, STRETCHES: tl.constexpr, Z_STRETCH: tl.constexpr,
    PLACES: tl.constexpr, VOTES: tl.constexpr, CHAINED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """See the module. m: padded columns; m0, m1, m2: outputs of each segment, first, second: blocks of the first two.
    next: weight of the norm that reads y; weighted, squares: what is left for it, where NEXT, see triton_tiles.LEFT.
    flags: arrivals at z, leavers of the rank path, then arrivals at each block of outputs; all 0 before and after."""
    program = tl.program_id(0)
    if CHAINED:
        gdc_wait()  # launched while the operation before still runs
    if program < z_programs:
        per_token = z_stretches * z_blocks
        token, index = program // per_token, program % per_token
        part, rest = index // z_blocks, index % z_blocks
        per_segment = tl.cdiv(r, Z_RANKS)
        segment = rest // per_segment
        own = (rest % per_segment) * Z_RANKS + tl.arange(0, Z_RANKS)
        of_token = front + token * places if FRONT == tiles.LEFT else front
        scale = tiles.scale_of(x + token * n, of_token, n, eps, places, FRONT, NORM_WIDTH, PLACES)
        begin = part * Z_STRETCH
        total = tiles.z_part(
            x + token * n, B, front, scale, norms + segment * n if NORMS else norms, tl.load(thresholds + segment), n,
            r, segment, own, begin, tl.minimum(begin + Z_STRETCH, n), Z_RANKS, Z_WIDTH, NORMS, FRONT,
        )  # fmt: skip
        tl.store(z + ((token * z_stretches + part) * SEGMENTS + segment) * r + own, total, mask=own < r)
        tl.debug_barrier()
        tl.atomic_add(flags, 1, sem="release")
        if CHAINED:
            gdc_launch_dependents()
        return
    number = program - z_programs
    block, split = number % blocks, number // blocks
    segment = (block >= first).to(tl.int32) + (block >= first + second).to(tl.int32)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    out = partial + split * TOKENS * m
    if split < splits:
        start = split * stretch
        _sparse_path(
            x, table, scales, thresholds, norms, front, eps, scratch + number.to(tl.int64) * stretch, out, n, m, block,
            segment, columns, start, tl.minimum(start + stretch, n), places, TOKENS, PAD, NORMS, FRONT, INT4, LISTED,
            COLUMNS, ROWS, SUB, NORM_WIDTH, PLACES, VOTES, INTERPRETED,
        )  # fmt: skip
    else:
        sums = tiles.low_rank(A, z, ranks, split - splits, m, r, segment, SEGMENTS, z_stretches, columns, flags,
                              z_programs, TOKENS, PAD, RANK_ROWS, STRETCHES, INTERPRETED)  # fmt: skip
        _leave(out, sums, m, columns, TOKENS, PAD)
        left = tl.atomic_add(flags + 1, 1, sem="acq_rel")
        if left == blocks * rank_tiles - 1:  # nobody waits for z any more
            tl.store(flags, 0)
            tl.store(flags + 1, 0)
    if CHAINED:
        gdc_launch_dependents()
    tl.debug_barrier()
    parts = splits + rank_tiles
    place = block % first if GATED else block
    arrived = tl.atomic_add(flags + 2 + place, 1, sem="acq_rel")
    if arrived == (2 * parts if GATED else parts) - 1:
        tl.debug_barrier()
        tl.store(flags + 2 + place, 0)
        for token in range(TOKENS):
            _reduce(partial + token * m, bias, residual, y, next, weighted, squares, token, m, parts, place, segment,
                    m0, m1, m2, first, second, blocks, TOKENS, BIAS, RESIDUAL, NEXT, GATED, COLUMNS, PARTS)  # fmt: skip


@triton.jit
def _sparse_path(
    x, table, scales, thresholds, norms, front, eps, entries, out, n, m, block, segment, columns, start, end, places,
    TOKENS: tl.constexpr, PAD: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr, INT4: tl.constexpr,
    LISTED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SUB: tl.constexpr, NORM_WIDTH: tl.constexpr,
    PLACES: tl.constexpr, VOTES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Leaves the sum over the kept channels of start..end at `out`."""
    threshold = tl.load(thresholds + segment)
    own = norms + segment * n if NORMS else norms
    if TOKENS > 1:
        tokens = tl.minimum(tl.arange(0, PAD), TOKENS - 1)
        scale = tl.full((PAD,), 1.0, tl.float32)
        if FRONT:
            for token in tl.static_range(TOKENS):
                of_token = front + token * places if FRONT == tiles.LEFT else front
                found = tiles.scale_of(x + token * n, of_token, n, eps, places, FRONT, NORM_WIDTH, PLACES)
                scale = tl.where(tokens == token, found, scale)
        each = x + tokens[:, None] * n
        count = tiles.list_kept(each, front, scale, own, threshold, start, end, entries, TOKENS, BATCH_LIST, NORMS,
                                FRONT, VOTES=False)  # fmt: skip
        sums = tiles.batched(each, table, front, scale, own, threshold, entries, count, m, columns, PAD, ROWS, COLUMNS,
                             NORMS, FRONT, INTERPRETED)  # fmt: skip
        _leave(out, sums, m, columns, TOKENS, PAD)
    else:
        scale = tiles.scale_of(x, front, n, eps, places, FRONT, NORM_WIDTH, PLACES)
        if INT4:
            tiles.int4(x, table, scales, front, scale, own, threshold, start, end, m, block, entries, out, LISTED, ROWS,
                       COLUMNS, NORMS, FRONT, VOTES, INTERPRETED)  # fmt: skip
        elif LISTED:
            count = tiles.list_kept(x, front, scale, own, threshold, start, end, entries, 1, LIST, NORMS, FRONT, VOTES)
            sums = tiles.listed(x, table, front, scale, entries, count, m, columns, ROWS, SUB, COLUMNS, FRONT,
                                INTERPRETED)  # fmt: skip
            tl.store(out + columns, sums)
        else:
            sums = tiles.masked(x, table, front, scale, own, threshold, start, end, m, columns, ROWS, COLUMNS, NORMS,
                                FRONT, INTERPRETED)  # fmt: skip
            tl.store(out + columns, sums)


@triton.jit
def _leave(out, sums, m, columns, TOKENS: tl.constexpr, PAD: tl.constexpr):
    if TOKENS > 1:
        token = tl.arange(0, PAD)
        tl.store(out + token[:, None] * m + columns[None, :], sums, mask=(token < TOKENS)[:, None])
    else:
        tl.store(out + columns, sums)


@triton.jit
def _reduce(partial, bias, residual, y, next, weighted, squares, token, m, parts, block, segment, m0, m1, m2, first,
            second, blocks, TOKENS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr,
            GATED: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Outputs of one token at a block of columns, out of all parts. What is added or multiplied is loaded first, to
    come while the parts do."""
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    if GATED:
        within, inside, place, of_bias = columns, columns < m0, token * m0 + columns, bias
    else:
        before = tl.where(segment == 0, 0, tl.where(segment == 1, first, first + second)) * COLUMNS
        start = tl.where(segment == 0, 0, tl.where(segment == 1, m0, m0 + m1))
        within = columns - before
        inside = within < tl.where(segment == 0, m0, tl.where(segment == 1, m1, m2))
        place, of_bias = token * (m0 + m1 + m2) + start + within, bias + start if BIAS else bias
    if RESIDUAL:
        added = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if NEXT:  # of a single segment
        weight = tl.load(next + columns, mask=inside, other=0.0).to(tl.float32)
    total = _total(partial, of_bias, TOKENS * m, columns, within, inside, parts, BIAS, COLUMNS, PARTS)
    if GATED:
        up = _total(partial, bias + m0 if BIAS else bias, TOKENS * m, first * COLUMNS + columns, columns, inside, parts,
                    BIAS, COLUMNS, PARTS)  # fmt: skip
        total = total * tl.sigmoid(total) * up
    if RESIDUAL:
        total += added
    tl.store(y + place, total, mask=inside)
    if NEXT:
        stored = tl.where(inside, total.to(y.dtype.element_ty).to(tl.float32), 0.0)
        tl.store(weighted + place, stored * weight, mask=inside)
        tl.store(squares + token * blocks + block, tl.sum(stored * stored, axis=0))


@triton.jit
def _total(partial, bias, stride, columns, within, inside, parts, BIAS: tl.constexpr, COLUMNS: tl.constexpr,
           PARTS: tl.constexpr):  # fmt: skip
    """What all parts have left at `columns`, added up in a fixed order, and the bias of one segment."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        left = tl.load(partial + part[:, None] * stride + columns[None, :], mask=(part < parts)[:, None], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        total += tl.sum(left, axis=0)
    if BIAS:
        total += tl.load(bias + within, mask=inside, other=0.0)
    return total


@dataclass(frozen=True)
class Grid:
    """How many programs of each kind a launch has, how long their stretches are, and what of one a list may hold."""

    tokens: int
    columns: int
    z_stretches: int
    z_blocks: int
    blocks: int
    splits: int
    stretch: int
    rank_rows: int
    rank_tiles: int
    listing: int

    @property
    def z_programs(self) -> int:
        return self.tokens * self.z_stretches * self.z_blocks

    @property
    def parts(self) -> int:
        """Programs that leave sums at one block of columns."""
        return self.splits + self.rank_tiles

    @property
    def programs(self) -> int:
        return self.z_programs + self.blocks * self.parts


def grid_of(packed: Packed, configuration: Configuration, tokens: int = 1) -> Grid:
    """The grid of one launch. ValueError for more tokens than `MOST_TOKENS`, or than 1 for INT4, and for a
    configuration that does not fit the table."""
    int4 = packed.scales is not None
    most = 1 if int4 else MOST_TOKENS
    if not 1 <= tokens <= most:
        raise ValueError(f"{tokens} tokens; expected 1 to {most}")
    n, r, segments, columns = packed.channels, packed.B.shape[1], len(packed.widths), configuration.columns
    if any(width % columns for width in packed.padded):
        raise ValueError(f"columns is {columns}; expected a divisor of the segments' {packed.padded}")
    if int4 and (columns < COLUMNS or not 8 <= configuration.rows <= GROUP or configuration.warps > 1):
        raise ValueError(f"{configuration}; expected at least {COLUMNS} columns, 8 to {GROUP} rows and 1 warp for INT4")
    stretch = _up(-(-n // configuration.splits), GROUP if int4 else configuration.rows)
    listed = configuration.listed or tokens > 1
    rank_rows = max(min(32, 2048 // columns), 16 if tokens > 1 else 1)
    return Grid(
        tokens, columns, -(-n // Z_STRETCH) if r else 0, segments * -(-r // Z_RANKS.value),
        sum(packed.padded) // columns, -(-n // stretch), stretch, rank_rows, -(-r // rank_rows),
        stretch if listed else 0,
    )  # fmt: skip


def _up(value: int, multiple: int) -> int:
    return value + -value % multiple


@dataclass
class Workspace:
    """What a launch leaves for itself: partial sums, z, arrivals (zero between launches) and lists. For one stream."""

    partial: Tensor
    z: Tensor
    flags: Tensor
    scratch: Tensor


def workspace(packed: Packed, configuration: Configuration, tokens: int = 1) -> Workspace:
    """Memory for launches of `packed` under `configuration`, of up to `tokens`."""
    grids, device = [grid_of(packed, configuration, count) for count in {1, tokens}], packed.table.device
    partial = max(grid.parts * grid.tokens for grid in grids) * sum(packed.padded)
    z = max(grid.tokens * grid.z_stretches for grid in grids) * packed.B.shape[0] * packed.B.shape[1]
    lists = max(grid.blocks * grid.splits * grid.listing for grid in grids)
    return Workspace(
        torch.empty(partial, device=device),
        torch.empty(max(1, z), device=device),
        torch.zeros(2 + max(grid.blocks for grid in grids), dtype=torch.int32, device=device),
        torch.empty(max(1, lists), dtype=torch.int32, device=device),
    )


@cache
def chained(device: torch.device) -> bool:
    """Whether a launch may begin while the one before still runs (programmatic dependent launch, sm_90 on)."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


@dataclass
class Left:
    """What a launch leaves of y for the norm of the next one. weighted: (tokens, m) float32, y times the norm's weight.
    squares: (tokens, blocks) float32, of y."""

    weighted: Tensor
    squares: Tensor


def left(packed: Packed, configuration: Configuration, tokens: int = 1) -> Left:
    """Memory for it. ValueError for several segments: a norm reads one y."""
    if len(packed.widths) > 1:
        raise ValueError(f"segments are {packed.widths} wide; expected one, which a norm can read")
    device, blocks = packed.table.device, grid_of(packed, configuration).blocks
    return Left(torch.empty(tokens, packed.rows, device=device), torch.empty(tokens, blocks, device=device))


def gemv(x: Tensor, packed: Packed, gated: bool, configuration: Configuration, work: Workspace,
         front: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None, before: Left | None = None,
         next: Tensor | None = None, after: Left | None = None) -> Tensor:  # fmt: skip
    """x (tokens, n) -> (tokens, m), or (tokens, m / 2) where `gated`; in the dtype of x.

    front: (n,) weight of an RMS norm that x passes first, with `eps`; before: what the launch that made x left for it.
    residual: added to y, of its shape. next: (m,) weight of the norm that reads y; what it needs goes into `after`.
    """
    grid = grid_of(packed, configuration, len(x))
    y = torch.empty(len(x), packed.rows // 2 if gated else packed.rows, dtype=x.dtype, device=x.device)
    linked = chained(x.device)
    given = arguments(x, packed, grid, work, y, front, eps, residual, before, next, after)
    fixed = constants(packed, gated, configuration, grid, given)
    _gemv[(grid.programs,)](
        **given, **fixed, CHAINED=linked, INTERPRETED=INTERPRETED, num_warps=configuration.warps, launch_pdl=linked,
        maxnreg=most_registers(packed, configuration),
    )
    return y


def most_registers(packed: Packed, configuration: Configuration) -> int | None:
    """Of a thread, see MOST_REGISTERS; None for as many as it wants."""
    plain = packed.scales is not None and packed.dtype == torch.float32
    return None if plain or configuration.warps > 1 else MOST_REGISTERS


def arguments(x: Tensor, packed: Packed, grid: Grid, work: Workspace, y: Tensor, front: Tensor | None, eps: float,
              residual: Tensor | None, before: Left | None = None, next: Tensor | None = None,
              after: Left | None = None) -> dict:  # fmt: skip
    """What a launch is given."""
    if before is not None:
        x, front = before.weighted, before.squares
    m0, m1, m2 = packed.widths + (0,) * (MOST_SEGMENTS - len(packed.widths))
    first, second = (*(width // grid.columns for width in packed.padded), 0, 0)[:2]
    return dict(
        x=x, table=packed.table, A=packed.A, B=packed.B, scales=packed.scales, ranks=packed.ranks,
        thresholds=packed.thresholds, norms=packed.norms, bias=packed.bias, front=front, residual=residual, y=y,
        next=next, weighted=after and after.weighted, squares=after and after.squares, partial=work.partial, z=work.z,
        flags=work.flags, scratch=work.scratch, eps=eps, n=packed.channels, m=sum(packed.padded), r=packed.B.shape[1],
        m0=m0, m1=m1, m2=m2, splits=grid.splits, stretch=grid.stretch, rank_tiles=grid.rank_tiles,
        z_programs=grid.z_programs, z_blocks=grid.z_blocks, z_stretches=grid.z_stretches,
        blocks=grid.blocks, first=first, second=second, places=before.squares.shape[1] if before else 0,
    )  # fmt: skip


def constants(packed: Packed, gated: bool, configuration: Configuration, grid: Grid, given: dict) -> dict:
    """What a launch that is `given` arguments is compiled for, apart from dtypes."""
    front = 0 if given["front"] is None else tiles.LEFT.value if given["places"] else tiles.OWN.value
    least = 1 if packed.dtype == torch.float32 else 16  # tokens of a product on tensor cores
    pad = max(least, triton.next_power_of_2(grid.tokens)) if grid.tokens > 1 else 1
    width = grid.columns // 2 if packed.scales is not None else grid.columns * packed.dtype.itemsize  # bytes of a row
    sub = max(1, 32 * configuration.warps * 16 // width)  # rows that a program's threads load at once
    rows = configuration.rows
    if grid.tokens > 1:  # whose sums take registers too
        rows = min(rows, max(16, 2048 * configuration.warps // grid.columns))
    return dict(
        TOKENS=grid.tokens, PAD=pad, SEGMENTS=len(packed.widths), NORMS=packed.norms is not None,
        BIAS=packed.bias is not None, FRONT=front, RESIDUAL=given["residual"] is not None,
        NEXT=given["next"] is not None, GATED=gated, PLACES=triton.next_power_of_2(max(1, given["places"])),
        INT4=packed.scales is not None, LISTED=configuration.listed, COLUMNS=grid.columns, ROWS=rows,
        SUB=min(sub, rows), RANK_ROWS=grid.rank_rows, PARTS=2048 * configuration.warps // grid.columns,
        Z_WIDTH=1024 // packed.dtype.itemsize, NORM_WIDTH=4096 // packed.dtype.itemsize,
        STRETCHES=triton.next_power_of_2(max(1, grid.z_stretches)), Z_STRETCH=Z_STRETCH,
        VOTES=configuration.warps == 1 and not INTERPRETED,
    )  # fmt: skip

"""The product of one token or a few on a GPU, in one launch, with the same bits from run to run.

The grid has three kinds of programs. The first ones compute z = B^T (x - s(x)), each over some ranks and a stretch of
channels. The next ones, one per block of columns and stretch of channels, read the kept channels' rows of W^T. The last
ones, one per block of columns and tile of ranks, read A^T's rows, which they load before they wait for z. Whoever is
the last to arrive at a block of columns adds up what all have left there, in a fixed order: no floating-point atomics.
A launch may begin while the one before still runs: A and B, which every token reads, are on their way by the time that
x is there.

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

from kernels import triton_batch as batch
from kernels import triton_lists as lists
from kernels import triton_tiles as tiles
from kernels.packing import COLUMNS, Packed
from kernels.quantized import GROUP

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_SEGMENTS = 3
"""Linears side by side: q, k and v."""
MOST_TOKENS = 16
"""Tokens of one launch."""
LEAST_TOKENS = 16
"""Of a product on tensor cores: fewer are padded."""
MOST_TOGETHER = 4
"""Tokens whose z a program computes, or whose parts it adds up, at once: what registers hold."""
MOST_REGISTERS = 128
"""Of a thread where programs are one warp, for one token: a few spilled ones cost less than the warp that they would
displace. INT4 beside float32 is plain arithmetic, and needs more."""
Z_RANKS = tl.constexpr(4)
"""Ranks of a program that computes z."""
Z_STRETCH = 2048
"""Channels of one such program."""
LIST = 256
"""Channels that a warp compacts at once."""


@dataclass(frozen=True)
class Configuration:
    """How a launch is cut up; results differ between configurations by rounding only.

    columns: of a block. rows: of a tile. splits: stretches of channels per block of columns.
    warps: per program. listed: kept channels are compacted into a list first, so that all loads of a tile are in
    flight; else tiles are masked; those of several tokens always are.
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
    flags, scratch, values, eps, n, m, r, m0, m1, m2, splits, stretch, rank_tiles, z_programs, z_blocks, z_stretches,
    blocks, first, second, places,
    TOKENS: tl.constexpr, PAD: tl.constexpr, TOGETHER: tl.constexpr, SEGMENTS: tl.constexpr, NORMS: tl.constexpr,
    BIAS: tl.constexpr, FRONT: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr, GATED: tl.constexpr,
    INT4: tl.constexpr, LISTED: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SUB: tl.constexpr, LIST: tl.constexpr, RANK_ROWS: tl.constexpr,
    PARTS: tl.constexpr, Z_WIDTH: tl.constexpr, NORM_WIDTH: tl.constexpr, STRETCHES: tl.constexpr,
    Z_STRETCH: tl.constexpr, PLACES: tl.constexpr, VOTES: tl.constexpr, SHARED: tl.constexpr,
    CHAINED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """See the module. m: padded columns; m0, m1, m2: outputs of each segment, first, second: blocks of the first two.
    next: weight of the norm that reads y; weighted, squares: what is left for it, where NEXT, see triton_tiles.LEFT.
    flags: arrivals at z, leavers of the rank path, then arrivals at each block of outputs; all 0 before and after."""
    program = tl.program_id(0)
    number = program - z_programs
    block, split = number % blocks, number // blocks
    segment = (block >= first).to(tl.int32) + (block >= first + second).to(tl.int32)
    if CHAINED:
        if program < z_programs:
            _fetch_z(B, ranks, program, n, r, z_blocks, z_stretches, Z_STRETCH)
        elif split >= splits:
            rank = (split - splits) * RANK_ROWS
            tiles.fetch(A, m, rank, RANK_ROWS, tl.load(ranks + segment), block * COLUMNS, COLUMNS, m)
        gdc_wait()  # launched while the operation before still runs
    if program < z_programs:
        _leave_z(x, B, ranks, thresholds, norms, front, eps, z, program, n, r, z_blocks, z_stretches, places, TOKENS,
                 TOGETHER, SEGMENTS, NORMS, FRONT, Z_WIDTH, Z_STRETCH, NORM_WIDTH, PLACES)  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(flags, 1, sem="release")
        if CHAINED:
            gdc_launch_dependents()
        return
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    out = partial + split * TOKENS * m
    if split < splits:
        start = split * stretch
        _sparse_path(
            x, table, scales, thresholds, norms, front, eps, scratch, values, number.to(tl.int64), out, n, m, block,
            segment, columns, start, tl.minimum(start + stretch, n), stretch, places, TOKENS, PAD, NORMS, FRONT, INT4,
            LISTED, COLUMNS, ROWS, SUB, LIST, NORM_WIDTH, PLACES, VOTES, SHARED, INTERPRETED,
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
        _reduce(partial, bias, residual, y, next, weighted, squares, m, parts, place, segment, m0, m1, m2, first,
                second, blocks, TOKENS, TOGETHER, BIAS, RESIDUAL, NEXT, GATED, COLUMNS, PARTS)  # fmt: skip


@triton.jit
def _place_of_z(index, r, z_blocks, z_stretches):
    """Which stretch, segment and first rank the z program `index` computes."""
    per_segment, rest = tl.cdiv(r, Z_RANKS), index % z_blocks
    return index // z_blocks % z_stretches, rest // per_segment, rest % per_segment * Z_RANKS


@triton.jit
def _fetch_z(B, ranks, index, n, r, z_blocks, z_stretches, Z_STRETCH: tl.constexpr):
    """Asks for what `_leave_z` reads of B."""
    part, segment, rank = _place_of_z(index, r, z_blocks, z_stretches)
    rows = B + (segment * r).to(tl.int64) * n
    tiles.fetch(rows, n, rank, Z_RANKS, tl.load(ranks + segment), part * Z_STRETCH, Z_STRETCH, n)


@triton.jit
def _leave_z(x, B, ranks, thresholds, norms, front, eps, z, index, n, r, z_blocks, z_stretches, places,
             TOKENS: tl.constexpr, TOGETHER: tl.constexpr, SEGMENTS: tl.constexpr, NORMS: tl.constexpr,
             FRONT: tl.constexpr, WIDTH: tl.constexpr, Z_STRETCH: tl.constexpr, NORM_WIDTH: tl.constexpr,
             PLACES: tl.constexpr):  # fmt: skip
    """z of some ranks over a stretch of channels, of one token or of TOGETHER. index: of the program."""
    part, segment, rank = _place_of_z(index, r, z_blocks, z_stretches)
    own, used = rank + tl.arange(0, Z_RANKS), tl.load(ranks + segment)
    begin, threshold = part * Z_STRETCH, tl.load(thresholds + segment)
    end, of_segment = tl.minimum(begin + Z_STRETCH, n), norms + segment * n if NORMS else norms
    out, stride = z + (part * SEGMENTS + segment) * r + own, z_stretches * SEGMENTS * r
    if TOKENS > 1:
        token = index // (z_stretches * z_blocks) * TOGETHER
        scales = batch.scales_of(x, front, n, eps, places, token, TOGETHER, TOKENS, FRONT, NORM_WIDTH, PLACES)
        totals = batch.z_part(x, B, front, scales, of_segment, threshold, n, r, segment, own, used, token, begin, end,
                              TOKENS, TOGETHER, Z_RANKS, WIDTH, NORMS, FRONT)  # fmt: skip
        for i in tl.static_range(TOGETHER):
            tl.store(out + (token + i) * stride, totals[i], mask=(own < r) & (token + i < TOKENS))
    else:
        scale = tiles.scale_of(x, front, n, eps, places, FRONT, NORM_WIDTH, PLACES)
        total = tiles.z_part(x, B, front, scale, of_segment, threshold, n, r, segment, own, used, begin, end, Z_RANKS,
                             WIDTH, NORMS, FRONT)  # fmt: skip
        tl.store(out, total, mask=own < r)


@triton.jit
def _sparse_path(
    x, table, steps, thresholds, norms, front, eps, scratch, values, number, out, n, m, block, segment, columns, start,
    end, stretch, places, TOKENS: tl.constexpr, PAD: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr,
    INT4: tl.constexpr, LISTED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SUB: tl.constexpr,
    LIST: tl.constexpr, NORM_WIDTH: tl.constexpr, PLACES: tl.constexpr, VOTES: tl.constexpr, SHARED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Leaves the sum over the kept channels of start..end at `out`. number: of the program, for its list."""
    threshold = tl.load(thresholds + segment)
    own = norms + segment * n if NORMS else norms
    if TOKENS > 1:
        length = tl.multiple_of(stretch + ROWS, 16)  # so that loads of a list are seen to be wide
        entries, beside = scratch + number * length, values + number * length * TOKENS
        scales = batch.scales_of(x, front, n, eps, places, 0, TOKENS, TOKENS, FRONT, NORM_WIDTH, PLACES)
        count = batch.list_kept(x, front, scales, own, threshold, n, start, end, entries, beside, length, TOKENS, ROWS,
                                LIST, NORMS, FRONT, VOTES)  # fmt: skip
        sums = batch.listed(table, entries, beside, length, count, m, columns, TOKENS, PAD, ROWS, COLUMNS, INTERPRETED)
        _leave(out, sums, m, columns, TOKENS, PAD)
    else:
        entries = lists.own_memory(SHARED) if SHARED else scratch + number * stretch
        scale = tiles.scale_of(x, front, n, eps, places, FRONT, NORM_WIDTH, PLACES)
        if INT4:
            tiles.int4(x, table, steps, front, scale, own, threshold, start, end, m, block, entries, out, LISTED, ROWS,
                       COLUMNS, NORMS, FRONT, VOTES, SHARED, INTERPRETED)  # fmt: skip
        elif LISTED:
            count = tiles.list_kept(x, front, scale, own, threshold, start, end, entries, LIST, NORMS, FRONT, VOTES,
                                    SHARED)  # fmt: skip
            sums = tiles.listed(x, table, front, scale, entries, start, count, m, columns, ROWS, SUB, COLUMNS, FRONT,
                                SHARED, INTERPRETED)  # fmt: skip
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
def _reduce(partial, bias, residual, y, next, weighted, squares, m, parts, block, segment, m0, m1, m2, first, second,
            blocks, TOKENS: tl.constexpr, TOGETHER: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
            NEXT: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Outputs of all tokens at a block of columns, out of all parts."""
    if TOKENS == 1:
        _outputs(partial, bias, residual, y, next, weighted, squares, 0, m, parts, block, segment, m0, m1, m2, first,
                 second, blocks, TOKENS, BIAS, RESIDUAL, NEXT, GATED, COLUMNS, PARTS)  # fmt: skip
    else:
        for begin in range(0, TOKENS, TOGETHER):
            token = begin + tl.arange(0, TOGETHER)
            _outputs(partial, bias, residual, y, next, weighted, squares, token, m, parts, block, segment, m0, m1, m2,
                     first, second, blocks, TOKENS, BIAS, RESIDUAL, NEXT, GATED, COLUMNS, PARTS)  # fmt: skip


@triton.jit
def _outputs(partial, bias, residual, y, next, weighted, squares, token, m, parts, block, segment, m0, m1, m2, first,
             second, blocks, TOKENS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr,
             GATED: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Of one token, or of a vector of them. What is added or multiplied is loaded first, to come while the parts do."""
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    if GATED:
        within, inside, start, width, of_bias = columns, columns < m0, 0, m0, bias
    else:
        before = tl.where(segment == 0, 0, tl.where(segment == 1, first, first + second)) * COLUMNS
        start = tl.where(segment == 0, 0, tl.where(segment == 1, m0, m0 + m1))
        within, width = columns - before, m0 + m1 + m2
        inside = within < tl.where(segment == 0, m0, tl.where(segment == 1, m1, m2))
        of_bias = bias + start if BIAS else bias
    if TOKENS == 1:
        place, wanted = start + within, inside
    else:
        place = token[:, None] * width + (start + within)[None, :]
        wanted = (token < TOKENS)[:, None] & inside[None, :]
    if RESIDUAL:
        added = tl.load(residual + place, mask=wanted, other=0.0).to(tl.float32)
    if NEXT:  # of a single segment
        weight = tl.load(next + columns, mask=inside, other=0.0).to(tl.float32)
    total = _total(partial, of_bias, token, m, columns, within, inside, parts, TOKENS, BIAS, COLUMNS, PARTS)
    if GATED:
        up = _total(partial, bias + m0 if BIAS else bias, token, m, first * COLUMNS + columns, columns, inside, parts,
                    TOKENS, BIAS, COLUMNS, PARTS)  # fmt: skip
        total = total * tl.sigmoid(total) * up
    if RESIDUAL:
        total += added
    tl.store(y + place, total, mask=wanted)
    if NEXT:
        stored = tl.where(wanted, total.to(y.dtype.element_ty).to(tl.float32), 0.0)
        if TOKENS == 1:
            tl.store(weighted + place, stored * weight, mask=wanted)
            tl.store(squares + block, tl.sum(stored * stored, axis=0))
        else:
            tl.store(weighted + place, stored * weight[None, :], mask=wanted)
            tl.store(squares + token * blocks + block, tl.sum(stored * stored, axis=1), mask=token < TOKENS)


@triton.jit
def _total(partial, bias, token, m, columns, within, inside, parts, TOKENS: tl.constexpr, BIAS: tl.constexpr,
           COLUMNS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """What all parts have left at `columns`, added up in a fixed order, and the bias of one segment."""
    if TOKENS > 1:
        total = batch.total(partial, token, m, columns, parts, TOKENS, COLUMNS, PARTS)
    else:
        total = tl.zeros((COLUMNS,), tl.float32)
        for begin in range(0, parts, PARTS):
            part = begin + tl.arange(0, PARTS)
            left = tl.load(partial + part[:, None] * m + columns[None, :], mask=(part < parts)[:, None], other=0.0,
                           cache_modifier=".cg")  # fmt: skip
            total += tl.sum(left, axis=0)
    if BIAS:
        added = tl.load(bias + within, mask=inside, other=0.0)
        total += added if TOKENS == 1 else added[None, :]
    return total


@dataclass(frozen=True)
class Grid:
    """How many programs of each kind a launch has, how long their stretches are, and how many entries the list of one
    has: in shared memory, or in the workspace."""

    tokens: int
    columns: int
    z_stretches: int
    z_blocks: int
    blocks: int
    splits: int
    stretch: int
    rank_rows: int
    rank_tiles: int
    shared: int
    scratch: int

    @property
    def together(self) -> int:
        """Tokens whose z a program computes, or whose parts it adds up, at once."""
        return min(MOST_TOGETHER, triton.next_power_of_2(self.tokens))

    @property
    def z_programs(self) -> int:
        return -(-self.tokens // self.together) * self.z_stretches * self.z_blocks

    @property
    def parts(self) -> int:
        """Programs that leave sums at one block of columns."""
        return self.splits + self.rank_tiles

    @property
    def programs(self) -> int:
        return self.z_programs + self.blocks * self.parts


def grid_of(packed: Packed, configuration: Configuration, tokens: int = 1) -> Grid:
    """The grid of one launch. ValueError for more tokens than `MOST_TOKENS`, or than 1 for INT4, more segments than
    `MOST_SEGMENTS`, and for a configuration that does not fit the table."""
    int4 = packed.scales is not None
    most = 1 if int4 else MOST_TOKENS
    if not 1 <= tokens <= most:
        raise ValueError(f"{tokens} tokens; expected 1 to {most}")
    n, r, segments, columns = packed.channels, packed.B.shape[1], len(packed.widths), configuration.columns
    if segments > MOST_SEGMENTS:
        raise ValueError(f"segments are {packed.widths} wide; expected at most {MOST_SEGMENTS} for one launch")
    if any(width % columns for width in packed.padded):
        raise ValueError(f"columns is {columns}; expected a divisor of the segments' {packed.padded}")
    rows, warps = configuration.rows, configuration.warps
    if tokens > 1 and (rows < 16 or rows * columns > 8192 or columns * MOST_TOGETHER > 2048 * warps):
        raise ValueError(f"{configuration}; expected at least 16 rows, tiles of at most 8192 weights and "
                         f"{2048 // MOST_TOGETHER} columns a warp for several tokens")  # fmt: skip
    if int4 and (columns < COLUMNS or not 8 <= configuration.rows <= GROUP or configuration.warps > 1):
        raise ValueError(f"{configuration}; expected at least {COLUMNS} columns, 8 to {GROUP} rows and 1 warp for INT4")
    stretch = _up(-(-n // configuration.splits), GROUP if int4 else configuration.rows)
    entries = stretch + (rows if tokens > 1 else 0) if configuration.listed or tokens > 1 else 0
    fits = entries and tokens == warps == 1 and rows <= GROUP and not INTERPRETED
    shared = lists.shared_entries(stretch) if fits else 0
    rank_rows = max(min(32, 2048 // columns), 16 if tokens > 1 else 1)
    return Grid(
        tokens, columns, -(-n // Z_STRETCH) if r else 0, segments * -(-r // Z_RANKS.value),
        sum(packed.padded) // columns, -(-n // stretch), stretch, rank_rows, -(-r // rank_rows), shared,
        0 if shared else entries,
    )  # fmt: skip


def _up(value: int, multiple: int) -> int:
    return value + -value % multiple


@dataclass
class Workspace:
    """What a launch leaves for itself: partial sums, z, arrivals (zero between launches), lists that are not in shared
    memory and, of several tokens, s(x) there. For one stream."""

    partial: Tensor
    z: Tensor
    flags: Tensor
    scratch: Tensor
    values: Tensor


def workspace(packed: Packed, configuration: Configuration, tokens: int = 1) -> Workspace:
    """Memory for launches of `packed` under `configuration`, of up to `tokens`."""
    grids, device = [grid_of(packed, configuration, count) for count in {1, tokens}], packed.table.device
    partial = max(grid.parts * grid.tokens for grid in grids) * sum(packed.padded)
    z = max(grid.tokens * grid.z_stretches for grid in grids) * packed.B.shape[0] * packed.B.shape[1]
    scratch = [grid.blocks * grid.splits * grid.scratch for grid in grids]
    values = max(x * grid.tokens if grid.tokens > 1 else 0 for x, grid in zip(scratch, grids, strict=True))
    return Workspace(
        torch.empty(partial, device=device),
        torch.empty(max(1, z), device=device),
        torch.zeros(2 + max(grid.blocks for grid in grids), dtype=torch.int32, device=device),
        torch.empty(max(1, *scratch), dtype=torch.int32, device=device),
        torch.empty(max(1, values), dtype=packed.dtype, device=device),
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
        maxnreg=most_registers(packed, configuration, grid.tokens),
    )
    return y


def most_registers(packed: Packed, configuration: Configuration, tokens: int = 1) -> int | None:
    """Of a thread, see MOST_REGISTERS; None for as many as it wants."""
    plain = packed.scales is not None and packed.dtype == torch.float32
    return None if plain or tokens > 1 or configuration.warps > 1 else MOST_REGISTERS


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
        flags=work.flags, scratch=work.scratch, values=work.values, eps=eps, n=packed.channels, m=sum(packed.padded),
        r=packed.B.shape[1], m0=m0, m1=m1, m2=m2, splits=grid.splits, stretch=grid.stretch, rank_tiles=grid.rank_tiles,
        z_programs=grid.z_programs, z_blocks=grid.z_blocks, z_stretches=grid.z_stretches,
        blocks=grid.blocks, first=first, second=second, places=before.squares.shape[1] if before else 0,
    )  # fmt: skip


def constants(packed: Packed, gated: bool, configuration: Configuration, grid: Grid, given: dict) -> dict:
    """What a launch that is `given` arguments is compiled for, apart from dtypes."""
    front = 0 if given["front"] is None else tiles.LEFT.value if given["places"] else tiles.OWN.value
    least = 1 if packed.dtype == torch.float32 else LEAST_TOKENS
    pad = max(least, triton.next_power_of_2(grid.tokens)) if grid.tokens > 1 else 1
    width = grid.columns // 2 if packed.scales is not None else grid.columns * packed.dtype.itemsize  # bytes of a row
    sub = max(1, 32 * configuration.warps * 16 // width)  # rows that a program's threads load at once
    rows, warps = configuration.rows, configuration.warps
    return dict(
        TOKENS=grid.tokens, PAD=pad, TOGETHER=grid.together, SEGMENTS=len(packed.widths),
        NORMS=packed.norms is not None, BIAS=packed.bias is not None, FRONT=front,
        RESIDUAL=given["residual"] is not None, NEXT=given["next"] is not None, GATED=gated,
        PLACES=triton.next_power_of_2(max(1, given["places"])), INT4=packed.scales is not None,
        LISTED=configuration.listed, COLUMNS=grid.columns, ROWS=rows, SUB=min(sub, rows),
        LIST=LIST * (warps if grid.tokens > 1 else 1), RANK_ROWS=grid.rank_rows, PARTS=2048 * warps // grid.columns,
        Z_WIDTH=1024 // packed.dtype.itemsize, NORM_WIDTH=4096 // packed.dtype.itemsize,
        STRETCHES=triton.next_power_of_2(max(1, grid.z_stretches)), Z_STRETCH=Z_STRETCH,
        VOTES=warps == 1 and not INTERPRETED, SHARED=grid.shared,
    )  # fmt: skip

"""One token's attention over a cache on a GPU, in one launch: rotation, cache and softmax, with the same bits from run
to run.

A program takes a tile of positions and query heads that share a head of keys: a split softmax, as Flash-Decoding's
(https://pytorch.org/blog/flash-decoding/). Keys and values are asked for before the launch waits for the operation
before it, which wrote none of them; the token's own come from that operation, and a program of the token's tile writes
them down. Whoever is the last to arrive at its heads adds up what all have left, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_gemv import chained, gdc_launch_dependents, gdc_wait

WARPS = 4
PARTS = tl.constexpr(16)
"""Tiles that are added up at once."""
SMALLEST = 32
LARGEST = 64
"""Positions of a tile; a chunk of the cache is a multiple of the largest."""


LONG = 2048
"""Positions from which the query heads of a group share a program, and read their keys once; fewer are a matter of
latency, and every head has its own."""


def tile(itemsize: int, span: int) -> int:
    """Positions of a program: what registers hold, and fewer programs of a long text."""
    return SMALLEST if itemsize == 4 or span <= 1024 else LARGEST


@triton.jit
def _rotated(x, cos1, sin1, cos2, sin2, place, half: tl.constexpr):
    """Both halves of a head at x, turned, in the precision of x."""
    left, right = tl.load(x + place), tl.load(x + half + place)
    wide1, wide2 = left.to(tl.float32), right.to(tl.float32)
    return (wide1 * cos1 - wide2 * sin1).to(left.dtype), (wide2 * cos2 + wide1 * sin2).to(left.dtype)


@triton.jit
def _attend(
    qkv, cos, sin, position, keys, values, y, partial, sums, flags, rows, chunk, window, scale, splits,
    HEADS: tl.constexpr, KV: tl.constexpr, MEMBERS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """See the module. qkv (rows, (HEADS + 2 KV) DIM); cos and sin (positions, DIM); keys and values (chunks, rows, KV,
    chunk, DIM); y (rows, HEADS DIM); partial (rows HEADS, splits, DIM) and sums (rows HEADS, splits, 2) float32: what
    tiles leave; flags (rows HEADS / MEMBERS): arrivals, 0 before and after. MEMBERS: query heads of a program."""
    own, split = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    teams: tl.constexpr = HEADS // MEMBERS
    row, query = own // teams, own % teams * MEMBERS  # the first one
    head = query // (HEADS // KV)
    now = tl.load(position).to(tl.int32)
    first = tl.maximum(0, now + 1 - window) if WINDOW else 0
    begin = split * TILE
    low, high = first // TILE, now // TILE
    if (split < low) | (split > high):
        return
    at = begin + tl.arange(0, TILE)
    inside = (at >= first) & (at <= now)
    known = (at >= first) & (at < now)
    base = ((((begin // chunk).to(tl.int64) * rows + row) * KV + head) * chunk + begin % chunk) * DIM
    within = tl.arange(0, TILE)[:, None] * DIM
    place, both = tl.arange(0, half), tl.arange(0, DIM)
    k1 = tl.load(keys + base + within + place[None, :], mask=known[:, None], other=0.0)
    k2 = tl.load(keys + base + within + half + place[None, :], mask=known[:, None], other=0.0)
    v = tl.load(values + base + within + both[None, :], mask=known[:, None], other=0.0)
    turn = now * DIM + place
    cos1, cos2 = tl.load(cos + turn).to(tl.float32), tl.load(cos + turn + half).to(tl.float32)
    sin1, sin2 = tl.load(sin + turn).to(tl.float32), tl.load(sin + turn + half).to(tl.float32)
    if CHAINED:
        gdc_wait()
    given = qkv + row.to(tl.int64) * (HEADS + 2 * KV) * DIM
    if split == high:
        new1, new2 = _rotated(given + (HEADS + head) * DIM, cos1, sin1, cos2, sin2, place, half)
        new_v = tl.load(given + (HEADS + KV + head) * DIM + both)
        mine = (at == now)[:, None]
        k1, k2 = tl.where(mine, new1[None, :], k1), tl.where(mine, new2[None, :], k2)
        v = tl.where(mine, new_v[None, :], v)
        if query % (HEADS // KV) == 0:
            to = base + (now % TILE) * DIM
            tl.store(keys + to + place, new1)
            tl.store(keys + to + half + place, new2)
            tl.store(values + to + both, new_v)
    k1, k2, v = k1.to(tl.float32), k2.to(tl.float32), v.to(tl.float32)
    for member in tl.static_range(MEMBERS):
        q1, q2 = _rotated(given + (query + member) * DIM, cos1, sin1, cos2, sin2, place, half)
        score = tl.sum(k1 * q1.to(tl.float32)[None, :], axis=1) + tl.sum(k2 * q2.to(tl.float32)[None, :], axis=1)
        score = tl.where(inside, score * scale, float("-inf"))
        most = tl.max(score, axis=0)
        weight = tl.exp(score - most)
        left = ((row * HEADS + query + member) * splits + split).to(tl.int64)
        tl.store(partial + left * DIM + both, tl.sum(weight[:, None] * v, axis=0))
        tl.store(sums + 2 * left, most)
        tl.store(sums + 2 * left + 1, tl.sum(weight, axis=0))
    if CHAINED:
        gdc_launch_dependents()
    tl.debug_barrier()
    if tl.atomic_add(flags + own, 1, sem="acq_rel") == high - low:
        tl.debug_barrier()
        tl.store(flags + own, 0)
        for member in tl.static_range(MEMBERS):
            output = (row * HEADS + query + member).to(tl.int64)
            _add_up(partial, sums, y + output * DIM, output * splits, low, high, DIM)


@triton.jit
def _add_up(partial, sums, y, left, low, high, DIM: tl.constexpr):
    """One head's output, out of what the tiles low..high left."""
    both = tl.arange(0, DIM)
    most = tl.full((PARTS,), float("-inf"), tl.float32)
    for begin in range(low, high + 1, PARTS):
        part = begin + tl.arange(0, PARTS)
        found = tl.load(sums + 2 * (left + part), mask=part <= high, other=float("-inf"), cache_modifier=".cg")
        most = tl.maximum(most, found)
    top = tl.max(most, axis=0)
    total, output = tl.zeros((PARTS,), tl.float32), tl.zeros((DIM,), tl.float32)
    for begin in range(low, high + 1, PARTS):
        part = begin + tl.arange(0, PARTS)
        there = part <= high
        share = tl.exp(tl.load(sums + 2 * (left + part), mask=there, other=float("-inf"), cache_modifier=".cg") - top)
        total += share * tl.load(sums + 2 * (left + part) + 1, mask=there, other=0.0, cache_modifier=".cg")
        found = tl.load(partial + (left + part)[:, None] * DIM + both[None, :], mask=there[:, None], other=0.0,
                        cache_modifier=".cg")  # fmt: skip
        output += tl.sum(share[:, None] * found, axis=0)
    tl.store(y + both, output / tl.sum(total, axis=0))


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor, heads: int, span: int,
           window: int | None, partial: Tensor, sums: Tensor, flags: Tensor) -> Tensor:  # fmt: skip
    """qkv (rows, width) of one token at `position` (1,) -> (rows, heads head_dim); its key and value go into keys and
    values (chunks, rows, kv_heads, chunk, head_dim), of which the first `span` positions are looked at."""
    _, rows, kv, chunk, dim = keys.shape
    size = tile(qkv.element_size(), span)
    y, splits = qkv.new_empty(rows, heads * dim), triton.cdiv(span, size)
    members, linked = heads // kv if span > LONG else 1, chained(qkv.device)
    _attend[(rows * heads // members, splits)](
        qkv, cos, sin, position, keys, values, y, partial, sums, flags, rows, chunk, window or 0, dim**-0.5, splits,
        HEADS=heads, KV=kv, MEMBERS=members, DIM=dim, TILE=size, WINDOW=window is not None, CHAINED=linked,
        num_warps=WARPS, launch_pdl=linked,
    )  # fmt: skip
    return y

"""Several tokens at once, in Triton: what their programs do instead of those of one, see triton_gemv and triton_tiles.

Every token keeps a mask of its own; the union of their channels is read. A program lists it beside every token's s(x)
there, so that the main loop has nothing to decide: its loads are copies into shared memory that run some tiles ahead,
and its product is one of tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import triton_lists as lists
from kernels import triton_tiles as tiles

STAGES = tl.constexpr(5)
"""Of the loop over tiles. A tile's weights wait for its list, which takes half of them: two tiles of weights are held.
"""


@triton.jit
def scales_of(x, front, n, eps, places, first, COUNT: tl.constexpr, TOKENS: tl.constexpr, FRONT: tl.constexpr,
              WIDTH: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """1 / rms of COUNT tokens from `first` on, the last one again beyond, or 1 without a norm: a tuple."""
    scales = ()
    for i in tl.static_range(COUNT):
        token = tl.minimum(first + i, TOKENS - 1)
        of_token = front + token * places if FRONT == tiles.LEFT else front
        scales = scales + (tiles.scale_of(x + token * n, of_token, n, eps, places, FRONT, WIDTH, PLACES),)
    return scales


@triton.jit
def list_kept(x, front, scales, norms, threshold, n, start, end, entries, values, stride, TOKENS: tl.constexpr,
              ROWS: tl.constexpr, LIST: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr,
              VOTES: tl.constexpr):  # fmt: skip
    """Writes the channels of start..end that any token keeps to `entries`, and s(x) of token i there to `values` from
    i * stride on, LIST channels at a time; how many there are. A tile of a channel that counts nothing follows."""
    count = 0
    for begin in range(start, end, LIST):
        channels = begin + tl.arange(0, LIST)
        keep, own = tl.zeros((LIST,), tl.int32), ()
        for token in tl.static_range(TOKENS):
            value, wanted = tiles.sparse(x + token * n, front, scales[token], norms, threshold, channels,
                                         channels < end, NORMS, FRONT)  # fmt: skip
            keep |= wanted.to(tl.int32)
            own = own + (value.to(values.dtype.element_ty),)
        place, found = lists.places_of(keep, VOTES)
        tl.store(entries + count + place, channels, mask=keep != 0)
        for token in tl.static_range(TOKENS):
            tl.store(values + token * stride + count + place, own[token], mask=keep != 0)
        count += found
    after = count + tl.arange(0, ROWS)
    tl.store(entries + after, tl.zeros((ROWS,), tl.int32) + start)
    for token in tl.static_range(TOKENS):
        tl.store(values + token * stride + after, tl.zeros((ROWS,), values.dtype.element_ty))
    tl.debug_barrier()
    return count


@triton.jit
def listed(table, entries, values, stride, count, m, columns, TOKENS: tl.constexpr, PAD: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Every token's sum over a list of `count` channels: (PAD, COLUMNS)."""
    sums = tl.zeros((PAD, COLUMNS), tl.float32)
    token, position = tl.arange(0, PAD)[:, None], tl.arange(0, ROWS)
    for begin in tl.range(0, count, ROWS, num_stages=STAGES):
        row = tl.load(entries + begin + position)
        value = tl.load(values + token * stride + begin + position[None, :], mask=token < TOKENS, other=0.0)
        weight = tl.load(table + row.to(tl.int64)[:, None] * m + columns[None, :], eviction_policy="evict_first")
        sums += tiles.product(value, weight, INTERPRETED)
    return sums


@triton.jit
def z_part(x, B, front, scales, norms, threshold, n, r, segment, ranks, used, first, start, end,
           TOKENS: tl.constexpr, TOGETHER: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, NORMS: tl.constexpr,
           FRONT: tl.constexpr):  # fmt: skip
    """`triton_tiles.z_part` of TOGETHER tokens from `first` on, the last one again beyond: a tuple of (RANKS,)."""
    rows = B + (segment * r + ranks).to(tl.int64)[:, None] * n
    sums = ()
    for _ in tl.static_range(TOGETHER):
        sums = sums + (tl.zeros((RANKS, WIDTH // 8), tl.float32),)
    for begin in range(start, end, WIDTH):
        channels = begin + tiles.place_of(WIDTH, 8)
        inside = channels < end
        weight = tl.load(
            rows[:, :, None] + channels[None, :, :], mask=(ranks < used)[:, None, None] & inside[None, :, :], other=0.0
        )  # fmt: skip
        found = ()
        for i in tl.static_range(TOGETHER):
            token = tl.minimum(first + i, TOKENS - 1)
            value = tiles.read(x + token * n, front, scales[i], channels, inside, FRONT)
            norm = tl.load(norms + channels, mask=inside, other=0.0) if NORMS else 1.0
            dropped = tl.where(tiles.kept(value, norm, threshold), 0.0, value)
            found = found + (sums[i] + tl.sum(weight.to(tl.float32) * dropped[None, :, :], axis=2),)
        sums = found
    totals = ()
    for i in tl.static_range(TOGETHER):
        totals = totals + (tl.sum(sums[i], axis=1),)
    return totals


@triton.jit
def total(partial, token, m, columns, parts, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """What all parts have left of the tokens `token` at `columns`, in a fixed order: (len(token), COLUMNS)."""
    EACH: tl.constexpr = PARTS // token.shape[0]
    sums = tl.zeros((token.shape[0], COLUMNS), tl.float32)
    for begin in range(0, parts, EACH):
        part = (begin + tl.arange(0, EACH))[:, None, None]
        left = tl.load(partial + (part * TOKENS + token[None, :, None]) * m + columns[None, None, :],
                       mask=(part < parts) & (token < TOKENS)[None, :, None], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        sums += tl.sum(left, axis=0)
    return sums

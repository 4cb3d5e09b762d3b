"""What one program of the kernels adds up, in Triton: a stretch of channels, or of ranks, times a block of columns.

Loads of weights must all be in flight before the first is used, and the next tile's mask must be known by then: each
loop issues its loads, passes a barrier that the assembler cannot sink them behind, reads x of the next tile, and only
then multiplies.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_flight(INTERPRETED: tl.constexpr):
    """0, known only after every load before it has been issued."""
    if INTERPRETED:
        return tl.full((), 0, tl.int32)
    return tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def kept(value, norm, threshold):
    """Above the threshold, or not a number."""
    return ~(tl.abs(value) * norm <= threshold)


@triton.jit
def place_of(ROWS: tl.constexpr, SUB: tl.constexpr):
    """(ROWS / SUB, SUB): 0 .. ROWS - 1, row by row. Sums over the first dimension stay within a thread."""
    return tl.arange(0, ROWS // SUB)[:, None] * SUB + tl.arange(0, SUB)[None, :]


@triton.jit
def inverse_rms(x, n, eps, WIDTH: tl.constexpr):
    """1 / rms(x) of one token; every program that asks finds the same bits."""
    squares = tl.zeros((WIDTH // 8,), tl.float32)
    for begin in range(0, n, WIDTH):
        channels = begin + place_of(WIDTH, 8)
        value = tl.load(x + channels, mask=channels < n, other=0.0).to(tl.float32)
        squares += tl.sum(value * value, axis=1)
    return tl.rsqrt(tl.sum(squares, axis=0) / n + eps)


OWN = tl.constexpr(1)
"""FRONT: 0 for x as it is; OWN for a norm of x, whose weight is `front`; LEFT for what the operation before left of it:
x is float32 and holds the product with the norm's weight, `front` sums of squares."""
LEFT = tl.constexpr(2)


@triton.jit
def scale_of(x, front, n, eps, places, FRONT: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr):
    """1 / rms of one token, or 1 without a norm. places: sums of squares that were left."""
    if FRONT == OWN:
        return inverse_rms(x, n, eps, WIDTH)
    elif FRONT == LEFT:
        place = tl.arange(0, PLACES)
        return tl.rsqrt(tl.sum(tl.load(front + place, mask=place < places, other=0.0), axis=0) / n + eps)
    else:
        return 1.0


@triton.jit
def read(x, front, scale, channels, inside, FRONT: tl.constexpr):
    """x at `channels` in float32; behind a norm of weight `front`, rounded where Llama's is."""
    value = tl.load(x + channels, mask=inside, other=0.0)
    if FRONT == LEFT:
        value = value * scale
    if FRONT == OWN:
        weight = tl.load(front + channels, mask=inside, other=0.0).to(tl.float32)
        rounded = (value.to(tl.float32) * scale).to(value.dtype).to(tl.float32)
        value = (rounded * weight).to(value.dtype)
    return value.to(tl.float32)


@triton.jit
def _sparse(x, front, scale, norms, threshold, channels, inside, NORMS: tl.constexpr, FRONT: tl.constexpr):
    """s(x) at `channels`, and which of them are kept."""
    value = read(x, front, scale, channels, inside, FRONT)
    norm = tl.load(norms + channels, mask=inside, other=0.0) if NORMS else 1.0
    keep = kept(value, norm, threshold) & inside
    return tl.where(keep, value, 0.0), keep


@triton.jit
def masked(x, table, front, scale, norms, threshold, start, end, m, columns, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Sum over the kept channels of start..end, tile by tile: (COLUMNS,). A row that is dropped is not read."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    rows = start + tl.arange(0, ROWS)
    value, keep = _sparse(x, front, scale, norms, threshold, rows, rows < end, NORMS, FRONT)
    for _ in range(start, end, ROWS):
        weight = tl.load(
            table + rows.to(tl.int64)[:, None] * m + columns[None, :], mask=keep[:, None], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        zero = in_flight(INTERPRETED)
        now = value + zero.to(tl.float32)
        rows += ROWS
        value, keep = _sparse(x + zero, front, scale, norms, threshold, rows, rows < end, NORMS, FRONT)
        sums += weight.to(tl.float32) * now[:, None]
    return tl.sum(sums, axis=0)


@triton.jit
def list_kept(x, front, scale, norms, threshold, start, end, entries, TOKENS: tl.constexpr, LIST: tl.constexpr,
              NORMS: tl.constexpr, FRONT: tl.constexpr):  # fmt: skip
    """Writes the channels of start..end that any token keeps to `entries`, `LIST` at a time; how many there are.
    scale: a scalar, or a vector for x, pointers, of several tokens."""
    count = 0
    for begin in range(start, end, LIST):
        rows = begin + tl.arange(0, LIST)
        if TOKENS == 1:
            _, wanted = _sparse(x, front, scale, norms, threshold, rows, rows < end, NORMS, FRONT)
            keep = wanted.to(tl.int32)
        else:
            _, own = _sparse(x, front, scale[:, None], norms, threshold, rows[None, :], (rows < end)[None, :], NORMS,
                             FRONT)  # fmt: skip
            keep = tl.max(own.to(tl.int32), axis=0)
        tl.store(entries + count + tl.cumsum(keep, axis=0) - 1, rows, mask=keep != 0)
        count += tl.sum(keep, axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def _entries(x, front, scale, entries, position, count, FRONT: tl.constexpr):
    """Channels and x at `position` of a list; 0 past its end."""
    inside = position < count
    row = tl.load(entries + position, mask=inside, other=0)
    return row, read(x, front, scale, row, inside, FRONT)


@triton.jit
def listed(x, table, front, scale, entries, count, m, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           FRONT: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """`masked` over a list of `count` kept channels, so that every tile is full; behind it, row 0 is read in vain."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    position = tl.arange(0, ROWS)
    row, value = _entries(x, front, scale, entries, position, count, FRONT)
    for _ in range(0, count, ROWS):
        weight = tl.load(
            table + row.to(tl.int64)[:, None] * m + columns[None, :], eviction_policy="evict_first"
        )  # fmt: skip
        zero = in_flight(INTERPRETED)
        now = value + zero.to(tl.float32)
        position += ROWS
        row, value = _entries(x, front, scale, entries + zero, position, count, FRONT)
        sums += weight.to(tl.float32) * now[:, None]
    return tl.sum(sums, axis=0)


@triton.jit
def batched(x, table, front, scale, norms, threshold, entries, count, m, columns, PAD: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr,
            INTERPRETED: tl.constexpr):  # fmt: skip
    """The same for several tokens, x (PAD, 1) pointers and scale (PAD,): (PAD, COLUMNS), over a list of the channels
    that any of them keeps."""
    sums = tl.zeros((PAD, COLUMNS), tl.float32)
    position = tl.arange(0, ROWS)
    for _ in range(0, count, ROWS):
        inside = position < count
        row = tl.load(entries + position, mask=inside, other=0)
        weight = tl.load(table + row.to(tl.int64)[:, None] * m + columns[None, :], eviction_policy="evict_first")
        value, _ = _sparse(x, front, scale[:, None], norms, threshold, row[None, :], inside[None, :], NORMS, FRONT)
        sums += product(value, weight, INTERPRETED)
        position += ROWS
    return sums


@triton.jit
def product(values, weight, INTERPRETED: tl.constexpr):
    """values (PAD, ROWS) in float32 times weight (ROWS, COLUMNS), at the precision of the weight."""
    if INTERPRETED:  # which takes the bits of bfloat16 for integers
        return tl.dot(values.to(weight.dtype).to(tl.float32), weight.to(tl.float32), input_precision="ieee")
    return tl.dot(values.to(weight.dtype), weight, input_precision="ieee")


@triton.jit
def _z(z, token, rank, used, segment, segments, stretches, r, STRETCHES: tl.constexpr):
    """z at `rank` of `token`: what all stretches of channels have left, added up in a fixed order."""
    value = tl.zeros_like(token + rank).to(tl.float32)
    for stretch in tl.static_range(STRETCHES):
        there = (rank < used) & (stretch < stretches)
        place = ((token * stretches + stretch) * segments + segment) * r + rank
        value += tl.load(z + place, mask=there, other=0.0, cache_modifier=".cg")
    return value


@triton.jit
def low_rank(A, z, ranks, tile, m, r, segment, segments, stretches, columns, flag, z_programs, TOKENS: tl.constexpr,
             PAD: tl.constexpr, ROWS: tl.constexpr, STRETCHES: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """One tile of A^T's rows times z: (COLUMNS,), or (PAD, COLUMNS) for several tokens. Loaded before it waits."""
    used = tl.load(ranks + segment)
    rank = tile * ROWS + tl.arange(0, ROWS)
    weight = tl.load(
        A + rank.to(tl.int64)[:, None] * m + columns[None, :], mask=(rank < used)[:, None], other=0.0
    )  # fmt: skip
    arrived = in_flight(INTERPRETED)
    while arrived < z_programs:
        arrived = tl.atomic_add(flag, 0, sem="acquire")
    if TOKENS == 1:
        value = _z(z, 0, rank, used, segment, segments, stretches, r, STRETCHES)
        return tl.sum(weight.to(tl.float32) * value[:, None], axis=0)
    else:
        token = tl.minimum(tl.arange(0, PAD), TOKENS - 1)[:, None]
        value = _z(z, token, rank[None, :], used, segment, segments, stretches, r, STRETCHES)
        return product(value, weight, INTERPRETED)


@triton.jit
def z_part(x, B, front, scale, norms, threshold, n, r, segment, ranks, start, end, RANKS: tl.constexpr,
           WIDTH: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr):  # fmt: skip
    """B^T (x - s(x)) of `ranks` over the channels start..end, of one token: (RANKS,)."""
    rows = B + (segment * r + ranks).to(tl.int64)[:, None] * n
    sums = tl.zeros((RANKS, WIDTH // 8), tl.float32)
    for begin in range(start, end, WIDTH):
        channels = begin + place_of(WIDTH, 8)
        inside = channels < end
        weight = tl.load(
            rows[:, :, None] + channels[None, :, :], mask=(ranks < r)[:, None, None] & inside[None, :, :], other=0.0
        )  # fmt: skip
        value = read(x, front, scale, channels, inside, FRONT)
        norm = tl.load(norms + channels, mask=inside, other=0.0) if NORMS else 1.0
        dropped = tl.where(kept(value, norm, threshold), 0.0, value)
        sums += tl.sum(weight.to(tl.float32) * dropped[None, :, :], axis=2)
    return tl.sum(sums, axis=1)


@triton.jit
def _nibble(word, K: tl.constexpr, INTERPRETED: tl.constexpr):
    """16^(K mod 4) times weight K of `word`: put into the mantissa of 2^23, which is then taken off exactly."""
    half = word >> 16 if K > 3 else word
    MASK: tl.constexpr = 15 << (4 * (K % 4))
    if INTERPRETED:
        bits = (half & MASK) | 0x4B000000
    else:  # (half & mask) | 2^23 in one instruction
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x4B000000, 0xEA;", "=r,r,n", [half, MASK], dtype=tl.int32, is_pure=True, pack=1
        )
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 8.0 * 16 ** (K % 4))


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return zeros


@triton.jit
def list_groups(x, front, scale, norms, threshold, start, end, entries, ROWS: tl.constexpr, NORMS: tl.constexpr,
                FRONT: tl.constexpr):  # fmt: skip
    """`list_kept` in tiles of ROWS entries, each of one group of 128 channels: what is left of a group's last tile is
    -1. How many tiles there are; none is without a channel."""
    tiles = 0
    place = tl.arange(0, 128)
    for begin in range(start, end, 128):
        _, wanted = _sparse(x, front, scale, norms, threshold, begin + place, begin + place < end, NORMS, FRONT)
        keep = wanted.to(tl.int32)
        count = tl.sum(keep, axis=0)
        own, whole = entries + tiles * ROWS, (count + ROWS - 1) // ROWS * ROWS
        tl.store(own + tl.cumsum(keep, axis=0) - 1, begin + place, mask=wanted)
        tl.store(own + place, tl.full((128,), -1, tl.int32), mask=(place >= count) & (place < whole))
        tiles += whole // ROWS
    tl.debug_barrier()
    return tiles


@triton.jit
def _tile(x, front, scale, norms, threshold, entries, start, end, number, tiles, place, ROWS: tl.constexpr,
          LISTED: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr):  # fmt: skip
    """Channels of tile `number`, s(x) there, which of them are read, and the group that all are of."""
    position = number * ROWS
    if LISTED:
        rows = tl.load(entries + position + place, mask=(number < tiles) & (place < ROWS), other=-1)
        keep = rows >= 0
        value = read(x, front, scale, rows, keep, FRONT)
        first = tl.load(entries + position, mask=number < tiles, other=start)
    else:
        rows = start + position + place
        value, keep = _sparse(x, front, scale, norms, threshold, rows, rows < end, NORMS, FRONT)
        first = tl.minimum(start + position, end - 1)
    return rows, tl.where(keep, value, 0.0), keep, first // 128


@triton.jit
def int4(x, table, steps, front, scale, norms, threshold, start, end, m, block, entries, out, LISTED: tl.constexpr,
         ROWS: tl.constexpr, SUB: tl.constexpr, COLUMNS: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr,
         INTERPRETED: tl.constexpr):  # fmt: skip
    """The sparse path of one token over INT4 weights, in tiles of channels of one group, which share their steps (their
    scales); start is a multiple of 128. Stores its sums at `out`."""
    WORDS: tl.constexpr = COLUMNS // 8
    word_of = tl.arange(0, WORDS)
    words, step_of = table + block * WORDS + word_of[None, None, :], steps + block * COLUMNS + word_of
    place = place_of(ROWS, SUB)
    if LISTED:
        tiles = list_groups(x, front, scale, norms, threshold, start, end, entries, ROWS, NORMS, FRONT)
    else:
        tiles = (end - start + ROWS - 1) // ROWS
    total = _zeros(SUB, WORDS, 8)
    rows, value, keep, group = _tile(x, front, scale, norms, threshold, entries, start, end, 0, tiles, place, ROWS,
                                     LISTED, NORMS, FRONT)  # fmt: skip
    for number in range(tiles):
        word = tl.load(words + rows.to(tl.int64)[:, :, None] * (m // 8), mask=keep[:, :, None], other=0,
                       eviction_policy="evict_first").to(tl.uint32, bitcast=True)  # fmt: skip
        step = ()
        for k in tl.static_range(8):
            step = step + (tl.load(step_of + group * m + k * WORDS),)
        zero = in_flight(INTERPRETED)
        now = (value + zero.to(tl.float32))[:, :, None]
        rows, value, keep, group = _tile(x + zero, front, scale, norms, threshold, entries + zero, start, end,
                                         number + 1, tiles, place, ROWS, LISTED, NORMS, FRONT)  # fmt: skip
        found = ()
        for k in tl.static_range(8):
            sums = tl.sum(_nibble(word, k, INTERPRETED) * now, axis=0)
            found = found + (total[k] + sums * (step[k].to(tl.float32) / 16 ** (k % 4))[None, :],)
        total = found
    for k in tl.static_range(8):
        tl.store(out + block * COLUMNS + k * WORDS + word_of, tl.sum(total[k], axis=0))

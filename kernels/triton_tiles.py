"""What one program of the kernels adds up, in Triton: a stretch of channels, or of ranks, times a block of columns.

Loads of weights must all be in flight before the first is used, and the next tile's mask must be known by then: each
loop issues its loads, passes a barrier that the assembler cannot sink them behind, reads x of the next tile, and only
then multiplies.
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl

from kernels import triton_lists as lists


@triton.jit
def in_flight(INTERPRETED: tl.constexpr):
    """0, known only after every load before it has been issued."""
    if INTERPRETED:
        return tl.full((), 0, tl.int32)
    return tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def fetch(table, stride, row, ROWS: tl.constexpr, rows, column, COLUMNS: tl.constexpr, columns):
    """Asks for ROWS x COLUMNS of a table from `row` and `column` on to come into the last cache, and does not wait. Of
    what lies beyond its `rows` and `columns` the last ones are asked for again; without rows, the first."""
    LINE: tl.constexpr = min(1024 // table.dtype.element_ty.primitive_bitwidth, COLUMNS)
    row = tl.minimum(row + tl.arange(0, ROWS), tl.maximum(rows, 1) - 1).to(tl.int64)
    column = tl.minimum(column + tl.arange(0, COLUMNS // LINE) * LINE, columns - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
        [(table + row[:, None] * stride + column[None, :]).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
def sparse(x, front, scale, norms, threshold, channels, inside, NORMS: tl.constexpr, FRONT: tl.constexpr):
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
    value, keep = sparse(x, front, scale, norms, threshold, rows, rows < end, NORMS, FRONT)
    for _ in range(start, end, ROWS):
        weight = tl.load(
            table + rows.to(tl.int64)[:, None] * m + columns[None, :], mask=keep[:, None], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        zero = in_flight(INTERPRETED)
        now = value + zero.to(tl.float32)
        rows += ROWS
        value, keep = sparse(x + zero, front, scale, norms, threshold, rows, rows < end, NORMS, FRONT)
        sums += weight.to(tl.float32) * now[:, None]
    return tl.sum(sums, axis=0)


@triton.jit
def list_kept(x, front, scale, norms, threshold, start, end, entries, LIST: tl.constexpr, NORMS: tl.constexpr,
              FRONT: tl.constexpr, VOTES: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Writes the kept channels of start..end, less `start`, to `entries`, `LIST` at a time; how many there are."""
    count = 0
    for begin in range(start, end, LIST):
        rows = begin + tl.arange(0, LIST)
        _, wanted = sparse(x, front, scale, norms, threshold, rows, rows < end, NORMS, FRONT)
        place, found = lists.places_of(wanted.to(tl.int32), VOTES)
        lists.put(entries, count + place, rows - start, wanted, SHARED)
        count += found
    tl.debug_barrier()
    return count


@triton.jit
def _entries(x, front, scale, entries, start, position, count, FRONT: tl.constexpr, SHARED: tl.constexpr):
    """Channels and x at `position` of a list; past its end, `start` and 0."""
    inside = position < count
    row = start + lists.got(entries, position, inside, 0, SHARED)
    return row, read(x, front, scale, row, inside, FRONT)


@triton.jit
def listed(x, table, front, scale, entries, start, count, m, columns, ROWS: tl.constexpr, SUB: tl.constexpr,
           COLUMNS: tl.constexpr, FRONT: tl.constexpr, SHARED: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """`masked` over a list of `count` kept channels, so that every tile is full; behind it, a row is read in vain. A
    sum per place of the tile is fastest where a warp's registers hold them, else one per row that it loads at once."""
    WIDE: tl.constexpr = ROWS > 8 * SUB
    position = place_of(ROWS, SUB)
    block = table + columns[None, None, :]
    if not WIDE:
        position, block = tl.arange(0, ROWS), table + columns[None, :]
    sums = tl.zeros((SUB if WIDE else ROWS, COLUMNS), tl.float32)
    row, value = _entries(x, front, scale, entries, start, position, count, FRONT, SHARED)
    for _ in range(0, count, ROWS):
        weight = tl.load(block + tl.expand_dims(row.to(tl.int64), -1) * m, eviction_policy="evict_first")
        zero = in_flight(INTERPRETED)
        now = tl.expand_dims(value + zero.to(tl.float32), -1)
        position += ROWS
        row, value = _entries(x, front, scale, entries + zero, start, position, count, FRONT, SHARED)
        part = weight.to(tl.float32) * now
        sums += tl.sum(part, axis=0) if WIDE else part
    return tl.sum(sums, axis=0)


@triton.jit
def product(values, weight, INTERPRETED: tl.constexpr):
    """values (PAD, ROWS), rounded to what the weight is stored in, times weight (ROWS, COLUMNS)."""
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
        token = tl.arange(0, PAD)[:, None]
        value = _z(
            z, token, rank[None, :], tl.where(token < TOKENS, used, 0), segment, segments, stretches, r, STRETCHES
        )
        return product(value, weight, INTERPRETED)


@triton.jit
def z_part(x, B, front, scale, norms, threshold, n, r, segment, ranks, used, start, end, RANKS: tl.constexpr,
           WIDTH: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr):  # fmt: skip
    """B^T (x - s(x)) of `ranks` over the channels start..end, of one token: (RANKS,); 0 from rank `used` on."""
    rows = B + (segment * r + ranks).to(tl.int64)[:, None] * n
    sums = tl.zeros((RANKS, WIDTH // 8), tl.float32)
    for begin in range(start, end, WIDTH):
        channels = begin + place_of(WIDTH, 8)
        inside = channels < end
        weight = tl.load(
            rows[:, :, None] + channels[None, :, :], mask=(ranks < used)[:, None, None] & inside[None, :, :], other=0.0
        )  # fmt: skip
        value = read(x, front, scale, channels, inside, FRONT)
        norm = tl.load(norms + channels, mask=inside, other=0.0) if NORMS else 1.0
        dropped = tl.where(kept(value, norm, threshold), 0.0, value)
        sums += tl.sum(weight.to(tl.float32) * dropped[None, :, :], axis=2)
    return tl.sum(sums, axis=1)


@triton.jit
def list_groups(x, front, scale, norms, threshold, start, end, entries, ROWS: tl.constexpr, NORMS: tl.constexpr,
                FRONT: tl.constexpr, VOTES: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """`list_kept` in tiles of ROWS entries, each of one group of 128 channels: what is left of a group's last tile is
    -1. How many tiles there are; none is without a channel."""
    tiles = 0
    place = tl.arange(0, 128)
    for begin in range(start, end, 128):
        _, wanted = sparse(x, front, scale, norms, threshold, begin + place, begin + place < end, NORMS, FRONT)
        at, count = lists.places_of(wanted.to(tl.int32), VOTES)
        first, whole = tiles * ROWS, (count + ROWS - 1) // ROWS * ROWS
        lists.put(entries, first + at, begin - start + place, wanted, SHARED)
        lists.put(entries, first + place, tl.full((128,), -1, tl.int32), (place >= count) & (place < whole), SHARED)
        tiles += whole // ROWS
    tl.debug_barrier()
    return tiles


def _dots(magic: str, kind: str) -> tl.constexpr:
    """PTX: adds two channels' eight outputs. $0..7: sums; $8, $9: their words; $10, $11: x, twice in the threads where
    the second operand's diagonal lies, else 0; $12..19: the sums so far. Two products of 16 x 16 and 16 x 8, in which a
    thread's own nibbles, 128 + n in bfloat16 or 1024 + n in float16, meet its own x alone."""
    lines = []
    for first in (0, 4):
        for a, (word, place) in enumerate(itertools.product((8, 9), (first // 2, first // 2 + 1))):
            lines.append(f"shr.u32 s, ${word}, {4 * place}; lop3.b32 a{a}, s, 0x000F000F, {magic}, 0xEA;")
        sums, before = (", ".join(f"${at + first + i}" for i in range(4)) for at in (0, 12))
        lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{sums}}}, {{a0, a1, a2, a3}}, "
                     f"{{$10, $11}}, {{{before}}};")  # fmt: skip
    return tl.constexpr("{ .reg .b32 s, a0, a1, a2, a3; " + " ".join(lines) + " }")


_DOTS_BF16, _DOTS_FP16 = _dots("0x43004300", "bf16"), _dots("0x64006400", "f16")
_EIGHT = tl.constexpr((tl.float32,) * 8)
_DOTS = tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 4 + ["f"] * 8))


@triton.jit
def _nibble(i: tl.constexpr):
    """The nibble of a word whose sum `_dots` puts out in place i."""
    return i // 2 + 4 * (i % 2)


@triton.jit
def _eight_zeros(WORDS: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(8):
        zeros = zeros + (tl.zeros((32, WORDS), tl.float32),)
    return zeros


@triton.jit
def _column(word):
    """The column of nibble 0 of a word, see packing.COLUMNS; nibble k is 16 k further."""
    return word // 16 * 128 + word % 16


@triton.jit
def _twice(x, mask, TYPE: tl.constexpr):
    """(32, 1) int32: the 16 bits of x (32,) in both halves, under `mask`."""
    bits = x.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return ((bits | (bits << 16)) & mask)[:, None]


@triton.jit
def _add(sums, words, others, x, y, lane, TYPE: tl.constexpr, PLAIN: tl.constexpr):
    """sums plus x (centre + nibbles of `words`) plus y (centre + those of `others`): tuples of (32, EACH), in the order
    of `_nibble`. x, y (32,): a lane's channels."""
    if PLAIN:
        found = ()
        for i in tl.static_range(8):
            one, other = (words >> 4 * _nibble(i)) & 15, (others >> 4 * _nibble(i)) & 15
            found = found + (sums[i] + one.to(tl.float32) * x[:, None] + other.to(tl.float32) * y[:, None],)
        return found
    else:
        group, of_group = lane // 4, lane % 4
        low, high = (group == 2 * of_group).to(tl.int32) * 0xFFFF, (group == 2 * of_group + 1).to(tl.int32) * -65536
        x, y = _twice(x, low | high, TYPE), _twice(y, low | high, TYPE)
        return tl.inline_asm_elementwise(
            _DOTS_BF16 if TYPE == tl.bfloat16 else _DOTS_FP16, _DOTS,
            [words, others, x, y, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]],
            dtype=_EIGHT, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _channels(x, front, scale, norms, threshold, entries, start, end, number, tiles, lane, ROWS: tl.constexpr,
              LISTED: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Of tile `number`: the group that its channels are of, and for every four of them the channel of each lane, s(x)
    there, and whether it is read."""
    position = number * ROWS
    rows, values, keeps = (), (), ()
    for four in tl.static_range(ROWS // 4):
        place = position + 4 * four + lane % 4
        if LISTED:
            distance = lists.got(entries, place, number < tiles, -1, SHARED)
            row, keep = start + distance, distance >= 0
            value = tl.where(keep, read(x, front, scale, row, keep, FRONT), 0.0)
        else:
            row = start + place
            value, keep = sparse(x, front, scale, norms, threshold, row, row < end, NORMS, FRONT)
        rows, values, keeps = rows + (row,), values + (value,), keeps + (keep,)
    if LISTED:
        group = (start + lists.got(entries, position, number < tiles, 0, SHARED)) // 128
    else:
        group = tl.minimum(start + position, end - 1) // 128
    return group, rows, values, keeps


@triton.jit
def int4(x, table, steps, front, scale, norms, threshold, start, end, m, block, entries, out, LISTED: tl.constexpr,
         ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORMS: tl.constexpr, FRONT: tl.constexpr, VOTES: tl.constexpr,
         SHARED: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """The sparse path of one token over INT4 weights, in tiles of channels of one group, which share their steps (their
    scales); start is a multiple of 128. Stores its sums at `out`.

    Four channels at a time: lane 4 g + t loads EACH words from EACH g on of channel t, as tensor cores want them, which
    add up two channels' sixteen products in two instructions; plain arithmetic takes three for each."""
    TYPE: tl.constexpr = steps.dtype.element_ty
    PLAIN: tl.constexpr = INTERPRETED or TYPE == tl.float32
    CENTRE: tl.constexpr = 8.0 if PLAIN else 136.0 if TYPE == tl.bfloat16 else 1032.0
    WORDS: tl.constexpr = COLUMNS // 8
    EACH: tl.constexpr = WORDS // 8
    lane = tl.arange(0, 32)
    word_of = (lane // 4)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    stride = m // 128 * 16  # of a row, in words; not m / 8, which could not be seen to hold whole vectors
    words, step_of = table + block * WORDS + word_of, steps + block * COLUMNS + _column(word_of)
    if LISTED:
        tiles = list_groups(x, front, scale, norms, threshold, start, end, entries, ROWS, NORMS, FRONT, VOTES,
                            SHARED)  # fmt: skip
    else:
        tiles = (end - start + ROWS - 1) // ROWS
    total = _eight_zeros(EACH)
    group, rows, values, keeps = _channels(x, front, scale, norms, threshold, entries, start, end, 0, tiles, lane, ROWS,
                                           LISTED, NORMS, FRONT, SHARED)  # fmt: skip
    for number in range(tiles):
        loaded, step = (), ()
        for four in tl.static_range(ROWS // 4):
            loaded = loaded + (tl.load(words + rows[four][:, None] * stride, mask=keeps[four][:, None], other=0,
                                       eviction_policy="evict_first"),)  # fmt: skip
        for i in tl.static_range(8):
            step = step + (tl.load(step_of + group * m + 16 * _nibble(i)),)
        zero = in_flight(INTERPRETED)
        now = ()
        for four in tl.static_range(ROWS // 4):
            now = now + (values[four] + zero.to(tl.float32),)
        group, rows, values, keeps = _channels(x + zero, front, scale, norms, threshold, entries + zero, start, end,
                                               number + 1, tiles, lane, ROWS, LISTED, NORMS, FRONT, SHARED)  # fmt: skip
        sums, given = _eight_zeros(EACH), tl.zeros((32,), tl.float32)
        for two in tl.static_range(ROWS // 8):
            first, second = now[2 * two], now[2 * two + 1]
            sums = _add(sums, loaded[2 * two], loaded[2 * two + 1], first, second, lane, TYPE, PLAIN)
            if PLAIN:
                given += first + second
            else:
                given += first.to(TYPE).to(tl.float32) + second.to(TYPE).to(tl.float32)
        found = ()
        for i in tl.static_range(8):
            found = found + (total[i] + (sums[i] - CENTRE * given[:, None]) * step[i].to(tl.float32),)
        total = found
    for i in tl.static_range(8):
        own = tl.sum(tl.reshape(total[i], (8, 4, EACH)), axis=1)
        place = tl.arange(0, 8)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        tl.store(out + block * COLUMNS + _column(place) + 16 * _nibble(i), own)

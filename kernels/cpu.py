"""The product of few tokens on a CPU, compiled by Numba: sums of the table's rows that are asked for, W^T's for the
kept channels and A^T's for the low-rank path.

What limits it is memory, and what memory gives depends on how it is asked: four rows at once, over thousands of
columns, come at about nine tenths of the pace of a dense product, one row after another at two thirds, torch's
embedding bags at half (two threads; data/results/kernels/README.md). Threads share the columns, and every column adds
up in the order of the rows, so that results do not depend on their number. The first call for a dtype compiles, a few
seconds.

Numba takes torch's own OpenMP threads: others would find those spinning on the processors. As with all of OpenMP, start
further processes by spawn and not by fork.
"""

from __future__ import annotations

import warnings

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from kernels.packing import COLUMNS, Packed

PART = 128
"""Rows that are summed by themselves: a longer sum, one row after another, loses more than a dense product does."""
BLOCK = 8192
"""Columns of a thread's block: its sums stay in a near cache, its rows are long enough to be fetched ahead."""
AS_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""Types that NumPy can hold weights in, and that `_wide` tells apart."""


def _threads() -> int:
    """How many Numba has. It is started here, which would set the number that torch takes too."""
    before = torch.get_num_threads()
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    numba.set_num_threads(1)
    torch.set_num_threads(before)
    if numba.threading_layer() != "omp":
        warnings.warn(
            f"Numba's threads are {numba.threading_layer()}'s; expected OpenMP's, from the system's libgomp. Sparse "
            "products share processors with torch's waiting threads, and are slower", stacklevel=2,
        )  # fmt: skip
    return numba.config.NUMBA_NUM_THREADS


THREADS = _threads()


def gemv(x: Tensor, packed: Packed) -> Tensor:
    """x (tokens, n) -> (tokens, m), the segments side by side, without their bias; sums are in float32."""
    numba.set_num_threads(min(torch.get_num_threads(), THREADS))
    table, B = (weights.view(AS_BITS[packed.dtype]).numpy() for weights in (packed.table, packed.B))
    norms = np.empty((len(B), 0), np.float32) if packed.norms is None else packed.norms.numpy()
    y, widths = torch.empty(len(x), packed.rows), np.array(packed.widths)
    for row, out in zip(x.float().numpy(), y.numpy(), strict=True):
        _token(row, table, B, packed.ranks.numpy(), packed.thresholds.numpy(), norms, widths, out)
    return y.to(x.dtype)


@intrinsic
def _wide(context, weight):
    """A weight in float32: bfloat16 and float16 come as the bits of an uint16 or an int16."""

    def as_it_is(context, builder, signature, given):
        return given[0]

    def of_bfloat16(context, builder, signature, given):
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(given[0], word), word(16)), ir.FloatType())

    def of_float16(context, builder, signature, given):
        return builder.fpext(builder.bitcast(given[0], ir.HalfType()), ir.FloatType())

    made = {types.float32: as_it_is, types.uint16: of_bfloat16, types.int16: of_float16}[weight]
    return types.float32(weight), made


@njit(parallel=True)
def _token(x, table, B, ranks, thresholds, norms, widths, y):
    """y of one token: x (n,), y (m,), in float32; the others as `Packed` has them."""
    segments, r, n = B.shape
    entries, values = np.empty((segments, n + r), np.int64), np.empty((segments, n + r), np.float32)
    dropped, counts = np.empty((segments, n), np.float32), np.empty(segments, np.int64)
    for s in range(segments):
        counts[s] = _list_kept(x, thresholds[s], norms[s], entries[s], values[s], dropped[s])
    for place in prange(segments * r):
        s, k = place // r, place % r
        if k < ranks[s]:
            entries[s, counts[s] + k], values[s, counts[s] + k] = n + k, _dot(B[s, k], dropped[s])
    counts += ranks
    cuts = _cuts(widths, counts, numba.get_num_threads())
    for share in prange(len(cuts) - 1):
        _share(table, entries, values, counts, widths, cuts[share], cuts[share + 1], y)


@njit
def _list_kept(x, threshold, norms, entries, values, dropped):
    """Channels that are read, and x there; x of the others goes into `dropped`. How many they are."""
    count = 0
    for j in range(len(x)):
        score = abs(x[j]) * norms[j] if norms.size else abs(x[j])
        keep = not score <= threshold
        entries[count], values[count], dropped[j] = j, x[j], np.float32(0) if keep else x[j]
        count += keep
    return count


@njit(fastmath={"reassoc", "contract"})
def _dot(weights, x):
    total = np.float32(0)
    for i in range(len(x)):
        total += _wide(weights[i]) * x[i]
    return total


@njit
def _cuts(widths, counts, threads):
    """Outputs at which the threads' shares begin, and the last one ends: about as many weights for each."""
    cuts = np.zeros(threads + 1, np.int64)
    work = (widths * counts).sum() / threads
    share, before, begin = 1, 0.0, 0
    for s in range(len(widths)):
        while share < threads and share * work <= before + widths[s] * counts[s]:
            own = (share * work - before) / max(1, counts[s])
            cuts[share] = begin + min(widths[s], int(own) // 16 * 16)
            share += 1
        before, begin = before + widths[s] * counts[s], begin + widths[s]
    cuts[share:] = begin
    return cuts


@njit
def _share(table, entries, values, counts, widths, first, last, y):
    """y[first:last]: for every segment `counts` rows of the table, times `values`."""
    part = np.empty(BLOCK, np.float32)
    out, column = 0, 0  # where a segment begins
    for s in range(len(widths)):
        for begin in range(max(first, out), min(last, out + widths[s]), BLOCK):
            width = min(begin + BLOCK, last, out + widths[s]) - begin
            sums, at = y[begin : begin + width], column + begin - out
            sums[:] = 0
            for begun in range(0, counts[s], PART):
                end = min(begun + PART, counts[s])
                part[:width] = 0
                _add_rows(table, entries[s, begun:end], values[s, begun:end], at, part[:width])
                for i in range(width):
                    sums[i] += part[i]
        out, column = out + widths[s], column + (widths[s] + COLUMNS - 1) // COLUMNS * COLUMNS


@njit(fastmath={"contract"})
def _add_rows(table, entries, values, at, sums):
    """Add to `sums`, of the columns from `at` on, the rows `entries` of the table times `values`, four at a time."""
    end, fours = at + len(sums), len(entries) // 4 * 4
    for k in range(0, fours, 4):
        a, b = table[entries[k], at:end], table[entries[k + 1], at:end]
        c, d = table[entries[k + 2], at:end], table[entries[k + 3], at:end]
        x, y, z, w = values[k], values[k + 1], values[k + 2], values[k + 3]
        for i in range(len(sums)):
            sums[i] += (x * _wide(a[i]) + y * _wide(b[i])) + (z * _wide(c[i]) + w * _wide(d[i]))
    for k in range(fours, len(entries)):
        a, x = table[entries[k], at:end], values[k]
        for i in range(len(sums)):
            sums[i] += x * _wide(a[i])

"""The product of few tokens on a CPU: embedding bags per chunk of columns, whose entries are the kept channels.

A bag is a weighted sum of rows of the chunk, W^T's for the kept channels and A^T's for the low-rank path, so it reads
no row that is not asked for. Every bag sums its rows in order, so results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from kernels import reference
from kernels.packing import Packed

PART = 128
"""Rows of one bag in float32: a longer sum, one row after another, loses more than a dense product does. In 16 bits a
bag sums in float32 and is rounded once, so that it stays whole."""


def gemv(x: Tensor, packed: Packed) -> Tensor:
    """x (tokens, n) -> (tokens, m), the segments side by side, without their bias."""
    return torch.stack([_token(row, packed) for row in x])


def _token(x: Tensor, packed: Packed) -> Tensor:
    rows, width = packed.table.shape[1:]
    indices, values, offsets, shapes, at, begun = [], [], [], [], 0, 0
    for segment, m in enumerate(packed.widths):
        bags = -(-m // width)
        entries, own = _entries(x, packed, segment)
        parts = torch.arange(0, max(1, len(entries)), PART if x.dtype == torch.float32 else max(1, len(entries)))
        starts = begun + torch.arange(bags)[:, None] * len(entries) + parts
        indices.append((torch.arange(at, at + bags)[:, None] * rows + entries).flatten())
        values.append(own.expand(bags, -1).flatten())
        offsets.append(starts.flatten())
        shapes.append((bags, len(parts)))
        at, begun = at + bags, begun + bags * len(entries)
    y = embedding_bag(  # one call for all chunks: the threads share them evenly
        torch.cat(indices), packed.table.view(-1, width), torch.cat(offsets), per_sample_weights=torch.cat(values),
        mode="sum",
    )  # fmt: skip
    sums = [part.view(*shape, width).sum(1) for part, shape in zip(y.split([a * b for a, b in shapes]), shapes,
                                                                   strict=True)]  # fmt: skip
    return torch.cat([part.flatten()[:m] for part, m in zip(sums, packed.widths, strict=True)])


def _entries(x: Tensor, packed: Packed, segment: int) -> tuple[Tensor, Tensor]:
    """Rows of the table that one segment reads, and their weights: the kept channels, then the rank's."""
    norms = None if packed.norms is None else packed.norms[segment]
    keep = ~(reference.scores(x, norms) <= packed.thresholds[segment])
    channels = keep.nonzero().flatten()
    rank = int(packed.ranks[segment])
    if not rank:
        return channels, x[channels]
    z = packed.B[segment, :rank] @ torch.where(keep, 0, x)
    return torch.cat([channels, torch.arange(packed.channels, packed.channels + rank)]), torch.cat([x[channels], z])

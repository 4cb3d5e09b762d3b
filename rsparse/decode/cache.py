"""The static key-value cache: allocated once, written in place, so that a CUDA graph can replay over it."""

from __future__ import annotations

import torch
from torch import Tensor

from rsparse.decode.architecture import Architecture


class Cache:
    """Keys and values of every layer, of which `filled` positions are set.

    Held in chunks of `chunk` positions, (chunks, batch, kv_heads, chunk, head_dim): the first chunks of a long cache
    are one block of memory, and each is work for processors of its own. `length` is a multiple of `chunk`. Under a
    sliding window all positions are kept, and those outside are not read. work: what kernels.attention needs beside it,
    or None where torch computes.
    """

    work: tuple[Tensor, ...] | None = None

    def __init__(
        self, architecture: Architecture, batch: int, length: int, chunk: int, dtype: torch.dtype, device: torch.device
    ):
        self.batch, self.length, self.chunk, self.filled = batch, -(-length // chunk) * chunk, chunk, 0
        shape = (self.length // chunk, batch, architecture.kv_heads, chunk, architecture.head_dim)
        # zeros: a masked position must not hold NaN, which a weight of 0 would let through
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(architecture.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(architecture.layers)]

    def get_seq_length(self) -> int:
        """Positions that are set, under the name that `TokenProtocol.begin` asks a Hugging Face cache by."""
        return self.filled

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.keys[index], self.values[index]


def write_prompt(stored: Tensor, new: Tensor) -> None:
    """Put `new` (batch, kv_heads, positions, head_dim) at the positions 0.. of keys or values."""
    for chunk, part in zip(stored, new.split(stored.shape[3], dim=2), strict=False):
        chunk[:, :, : part.shape[2]] = part


def write_step(stored: Tensor, new: Tensor, slot: tuple[Tensor, Tensor]) -> None:
    """Put `new` (batch, kv_heads, head_dim) at `slot` of keys or values: chunk (1,) and position in it (1,), on the
    device."""
    chunk, at = slot
    stored[chunk, :, :, at] = new[None]

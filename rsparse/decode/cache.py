"""The static key-value cache: allocated once, written in place, so that a CUDA graph can replay over it."""

from __future__ import annotations

import torch
from torch import Tensor

from rsparse.decode.architecture import Architecture


class Cache:
    """Keys and values of every layer, (batch, kv_heads, length, head_dim) each, of which `filled` positions are set.

    Under a sliding window all positions are kept, and those outside are not read.
    """

    def __init__(
        self, architecture: Architecture, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ):
        self.batch, self.length, self.filled = batch, length, 0
        shape = (batch, architecture.kv_heads, length, architecture.head_dim)
        # zeros: a masked position must not hold NaN, which a weight of 0 would let through
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(architecture.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(architecture.layers)]

    def get_seq_length(self) -> int:
        """Positions that are set, under the name that `TokenProtocol.begin` asks a Hugging Face cache by."""
        return self.filled

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one row, over all layers."""
        return sum(2 * x[0, :, 0].numel() * x.element_size() for x in self.keys)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.keys[index], self.values[index]

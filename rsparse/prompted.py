"""Channels chosen once per row, from its prompt, and kept for the whole continuation: GRIFFIN.

GRIFFIN (arXiv 2404.01365), section 4: of the prompt's activations z_t the row-normalised ones z_t / ||z_t||_2 are
taken, a channel's statistic is their L2 norm over the tokens, and the channels with the largest are kept. Here the
prompt is what the token protocol leaves dense; `PREFIX` positions where it would leave nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsparse.linears import SparseLinear
from rsparse.thresholds import keep_top

PREFIX = 64
"""Under tokens="all" there is no prompt: the first so many positions of a row are dense, and choose."""


def statistic(z: Tensor, prompt: Tensor) -> Tensor:
    """GRIFFIN's statistic of every channel, (rows, channels), float32 at least, from z (rows, positions, channels).

    prompt: boolean (rows, positions), the positions that count. A token of zeros has none; NaN surfaces as NaN.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    normalised = z / length.where(length != 0, 1.0)
    return torch.linalg.vector_norm(normalised.where(prompt[..., None], 0.0), dim=1)


class PromptedLinear(SparseLinear):
    """A linear that keeps the same `split.kept` input channels at every sparse position of a row.

    Calls that continue a key-value cache use what the prompt's call chose, row by row.
    """

    by_position = False
    chosen: Tensor | None = None

    def keep(self, z: Tensor) -> Tensor:
        if self.chosen is None or len(self.chosen) != len(z):
            rows = None if self.chosen is None else len(self.chosen)
            raise ValueError(f"a cache of {len(z)} rows continues a prompt of {rows}; expected the prompt's own rows, "
                             "which choose the channels")
        return self.chosen[:, None].expand_as(z)

    def forward(self, x: Tensor) -> Tensor:
        if not self.protocol.continues:
            prompt = self.protocol.prompt(x.device)
            self.chosen = keep_top(statistic(x, prompt), self.split.kept)
        return super().forward(x)

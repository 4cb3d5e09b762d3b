"""Low-rank factors of random weights, without an SVD.

Half an hour of eigenvectors buys nothing where weights have no structure: a projection to random directions has the
sizes, the dtype and about the magnitude of the SVD's, and it is these that time and sparsity depend on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rsparse.decompose import Factors, FactorStore


class Sketches(FactorStore):
    """W ~ (W Q) Q^T, with Q (n, rank) orthonormal and random. Nothing is read or stored. For timing alone."""

    def __init__(self, seed: int = 0):
        super().__init__(Path("unused"))
        self.seed = seed

    @torch.no_grad()
    def get(self, weight: Tensor, rank: int, dtype: torch.dtype | None = None) -> Factors:
        generator = torch.Generator(weight.device).manual_seed(self.seed)
        drawn = torch.randn(weight.shape[1], rank, device=weight.device, generator=generator)
        Q = torch.linalg.qr(drawn).Q.to(weight.dtype)
        return Factors(weight.detach() @ Q, Q).to(dtype or weight.dtype)

"""Input channels taken in a rotated basis: y = W V s(V^T x), with an orthogonal V that several linears share.

W V can be stored in place of W, but V is read for every token, and counts: x comes from a residual stream that other
blocks read in other bases, so that either V^T x is computed at every site, or the stream is moved from one site's basis
to the next one's, with a matrix of the same size. WINA rotates to the right singular vectors of a weight, LaRoSA to the
principal directions of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from rsparse.accounting import Split
from rsparse.calibrate import hooks, run_decoder
from rsparse.linears import SparseLinear
from rsparse.models import DecoderLinear
from rsparse.protocol import TokenProtocol


class Rotation(nn.Module):
    """An orthogonal V (n, n), columns the new basis, for every linear of one site. name: part of statistics' keys."""

    def __init__(self, V: Tensor, name: str):
        super().__init__()
        self.name = name
        self.register_buffer("V", V, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """V^T x for x (..., n)."""
        return x @ self.V

    def back(self, z: Tensor) -> Tensor:
        """V z for z (..., n)."""
        return z @ self.V.T


class RotatedLinear(SparseLinear):
    """y = W V s(V^T x) at sparse positions; computed as W (V s(V^T x)), so that no second weight is held."""

    def __init__(
        self,
        dense: nn.Module,
        split: Split,
        protocol: TokenProtocol,
        rotation: Rotation,
        norms: Tensor | None = None,
        threshold: float | None = None,
    ):
        super().__init__(dense, split, protocol, None, norms, threshold)
        self.rotation = rotation

    def scored(self, x: Tensor) -> Tensor:
        return self.rotation(x)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, positions, n) -> (rows, positions, m)."""
        if self.idle:
            return self.dense(x)
        kept = self.rotation.back(self.masked(self.rotation(x)))
        sparse = self.protocol.on(x.device)
        return self.dense(kept if sparse is None else kept.where(sparse[..., None], x))


def overhead(linears: Sequence[DecoderLinear], sites: Sequence[str]) -> dict[str, Fraction]:
    """Linear -> extra bytes read for the rotations of `sites`, one a block and site, spread over the linears there.

    By output size, so that each reads the same share of its own dense bytes more: n / (sum of m).
    """
    there = [x for x in linears if x.site in sites]
    outputs: dict[tuple[int, str], int] = {}
    for x in there:
        outputs[x.layer, x.site] = outputs.get((x.layer, x.site), 0) + x.shape[0]
    return {x.name: x.weight_bytes * x.shape[1] ** 2 * Fraction(x.shape[0], outputs[x.layer, x.site]) for x in there}


@torch.no_grad()
def second_moments(
    model: nn.Module, ids: Tensor, linears: Sequence[DecoderLinear]
) -> dict[tuple[int, str], Tensor]:
    """(layer, site) -> sum over tokens of x x^T (n, n) of the inputs of `linears`, float32 at least, in one pass."""
    found: dict[tuple[int, str], Tensor] = {}

    def add(linear: DecoderLinear, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        key, product = (linear.layer, linear.site), x.T @ x
        found[key] = found[key] + product if key in found else product

    firsts = {(x.layer, x.site): x for x in reversed(linears)}
    with hooks(list(firsts.values()), add):
        run_decoder(model, ids, "second moments")
    return found

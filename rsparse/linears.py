"""The drop-in modules' common part, and the linear: y = W s(x) + A B^T (x - s(x)) at sparse positions, W x elsewhere.

The weight stays where it is: a `SparseLinear` wraps the linear it replaces, so input sparsity needs no second
copy and restoring the dense model means hanging the wrapped linear back. This is the evaluation path, which
computes what a sparse kernel would from dense products; speed is the kernels' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsparse.accounting import Split
from rsparse.decompose import Factors
from rsparse.protocol import TokenProtocol
from rsparse.thresholds import channel_score, keep_above, keep_top


class Masked(nn.Module):
    """What hangs in place of a dense module and reads, at sparse positions, only some of its channels.

    dense: the module it stands for. split: how many channels are kept. norms: (channels,) weights of the score, or
    None for magnitude. threshold: one number; or None for the exact top `split.kept` channels of every token.
    protocol: says which positions of the forward pass in progress are sparse.
    """

    by_position = True
    """Whether what a position keeps depends on that position alone: `keep` may be given some of them, (n, channels)."""

    def __init__(
        self,
        dense: nn.Module,
        split: Split,
        protocol: TokenProtocol,
        norms: Tensor | None = None,
        threshold: float | None = None,
    ):
        super().__init__()
        self.dense, self.split, self.protocol, self.threshold = dense, split, protocol, threshold
        self.tally: KeptTally | None = None
        self.tape: Callable[[Tensor], Tensor] | None = None  # own mask -> the one to use, see rsparse.replay
        self.register_buffer("norms", norms, persistent=False)

    def scored(self, x: Tensor) -> Tensor:
        """Of what the score is taken, given the module's input."""
        return x

    def keep(self, z: Tensor) -> Tensor:
        """Mask of the kept channels of z = scored(x), its shape (..., channels), at sparse positions."""
        if self.split.kept == 0:
            return ~torch.isfinite(z)  # nothing is read, but NaN and inf surface even without a low-rank path
        score = channel_score(z, self.norms)
        if self.threshold is None:
            return keep_top(score, self.split.kept)
        return keep_above(score, self.threshold)

    def masked(self, z: Tensor) -> Tensor:
        """z (rows, positions, channels) after `drop` at sparse positions; counts what is kept."""
        if self.protocol.positions is None:
            return self.drop(z, self._counted(self.keep(z)))
        if self.by_position and self.tape is None:  # few positions of a scored row are sparse; a tape has them all
            at, flat = self.protocol.at(z), z.flatten(0, 1)
            own = flat[at]
            return flat.index_copy(0, at, self.drop(own, self._counted(self.keep(own)))).view_as(z)
        sparse = self.protocol.on(z.device)
        return self.drop(z, self._counted(self.keep(z), sparse) | ~sparse[..., None])

    def _counted(self, keep: Tensor, sparse: Tensor | None = None) -> Tensor:
        """The mask to use, of whose positions those that are `sparse` (None: all) have been counted."""
        if self.tape is not None:
            keep = self.tape(keep)
        if self.tally is not None:
            self.tally.add(keep, sparse)
        return keep

    def drop(self, z: Tensor, keep: Tensor) -> Tensor:
        """z with zeros in the place of what is not kept."""
        return z * keep  # several times faster on a CPU than `where`; a dropped inf becomes NaN, and surfaces

    @property
    def idle(self) -> bool:
        """Whether no position of the forward pass in progress is sparse."""
        return not self.protocol.any_sparse

    def extra_repr(self) -> str:
        return f"kept={self.split.kept}, rank={self.split.rank}, threshold={self.threshold}"


class SparseLinear(Masked):
    """R-Sparse's linear (arXiv 2504.19449, equation 5); input sparsity (TEAL) is the case rank 0.

    dense: the wrapped linear, weight (m, n), of any kind that has in_features and out_features.
    split: kept channels and rank. factors: A (m, r), B (n, r), needed when the rank is not 0; held padded.
    The other arguments are those of `Masked`.

    kept = 0 skips the sparse path; non-finite inputs surface in the output on every path.
    """

    def __init__(
        self,
        dense: nn.Module,
        split: Split,
        protocol: TokenProtocol,
        factors: Factors | None = None,
        norms: Tensor | None = None,
        threshold: float | None = None,
    ):
        super().__init__(dense, split, protocol, norms, threshold)
        if (split.rank > 0) != (factors is not None):
            raise ValueError(f"rank is {split.rank}; expected factors exactly when it is not 0")
        factors = factors and factors.padded()
        self.register_buffer("A", factors and factors.A, persistent=False)
        self.register_buffer("B", factors and factors.B, persistent=False)

    @property
    def in_features(self) -> int:
        return self.dense.in_features

    @property
    def out_features(self) -> int:
        return self.dense.out_features

    @property
    def weight(self) -> Tensor:
        return self.dense.weight

    @property
    def bias(self) -> Tensor | None:
        return self.dense.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, positions, n) -> (rows, positions, m)."""
        if self.idle:
            return self.dense(x)
        kept, everywhere = self.masked(x), self.protocol.positions is None
        if self.A is None:
            return self.dense(kept)
        if everywhere and self.split.kept == 0:
            return low_rank(x, self.A, self.B, self.bias)
        if everywhere:
            return self.dense(kept) + low_rank(x - kept, self.A, self.B)
        at = self.protocol.at(x)
        dropped = x.flatten(0, 1)[at] - kept.flatten(0, 1)[at]
        y = self.dense(kept)
        y.view(-1, y.shape[-1]).index_add_(0, at, low_rank(dropped, self.A, self.B))
        return y


def low_rank(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """A B^T x (+ bias) for x (..., n): two thin products."""
    return F.linear(F.linear(x, B.T), A, bias)


class KeptTally:
    """Kept channels per token of one linear, streamed: count, mean and spread over tokens."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # tokens, kept, kept squared; stays on the device, so that no pass waits

    def add(self, keep: Tensor, counted: Tensor | None = None) -> None:
        """Count the tokens of a mask (..., n), or those of them that are `counted` (...)."""
        kept = keep.sum(-1)
        ones = torch.ones_like(kept) if counted is None else counted.to(kept.dtype)
        found = torch.stack([ones.sum(), (kept * ones).sum(), (kept.square() * ones).sum()])
        self._sums = found if self._sums is None else self._sums + found

    @property
    def tokens(self) -> int:
        return 0 if self._sums is None else int(self._sums[0])

    @property
    def mean(self) -> float:
        return int(self._sums[1]) / self.tokens if self.tokens else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over tokens."""
        if not self.tokens:
            return math.nan
        return math.sqrt(max(int(self._sums[2]) / self.tokens - self.mean**2, 0.0))

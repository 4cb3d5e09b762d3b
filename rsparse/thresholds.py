"""Which input channels a linear keeps: scores, streaming calibration statistics, thresholds.

Static thresholds are one number per linear, a quantile of the score over calibration tokens. The quantile
comes from a histogram over the float32 bit patterns of the score, so memory depends neither on the number of
tokens nor on the range of the activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCORES = ("magnitude", "column-norm")
THRESHOLDS = ("static", "static-dense", "static-sequential", "per-token")

DROPPED_BITS = 14
"""Of the 31 bits of a float32 below its sign: histograms keep 8 exponent and 9 mantissa bits."""
BINS = 1 << (31 - DROPPED_BITS)


def column_norms(weight: Tensor) -> Tensor:
    """||W[:, j]||_2 for every input channel j, shape (n,), in the weight's dtype (float32 at least).

    The score's weight in WINA and, whenever rho < 1, in the R-Sparse authors' code.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dim=0, dtype=dtype)


def channel_score(x: Tensor, norms: Tensor | None) -> Tensor:
    """|x_j|, or |x_j| times `norms` (n,) where given; shape of x (..., n), float32 at least.

    16-bit scores would round the threshold they are compared with.
    """
    score = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    return score if norms is None else score * norms


def keep_above(score: Tensor, threshold: Tensor | float) -> Tensor:
    """Boolean mask of kept channels. Written as not (score <= t) so that a NaN is kept and surfaces."""
    return ~(score <= threshold)


def keep_top(score: Tensor, kept: int) -> Tensor:
    """Exactly the `kept` largest scores along the last dimension, of equal ones the first; NaN counts as inf.

    Ties are no rarity: in 16 bits, and under grouped-query attention at the first position, where the heads of a
    group put out the same values.
    """
    if kept == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    score = torch.where(score.isnan(), math.inf, score)
    least = score.topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = score > least, score == least
    room = kept - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))


class ScoreStatistics:
    """Streaming statistics of one linear input, in memory independent of the number of tokens.

    norms: weights of the score, (n,), or None for magnitude. After any number of `add` calls: `quantile`,
    `mean_abs` E|x| (n,) and `mean_square` E x^2 (n,) per channel.
    """

    def __init__(self, channels: int, norms: Tensor | None = None, device: torch.device | str = "cpu"):
        self.norms = norms
        self.tokens = 0
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._cumulative: Tensor | None = None
        self.sum_abs = torch.zeros(channels, dtype=torch.float64, device="cpu")
        self.sum_square = torch.zeros(channels, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the tokens of x (..., n). ValueError where a value is not finite."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.tokens += x.shape[0]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        self.sum_abs += wide.abs().sum(0).cpu()
        self.sum_square += wide.square().sum(0).cpu()
        if not torch.isfinite(self.sum_abs).all():
            raise ValueError("calibration activations hold NaN or inf; expected finite activations of the dense model")
        pattern = channel_score(x, self.norms).float().view(torch.int32) >> DROPPED_BITS
        for part in pattern.flatten().split(1 << 24):
            self.counts += torch.bincount(part, minlength=BINS)
        self._cumulative = None

    def quantile(self, share: float) -> float:
        """The score t such that a `share` of all (token, channel) scores are <= t.

        Linear inside a bin, whose relative width is 2^-9; -inf for share <= 0, +inf for share >= 1.
        """
        if self.tokens == 0:
            raise ValueError("no calibration tokens were seen; expected at least one")
        if share <= 0 or share >= 1:
            return -math.inf if share <= 0 else math.inf
        if self._cumulative is None:
            self._cumulative = self.counts.cumsum(0).cpu()  # searches ask for many quantiles of the same counts
        cumulative = self._cumulative
        rank = share * int(cumulative[-1])
        bin_ = int(torch.searchsorted(cumulative, rank))
        before = int(cumulative[bin_ - 1]) if bin_ else 0
        low, high = _edge(bin_), _edge(bin_ + 1)
        return low + (high - low) * (rank - before) / (int(cumulative[bin_]) - before)

    def below(self, scores: Tensor) -> Tensor:
        """Share of all (token, channel) scores that are <= each of `scores` (k,), float64; inverse of `quantile`."""
        if self.tokens == 0:
            raise ValueError("no calibration tokens were seen; expected at least one")
        at = scores.float().clamp(0, torch.finfo(torch.float32).max).contiguous()
        bins = (at.view(torch.int32) >> DROPPED_BITS).long()
        low, high = (((bins + i).int() << DROPPED_BITS).view(torch.float32).double() for i in (0, 1))
        cumulative = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0).cpu()])
        inside = (cumulative[bins + 1] - cumulative[bins]) * ((at.double() - low) / (high - low))
        return torch.where(scores < 0, 0.0, (cumulative[bins] + inside) / int(cumulative[-1]))

    @property
    def mean_abs(self) -> Tensor:
        return self.sum_abs / self.tokens

    @property
    def mean_square(self) -> Tensor:
        return self.sum_square / self.tokens


def _edge(bin_: int) -> float:
    return float(torch.tensor(bin_ << DROPPED_BITS, dtype=torch.int32).view(torch.float32))

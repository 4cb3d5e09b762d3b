"""Multi-phase ReLU: the large activations stay as they are, every other one takes one of a few constant levels.

R-Sparse (arXiv 2504.19449), section 3.2, as public texts quote it: x stays where it is at least T_0, and below it the
phase j between two thresholds, T_j <= x < T_(j-1), puts out one constant. A linear then adds to its sparse path one
bias per phase, the sum of the weight columns in the phase times its level. How the thresholds are set is not quoted.

Here, for a share s of values that do not stay and l phases, T_0 is the s quantile of the values; the s below are cut
at their own quantiles into l phases of equal share, and a phase's level is the mean of its values, so that l = 1 has
one bias, the mean. What "below" means is the side: "signed" compares x itself, as section 3.2 does; "magnitude"
compares |x|, as the deployed method does, and cuts the dropped values, which then lie on both sides of zero, by their
sign and size. It is an analysis and no method: which columns a bias sums depends on the token, so that no byte is left
unread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from rsparse.accounting import Split, exact
from rsparse.apply import hung, tallied
from rsparse.calibrate import ROUNDS, Calibration, check_dense, hooks, run_decoder
from rsparse.linears import KeptTally, SparseLinear
from rsparse.models import DecoderLinear, decoder_linears
from rsparse.protocol import TokenProtocol
from rsparse.thresholds import BINS, DROPPED_BITS

SIDES = ("magnitude", "signed")


class ValueStatistics:
    """Streaming histogram of signed values, in memory independent of their number: bins of relative width 2^-9."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(2 * BINS, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count every value of x, of any shape. ValueError where one is not finite."""
        if not torch.isfinite(x).all():
            raise ValueError("activations hold NaN or inf; expected finite ones")
        x = x.detach().float().flatten()
        size = (x.abs().view(torch.int32) >> DROPPED_BITS).long()
        bins = torch.where(x < 0, BINS - 1 - size, BINS + size)  # ascending in x
        for part in bins.split(1 << 24):
            self.counts += torch.bincount(part, minlength=2 * BINS)

    def levels(self, share: float, phases: int, side: str) -> Levels:
        """Threshold, edges and levels for a `share` of the values in (0, 1) and a number of phases of at least 1.

        Exact but for the bins' width. ValueError for a share, a number or a side that is not allowed.
        """
        if not 0 < share < 1 or phases < 1 or side not in SIDES:
            asked = f"share, phases, side are {share!r}, {phases!r}, {side!r}"
            raise ValueError(f"{asked}; expected a share in (0, 1), at least 1 phase, and one of {', '.join(SIDES)}")
        counts, centres = self.counts.double().cpu(), _centres()
        signed, order = side == "signed", _ascending(side)
        threshold, inside = _split_at(counts[order], float(exact(share)) * float(counts.sum()))
        dropped = torch.zeros_like(counts)
        dropped[order] = inside
        at = float(centres[order][threshold])
        ends = torch.linspace(0, float(dropped.sum()), phases + 1, dtype=torch.float64)
        after = dropped.cumsum(0)
        before = after - dropped
        bounds = zip(ends, ends[1:], strict=False)
        parts = ((after.clamp(max=b) - before.clamp(min=a)).clamp(min=0) for a, b in bounds)
        values = torch.stack([(part @ centres) / part.sum() for part in parts])
        edges = centres[torch.searchsorted(after, ends[1:-1])]
        return Levels(side, at if signed else abs(at), edges.float(), values.float())


def _split_at(counts: Tensor, rank: float) -> tuple[int, Tensor]:
    """The bin in which the cumulated `counts` reach `rank`, and of every bin the counts up to there."""
    after = counts.cumsum(0)
    inside = (rank - (after - counts)).clamp(min=0).minimum(counts)
    return int(torch.searchsorted(after, rank)), inside


@cache
def _centres() -> Tensor:
    """Middle of every bin, ascending, float64; 0 for the bins of what is not finite."""
    edges = (torch.arange(BINS + 1, dtype=torch.int64) << DROPPED_BITS).clamp(max=2**31 - 1).int().view(torch.float32)
    edges = torch.nan_to_num(edges.double(), nan=0.0, posinf=0.0)
    upper = (edges[:-1] + edges[1:]) / 2
    return torch.cat([-upper.flip(0), upper])


@cache
def _ascending(side: str) -> Tensor:
    """The bins by what the side compares, smallest first."""
    return torch.arange(2 * BINS) if side == "signed" else _centres().abs().argsort(stable=True)


@dataclass(frozen=True)
class Levels:
    """threshold: T_0; a value stays above it (of its magnitude, for that side). edges: (l - 1,) between the phases,
    ascending; values: (l,), what each phase puts out."""

    side: str
    threshold: float
    edges: Tensor
    values: Tensor

    def stays(self, x: Tensor) -> Tensor:
        """Boolean, shape of x: what no phase replaces. A NaN stays, and surfaces."""
        return ~((x if self.side == "signed" else x.abs()) <= self.threshold)

    def level(self, x: Tensor) -> Tensor:
        """The level of the phase that every value of x falls in."""
        edges, values = self.edges.to(x), self.values.to(x)
        return values[torch.bucketize(x, edges)]

    def parts(self, x: Tensor) -> Tensor:
        """What the phases put in place of x (..., n), one row per phase: (..., l, n), zero outside of the phase."""
        phase = torch.bucketize(x, self.edges.to(x)).masked_fill(self.stays(x), -1)
        which = torch.arange(len(self.values), device=x.device)[:, None]
        return (phase[..., None, :] == which) * self.values.to(x)[:, None]


class PhaseLinear(SparseLinear):
    """y = W sigma(x) at sparse positions, with the multi-phase ReLU sigma; W x elsewhere."""

    def __init__(self, dense: nn.Module, share: float, protocol: TokenProtocol):
        kept = dense.in_features - math.ceil(exact(share) * dense.in_features)
        super().__init__(dense, Split(max(kept, 1), 0, exact(1)), protocol)
        self.levels: Levels | None = None

    def keep(self, z: Tensor) -> Tensor:
        return self.levels.stays(z)

    def drop(self, z: Tensor, keep: Tensor) -> Tensor:
        """z with levels in the place of what does not stay."""
        return torch.where(keep, z, self.levels.level(z))


def collect(model: nn.Module, ids: Tensor, linears: Sequence[DecoderLinear]) -> dict[tuple[int, str], ValueStatistics]:
    """(layer, site) -> histogram of the inputs of `linears` there, in one pass over `ids` (samples, length)."""
    firsts = {(x.layer, x.site): x for x in reversed(linears)}
    found = {key: ValueStatistics(x.device) for key, x in firsts.items()}
    with hooks(list(firsts.values()), lambda x, value: found[x.layer, x.site].add(value)):
        run_decoder(model, ids, "phases")
    return found


@contextmanager
def multi_phase(
    calibration: Calibration, share: float, phases: int, side: str, dense: Mapping[tuple[int, str], ValueStatistics]
) -> Iterator[dict[str, KeptTally]]:
    """Inside, every decoder linear of the calibration's dense model takes multi-phase inputs.

    dense: statistics of the dense model, see `collect`; levels are read again on the model that has them, `ROUNDS`
    times, as static thresholds are. Yields a tally of what stays for every linear, which counts from here on.
    """
    model = calibration.model
    check_dense(model)
    protocol, linears = TokenProtocol("all"), decoder_linears(model)
    modules = {x.name: (x, PhaseLinear(x.module, share, protocol)) for x in linears}
    found = dense
    with hung(model, modules, protocol):
        for again in range(ROUNDS + 1):
            found = collect(model, calibration.ids, linears) if again else found
            levels = {key: statistics.levels(share, phases, side) for key, statistics in found.items()}
            for linear, module in modules.values():
                module.levels = levels[linear.layer, linear.site]
        with tallied(model, KeptTally) as tallies:
            yield tallies

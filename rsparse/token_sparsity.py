"""What every single token reads under static thresholds: its sparsity, linear by linear and for the whole decoder.

A static threshold fixes the mean over a text. A decoder waits for one token at a time, and how many weight columns that
token reads is up to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsparse.apply import report_of, tallied, tokens_as
from rsparse.calibrate import check_ids, run_decoder
from rsparse.report import LinearReport


class TokenTally:
    """Kept channels of every token, in the order they come: 4 bytes for each."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, keep: Tensor, counted: Tensor | None = None) -> None:
        """Count a mask (..., n), or those of its tokens that are `counted` (...)."""
        kept = keep.sum(-1, dtype=torch.int32)
        self._parts.append((kept.flatten() if counted is None else kept[counted]).cpu())

    @property
    def kept(self) -> Tensor:
        """(tokens,) int32."""
        return torch.cat(self._parts)


def per_token(model: nn.Module, ids: Tensor) -> dict[LinearReport, Tensor]:
    """Sparsity of every token of `ids` (samples, length) in every linear of a sparsified model: (tokens,) float64.

    Every position is sparse, samples one after the other. ValueError for a dense model or ids that are not token ids.
    """
    with tallied(model, TokenTally) as tallies, tokens_as(model, "all"):
        run_decoder(model, check_ids(ids, model, "ids"))
    found = {}
    for line in report_of(model).linears:
        tally = tallies.get(line.follows or line.name)
        if tally is None:
            found[line] = torch.full((ids.numel(),), 1 - line.read, dtype=torch.float64)
        else:
            found[line] = 1 - line.overhead - tally.kept.double() / line.channels
    return found


def together(found: dict[LinearReport, Tensor]) -> Tensor:
    """Sparsity of every token over some linears together, weighted by their dense bytes: (tokens,) float64."""
    total = sum(line.dense_bytes for line in found)
    return sum(line.dense_bytes * values for line, values in found.items()) / total

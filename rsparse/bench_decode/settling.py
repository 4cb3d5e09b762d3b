"""Thresholds and realised sparsity on the inputs of decode steps.

What a linear reads depends on the position: a head's output is a mean over the text so far, and small where weights
are random and the text is long. Thresholds from whole samples would leave another sparsity than the one asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsparse.apply import counting, masks_of
from rsparse.calibrate import ROUNDS, hooks, statistics_key
from rsparse.decode import Engine, reference
from rsparse.linears import Masked
from rsparse.models import Place
from rsparse.replay import Tape, recording
from rsparse.report import Report
from rsparse.thresholds import ScoreStatistics

STEPS = 16
"""Decode steps at each of `Steps.starts`."""


@dataclass(frozen=True)
class Steps:
    """ids: LongTensor (batch, length), a prompt and what is fed behind it. starts: positions from which `STEPS` tokens
    of it are fed one by one, after those before."""

    ids: Tensor
    starts: tuple[int, ...]

    @classmethod
    def over(cls, ids: Tensor, prompt: int) -> Steps:
        """At the beginning, the middle and the end of what follows a prompt of `prompt` tokens."""
        last = max(ids.shape[1] - STEPS, prompt)
        return cls(ids, tuple(sorted({prompt, (prompt + last) // 2, last})))

    def run(self, engine: Engine) -> None:
        for start in self.starts:
            engine.logits(self.ids[:, : start + STEPS], start)


def settle(model: nn.Module, steps: Steps) -> None:
    """Set the static thresholds of the sparsified `model` to the quantiles of its scores in `steps`, ROUNDS times: each
    time on what the sparse model itself leaves, see rsparse.calibrate.settle."""
    masks = [(place, x) for place, x in masks_of(model).values() if _has_threshold(place, x)]
    for _ in range(ROUNDS if masks else 0):
        with _statistics(masks) as found:
            steps.run(Engine(model, builder=reference, graphs=False))
        for place, module in masks:
            module.threshold = found[statistics_key(place, module)].quantile(1 - module.split.kept / place.channels)


def realised(model: nn.Module, steps: Steps) -> tuple[Report, Tape]:
    """The report with the sparsity of each token in `steps`, and the masks of all rows."""
    with counting(model) as report, recording(model) as tape:
        steps.run(Engine(model, builder=reference, graphs=False))
        return report(), tape


def _has_threshold(place: Place, module: Masked) -> bool:
    return module.threshold is not None and 0 < module.split.kept < place.channels


@contextmanager
def _statistics(masks: Sequence[tuple[Place, Masked]]) -> Iterator[dict[tuple, ScoreStatistics]]:
    """Inside, statistics of what `masks` score in decode steps are gathered, by `statistics_key`."""
    firsts = {statistics_key(place, module): (place, module) for place, module in reversed(masks)}
    found = {key: ScoreStatistics(x.channels, module.norms, x.device) for key, (x, module) in firsts.items()}
    modules = {place.name: (key, module) for key, (place, module) in firsts.items()}

    def add(place: Place, x: torch.Tensor) -> None:
        key, module = modules[place.name]
        if module.protocol.continues:
            found[key].add(module.scored(x))

    with hooks([place for place, _ in firsts.values()], add):
        yield found

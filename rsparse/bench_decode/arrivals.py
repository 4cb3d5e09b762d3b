"""When each token of a generation was on the host, and the rates that follow.

One run serves every shorter length: its first tokens are those of a shorter run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrivals:
    """seconds: from the call to each of the new tokens, at least two. tokens: LongTensor (batch, new)."""

    seconds: tuple[float, ...]
    tokens: Tensor

    @property
    def prefill(self) -> float:
        """Seconds to the first token, the prompt's."""
        return self.seconds[0]

    def step(self, new: int | None = None) -> float:
        """Mean seconds of a decode step over the first `new` tokens, prefill not counted."""
        new = new or len(self.seconds)
        return (self.seconds[new - 1] - self.seconds[0]) / (new - 1)

    def with_prefill(self, new: int) -> float:
        """Tokens per second of one row over the first `new`, prefill counted."""
        return new / self.seconds[new - 1]


def timed(generation: Callable[[], Iterable[Tensor]]) -> Arrivals:
    """Run `generation`, an iterable of tokens (batch,) that are on the CPU, and note when each comes."""
    started, seconds, tokens = time.perf_counter(), [], []
    for x in generation():
        seconds.append(time.perf_counter() - started)
        tokens.append(x)
    return Arrivals(tuple(seconds), torch.stack(tokens, dim=1))


def repeated(run: Callable[[], Arrivals], repeats: int) -> list[Arrivals]:
    """`repeats` runs after one that is dropped: it compiles, captures and warms up."""
    run()
    return [run() for _ in range(repeats)]


LENGTHS = (128, 256, 512, 1024, 2048)
"""New tokens that R-Sparse's Figure 6 shows (arXiv 2504.19449)."""


def summary(runs: Sequence[Arrivals]) -> dict:
    """Medians over `runs`, seconds and tokens per second of one row, by new tokens; and the arrivals of the run whose
    total is the median one."""
    new = len(runs[0].seconds)
    lengths = sorted({x for x in LENGTHS if x < new} | {new})
    middle = sorted(runs, key=lambda run: run.seconds[-1])[(len(runs) - 1) // 2]
    return {
        "prefill_s": statistics.median(run.prefill for run in runs),
        "step_s": statistics.median(run.step() for run in runs),
        "tokens_per_s": {str(x): 1 / statistics.median(run.step(x) for run in runs) for x in lengths},
        "with_prefill": {str(x): statistics.median(run.with_prefill(x) for run in runs) for x in lengths},
        "slowest_step_s": max(run.step() for run in runs), "fastest_step_s": min(run.step() for run in runs),
        "arrivals_s": [round(x, 6) for x in middle.seconds],
    }  # fmt: skip

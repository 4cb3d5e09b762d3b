"""Paired differences between two settings: the same items, the same held-out windows, seed by seed.

What two runs share, how hard each item is, cancels; so does the choice of calibration windows, where both are
calibrated. Differences are averaged over seeds item by item: the spread over seeds is in the rows of each seed, here
seeds only quieten the calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd

from rsparse import intervals
from rsparse.protocol import Tokens
from rsparse.study import Setting, Study, describe, or_norm, paired_rows

METRICS = ("acc", "acc_or_norm", "margin")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a setting as a study measures it, under a token protocol for tasks and for losses."""

    study: Study
    setting: Setting
    tokens: Tokens = "scored"
    loss_tokens: Tokens = "all"

    @property
    def dense(self) -> bool:
        return self.setting.method == "dense"

    def seeds(self, seeds: Sequence[int]) -> Sequence[int]:
        return self.setting.seeds(seeds)

    def measure(self, seeds: Sequence[int], tasks: bool = True) -> None:
        """Held-out losses and, unless told otherwise, tasks, of every seed that matters."""
        for seed in self.seeds(seeds):
            self.study.losses(self.setting, seed, self.loss_tokens)
            if tasks:
                self.study.tasks(self.setting, seed, self.tokens)

    def losses(self, seeds: Sequence[int]) -> list[float]:
        """Mean over seeds of every held-out window's loss, nats per token."""
        runs = [self.study.losses(self.setting, seed, self.loss_tokens) for seed in self.seeds(seeds)]
        return [sum(values) / len(values) for values in zip(*runs, strict=True)]

    def items(self, seeds: Sequence[int]) -> pd.DataFrame:
        """Mean over seeds of every item's values: columns task, item, acc, acc_norm, margin, acc_or_norm."""
        runs = [
            self.study.tasks(self.setting, seed, self.tokens).set_index(["task", "item"]) for seed in self.seeds(seeds)
        ]
        return or_norm((sum(runs[1:], runs[0]) / len(runs)).reset_index())

    def key(self) -> dict[str, Any]:
        rules = {"tokens": repr(self.tokens), "loss tokens": repr(self.loss_tokens)}
        return rules | {"setting": asdict(self.setting), "study": self.study.identity}


def of(study: Study, setting: Setting, tokens: Tokens = "scored", loss_tokens: Tokens = "all") -> Arm:
    """The arm of a setting; the dense model, the same under every rule, is measured under the headline's alone."""
    arm = Arm(study, setting, tokens, loss_tokens)
    return replace(arm, tokens="scored", loss_tokens="all") if arm.dense else arm


def add_differences(
    arm: Arm, other: Arm, seeds: Sequence[int], label: str = "", tasks: bool = True, **columns: Any
) -> None:
    """Rows of paired differences `arm` minus `other`, with 95% intervals, in the table of the arm's study.

    Metrics: diff_perplexity_log, the difference of mean losses in nats per token, over held-out windows; and with
    `tasks` diff_acc, diff_acc_or_norm and diff_margin per task and on average. Column `against`: `label`, or the
    other's method. columns: take the place of the row's own, or stand behind them.
    """
    label = label or other.setting.method
    table = arm.study.table
    key = {"what": "paired", "arm": arm.key(), "other": other.key(), "seeds": list(seeds), "tasks": tasks,
           "label": label, "columns": columns}  # fmt: skip
    if table.find(key) is None:
        base = describe(arm.setting, arm.study.sources) | {
            "seed": "/".join(map(str, arm.seeds(seeds))), "against": label, **columns
        }  # fmt: skip
        heldout = {"tokens": str(arm.loss_tokens), "task": "heldout", "metric": "diff_perplexity_log"}
        rows = [base | heldout | columns | intervals.paired(arm.losses(seeds), other.losses(seeds)).row()]
        if tasks:
            scored = base | {"tokens": str(arm.tokens)} | columns
            rows += paired_rows(arm.items(seeds), other.items(seeds), METRICS, scored)
        table.add(key, rows)

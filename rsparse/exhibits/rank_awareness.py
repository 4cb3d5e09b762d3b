"""Table 3 and the central question: does the low-rank path earn the bytes it reads?

R-Sparse (arXiv 2504.19449), Table 3, extended to four budgets. Every comparison is paired: the same items,
the same held-out windows, the same calibration text. A difference is r-sparse minus the method it is set
against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
from tqdm import tqdm

from rsparse import intervals
from rsparse.exhibits import paired
from rsparse.study import DENSE, Setting, Study, check_some, describe
from rsparse.thresholds import SCORES


@dataclass(frozen=True)
class Plan:
    """What the exhibit compares. ValueError, before anything is measured, for a value that is not allowed.

    sparsities: budgets of Table 3 and of the sweep; score_sparsities: of the two-by-two. rho: of R-Sparse; rhos:
    of the sweep, which adds rho = 1. seeds: each picks its own calibration windows. whitened_sparsities, whitened_rhos:
    of the factors made for the residuals, at the plan's rho too.
    """

    sparsities: Sequence[float]
    score_sparsities: Sequence[float]
    rho: float
    rhos: Sequence[float]
    threshold: str
    seeds: Sequence[int]
    whitened_sparsities: Sequence[float] = ()
    whitened_rhos: Sequence[float] = ()

    def __post_init__(self) -> None:
        check_some("sparsities", self.sparsities, self.seeds)
        for sparsity in (*self.sparsities, *self.score_sparsities, *self.whitened_sparsities):
            self.methods(sparsity), self.sweep(sparsity)
        for rho in self.whitened_rhos:
            Setting("r-sparse", self.sparsities[0], rho, threshold=self.threshold, factors="whitened")
        if 0 in self.sparsities or self.rho in (0, 1):
            raise ValueError(
                f"sparsities are {self.sparsities}, rho is {self.rho}; expected no sparsity of 0, and a rho between 0 "
                "and 1, which spends on both paths"
            )

    def methods(self, sparsity: float) -> dict[str, Setting]:
        """The rows of Table 3 at one budget, beside dense."""
        return {
            "teal": Setting("teal", sparsity, threshold=self.threshold),
            "low-rank": Setting("low-rank", sparsity, threshold=self.threshold),
            "r-sparse": Setting("r-sparse", sparsity, self.rho, threshold=self.threshold),
        }

    def two_by_two(self, sparsity: float) -> dict[tuple[str, float], Setting]:
        """Mask score x low-rank path at one budget: (score, rho) -> setting. (magnitude, 1) is TEAL."""
        return {
            (score, rho): Setting("r-sparse", sparsity, rho, score, self.threshold)
            for score in SCORES
            for rho in (1.0, self.rho)
        }

    def sweep(self, sparsity: float) -> dict[float, Setting]:
        """rho -> setting at one budget, from the smallest rho (the largest rank) up."""
        return {
            rho: Setting("r-sparse", sparsity, rho, threshold=self.threshold)
            for rho in sorted({*self.rhos, 1.0})
        }


def compare(study: Study, plan: Plan) -> None:
    """Table 3 at every budget, and the differences that its question turns on."""
    for sparsity in tqdm(plan.sparsities, desc="budgets"):
        found = plan.methods(sparsity)
        for setting in (DENSE, *found.values()):
            paired.of(study, setting).measure(plan.seeds)
        _compare(study, found["r-sparse"], found["teal"], plan.seeds)
        _compare(study, found["low-rank"], found["teal"], plan.seeds)
        for setting in found.values():
            _compare(study, setting, DENSE, plan.seeds)


def compare_scores(study: Study, plan: Plan) -> None:
    """The two-by-two of mask score and low-rank path at every budget, by held-out loss and by margins."""
    for sparsity in tqdm(plan.score_sparsities, desc="two by two"):
        cells = plan.two_by_two(sparsity)
        for setting in cells.values():
            paired.of(study, setting).measure(plan.seeds)
        for score in SCORES:
            _compare(study, cells[score, plan.rho], cells[score, 1.0], plan.seeds, "rho=1")
        _compare(study, cells["column-norm", 1.0], plan.methods(sparsity)["teal"], plan.seeds)


def compare_factors(study: Study, plan: Plan) -> None:
    """Whitened factors against the singular vectors of W at the same bytes, and against no path: at the plan's rho by
    everything, at other rhos by held-out loss alone."""
    for sparsity in tqdm(plan.whitened_sparsities, desc="factors"):
        teal = plan.methods(sparsity)["teal"]
        for rho in sorted({*plan.whitened_rhos, plan.rho}):
            plain = Setting("r-sparse", sparsity, rho, threshold=plan.threshold)
            made, whole = replace(plain, factors="whitened"), rho == plan.rho
            paired.of(study, made).measure(plan.seeds, tasks=whole)  # its rows, where the differences are known already
            for other, label in ((plain, "svd"), (teal, "rho=1")):
                arms = (paired.of(study, setting) for setting in (made, other))
                paired.add_differences(*arms, plan.seeds, label, tasks=whole)


def sweep(study: Study, plan: Plan) -> pd.DataFrame:
    """Held-out loss at every rho of every budget, and its paired difference from rho = 1, in nats per token.

    Columns: sparsity, rho, perplexity, diff_loss, low, high, n. The intervals of one budget hold together at 95%
    (Bonferroni), so that the best of its points may be picked by looking. From the smallest rho and sparsity up, so
    that the first setting of a linear has its largest rank and every linear is decomposed once. First seed only.
    Settings that are rows of Table 3 have their tasks scored too, while they are in place: `compare` would calibrate
    them again.
    """
    points = []
    for sparsity in tqdm(sorted(plan.sparsities), desc="rho sweep"):
        in_table = {x.canonical: x for x in plan.methods(sparsity).values()}
        losses = {}
        for rho, setting in plan.sweep(sparsity).items():
            losses[rho] = study.losses(setting, plan.seeds[0])
            if row := in_table.get(setting.canonical):
                paired.of(study, row).measure(plan.seeds[:1])
        confidence = 1 - 0.05 / max(1, len(losses) - 1)
        found = {rho: intervals.paired(values, losses[1.0], confidence) for rho, values in losses.items()}
        _add_sweep_rows(study, plan, sparsity, losses, found)
        points += [
            {"sparsity": sparsity, "rho": rho, "perplexity": math.exp(intervals.mean(losses[rho]).mean),
             "diff_loss": x.mean, "low": x.low, "high": x.high, "n": x.n}
            for rho, x in found.items()
        ]  # fmt: skip
    return pd.DataFrame(points)


def _add_sweep_rows(
    study: Study, plan: Plan, sparsity: float, losses: dict[float, list[float]], found: dict[float, intervals.Interval]
) -> None:
    """Rows for the claims: every rho against rho = 1, the intervals of `found`, and against the next lower rho."""
    settings, heldout = plan.sweep(sparsity), {"tokens": "all", "task": "heldout", "metric": "diff_perplexity_log"}
    key = {"what": "sweep", "settings": [vars(x) for x in settings.values()], "seed": plan.seeds[0]}
    key |= {"study": study.identity}
    if study.table.find(key) is None:
        rows, below = [], None
        for rho, setting in settings.items():
            base = describe(setting, study.sources) | {"seed": plan.seeds[0]} | heldout
            if rho < 1:
                rows.append(base | {"against": "sweep: rho 1"} | found[rho].row())
            if below is not None:
                step = intervals.paired(losses[rho], losses[below])
                rows.append(base | {"against": "sweep: next lower"} | step.row())
            below = rho
        study.table.add(key, rows)


def _compare(study: Study, setting: Setting, against: Setting, seeds: Sequence[int], label: str = "") -> None:
    paired.add_differences(paired.of(study, setting), paired.of(study, against), seeds, label)

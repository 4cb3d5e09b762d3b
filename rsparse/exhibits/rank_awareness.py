"""Table 3 and the central question: does the low-rank path earn the bytes it reads?

R-Sparse (arXiv 2504.19449), Table 3, extended to four budgets. Every comparison is paired: the same items,
the same held-out windows, the same calibration text. A difference is r-sparse minus the method it is set
against.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
from tqdm import tqdm

from rsparse import intervals
from rsparse.study import DENSE, Setting, Study, describe, paired_rows
from rsparse.thresholds import SCORES

METRICS = ("acc", "margin")
LABELS = {"dense": "dense", "teal": "sparse only (TEAL)", "low-rank": "low-rank only", "r-sparse": "R-Sparse"}


@dataclass(frozen=True)
class Plan:
    """What the exhibit compares. ValueError, before anything is measured, for a value that is not allowed.

    sparsities: budgets of Table 3 and of the sweep; score_sparsities: of the two-by-two. rho: of R-Sparse;
    rhos: of the sweep, which adds rho = 1. seeds: each picks its own calibration windows.
    """

    sparsities: Sequence[float]
    score_sparsities: Sequence[float]
    rho: float
    rhos: Sequence[float]
    threshold: str
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not self.sparsities or not self.seeds or not 0 < min(self.sparsities):
            raise ValueError(
                f"sparsities are {self.sparsities}, seeds {self.seeds}; expected some of each, above 0"
            )
        if not 0 < self.rho < 1:
            raise ValueError(
                f"rho is {self.rho}; expected a number between 0 and 1, which spends on both paths"
            )
        for sparsity in (*self.sparsities, *self.score_sparsities):
            self.methods(sparsity), self.sweep(sparsity)

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
        _measure(study, (DENSE, *found.values()), plan.seeds)
        add_differences(study, found["r-sparse"], found["teal"], plan.seeds)
        add_differences(study, found["low-rank"], found["teal"], plan.seeds)
        for setting in found.values():
            add_differences(study, setting, DENSE, plan.seeds)


def compare_scores(study: Study, plan: Plan) -> None:
    """The two-by-two of mask score and low-rank path at every budget, by held-out loss and by margins."""
    for sparsity in tqdm(plan.score_sparsities, desc="two by two"):
        cells = plan.two_by_two(sparsity)
        _measure(study, cells.values(), plan.seeds)
        for score in SCORES:
            add_differences(study, cells[score, plan.rho], cells[score, 1.0], plan.seeds)
        add_differences(study, cells["column-norm", 1.0], plan.methods(sparsity)["teal"], plan.seeds)


def sweep(study: Study, plan: Plan) -> pd.DataFrame:
    """Held-out loss at every rho of every budget, and its paired difference from rho = 1, in nats per token.

    Columns: sparsity, rho, perplexity, diff_loss, low, high, n. From the smallest rho and sparsity up, so
    that the first setting of a linear has its largest rank and every linear is decomposed once. First seed
    only.
    """
    points = []
    for sparsity in tqdm(sorted(plan.sparsities), desc="rho sweep"):
        losses = {rho: study.losses(setting, plan.seeds[0]) for rho, setting in plan.sweep(sparsity).items()}
        for rho, values in losses.items():
            x = intervals.paired(values, losses[1.0])
            points.append({
                "sparsity": sparsity, "rho": rho, "perplexity": math.exp(intervals.mean(values).mean),
                "diff_loss": x.mean, "low": x.low, "high": x.high, "n": x.n,
            })  # fmt: skip
    return pd.DataFrame(points)


def _measure(study: Study, settings: Iterable[Setting], seeds: Sequence[int]) -> None:
    for setting in settings:
        for seed in setting.seeds(seeds):
            study.losses(setting, seed)
            study.tasks(setting, seed)


def add_differences(study: Study, setting: Setting, against: Setting, seeds: Sequence[int]) -> None:
    """Rows of paired differences `setting` minus `against`, averaged over seeds item by item.

    Metrics: diff_acc, diff_margin per task and on average; diff_perplexity_log, the difference of mean losses
    in nats per token, over held-out windows. Column `against`: a method, or "rho=1" for r-sparse itself with
    the same score. The spread over seeds is in the rows of each seed; here seeds only quieten the
    calibration.
    """
    key = {"what": "differences", "setting": vars(setting), "against": vars(against), "seeds": list(seeds),
           "study": study.identity}  # fmt: skip
    if study.table.find(key) is None:
        base = describe(setting, study.sources) | {
            "seed": "/".join(map(str, setting.seeds(seeds))),
            "against": "rho=1" if against.method == "r-sparse" else against.method,
        }
        losses = _mean_losses(study, setting, seeds), _mean_losses(study, against, seeds)
        heldout = {"tokens": "all", "task": "heldout", "metric": "diff_perplexity_log"}
        rows = [base | heldout | intervals.paired(*losses).row()]
        items = _mean_items(study, setting, seeds), _mean_items(study, against, seeds)
        study.table.add(key, rows + paired_rows(*items, METRICS, base | {"tokens": "scored"}))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Table 3: one row per budget and method at the headline setting, means over seeds."""
    rows = _headline(rows)
    rows = rows.assign(order=rows["method"].map(list(LABELS).index)).sort_values(
        ["sparsity", "order"], kind="stable"
    )
    found = []
    for (sparsity, method), part in rows.groupby(["sparsity", "method"], sort=False):
        average = part[(part["task"] == "average") & (part["metric"] == "acc")]
        found.append({
            "sparsity": f"{sparsity:.0%}", "method": LABELS[method],
            "planned (%)": 100 * part["planned"].mean(),
            "realised (%)": 100 * part["realised"].mean(), "accuracy": 100 * average["value"].mean(),
            "±": 100 * average["stderr"].mean(), "accuracy of 4": 100 * _mean(part, "average-4", "acc"),
            "margin": _mean(part, "average", "margin"), "perplexity": _mean(part, "heldout", "perplexity"),
            "n": int(average["n"].max()), "seeds": part["seed"].nunique(),
        })  # fmt: skip
    return pd.DataFrame(found)


def differences(rows: pd.DataFrame, metric: str, task: str) -> pd.DataFrame:
    """R-Sparse minus TEAL by budget: columns value, low, high, n, label."""
    chosen = (rows["metric"] == metric) & (rows["task"] == task) & (rows["against"] == "teal")
    part = rows[chosen & (rows["method"] == "r-sparse") & (rows["score"] == "magnitude") & (rows["rho"] < 1)]
    return part.sort_values("sparsity").assign(label=lambda x: [f"sparsity {s:.0%}" for s in x["sparsity"]])


def reading(rows: pd.DataFrame, model: str) -> str:
    """The verdict in words: per measure, where the 95% interval lies on one side of zero, and where it does
    not."""
    parts = []
    for name, metric, task, sign in (
        ("the margin", "diff_margin", "average", 1),
        ("accuracy", "diff_acc", "average", 1),
        ("held-out loss", "diff_perplexity_log", "heldout", -1),
    ):
        found = differences(rows, metric, task)
        better = found[(sign * found["low"] > 0) & (sign * found["high"] > 0)]
        worse = found[(sign * found["low"] < 0) & (sign * found["high"] < 0)]
        open_ = found.drop(better.index).drop(worse.index)
        words = [f"{word} at {_budgets(group)}" for word, group in
                 (("better", better), ("worse", worse), ("not told apart", open_)) if len(group)]  # fmt: skip
        parts.append(f"by {name}, R-Sparse is {' and '.join(words) or 'not measured'}")
    return f"On `{model}`, against TEAL at the same read budget: " + "; ".join(parts) + "."


def score_table(rows: pd.DataFrame, rho: float) -> pd.DataFrame:
    """The two-by-two, perplexity and margin by score and path, at the budgets where all four cells are
    measured."""
    found = []
    part = rows[(rows["method"] == "r-sparse") & rows["against"].isna() & rows["rho"].isin([1.0, rho])]
    scored = part[(part["task"] == "average") & (part["metric"] == "margin")]  # the sweep scores no tasks
    whole = scored.groupby("sparsity").filter(lambda x: len(x.groupby(["score", "rho"])) == 4)
    part = part[part["sparsity"].isin(whole["sparsity"])]
    for (sparsity, score, share), group in part.groupby(["sparsity", "score", "rho"]):
        found.append({
            "sparsity": f"{sparsity:.0%}", "score": score,
            "low-rank path": "none (rho 1)" if share == 1 else f"rho {share:g}",
            "perplexity": _mean(group, "heldout", "perplexity"), "margin": _mean(group, "average", "margin"),
        })  # fmt: skip
    return pd.DataFrame(found)


def score_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Loss differences of the two-by-two with labels: the path at either score, the score without the
    path."""
    part = rows[(rows["metric"] == "diff_perplexity_log") & (rows["method"] == "r-sparse")]
    path = part[part["against"] == "rho=1"]
    path = path.assign(
        label=[f"{s:.0%}: path, {score}" for s, score in zip(path["sparsity"], path["score"], strict=True)]
    )
    score = part[(part["against"] == "teal") & (part["score"] == "column-norm")]
    score = score.assign(label=[f"{s:.0%}: column-norm score, no path" for s in score["sparsity"]])
    return pd.concat([path, score]).sort_values("sparsity", kind="stable")


def sweep_table(points: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The sweep with the ranks that each rho buys."""
    ranks = (
        rows.dropna(subset=["ranks"])
        .query("method == 'r-sparse'")
        .groupby(["sparsity", "rho"])["ranks"]
        .first()
    )
    shown = points.assign(
        ranks=[ranks.get((s, r), "") for s, r in zip(points["sparsity"], points["rho"], strict=True)]
    )
    shown = shown.assign(sparsity=[f"{s:.0%}" for s in shown["sparsity"]])
    return shown.rename(columns={"diff_loss": "difference"})


def sweep_reading(points: pd.DataFrame, model: str) -> str:
    """Where the best rho of every budget lies, and whether it differs from 1."""
    parts = []
    for sparsity, group in points.groupby("sparsity"):
        best = group.loc[group["perplexity"].idxmin()]
        if best["rho"] == 1:
            parts.append(f"at {sparsity:.0%} rho 1 is best: no byte spent on rank paid")
        else:
            sure = "excludes" if best["high"] < 0 else "does not exclude"
            parts.append(
                f"at {sparsity:.0%} the best is rho {best['rho']:g}, {-best['diff_loss']:.4f} nats per token "
                f"better than rho 1 (its interval {sure} zero)"
            )
    return f"On `{model}`, among the values of this grid: " + "; ".join(parts) + "."


def _headline(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured rows (no differences) of the four methods; of r-sparse, where tasks were scored with |x| and
    rho < 1."""
    rows = rows[rows["against"].isna()]
    own = rows["method"] == "r-sparse"
    plain = own & (rows["score"] == "magnitude") & (rows["rho"] < 1)
    rhos = rows.loc[plain & (rows["metric"] == "margin"), "rho"].unique()  # the sweep scores no tasks
    return rows[~own | (plain & rows["rho"].isin(rhos))]


def _mean(part: pd.DataFrame, task: str, metric: str) -> float:
    return part.loc[(part["task"] == task) & (part["metric"] == metric), "value"].mean()


def _budgets(group: pd.DataFrame) -> str:
    return ", ".join(f"{s:.0%}" for s in group["sparsity"])


def _mean_losses(study: Study, setting: Setting, seeds: Sequence[int]) -> list[float]:
    runs = [study.losses(setting, seed) for seed in setting.seeds(seeds)]
    return [sum(values) / len(values) for values in zip(*runs, strict=True)]


def _mean_items(study: Study, setting: Setting, seeds: Sequence[int]) -> pd.DataFrame:
    runs = [study.tasks(setting, seed).set_index(["task", "item"]) for seed in setting.seeds(seeds)]
    return (sum(runs[1:], runs[0]) / len(runs)).reset_index()

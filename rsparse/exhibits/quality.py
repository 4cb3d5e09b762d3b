"""Figure 5: quality against model-level sparsity, in the paper's three measures.

R-Sparse (arXiv 2504.19449), Figure 5: average accuracy of the eight reasoning tasks, perplexity of held-out
text, ROUGE-L of one-sentence summaries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from tqdm import tqdm

from rsparse.study import DENSE, Setting, Study

MEASURES = {  # label -> (task, metric, factor to the printed unit)
    "accuracy (%)": ("average", "acc", 100),
    "perplexity": ("heldout", "perplexity", 1),
    "ROUGE-L (%)": ("summaries", "rouge_l", 1),
}


def settings(
    methods: Sequence[str], sparsities: Sequence[float], rho: float, threshold: str
) -> list[Setting]:
    """Dense (sparsity 0 of every method), then every method at every sparsity above 0.

    Low rank first and from the smallest sparsity up: it takes the largest rank of a linear, which serves the others.
    """
    ordered = sorted(methods, key=lambda method: method != "low-rank")
    grid = [Setting(method, s, rho, threshold=threshold) for method in ordered for s in sorted(sparsities) if s > 0]
    return [DENSE, *grid]


def measure(study: Study, grid: Sequence[Setting], seeds: Sequence[int], summaries: bool = True) -> None:
    """All three measures of every setting, and of every seed that matters to it."""
    cells = [(x, seed) for x in grid for seed in x.seeds(seeds)]
    for setting, seed in tqdm(cells, desc="settings"):
        study.losses(setting, seed)
        study.tasks(setting, seed)
        if summaries:
            study.rouge(setting, seed)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method and sparsity: the three measures with the standard error of the first seed, as text."""
    parts = []
    for label, (task, metric, scale) in MEASURES.items():
        chosen = rows[(rows["task"] == task) & (rows["metric"] == metric)]
        groups = chosen.groupby(["method", "sparsity"], sort=False)
        value, error = scale * groups["value"].mean(), scale * groups["stderr"].first()
        texts = [f"{v:.2f} ± {e:.2f}" for v, e in zip(value, error, strict=True)]
        parts.append(pd.Series(texts, value.index, name=label, dtype=object))
    groups = rows.dropna(subset=["planned"]).groupby(["method", "sparsity"], sort=False)
    plans = (100 * groups[["planned", "realised"]].mean()).rename(columns=lambda name: f"{name} (%)")
    found = pd.concat([plans, *parts], axis=1).dropna(how="all").fillna(dict.fromkeys(MEASURES, "")).reset_index()
    return found.assign(sparsity=[f"{s:.0%}" for s in found["sparsity"]])


def reading(rows: pd.DataFrame, model: str, near: float = 0.5) -> str:
    """The sentence under the figure: R-Sparse against dense at the measured sparsity nearest to `near`."""
    measured = sorted(
        set(rows.loc[(rows["method"] == "r-sparse") & (rows["metric"] == "perplexity"), "sparsity"])
    )
    if not measured:
        return f"R-Sparse was not measured on `{model}`."
    sparsity = min(measured, key=lambda s: abs(s - near))
    parts = []
    for label, (task, metric, scale) in MEASURES.items():
        dense = scale * _value(rows, "dense", 0.0, task, metric)
        sparse = scale * _value(rows, "r-sparse", sparsity, task, metric)
        if not (math.isnan(dense) or math.isnan(sparse)):
            parts.append(f"{label} goes from {dense:.2f} to {sparse:.2f}")
    return f"At {sparsity:.0%} model-level sparsity, with R-Sparse on `{model}`: " + "; ".join(parts) + "."


def _value(rows: pd.DataFrame, method: str, sparsity: float, task: str, metric: str) -> float:
    chosen = (rows["method"] == method) & (rows["task"] == task) & (rows["metric"] == metric)
    return rows.loc[chosen & (rows["sparsity"] == sparsity), "value"].mean()

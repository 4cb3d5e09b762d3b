"""Paired differences as gains: turned so that more is better, named by measure, and put into words.

Reads rows of finished tables alone and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd


class Measure(NamedTuple):
    """Where a measure's differences stand in a table, and how they are printed. factor: -1 where less is better."""

    task: str
    metric: str
    factor: float
    unit: str
    decimals: int


MEASURES = {
    "accuracy": Measure("average", "diff_acc", 100, "points", 2),
    "margin": Measure("average", "diff_margin", 1, "nats", 3),
    "held-out loss": Measure("heldout", "diff_perplexity_log", -1, "nats per token saved", 4),
    "ROUGE-L": Measure("summaries", "diff_rouge_l", 1, "points", 2),
}
NAMES = {"dense": "dense", "r-sparse": "R-Sparse", "teal": "TEAL", "cats": "CATS", "griffin": "GRIFFIN"}
"""Methods as sentences call them; one that is not here goes by its id."""
DUST = 1e-12
"""What rounding leaves of a zero; its sign says nothing."""


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold differences of `MEASURES`, by sparsity and measure, with a column `measure`.

    value, low and high are in the printed unit, positive where the row's own setting is the better one.
    """
    names = {(m.task, m.metric): name for name, m in MEASURES.items()}
    found = rows.assign(measure=[names.get(pair) for pair in zip(rows["task"], rows["metric"], strict=True)])
    found = found.dropna(subset=["measure"])
    scaled = found[["value", "low", "high"]].mul(found["measure"].map(lambda name: MEASURES[name].factor), axis=0)
    found = found.assign(
        value=scaled["value"], low=np.minimum(scaled["low"], scaled["high"]),
        high=np.maximum(scaled["low"], scaled["high"]), order=found["measure"].map(list(MEASURES).index),
    )  # fmt: skip
    found = found.sort_values(["sparsity", "order"], kind="stable", ignore_index=True)
    return found.drop(columns="order")


def panels(found: pd.DataFrame, labels: Iterable[str]) -> pd.DataFrame:
    """`gains` for `figures.difference_panels`: columns panel, label, value, low, high; one label per row."""
    shown = found.assign(panel=[titled(name) for name in found["measure"]], label=list(labels))
    return shown[["panel", "label", "value", "low", "high"]]


def titled(measure: str) -> str:
    """A measure's name with its unit."""
    return f"{measure} ({MEASURES[measure].unit})"


def by_sign(found: pd.DataFrame, words: Sequence[str]) -> str:
    """Sparsities sorted by where the 95% interval lies; words: for above zero, below zero, and neither."""
    above, below = found["low"] > 0, found["high"] < 0
    groups = zip(words, (above, below, ~(above | below)), strict=True)
    return ", ".join(f"{word} at {budgets(found.loc[mask, 'sparsity'])}" for word, mask in groups if mask.any())


def tally(found: pd.DataFrame, words: Sequence[str]) -> str:
    """Comparisons counted by where the 95% interval lies; words: for above zero, below zero, and neither.

    A comparison is one row: a measure at a budget. "ahead in 1 of 6 comparisons (margin at 25%), open in the others".
    """
    count, above, below = len(found), found["low"] > 0, found["high"] < 0
    for word, mask in zip(words, (above, below, ~(above | below)), strict=True):
        if mask.all():
            every = "any of" if word == words[2] else "all"
            return f"{word} in {every} {count} comparisons" if count > 1 else f"{word} in the one comparison"
    said = [f"{word} in {mask.sum()} ({where(found[mask])})" for word, mask in zip(words, (above, below), strict=False)
            if mask.any()]  # fmt: skip
    said[0] = said[0].replace(" (", f" of {count} comparisons (", 1)
    return ", ".join(said if (above | below).all() else [*said, f"{words[2]} in the others"])


def where(found: pd.DataFrame) -> str:
    """Which measures at which budgets: "accuracy and margin at 50%, held-out loss at 40% and 50%"."""
    measures: dict[str, list[str]] = {}
    for measure, part in found.groupby("measure", sort=False):
        measures.setdefault(budgets(part["sparsity"]), []).append(measure)
    return ", ".join(f"{listed(names)} at {shares}" for shares, names in measures.items())


def interval(row: Mapping[str, float], decimals: int) -> str:
    """"+1.2 [+0.4, +2.0]", without an interval that is not known.

    A bound just below zero keeps its sign, "-0.0": the sign says on which side of zero it lies.
    """
    numbers = (row[name] if abs(row[name]) > DUST else 0.0 for name in ("value", "low", "high"))
    value, low, high = (f"{number:+.{decimals}f}" for number in numbers)
    return value if math.isnan(row["low"]) else f"{value} [{low}, {high}]"


def starred(row: Mapping[str, float], decimals: int) -> str:
    """`interval`, with a star where it excludes zero."""
    return interval(row, decimals) + (" *" if is_told(row) else "")


def is_told(row: Mapping[str, float]) -> bool:
    """Whether the interval of a difference excludes zero."""
    return row["low"] > 0 or row["high"] < 0


def samples(rows: pd.DataFrame) -> str:
    """"2 calibration samples of 256 tokens", what static thresholds and whitened factors of `rows` are from; "" where
    they do not say."""
    known = rows["calibration"].replace("", math.nan).dropna() if "calibration" in rows else ()
    if not len(known):
        return ""
    count, _, length = known.iloc[0].rpartition(" ")[2].partition("x")
    return f"{count} calibration sample{'' if count == '1' else 's'} of {length} tokens"


def tasks(suite: str, named: str = "the eight tasks") -> str:
    """What a caption calls the tasks: those of the embedded suites have the names of others, and are analogues."""
    return f"embedded analogues of {named}" if suite.startswith("tiny") else named


def by_measure(said: Mapping[str, str]) -> list[str]:
    """["by accuracy and margin, better at 40%", ...] from measure -> "better at 40%"; the same is said once."""
    names: dict[str, list[str]] = {}
    for measure, words in said.items():
        names.setdefault(words, []).append(measure)
    return [f"by {listed(measures)}, {words}" for words, measures in names.items()]


def budgets(sparsities: Iterable[float]) -> str:
    """"25%, 40% and 50%"."""
    return listed([f"{s:.0%}" for s in sparsities])


def listed(names: Sequence[str]) -> str:
    """"one, two and three"; ValueError for none."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last

"""What a search costs at the size of real models: in words, what `python -m rsparse search-cost` measured.

`Cost` is one entry of rsparse.estimate.search_costs. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from rsparse import paper
from rsparse.estimate import TARGET, slower_than

Cost = dict[str, Any]


def projected(cost: Cost) -> dict[str, float]:
    """Hours on an A6000, which is slower by the larger of the ratios of arithmetic and memory speed."""
    factor = slower_than(cost["device"])
    return {name: factor * cost[name] for name in ("hours_per_group", "hours_in_total")}


def paper_hours(shape: str) -> float:
    """What R-Sparse reports of one search of a model of this shape, on an A6000; NaN where it says nothing."""
    rows = paper.reported(exhibit="table-4", paper="r-sparse")
    found = rows[(rows["metric"] == "search_hours") & (rows["model"].str.lower() == shape)]["value"]
    return float(found.iloc[0]) if len(found) else math.nan


def table(costs: Sequence[Cost]) -> pd.DataFrame:
    """A row per shape and reading of the paper's 32 x 5; hours of one search where measured and, projected, there."""
    return pd.DataFrame([_row(x, reading) for x in costs for reading in ("per group", "in total")])


def _row(cost: Cost, reading: str) -> dict[str, Any]:
    hours = "hours_" + reading.replace(" ", "_")
    return {
        "shape": cost["shape"], "groups": cost["groups"], f"{cost['evaluations']} candidates": reading,
        "full pass (s)": cost["full_pass_s"], "a candidate (% of it)": 100 * cost["mean_share"],
        "blocks alone (%)": 100 * cost["bound"], "measured (h)": cost[hours],
        f"{TARGET}, projected (h)": projected(cost)[hours], "paper (h)": paper_hours(cost["shape"]),
    }  # fmt: skip


def rows(costs: Sequence[Cost]) -> pd.DataFrame:
    """Rows by which claims judge the hours of one search: with the paper's 32 x 5 candidates taken per group, as this
    book's search does, and for low and high the range that taking them in total makes."""
    return pd.DataFrame([
        {"model": f"random:{x['shape']}", "shape": x["shape"], "device": x["device"], "dtype": x["dtype"],
         "sparsity": x["sparsity"], "task": "search", "metric": "search_hours", "value": x["hours_per_group"],
         "low": x["hours_in_total"], "high": x["hours_per_group"]} for x in costs
    ])  # fmt: skip


def caption(costs: Sequence[Cost]) -> str:
    """Of the table: what was run, on which device."""
    one = costs[0]
    return (
        f"Random weights at full shape, {one['dtype']}, {one['samples']} x {one['length']} tokens, "
        f"{one['sparsity']:.0%} sparsity, {', '.join(sorted({x['device'] for x in costs}))}; no {TARGET} was used."
    )


def reading(costs: Sequence[Cost]) -> str:
    """What a candidate costs, and where the paper's hour lies."""
    shares = "; ".join(f"{x['mean_share']:.3f} of a full pass for `{x['shape']}`" for x in costs)
    blocks = "; ".join(sorted({f"{x['bound']:.4f} in {x['groups']} groups" for x in costs}))
    return (
        f"With the blocks in front of its group kept, a candidate costs {shares} on average; the blocks behind alone "
        f"would be {blocks}. {' '.join(_hour(x) for x in costs)}"
    )


def _hour(cost: Cost) -> str:
    there = projected(cost)
    low, high = sorted((there["hours_in_total"], there["hours_per_group"]))
    hours = paper_hours(cost["shape"])
    where = "lies between the two" if low <= hours <= high else f"is {'more' if hours > high else 'less'} than either"
    stated = "" if math.isnan(hours) else f"; its {hours:g} h {where}"
    return (
        f"On an {TARGET} the projection for `{cost['shape']}` is {there['hours_in_total']:.1f} h if the paper means "
        f"{cost['evaluations']} candidates in total, {there['hours_per_group']:.1f} h if it means them per "
        f"group{stated}."
    )

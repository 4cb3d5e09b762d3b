"""What the rows of `inside` say: what tokens read at most, and which method's error grows how.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import math

import pandas as pd

from rsparse.exhibits.gains import listed, samples

DETAILED = ("teal", "r-sparse")
"""Methods that have tables by linear."""


def realised_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The whole decoder over tokens, in percent: one row per method, budget and text, means over seeds."""
    part = rows[(rows["task"] == "realised") & (rows["linear"] == "decoder")]
    wide = part.pivot_table(index=["sparsity", "line", "text"], columns="metric", values="value", sort=False)
    names = {
        "planned": "planned", "realised_mean": "mean", "realised_spread": "spread",
        "realised_low": "1% of tokens below", "realised_worst": "worst token", "realised_first": "first position",
    }  # fmt: skip
    found = (100 * wide[list(names)]).rename(columns=names).rename_axis(columns=None).reset_index()
    return found.assign(sparsity=[f"{s:.0%}" for s in found["sparsity"]]).rename(columns={"line": "method"})


def shown(rows: pd.DataFrame, sparsity: float) -> list[str]:
    """The methods whose linears have tables at a sparsity: TEAL and R-Sparse, or the last one where neither was
    measured."""
    measured = list(dict.fromkeys(rows.loc[(rows["task"] == "realised") & (rows["sparsity"] == sparsity), "line"]))
    return [line for line in DETAILED if line in measured] or measured[-1:]


def kinds_table(rows: pd.DataFrame, line: str, sparsity: float) -> pd.DataFrame:
    """One method on held-out text by kind of linear, in percent: mean and spread, the worst token, the worst layer."""
    part = _own(rows, line, sparsity)
    part = part[(part["text"] == "heldout") & ~part["linear"].isin(["decoder", "block"])]
    wide = part.pivot_table(index=["linear", "layer"], columns="metric", values="value", sort=False)
    gap = (wide["realised_mean"] - wide["planned"]).groupby(level="linear", sort=False)
    groups = wide.groupby(level="linear", sort=False)
    found = pd.DataFrame({
        "planned": groups["planned"].mean(), "mean": groups["realised_mean"].mean(),
        "spread over tokens": groups["realised_spread"].mean(), "worst token": groups["realised_worst"].min(),
        "layer furthest from plan": gap.agg(lambda x: x.iloc[x.abs().argmax()]),
    })  # fmt: skip
    return (100 * found).rename_axis("linear").reset_index()


def layers_table(rows: pd.DataFrame, line: str, sparsity: float) -> pd.DataFrame:
    """One method on held-out text by layer, its linears together, in percent: mean, spread and worst over tokens."""
    part = _own(rows, line, sparsity)
    part = part[(part["text"] == "heldout") & (part["linear"] == "block")]
    wide = part.pivot_table(index="layer", columns="metric", values="value")
    found = pd.DataFrame({
        "planned": wide["planned"], "mean": wide["realised_mean"], "spread over tokens": wide["realised_spread"],
        "worst token": wide["realised_worst"],
    })  # fmt: skip
    return (100 * found).set_axis(found.index.astype(int)).rename_axis("layer").reset_index()


def realised_reading(rows: pd.DataFrame, model: str) -> str:
    """Mean, spread and worst token of every method on held-out text, and what the worst one reads beside the mean."""
    part = rows[(rows["task"] == "realised") & (rows["linear"] == "decoder") & (rows["text"] == "heldout")]
    said = []
    for (sparsity, line), own in part.groupby(["sparsity", "line"], sort=False):
        mean, spread, worst = (own.loc[own["metric"] == f"realised_{x}", "value"].mean()
                               for x in ("mean", "spread", "worst"))  # fmt: skip
        more = (1 - worst) / (1 - mean) - 1
        words = f"{line} realises {mean:.1%} ± {spread:.1%}"
        words += f", and its worst token {worst:.1%}, {more:.0%} more bytes than the mean" if more > 5e-4 else ""
        said.append(f"{words} (asked {sparsity:.0%})")
    made = samples(part)
    return (
        f"Held-out tokens of `{model}`, mean and spread over tokens: {'; '.join(said)}."
        + (f" Static thresholds are from {made}." if made else "")
    )


def first_reading(rows: pd.DataFrame, model: str) -> str:
    """Whether the first position of a text is another kind of token."""
    part = rows[(rows["task"] == "realised") & (rows["linear"] == "decoder") & (rows["text"] == "heldout")]
    said = []
    for (sparsity, line), own in part.groupby(["sparsity", "line"], sort=False):
        mean, spread, first = (own.loc[own["metric"] == f"realised_{x}", "value"].mean()
                               for x in ("mean", "spread", "first"))  # fmt: skip
        if spread > 1e-9:
            said.append(f"{(first - mean) / spread:+.1f} with {line} at {sparsity:.0%}")
    if not said:
        return f"On `{model}`, every token reads the same with the methods measured."
    return (
        "The first position of a text is sparser than the mean token, where above zero, by so many spreads over "
        f"tokens: {listed(said)}."
    )


def layer_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns sparsity, line, layer, value, spread, worst in percent minus the plan's: blocks on held-out text."""
    part = rows[(rows["task"] == "realised") & (rows["linear"] == "block") & (rows["text"] == "heldout")]
    wide = part.pivot_table(index=["sparsity", "line", "layer"], columns="metric", values="value", sort=False)
    found = pd.DataFrame({
        "value": wide["realised_mean"] - wide["planned"], "spread": wide["realised_spread"],
        "worst": wide["realised_worst"] - wide["planned"],
    })  # fmt: skip
    return (100 * found).reset_index()


def error_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns sparsity, line, layer, value, low, high: relative errors in percent, means over seeds."""
    part = rows[(rows["task"] == "residual-stream") & (rows["metric"] == "relative_error")]
    found = part.groupby(["sparsity", "line", "layer"], sort=False)[["value", "low", "high"]].mean()
    return (100 * found).reset_index()


def error_reading(rows: pd.DataFrame, model: str) -> str:
    """Every method's error behind the first and the last block, and whether what is nearest there is so throughout."""
    curves, said = error_curves(rows), []
    for sparsity, own in curves.groupby("sparsity", sort=False):
        ends = own.pivot_table(index="line", columns="layer", values="value", sort=False)
        first, last = ends.columns.min(), ends.columns.max()
        ends = ends.sort_values(last)
        texts = [f"{line} {row[first]:.1f} to {row[last]:.1f}" for line, row in ends.iterrows()]
        said.append(f"At {sparsity:.0%}, {listed(texts)}")
        if len(ends) > 1:
            tied = [x for x in ends.index[1:] if _apart(rows, sparsity, last, ends.index[0], x) is False]
            said[-1] += f"; nearest behind the last block is {ends.index[0]}"
            said[-1] += f" (not told apart: {listed(tied)})" if tied else ""
            said[-1] += _elsewhere(rows, sparsity, ends)
    return f"Relative error of the residual stream of `{model}` in percent, first to last block. {'. '.join(said)}."


def _elsewhere(rows: pd.DataFrame, sparsity: float, ends: pd.DataFrame) -> str:
    """Whether what is nearest behind the last block, the first row of `ends`, is so behind the other blocks."""
    best, least = ends.index[0], ends.idxmin()
    others = least[least != best]
    open_ = [layer for layer, line in others.items() if _apart(rows, sparsity, layer, best, line) is False]
    said = ", as behind every block" if others.empty else ""
    if len(others) > len(open_):
        said += f", though not behind {len(others) - len(open_)} of {len(least)}"
    return said + (f", nor told apart from what is nearest behind {len(open_)}" if open_ else "")


def _apart(rows: pd.DataFrame, sparsity: float, layer: int, one: str, other: str) -> bool | None:
    """Whether the paired difference of two methods behind a block excludes zero; None where it was not measured."""
    part = rows[(rows["metric"] == "diff_relative_error") & (rows["sparsity"] == sparsity) & (rows["layer"] == layer)]
    found = [row for row in part.to_dict("records") if {row["line"], row["against"]} == {one, other}]
    return any(row["low"] > 0 or row["high"] < 0 for row in found) if found else None


def growth_reading(rows: pd.DataFrame, model: str) -> str:
    """Whether errors grow from block to block as a sum of independent ones would."""
    curves, said = error_curves(rows), []
    for (sparsity, line), own in curves.groupby(["sparsity", "line"], sort=False):
        values = own.sort_values("layer")["value"].tolist()
        if len(values) > 1 and values[0] > 0:
            said.append(f"{values[-1] / values[0]:.1f} ({line}, {sparsity:.0%})")
    if not said:
        return f"`{model}` has one block; nothing can grow."
    blocks = int(curves["layer"].max()) + 1
    return (
        f"From the first to the last of {blocks} blocks the relative error grows by a factor of {listed(said)}. Equal "
        f"independent errors beside a stream that does not grow would give {math.sqrt(blocks):.1f}."
    )


def _own(rows: pd.DataFrame, line: str, sparsity: float) -> pd.DataFrame:
    return rows[(rows["task"] == "realised") & (rows["line"] == line) & (rows["sparsity"] == sparsity)]

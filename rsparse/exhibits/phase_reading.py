"""What the rows of Figure 2 say of phases: its curves, its table, and in words whether a few biases do.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import math

import pandas as pd

from rsparse.exhibits import path_reading
from rsparse.exhibits.gains import interval, listed

METHOD, AVERAGE = "multi-phase-relu", "average-2"
SIDES = {"magnitude": "magnitude", "signed": "sign"}
"""What decides which inputs are dropped, in words."""
DEPLOYED = {"teal": "zero (TEAL)", "r-sparse": "low rank (R-Sparse)"}
"""What stands in the place of a dropped input, by deployed method."""


def lines(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured rows, no differences, with columns side ("" for what has none) and line (its label)."""
    rows = rows[rows["task"].notna() & rows["metric"].isin(["acc", "margin", "perplexity"]) & rows["against"].isna()]
    rows = rows[rows["method"].isin([METHOD, "dense", *DEPLOYED])]
    own = rows["method"] == METHOD
    named = [DEPLOYED.get(method, "dense") if math.isnan(count) else phases(count)
             for method, count in zip(rows["method"], rows["phases"], strict=True)]  # fmt: skip
    return rows.assign(line=named, side=rows["score"].where(own, ""))


def phases(count: float) -> str:
    """"1 level", "2 levels"."""
    return f"{count:.0f} level{'' if count == 1 else 's'}"


def summary(rows: pd.DataFrame, tasks: list[str]) -> pd.DataFrame:
    """One row per sparsity and line: R-Sparse's ranks, realised share, accuracies with one standard error, margin,
    perplexity."""
    found = []
    for (sparsity, side, line), part in lines(rows).groupby(["sparsity", "side", "line"], sort=False):
        row = {"sparsity": f"{sparsity:.0%}", "dropped by": SIDES.get(side, side), "in their place": line}
        row["ranks"] = path_reading.span(part) if line == DEPLOYED["r-sparse"] else ""
        row["realised (%)"] = 100 * part["realised"].mean()
        for task in tasks:
            value = part[(part["task"] == task) & (part["metric"] == "acc")]
            row[f"{task} (%)"] = f"{100 * value['value'].mean():.1f} ± {100 * value['stderr'].mean():.1f}"
        margins = part[(part["metric"] == "margin") & part["task"].isin(tasks)]
        row["questions a task"] = f"{margins['n'].mean():.0f}" if len(margins) else ""
        row["margin"] = margins["value"].mean()
        row["perplexity"] = part.loc[part["metric"] == "perplexity", "value"].mean()
        found.append(row)
    return pd.DataFrame(found)


def recovered(rows: pd.DataFrame, side: str, sparsity: float) -> pd.DataFrame:
    """Per number of levels: held-out loss over dense's, with what share of the loss at one level is won back.

    Columns phases, loss (nats per token over dense), low, high, share.
    """
    part = rows[(rows["method"] == METHOD) & (rows["score"] == side) & (rows["sparsity"] == sparsity)]
    part = part[(part["metric"] == "diff_perplexity_log") & (part["against"] == "dense")].sort_values("phases")
    found = part[["phases", "value", "low", "high"]].rename(columns={"value": "loss"}).reset_index(drop=True)
    one = found.loc[found["phases"] == 1, "loss"]
    return found.assign(share=1 - found["loss"] / float(one.iloc[0]) if len(one) else math.nan)


def nearest(rows: pd.DataFrame, wanted: float = 0.9) -> float:
    """The measured sparsity of phases that is nearest to the paper's 90%."""
    measured = sorted(set(rows.loc[rows["method"] == METHOD, "sparsity"]))
    return min(measured, key=lambda s: abs(s - wanted))


def reading(rows: pd.DataFrame, model: str) -> str:
    """How much of what one level loses a second one wins back, and what the deployed methods lose there."""
    sparsity, said = nearest(rows), []
    for side in dict.fromkeys(rows.loc[rows["method"] == METHOD, "score"]):
        found = recovered(rows, side, sparsity)
        texts = [f"{row['loss']:+.3f} with {phases(row['phases'])}" for _, row in found.iterrows()]
        words = f"dropped by {SIDES[side]}, held-out loss over dense is {listed(texts)} (nats per token)"
        two = found[found["phases"] == 2]
        if len(two) and not two["share"].isna().any():
            back = float(two["share"].iloc[0])
            words += f"; the second level wins back {f'{back:.0%} of it' if back > 0 else 'nothing'}"
        said.append(words)
    return f"At {sparsity:.0%} on `{model}`: " + ". ".join(said[:1] + [x[0].upper() + x[1:] for x in said[1:]]) + "."


def recovery_reading(rows: pd.DataFrame, model: str) -> str:
    """The paper's question with intervals: is more won back by two levels than is still missing?"""
    part = rows[rows["metric"].str.startswith("recovery_") & (rows["phases"] == 2)]
    part = part[(part["sparsity"] == nearest(rows)) & part["task"].isin([AVERAGE, "heldout"])]
    units = {"recovery_acc": ("accuracy", 100, 1), "recovery_margin": ("margin", 1, 2)}
    units["recovery_perplexity_log"] = ("held-out loss", 1, 3)
    said = []
    for side, found in part.groupby("score", sort=False):
        words = []
        for row in found.to_dict("records"):
            name, factor, digits = units[row["metric"]]
            scaled = {key: factor * row[key] for key in ("value", "low", "high")}
            verdict = "yes" if row["low"] > 0 else "no" if row["high"] < 0 else "open"
            words.append(f"by {name} {verdict} ({interval(scaled, digits)})")
        said.append(f"dropped by {SIDES[side]}: {listed(words)}")
    if not said:
        return f"This run on `{model}` did not measure one and two levels."
    return (
        f"Is more won back by a second level than is still missing, at {nearest(rows):.0%} on `{model}`? "
        f"{'; '.join(said)}. In brackets: won back minus still missing, with its 95% interval (accuracy in points)."
    )


def beside(rows: pd.DataFrame, model: str) -> str:
    """The phases against the deployed methods at the same sparsity, by held-out loss; where R-Sparse has no path."""
    part = rows[(rows["metric"] == "diff_perplexity_log") & (rows["method"] == METHOD)]
    part = part[part["against"].isin(DEPLOYED) & (part["score"] == "magnitude")]
    said = []
    for (sparsity, against), found in part.groupby(["sparsity", "against"], sort=False):
        groups = {"lower": found["high"] < 0, "higher": found["low"] > 0}
        groups["not told apart"] = ~(groups["lower"] | groups["higher"])
        words = [f"{word} with {listed([phases(x) for x in found.loc[mask, 'phases']])}"
                 for word, mask in groups.items() if mask.any()]  # fmt: skip
        said.append(f"against {DEPLOYED[against]} at {sparsity:.0%} {listed(words)}")
    if not said:
        return f"This run on `{model}` dropped nothing by magnitude, which is what the deployed methods do."
    return (
        f"Dropped by magnitude, as the deployed methods drop, the phases' held-out loss on `{model}` is "
        + "; ".join(said)
        + ". But phases read every weight column: they say what would be enough, not what it costs."
        + _without_path(rows)
    )


def _without_path(rows: pd.DataFrame) -> str:
    """At which sparsities the deployed R-Sparse has rank 0, and in which linears; "" where all have a path."""
    part = rows[(rows["method"] == "r-sparse") & rows["against"].isna()]
    found = {sparsity: path_reading.without(own) for sparsity, own in part.groupby("sparsity")}
    said = [f"in {linears} at {sparsity:.0%}" for sparsity, linears in found.items() if linears]
    if not said:
        return ""
    return (
        f" By the ranks of the first block, {DEPLOYED['r-sparse']} has rank 0, and so no low-rank path, "
        f"{'; '.join(said)}. Where it has none, zero stands in the place of what it drops, as with TEAL."
    )

"""What the rows of Figure 7 say: GRIFFIN on the MLP alone against GRIFFIN on all blocks.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd

from rsparse import predicates
from rsparse.exhibits import gains
from rsparse.exhibits.gains import MEASURES, by_sign
from rsparse.predicates import Context

LINES = {"mlp": "MLP alone", "all": "all blocks"}


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured rows of dense and GRIFFIN with a column `line`, for `figures.quality`; MLP alone first."""
    rows = rows[rows["against"].isna() & rows["method"].isin(["dense", "griffin"])]
    rows = rows.assign(line=rows["scope"].map(LINES).where(rows["method"] == "griffin", "dense"))
    return rows.sort_values("line", key=lambda names: names.map(["dense", *LINES.values()].index), kind="stable")


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per budget and scope: what was planned and realised, and the four measures with standard errors."""
    found = []
    for (sparsity, line), part in curves(rows).groupby(["sparsity", "line"], sort=False):
        perplexity = part[part["metric"] == "perplexity"]
        found.append({
            "sparsity": sparsity, "GRIFFIN on": "" if line == "dense" else line,
            "planned (%)": 100 * part["planned"].mean(), "realised (%)": 100 * part["realised"].mean(),
            "accuracy (%)": _with_error(part, "average", "acc", 100, 1),
            "margin (nats)": _with_error(part, "average", "margin", 1, 3),
            "perplexity": _with_error(part, "heldout", "perplexity", 1, 3),
            "influenced (%)": 100 * perplexity["influenced"].mean(),
            "ROUGE-L (%)": _with_error(part, "summaries", "rouge_l", 1, 2),
        })  # fmt: skip
    found = pd.DataFrame(found).sort_values("sparsity", kind="stable", ignore_index=True)
    return found.assign(sparsity=[f"{s:.0%}" for s in found["sparsity"]])


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """MLP alone minus all blocks at every budget and measure; columns as `gains.gains`."""
    return gains.gains(rows[(rows["method"] == "griffin") & (rows["against"] == "scope=all")])


def panels(found: pd.DataFrame) -> pd.DataFrame:
    """`differences` for `figures.difference_panels`."""
    return gains.panels(found, [f"sparsity {s:.0%}" for s in found["sparsity"]])


def averages(rows: pd.DataFrame) -> pd.DataFrame:
    """MLP alone minus all blocks, the mean over budgets: columns measure, value, low, high, in the units of `gains`.

    By the rule of the scorecard, which decides the paper's claim by these: `rsparse.predicates`.
    """
    context, found = Context("figure-7", {"figure-7": rows}, lambda _: math.nan), []
    for name, measure in MEASURES.items():
        wanted = {"method": "griffin", "against": "scope=all", "task": measure.task, "metric": measure.metric}
        try:
            mean = predicates.estimate({"rows": wanted, "over": ["sparsity"]}, context)
        except predicates.NotMeasured:
            continue
        low, high = sorted(measure.factor * end for end in mean.bounds())
        found.append({"measure": name, "value": measure.factor * mean.value, "low": low, "high": high})
    return pd.DataFrame(found, columns=["measure", "value", "low", "high"])


def table(found: pd.DataFrame, means: pd.DataFrame | None = None) -> pd.DataFrame:
    """`differences` as text with 95% intervals, one row per budget; `means`, of `averages`, stand below several."""
    lines: dict[str, dict[str, str]] = {}
    rows = found.assign(sparsity=[f"{s:.0%}" for s in found["sparsity"]]).to_dict("records")
    if means is not None and found["sparsity"].nunique() > 1:
        rows += means.assign(sparsity="average").to_dict("records")
    for row in rows:
        line = lines.setdefault(row["sparsity"], {"sparsity": row["sparsity"]})
        line[gains.titled(row["measure"])] = gains.interval(row, MEASURES[row["measure"]].decimals)
    return pd.DataFrame(list(lines.values()))


def conclusion(rows: pd.DataFrame, model: str) -> str:
    """What the averages over budgets say, in words; the accuracy is what decides the paper's claim on the scorecard."""
    means = averages(rows)
    if means.empty:
        return f"On `{model}`, GRIFFIN was measured in both scopes at no budget."
    above, below = means["low"] > 0, means["high"] < 0
    groups = {"better by": above, "worse by": below, "not told apart by": ~(above | below)}
    said = [f"{words} {gains.listed([_stated(row) for row in means[mask].to_dict('records')])}"
            for words, mask in groups.items() if mask.any()]  # fmt: skip
    sparsities = sorted(set(differences(rows)["sparsity"]))
    over = "Averaged over" if len(sparsities) > 1 else "At"
    return f"{over} {gains.budgets(sparsities)}, GRIFFIN on the MLP alone of `{model}` is {'; '.join(said)}."


def _stated(row: dict) -> str:
    return f"{row['measure']} ({gains.interval(row, MEASURES[row['measure']].decimals)})"


def reading(found: pd.DataFrame, model: str) -> str:
    """Budget by budget, per measure, where the MLP alone is better, worse, or not told apart."""
    if found.empty:
        return f"On `{model}`, GRIFFIN was measured in both scopes at no budget."
    words = "better", "worse", "not told apart"
    said = {measure: by_sign(here, words) for measure, here in found.groupby("measure", sort=False)}
    parts = "; ".join(gains.by_measure(said))
    return f"GRIFFIN on the MLP alone of `{model}`, against all blocks at the same budget, is: {parts}."


def dense_summaries(rows: pd.DataFrame, model: str) -> str:
    """What ROUGE-L starts from, in words: a model that knows the references by heart is compared with itself."""
    part = rows[(rows["method"] == "dense") & (rows["metric"] == "rouge_l") & rows["against"].isna()]
    if part.empty:
        return f"No summaries were written on `{model}`."
    value = part["value"].mean()
    said = f"Dense `{model}` reaches {value:.2f}% ROUGE-L"
    if value < 99.995:
        return f"{said}."
    return (
        f"{said}: it writes the reference summaries word for word, so that here the measure says how much of the dense "
        "model's own text is left."
    )


def left_out(sparsities: Iterable[float], model: str) -> str:
    """Which budgets are out of reach of one of the scopes, in words."""
    found = sorted(set(sparsities))
    if not found:
        return f"On `{model}`, both scopes reach every budget asked for."
    return f"Out of reach on the MLP alone of `{model}`, and left out: {gains.budgets(found)}."


def _with_error(part: pd.DataFrame, task: str, metric: str, factor: float, decimals: int) -> str:
    chosen = part[(part["task"] == task) & (part["metric"] == metric)]
    if chosen.empty:
        return ""
    return f"{factor * chosen['value'].mean():.{decimals}f} ± {factor * chosen['stderr'].mean():.{decimals}f}"

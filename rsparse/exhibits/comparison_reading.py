"""What the rows of Table 1 say: its tables, which differences mean anything, and others' numbers side by side."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

TASKS = ("winogrande", "piqa", "sciq", "obqa", "hellaswag", "boolq", "arc_easy", "arc_challenge")
ORDER = (
    "dense", "relufication", "cats", "griffin", "chess", "teal", "teal-greedy", "wina", "wina-rotated", "larosa",
    "low-rank", "r-sparse", "r-sparse (column-norm)",
)  # fmt: skip
"""Methods as tables list them."""
DIFFERENCES = {  # column -> (task, metric, factor, decimals)
    "accuracy": ("average", "diff_acc", 100, 1),
    "margin": ("average", "diff_margin", 1, 3),
    "loss": ("heldout", "diff_perplexity_log", 1, 4),
}


def name(row: pd.Series | dict) -> str:
    """A method as the tables call it: R-Sparse with another score than its own says so."""
    other = row["method"] == "r-sparse" and row["score"] == "column-norm"
    return f"{row['method']} (column-norm)" if other else row["method"]


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(name=[name(row) for row in rows[["method", "score"]].to_dict("records")])


def budgets(rows: pd.DataFrame) -> list[float]:
    """The sparsities at which R-Sparse was measured, dense's 0 left out."""
    return sorted(set(rows.loc[rows["method"] == "r-sparse", "sparsity"].dropna()))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method and sparsity: what was planned and realised, and its quality; means over seeds."""
    measured = _named(rows[rows["against"].isna()])
    found = []
    for (sparsity, label), part in measured.groupby([measured["sparsity"].fillna(-1), "name"]):
        average = part[(part["task"] == "average") & (part["metric"] == "acc")]
        found.append({
            "asked": "" if sparsity < 0 else f"{sparsity:.0%}", "method": label, "scope": part["scope"].iloc[0],
            "planned (%)": 100 * part["planned"].mean(), "realised (%)": 100 * part["realised"].mean(),
            "nominal (%)": 100 * part["nominal"].mean() if "nominal" in part else float("nan"),
            "accuracy (%)": f"{100 * average['value'].mean():.1f} ± {100 * average['stderr'].mean():.1f}",
            "margin": _mean(part, "average", "margin"), "perplexity": _mean(part, "heldout", "perplexity"),
            "seeds": part["seed"].nunique(), "order": (0.001 if sparsity < 0 else sparsity, ORDER.index(label)),
        })  # fmt: skip
    return pd.DataFrame(sorted(found, key=lambda x: x.pop("order")))


def by_task(rows: pd.DataFrame, sparsity: float) -> pd.DataFrame:
    """Accuracy in percent, methods x tasks, of dense and of one budget; means over seeds."""
    part = _named(rows[rows["against"].isna() & (rows["metric"] == "acc")])
    part = part[(part["sparsity"] == sparsity) | (part["method"].isin(["dense", "relufication"]))]
    found = 100 * part.pivot_table(index="name", columns="task", values="value", sort=False)
    found = found.loc[sorted(found.index, key=ORDER.index)]
    return found[[*TASKS, "average"]].rename_axis(columns=None).reset_index().rename(columns={"name": "method"})


def differences(rows: pd.DataFrame, against: str) -> pd.DataFrame:
    """Paired differences from `against` ("dense", "r-sparse") as text with 95% intervals; starred: zero is outside.

    One row per method and sparsity; columns accuracy (points), margin (nats) and loss (nats per token).
    """
    part = _named(rows[rows["against"] == against]).fillna({"sparsity": -1.0})
    found: dict[tuple, dict] = {}
    for column, (task, metric, factor, decimals) in DIFFERENCES.items():
        for row in part[(part["task"] == task) & (part["metric"] == metric)].to_dict("records"):
            asked = "" if row["sparsity"] < 0 else f"{row['sparsity']:.0%}"
            key = row["sparsity"], ORDER.index(row["name"])
            cell = found.setdefault(key, {"asked": asked, "method": row["name"]})
            cell[column] = _interval(*(factor * row[x] for x in ("value", "low", "high")), decimals)
    table = pd.DataFrame([found[key] for key in sorted(found)])
    units = {"accuracy": "accuracy (points)", "margin": "margin (nats)", "loss": "loss (nats/token)"}
    return table.rename(columns=units)


def _interval(value: float, low: float, high: float, decimals: int) -> str:
    mark = " *" if low > 0 or high < 0 else ""
    return f"{value:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]{mark}"


def forest(rows: pd.DataFrame, measure: str = "margin") -> pd.DataFrame:
    """Differences from R-Sparse at the same budget: columns value, low, high, label; by budget, largest first."""
    task, metric, factor, _ = DIFFERENCES[measure]
    part = _named(rows[(rows["against"] == "r-sparse") & (rows["task"] == task) & (rows["metric"] == metric)])
    part = part.sort_values(["sparsity", "value"], ascending=[True, False], kind="stable")
    scaled = part.assign(**{x: factor * part[x] for x in ("value", "low", "high")})
    return scaled.assign(label=[f"{s:.0%}: {n}" for s, n in zip(part["sparsity"], part["name"], strict=True)])


def reading(rows: pd.DataFrame, model: str, measure: str = "loss") -> str:
    """Per budget, in words: which methods are told apart from R-Sparse, and in which direction."""
    parts = []
    for sparsity, part in forest(rows, measure).groupby("sparsity"):
        above, below = part["low"] > 0, part["high"] < 0
        better, worse = (below, above) if measure == "loss" else (above, below)
        groups = {"better": better, "worse": worse, "not told apart": ~better & ~worse}
        words = [f"{word} {', '.join(part.loc[mask, 'name'])}" for word, mask in groups.items() if mask.any()]
        parts.append(f"at {sparsity:.0%}: {'; '.join(words)}")
    what = {"loss": "held-out loss", "margin": "the margin", "accuracy": "accuracy"}[measure]
    return f"Against R-Sparse at the same budget on `{model}`, by {what}: " + ". ".join(parts) + "."


def unreached(settings: Sequence, model: str) -> str:
    """Which budgets which methods cannot reach, in words."""
    by_method: dict[str, list[float]] = {}
    for x in settings:
        by_method.setdefault(x.method, []).append(x.sparsity)
    if not by_method:
        return f"Every method reaches every budget on `{model}`."
    parts = [f"{method} cannot reach {', '.join(f'{s:.0%}' for s in sorted(set(found)))}"
             for method, found in by_method.items()]  # fmt: skip
    return f"On `{model}`, " + "; ".join(parts) + ": there it has no row."


def evidence(reported: pd.DataFrame) -> pd.DataFrame:
    """Reported averages side by side: the paper's, and the independent reruns', each with its metric.

    Column `of`: what the sparsity is a share of; only "model" compares with the others.
    reported: rows of `paper.reported`. The WINA paper's averages are acc_norm where lm-eval has it.
    """
    part = reported[(reported["task"] == "average") & reported["metric"].isin(["acc", "acc_or_norm"])]
    part = part[~part["flag"].str.contains("suspect")]
    column = part["paper"] + ", " + part["metric"].replace("acc_or_norm", "acc or acc_norm")
    label = part["method"] + part["variant"].map(lambda x: f" ({x})" if x else "")
    part = part.assign(column=column, label=label)
    index = ["model", "sparsity", "sparsity_kind", "label"]
    table = part.pivot_table(index=index, columns="column", values="value", sort=False)
    table = table.sort_index(level=["model", "sparsity"], sort_remaining=False).rename_axis(columns=None).reset_index()
    table = table.rename(columns={"label": "method"})
    return table.assign(sparsity=[f"{x:.0%}" for x in table["sparsity"]]).rename(columns={"sparsity_kind": "of"})


def _mean(part: pd.DataFrame, task: str, metric: str) -> float:
    return part.loc[(part["task"] == task) & (part["metric"] == metric), "value"].mean()


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `figures.quality`: dense, and every method with a budget, R-Sparse with its own score."""
    kept = rows["against"].isna() & ~((rows["method"] == "r-sparse") & (rows["score"] == "column-norm"))
    return rows[kept & rows["sparsity"].notna()]

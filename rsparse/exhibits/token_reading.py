"""What the rows of the token-protocol exhibit say: the rules side by side, and what each choice adds."""

from __future__ import annotations

import pandas as pd

MEASURES = {  # column -> (task, metric, difference's metric, factor)
    "accuracy (%)": ("average", "acc", "diff_acc", 100),
    "margin": ("average", "margin", "diff_margin", 1),
    "perplexity": ("heldout", "perplexity", "diff_perplexity_log", 1),
}


NAMES = ("method", "scope", "recipe", "rho", "score", "threshold", "calibration")
"""Columns that tell one setting from another."""


def rules(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method and rule: the share of scored logits that a sparse position influenced, and the scores."""
    text = rows.assign(**{name: rows[name].astype(object).fillna("").astype(str) for name in (*NAMES, "tokens")})
    measured = text[text["against"].isna()]
    compared = text[(text["against"] == "dense") & text["rule"].notna()]
    found = []
    for (method, rule), part in compared.groupby(["method", "rule"], sort=False):
        cell = {"method": method, "rule": rule}
        for column, (task, metric, difference, factor) in MEASURES.items():
            names = part.loc[(part["task"] == task) & (part["metric"] == difference), [*NAMES, "tokens"]].head(1)
            same = measured.merge(names, on=[*NAMES, "tokens"])
            same = same[(same["task"] == task) & (same["metric"] == metric)]
            cell[column] = factor * same["value"].mean()
            cell[f"influenced, {'text' if task == 'heldout' else 'tasks'} (%)"] = 100 * same["influenced"].mean()
            cell |= {"tokens": names["tokens"].iloc[0]} if task == "average" else {}
        found.append(cell)
    frame = pd.DataFrame(found)
    return frame[["method", "rule", "tokens", *frame.columns.difference(["method", "rule", "tokens"], sort=False)]]


def rule_differences(rows: pd.DataFrame, metric: str, method: str) -> pd.DataFrame:
    """Differences from dense of one method, by rule: columns value, low, high, label."""
    part = rows[rows["rule"].notna() & (rows["against"] == "dense") & (rows["method"] == method)]
    return _labelled(part, metric, "rule")


def choice_differences(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """What each choice adds to R-Sparse as this book runs it: columns value, low, high, label."""
    if "choice" not in rows:
        return rows.head(0).assign(label=[])
    return _labelled(rows[rows["choice"].notna()], metric, "choice")


def _labelled(part: pd.DataFrame, metric: str, label: str) -> pd.DataFrame:
    task, factor = {row[2]: (row[0], row[3]) for row in MEASURES.values()}[metric]
    part = part[(part["metric"] == metric) & (part["task"] == task)]
    return part.assign(label=part[label], **{x: factor * part[x] for x in ("value", "low", "high")})


def choice_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per choice: realised sparsity is in the rows of the settings; here the three differences as text."""
    columns = {}
    for column, (_, _, metric, factor) in MEASURES.items():
        unit = {"accuracy (%)": "accuracy (points)", "perplexity": "loss (nats/token)"}.get(column, "margin (nats)")
        digits = 1 if factor == 100 else 4
        found = choice_differences(rows, metric).set_index("label")
        columns[unit] = [
            f"{v:+.{digits}f} [{a:+.{digits}f}, {b:+.{digits}f}]" + (" *" if a > 0 or b < 0 else "")
            for v, a, b in found[["value", "low", "high"]].itertuples(index=False)
        ]
        columns["choice"] = list(found.index)
    return pd.DataFrame(columns)[["choice", *(c for c in columns if c != "choice")]]


def rules_reading(rows: pd.DataFrame, model: str, method: str = "r-sparse") -> str:
    """How far the loss that a paper would report depends on the rule alone."""
    found = rule_differences(rows, "diff_acc", method)
    if found.empty:
        return f"`{method}` was not measured under several rules on `{model}`."
    best, worst = found.loc[found["value"].idxmax()], found.loc[found["value"].idxmin()]
    influenced = rules(rows).set_index(["method", "rule"])["influenced, tasks (%)"]
    ends = [
        f"{row['value']:+.2f} points from dense under *{row['label']}* (a sparse position influenced "
        f"{influenced[method, row['label']]:.0f}% of the scored logits)"
        for row in (best, worst)
    ]
    return f"The same sparse model, {method} on `{model}`, would be reported at {ends[0]} and at {ends[1]}."


def choices_reading(rows: pd.DataFrame, model: str) -> str:
    """Which choices change the held-out loss, in which direction, and which cannot be told from none."""
    found = choice_differences(rows, "diff_perplexity_log")
    if found.empty:
        return "This run changed no choice (`choices` is false)."
    groups = {
        "lower the held-out loss": found[found["high"] < 0], "raise it": found[found["low"] > 0],
        "are not told from none": found[(found["low"] <= 0) & (found["high"] >= 0)],
    }  # fmt: skip
    parts = [f"{'; '.join(part['label'])} - {words}" for words, part in groups.items() if len(part)]
    return f"Of the choices, on `{model}`: " + ". ".join(parts) + "."

"""What the rows of Table 2 say: what INT4 weights cost, what sparsity costs on them, and what the factors' bits do.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import pandas as pd

from rsparse.accounting import BYTES
from rsparse.exhibits import gains, path_reading
from rsparse.exhibits.gains import MEASURES

WEIGHTS = {"": "as loaded", "int4-rtn": "INT4, nearest", "int4-gptq": "INT4, GPTQ"}
"""How weights are stored, in the order of tables."""
METHODS = ("dense", "teal", "r-sparse")
STORED = "int4-g128"
PRECISIONS = {"float32": "32-bit", "float16": "16-bit", "bfloat16": "bfloat16", STORED: "INT4"}
"""Precisions of low-rank factors, in words."""
LOADED = "as loaded"


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with "" in `weights` and `factor_dtype` where a table has nothing there: the checkpoint's own weights."""
    blank = {name: rows[name].fillna("") if name in rows else "" for name in ("weights", "factor_dtype")}
    return rows.assign(**blank)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Table 2: one row per way to store the weights, method, budget and precision of factors; means over seeds.

    Bits read: per weight of the decoder linears and token, scales and factors included.
    """
    rows = plain(rows[rows["against"].isna()])
    found = []
    for (weights, method, sparsity, dtype), part in rows.groupby(["weights", "method", "sparsity", "factor_dtype"]):
        average = part[(part["task"] == "average") & (part["metric"] == "acc")]
        four = part[(part["task"] == "average-4") & (part["metric"] == "acc")]
        found.append({
            "weights": WEIGHTS[weights], "method": gains.NAMES[method], "sparsity": f"{sparsity:.0%}",
            "factors": _precision(method, weights, dtype, part), "ranks": _ranks(method, part),
            "bits read": bits_read(part), "realised (%)": 100 * part["realised"].mean(),
            "accuracy (%)": f"{100 * average['value'].mean():.1f} ± {100 * average['stderr'].mean():.1f}",
            "of four (%)": 100 * four["value"].mean(), "margin": _mean(part, "average", "margin"),
            "perplexity": _mean(part, "heldout", "perplexity"), "questions": int(average["n"].max()),
            "seeds": part["seed"].nunique(),
            "order": (list(WEIGHTS).index(weights), METHODS.index(method), sparsity, list(PRECISIONS).index(dtype)
                      if dtype else -1),
        })  # fmt: skip
    return pd.DataFrame(sorted(found, key=lambda row: row.pop("order")))


def bits_read(part: pd.DataFrame) -> float:
    """Bits per weight that a token reads under the setting of these rows, as planned."""
    row = part.iloc[0]
    stored = BYTES[STORED] if row["weights"] else BYTES[row["dtype"]]
    return float(8 * stored) * (1 - part["planned"].mean())


def differences(rows: pd.DataFrame, against: str, methods: tuple[str, ...] = METHODS) -> pd.DataFrame:
    """Paired differences of `methods` from `against`, as `gains.gains`, by the order of tables, with a column label."""
    rows = plain(rows)
    found = gains.gains(rows[(rows["against"] == against) & rows["method"].isin(methods)])
    order = found["weights"].map(list(WEIGHTS).index) * len(METHODS) + found["method"].map(METHODS.index)
    found = found.assign(order=order).sort_values(["order", "sparsity", "factor_dtype"], kind="stable")
    labels = [label(row) for row in found.to_dict("records")]
    return found.drop(columns="order").assign(label=labels).reset_index(drop=True)


def label(row: dict) -> str:
    """How figures and tables call a setting: weights, method, budget, precision of the factors."""
    said = f"{WEIGHTS[row['weights']]}: {gains.NAMES[row['method']]}"
    said += f" {row['sparsity']:.0%}" if row["method"] != "dense" else ""
    return said + (f", {PRECISIONS[row['factor_dtype']]} factors" if row["factor_dtype"] else "")


def panels(found: pd.DataFrame) -> pd.DataFrame:
    """`differences` for `figures.difference_panels`."""
    return gains.panels(found, found["label"])


def table(found: pd.DataFrame) -> pd.DataFrame:
    """`differences` as text with 95% intervals, one row per setting, a star where the interval excludes zero."""
    lines: dict[str, dict[str, str]] = {}
    for row in found.to_dict("records"):
        line = lines.setdefault(row["label"], {"setting": row["label"]})
        line[gains.titled(row["measure"])] = gains.starred(row, MEASURES[row["measure"]].decimals)
    return pd.DataFrame(list(lines.values()))


def reading(rows: pd.DataFrame, model: str) -> str:
    """The comparisons in words, each by how many of its measures and budgets tell the sides apart; R-Sparse's for every
    precision of its factors."""
    rows, said = plain(rows), []
    for weights, name in list(WEIGHTS.items())[1:]:
        here = rows[rows["weights"] == weights]
        for method, against, sentence in (
            ("dense", LOADED, f"{name}, dense, against the weights as loaded"),
            ("dense", "int4-rtn", f"{name}, dense, against rounding to nearest"),
            ("r-sparse", "dense", f"R-Sparse on {name}, against dense on the same weights"),
            ("r-sparse", "teal", f"R-Sparse on {name}, against TEAL on the same weights and bytes"),
        ):
            found = differences(here, against, (method,))
            if len(found):
                said.append(f"{sentence}: {_tallies(found)}")
    if not said:
        return f"On `{model}`, no INT4 weights were measured."
    return f"On `{model}`. " + ". ".join(said) + "."


def extra_cost(rows: pd.DataFrame, model: str) -> str:
    """What R-Sparse costs on INT4 weights and on the checkpoint's own, in words; "" where one was not measured."""
    found, said = differences(rows, "dense", ("r-sparse",)), []
    found = found[found["measure"] == "held-out loss"]
    own = {row["sparsity"]: row for row in found[found["weights"] == ""].to_dict("records")}
    for row in found[found["weights"] != ""].to_dict("records"):
        if row["sparsity"] in own:
            weights, _, setting = row["label"].partition(": ")
            said.append(f"{setting} costs {_cost(row)} nats per token on {weights}, and {_cost(own[row['sparsity']])} "
                        "on the weights as loaded")  # fmt: skip
    return (
        f"By held-out loss of `{model}`, with 95% intervals: {'; '.join(said)}.{_without_path(rows)}" if said else ""
    )


def _cost(row: dict) -> str:
    """A difference for which higher is better, as a cost."""
    return gains.interval({"value": -row["value"], "low": -row["high"], "high": -row["low"]}, 4)


def _tallies(found: pd.DataFrame) -> str:
    """`gains.tally` of each precision of the factors, in the order of tables; what is the same is said once."""
    names: dict[str, list[str]] = {}
    for dtype in ["", *PRECISIONS]:
        part = found[found["factor_dtype"] == dtype]
        if len(part):
            words = gains.tally(part, ("better", "worse", "not told apart"))
            names.setdefault(words, []).append(f"with {PRECISIONS[dtype]}" if dtype else "")
    return "; ".join(f"{gains.listed(own)} factors{' alike' * (len(own) > 1)} {words}" if own[0] else words
                     for words, own in names.items())  # fmt: skip


def _precision(method: str, weights: str, dtype: str, part: pd.DataFrame) -> str:
    if method != "r-sparse":
        return ""
    own = dtype if weights else part["dtype"].iloc[0]
    return PRECISIONS.get(own, own)


def _ranks(method: str, part: pd.DataFrame) -> str:
    """Lowest to highest rank over the first block's linears; "" where there is none to tell of."""
    return path_reading.span(part) if method == "r-sparse" else ""


def _without_path(rows: pd.DataFrame) -> str:
    """Which linears of the first block have no low-rank path although R-Sparse was asked for, by setting; "" where all
    have one."""
    part, said = plain(rows[rows["against"].isna() & (rows["method"] == "r-sparse")]), []
    for (weights, sparsity, dtype), own in part.groupby(["weights", "sparsity", "factor_dtype"]):
        if none := path_reading.without(own):
            setting = label({"weights": weights, "method": "r-sparse", "sparsity": sparsity, "factor_dtype": dtype})
            said.append(f"{none} ({setting})")
    return f" The budget buys no rank, and so no low-rank path, for {'; '.join(said)}." if said else ""


def _mean(part: pd.DataFrame, task: str, metric: str) -> float:
    return part.loc[(part["task"] == task) & (part["metric"] == metric), "value"].mean()

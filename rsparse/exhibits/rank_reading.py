"""What the rows of Table 3 say: its table, its differences, and the answer to its question in words.

Reads finished tables alone and needs no torch, so that the landing page can say it too.
"""

from __future__ import annotations

import pandas as pd

from rsparse.exhibits import gains

LABELS = {"dense": "dense", "teal": "sparse only (TEAL)", "low-rank": "low-rank only", "r-sparse": "R-Sparse"}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Table 3: one row per budget and method at the headline setting, means over seeds."""
    rows = _headline(_plain(rows))
    rows = rows.assign(order=rows["method"].map(list(LABELS).index)).sort_values(
        ["sparsity", "order"], kind="stable"
    )
    found = []
    for (sparsity, method), part in rows.groupby(["sparsity", "method"], sort=False):
        average = part[(part["task"] == "average") & (part["metric"] == "acc")]
        found.append({
            "sparsity": f"{sparsity:.0%}", "method": LABELS[method],
            "planned (%)": 100 * part["planned"].mean(), "realised (%)": 100 * part["realised"].mean(),
            "accuracy (%)": f"{100 * average['value'].mean():.1f} ± {100 * average['stderr'].mean():.1f}",
            "of four (%)": 100 * _mean(part, "average-4", "acc"),
            "margin": _mean(part, "average", "margin"), "perplexity": _mean(part, "heldout", "perplexity"),
            "n": int(average["n"].max()), "seeds": part["seed"].nunique(),
        })  # fmt: skip
    return pd.DataFrame(found)


def differences(rows: pd.DataFrame, metric: str, task: str) -> pd.DataFrame:
    """R-Sparse minus TEAL by budget: columns value, low, high, n, label."""
    rows = _plain(rows)
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
    found, rows = [], _plain(rows)
    part = rows[(rows["method"] == "r-sparse") & rows["against"].isna() & rows["rho"].isin([1.0, rho])]
    scored = part[(part["task"] == "average") & (part["metric"] == "margin")]  # of the sweep, Table 3's settings alone
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
    rows = _plain(rows)
    part = rows[(rows["metric"] == "diff_perplexity_log") & (rows["method"] == "r-sparse")]
    path = part[part["against"] == "rho=1"]
    path = path.assign(
        label=[f"{s:.0%}: path, {score}" for s, score in zip(path["sparsity"], path["score"], strict=True)]
    )
    score = part[(part["against"] == "teal") & (part["score"] == "column-norm")]
    score = score.assign(label=[f"{s:.0%}: column-norm score, no path" for s in score["sparsity"]])
    return pd.concat([path, score]).sort_values("sparsity", kind="stable")


def factor_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Whitened factors by budget and rho: held-out loss minus that with the singular vectors of W, and minus TEAL's.

    Columns sparsity, rho, ranks, perplexity, and both differences in nats per token with 95% intervals; empty where
    none were measured.
    """
    found = []
    for (sparsity, rho), part in _whitened(rows).groupby(["sparsity", "rho"]):
        row = {"sparsity": f"{sparsity:.0%}", "rho": rho, "ranks": part["ranks"].dropna().iloc[0]}
        row["perplexity"] = _mean(part[part["against"].isna()], "heldout", "perplexity")
        for against, name in (("svd", "minus W's own"), ("rho=1", "minus TEAL")):
            losses = part[(part["against"] == against) & (part["metric"] == "diff_perplexity_log")]
            row[name] = " ".join(gains.starred(x, 4) for x in losses.to_dict("records"))
        found.append(row)
    return pd.DataFrame(found)


def factor_reading(rows: pd.DataFrame, model: str) -> str:
    """Whether whitened factors beat the singular vectors of W, and whether they make the path earn its bytes."""
    part = _whitened(rows)
    losses = part[part["metric"] == "diff_perplexity_log"]
    if losses.empty:
        return "This run measured no whitened factors (`whitened_sparsities` is empty)."
    said = []
    for against, name in (("svd", "the singular vectors of W"), ("rho=1", "TEAL, which has no path")):
        found = losses[losses["against"] == against]
        groups = {"lower": found["high"] < 0, "higher": found["low"] > 0}
        groups["not told apart"] = ~(groups["lower"] | groups["higher"])
        words = [f"{word} at {_settings(found[mask])}" for word, mask in groups.items() if mask.any()]
        said.append(f"against {name}, {' and '.join(words)}")
    made = gains.samples(part)
    return f"Held-out loss with whitened factors{f' from {made}' if made else ''} on `{model}`, at the same bytes: " + (
        "; ".join(said) + "."
    )


def _settings(group: pd.DataFrame) -> str:
    return gains.listed([f"{s:.0%} and rho {r:g}" for s, r in zip(group["sparsity"], group["rho"], strict=True)])


def _whitened(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["factors"] == "whitened"] if "factors" in rows else rows.iloc[:0]


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Without whitened rows, which have tables of their own."""
    return rows[rows["factors"] != "whitened"] if "factors" in rows else rows


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


def sweep_points(rows: pd.DataFrame) -> pd.DataFrame:
    """The sweep's differences from rho = 1, from the rows of a finished table: sparsity, rho, diff_loss, low, high."""
    part = rows[rows["against"] == "sweep: rho 1"].rename(columns={"value": "diff_loss"})
    part = part[["sparsity", "rho", "diff_loss", "low", "high"]]
    ends = part[["sparsity"]].drop_duplicates().assign(rho=1.0, diff_loss=0.0, low=0.0, high=0.0)
    return pd.concat([part, ends]).sort_values(["sparsity", "rho"], ignore_index=True)


def sweep_reading(points: pd.DataFrame, model: str) -> str:
    """Where the best rho of every budget lies, and whether it differs from 1."""
    ones, others = [], []
    for sparsity, group in points.groupby("sparsity"):
        best = group.loc[group["diff_loss"].idxmin()]
        if best["rho"] == 1:
            ones.append(f"{sparsity:.0%}")
        else:
            sure = "excludes" if best["high"] < 0 else "does not exclude"
            others.append(
                f"at {sparsity:.0%} it is rho {best['rho']:g}, {-best['diff_loss']:.4f} nats per token "
                f"better than rho 1 (the interval {sure} zero)"
            )
    parts = [f"at {', '.join(ones)} it is rho 1: no byte spent on rank paid"] if ones else []
    return f"The best rho of the grid on `{model}`: " + "; ".join(parts + others) + "."


def _headline(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured rows (no differences) of the four methods; of r-sparse, where tasks were scored with |x| and
    rho < 1."""
    rows = rows[rows["against"].isna()]
    own = rows["method"] == "r-sparse"
    plain = own & (rows["score"] == "magnitude") & (rows["rho"] < 1)
    rhos = rows.loc[plain & (rows["metric"] == "margin"), "rho"].unique()  # of the sweep, Table 3's settings alone
    return rows[~own | (plain & rows["rho"].isin(rhos))]


def _mean(part: pd.DataFrame, task: str, metric: str) -> float:
    return part.loc[(part["task"] == task) & (part["metric"] == metric), "value"].mean()


def _budgets(group: pd.DataFrame) -> str:
    return ", ".join(f"{s:.0%}" for s in group["sparsity"])

"""What the rows of the bridge say: stable ranks of biases, residuals and weights, and the errors by rank.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import pandas as pd

from rsparse.exhibits.gains import listed, samples

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
MATRICES = {
    ("bias-matrix", "magnitude"): "bias matrix", ("bias-sums", "magnitude"): "summed biases",
    ("dropped-values", "magnitude"): "dropped", ("bias-matrix", "signed"): "bias matrix (signed)",
    ("bias-sums", "signed"): "summed (signed)", ("dropped-values", "signed"): "dropped (signed)",
    ("residual", ""): "residuals", ("weight", ""): "weight",
}  # fmt: skip
"""(task, side) -> what its stable rank is of."""


def rank_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Stable rank by linear, medians over layers, one column per matrix; and the smaller side of the weight."""
    part = rows[rows["metric"] == "stable_rank"].assign(side=lambda x: x["score"].fillna(""))
    found = {
        name: part[(part["task"] == task) & (part["side"] == side)].groupby("linear")["value"].median()
        for (task, side), name in MATRICES.items()
    }
    own = rows[(rows["task"] == "weight") & rows["metric"].str.startswith("stable_rank")]
    wide = own.pivot_table(index="linear", columns="metric", values="value")
    found["smaller side"] = (wide["stable_rank"] / wide["stable_rank_share"]).round().astype(int)
    return pd.DataFrame(found).loc[[x for x in KINDS if x in wide.index]].rename_axis("linear").reset_index()


def rank_reading(rows: pd.DataFrame, model: str) -> str:
    """Whether the biases' stable rank foretells that of the values that they stand for."""
    part = rows[rows["metric"] == "stable_rank"].assign(side=lambda x: x["score"].fillna(""))
    middle = {
        name: part.loc[(part["task"] == task) & (part["side"] == side), "value"].median()
        for (task, side), name in MATRICES.items()
    }
    layers = part.loc[part["task"] == "residual", "layer"].nunique()
    biases, dropped = middle["summed biases"], middle["dropped"]
    word = "less than" if dropped < biases / 1.5 else "more than" if dropped > 1.5 * biases else "about as much as"
    return (
        f"Medians over the linears of {layers} layer{'' if layers == 1 else 's'} of `{model}`: dropped by magnitude, "
        f"the bias matrix, a row for each phase, has a stable rank of {middle['bias matrix']:.1f}. Added up token by "
        f"token, as a linear adds them, the biases have {biases:.1f}, and the values that they stand for "
        f"{dropped:.1f}, {word} the biases; dropped by sign, "
        f"{middle['bias matrix (signed)']:.1f}, {middle['summed (signed)']:.1f} and {middle['dropped (signed)']:.1f}. "
        f"The deployed method's residuals have {middle['residuals']:.1f}, and the weights {middle['weight']:.1f}."
    )


def layer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Stable rank of the bias matrix, dropped by magnitude, layer by layer, a column per linear."""
    part = rows[(rows["metric"] == "stable_rank") & (rows["task"] == "bias-matrix") & (rows["score"] == "magnitude")]
    wide = part.pivot_table(index="layer", columns="linear", values="value")
    return wide[[x for x in KINDS if x in wide]].rename_axis(columns=None).rename(index=int).reset_index()


def errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Relative errors: one row per rank, given as a share of the smaller side; mean, over linears, by factors."""
    part = rows[rows["metric"] == "relative_error"]
    wide = part.pivot_table(index="at", columns="factors", values="value", sort=False)
    wide = 100 * wide[[x for x in ("svd", "whitened", "hindsight") if x in wide]]
    ranks = part[part["factors"] == "svd"].groupby("at")["rank"].agg(lambda x: f"{x.min():.0f} to {x.max():.0f}")
    wide = wide.rename(columns=lambda name: f"{name} (%)").rename_axis(columns=None)
    return wide.assign(ranks=ranks).rename_axis("rank").reset_index()


def error_reading(rows: pd.DataFrame, model: str) -> str:
    """What the deployed rank keeps of the residuals with each set of factors, how that splits by linear, and at which
    ranks of the table whitened factors are not nearer."""
    part = rows[(rows["metric"] == "relative_error") & (rows["at"] == "deployed")]
    wide = part.pivot_table(index=["layer", "linear"], columns="factors", values="value")
    better = int((wide["whitened"] < wide["svd"]).sum())
    mean = wide.mean()
    gap = mean["svd"] - mean["hindsight"]
    closed = (mean["svd"] - mean["whitened"]) / gap if gap > 0 else float("nan")
    share = rows.loc[rows["metric"] == "residual_share", "value"]
    return (
        f"At the rank that the budget buys ({_ends(part['rank'], '{:.0f}')}), the singular "
        f"vectors of W leave {mean['svd']:.0%} of the residuals' energy on `{model}`, whitened factors "
        f"{mean['whitened']:.0%}, and the best in hindsight {mean['hindsight']:.0%}, means over linears. Whitened is "
        f"nearer than W's own in {better} of {len(wide)} linears and closes {closed:.0%} of the mean gap to "
        f"hindsight. {_not_nearer(rows)}. The residuals themselves hold {_ends(share, '{:.1%}')} of their linear's "
        "output energy."
    )


def _not_nearer(rows: pd.DataFrame) -> str:
    """At which ranks, as tables name them, whitened factors are not nearer in the median over linears."""
    part = rows[rows["metric"] == "relative_error"]
    wide = part.pivot_table(index=["at", "layer", "linear"], columns="factors", values="value", sort=False)
    gaps = (wide["whitened"] - wide["svd"]).groupby(level="at", sort=False).median()
    not_nearer = [at for at, gap in gaps.items() if gap >= 0]
    said = f"not nearer at {listed(not_nearer)}" if not_nearer else "nearer at all of them"
    made = samples(part)
    return f"Of the ranks in the table, in the median over linears, it is {said}" + (
        f"; its second moment is from {made}" if made else ""
    )


def half_reading(curves: dict, model: str) -> str:
    """The rank at which half of the residuals' energy is kept, beside the deployed one, by linear."""
    said = []
    for kind in [x for x in KINDS if any(kind == x for _, kind in curves)]:
        found = [_half(own) for (_, linear), own in curves.items() if linear == kind]
        deployed = max(own["deployed"][0] for (_, linear), own in curves.items() if linear == kind)
        said.append(f"{kind} {_ends(pd.Series(found), '{:.0f}')} (deployed {deployed:.0f})")
    return f"Half of the residuals' energy on `{model}` takes, even in hindsight, a rank of: {listed(said)}."


def _ends(values: pd.Series, form: str) -> str:
    """"2 to 6", or "2" where both ends print alike."""
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low} to {high}"


def _half(curves: dict) -> float:
    """The first drawn rank whose error in hindsight is at most a half."""
    return next(r for r, e in zip(curves["ranks"], curves["hindsight"], strict=True) if e <= 0.5)

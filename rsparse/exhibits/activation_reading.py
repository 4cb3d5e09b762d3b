"""What the rows of TEAL's exhibit say of activations: their shape, and their quantiles beside the published ones.

Reads finished tables and data/paper alone and needs no torch.
"""

from __future__ import annotations

import pandas as pd

from rsparse import paper, shapes

SITES = {
    "attn_in": "input of q, k, v",
    "attn_out": "input of o",
    "mlp_in": "input of gate, up",
    "mlp_hidden": "input of down",
}
"""Where activations are cut, in the order of a block."""
INSIDE = ("attn_out", "mlp_hidden")
"""Sites inside of a block's two halves; the others are before them."""


def shape_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Per site: mean misfit of both shapes over layers, and in how many layers the Laplacian is the nearer one."""
    wide = rows[rows["task"] == "activations"].pivot_table(index=["site", "layer"], columns="metric", values="value")
    names = {f"misfit_{shape}": shape for shape in shapes.QUANTILES}
    return _shapes(wide[list(names)].rename(columns=names).rename_axis(columns=None))


def published_shapes(model: str) -> pd.DataFrame:
    """`shape_table` of the quantiles that TEAL's authors published for `model`."""
    table = paper.activation_quantiles()
    table = table[(table["model"] == model) & (table["quantile"] < 0.96)]
    found = {
        key: shapes.misfits(part["quantile"], part["abs_value"]) for key, part in table.groupby(["input", "layer"])
    }
    return _shapes(pd.DataFrame.from_dict(found, orient="index").rename_axis(["site", "layer"]))


def _shapes(wide: pd.DataFrame) -> pd.DataFrame:
    nearer = wide["laplacian"] < wide["gaussian"]
    groups = wide.groupby(level="site")
    counts = nearer.groupby(level="site").agg(["sum", "size"])
    found = groups[["gaussian", "laplacian"]].mean().rename(columns=lambda name: f"misfit {name}")
    found["nearer to Laplacian"] = [f"{row['sum']} of {row['size']}" for _, row in counts.iterrows()]
    found = found.reindex([site for site in SITES if site in found.index])
    return found.rename_axis("site").reset_index().assign(activation=lambda x: x["site"].map(SITES))


def shape_reading(table: pd.DataFrame, whose: str) -> str:
    """Whether the shapes are those that TEAL's authors name, Gaussian before a block and Laplacian inside.

    table: as `shape_table`.
    """
    sites: dict[str, list[str]] = {"as they say": [], "the other one": []}
    misfits: dict[str, list[float]] = {"gaussian": [], "laplacian": []}
    for row in table.to_dict("records"):
        said, other = ("laplacian", "gaussian") if row["site"] in INSIDE else ("gaussian", "laplacian")
        nearer = row[f"misfit {said}"] < row[f"misfit {other}"]
        sites["as they say" if nearer else "the other one"].append(f"`{row['site']}`")
        misfits[said].append(row[f"misfit {said}"])
    words = [f"{word} at {', '.join(found)}" for word, found in sites.items() if found]
    before, inside = (sum(x) / len(x) for x in misfits.values())
    return (
        f"On {whose}, by the mean over layers, the nearer shape is {' and '.join(words)}. The Gaussian misses the "
        f"quantiles before blocks by {before:.0%}, the Laplacian those inside by {inside:.0%}."
    )


def quantile_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Relative differences of our quantiles of |x| from the published ones: median and largest over layers, in percent.

    One row per site and share; empty where the model is none of theirs.
    """
    part = rows[rows["metric"] == "quantile_gap"]
    if part.empty:
        return pd.DataFrame()
    found = []
    for (site, share), gaps in part.groupby(["site", "quantile"])["value"]:
        found.append({"site": site, "quantile": f"{share:.0%}", "median (%)": 100 * gaps.median(),
                      "largest (%)": 100 * gaps.max(), "layers": len(gaps)})  # fmt: skip
    order = list(SITES)
    return pd.DataFrame(sorted(found, key=lambda row: order.index(row["site"])))


def quantile_reading(rows: pd.DataFrame, model: str, text: str) -> str:
    """How near our quantiles come to the published ones, and to whose they come nearest; text: the calibration text."""
    part = rows[rows["metric"] == "quantile_gap"]
    if part.empty:
        known = ", ".join(sorted(set(paper.activation_quantiles()["model"])))
        return f"TEAL's authors published quantiles for {known}; for `{model}` there is nothing to compare with."
    nearest, gaps = nearest_published(rows).iloc[0], part["value"]
    return (
        f"Over all sites, layers and shares, our quantiles for `{model}` (text: {text}; theirs: Alpaca) differ from "
        f"the published ones by {gaps.median():.1%} at the median and {gaps.max():.0%} at most. Of the published "
        f"models with as many layers, the nearest is {nearest['model']}."
    )


def nearest_published(rows: pd.DataFrame) -> pd.DataFrame:
    """Published models of the same depth, the nearest to our quantiles first: columns model, median gap (%)."""
    ours = rows[rows["metric"] == "abs_quantile"].rename(columns={"site": "input"})
    ours = ours.groupby(["layer", "input", "quantile"], as_index=False)["value"].mean()
    depth, found = ours["layer"].nunique(), []
    for model, table in paper.activation_quantiles().groupby("model"):
        if table["layer"].nunique() == depth:
            both = ours.merge(table, on=["layer", "input", "quantile"])
            gaps = (both["value"] / both["abs_value"] - 1).abs()
            found.append({"model": model, "median gap (%)": 100 * gaps.median()})
    return pd.DataFrame(found, columns=["model", "median gap (%)"]).sort_values("median gap (%)", ignore_index=True)


def published_files() -> str:
    """What this book found wrong with the published histograms, and what its tables hold instead, computed."""
    said = paper.statements()
    said = said[(said["exhibit"] == "teal") & (said["topic"] == "shipped histograms: identity")].iloc[0]
    wide = paper.activation_quantiles().pivot_table(
        index=["layer", "input", "quantile"], columns="model", values="abs_value"
    )
    pair = wide[["Llama-2-7B", "Llama-3-8B"]].dropna()
    same = int((pair["Llama-2-7B"] == pair["Llama-3-8B"]).sum())
    gap = (pair["Llama-3-8B"] / pair["Llama-2-7B"] - 1).abs().median()
    return (
        f"Found by this book in `{said['source'].removeprefix('repo:')}`: {said['statement']}. In the tables of this "
        f"book, {same} of {len(pair):,} quantiles of Llama-3-8B equal those of Llama-2-7B, and at the median they "
        f"differ by {gap:.0%}."
    )

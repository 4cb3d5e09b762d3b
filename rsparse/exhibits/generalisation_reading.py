"""What the rows of the appendix say: how similar the maps are, by samples, by source, and beside the controls.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import pandas as pd

METRICS = {
    ("similarity", "real"): "map", ("similarity", "permuted-x"): "map, channels of x shuffled",
    ("similarity_activation", "real"): "E|x| alone", ("overlap_top10", "real"): "top tenth of channels shared",
}  # fmt: skip


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per text: medians over linears of each measure, and the least similar linear's map."""
    rows = rows[rows["source"] != ""].dropna(subset=["source"])
    found = []
    for (source, samples), part in rows.groupby(["source", "samples"], sort=False):
        row = {"text": source, "samples": f"{samples:.0f}"}
        for (metric, control), name in METRICS.items():
            values = part.loc[(part["metric"] == metric) & (part["control"] == control), "value"]
            row[name] = values.median()
        maps = part[(part["metric"] == "similarity") & (part["control"] == "real")]
        least = maps.loc[maps["value"].idxmin()]
        row["least similar map"] = f"{least['value']:.3f} ({least['linear']}, layer {least['layer']:.0f})"
        found.append(row)
    return pd.DataFrame(found)


def kinds_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per kind of linear, one column per text: the map's similarity to the reference's, medians over layers,
    and in brackets the same with the channels of x shuffled. Last, the map of another layer, where it was measured.

    The calibration text stands with the number of samples that is nearest to the other texts', or with the most if it
    is alone.
    """
    part = rows[(rows["metric"] == "similarity") & rows["source"].notna() & (rows["source"] != "")]
    part = _alike(part)
    middle = part.groupby(["linear", "source", "control"])["value"].median()
    other = rows[rows["control"] == "other-layer"].groupby("linear")["value"].median()
    texts = dict(zip(part["source"], part["samples"], strict=True))
    found = []
    for linear in dict.fromkeys(part["linear"]):
        row = {"linear": linear}
        for text, samples in texts.items():
            real, shuffled = middle[linear, text, "real"], middle[linear, text, "permuted-x"]
            row[f"{text}, {samples:.0f} sample{'' if samples == 1 else 's'}"] = f"{real:.4f} ({shuffled:.4f})"
        found.append(row | ({"another layer": other[linear]} if len(other) else {}))
    return pd.DataFrame(found)


def _alike(part: pd.DataFrame) -> pd.DataFrame:
    """`part` with one number of calibration samples, the one nearest to the other texts'."""
    own = part["source"] == "calibration"
    counts, others = part.loc[own, "samples"], part.loc[~own, "samples"]
    wanted = others.max() if len(others) else counts.max()
    nearest = min(counts.unique(), key=lambda count: (abs(count - wanted), -count), default=wanted)
    return part[~own | (part["samples"] == nearest)]


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns measure, linear, samples, value: medians over layers, on the calibration text."""
    part = rows[rows["source"] == "calibration"]
    named = [METRICS.get(pair) for pair in zip(part["metric"], part["control"], strict=True)]
    part = part.assign(measure=named).dropna(subset=["measure"])
    return part.groupby(["measure", "linear", "samples"], sort=False)["value"].median().reset_index()


def reading(rows: pd.DataFrame, model: str, enough: float = 0.9) -> str:
    """Whether the maps are similar, by how much more than maps that share only W, and what the text can change."""
    text = rows[(rows["source"] != "") & (rows["source"] != "random tokens")]
    real = _values(text, "similarity", "real")
    shuffled, alone = _values(text, "similarity", "permuted-x"), _values(text, "similarity_activation", "real")
    return (
        f"Over all texts and numbers of samples on `{model}`, the maps correlate with the reference by "
        f"{real.median():.3f} at the median and {real.min():.3f} at least; {(real > enough).mean():.0%} of the "
        f"comparisons are above {enough:g}. With the channels of x shuffled it is {shuffled.median():.3f}: that much "
        f"two maps owe to sharing W. Of E|x| alone, the part that a text can change, the correlation is "
        f"{alone.median():.3f} at the median and {alone.min():.3f} at least."
    )


def control_reading(rows: pd.DataFrame, model: str) -> str:
    """The same for what is no text, and for another layer."""
    noise = _values(rows[rows["source"] == "random tokens"], "similarity", "real")
    other, said = _values(rows, "similarity", "other-layer"), []
    if len(noise):
        shuffled = _values(rows[rows["source"] != ""], "similarity", "permuted-x").median()
        than = "more than" if noise.median() > shuffled else "no more than"
        said.append(
            f"tokens drawn at random give maps that correlate by {noise.median():.3f} at the median, {than} maps that "
            f"share W alone ({shuffled:.3f})"
        )
    if len(other):
        said.append(f"the map of the same linear in another layer by {other.median():.3f}")
    if not said:
        return f"This run on `{model}` measured neither random tokens nor two layers."
    return f"On `{model}`, {'; '.join(said)}."


def _values(rows: pd.DataFrame, metric: str, control: str) -> pd.Series:
    return rows.loc[(rows["metric"] == metric) & (rows["control"] == control), "value"]

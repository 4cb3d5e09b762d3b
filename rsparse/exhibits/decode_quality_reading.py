"""Quality beside speed: a sparsity's loss, as a preset measured it, against what the same sparsity gains on a device.

The two are never of one run: speed is of random weights at the shape of a real model, quality of the model that a
preset names. A preset of the same model stands beside its own shape alone; the embedded model, an analogue, beside all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from rsparse.exhibits.comparison_reading import NAMES
from rsparse.exhibits.decode_reading import METHODS, at, ordered, over, whole, with_most_rows
from rsparse.exhibits.gains import listed

NEAR = 0.006
"""Sparsities so close are the same one: tables round those of methods that cannot take just any."""
MLP = ("cats", "griffin")
"""Methods whose own scope is the MLP."""
ANALOGUE = "tiny"
"""How the model of a preset is called that stands for no other."""


def losses(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Columns preset, model, method, sparsity, loss: what each method adds to the dense model's loss on held-out text
    (nats per token, mean over seeds), at its own scope and score, and for R-Sparse at the uniform rho that was timed.

    tables: published ones of exhibits that measure it. Of a preset, the first table that has a cell counts.
    """
    found = [_losses(table) for table in tables]
    found = pd.concat([pd.DataFrame(columns=["preset", "model", "method", "sparsity", "loss"]), *filter(len, found)])
    return found.drop_duplicates(["preset", "method", "sparsity"], ignore_index=True)


def _losses(table: pd.DataFrame) -> pd.DataFrame:
    own = table[(table["task"] == "heldout") & (table["metric"] == "perplexity") & ~_random(table)]
    headline = own["recipe"].fillna("uniform").eq("uniform") & own["rho"].fillna(1.0).isin([0.95, 1.0])
    whole_scope = own["scope"].eq("all") | own["method"].isin(MLP)
    own = own[headline & whole_scope & (own["method"].ne("r-sparse") | own["score"].eq("magnitude"))]
    mean = own.assign(loss=np.log(own["value"])).groupby(["preset", "model", "method", "sparsity"])["loss"].mean()
    mean = mean.reset_index()
    dense = mean[mean["method"] == "dense"].drop_duplicates("preset").set_index("preset")["loss"]
    mean["loss"] -= mean["preset"].map(dense)
    return mean[mean["method"].isin(METHODS)].dropna(subset=["loss"])


def _random(table: pd.DataFrame) -> pd.Series:
    return table["model"].astype(str).str.startswith("random")


def chosen_presets(quality: pd.DataFrame) -> pd.DataFrame:
    """One preset per model: that with the most cells, since a live subset repeats a few of the whole grid's."""
    counts = quality.groupby(["model", "preset"]).size()
    best = {counts.xs(model).idxmax() for model in quality["model"].unique()}
    return quality[quality["preset"].isin(best)]


def choice(quality: pd.DataFrame) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """For `decode_reading.devices`: `pairs` with this quality."""
    return lambda frame: pairs(frame, quality)


def pairs(frame: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """A row per method and sparsity that both sides hold: speed (times our dense engine, one text) and loss; and
    whether it is on the front of its panel, where no other setting is both faster and better. In bfloat16 where that
    was timed, and after the prompt with the most rows, the longest of several."""
    own = whole(at(frame, batch=1))
    own = own.assign(speed=over(own, "dense", own)).dropna(subset=["speed"])
    own = ordered(own[own["name"].isin(METHODS) & (own["sparsity"] > 0)])
    found = []
    for model, part in own.groupby("model", sort=False):
        part = at(part, dtype="bfloat16") if "bfloat16" in set(part["dtype"]) else at(part, dtype=part["dtype"].iloc[0])
        part = with_most_rows(part, ["model"])
        for preset, cells in _beside(quality, model).groupby("preset", sort=False):
            found.append(_joined(part, cells, preset))
    found = [x for x in found if len(x)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _beside(quality: pd.DataFrame, model: str) -> pd.DataFrame:
    names = quality["model"].str.lower()
    return quality[(names == model.lower()) | (names == ANALOGUE)]


def _joined(part: pd.DataFrame, cells: pd.DataFrame, preset: str) -> pd.DataFrame:
    found = []
    for _, row in part.iterrows():
        near = cells[(cells["method"] == row["name"]) & ((cells["sparsity"] - row["sparsity"]).abs() <= NEAR)]
        for _, cell in near.iloc[:1].iterrows():
            found.append({
                "panel": f"speed: {row['model']} shape, {row['dtype']}, prompt {row['prompt']:.0f}\n"
                         f"quality: {cell['model']} ({preset})",
                "method": row["name"], "sparsity": row["sparsity"], "speed": row["speed"], "loss": cell["loss"],
                "shape": row["model"], "of": cell["model"], "preset": preset,
            })  # fmt: skip
    frame = pd.DataFrame(found)
    return frame.assign(front=_front(frame["speed"], frame["loss"])) if len(frame) else frame


def _front(speed: pd.Series, loss: pd.Series) -> list[bool]:
    """Whether no other point is at least as fast and as good, and one of the two strictly more."""
    points = list(zip(speed, loss, strict=True))
    return [not any(s >= a and q <= b and (s, q) != (a, b) for s, q in points) for a, b in points]


def table(own: pd.DataFrame) -> pd.DataFrame:
    """Of `pairs`, for a reader."""
    return pd.DataFrame({
        "speed of": own["shape"], "quality of": own["of"], "preset": own["preset"],
        "method": [NAMES.get(x, x) for x in own["method"]], "sparsity (%)": 100 * own["sparsity"],
        "over our dense engine": own["speed"], "loss added (nats/token)": own["loss"],
        "on the front": ["yes" if x else "no" for x in own["front"]],
    })  # fmt: skip


def reading(own: pd.DataFrame) -> str:
    """Which methods are on the front of every panel; what the two axes are of."""
    said = []
    for (shape, of), part in own.groupby(["shape", "of"], sort=False):
        names = [f"{NAMES.get(x['method'], x['method'])} at {x['sparsity']:.0%}"
                 for _, x in part[part["front"]].sort_values("speed").iterrows()]  # fmt: skip
        said.append(f"`{shape}` with the quality of `{of}`: {listed(names)}")
    words = f"On the front, where nothing measured is both faster and better: {'; '.join(said)}."
    if ANALOGUE in set(own["of"]):
        words += (" The embedded model's quality is an analogue: it says how methods compare on a small model, and not "
                  "what a large one loses.")  # fmt: skip
    return words


def missing(frame: pd.DataFrame, quality: pd.DataFrame) -> str:
    """A sentence where no device has a pair, saying which side is absent; else ""."""
    if any(len(pairs(own, quality)) for _, own in frame.groupby("device")):
        return ""
    without = "speeds" if not len(frame) else "qualities" if not len(quality) else "pairs of a speed and a quality"
    return f"*There are no published {without} of the same methods and sparsities yet: nothing is shown here.*"

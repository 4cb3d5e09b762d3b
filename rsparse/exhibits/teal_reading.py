"""What the rows of TEAL's exhibits say: perplexity, tasks, greedy against uniform, and what the search chooses.

Reads finished tables and data/paper alone and needs no torch; the activations are in activation_reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from rsparse import paper
from rsparse.exhibits import gains

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
SHOTS = {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "gsm8k": 5, "piqa": 0, "winogrande": 5}
"""TEAL's six tasks, and the solved examples before each question (those of rsparse.harness, which needs torch)."""
AVERAGES = {"average-6": "the six tasks", "average-4-teal": "the four tasks"}
LABELS = {"dense": "dense", "teal": "uniform", "teal-greedy": "greedy"}
MEASURES = {  # name -> (metric, task or None for the average, unit, sign of better)
    "held-out loss": ("diff_perplexity_log", "heldout", "nats per token", -1),
    "accuracy": ("diff_acc_or_norm", None, "points", 1),
    "the margin": ("diff_margin", None, "nats", 1),
}
NEAR = 1.0
"""Points: a realised sparsity that is further from the planned one is named in words."""


def average(rows: pd.DataFrame) -> str:
    """The average over TEAL's tasks that the rows have: over all six, or over the embedded default's four."""
    return next((name for name in AVERAGES if name in set(rows["task"])), "")


def average_name(rows: pd.DataFrame) -> str:
    """The average in words, for an axis."""
    return f"accuracy, {AVERAGES.get(average(rows), 'no task')}"


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured rows with a column `line` that names dense, uniform and greedy, for `figures.quality`."""
    measured = rows[rows["against"].isna() & rows["method"].isin(list(LABELS))]
    order = measured["method"].map(list(LABELS).index)
    return measured.assign(line=measured["method"].map(LABELS)).loc[order.sort_values(kind="stable").index]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per sparsity and method, means over seeds, with standard errors over windows and items.

    accuracy: average over TEAL's tasks, acc_norm where lm-eval has it.
    """
    measured = rows[rows["against"].isna()]
    found = []
    for sparsity, method in _cells(measured[measured["metric"] == "perplexity"]):
        part = measured[(measured["sparsity"] == sparsity) & (measured["method"] == method)]
        perplexity = part[part["metric"] == "perplexity"]
        scored = part[(part["task"] == average(rows)) & (part["metric"] == "acc_or_norm")]
        found.append({
            "sparsity": f"{sparsity:.0%}", "method": LABELS[method],
            "planned (%)": 100 * perplexity["planned"].mean(), "realised (%)": 100 * perplexity["realised"].mean(),
            "perplexity": f"{perplexity['value'].mean():.3f} ± {perplexity['stderr'].mean():.3f}",
            "accuracy (%)": _share(scored["value"].mean(), scored["stderr"].mean()),
            "windows": int(perplexity["n"].max()), "seeds": perplexity["seed"].nunique(),
        })  # fmt: skip
    return pd.DataFrame(found)


def realised_reading(rows: pd.DataFrame, model: str) -> str:
    """Where the realised sparsity of held-out text is further than `NEAR` from the planned one, and how near the
    others are; with the calibration that set the thresholds."""
    part = rows[rows["against"].isna() & (rows["metric"] == "perplexity") & (rows["method"] != "dense")]
    found = 100 * part.groupby(["sparsity", "method"])[["planned", "realised"]].mean()
    gap = (found["realised"] - found["planned"]).abs()
    if not (gap > NEAR).any():
        return f"On `{model}`, realised sparsity is within {gap.max():.1f} points of the planned one everywhere."
    said = [f"{LABELS[method]} at {sparsity:.0%} ({row['realised']:.2f}% where {row['planned']:.2f}% were planned)"
            for (sparsity, method), row in found[gap > NEAR].iterrows()]  # fmt: skip
    near = gap[gap <= NEAR]
    others = f"; all others are within {near.max():.1f} points" if len(near) else ""
    texts = gains.listed([f"`{name}`" for name in sorted(set(part["calibration"].astype(str)))])
    return (
        f"On `{model}`, realised sparsity misses the planned one by more than {NEAR:g} point for {gains.listed(said)}"
        f"{others}. The thresholds were read on {texts} (text, samples x tokens)."
    )


def _share(value: float, stderr: float) -> str:
    return "" if pd.isna(value) else f"{100 * value:.1f} ± {100 * stderr:.1f}"


def _cells(rows: pd.DataFrame) -> list[tuple[float, str]]:
    order = list(LABELS)
    cells = set(zip(rows["sparsity"], rows["method"], strict=True))
    return sorted(cells, key=lambda cell: (cell[0], order.index(cell[1])))


def differences(rows: pd.DataFrame, measure: str, against: str) -> pd.DataFrame:
    """Paired differences by sparsity: columns value, low, high (points for accuracy), n, label.

    measure: of `MEASURES`. against: "dense", of both methods, or "teal", of the greedy one.
    """
    metric, task, unit, _ = MEASURES[measure]
    chosen = (rows["metric"] == metric) & (rows["against"] == against) & (rows["task"] == (task or average(rows)))
    part = rows[chosen]
    factor = 100 if unit == "points" else 1
    part = part.assign(**{name: factor * part[name] for name in ("value", "low", "high")})
    part = part.sort_values(["sparsity", "method"], kind="stable")
    named = [f"{s:.0%}" if against == "teal" else f"{s:.0%}, {LABELS[m]}"
             for s, m in zip(part["sparsity"], part["method"], strict=True)]  # fmt: skip
    return part.assign(label=named)


def greedy_reading(rows: pd.DataFrame, model: str) -> str:
    """Greedy against uniform at the same bytes, by every measure: where the interval lies on one side of zero."""
    parts = []
    for measure, (*_, sign) in MEASURES.items():
        found = differences(rows, measure, "teal")
        better, worse = sign * found["value"] > 0, sign * found["value"] < 0
        sure = (found["low"] > 0) | (found["high"] < 0)
        groups = {"better": better & sure, "worse": worse & sure, "not told apart": ~sure}
        words = [f"{word} at {_percent(found.loc[mask, 'sparsity'])}" for word, mask in groups.items() if mask.any()]
        parts.append(f"by {measure}, greedy is {' and '.join(words) or 'not measured'}")
    return f"On `{model}`, against the uniform sparsity at the same bytes: " + "; ".join(parts) + "."


def loss_reading(rows: pd.DataFrame, model: str) -> str:
    """What each sparsity costs, against dense, by held-out loss."""
    found = differences(rows, "held-out loss", "dense")
    words = []
    for sparsity, part in found.groupby("sparsity"):
        costs = [f"{value:+.4f} [{low:+.4f}, {high:+.4f}] ({LABELS[method]})" for method, value, low, high
                 in zip(part["method"], part["value"], part["low"], part["high"], strict=True)]  # fmt: skip
        words.append(f"{sparsity:.0%}: {', '.join(costs)}")
    return f"Loss over dense on `{model}`, in nats per token with 95% intervals: " + "; ".join(words) + "."


# The tasks


def tasks(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in percent, acc_norm where lm-eval has it, settings x tasks; means over seeds."""
    part = rows[rows["against"].isna() & (rows["metric"] == "acc_or_norm")]
    columns = [task for task in (*SHOTS, average(rows)) if task in set(part["task"])]
    wide = 100 * part.pivot_table(index=["sparsity", "method"], columns="task", values="value")[columns]
    cells = _cells(part)
    named = wide.loc[cells].rename_axis(columns=None).reset_index()
    named = named.rename(columns={key: f"average of {words}" for key, words in AVERAGES.items()})
    return named.assign(sparsity=[f"{s:.0%}" for s, _ in cells], method=[LABELS[m] for _, m in cells])


def tasks_reading(rows: pd.DataFrame, suite: str) -> str:
    """Which of TEAL's tasks were measured, after how many examples, and which were not."""
    measured = [task for task in SHOTS if task in set(rows["task"])]
    missing = [task for task in SHOTS if task not in measured]
    shots = SHOTS if suite == "teal" else dict.fromkeys(SHOTS, 0)
    asked = ", ".join(f"{task} ({shots[task]})" for task in measured)
    text = f"Measured, with the number of solved examples before each question: {asked}."
    if suite != "teal":
        text += " The embedded tasks have no split to take examples from: none come first where TEAL's paper has some."
    return text + (f" Not measured: {', '.join(missing)}, which have no analogue here." if missing else "")


# What the search chooses


def allocation(rows: pd.DataFrame) -> pd.DataFrame:
    """Sparsities that the search gave every linear, means over seeds: columns sparsity, layer, linear, value."""
    part = rows[rows["metric"] == "linear_sparsity"]
    return part.groupby(["sparsity", "layer", "linear"], as_index=False)["value"].mean()


def published_allocation(model: str, sparsities: Sequence[float]) -> tuple[str, pd.DataFrame]:
    """The authors' sparsities, as `allocation`, and whose they are: those of `model`, else of Llama-3-8B, which has the
    grouped-query attention of the embedded model too. Of `sparsities`, those that they publish."""
    table = paper.greedy_sparsity()
    name = model if model in set(table["model"]) else "Llama-3-8B"
    part = table[(table["model"] == name) & table["target_sparsity"].isin(sparsities)]
    long = part.melt(["target_sparsity", "layer"], list(KINDS), "linear")
    return name, long.rename(columns={"target_sparsity": "sparsity"})


def allocation_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over layers in percent, one row per sparsity; frame: as `allocation`."""
    wide = 100 * frame.pivot_table(index="sparsity", columns="linear", values="value")[list(KINDS)]
    wide = wide.rename_axis(columns=None).reset_index()
    return wide.assign(sparsity=[f"{s:.0%}" for s in wide["sparsity"]])


def allocation_reading(frame: pd.DataFrame, whose: str, near: float = 0.5) -> str:
    """Which kinds are made sparsest and least sparse at the sparsity nearest to `near`; frame: as `allocation`."""
    if frame.empty:
        return f"No sparsities of {whose}."
    sparsity = min(set(frame["sparsity"]), key=lambda s: abs(s - near))
    means = frame[frame["sparsity"] == sparsity].groupby("linear")["value"].mean().sort_values(kind="stable")
    return (
        f"At {sparsity:.0%}, the greedy choice for {whose} takes most from {_like(means, means.iloc[-1])} "
        f"({means.iloc[-1]:.0%} on average) and least from {_like(means, means.iloc[0])} ({means.iloc[0]:.0%})."
    )


def _like(means: pd.Series, value: float) -> str:
    """The kinds whose mean prints as `value` does."""
    return gains.listed([f"`{kind}`" for kind in KINDS if kind in means and f"{means[kind]:.0%}" == f"{value:.0%}"])


# What others report


def quoted(reported: pd.DataFrame) -> pd.DataFrame:
    """Of the cells reported for this exhibit, those that speak of TEAL: its own, and its reruns by others.

    A paper that reports another method and the dense model it is set against says nothing of TEAL.
    """
    of_teal = reported["method"].isin([name for name in LABELS if name != "dense"])
    return reported[reported["paper"].isin(set(reported.loc[of_teal, "paper"]))]


def quoted_statements(statements: pd.DataFrame) -> pd.DataFrame:
    """What is said of TEAL in words, without what this book concluded itself; `read in` says where it was read."""
    part = statements[(statements["exhibit"] == "teal") & (statements["confidence"] != "inferred")]
    part = part.assign(**{"read in": part["source"].map(read_in)})
    return part[["where", "model", "topic", "statement", "read in"]]


def read_in(source: str) -> str:
    """Where a quoted statement was read, without the numbers of texts in a collection; see data/paper/README.md."""
    places = source.split(";")
    found = [place.removeprefix("page:") for place in places if place.startswith("page:")]
    texts = sum(place.startswith("ghtext:") for place in places)
    if texts:
        found.append(f"{texts} public GitHub text{'s' if texts > 1 else ''} quoting the paper")
    return " and ".join(found)


def _percent(sparsities: pd.Series) -> str:
    return ", ".join(f"{s:.0%}" for s in sorted(set(sparsities)))

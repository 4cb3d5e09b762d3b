"""What the rows of Table 4 say: searched recipes against uniform ones, and what the search could have found.

Reads finished tables, and the traces and recipes that rsparse.exhibits.adaptive reads back; needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from rsparse.exhibits import gains
from rsparse.exhibits.gains import Measure

MEASURES = {
    "held-out loss": gains.MEASURES["held-out loss"],
    "accuracy of four": Measure("average-4", "diff_acc", 100, "points", 2),
    "accuracy of eight": gains.MEASURES["accuracy"],
    "margin": gains.MEASURES["margin"],
}
"""Measures in which recipes are compared, by the names of this page."""
COLUMNS = ("against", "searcher", "search_samples", "search_text", "found_at", "group_size", "evaluations")
"""Columns of the exhibit's own; a run that measures only some of it has not all of them."""
BEST = "best uniform"
OVERFITTED = "likely the recipe fits the few samples that it was chosen by"
ENOUGH = 0.9
"""Share of planted linears from which on a search counts as able to find them."""


# Table 4


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Table 4: the dense model, then per budget the uniform recipes and those searched; means over seeds with ±, their
    standard deviation, where there are several."""
    rows, found = _complete(rows), []
    dense = rows[(rows["method"] == "dense") & rows["against"].isna()]
    if len(dense):
        found.append({"sparsity": "0%", "recipe": "dense"} | _cells([dense], []))
    for sparsity in _budgets(rows):
        for name, parts, searched in _recipes(rows[rows["sparsity"] == sparsity]):
            found.append({"sparsity": f"{sparsity:.0%}", "recipe": name} | _cells(parts, searched))
    return pd.DataFrame(found)


def _recipes(rows: pd.DataFrame) -> list[tuple[str, list[pd.DataFrame], list[float]]]:
    """Of one budget: a recipe's name, its measured rows seed by seed, and its perplexities on the searched text."""
    searches, measured = own_searches(rows), rows[rows["against"].isna() & (rows["task"] != "search")]
    plain = measured[measured["recipe"] == "uniform"]
    best = searches[searches["searcher"] == "uniform"]
    rhos = [_rho(name) for name in best["recipe"]]
    parts = [_of_seed(plain[plain["rho"] == rho], seed) for rho, seed in zip(rhos, best["seed"], strict=True)]
    found = [(f"{BEST} (rho {_values(rhos)})", parts, list(best["value"]))]
    for rho in _papers(rows):
        found.append((f"uniform, rho {rho:g}", [x for _, x in plain[plain["rho"] == rho].groupby("seed")], []))
    for searcher, part in searches[searches["searcher"] != "uniform"].groupby("searcher", sort=False):
        own = [measured[measured["recipe"] == name] for name in part["recipe"]]
        found.append((searcher, own, list(part["value"])))
    return found


def own_searches(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the searches on the exhibit's own text, which come first in a table; none of those that vary it."""
    searches = _complete(rows)[lambda x: x["task"] == "search"]
    if searches.empty:
        return searches
    text = searches.iloc[0]
    same = (searches["search_samples"] == text["search_samples"]) & (searches["search_text"] == text["search_text"])
    return searches[same]


def _cells(parts: list[pd.DataFrame], searched: list[float]) -> dict[str, object]:
    def values(task: str, metric: str, factor: float = 1) -> list[float]:
        chosen = [x.loc[(x["task"] == task) & (x["metric"] == metric), "value"] for x in parts]
        return [factor * x.iloc[0] for x in chosen if len(x)]

    return {
        "perplexity, searched text": _spread(searched, 3), "perplexity, held-out": _spread(values(*HELDOUT), 3),
        "accuracy of four (%)": _spread(values("average-4", "acc", 100), 1),
        "accuracy of eight (%)": _spread(values("average", "acc", 100), 1), "seeds": len(parts),
    }  # fmt: skip


HELDOUT = "heldout", "perplexity"


# Differences


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Searched recipes against others, as gains, one row per budget, comparison and measure.

    Columns sparsity, searcher, against, measure, value, low, high (mean over seeds, 95% interval over items), least,
    most (the seeds' own means) and seeds (how many). Positive where the searched recipe is better.
    """
    rows = _complete(rows)
    return _gains(rows[rows["search_samples"].isna() & rows["found_at"].isna()], ["sparsity", "searcher", "against"])


def _gains(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Rows of differences as gains; of several seeds one row, with the range of the single ones."""
    names = {(m.task, m.metric): name for name, m in MEASURES.items()}
    rows = rows[rows["against"].notna()]
    rows = rows.assign(measure=[names.get(pair) for pair in zip(rows["task"], rows["metric"], strict=True)])
    found = []
    for key, part in rows.dropna(subset=["measure"]).groupby([*by, "measure"], sort=False):
        factor, whole = MEASURES[key[-1]].factor, part["seed"].astype(str).str.contains("/")
        mean, single = part[whole if whole.any() else ~whole].iloc[0], factor * part.loc[~whole, "value"]
        low, high = sorted((factor * mean["low"], factor * mean["high"]))
        found.append(dict(zip([*by, "measure"], key, strict=True)) | {
            "value": factor * mean["value"], "low": low, "high": high, "least": single.min(), "most": single.max(),
            "seeds": len(single),
        })  # fmt: skip
    columns = [*by, "measure", "value", "low", "high", "least", "most", "seeds"]
    found = pd.DataFrame(found, columns=columns)
    order = found["measure"].map(list(MEASURES).index)
    return found.assign(order=order).sort_values(["sparsity", "order"], kind="stable", ignore_index=True)[columns]


def panels(found: pd.DataFrame) -> pd.DataFrame:
    """`differences` for `figures.difference_panels`, without the margin."""
    found = found[found["measure"] != "margin"]
    return found.assign(panel=[_titled(name) for name in found["measure"]], label=_labels(found))


def table(found: pd.DataFrame) -> pd.DataFrame:
    """`differences` as text, one row per comparison; where there are several seeds, their range for the loss."""
    lines: dict[str, dict[str, str]] = {}
    for label, row in zip(_labels(found), found.to_dict("records"), strict=True):
        line = lines.setdefault(label, {"comparison": label})
        line[_titled(row["measure"])] = gains.starred(row, MEASURES[row["measure"]].decimals)
        if row["measure"] == "held-out loss" and row["seeds"] > 1:
            line["loss, seed by seed"] = _range(row)
    return pd.DataFrame(list(lines.values()))


def conclusion(rows: pd.DataFrame, model: str) -> str:
    """Whether the paper's search pays, in words: against each of what it is compared with, by loss and by accuracy."""
    found, parts = differences(rows), []
    for against in dict.fromkeys(found["against"]):
        part = found[(found["searcher"] == "evolution") & (found["against"] == against)]
        words = "better", "worse", "not told apart"
        said = {name: gains.by_sign(part[part["measure"] == name], words) for name in list(MEASURES)[:2]}
        parts.append(f"against {_named(against)}, {'; '.join(gains.by_measure({k: v for k, v in said.items() if v}))}")
    if not parts:
        return f"On `{model}`, no search was compared with anything."
    return f"Recipes that evolution found for `{model}`, by 95% intervals:\n\n" + "\n".join(f"- {x}." for x in parts)


def carried(rows: pd.DataFrame) -> pd.DataFrame:
    """What evolution gains over the best uniform rho on the text it searched, and of that on held-out text.

    Columns as `differences`, of the held-out loss alone, and searched (nats per token, mean over seeds).
    """
    searches = own_searches(rows)
    loss = np.log(searches.pivot_table(index="sparsity", columns="searcher", values="value", aggfunc=_log_mean))
    found = differences(rows)
    chosen = (found["searcher"] == "evolution") & (found["against"] == BEST) & (found["measure"] == "held-out loss")
    found = found[chosen]
    if found.empty:
        return found.assign(searched=[])
    gain = loss["uniform"] - loss["evolution"]
    return found.assign(searched=[gain[s] for s in found["sparsity"]]).reset_index(drop=True)


def carried_reading(found: pd.DataFrame, model: str) -> str:
    """`carried` in words, with the likely reason where a gain does not carry over."""
    if found.empty:
        return f"On `{model}`, nothing was searched by evolution."
    said = []
    for row in found.to_dict("records"):
        told = gains.interval(row, 4)
        seeds = f", over {row['seeds']} seeds {_range(row)}" if row["seeds"] > 1 else ""
        said.append(f"- at {row['sparsity']:.0%}, {row['searched']:+.4f} on the text it searched and {told} on "
                    f"held-out text{seeds}: {_carries(row)}.")  # fmt: skip
    head = f"What evolution saves beyond the best uniform rho on `{model}`, in nats per token:\n\n"
    return head + "\n".join(said)


def _carries(row: dict) -> str:
    if row["low"] > 0 and row["least"] > 0:
        return "the gain carries over"
    if row["low"] > 0:
        return "the mean carries over, but not every seed's recipe is better than its uniform one"
    if row["high"] < 0:
        return "the recipe fits the searched text and is worse elsewhere, which is overfitting"
    if row["searched"] <= 0:
        return "the search found nothing, and nothing could carry over"
    if row["value"] <= 0:
        return f"nothing of it is seen elsewhere; {OVERFITTED}"
    if row["value"] < row["searched"] / 2:
        return f"less than half of it is seen elsewhere, if any; {OVERFITTED}"
    return "at least half of it is seen elsewhere, but these windows cannot tell so small a gain from none"


# Convergence


def convergence(traces: pd.DataFrame) -> pd.DataFrame:
    """Gain found so far against evaluations spent: columns sparsity, searcher, seed, evaluations, passes, gain.

    traces: of `adaptive.traces`. Thresholds are read again before each group, so losses of two groups do not compare;
    the gain is the sum over groups of what each began with, its first loss, minus its best so far. A candidate met
    again costs nothing and is no evaluation. passes: full passes over the search text.
    """
    parts = []
    for (sparsity, searcher, seed), part in traces.groupby(["sparsity", "searcher", "seed"], sort=False):
        found, before = [], 0.0
        for _, group in part.groupby("group", sort=False):
            gain = before + group["loss"].iloc[0] - group["loss"].cummin()
            found.append(gain)
            before = gain.iloc[-1]
        line = pd.DataFrame({"evaluations": (part["cost"] > 0).cumsum(), "passes": part["cost"].cumsum()})
        line = line.assign(gain=pd.concat(found), group=part["group"])
        parts.append(line.assign(sparsity=sparsity, searcher=searcher, seed=seed))
    return pd.concat(parts, ignore_index=True)


def convergence_reading(lines: pd.DataFrame, model: str) -> str:
    """How far each searcher comes, and in how many searches evolution ends before random search."""
    ends = lines.groupby(["sparsity", "searcher", "seed"], sort=False).last().reset_index()
    said = []
    for searcher, part in ends.groupby("searcher", sort=False):
        spent = f"{part['evaluations'].mean():.0f} evaluations ({part['passes'].mean():.0f} full passes)"
        said.append(f"{searcher} gains {_between(part['gain'], 4)} nats per token with {spent}")
    text = f"On the text that is searched for `{model}`, group by group: {'; '.join(said)}."
    wide = ends.pivot_table(index=["sparsity", "seed"], columns="searcher", values="gain")
    if {"evolution", "random"} <= set(wide):
        ahead = int((wide["evolution"] > wide["random"]).sum())
        text += f" Evolution ends ahead of random search in {ahead} of {len(wide)} searches."
    return text


# Recipes


def maps(found: pd.DataFrame, released: pd.DataFrame, searcher: str = "evolution") -> pd.DataFrame:
    """Columns panel, layer, linear, value: rho of a searcher's recipes by budget, mean over seeds; and the authors'."""
    found = found[found["searcher"] == searcher]
    own = found.groupby(["sparsity", "layer", "linear"], sort=False)["rho"].mean().reset_index(name="value")
    own = own.assign(panel=[f"sparsity {s:.0%}" for s in own["sparsity"]]).drop(columns="sparsity")
    return pd.concat([own, released.rename(columns={"rho": "value"}).assign(panel="the authors' list")])


def recipe_reading(found: pd.DataFrame, model: str, step: float) -> str:
    """How many linears get rho 1, how many a low one, and whether the seeds agree, in words."""
    said = []
    for sparsity, part in found[found["searcher"] == "evolution"].groupby("sparsity"):
        text = f"at {sparsity:.0%}, {(part['rho'] == 1).mean():.0%} of the linears get rho 1, and the mean is "
        text += f"{part['rho'].mean():.3f}"
        wide = part.pivot_table(index=["layer", "linear"], columns="seed", values="rho")
        if wide.shape[1] > 1:
            near = (wide.max(axis=1) - wide.min(axis=1) <= step + 1e-9).mean()
            text += f"; {wide.shape[1]} seeds agree within one grid step on {near:.0%} of the linears"
        said.append(text)
    return f"In the recipes that evolution found for `{model}`: {'; '.join(said)}."


def released_reading(released: pd.DataFrame, path: str, quoted: pd.DataFrame, model: str) -> str:
    """What is known of the authors' list: counted in the reader's file, or quoted."""
    if len(released):
        ones = int((released["rho"] == 1).sum())
        mean = f"the mean is {released['rho'].mean():.3f}"
        return f"In the authors' list, {ones} of {len(released)} rho are exactly 1; {mean}."
    values = quoted.set_index("metric")["value"]
    why = "This run was given no clone of the authors' code"
    if path:
        why = f"The file given does not fit `{model}` ({released.attrs['why']})"
    return (f"{why}. Quoted of their list, for {quoted['model'].iloc[0]} at {quoted['sparsity'].iloc[0]:.0%}: "
            f"{values['linears_rho_1']:.0f} of {values['linears']:.0f} rho are exactly 1, the mean is "
            f"{values['rho_mean']:.3f}.")  # fmt: skip


def linears_per_group(found: pd.DataFrame, groups: int) -> int:
    """How many linears the model's search changes at once."""
    return round(len(found[["layer", "linear"]].drop_duplicates()) / groups)


# Sensitivity and transfer


def sensitivity(rows: pd.DataFrame) -> pd.DataFrame:
    """Gain in held-out loss over the best uniform rho, by the text that both were chosen on; columns as `differences`,
    with search_text and search_samples."""
    rows = _complete(rows)
    return _gains(rows[rows["search_samples"].notna()], ["sparsity", "search_text", "search_samples"])


def transfer(rows: pd.DataFrame) -> pd.DataFrame:
    """Gain in held-out loss over the best uniform rho, of recipes at a budget that they were not found at."""
    rows = _complete(rows)
    return _gains(rows[rows["found_at"].notna()], ["found_at", "sparsity"])


def variation_labels(found: pd.DataFrame) -> list[str]:
    """Of every row of `sensitivity`, or of `transfer`."""
    if "found_at" in found:
        pairs = zip(found["found_at"], found["sparsity"], strict=True)
        return [f"found at {at:.0%}, used at {used:.0%}" for at, used in pairs]
    texts = zip(found["search_samples"], found["search_text"], strict=True)
    return [f"{count:.0f} {'sample' if count == 1 else 'samples'} of {name}" for count, name in texts]


def variation_table(found: pd.DataFrame) -> pd.DataFrame:
    """`sensitivity` or `transfer` as text."""
    records = found.to_dict("records")
    title = _titled("held-out loss")
    shown = pd.DataFrame({"recipe": variation_labels(found), title: [gains.starred(row, 4) for row in records]})
    several = any(row["seeds"] > 1 for row in records)
    return shown.assign(**{"seed by seed": [_range(row) for row in records]}) if several else shown


def variation_reading(found: pd.DataFrame, model: str) -> str:
    """Which variations are better, worse, or not told apart from the best uniform rho, in words."""
    labels = pd.Series(variation_labels(found), found.index, dtype=object)
    above, below = found["low"] > 0, found["high"] < 0
    groups = {"better": above, "worse": below, "not told apart": ~(above | below)}
    said = [f"{word} in {mask.sum()} of {len(found)} ({'; '.join(labels[mask])})" for word, mask in groups.items()
            if mask.any()]  # fmt: skip
    return f"On held-out text, against the best uniform rho on `{model}`, evolution is {', '.join(said)}."


# The planted control


def recovery(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the planted search: columns searcher, group_size, metric, value, low, high, n."""
    rows = _complete(rows)
    columns = ["searcher", "group_size", "metric", "value", "low", "high", "n"]
    return rows.loc[rows["task"] == "planted-search", columns].reset_index(drop=True)


def recovery_table(found: pd.DataFrame) -> pd.DataFrame:
    """Shares in percent with their 95% intervals, one row per searcher and group size."""
    titles = {"recovered_share": "planted rho found (%)", "false_share": "rho below 1 in nothing (%)"}
    shown = found.assign(cell=[f"{100 * v:.0f} [{100 * a:.0f}, {100 * b:.0f}]" for v, a, b in
                               zip(found["value"], found["low"], found["high"], strict=True)])  # fmt: skip
    wide = shown.pivot_table(index=["searcher", "group_size", "n"], columns="metric", values="cell", aggfunc="first",
                             sort=False).reset_index()  # fmt: skip
    wide["group_size"] = wide["group_size"].astype(int)
    return wide.rename(columns=titles | {"group_size": "linears per group"}).rename_axis(columns=None)


def recovery_reading(found: pd.DataFrame) -> str:
    """Up to which group size each searcher finds what was planted, and what it makes of nothing."""
    said, false = [], found[found["metric"] == "false_share"]
    for searcher, part in found[found["metric"] == "recovered_share"].groupby("searcher", sort=False):
        said.append(f"{searcher} finds {_reach(part.sort_values('group_size'))}")
    text = f"Of the planted rho, {'; '.join(said)}."
    worst = false.loc[false["value"].idxmax()]
    if worst["value"] == 0:
        return f"{text} Where nothing was planted, no search gave a rho other than 1."
    return (f"{text} Where nothing was planted, at most {worst['value']:.0%} of the linears were given a rho other "
            f"than 1 ({worst['searcher']}, groups of {worst['group_size']:.0f}).")  # fmt: skip


def _reach(part: pd.DataFrame) -> str:
    """Up to which of its group sizes, ascending, a searcher finds enough, and what it finds in the largest."""
    enough, last = part.loc[(part["value"] < ENOUGH).cumsum() == 0, "group_size"], part.iloc[-1]
    if len(enough) == len(part):
        return f"at least {ENOUGH:.0%} in groups of every size tried"
    reach = f"up to {enough.max():.0f}" if len(enough) else "no size tried"
    return f"at least {ENOUGH:.0%} in groups of {reach}, and {last['value']:.0%} in groups of {last['group_size']:.0f}"


def resolved(found: pd.DataFrame, linears: int) -> str:
    """What the planted control says about groups as large as those of the model's search."""
    part = found[(found["searcher"] == "evolution") & (found["metric"] == "recovered_share")]
    sizes = part["group_size"]
    near = part[sizes == (sizes[sizes >= linears].min() if (sizes >= linears).any() else sizes.max())].iloc[0]
    head = f"The model is searched in groups of {linears} linears; in planted groups of {near['group_size']:.0f}"
    share = f"as many candidates place {near['value']:.0%} of the rho"
    if near["value"] < ENOUGH:
        return (f"{head}, {share}: what is found on the model is a coarse recipe, and no difference seen there does "
                "not show that there is none to find.")  # fmt: skip
    if near["group_size"] < linears:
        return f"{head}, the largest tried, {share}, which says nothing of larger ones."
    return f"{head}, {share}: where the model had such a rho, this search would have seen it."


# Small things


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with all columns that are read here."""
    missing = [name for name in COLUMNS if name not in rows]
    return rows.assign(**dict.fromkeys(missing, np.nan))


def _budgets(rows: pd.DataFrame) -> list[float]:
    return list(dict.fromkeys(own_searches(rows)["sparsity"]))


def _papers(rows: pd.DataFrame) -> list[float]:
    """The uniform rho that the paper uses, as the differences name it, and 1."""
    named = [x.split()[-1] for x in rows["against"].dropna() if x.startswith("uniform ")]
    return list(dict.fromkeys([*map(float, named), 1.0]))


def _of_seed(rows: pd.DataFrame, seed: object) -> pd.DataFrame:
    """Rows of one seed; of a recipe that calibrates nothing there is only the first."""
    own = rows[rows["seed"].astype(str) == str(seed)]
    return own if len(own) else rows


def _log_mean(values: pd.Series) -> float:
    return math.exp(np.log(values).mean())


def _rho(recipe: str) -> float:
    return float(recipe.removeprefix("uniform-"))


def _values(numbers: Iterable[float]) -> str:
    return ", ".join(f"{x:g}" for x in sorted(set(numbers)))


def _spread(values: list[float], decimals: int) -> str:
    """"1.942 ± 0.003", without ± for a single value, "" for none."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{decimals}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else mean


def _between(values: pd.Series, decimals: int) -> str:
    low, high = (f"{x:.{decimals}f}" for x in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _range(row: dict) -> str:
    return f"{row['least']:+.4f} to {row['most']:+.4f}" if row["seeds"] > 1 else f"{row['value']:+.4f}"


def _titled(measure: str) -> str:
    return f"{measure} ({MEASURES[measure].unit})"


def _named(against: str) -> str:
    if against == BEST:
        return "the best uniform rho of the same grid"
    return f"the paper's uniform rho, {against.split()[-1]}" if against.startswith("uniform ") else f"{against} search"


def _labels(found: pd.DataFrame) -> list[str]:
    zipped = zip(found["sparsity"], found["searcher"], found["against"], strict=True)
    return [f"{s:.0%}: {searcher} − {against}" for s, searcher, against in zipped]

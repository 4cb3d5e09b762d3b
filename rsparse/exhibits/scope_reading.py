"""What the rows of the scope ablation say: quality by scope, and each gain as scope part plus method part.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from rsparse.exhibits import gains
from rsparse.exhibits.gains import MEASURES, NAMES

SCOPES = {"all": "all linears", "mlp": "the MLP", "attention": "attention"}
PARTS = {  # part of a gain -> (scope of the setting, what it is set against)
    "gain": ("all", "{rival}"),
    "scope part": ("all", "scope=mlp"),
    "method part": ("mlp", "{rival}"),
    "scope minus method": ("all", "method part over {rival}"),
}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per budget, method and scope: what was planned and realised, and the quality; means over seeds.

    Influenced: share of the scored logits of tasks, and of held-out text, that a sparse position influenced.
    """
    rows = rows[rows["against"].isna()]
    scopes = rows["scope"].map(SCOPES).where(rows["method"] != "dense", "")
    rows = rows.assign(method=rows["method"].map(NAMES), scope=scopes)
    keys = ["sparsity", "method", "scope"]
    found = []
    for (sparsity, method, scope), part in rows.groupby(keys, sort=False):
        average = part[(part["task"] == "average") & (part["metric"] == "acc")]
        tasks, heldout = (100 * part.loc[part["task"] == task, "influenced"].mean() for task in ("average", "heldout"))
        found.append({
            "sparsity": sparsity, "method": method, "scope": scope,
            "planned (%)": 100 * part["planned"].mean(), "realised (%)": 100 * part["realised"].mean(),
            "accuracy (%)": f"{100 * average['value'].mean():.1f} ± {100 * average['stderr'].mean():.1f}",
            "margin": part.loc[(part["task"] == "average") & (part["metric"] == "margin"), "value"].mean(),
            "perplexity": part.loc[part["metric"] == "perplexity", "value"].mean(),
            "influenced, tasks (%)": tasks, "influenced, text (%)": heldout, "seeds": part["seed"].nunique(),
        })  # fmt: skip
    found = pd.DataFrame(found).sort_values("sparsity", kind="stable", ignore_index=True)
    return found.assign(sparsity=[f"{s:.0%}" for s in found["sparsity"]])


def ranking(rows: pd.DataFrame, model: str) -> str:
    """In words: the lowest and the highest perplexity at the largest budget that more than one setting reaches."""
    rows = rows[rows["against"].isna() & (rows["metric"] == "perplexity")]
    dense = rows.loc[rows["method"] == "dense", "value"].mean()
    found = rows[rows["method"] != "dense"].groupby(["sparsity", "method", "scope"])["value"].mean().reset_index()
    found = found[found.groupby("sparsity")["value"].transform("size") > 1]
    if found.empty:
        return f"At no budget was more than one setting of `{model}` measured."
    last = found[found["sparsity"] == found["sparsity"].max()].sort_values("value")
    ends = [f"{NAMES[x['method']]} on {SCOPES[x['scope']]} ({x['value']:.3f})" for x in (last.iloc[0], last.iloc[-1])]
    return (
        f"At {last['sparsity'].iloc[0]:.0%}, perplexity of held-out text goes from {ends[0]} to {ends[1]}; that of "
        f"dense `{model}` is {dense:.3f}."
    )


def left_out(settings: Sequence, model: str) -> str:
    """Which scopes cannot reach which budgets, in words. settings: anything with method, scope and sparsity."""
    found: dict[tuple[str, str], list[float]] = {}
    for x in settings:
        found.setdefault((x.method, x.scope), []).append(x.sparsity)
    if not found:
        return f"On `{model}`, every method reaches every budget asked of it."
    parts = [f"{NAMES[method]} on {SCOPES[scope]} at {gains.budgets(sorted(budgets))}"
             for (method, scope), budgets in found.items()]  # fmt: skip
    return f"Out of reach on `{model}`, and left out: {'; '.join(parts)}."


def parts(rows: pd.DataFrame, rival: str, method: str = "r-sparse") -> pd.DataFrame:
    """The gain of `method` over `rival` at every budget, and its parts; columns as `gains.gains`, and `part`.

    Positive favours `method`; of "scope minus method", the scope part. Only budgets where every part was measured.
    """
    names = {(scope, against.format(rival=rival)): part for part, (scope, against) in PARTS.items()}
    own = rows[rows["method"] == method]
    own = own.assign(part=[names.get(pair) for pair in zip(own["scope"], own["against"], strict=True)])
    found = gains.gains(own.dropna(subset=["part"]))
    return found[found.groupby(["sparsity", "measure"])["part"].transform("nunique") == len(PARTS)]


def parts_table(found: pd.DataFrame) -> pd.DataFrame:
    """`parts` as text with 95% intervals, one row per budget and measure, and which part is the larger.

    A star: the interval excludes zero.
    """
    lines = []
    for (sparsity, measure), group in found.groupby(["sparsity", "measure"], sort=False):
        group = group.set_index("part")
        cells = {part: gains.starred(group.loc[part], MEASURES[measure].decimals) for part in PARTS}
        difference = group.loc["scope minus method"]
        larger = "scope" if difference["low"] > 0 else "method" if difference["high"] < 0 else "not told apart"
        lines.append({"sparsity": f"{sparsity:.0%}", "measure": gains.titled(measure), **cells, "larger": larger})
    return pd.DataFrame(lines)


def parts_panels(found: pd.DataFrame) -> pd.DataFrame:
    """The gain and its two parts for `figures.difference_panels`."""
    order = found["part"].map(list(PARTS).index)
    shown = found.assign(order=order).sort_values(["sparsity", "order"], kind="stable")
    shown = shown[shown["part"] != "scope minus method"]
    return gains.panels(shown, [f"{s:.0%}: {part}" for s, part in zip(shown["sparsity"], shown["part"], strict=True)])


def parts_reading(found: pd.DataFrame, rival: str, model: str, method: str = "r-sparse") -> str:
    """In words: in how many comparisons there is a lead, and to which of its parts more of it is owed."""
    who = f"{NAMES[method]} against {NAMES[rival]} on `{model}`"
    if found.empty:
        return f"{who}: at no budget were all parts measured."
    gain = found[found["part"] == "gain"]
    said = gains.tally(gain, ("ahead", "behind", "not told apart"))
    return f"{who}: {said}. {_owed(found, gain[gain['low'] > 0])}"


def _owed(found: pd.DataFrame, led: pd.DataFrame) -> str:
    """To which part more of the lead is owed, over the comparisons `led`, those with a lead."""
    if led.empty:
        return "There is no lead to split."
    keys = ["sparsity", "measure"]
    parts = found[found["part"] == "scope minus method"].merge(led[keys], on=keys)
    if (parts["high"] < 0).all():
        return "Wherever it is ahead, more of the lead is owed to the method than to the scope."
    if (parts["low"] > 0).all():
        return "Wherever it is ahead, more of the lead is owed to the scope than to the method."
    if not ((parts["high"] < 0) | (parts["low"] > 0)).any():
        return "Where it is ahead, which of the two parts is the larger is not told."
    words = "the scope part is the larger", "the method part is the larger", "the two parts are not told apart"
    return f"Where it is ahead: {gains.tally(parts, words)}."


def scopes(rows: pd.DataFrame, against: str) -> pd.DataFrame:
    """All linears minus the scope `against` at the same budget, for every method; columns as `gains.gains`."""
    return gains.gains(rows[(rows["against"] == f"scope={against}") & (rows["scope"] == "all")])


def scopes_panels(found: pd.DataFrame) -> pd.DataFrame:
    """`scopes` for `figures.difference_panels`."""
    pairs = zip(found["sparsity"], found["method"], strict=True)
    return gains.panels(found, [f"{s:.0%}: {NAMES[method]}" for s, method in pairs])


def scopes_reading(found: pd.DataFrame, against: str, model: str) -> str:
    """In words, per method: in how many comparisons the wider scope is better at the same budget."""
    if found.empty:
        return f"On `{model}`, no budget was measured in both scopes."
    words = "better", "worse", "not told apart"
    said = [f"{NAMES[method]} is {gains.tally(here, words)}" for method, here in found.groupby("method", sort=False)]
    return f"On all linears of `{model}` instead of {SCOPES[against]} alone, at the same budget: {'; '.join(said)}."

"""What the rows of Table 1 say: its tables, which differences mean anything, and others' numbers side by side.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from rsparse.exhibits import gains
from rsparse.exhibits.gains import listed, tasks

TASKS = ("winogrande", "piqa", "sciq", "obqa", "hellaswag", "boolq", "arc_easy", "arc_challenge")
NAMES = {
    "dense": "dense", "relufication": "ReLUfication", "cats": "CATS", "griffin": "GRIFFIN", "chess": "CHESS",
    "teal": "uniform TEAL", "teal-greedy": "greedy TEAL", "wina": "WINA", "wina-rotated": "rotated WINA",
    "larosa": "LaRoSA", "low-rank": "low rank alone", "r-sparse": "R-Sparse",
    "r-sparse (column-norm)": "column-norm R-Sparse",
}  # fmt: skip
"""Methods as tables and legends call them, in the order of tables."""
ORDER = tuple(NAMES)
SPARSE = dict.fromkeys(ORDER, "all linears") | {
    "dense": "", "relufication": "up, down", "cats": "up, down", "griffin": "gate, up, down", "chess": "q, o, up, down",
}  # fmt: skip
"""The linears that a method makes sparse at its own scope, which for CHESS is less than the column `scope` says."""
POINTS = (("cats", 0.22), ("cats", 0.4), ("griffin", 0.33), ("griffin", 0.5), ("r-sparse", 0.4), ("r-sparse", 0.5))
"""The sparsities at which the paper's table has a method."""
PAIRS = ((0.4, "cats", 0.22), (0.4, "cats", 0.4), (0.5, "griffin", 0.33), (0.5, "griffin", 0.5))
"""(sparsity of R-Sparse, method, its sparsity): what the paper's table sets side by side."""
BASELINES = ("cats", "teal")
"""What other methods' own papers set them against."""
DIFFERENCES = {  # column -> (task, metric, factor, decimals)
    "accuracy": ("average", "diff_acc", 100, 2),
    "margin": ("average", "diff_margin", 1, 3),
    "loss": ("heldout", "diff_perplexity_log", 1, 4),
}
UNITS = {"accuracy": "accuracy (points)", "margin": "margin (nats)", "loss": "loss (nats/token)"}


def code(row: pd.Series | dict) -> str:
    """A method's key in `NAMES`: R-Sparse with another score than its own has one of its own."""
    other = row["method"] == "r-sparse" and row["score"] == "column-norm"
    return f"{row['method']} (column-norm)" if other else row["method"]


def _coded(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(code=[code(row) for row in rows[["method", "score"]].to_dict("records")])


def budgets(rows: pd.DataFrame) -> list[float]:
    """The sparsities at which R-Sparse was measured, dense's 0 left out."""
    return sorted(set(rows.loc[rows["method"] == "r-sparse", "sparsity"].dropna()))


# Quality, method by method


CLOSE = 1.0
"""Points of sparsity that a measurement may be off its plan without a word."""


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method and sparsity: what was planned and realised, and its quality; means over seeds.

    Influenced: share of the scored logits of tasks, and of held-out text, that a sparse position influenced; only where
    sparse methods differ in it. Columns without any value are left out.
    """
    measured = _coded(rows[rows["against"].isna()])
    found = []
    for (sparsity, key), part in measured.groupby([measured["sparsity"].fillna(-1), "code"]):
        average = part[(part["task"] == "average") & (part["metric"] == "acc")]
        found.append({
            "asked": "" if sparsity < 0 else f"{sparsity:.0%}", "method": NAMES[key], "makes sparse": SPARSE[key],
            "planned (%)": 100 * part["planned"].mean(), "realised (%)": 100 * part["realised"].mean(),
            "on tasks (%)": 100 * average["realised_here"].mean() if "realised_here" in average else math.nan,
            "nominal (%)": 100 * part["nominal"].mean() if "nominal" in part else math.nan,
            "accuracy (%)": f"{100 * average['value'].mean():.1f} ± {100 * average['stderr'].mean():.1f}",
            "margin": _mean(part, "average", "margin"), "perplexity": _mean(part, "heldout", "perplexity"),
            **_influenced(measured, part), "seeds": part["seed"].nunique(),
            "order": (0.001 if sparsity < 0 else sparsity, ORDER.index(key)),
        })  # fmt: skip
    return pd.DataFrame(sorted(found, key=lambda x: x.pop("order"))).dropna(axis="columns", how="all")


def on_tasks(rows: pd.DataFrame, model: str) -> str:
    """How far from the plan the tasks' rows were, in words: thresholds were calibrated on running text."""
    part = rows[rows["against"].isna() & (rows["task"] == "average") & (rows["metric"] == "acc")]
    if "realised_here" not in part or part["realised_here"].isna().all():
        return ""
    gaps = 100 * (part["realised_here"] - part["planned"]).groupby([part["method"], part["sparsity"]]).mean().dropna()
    if not len(gaps) or gaps.abs().max() <= CLOSE:
        return f"On the tasks' rows, too, every method of `{model}` is within {CLOSE:g} points of its plan."
    low, (method, sparsity) = gaps[gaps.abs().idxmax()], gaps.abs().idxmax()
    far = gaps[gaps.abs() > CLOSE].index.get_level_values("method")
    names = ", ".join(dict.fromkeys(NAMES.get(name, name) for name in far))
    return (
        "Thresholds were calibrated on running text; on the short rows of tasks they skip less or more than planned: "
        f"on `{model}` by up to {low:+.1f} points ({NAMES.get(method, method)} at {sparsity:.0%}), and by more than "
        f"{CLOSE:g} points at some budget for {names}. Methods that choose per token or per prompt read what was "
        "planned, so that accuracies of the two kinds are compared at slightly different bytes."
    )


def _influenced(measured: pd.DataFrame, part: pd.DataFrame) -> dict[str, float]:
    """Shares of influenced logits of one setting, in percent, of the kinds of text where sparse settings differ."""
    found = {}
    for task, name in (("average", "tasks"), ("heldout", "text")):
        shares = measured.loc[(measured["task"] == task) & (measured["method"] != "dense"), "influenced"]
        if shares.max() - shares.min() > 1e-6:
            found[f"influenced, {name} (%)"] = 100 * part.loc[part["task"] == task, "influenced"].mean()
    return found


def room(rows: pd.DataFrame, model: str, suite: str) -> str:
    """How much of the tasks the dense model has solved, in words: what is left for accuracy to move in."""
    part = rows[(rows["method"] == "dense") & rows["against"].isna() & (rows["metric"] == "acc")].set_index("task")
    found = 100 * part.loc[list(TASKS), "value"]
    return (
        f"Dense `{model}` answers {100 * part.loc['average', 'value']:.1f}% of the questions right, on average over "
        f"{tasks(suite)}; from {found.min():.1f}% ({found.idxmin()}) to {found.max():.1f}% ({found.idxmax()})."
    )


def _accuracies(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of measured accuracy, with `code`."""
    return _coded(rows[rows["against"].isna() & (rows["metric"] == "acc")])


def _task_by_task(part: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """Accuracy in percent, means over seeds: `index` x tasks, methods in the order of tables."""
    part = part.assign(order=part["code"].map(ORDER.index), sparsity=part["sparsity"].fillna(-1.0))
    found = 100 * part.pivot_table(index=["order", "sparsity", "code"], columns="task", values="value")
    found = found[[*TASKS, "average"]].rename_axis(columns=None).reset_index()
    asked = ["" if s < 0 else f"{s:.0%}" for s in found["sparsity"]]
    found = found.assign(method=found["code"].map(NAMES), asked=asked)
    return found[[*index, *TASKS, "average"]]


def by_task(rows: pd.DataFrame, sparsity: float) -> pd.DataFrame:
    """Accuracy in percent, methods x tasks, of dense and of one budget; means over seeds."""
    part = _accuracies(rows)
    return _task_by_task(part[(part["sparsity"] == sparsity) | part["method"].isin(["dense", "relufication"])],
                         ["method"])  # fmt: skip


# The paper's operating points


def points(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 1: accuracy in percent, its operating points x tasks, as far as they were measured."""
    part = _accuracies(rows)
    wanted = {("dense", 0.0), *POINTS}
    kept = [pair in wanted or pair[0] == "relufication" for pair in zip(part["code"], part["sparsity"], strict=True)]
    return _task_by_task(part[kept], ["method", "asked"])


def pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """R-Sparse minus CATS and GRIFFIN as the paper pairs them: a row per task and measure, a column per pair measured.

    Accuracy of every task in points, then the averages of `DIFFERENCES`, with 95% intervals.
    """
    cells = {task: (task, "diff_acc", 100, 2) for task in TASKS}
    cells |= {f"average {UNITS[name]}": place for name, place in DIFFERENCES.items()}
    found: dict[str, list[str]] = {}
    for own, other, sparsity in PAIRS:
        label = "r-sparse" if own == sparsity else f"r-sparse {own:g}"
        part = rows[(rows["method"] == other) & (rows["sparsity"] == sparsity) & (rows["against"] == label)]
        if len(part):
            title = f"R-Sparse {own:.0%} − {NAMES[other]} {sparsity:.0%}"
            found[title] = [_turned(part, *cell) for cell in cells.values()]
    named = [name.replace("average loss", "held-out loss") for name in cells]
    return pd.DataFrame({"task": named} | found) if found else pd.DataFrame()


def _turned(part: pd.DataFrame, task: str, metric: str, factor: float, decimals: int) -> str:
    """One difference with its sign turned round."""
    row = part[(part["task"] == task) & (part["metric"] == metric)].iloc[0]
    return gains.starred(_scaled(row, -factor), decimals)


def headline(rows: pd.DataFrame, model: str) -> str:
    """The paper's comparison in words: accuracy lost at its largest operating points, and R-Sparse's two leads."""
    largest = dict(POINTS)  # of a method's points, the last
    lost = {method: _accuracy(rows, method, largest[method], "dense") for method in ("r-sparse", "griffin", "cats")}
    losses = [f"{NAMES[method]} at {largest[method]:.0%} {gains.interval(_scaled(row, 100), 2)}"
              for method, row in lost.items() if row is not None]  # fmt: skip
    if not losses:
        return f"None of the paper's operating points was measured on `{model}`."
    leads = [_lead(method, largest[method], row) for method in ("griffin", "cats")
             if (row := _accuracy(rows, method, largest[method], "r-sparse")) is not None]  # fmt: skip
    said = f"Average accuracy on `{model}`, minus that of dense, in points with 95% intervals: {'; '.join(losses)}."
    return said + (f" At the same bytes R-Sparse is {', and '.join(leads)}." if leads else "")


def _accuracy(rows: pd.DataFrame, method: str, sparsity: float, against: str) -> pd.Series | None:
    """The row of one average difference of accuracy; None where it was not measured."""
    part = _coded(rows[(rows["against"] == against) & (rows["task"] == "average") & (rows["metric"] == "diff_acc")])
    part = part[(part["code"] == method) & (part["sparsity"] == sparsity)]
    return part.iloc[0] if len(part) else None


def _lead(method: str, sparsity: float, row: pd.Series) -> str:
    """R-Sparse's place in words, from the method's difference from it."""
    lead = _scaled(row, -100)
    word = "ahead of" if lead["low"] > 0 else "behind" if lead["high"] < 0 else "not told apart from"
    return f"{word} {NAMES[method]} at {sparsity:.0%} ({gains.interval(lead, 2)})"


# Which differences mean anything


def differences(rows: pd.DataFrame, against: str) -> pd.DataFrame:
    """Paired differences from `against` ("dense", "r-sparse") as text with 95% intervals; starred: zero is outside.

    One row per method and sparsity; columns accuracy (points), margin (nats) and loss (nats per token).
    """
    part = _coded(rows[rows["against"] == against]).fillna({"sparsity": -1.0})
    found: dict[tuple, dict] = {}
    for column, (task, metric, factor, decimals) in DIFFERENCES.items():
        for row in part[(part["task"] == task) & (part["metric"] == metric)].to_dict("records"):
            asked = "" if row["sparsity"] < 0 else f"{row['sparsity']:.0%}"
            key = row["sparsity"], ORDER.index(row["code"])
            cell = found.setdefault(key, {"asked": asked, "method": NAMES[row["code"]]})
            cell[column] = gains.starred(_scaled(row, factor), decimals)
    return pd.DataFrame([found[key] for key in sorted(found)]).rename(columns=UNITS)


def baselines(rows: pd.DataFrame) -> pd.DataFrame:
    """`differences` of methods from what their own papers set them against, named in a column `minus`."""
    parts = [differences(rows, other).assign(minus=NAMES[other]) for other in BASELINES]
    found = pd.concat([part for part in parts if len(part)] or [pd.DataFrame()], ignore_index=True)
    first = ["asked", "method", "minus"]
    return found[[*first, *found.columns.difference(first, sort=False)]] if len(found) else found


def _scaled(row: Mapping[str, float], factor: float) -> dict[str, float]:
    """A difference in other units; with a negative factor, of the two the other way round."""
    low, high = sorted((factor * row["low"], factor * row["high"]))
    return {"value": factor * row["value"], "low": low, "high": high}


def forest(rows: pd.DataFrame, measure: str = "margin") -> pd.DataFrame:
    """Differences from R-Sparse at the same budget: columns value, low, high, name; by budget, largest first."""
    task, metric, factor, _ = DIFFERENCES[measure]
    part = _coded(rows[(rows["against"] == "r-sparse") & (rows["task"] == task) & (rows["metric"] == metric)])
    part = part.sort_values(["sparsity", "value"], ascending=[True, False], kind="stable")
    return part.assign(name=part["code"].map(NAMES), **{x: factor * part[x] for x in ("value", "low", "high")})


def added(rows: pd.DataFrame) -> pd.DataFrame:
    """What every setting adds to dense, for `figures.added`: held-out loss and margin.

    sparsity: the asked one; of a method without a knob, the realised one.
    """
    part = _coded(rows[rows["against"] == "dense"])
    free = rows[rows["against"].isna() & rows["sparsity"].isna()].groupby("method")["realised"].mean()
    part = part.assign(method=part["code"], sparsity=part["sparsity"].fillna(part["method"].map(free)))
    titles = {"loss": "held-out loss added to dense (nats per token)", "margin": "margin minus dense (nats)"}
    shown = []
    for measure, title in titles.items():
        task, metric, *_ = DIFFERENCES[measure]
        shown.append(part[(part["task"] == task) & (part["metric"] == metric)].assign(panel=title))
    return pd.concat(shown)[["panel", "method", "sparsity", "value", "low", "high"]]


def reading(rows: pd.DataFrame, model: str, measure: str = "loss") -> str:
    """Who is better than R-Sparse at the same budget at some budgets, who is worse, and who neither, in words."""
    found = forest(rows, measure)
    if found.empty:
        return f"No method was set against R-Sparse on `{model}`."
    above, below = (set(found.loc[mask, "name"]) for mask in (found["low"] > 0, found["high"] < 0))
    better, worse = (below, above) if measure == "loss" else (above, below)
    groups = {
        "better than R-Sparse at some budget and worse at none": better - worse,
        "worse than R-Sparse at some budget and better at none": worse - better,
        "better at some budget and worse at another": better & worse,
        "never told apart from R-Sparse": set(found["name"]) - better - worse,
    }  # fmt: skip
    named = {words: [name for name in NAMES.values() if name in names] for words, names in groups.items()}
    said = [f"{listed(names)} {'are' if len(names) > 1 else 'is'} {words}" for words, names in named.items() if names]
    what = {"loss": "held-out loss", "margin": "the margin", "accuracy": "accuracy"}[measure]
    return f"By {what}, at the same bytes on `{model}`: {'; '.join(said)}."


def unreached(settings: Sequence, model: str) -> str:
    """Which budgets which methods cannot reach, in words."""
    by_method: dict[str, list[float]] = {}
    for x in settings:
        by_method.setdefault(NAMES[x.method], []).append(x.sparsity)
    if not by_method:
        return f"Every method reaches every budget on `{model}`."
    parts = [f"{name} cannot reach {gains.budgets(sorted(set(found)))}" for name, found in by_method.items()]
    return f"On `{model}`, " + "; ".join(parts) + ": there it has no row."


# What others report


def evidence(reported: pd.DataFrame) -> pd.DataFrame:
    """Reported averages side by side: the paper's, and the independent reruns', each with its metric.

    Column `of`: what the sparsity is a share of; only "model" compares with the others.
    reported: rows of `paper.reported`. The WINA paper's averages are acc_norm where lm-eval has it.
    """
    part = reported[(reported["task"] == "average") & reported["metric"].isin(["acc", "acc_or_norm"])]
    part = part[~part["flag"].str.contains("suspect")]
    column = part["paper"] + ", " + part["metric"].replace("acc_or_norm", "acc or acc_norm")
    part = part.assign(column=column, method=_reported_names(part), sparsity=part["sparsity"].fillna(-1.0))
    index = ["model", "sparsity", "sparsity_kind", "method"]
    table = part.pivot_table(index=index, columns="column", values="value", sort=False)
    table = table.sort_index(level=["model", "sparsity"], sort_remaining=False).rename_axis(columns=None).reset_index()
    return table.assign(sparsity=_asked(table["sparsity"])).rename(columns={"sparsity_kind": "of"})


def quoted(reported: pd.DataFrame) -> pd.DataFrame:
    """The paper's own Table 1 as far as it is known, settings x tasks, as text; ranges where it is known no closer.

    A dagger marks a cell that was inferred from elsewhere. reported: rows of `paper.reported`.
    """
    part = reported[(reported["paper"] == "r-sparse") & (reported["where"] == "Table 1")]
    part = part[~part["flag"].str.contains("suspect")].assign(sparsity=lambda x: x["sparsity"].fillna(-1.0))
    order = [ORDER.index(method) if method in ORDER else len(ORDER) for method in part["method"]]
    part = part.assign(method=_reported_names(part), order=order)
    found = []
    for (model, _, sparsity, method), here in part.groupby(["model", "order", "sparsity", "method"]):
        cells = {task: _cell(here[here["task"] == task]) for task in (*TASKS, "average")}
        found.append({"model": model, "method": method, "sparsity": _asked([sparsity])[0]} | cells)
    return pd.DataFrame(found)


def _cell(cells: pd.DataFrame) -> str:
    """One number, or the range from the least to the largest, with a dagger where it was inferred."""
    values = sorted(cells["value"])
    if not values:
        return ""
    text = f"{values[0]:.2f}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
    return text + (" †" if cells["confidence"].eq("inferred").any() else "")


def _reported_names(part: pd.DataFrame) -> list[str]:
    """Reported methods by their names, with the variant where there is one."""
    known = NAMES | {"teal": "TEAL"}  # how it splits the sparsity is not always said
    names = ["; ".join(known.get(one, one) for one in method.split("; ")) for method in part["method"]]
    return [f"{name} ({variant})" if variant else name for name, variant in zip(names, part["variant"], strict=True)]


def _asked(sparsities: Iterable[float]) -> list[str]:
    return ["" if s < 0 else f"{s:.0%}" for s in sparsities]


def _mean(part: pd.DataFrame, task: str, metric: str) -> float:
    return part.loc[(part["task"] == task) & (part["metric"] == metric), "value"].mean()

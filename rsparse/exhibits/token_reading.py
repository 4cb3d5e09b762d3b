"""What the rows of the token-protocol exhibit say: the rules side by side, and what each rule and each choice adds.

Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import pandas as pd

from rsparse.exhibits import gains
from rsparse.exhibits.gains import MEASURES, NAMES

HEADLINE = "scored"
"""The rule that the others are set against (that of rsparse.exhibits.token_protocol, which needs torch)."""
OWN = {"r-sparse": "R-Sparse's code", "teal": "TEAL's code", "wina": "WINA's code"}
"""The rule of a method's own authors."""
SETTING = ("method", "scope", "recipe", "rho", "score", "threshold", "calibration", "tokens")
"""Columns that tell one setting under one rule from another."""
BASE = "none: as this book runs it"
"""What the choices are set against, in the table of choices."""
APART = 1.0
"""Points of sparsity: what lies further apart is not called equal bytes."""


def methods(rows: pd.DataFrame) -> list[str]:
    """The methods that were measured under the rules."""
    return list(dict.fromkeys(rows.loc[rows["rule"].notna(), "method"]))


# What was measured


def rules(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method and rule: what was read, the scores, and the share of scored logits that a sparse position
    influenced, of tasks and of held-out text; means over seeds."""
    text = _comparable(rows)
    compared = text[(text["against"] == "dense") & text["rule"].notna()]
    found = []
    for (method, rule), part in compared.groupby(["method", "rule"], sort=False):
        tasks, heldout = (_measured(text, part, task) for task in ("average", "heldout"))
        found.append({
            "method": _named(method), "rule": rule, "tokens": tasks["tokens"].iloc[0], **_bytes(tasks),
            "accuracy (%)": 100 * tasks.loc[tasks["metric"] == "acc", "value"].mean(),
            "margin": tasks.loc[tasks["metric"] == "margin", "value"].mean(),
            "perplexity": heldout.loc[heldout["metric"] == "perplexity", "value"].mean(),
            "influenced, tasks (%)": 100 * tasks["influenced"].mean(),
            "influenced, text (%)": 100 * heldout["influenced"].mean(),
        })  # fmt: skip
    return pd.DataFrame(found)


def _comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with settings as text, so that empty cells are equal too."""
    return rows.assign(**{name: rows[name].astype(object).fillna("").astype(str) for name in SETTING})


def _measured(text: pd.DataFrame, part: pd.DataFrame, task: str) -> pd.DataFrame:
    """The rows of `task` with the scores of the setting whose differences `part` holds; both of `_comparable`."""
    setting = part.loc[part["task"] == task, list(SETTING)].head(1)
    return text[text["against"].isna() & (text["task"] == task)].merge(setting, on=list(SETTING))


def _bytes(measured: pd.DataFrame) -> dict[str, float]:
    """What was planned and realised, over how many calibrations."""
    shares = {f"{name} (%)": 100 * measured[name].mean() for name in ("planned", "realised")}
    if "realised_here" in measured and (measured["task"] != "heldout").all():
        shares["realised on tasks (%)"] = 100 * measured["realised_here"].mean()
    return shares | {"seeds": measured["seed"].nunique()}


def _named(method: str) -> str:
    return NAMES.get(method, method)


# What a rule adds


def effects(rows: pd.DataFrame, method: str, against: str = f"tokens={HEADLINE}") -> pd.DataFrame:
    """Every rule minus the headline one, or minus dense: columns as `gains.gains`, and `label`.

    Positive: the method looks better. Rules that make the same tokens sparse are one, under all of their names.
    """
    part = rows[rows["rule"].notna() & (rows["against"] == against) & (rows["method"] == method)]
    average = part[part["task"] == "average"].drop_duplicates("rule").set_index("rule")["tokens"].astype(str)
    labels = {rule: " = ".join(average.index[average == tokens]) for rule, tokens in average.items()}
    found = gains.gains(part.assign(label=part["rule"].map(labels)))
    return found.drop_duplicates(["label", "measure"], ignore_index=True)


def effects_table(rows: pd.DataFrame) -> pd.DataFrame:
    """`effects` of every method as text with 95% intervals, starred where zero is outside; one row per rule."""
    found = [_lines(effects(rows, method), {"method": _named(method)}) for method in methods(rows)]
    return pd.concat(found, ignore_index=True).rename(columns={"label": "rule"}) if found else pd.DataFrame()


def panels(found: pd.DataFrame) -> pd.DataFrame:
    """`effects` or `choices` for `figures.difference_panels`."""
    return gains.panels(found, found["label"])


def _lines(found: pd.DataFrame, first: dict[str, str] | None = None) -> pd.DataFrame:
    """Differences as text, one row per label, with the cells `first` before it and one column per measure."""
    lines: dict[str, dict[str, str]] = {}
    for row in found.to_dict("records"):
        line = lines.setdefault(row["label"], {**(first or {}), "label": row["label"]})
        line[gains.titled(row["measure"])] = gains.starred(row, MEASURES[row["measure"]].decimals)
    return pd.DataFrame(list(lines.values()))


def rules_reading(rows: pd.DataFrame, model: str, method: str = "r-sparse") -> str:
    """Whether the rule alone moves the scores, and what three rules named beforehand would report: every scored text
    sparse from its first token, the headline one, and that of the method's own authors."""
    found = effects(rows, method)
    if found.empty:
        return f"{_named(method)} was not measured under several rules on `{model}`."
    moved = "changes what is reported of" if found.apply(gains.is_told, axis=1).any() else "is not seen to change"
    said = gains.by_measure({measure: _counted(part) for measure, part in found.groupby("measure", sort=False)})
    count = found["label"].nunique()
    first = (
        f"The token rule alone {moved} {_named(method)} on `{model}`. Of {count} rule{'s' if count > 1 else ''} set "
        f"against `{HEADLINE}`, {'; '.join(said)}."
    )
    return " ".join(part for part in (first, _own(found, method), _from_dense(rows, method)) if part)


def _counted(part: pd.DataFrame) -> str:
    """How many rules are told apart: "2 score better and 1 worse"."""
    counts = {"better": int((part["low"] > 0).sum()), "worse": int((part["high"] < 0).sum())}
    said = [f"{count} {word}" for word, count in counts.items() if count]
    if not said:
        return "none is told apart"
    number, _, rest = " and ".join(said).partition(" ")
    return f"{number} {'scores' if number == '1' else 'score'} {rest}"


def _own(found: pd.DataFrame, method: str) -> str:
    """What the rule of the method's own authors adds to the headline one, by every measure."""
    own = found[found["label"] == OWN.get(method)]
    if own.empty:
        return ""
    said = ", ".join(f"{row['measure']} {_said(row)}" for row in own.to_dict("records"))
    return f"*{OWN[method]}* minus `{HEADLINE}`: {said}."


def _from_dense(rows: pd.DataFrame, method: str) -> str:
    """Accuracy minus dense under three rules."""
    found = effects(rows, method, "dense")
    found = found[found["measure"] == "accuracy"].drop_duplicates("rule").set_index("rule")
    named = [rule for rule in ("all", HEADLINE, OWN.get(method)) if rule in found.index]
    said = [f"{_said(found.loc[rule])} under *{rule}*" for rule in named]
    return f"The same model minus dense, by accuracy: {gains.listed(said)}." if said else ""


def _said(row: pd.Series | dict) -> str:
    """A difference in a sentence: with its unit and interval, and whether it is one."""
    measure = MEASURES[row["measure"]]
    value, space, bounds = gains.interval(row, measure.decimals).partition(" ")
    return f"{value} {measure.unit}{space}{bounds}{'' if gains.is_told(row) else ' (not told from zero)'}"


def dense_start_reading(rows: pd.DataFrame, model: str) -> str:
    """Whether held-out text gains from a dense first position, the one thing in which `decode` differs there."""
    found = [effects(rows, method).assign(method=_named(method)) for method in methods(rows)]
    found = pd.concat(found) if found else rows.head(0).assign(label="", measure="")
    found = found[(found["label"] == "decode") & (found["measure"] == "held-out loss")]
    if found.empty:
        return f"This run did not measure `decode` on `{model}`."
    words = found.apply(lambda row: "worse" if row["high"] < 0 else "better" if row["low"] > 0 else "no other", axis=1)
    lines = zip(words, found.to_dict("records"), strict=True)
    said = gains.listed([f"{word} for {row['method']} ({_said(row)})" for word, row in lines])
    text = (
        f"In held-out text of `{model}`, `decode` differs from `{HEADLINE}` in that the first position of a window is "
        f"dense. That is {said}."
    )
    if not (words == "worse").any():
        return text
    return (
        f"{text} So fewer sparse positions do not always make a better score. Thresholds are read with the first "
        "position sparse like every other; whether that is the reason was not tested."
    )


# What a choice adds


def choices(rows: pd.DataFrame) -> pd.DataFrame:
    """What each choice adds to R-Sparse as this book runs it: columns as `gains.gains`, and `label`."""
    part = rows[rows["choice"].notna()] if "choice" in rows else rows.head(0)
    return gains.gains(part.assign(label=part.get("choice", pd.Series(dtype=object))))


def choices_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per choice: planned and realised sparsity, seeds, and `choices` as text; first, what they are set
    against."""
    found = choices(rows)
    if found.empty:
        return pd.DataFrame()
    text = _comparable(rows)
    parts = {BASE: _headline(text)} | dict(list(text.groupby("choice", sort=False)))
    lines = [{"choice": name, **_bytes(_measured(text, part, "average"))} for name, part in parts.items() if len(part)]
    return pd.DataFrame(lines).merge(_lines(found).rename(columns={"label": "choice"}), "left", on="choice").fillna("")


def _headline(text: pd.DataFrame) -> pd.DataFrame:
    """The rows of differences whose own setting is R-Sparse as this book runs it."""
    return text[(text["rule"] == HEADLINE) & (text["against"] == "dense") & (text["method"] == "r-sparse")]


def bytes_reading(rows: pd.DataFrame) -> str:
    """Which choices are not compared at equal bytes: further than `APART` from what R-Sparse realises here."""
    table = choices_table(rows)
    if table.empty or table["choice"].iloc[0] != BASE:
        return "Realised sparsities cannot be compared: R-Sparse as this book runs it was not measured."
    base = table["realised (%)"].iloc[0]
    apart = table[(table["realised (%)"] - base).abs() > APART]
    if apart.empty:
        return f"All choices realise a sparsity within {APART:g} point of the {base:.1f}% that they are set against."
    said = [f"*{name}* ({value:.1f}%)" for name, value in zip(apart["choice"], apart["realised (%)"], strict=True)]
    return (
        f"Not at equal bytes: {gains.listed(said)} realise a sparsity more than {APART:g} point away from the "
        f"{base:.1f}% that they are set against, so that their differences are not those of the choice alone."
    )


def choices_reading(rows: pd.DataFrame, model: str) -> str:
    """How many choices change a score, by every measure, and by how much each of these does."""
    found = choices(rows)
    if found.empty:
        return "This run changed no choice (`choices` is false)."
    said = gains.by_measure({measure: _changing(part) for measure, part in found.groupby("measure", sort=False)})
    return (
        f"Of {found['label'].nunique()} choices made as others make them, these are told apart from R-Sparse as this "
        f"book runs it, on `{model}`: {'; '.join(said)}."
    )


def _changing(part: pd.DataFrame) -> str:
    told = [f"*{row['label']}* ({_said(row)})" for row in part.to_dict("records") if gains.is_told(row)]
    return gains.listed(told) if told else "none"

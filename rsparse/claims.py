"""Claims about the papers' exhibits, and what the result tables say of them.

A claim (data/paper/claims.yaml) has: id; exhibit; by (a paper key, or "this book"); where; text, in our own
words; note, thresholds that are ours; shown, what the numbers beside it are; models it speaks of; predicate
and, for display, ours and paper (expressions of rsparse.predicates), unit; weights "any" where random weights
measure it as well (speed); analogues "none" where another model says nothing about it; dense_check, the dense row
that must match the paper's first; headline, shown on the landing page. kind "control" is a check of ours, not a
paper's claim. Which devices were timed is said by the rows; a claim names devices only where it speaks of no other
(an hour of search on an A6000).

Verdicts. On a model that the claim speaks of: reproduced, not reproduced. On another one: analogue holds,
analogue does not hold. Controls: control passed, control failed. Not measured: the tables lack what the
predicate asks for. Undecided: the interval straddles the threshold, there is none, or our dense row is not
the paper's. An interval that includes the threshold supports neither answer; forcing one would call noise
a result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import yaml

from rsparse import estimate, paper, predicates
from rsparse.exhibits import search_cost_reading
from rsparse.paths import DATA
from rsparse.predicates import Context, Estimate, NotMeasured, Outcome

CLAIMS = DATA / "paper" / "claims.yaml"
SCHEMA = DATA / "paper" / "claims.schema.json"

NOT_MEASURED, UNDECIDED = "not measured", "undecided"
VERDICTS = ("not reproduced", "analogue does not hold", "control failed", UNDECIDED,
            "reproduced", "analogue holds", "control passed", NOT_MEASURED)
"""Mismatches first, as the scorecard sorts them."""

_WORDS = {
    "same": {predicates.HOLDS: "reproduced", predicates.FAILS: "not reproduced"},
    "analogue": {predicates.HOLDS: "analogue holds", predicates.FAILS: "analogue does not hold"},
    "control": {predicates.HOLDS: "control passed", predicates.FAILS: "control failed"},
}
_PRINTED = {"%": 0.01, "points": 0.01}
_UNITS = {  # unit -> (factor, format)
    "points": (100, "{:.2f} points"), "share": (100, "{:.0f}%"), "fine share": (100, "{:.1f}%"),
    "ratio": (1, "{:.3f}×"), "hours": (1, "{:.2g} h"), "nats": (1, "{:+.4f} nats"),
    "perplexity": (1, "{:.2f}"), "number": (1, "{:.3g}"),
}


@dataclass(frozen=True)
class Claim:
    """One entry of claims.yaml; the fields are those of the module's docstring."""

    id: str
    exhibit: str
    by: str
    where: str
    text: str
    models: list[str]
    predicate: dict[str, Any]
    kind: str = "claim"
    note: str = ""
    headline: bool = False
    weights: str = "trained"
    analogues: str = "any"
    contradicts: list[str] = field(default_factory=list)
    dense_check: str = ""
    unit: str = "number"
    shown: str = ""
    paper: Any = None
    ours: Any = None


@dataclass(frozen=True)
class Claims:
    """The whole file: claims in scorecard order, and what they refer to."""

    claims: tuple[Claim, ...]
    exhibits: Mapping[str, Mapping[str, str]]
    presets: Mapping[str, Mapping[str, str]]
    prefer: Mapping[str, Any]
    dense_checks: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What one preset says of one claim.

    `ours` and `paper` (model -> value) are fractions or plain numbers; `difference` is ours - paper on the
    same model, NaN elsewhere; `devices`: those that the rows behind `ours` were timed on, if they are timings;
    `shown_on`: those of the row that `ours` is, where it is the smallest or largest of them.
    """

    claim: Claim
    preset: str
    verdict: str
    reason: str = ""
    ours: Estimate | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    difference: float = math.nan
    devices: tuple[str, ...] = ()
    shown_on: tuple[str, ...] = ()


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, and eight times as fast where libyaml is


def load(path: Path = CLAIMS) -> Claims:
    """Read and check the claims; ValueError names the claim, the field and what is wrong with it."""
    document = yaml.load(Path(path).read_text(encoding="utf-8"), _LOADER)
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not isinstance(document.get("claims"), list):
        raise ValueError(f"{Path(path).name} must be a mapping with a list of claims.")
    _check_schema({**document, "claims": []}, schema, Path(path).name)
    part = {"$ref": "#/$defs/claim", "$defs": schema["$defs"]}
    for place, entry in enumerate(document["claims"]):
        name = entry.get("id") if isinstance(entry, dict) else None
        _check_schema(entry, part, f"claim {name or place + 1!r}")
    claims = Claims(tuple(Claim(**entry) for entry in document["claims"]), document["exhibits"],
                    document["presets"], document.get("prefer", {}), document.get("dense_checks", {}))
    _check_references(claims)
    return claims


def _check_schema(value: Any, schema: Any, name: str) -> None:
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
    if error is not None:
        raise ValueError(f"{name}, {'/'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}")


def _check_references(claims: Claims) -> None:
    ids = [claim.id for claim in claims.claims]
    for claim in claims.claims:
        name = f"claim {claim.id!r}"
        if ids.count(claim.id) > 1:
            raise ValueError(f"{name}: the id is used {ids.count(claim.id)} times.")
        if claim.exhibit not in claims.exhibits:
            known = ", ".join(claims.exhibits)
            raise ValueError(f"{name}: unknown exhibit {claim.exhibit!r}; known: {known}.")
        for other in claim.contradicts:
            if other not in ids:
                raise ValueError(f"{name}: contradicts unknown claim {other!r}.")
        if claim.dense_check and claim.dense_check not in claims.dense_checks:
            raise ValueError(f"{name}: unknown dense_check {claim.dense_check!r}.")
        if claim.paper is not None and not _paper_values(claim):
            raise ValueError(f"{name}: `paper` selects no single cell of reported.csv for any of its models.")


def reported_value(selector: Mapping[str, Any], model: str) -> float:
    """The one cell of reported.csv that `selector` names for `model`; percent and points as fractions.

    Cells flagged as suspect are never used; `variant`, `against` and `rho` must be given where they are set.
    Raises NotMeasured unless exactly one cell is left.
    """
    return _cell(json.dumps({"model": model, "variant": "", "against": "", "rho": None, **selector}))


@cache
def _cell(selector: str) -> float:
    wanted, frame = json.loads(selector), paper.reported()
    for column, value in wanted.items():
        frame = frame[predicates.equals(frame, column, value)]
    frame = frame[~frame["flag"].str.contains(paper.SUSPECT)]
    if len(frame) != 1:
        raise NotMeasured(f"{len(frame)} reported cells for {wanted['model']}")
    cell = frame.iloc[0]
    return float(cell["value"]) * _PRINTED.get(cell["unit"], 1.0)


def _paper_values(claim: Claim) -> dict[str, float]:
    values = {}
    for model in claim.models if claim.paper is not None else ():
        context = Context(claim.exhibit, {}, lambda selector, name=model: reported_value(selector, name))
        try:
            values[model] = predicates.estimate(claim.paper, context).value
        except NotMeasured:
            continue
    return values


def tables(results_root: Path, runs: Mapping[str, Path] | None = None) -> dict[str, dict[str, pd.DataFrame]]:
    """preset -> exhibit -> table, from <results_root>/<preset>/<exhibit>.csv, in `tab_order`.

    `runs` maps a preset to a further folder with <exhibit>.csv or <exhibit>/<exhibit>.csv; what is there
    replaces the published table of the same exhibit. What `python -m rsparse search-cost` measured belongs to no run:
    a preset with `search_costs` has it as its table of the exhibit named there, if it published none.
    """
    found: dict[str, dict[str, pd.DataFrame]] = {}
    folders = [(path.name, path) for path in sorted(Path(results_root).glob("*")) if path.is_dir()]
    for preset, folder in [*folders, *((runs or {}).items())]:
        for path in sorted([*Path(folder).glob("*.csv"), *Path(folder).glob("*/*.csv")]):
            if path.parent == Path(folder) or path.parent.name == path.stem:
                found.setdefault(preset, {})[path.stem] = pd.read_csv(path, low_memory=False)
    costs = estimate.search_costs_in(results_root)
    for preset, about in _claims().presets.items():
        if costs and "search_costs" in about:
            found.setdefault(preset, {}).setdefault(about["search_costs"], search_cost_reading.rows(costs))
    return {preset: found[preset] for preset in tab_order(found)}


def tab_order(presets: Iterable[str]) -> list[str]:
    """The presets as the book's tabs have them: in the order of claims.yaml, then others by name."""
    known = list(_claims().presets)
    return sorted(presets, key=lambda preset: (known.index(preset) if preset in known else len(known), preset))


def evaluate(
    results_root: Path, runs: Mapping[str, Path] | None = None, claims: Claims | None = None
) -> list[Verdict]:
    """A verdict for every claim and every preset that has results, in the order of the claims."""
    return judged(results_root, runs, claims).verdicts


@dataclass(frozen=True)
class Judged:
    """The claims, the tables that were read, as `tables` has them, and the verdicts, as `evaluate` has them."""

    claims: Claims
    tables: Mapping[str, Mapping[str, pd.DataFrame]]
    verdicts: list[Verdict]


def judged(
    results_root: Path, runs: Mapping[str, Path] | None = None, claims: Claims | None = None
) -> Judged:
    """Read and judged once, for all that is written about it."""
    known, measured = claims or _claims(), tables(results_root, runs)
    verdicts = [judge(claim, name, found, known) for claim in known.claims for name, found in measured.items()]
    return Judged(known, measured, verdicts)


@cache
def _claims() -> Claims:
    return load()


def judge(claim: Claim, preset: str, found: Mapping[str, pd.DataFrame], known: Claims) -> Verdict:
    """The verdict of one claim on the tables (exhibit -> table) of one preset."""
    about = known.presets.get(preset, {"model": preset, "weights": "trained"})
    relation = "same" if about["model"] in claim.models else "analogue"
    paper_values = _paper_values(claim)
    if relation == "same":
        paper_values = {name: value for name, value in paper_values.items() if name == about["model"]}
    if claim.kind == "claim" and relation == "analogue" and claim.analogues == "none":
        return Verdict(claim, preset, NOT_MEASURED, "another model says nothing about it", paper=paper_values)
    if claim.weights != "any":
        trained = about["weights"] == "trained"
        found = {key: table for key, table in found.items() if trained and not _random(table)}
    model = about["model"]
    context = Context(claim.exhibit, found, lambda selector: reported_value(selector, model), known.prefer)
    outcome = predicates.decide(claim.predicate, context)
    if outcome.state in (predicates.HOLDS, predicates.FAILS) and claim.dense_check and relation == "same":
        outcome = _after_dense(outcome, known.dense_checks[claim.dense_check], context)
    ours = _ours(claim, context)
    gap = ours.value - paper_values[model] if ours and model in paper_values else math.nan
    words = _WORDS["control" if claim.kind == "control" else relation]
    word = words.get(outcome.state, NOT_MEASURED if outcome.state == predicates.MISSING else UNDECIDED)
    return Verdict(claim, preset, word, outcome.reason, ours, paper_values, gap, **_timed(claim, context))


def _random(table: pd.DataFrame) -> bool:
    return "model" in table and table["model"].astype(str).str.startswith("random").any()


def _after_dense(outcome: Outcome, check: Mapping[str, Any], context: Context) -> Outcome:
    same = {"left": check["ours"], "is": "matches", "right": check["paper"], "stderrs": 2}
    dense = predicates.decide(same, context)
    if dense.state == predicates.HOLDS:
        return outcome
    reason = {predicates.FAILS: "our dense row is over two standard errors from the paper's"}
    unknown = f"the dense row cannot be checked: {dense.reason}"
    return Outcome(predicates.UNDECIDED, reason.get(dense.state, unknown))


def _ours(claim: Claim, context: Context) -> Estimate | None:
    if claim.ours is None:
        return None
    try:
        return predicates.estimate(claim.ours, context)
    except (NotMeasured, predicates.Ambiguous):
        return None


def _timed(claim: Claim, context: Context) -> dict[str, tuple[str, ...]]:
    """`devices` and `shown_on` of a verdict."""
    every: set[str] = set()
    shown: set[str] = set()
    for node in predicates.selections(claim.ours or claim.predicate):
        try:
            rows = predicates.select(node, context)
        except (NotMeasured, predicates.Ambiguous):
            continue
        if "device" in rows:
            every |= set(rows["device"].dropna())
            shown |= set(_shown(rows, node.get("reduce", "mean"))["device"].dropna())
    return {"devices": tuple(sorted(every)), "shown_on": tuple(sorted(shown))}


def _shown(rows: pd.DataFrame, how: str) -> pd.DataFrame:
    """Of the rows behind a smallest or largest number, the one that it is; else all."""
    return rows[rows["value"] == rows["value"].agg(how)] if how in ("min", "max") else rows


def scorecard_markdown(read: Judged) -> str:
    """MyST of the scorecard: per exhibit a heading and one tab per preset that measured it, mismatches first.

    An exhibit that no preset measured still lists its claims.
    """
    known, measured, verdicts = read.claims, read.tables, read.verdicts
    parts = []
    for exhibit, about in known.exhibits.items():
        claims = [claim for claim in known.claims if claim.exhibit == exhibit]
        presets = [preset for preset, found in measured.items() if exhibit in found]
        parts += [f"## {about['title']}", ""]
        if presets:
            parts += ["::::{tab-set}", ":sync-group: preset", ""]
            for preset in presets:
                rows = [v for v in verdicts if v.preset == preset and v.claim.exhibit == exhibit]
                parts += [f":::{{tab-item}} {preset}", f":sync: {preset}", "", *_table(rows), ":::", ""]
            parts += ["::::", ""]
        else:
            parts += _table([Verdict(c, "", NOT_MEASURED, paper=_paper_values(c)) for c in claims])
        parts += _notes(claims)
    return "\n".join(parts).rstrip() + "\n"


def _table(rows: list[Verdict]) -> list[str]:
    lines = ["| Claim | Paper | Ours | Verdict |", "|:--|:--|:--|:--|"]
    for row in sorted(rows, key=lambda row: VERDICTS.index(row.verdict)):
        reason = f" ({row.reason})" if row.reason and row.verdict != NOT_MEASURED else ""
        cells = [f"{row.claim.text} *{_who(row)}*", paper_text(row), ours_text(row),
                 f"**{row.verdict}**{reason}"]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _who(row: Verdict) -> str:
    claim = row.claim
    who = claim.where if claim.by in ("r-sparse", "this book") else f"{claim.by}, {claim.where}"
    shown = f"shown: {claim.shown}" if claim.shown else ""
    return "; ".join(filter(None, (who, shown, _timed_on(row))))


def _timed_on(row: Verdict) -> str:
    """Where a smallest or largest number is shown, whose it is, too: the others' devices gave other numbers."""
    if not row.devices:
        return ""
    own = f", the number shown on {' and '.join(row.shown_on)}" if row.shown_on != row.devices else ""
    return f"timed on {' and '.join(row.devices)}{own}"


def _notes(claims: list[Claim]) -> list[str]:
    notes = [" ".join(f"- {claim.text} {claim.note}".split()) for claim in claims if claim.note]
    return [":::{dropdown} Notes", "", *notes, ":::", ""] if notes else []


def paper_text(row: Verdict) -> str:
    """The paper's value or values, with the model where there are several; an en dash where it gives none."""
    texts = [f"{_number(value, row.claim.unit)} ({model})" for model, value in row.paper.items()]
    return "; ".join(texts) or "–"


def ours_text(row: Verdict) -> str:
    """Our value, its 95% interval and, on the same model, the difference from the paper's value."""
    if row.ours is None:
        return "–"
    low, high = row.ours.bounds()
    text = _number(row.ours.value, row.claim.unit)
    if math.isfinite(low) and math.isfinite(high) and low < high:
        text += f" [{_bare(low, row.claim.unit)}, {_bare(high, row.claim.unit)}]"
    if math.isfinite(row.difference):
        text += f"; difference {_number(row.difference, row.claim.unit)}"
    return text


def _number(value: float, unit: str) -> str:
    factor, form = _UNITS[unit]
    return form.format(value * factor).replace("-", "−")


def _bare(value: float, unit: str) -> str:
    return _number(value, unit).split(" ")[0].rstrip("×%")


def verdicts_markdown(read: Judged) -> str:
    """MyST for the landing page: verdicts counted per preset, then the headline claims that were measured."""
    verdicts = read.verdicts
    lines = []
    for preset in dict.fromkeys(row.preset for row in verdicts):
        words = [row.verdict for row in verdicts if row.preset == preset]
        counts = ", ".join(f"{words.count(word)} {word}" for word in VERDICTS if word in words)
        lines.append(f"- **{preset}**: {counts}.")
    if lines:
        lines = ["Verdicts by preset:", "", *lines]
    heads = [row for row in verdicts if row.claim.headline and row.verdict != NOT_MEASURED]
    if heads:
        lines += ["", "The central claims so far:", ""]
    heads.sort(key=lambda row: VERDICTS.index(row.verdict))
    for claim in dict.fromkeys(row.claim.id for row in heads):
        rows = [row for row in heads if row.claim.id == claim]
        reported = max(rows, key=lambda row: len(row.paper))
        shown = f" *(Shown: {rows[0].claim.shown}.)*" if rows[0].claim.shown else ""
        lines.append(f"- {' '.join(rows[0].claim.text.split())}{shown}")
        lines += [f"  - **{row.verdict}** on {row.preset}{_measured(row)}" for row in rows]
        lines += [f"  - reported: {paper_text(reported)}"] if reported.paper else []
    return "\n".join(lines or ["Nothing has been measured yet."]) + "\n"


def _measured(row: Verdict) -> str:
    timed = f", {_timed_on(row)}" if row.devices else ""
    return f": {ours_text(row)}{timed}" if row.ours else ""

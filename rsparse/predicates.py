"""Predicates over result tables: small structured data in, one of four states out.

An *expression* is a number of the tables with its uncertainty:

    0.5                                             a number
    {rows: {metric: acc, task: average, ...}}       rows of the exhibit's table; a list means all its values
        over: [task]                                columns that may differ between the rows, then reduced by
        reduce: mean | median | min | max           (mean by default)
        query: "rho <= 0.75"                        a pandas query on the tidy columns
    {reported: {paper: r-sparse, ...}}              one cell of data/paper/reported.csv, percent as a fraction
    {minus: [x, y]}  {ratio: [x, y]}
    {log: x}                                        the natural logarithm
    {argmin: {rows: ...}, of: rho}                  the rho of the smallest value, for display: it has no interval

A *predicate* is true, false, undecided, or not measured:

    {left: x, is: ">", right: y, margin: 0}         also >=, <, <=: x - y is above the margin, or below its
                                                    negative; what may be missed stands in y, not in a margin
    {left: x, is: within, right: y, tolerance: t}   |x - y| at most t
    {left: x, is: matches, right: y, stderrs: 2}    |x - y| at most that many of our standard errors
    {all: [...]}  {any: [...]}  {first: [...]}      first: the first that is measured
    {share: {by: [layer, linear], at_least: 0.9, of: predicate}}
    needs: {of: predicate, or: why}                 beside any of these: undecided, for the reason `or`, unless what
                                                    it needs holds or is not measured

Why undecided: a comparison holds when its whole interval lies beyond the threshold, fails when the whole
interval lies on the other side, and says nothing when the interval straddles it. A measured value without an
interval is undecided too, except where `interval: exact` says that nothing was sampled. `interval: range` says that
low and high are the ends of a range, over repeats or over two ways of counting, and no 95% interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from scipy import stats

Node = Any  # an expression or a predicate, as it stands in YAML

HOLDS, FAILS, UNDECIDED, MISSING = "holds", "fails", "undecided", "missing"
MEASURED = frozenset(
    "preset model planned realised realised_here nominal influenced seed value stderr low high n confidence "
    "realised_spread realised_worst rank ranks kept seconds bytes wall_s memory chance items evaluations "
    "full_passes".split()
)


class NotMeasured(Exception):
    """The tables at hand do not hold what an expression asks for; the message says what is absent."""


class Ambiguous(Exception):
    """The tables hold several settings where an expression asks for one."""


@dataclass(frozen=True)
class Estimate:
    """A number; stderr, low, high are NaN and n is 0 where unknown."""

    value: float
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    exact: bool = False

    def bounds(self) -> tuple[float, float]:
        """The 95% interval: as given, else value +- t * stderr (normal where n is unknown), else NaN."""
        if self.exact:
            return self.value, self.value
        if math.isfinite(self.low) and math.isfinite(self.high):
            return self.low, self.high
        reach = self.stderr * (stats.t.ppf(0.975, self.n - 1) if self.n > 1 else stats.norm.ppf(0.975))
        return self.value - reach, self.value + reach

    def spread(self) -> float:
        """The standard error: as given, else from the interval; 0 for an exact number; NaN where unknown."""
        if self.exact:
            return 0.0
        if math.isfinite(self.stderr):
            return self.stderr
        return (self.high - self.low) / (2 * stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Outcome:
    """State of a predicate and, in words, why it is missing or undecided."""

    state: str
    reason: str = ""


@dataclass(frozen=True)
class Context:
    """Where expressions look.

    `tables`: exhibit key -> result table of one preset. `cell`: resolves a `reported` selector to a number or
    raises NotMeasured. `prefer`: column -> metric (or "default") -> values in order of preference, applied
    only where the selected rows still hold several settings of that column.
    """

    exhibit: str
    tables: Mapping[str, pd.DataFrame]
    cell: Callable[[Mapping[str, Any]], float]
    prefer: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)


def decide(node: Node, context: Context) -> Outcome:
    """State of a predicate; absent tables, columns or rows give MISSING, never an exception."""
    try:
        return _decide(node, context)
    except NotMeasured as error:
        return Outcome(MISSING, str(error))
    except Ambiguous as error:
        return Outcome(UNDECIDED, str(error))


def estimate(node: Node, context: Context) -> Estimate:
    """Value of an expression. Raises NotMeasured or Ambiguous."""
    if isinstance(node, int | float):
        return Estimate(float(node), exact=True)
    if "rows" in node:
        return _reduce(select(node, context), node)
    if "reported" in node:
        return Estimate(context.cell(node["reported"]), exact=True)
    if "minus" in node:
        return _minus(*(estimate(part, context) for part in node["minus"]))
    if "ratio" in node:
        return _ratio(*(estimate(part, context) for part in node["ratio"]))
    if "log" in node:
        return _log(estimate(node["log"], context))
    frame = select({"over": [node["of"]], **node["argmin"]}, context)
    curve = frame.groupby(node["of"])["value"].mean()
    if len(curve) < 2:
        raise NotMeasured(f"only {len(curve)} value of {node['of']} measured")
    return Estimate(float(curve.idxmin()))


def select(node: Node, context: Context) -> pd.DataFrame:
    """Rows that an expression names, with preferences applied. Raises NotMeasured or Ambiguous."""
    exhibit = node.get("exhibit", context.exhibit)
    frame = context.tables.get(exhibit)
    if frame is None or frame.empty:
        raise NotMeasured(f"no table {exhibit}")
    wanted = node["rows"]
    for column, value in wanted.items():
        frame = frame[equals(frame, column, value)]
    if "query" in node and not frame.empty:
        frame = _query(frame, node["query"])
    frame = frame[_column(frame, "value").notna()]
    if frame.empty:
        raise NotMeasured("no row with " + ", ".join(f"{k} {v}" for k, v in wanted.items()))
    free = {*node.get("over", ()), *(k for k, v in node["rows"].items() if isinstance(v, list))}
    frame = _preferred(frame, context.prefer, str(wanted.get("metric", "")), free)
    _complete(frame, wanted)
    frame = _over_seeds(frame)
    mixed = [c for c in frame.columns if c not in MEASURED | free and _varies(frame[c])]
    if mixed:
        raise Ambiguous(f"rows differ in {', '.join(mixed)}")
    return frame


def selections(node: Node) -> Iterator[Node]:
    """The selections of rows that an expression or a predicate is made of; those in a share over all its parts."""
    if isinstance(node, Mapping) and "rows" in node:
        yield node
    elif isinstance(node, Mapping) and "share" in node:
        by = node["share"]["by"]
        yield from ({**part, "over": [*part.get("over", ()), *by]} for part in selections(node["share"]["of"]))
    elif isinstance(node, Mapping | list):
        for part in node.values() if isinstance(node, Mapping) else node:
            yield from selections(part)


def equals(frame: pd.DataFrame, column: str, value: Any) -> pd.Series:
    """Mask of the rows whose `column` is `value`: a list means any of its items, None an empty cell.

    Numbers agree to 1e-9, text without regard to case. Raises NotMeasured where there is no such column.
    """
    if column not in frame:
        if value is None:
            return pd.Series(True, frame.index)
        raise NotMeasured(f"no column {column}")
    cells = frame[column]
    if isinstance(value, list):
        masks = [equals(frame, column, item) for item in value]
        return pd.concat(masks, axis=1).any(axis=1)
    if value is None:
        return text(cells) == ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (pd.to_numeric(cells, errors="coerce") - value).abs() < 1e-9
    return text(cells).str.lower() == str(value).lower()


def text(cells: pd.Series) -> pd.Series:
    """Cells as text, "" where empty: unlike NaN, "" counts as a value of its own."""
    return pd.Series(_texts(cells), cells.index, dtype=str)


def _texts(cells: pd.Series) -> list[str]:
    """Without pandas: judging all claims asks this tens of thousands of times, of a few cells each."""
    return ["" if empty else str(x) for x, empty in zip(cells, cells.isna(), strict=True)]


def _varies(cells: pd.Series) -> bool:
    return len(set(_texts(cells))) > 1


def _query(frame: pd.DataFrame, text: str) -> pd.DataFrame:
    try:
        return frame.query(text, engine="python")
    except (pd.errors.UndefinedVariableError, TypeError) as error:
        raise NotMeasured(f"query {text!r}: {error}") from error


def _preferred(frame: pd.DataFrame, prefer: Mapping[str, Mapping[str, list[Any]]], metric: str,
               free: set[str]) -> pd.DataFrame:
    for column, orders in prefer.items():
        if column in free or column not in frame or not _varies(frame[column]):
            continue
        for value in orders.get(metric, orders.get("default", [])):
            mask = equals(frame, column, value)
            if mask.any():
                frame = frame[mask]
                break
    return frame


def _over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Without the rows of single seeds where the mean over them, whose seed is such as "0/1/2", has a row itself."""
    if "seed" not in frame:
        return frame
    several = text(frame["seed"]).str.contains("/")
    if not several.any():
        return frame
    cells = [text(frame[c]) for c in frame.columns if c not in MEASURED]
    whole = several.groupby(cells).transform("any") if cells else pd.Series(True, frame.index)
    return frame[several | ~whole]


def _complete(frame: pd.DataFrame, wanted: Mapping[str, Any]) -> None:
    for column, value in wanted.items():
        absent = [v for v in value if not equals(frame, column, v).any()] if isinstance(value, list) else []
        if absent:
            raise NotMeasured(f"no row with {column} {', '.join(map(str, absent))}")


def _column(frame: pd.DataFrame, name: str) -> pd.Series:
    return pd.to_numeric(frame[name], errors="coerce") if name in frame else pd.Series(math.nan, frame.index)


def _reduce(frame: pd.DataFrame, node: Node) -> Estimate:
    how = node.get("reduce", "mean")
    values = _column(frame, "value")
    if how != "mean":
        return Estimate(float(getattr(values, how)()))
    # Seeds and budgets share their items: their errors are averaged. Other cells are independent: squares add.
    cells = [text(frame[c]) for c in frame.columns if c not in MEASURED and c != "sparsity"]
    parts = [_seeds(part) for _, part in frame.groupby(cells)] if cells else [_seeds(frame)]
    if len(parts) == 1:
        return parts[0]
    total = math.sqrt(math.fsum(part.spread() ** 2 for part in parts)) / len(parts)
    centre = math.fsum(part.value for part in parts) / len(parts)
    return Estimate(centre, total, n=sum(part.n for part in parts))


def _seeds(frame: pd.DataFrame) -> Estimate:
    means = {c: float(_column(frame, c).mean(skipna=False)) for c in ("value", "stderr", "low", "high")}
    n = _column(frame, "n").min()
    return Estimate(**means, n=int(n) if math.isfinite(n) else 0)


def _minus(a: Estimate, b: Estimate) -> Estimate:
    if a.exact and b.exact:
        return Estimate(a.value - b.value, exact=True)
    if a.exact or b.exact:
        low, high = a.bounds()[0] - b.bounds()[1], a.bounds()[1] - b.bounds()[0]
        return Estimate(a.value - b.value, a.spread() + b.spread(), low, high, max(a.n, b.n))
    return Estimate(a.value - b.value, math.hypot(a.spread(), b.spread()), n=min(a.n, b.n))


def _ratio(a: Estimate, b: Estimate) -> Estimate:
    if b.value == 0:
        raise NotMeasured("a ratio with a zero below the line")
    value = a.value / b.value
    if a.exact and b.exact:
        return Estimate(value, exact=True)
    return Estimate(value, math.hypot(a.spread(), value * b.spread()) / abs(b.value), n=min(a.n, b.n))


def _log(x: Estimate) -> Estimate:
    if not x.value > 0:
        raise NotMeasured(f"the logarithm of {x.value:g}")
    return replace(x, value=math.log(x.value), stderr=x.stderr / x.value, low=math.nan, high=math.nan)


def _decide(node: Node, context: Context) -> Outcome:
    outcome = _alone(node, context)
    if "needs" in node and outcome.state != MISSING:
        if decide(node["needs"]["of"], context).state not in (HOLDS, MISSING):
            return Outcome(UNDECIDED, node["needs"]["or"])
    return outcome


def _alone(node: Node, context: Context) -> Outcome:
    """What a predicate says by itself, whatever it needs."""
    if "left" in node:
        return _compare(node, context)
    if "share" in node:
        return _share(node["share"], context)
    for name, combine in (("all", _all), ("any", _any), ("first", _first)):
        if name in node:
            return combine(decide(part, context) for part in node[name])
    raise ValueError(f"a predicate needs left, all, any, first or share; got {sorted(node)}.")


def _compare(node: Node, context: Context) -> Outcome:
    left, right = estimate(node["left"], context), estimate(node["right"], context)
    gap = _minus(left, right)
    low, high = gap.bounds()
    if node.get("interval") == "exact":
        low = high = gap.value
    if node["is"] == "matches":
        reach = node.get("stderrs", 2) * left.spread()
        if not math.isfinite(reach):
            return Outcome(UNDECIDED, "no standard error beside the measured value")
        return Outcome(HOLDS if abs(gap.value) <= reach else FAILS)
    if not (math.isfinite(low) and math.isfinite(high)):
        return Outcome(UNDECIDED, "no interval beside the measured value")
    if low == high == node.get("margin", 0.0) and not (gap.exact or node.get("interval") == "exact"):
        return Outcome(UNDECIDED, "every item is tied")
    return _verdict(node, low, high)


def _verdict(node: Node, low: float, high: float) -> Outcome:
    if node["is"] == "within":
        t = node["tolerance"]
        inside, outside = -t <= low and high <= t, low > t or high < -t
    else:
        margin, strict = node.get("margin", 0.0), node["is"] in (">", "<")
        if node["is"] in ("<", "<="):
            low, high = -high, -low
        inside = low > margin or (not strict and low == margin)
        outside = high < margin or (low == high == margin and strict)
    if inside or outside:
        return Outcome(HOLDS if inside else FAILS)
    shown = "range" if node.get("interval") == "range" else "95% interval"
    return Outcome(UNDECIDED, f"the {shown} includes the threshold")


def _share(node: Node, context: Context) -> Outcome:
    frame = context.tables.get(context.exhibit)
    if frame is None or any(column not in frame for column in node["by"]):
        raise NotMeasured(f"no table with {', '.join(node['by'])}")
    parts = [part for _, part in frame.groupby(node["by"])]
    contexts = [replace(context, tables={**context.tables, context.exhibit: part}) for part in parts]
    found = [decide(node["of"], one) for one in contexts]
    states = [outcome.state for outcome in found if outcome.state != MISSING]
    if not states:
        raise NotMeasured(found[0].reason if found else "no row")
    holding, open_ = states.count(HOLDS), states.count(UNDECIDED)
    needed = node["at_least"] * len(states) - 1e-9
    reason = f"holds for {holding} of {len(states)}"
    if holding >= needed:
        return Outcome(HOLDS, reason)
    return Outcome(UNDECIDED if holding + open_ >= needed else FAILS, reason)


def _all(outcomes: Iterable[Outcome]) -> Outcome:
    return _strongest(list(outcomes), (FAILS, MISSING, UNDECIDED, HOLDS))


def _any(outcomes: Iterable[Outcome]) -> Outcome:
    return _strongest(list(outcomes), (HOLDS, MISSING, UNDECIDED, FAILS))


def _strongest(outcomes: list[Outcome], order: tuple[str, ...]) -> Outcome:
    return next(outcome for state in order for outcome in outcomes if outcome.state == state)


def _first(outcomes: Iterable[Outcome]) -> Outcome:
    found = list(outcomes)
    return next((outcome for outcome in found if outcome.state != MISSING), found[0])

"""What `python -m rsparse bench-decode` wrote, as flat rows and as rows of a result table, and back.

Needs no torch. A flat row holds the fields of one row of a document, nested ones by dotted names
("tokens_per_s.128", "step_parts_s.qkv", "bytes.total"), and what the whole document says of its run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rsparse.paths import ROOT

Document = dict[str, Any]
BASELINES = ("dense", "hf-eager", "hf-static-compiled")
"""Rows that ratios stand against: our own engine, and Hugging Face's two."""
RUN = ("dtype", "batch", "prompt", "new", "repeats", "rho", "score", "compiled", "bandwidth")
"""Fields of a document that every one of its rows takes over as they are."""
SETTING = ["device", "model", "dtype", "layers", "batch", "prompt", "new"]
"""Columns of a flat row within which two rows may be compared."""
PLACE = [*SETTING, "where", "weights", "name", "engine", "linears", "sparsity", "rho", "score"]
"""Columns of a result table that tell one timing from another; `generation` besides, in those of lengths."""
BY_LENGTH = ("tokens_per_s", "with_prefill")
UNKNOWN = "reference"
"""How `linears` of a row begins whose products read every weight: no speed of a sparse method."""


def flat(document: Document) -> list[dict[str, Any]]:
    """A flat row for each row of a document. model: the shape's name, or the checkpoint's; layers: 0 for all."""
    random = document["model"].startswith("random:")
    run = {name: document[name] for name in RUN} | {
        "device": document["device_name"], "where": document["device"], "date": document["date"],
        "model": document["model"].removeprefix("random:"), "weights": "random" if random else "checkpoint",
        "layers": document["layers"] or 0, "torch": document["versions"].get("torch", ""),
    }  # fmt: skip
    return [run | _fields(row) for row in document["rows"]]


def published(folder: str | Path) -> pd.DataFrame:
    """Flat rows of the JSON files below `folder` (relative to the checkout), files in order of their dates; the later
    one of two timings of the same counts. Empty, with its columns, where there is no file."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / folder).rglob("*.json"))]
    documents.sort(key=lambda x: x["date"])
    found = pd.DataFrame([row for document in documents for row in flat(document)])
    if found.empty:
        return pd.DataFrame(columns=[*PLACE, "date", "step_s"])
    return found.drop_duplicates([*SETTING, "name", "sparsity", "rho"], keep="last", ignore_index=True)


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    found = {"sparsity": row.get("asked") or 0.0}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": x for key, x in value.items()}
        elif not isinstance(value, list):  # arrivals: one number a token
            found[name] = value
    return found


def is_speed(row: dict[str, Any] | pd.Series) -> bool:
    """Whether a row's time is that of its method: not where every weight was read for want of a kernel."""
    return not str(row["linears"]).startswith(UNKNOWN)


def layers_s(row: dict[str, Any] | pd.Series, step: str = "step_s") -> float:
    """Seconds of a step without its last norm and lm_head, which no method makes sparse; NaN where not timed apart."""
    return row[step] - row.get("step_parts_s.head", math.nan)


# Rows of a result table


def table_rows(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """A tidy row per number of the flat `rows`, and those of `ratio_rows`."""
    return [tidy for row in rows for tidy in _numbers(row, seed)] + ratio_rows(rows, seed)


def eager_rows(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """A tidy row per length of the tokens per second of Hugging Face's eager code, the paper's dense baseline."""
    found = [tidy for row in rows if row["name"] == "hf-eager" for tidy in _numbers(row, seed)]
    return [x for x in found if x["metric"] == "tokens_per_s" and not math.isnan(x["value"])]


def ratio_rows(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """A tidy row per ratio of a method's speed to a baseline in the same setting."""
    return [tidy for row in rows if row["name"] not in BASELINES and is_speed(row)
            for tidy in _ratios(row, [x for x in rows if _same_setting(x, row)], seed)]  # fmt: skip


def _same_setting(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in SETTING)


def _base(row: dict[str, Any], seed: int) -> dict[str, Any]:
    method = "dense" if row["engine"] != "ours" else row["name"]
    own = {name: row[name] for name in PLACE if name not in ("model", "weights")}
    return own | {
        "model": f"random:{row['model']}" if row["weights"] == "random" else row["model"], "shape": row["model"],
        "weights": row["weights"], "method": method, "planned": row.get("planned"), "realised": row.get("realised"),
        "tokens": "decode", "threshold": "static" if row["sparsity"] else None, "seed": seed, "n": row["repeats"],
    }  # fmt: skip


def _numbers(row: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    taken, found = {*PLACE, "repeats", "compiled", "asked", "planned", "realised"}, []
    for name, value in row.items():
        if name in taken or isinstance(value, (str, bool)) or value is None:
            continue
        metric, _, length = name.partition(".")
        place = {"metric": metric, "generation": int(length)} if metric in BY_LENGTH else {"metric": name}
        found.append(_base(row, seed) | {"task": "decode", "value": float(value)} | place)
    return found


def _ratios(row: dict[str, Any], rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """speedup and speed_gain (speedup - 1) by length over every baseline; layers_over_dense, with the range over
    repeats for an interval where both were timed several times, and n the fewer of their repeats."""
    found = []
    for other in rows:
        if other["name"] not in BASELINES:
            continue
        base = _base(row, seed) | {"task": "generation", "against": "dense", "baseline": other["name"]}
        for name in row:
            metric, _, length = name.partition(".")
            if metric == "tokens_per_s" and not math.isnan(row[name] + other.get(name, math.nan)):
                ratio, at = row[name] / other[name], {"generation": int(length)}
                found += [base | at | {"metric": "speedup", "value": ratio},
                          base | at | {"metric": "speed_gain", "value": ratio - 1}]  # fmt: skip
        if other["name"] == "dense" and not math.isnan(layers_s(row) + layers_s(other)):
            found.append(base | {"metric": "layers_over_dense"} | _layers(row, other))
    return found


def _layers(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Without low and high where a single repeat would make them a range of no width."""
    n = min(row["repeats"], dense["repeats"])
    ends = dict(zip(("low", "high"), layers_range(row, dense), strict=True)) if n > 1 else {}
    return {"value": layers_s(dense) / layers_s(row), "n": n} | ends


def layers_range(row: dict[str, Any] | pd.Series, dense: dict[str, Any] | pd.Series) -> tuple[float, float]:
    """Lowest and highest ratio of the dense decoder layers' time to `row`'s that repeats give."""
    slow, fast = "slowest_step_s", "fastest_step_s"
    return layers_s(dense, fast) / layers_s(row, slow), layers_s(dense, slow) / layers_s(row, fast)


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """Flat rows again, of a result table; without ratios. Empty, with its columns, of an empty one."""
    own, found = rows[rows["task"] == "decode"], []
    if own.empty:
        return pd.DataFrame(columns=PLACE)
    for _, part in own.assign(model=own["shape"]).groupby(PLACE, sort=False, dropna=False):
        first = part.iloc[0]
        lengths = part["generation"] if "generation" in part else pd.Series(math.nan, part.index)
        names = [x if math.isnan(at) else f"{x}.{at:.0f}" for x, at in zip(part["metric"], lengths, strict=True)]
        found.append({name: first[name] for name in [*PLACE, "planned", "realised"]} | {"repeats": first["n"]}
                     | dict(zip(names, part["value"], strict=True)))  # fmt: skip
    return pd.DataFrame(found)

"""How fast a model decodes here: `bench_decode.measure`, one run per dtype, as rows of a result table.

Times are of one machine, which is why its name is part of every key: another one measures anew.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rsparse.bench_decode import measure as bench
from rsparse.bench_decode.measure import Plan
from rsparse.exhibits.decode_rows import eager_rows, flat, published, ratio_rows, table_rows
from rsparse.paths import ROOT
from rsparse.provenance import device_name
from rsparse.results import Table


def plans(decoded: str, dtypes: Sequence[str], layers: int, **options) -> list[Plan]:
    """A plan per dtype; none where `decoded`, a model's name, is "". layers: 0 for all. options: of `Plan`.

    Raises ValueError for what `Plan` refuses, before anything is measured.
    """
    options |= {name: tuple(options[name]) for name in ("methods", "baselines")}
    return [Plan(decoded, dtype, layers=layers or None, **options) for dtype in dtypes if decoded]


def measure(table: Table, plan: Plan) -> None:
    """The rows of one plan. What the table holds already is not repeated."""
    key = {"what": "decode", "machine": device_name(plan.device), **_plain(plan)}
    if table.find(key) is not None:
        return
    started = time.monotonic()
    found = flat(bench.measure(plan))
    costs = [{"what": "decode", "seconds": time.monotonic() - started, "tokens": 0}]
    table.add(key, table_rows(found, plan.seed), costs=costs)


def take(table: Table, folder: str | Path, seed: int = 0) -> None:
    """The ratios of what `python -m rsparse bench-decode` left below `folder` (relative to the checkout) as rows too,
    and the speeds of the paper's baseline: for a preset that stands for the machines on which these were timed, and
    whose claims are judged by them."""
    content = b"".join(path.read_bytes() for path in sorted((ROOT / folder).rglob("*.json")))
    key = {"what": "decode, published", "sha256": hashlib.sha256(content).hexdigest(), "seed": seed}
    if table.find(key) is None:
        rows = published(folder).to_dict("records")
        table.add(key, ratio_rows(rows, seed) + eager_rows(rows, seed))


def _plain(plan: Plan) -> dict:
    """Of a plan, what JSON gives back as it was."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(plan).items()}

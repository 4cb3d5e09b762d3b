"""Result tables: one tidy row per number, kept while a notebook runs and published with provenance."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from rsparse.files import atomic_path, write_json
from rsparse.paths import HERE, Checkout
from rsparse.provenance import Clock, code_hash, data_hash

COLUMNS = (
    "preset", "model", "method", "scope", "recipe", "sparsity", "planned", "realised", "rho", "score",
    "threshold", "calibration", "tokens", "influenced", "dtype", "bos", "seed", "task", "metric", "value",
    "stderr", "n",
)  # fmt: skip
"""First columns of every table; an exhibit may add its own behind them.

sparsity: model-level, as asked for; planned, realised: as rsparse.sparsify reports them (realised over every
position of held-out text). influenced: share of the scored logits that a sparse position influenced.
"""
NUMBERS = ("sparsity", "planned", "realised", "rho", "influenced", "value", "stderr")


class Table:
    """The rows of one exhibit. Every group of rows is on disk before the next is computed.

    folder: where the journal, the table and its provenance go; "" picks ``_runs/interactive`` in the
    checkout, or the cache folder where the checkout cannot be written. A journal of other code or data is not
    read. A key must hold everything that its group depends on besides code and data.
    """

    def __init__(self, exhibit: str, preset: str, folder: str | Path = "", device: str = "cpu"):
        self.exhibit, self.preset, self.clock = exhibit, preset, Clock(device)
        self.folder = Path(folder) if folder else interactive_folder(exhibit)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = self.folder / f"{exhibit}.jsonl"
        self._groups = self._read()
        self._used: dict[str, None] = {}

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The group kept under `key` ({"rows": [...], "items": {...}}), or None if it is still to compute.

        Groups that are neither found nor added do not appear in the table: they are of other parameters.
        """
        digest = _digest(key)
        if digest in self._groups:
            self._used[digest] = None
        return self._groups.get(digest)

    def add(
        self,
        key: dict[str, Any],
        rows: Iterable[dict[str, Any]],
        items: dict[str, list] | None = None,
        seconds: float = 0.0,
    ) -> dict:
        """Keep a group: its rows, values per item for paired comparisons, and how long these took to measure.

        The key's "what" names the kind of group. Items and seconds stay in the journal, outside the table.
        Returns it as `find` will, with None for NaN, which JSON does not have. ValueError for infinity.
        """
        group = _without_nan({"rows": list(rows), "items": items or {}})
        group |= {"what": key["what"], "seconds": round(seconds, 3)}
        digest = _digest(key)
        line = json.dumps({"key": digest, **group}, allow_nan=False)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._groups[digest] = group
        self._used[digest] = None
        return group

    @property
    def frame(self) -> pd.DataFrame:
        """All rows found or added in this run, in that order, with the columns of `COLUMNS` first."""
        rows = pd.DataFrame([row for digest in self._used for row in self._groups[digest]["rows"]])
        extra = [column for column in rows.columns if column not in COLUMNS]
        frame = rows.reindex(columns=[*COLUMNS, *extra]).assign(preset=self.preset)
        return frame.astype(dict.fromkeys(NUMBERS, float))  # a column of None alone has no type of its own

    def finish(self, seed: int, parameters: dict[str, Any]) -> pd.DataFrame:
        """Write the table as CSV and its provenance as JSON, atomically; returns the table."""
        frame = self.frame
        with atomic_path(self.folder / f"{self.exhibit}.csv") as path:
            frame.to_csv(path, index=False, float_format="%.10g")
        write_json(self.folder / f"{self.exhibit}.json", self.clock.provenance(seed, parameters))
        return frame

    def _read(self) -> dict[str, dict]:
        """Groups of an interrupted run; a last line that was cut short is dropped."""
        about = {"code": code_hash(), "data": data_hash()}
        groups: dict[str, dict] = {}
        lines = self._journal.read_text(encoding="utf-8").split("\n") if self._journal.exists() else []
        if lines and _parse(lines[0]) == {"about": about}:
            for entry in filter(None, map(_parse, lines[1:])):
                groups[entry.pop("key")] = entry
        with atomic_path(self._journal) as path, path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"about": about}) + "\n")
            file.writelines(json.dumps({"key": key, **group}) + "\n" for key, group in groups.items())
        return groups


def published(exhibit: str, checkout: Checkout = HERE) -> pd.DataFrame:
    """The published tables of an exhibit, all presets below one another; empty where there are none."""
    frames = [pd.read_csv(path) for path in sorted(checkout.results.glob(f"*/{exhibit}.csv"))]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def interactive_folder(exhibit: str) -> Path:
    """Where a notebook that is opened by hand keeps its rows."""
    folder = HERE.run_folder("interactive") / "results" / exhibit
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    root = os.environ.get("RSPARSE_CACHE") or Path.home() / ".cache" / "rsparse"
    return Path(root) / "interactive" / exhibit


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None

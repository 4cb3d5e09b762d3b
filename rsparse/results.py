"""Result tables: one tidy row per number, kept while a notebook runs and published with provenance."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rsparse.files import atomic_path, write_json
from rsparse.paths import HERE, Checkout, cache_folder, is_writable
from rsparse.provenance import Clock, data_hash, measuring_hash, versions

COLUMNS = (
    "preset", "model", "method", "scope", "recipe", "sparsity", "planned", "realised", "realised_here", "rho", "score",
    "threshold", "calibration", "tokens", "influenced", "dtype", "bos", "seed", "task", "metric", "value", "stderr",
    "n",
)  # fmt: skip
"""First columns of every table; an exhibit may add its own behind them.

sparsity: model-level, as asked for; planned, realised: as rsparse.sparsify reports them (realised over every
position of held-out text). realised_here: over the sparse positions that the measurement itself fed. influenced: share
of the scored logits that a sparse position influenced.
"""
NUMBERS = ("sparsity", "planned", "realised", "realised_here", "rho", "influenced", "value", "stderr")


class Table:
    """The rows of one exhibit. Every group of rows is on disk before the next is computed.

    folder: where the journal, the table and its provenance go; "" picks ``_runs/interactive`` in the
    checkout, or the cache folder where the checkout cannot be written. A key must hold everything that its
    group depends on besides code, data and package versions; a journal made with others is set aside.

    Exhibits of one run, whose folders lie side by side, share what they measure: a group that another exhibit's
    journal holds is taken over, with the name of that exhibit as "from".
    """

    def __init__(self, exhibit: str, preset: str, folder: str | Path = "", device: str = "cpu"):
        self.exhibit, self.preset, self.clock = exhibit, preset, Clock(device)
        self.folder = Path(folder) if folder else interactive_folder(exhibit)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = self.folder / f"{exhibit}.jsonl"
        self._about = made_with()
        self._groups = self._open()
        self._used: dict[tuple[str, str], dict[str, Any]] = {}

    def find(self, key: dict[str, Any], columns: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The group kept under `key` ({"rows": [...], "items": {...}}), or None if it is still to compute.

        columns: take the place of the rows' own in the table, where one measurement stands for several settings.
        Groups that are neither found nor added do not appear in the table: they are of other parameters.
        """
        digest = key_digest(key)
        if digest not in self._groups and (found := self._elsewhere(digest)):
            self._write(digest, found)
        if digest in self._groups:
            self._use(digest, columns)
        return self._groups.get(digest)

    def add(
        self,
        key: dict[str, Any],
        rows: Iterable[dict[str, Any]],
        items: dict[str, list] | None = None,
        costs: Sequence[dict[str, Any]] = (),
        columns: dict[str, Any] | None = None,
    ) -> dict:
        """Keep a group: its rows, values per item for paired comparisons, and what measuring it took.

        costs: {"what": kind of work, "seconds": ..., and what it scales with}, see rsparse.estimate. Items and
        costs stay in the journal, outside the table. columns: as for `find`. Returns the group as `find` will,
        with None for NaN, which JSON does not have. ValueError for infinity.
        """
        group = _without_nan({"rows": list(rows), "items": items or {}, "costs": list(costs)})
        digest = key_digest(key)
        self._write(digest, group)
        self._use(digest, columns)
        return group

    @property
    def frame(self) -> pd.DataFrame:
        """All rows found or added in this run, in that order, with the columns of `COLUMNS` first."""
        rows = [row | columns for (digest, _), columns in self._used.items() for row in self._groups[digest]["rows"]]
        frame = pd.DataFrame(rows)
        extra = [column for column in frame.columns if column not in COLUMNS]
        frame = frame.reindex(columns=[*COLUMNS, *extra]).assign(preset=self.preset)
        return frame.astype(dict.fromkeys(NUMBERS, float))  # a column of None alone has no type of its own

    def finish(self, seed: int, parameters: dict[str, Any]) -> pd.DataFrame:
        """Write the table as CSV and its provenance as JSON, atomically; returns the table."""
        frame = self.frame
        with atomic_path(self.folder / f"{self.exhibit}.csv") as path:
            frame.to_csv(path, index=False, float_format="%.10g")
        write_json(self.folder / f"{self.exhibit}.json", self.clock.provenance(seed, parameters))
        return frame

    def _use(self, digest: str, columns: dict[str, Any] | None) -> None:
        self._used.setdefault((digest, json.dumps(columns or {}, sort_keys=True)), columns or {})

    def _write(self, digest: str, group: dict[str, Any]) -> None:
        line = json.dumps({"key": digest, **group}, allow_nan=False)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._groups[digest] = group

    def _elsewhere(self, digest: str) -> dict[str, Any] | None:
        """The group from the journal of another exhibit of this run, made with the same code, data and packages."""
        for path in sorted(self.folder.parent.glob("*/*.jsonl")):
            if path.stem == path.parent.name != self.exhibit:
                group = read_journal(path, self._about).get(digest)
                if group is not None:
                    return {"from": path.stem} | group
        return None

    def _open(self) -> dict[str, dict]:
        """Groups of an interrupted run; its journal begins anew, without a last line that was cut short."""
        groups = read_journal(self._journal, self._about)
        if not groups and self._journal.exists() and self._journal.read_text(encoding="utf-8").count("\n") > 1:
            os.replace(self._journal, self._journal.with_suffix(".jsonl.old"))  # hours of work, but of other code
        with atomic_path(self._journal) as path, path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"about": self._about}) + "\n")
            file.writelines(json.dumps({"key": key, **group}) + "\n" for key, group in groups.items())
        return groups


def made_with() -> dict[str, Any]:
    """What a journal says it was made with: its groups are taken over where nothing of this has changed."""
    return {"code": measuring_hash(), "data": data_hash(), "versions": versions()}


def read_journal(path: Path, about: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Key -> group of a table's journal; {} where there is none, or where it is not `about` what is asked."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    header = _parse(lines[0])
    if not header or about not in (None, header.get("about")):
        return {}
    return {entry.pop("key"): entry for entry in filter(None, map(_parse, lines[1:]))}


def published(exhibit: str, checkout: Checkout = HERE) -> pd.DataFrame:
    """The published tables of an exhibit, all presets below one another; empty where there are none."""
    frames = [pd.read_csv(path) for path in sorted(checkout.results.glob(f"*/{exhibit}.csv"))]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def interactive_folder(exhibit: str) -> Path:
    """Where a notebook that is opened by hand keeps its rows."""
    folder = HERE.run_folder("interactive") / "results" / exhibit
    return folder if is_writable(folder) else cache_folder() / "interactive" / exhibit


def key_digest(key: dict[str, Any]) -> str:
    """Short name of what a key holds."""
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

"""What a long search has computed, on disk after every batch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Fitnesses that were computed, on disk after every batch, so that a search that was killed resumes.

    path: a file of JSON lines; its first line says of which search. A line is a whole batch: what was in flight when
    the process died is computed again, in the same batch, and the end is the same. ValueError for another search's.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self._known = Path(path), {}
        header = json.dumps({"about": about}, sort_keys=True)
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        if len(lines) > 1:
            if lines[0].decode() != header:
                raise ValueError(f"{self.path} is the journal of another search; expected one with the same arguments, "
                                 "model, precision, calibration and code (--fresh begins anew)")
            for line in lines[1:-1]:  # behind the last line break is what was cut off
                self._known |= {tuple(key): value for key, value in json.loads(line)}
            self._cut(len(lines[-1]))
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(header + "\n", encoding="utf-8")

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._known

    def __getitem__(self, key: tuple[str, ...]) -> float:
        return self._known[key]

    def __len__(self) -> int:
        return len(self._known)

    def update(self, batch: dict[tuple[str, ...], float]) -> None:
        """Keep a batch; it is on disk when this returns."""
        self._known |= batch
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([[list(key), value] for key, value in batch.items()]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _cut(self, torn: int) -> None:
        if torn:
            os.truncate(self.path, self.path.stat().st_size - torn)

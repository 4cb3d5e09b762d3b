"""Where things live in a checkout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


@dataclass(frozen=True)
class Checkout:
    """The folders of one checkout; tests and the book's staging area use others than `ROOT`."""

    root: Path

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def presets(self) -> Path:
        return self.notebooks / "presets"

    @property
    def results(self) -> Path:
        """Published tables, one folder per preset."""
        return self.root / "data" / "results"

    @property
    def book(self) -> Path:
        return self.root / "book"

    @property
    def exhibits(self) -> Path:
        """Pages of the exhibits and, one folder per preset, the executed notebooks they are made of."""
        return self.book / "exhibits"

    def run_folder(self, preset: str) -> Path:
        return self.root / "_runs" / preset


HERE = Checkout(ROOT)

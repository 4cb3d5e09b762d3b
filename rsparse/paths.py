"""Where things live in a checkout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kernels.folders import cache_folder, is_writable

__all__ = ["DATA", "HERE", "ROOT", "Checkout", "cache_folder", "is_writable", "stamp"]

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


def stamp(name: str) -> list[tuple[str, int, int]]:
    """What changes with the files of a folder that a parameter names (``FOLDER`` or ``NAME:FOLDER``): name, size
    and time of change of each; empty for anything else, such as a hub id."""
    for folder in (Path(name), ROOT / name, Path(name.partition(":")[2])):
        if name and str(folder) != "." and folder.is_dir():
            found = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
            return [(path.relative_to(folder).as_posix(), s.st_size, s.st_mtime_ns) for path, s in found]
    return []

"""Where things live in a checkout."""

from __future__ import annotations

import os
import tempfile
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


def cache_folder() -> Path:
    """Where low-rank factors, and rows that cannot go into the checkout, are kept: ``$RSPARSE_CACHE``, or
    ``~/.cache/rsparse``, or a temporary folder where the home folder cannot be written."""
    if named := os.environ.get("RSPARSE_CACHE"):
        return Path(named)
    folder = Path.home() / ".cache" / "rsparse"
    return folder if is_writable(folder) else Path(tempfile.gettempdir()) / f"rsparse-{os.getuid()}"


def is_writable(folder: Path) -> bool:
    """Whether files can be written into `folder`, which is made where it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def stamp(name: str) -> list[tuple[str, int, int]]:
    """What changes with the files of a folder that a parameter names (``FOLDER`` or ``NAME:FOLDER``): name, size
    and time of change of each; empty for anything else, such as a hub id."""
    for folder in (Path(name), ROOT / name, Path(name.partition(":")[2])):
        if name and str(folder) != "." and folder.is_dir():
            found = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
            return [(path.relative_to(folder).as_posix(), s.st_size, s.st_mtime_ns) for path, s in found]
    return []

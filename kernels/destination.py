"""Whether a file can be written, known before the hour that its content takes."""

from __future__ import annotations

import os
from pathlib import Path


def check_destination(path: Path) -> None:
    """ValueError unless a file can be made or replaced at `path`; makes nothing, no folder either."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is {'a folder' if os.path.isdir(path) else 'no file'}; expected a file to write")
    folder = next(x for x in path.absolute().parents if os.path.lexists(x))
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder; expected one, for {path}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written to; expected another folder, for {path}")

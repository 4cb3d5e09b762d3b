"""Whether a file can be written, known before the hour that its content takes."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def check_destination(path: Path) -> None:
    """ValueError unless a file can be made or replaced at `path`.

    It is tried, with a temporary file: permissions do not tell it to root, nor on every file system. That file lies in
    the innermost folder that is there. None is made for it, as one that is removed afterwards may be what another
    process has just found; of what is not there yet, the names are looked up, which tells those that are too long.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is {'a folder' if os.path.isdir(path) else 'no file'}; expected a file to write")
    folder = next(x for x in path.absolute().parents if os.path.lexists(x))
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder; expected one, for {path}")
    try:
        for name in path.absolute().relative_to(folder).parts:
            with suppress(FileNotFoundError):
                os.lstat(folder / name)
        tempfile.NamedTemporaryFile(dir=folder, prefix=".rsparse-").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; expected a place for a file") from None

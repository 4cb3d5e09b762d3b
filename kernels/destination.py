"""Whether a file can be written, known before the hour that its content takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path


def check_destination(path: Path) -> None:
    """ValueError unless a file can be made or replaced at `path`.

    It is tried, with a temporary file beside it: permissions do not tell it to root, nor on every file system. Nothing
    is left behind, no folder either.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is {'a folder' if os.path.isdir(path) else 'no file'}; expected a file to write")
    folder = next(x for x in path.absolute().parents if os.path.lexists(x))
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder; expected one, for {path}")
    try:
        with _made(path.absolute().parent) as folder:
            tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; expected a place for a file") from None


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """Inside, `folder` is there; what was made for it goes again."""
    missing = list(takewhile(lambda x: not os.path.lexists(x), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        for x in missing:
            with suppress(OSError):  # was not made, or is no longer empty
                x.rmdir()

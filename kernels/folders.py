"""Where things are kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where low-rank factors, chosen launches, and rows that cannot go into the checkout, are kept: ``$RSPARSE_CACHE``,
    or ``~/.cache/rsparse``, or a temporary folder where the home folder cannot be written."""
    if named := os.environ.get("RSPARSE_CACHE"):
        return Path(named)
    folder = Path.home() / ".cache" / "rsparse"
    return folder if is_writable(folder) else Path(tempfile.gettempdir()) / f"rsparse-{os.getuid()}"


def is_writable(folder: Path) -> bool:
    """Whether files can be written into `folder`, which is made where it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()  # tried: root passes every check of permissions
    except OSError:
        return False
    return True

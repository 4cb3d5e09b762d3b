"""Where things are kept between runs."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """Where low-rank factors, chosen launches, and rows that cannot go into the checkout, are written:
    ``$RSPARSE_CACHE``, or ``~/.cache/rsparse``, or a temporary folder of this user where the home folder cannot be
    written. The same for the whole process, while the environment is.

    Where neither can be, the one at home, whose own error comes of writing; PermissionError where there is no home.
    """
    if named := os.environ.get("RSPARSE_CACHE"):
        return Path(named)
    home, temporary = _at_home(), _temporary()
    if home and _was_writable(home):
        return home
    if temporary and _made_own(temporary):
        return temporary
    if home:
        return home
    raise PermissionError(errno.EACCES, "no folder of this user; expected one in RSPARSE_CACHE", str(temporary or ""))


def cache_folders() -> list[Path]:
    """Where to look for what is kept, the preferred folder first: one that cannot be written can hold some. Makes
    none of them."""
    if named := os.environ.get("RSPARSE_CACHE"):
        return [Path(named)]
    home, temporary = _at_home(), _temporary()
    return [home] * (home is not None) + [temporary] * (temporary is not None and _is_own(temporary))


def is_writable(folder: Path) -> bool:
    """Whether files can be written into `folder`, which is made where it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()  # tried: root passes every check of permissions
    except OSError:
        return False
    return True


@cache
def _was_writable(folder: Path) -> bool:
    """`is_writable`, as found when first asked: a disk that is full for a moment does not move the cache."""
    return is_writable(folder)


def _at_home() -> Path | None:
    """None for a user without a home folder, as in some containers."""
    try:
        return Path.home() / ".cache" / "rsparse"
    except RuntimeError:
        return None


def _temporary() -> Path | None:
    """A folder of this user's name, which anybody could make; None where no temporary files can be."""
    try:
        return Path(tempfile.gettempdir()) / f"rsparse-{os.getuid()}"
    except OSError:
        return None


def _made_own(folder: Path) -> bool:
    """Whether `folder` is this user's own, made for nobody else to enter where there was none."""
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    return _is_own(folder)


def _is_own(folder: Path) -> bool:
    """Whether `folder` is one, of this user and no link: others could put there what is then taken for one's own."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()

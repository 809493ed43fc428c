"""Files for what may be measured or compiled again: profiles and cubins.

They are trusted when they are read back, so their folder belongs to the user alone (mode 0700,
owner checked). A file is written beside its place and renamed into it: a reader sees the old file,
the new one, or none. What a killed process left beside a place goes when it is written again.
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import tempfile
import time
from pathlib import Path

_ABANDONED_SECONDS = 3600
"""A file beside its place that is older than this is not being written any more."""


def is_private(folder: Path) -> bool:
    """Whether `folder` is a real folder of this user that nobody else can write to or read."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and stat.S_IMODE(found.st_mode) & 0o077 == 0
    )


def private_folder(folder: Path) -> Path | None:
    """Create `folder` with mode 0700 if need be; None if it cannot be had, or is not ours alone."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except OSError:
        return None
    return folder if is_private(folder) else None


def publish(path: Path, content: bytes) -> bool:
    """Put `content` at `path` by an atomic rename; False where the file system refuses."""
    try:
        _remove_abandoned(path)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            return False
        raise
    return True


def _remove_abandoned(path: Path) -> None:
    for other in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > _ABANDONED_SECONDS:
                other.unlink()

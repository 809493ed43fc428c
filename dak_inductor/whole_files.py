"""Files that the user asked for: whole or as they were, also where the process is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it into place; links and permissions stay.

    In place where that cannot be: a pipe, a device, a folder that takes no new file. Raises
    OSError, and then nothing is left beside `path`.
    """
    target = Path(os.path.realpath(path))
    old = target.stat() if target.exists() else None
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    if old is not None and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    try:
        # by the umask of the process, as open() makes files
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except PermissionError:
        target.write_text(text, encoding="utf-8")
        return
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if old is not None:
                os.fchmod(descriptor, old.st_mode & 0o7777)
            file.write(text)
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise

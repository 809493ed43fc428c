"""Bytes of an open file, for tiers that read files without a memory map between."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileBytes:
    """Bytes [position, position + nbytes) of a file.

    descriptor: open for reading, owned by whoever made this record, who closes it.
    name: of the file, for messages.
    """

    descriptor: int
    position: int
    nbytes: int
    name: str

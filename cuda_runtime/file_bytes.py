"""Bytes of an open file, for tiers that read files without a memory map between."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from dak_inductor.errors import CheckpointError


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


def read_into(target: np.ndarray, source: FileBytes, start: int) -> None:
    """Fill `target` (uint8) with the bytes of `source` from `start` on. Raises CheckpointError."""
    done = 0
    while done < target.nbytes:
        position = source.position + start + done
        try:
            read = os.preadv(source.descriptor, [target.data[done:]], position)
        except OSError as error:
            raise CheckpointError(f"{source.name} cannot be read: {error}") from error
        if read == 0:
            raise CheckpointError(
                f"{source.name}: the file ends at byte {position}, truncated while it was read"
            )
        done += read

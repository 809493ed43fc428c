"""The files of a safetensors checkpoint: which there are, and where in them tensors lie."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from dak_inductor.cuda_runtime.file_bytes import FileBytes
from dak_inductor.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


def files_of(path: Path) -> Mapping[Path, set[str] | None]:
    """Files of a checkpoint, and the names to take from each; None: all that it holds."""
    if path.is_dir():
        if (path / INDEX_NAME).exists():
            return _read_index(path / INDEX_NAME)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{path} holds no .safetensors file and no {INDEX_NAME}: name the folder that "
                "holds them, or convert the checkpoint first"
            )
        return dict.fromkeys(files)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: a .safetensors file, a folder, or an index")
    return _read_index(path) if path.suffix == ".json" else {path: None}


def _read_index(path: Path) -> Mapping[Path, set[str]]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of shards: {error!r}") from error
    folder = path.parent.resolve()
    listing: dict[Path, set[str]] = {}
    for name, file in pairs:
        # A link to elsewhere is the user's own (caches are made of them), a path is not.
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{path} places {name} in {file!r}, outside its folder {folder}")
        listing.setdefault(folder / file, set()).add(name)
    return listing


class StoredFile:
    """A safetensors file's descriptor and the places of its tensors.

    The file begins with the length of its header (u64, little endian) and the header, JSON that
    gives each tensor's first and last byte behind it. safetensors has checked all that when it
    opened the file; a file that was replaced since raises CheckpointError.
    """

    def __init__(self, path: Path) -> None:
        self._name = str(path)
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                self._header = json.loads(file.read(length))
                self._data_start = 8 + length
                self._descriptor = os.dup(file.fileno())
        except (OSError, ValueError, OverflowError, struct.error, RecursionError) as error:
            raise CheckpointError(f"{path} was replaced while it was read: {error}") from error

    def bytes_of(self, name: str, nbytes: int) -> FileBytes:
        """The place of a tensor of `nbytes` bytes."""
        try:
            first, last = map(int, self._header[name]["data_offsets"])
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._name} was replaced while it was read") from error
        if first < 0 or last - first != nbytes:
            raise CheckpointError(f"{self._name} was replaced while it was read")
        return FileBytes(self._descriptor, self._data_start + first, nbytes, self._name)

    def close(self) -> None:
        os.close(self._descriptor)

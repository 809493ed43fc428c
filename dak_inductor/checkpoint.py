"""Reading a safetensors checkpoint tensor by tensor: weights in pieces, the rest as mapped.

Everything that can be wrong with a checkpoint is found before anything is allocated.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dak_inductor.checkpoint_files import INDEX_NAME, StoredFile, files_of
from dak_inductor.cuda_runtime.file_bytes import FileBytes, read_into
from dak_inductor.errors import CheckpointError
from dak_inductor.inventory import Inventory, Member
from dak_inductor.quantity_text import count_text
from dak_inductor.tensor_names import few_of

_PIECE_BYTES = 64 << 20
"""Tensors are read in pieces of about this size."""


class Checkpoint:
    """An open checkpoint: one file, a folder, or an index of shards. Read-only; close after use.

    Raises CheckpointError where a file is missing, truncated or not safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._stored: dict[str, StoredFile] = {}
        for file, names in files_of(self.path).items():
            handle = self._open(file)
            held = set(handle.keys())
            missing = sorted(names - held) if names is not None else []
            if missing:
                raise CheckpointError(
                    f"{self.path}: the index places {few_of(missing)} in {file.name}, which does "
                    "not hold them: index and files are of different checkpoints, download again"
                )
            for name in held if names is None else names:
                if name in self._file_of and names is None:
                    raise CheckpointError(
                        f"{self.path}: {name} is in {self._file_of[name].name} and in {file.name}; "
                        f"name one of the files, or add an {INDEX_NAME}"
                    )
                self._file_of[name] = file

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored: a view of the file's memory map, nothing is copied."""
        try:
            return self._handle(name).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{name} in {self._file_of[name]}: {error}") from error

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensor as contiguous pieces of `dtype`, each with its byte offset.

        Read, not mapped: a map of a file that is truncated meanwhile ends the process (SIGBUS). In
        pieces, so that no second copy of the tensor exists.
        """
        stored = self._dtype(name)
        source = self._stored_bytes(name)
        step = max(1, _PIECE_BYTES // dtype.itemsize)
        count = source.nbytes // stored.itemsize
        for start in range(0, count, step):
            piece = torch.empty(min(step, count - start), dtype=stored)
            read_into(piece.view(torch.uint8).numpy(), source, start * stored.itemsize)
            yield start * dtype.itemsize, piece.to(dtype)

    def file_bytes(self, name: str, dtype: torch.dtype) -> FileBytes | None:
        """Where the tensor's bytes lie in its file; None if they are not of `dtype` there.

        The descriptor is open until `close`.
        """
        return self._stored_bytes(name) if self._dtype(name) == dtype else None

    def name_for(self, member: Member) -> str | None:
        """The first of a tensor's names that the checkpoint holds."""
        return next((name for name in member.names if name in self._file_of), None)

    def check(self, inventory: Inventory) -> None:
        """Raise CheckpointError unless every meta tensor is there with the right shape."""
        missing: list[str] = []
        for entry in inventory:
            for member in entry.members:
                if member.tensor.device.type != "meta":
                    continue
                name = self.name_for(member)
                if name is None:
                    missing.append(member.names[0])
                    continue
                shape = tuple(member.tensor.shape)
                if self.shape(name) != shape:
                    raise CheckpointError(
                        f"{name}: the model expects shape {shape}, {self._file_of[name]} holds "
                        f"{self.shape(name)}"
                    )
                stored = self._dtype(name)
                if stored.is_floating_point != member.tensor.dtype.is_floating_point:
                    raise CheckpointError(
                        f"{name}: the model expects {member.tensor.dtype}, "
                        f"{self._file_of[name]} holds {stored}"
                    )
        if missing:
            wanted = {n for entry in inventory for member in entry.members for n in member.names}
            raise CheckpointError(
                f"{self.path} misses {count_text(len(missing), 'tensor')} of those on meta in "
                f"the model: {few_of(missing)}. {self._hint(missing, wanted)}"
            )

    def close(self) -> None:
        """Release the files. Tensors that were read keep their map alive."""
        self._files.clear()
        while self._stored:
            self._stored.popitem()[1].close()

    def _hint(self, missing: list[str], wanted: set[str]) -> str:
        names = [name for name in self.names if name not in wanted]
        for name in missing:
            suffix = [n for n in names if n.endswith(f".{name}") or name.endswith(f".{n}")]
            close = suffix or difflib.get_close_matches(name, names, n=1)
            if close:
                return (
                    f"The checkpoint has {close[0]!r} where the model has {name!r}: names that "
                    "need conversion are handled by `with dak.loading(...): "
                    "Model.from_pretrained(path)`."
                )
        return (
            "Buffers that checkpoints do not hold (rotary frequencies) must be created on the CPU, "
            "or use `with dak.loading(...): Model.from_pretrained(path)`."
        )

    def _open(self, file: Path) -> Any:
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file} is not a .safetensors file; convert it first")
        try:
            handle = safe_open(str(file), framework="pt", device="cpu")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): missing, truncated or damaged"
            ) from error
        self._files[str(file)] = handle
        return handle

    def _handle(self, name: str) -> Any:
        return self._files[str(self._file_of[name])]

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)

    def _dtype(self, name: str) -> torch.dtype:
        piece = self._slice(name)
        return (self.read(name) if not piece.get_shape() else self.read(name)[:0]).dtype

    def _stored_bytes(self, name: str) -> FileBytes:
        file = self._file_of[name]
        if str(file) not in self._stored:
            self._stored[str(file)] = StoredFile(file)
        return self._stored[str(file)].bytes_of(name, self.read(name).nbytes)


@contextmanager
def open_checkpoint(path: str | Path | None, inventory: Inventory) -> Iterator[Checkpoint | None]:
    """The checkpoint that fills an inventory's meta tensors, checked; None where there are none.

    Raises CheckpointError for meta tensors without a checkpoint, and for a checkpoint without use.
    """
    meta = [entry for entry in inventory if entry.device.type == "meta"]
    if path is None:
        if meta:
            raise CheckpointError(
                f"{inventory.label} has {count_text(len(meta), 'tensor')} on meta, "
                f"{meta[0].name} first: pass checkpoint=<path>, or "
                "use `with dak.loading(...): Model.from_pretrained(path)`"
            )
        yield None
        return
    if not meta:
        raise CheckpointError(
            f"checkpoint={str(path)!r} would not be read: no tensor of {inventory.label} is on "
            "meta. Leave it out, or build the model under torch.device('meta')."
        )
    checkpoint = Checkpoint(path)
    try:
        checkpoint.check(inventory)
        yield checkpoint
    finally:
        checkpoint.close()

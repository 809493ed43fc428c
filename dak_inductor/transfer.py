"""Carrying the tensors of a model into a tier one by one, and back if anything fails.

Each original is released as soon as its copy stands, so that no second copy of the model exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from dak_inductor.checkpoint import Checkpoint
from dak_inductor.cuda_runtime.file_bytes import FileBytes
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.errors import CheckpointError
from dak_inductor.inventory import Entry, Inventory, Member, Wrapper
from dak_inductor.offloaded_model import OffloadedWeight, WeightPart
from dak_inductor.parts import (
    is_contiguous,
    like_parameter,
    part_of,
    part_tensor,
    parts_of,
    refresh_flat_weights,
    set_data,
)
from dak_inductor.plan import TensorSpec
from dak_inductor.wrappers import rewrapped

log = logging.getLogger(__name__)


class Transfer:
    """One transaction: everything it has moved goes back with `undo`.

    Args:
        tier: where divided tensors go.
        device: where whole tensors go.
        checkpoint: where tensors on meta are read from.
    """

    def __init__(
        self, tier: Tier, device: torch.device, checkpoint: Checkpoint | None = None
    ) -> None:
        self.tier = tier
        self.device = device
        self.checkpoint = checkpoint
        self._undo: list[Callable[[], None]] = []

    def divide(self, entry: Entry, spec: TensorSpec, buffer: TieredBuffer) -> OffloadedWeight:
        """Move an entry into a new tiered buffer of its size."""
        buffer.label = spec.name
        base = buffer.tensor(torch.uint8, (entry.nbytes,))
        parts = parts_of(entry)
        if entry.device.type == "meta":
            for member, part in zip(entry.members, parts, strict=True):
                if not is_contiguous(part):
                    part_tensor(base, part).copy_(self._stored_whole(member))
                    continue
                file = self._stored_bytes(member)
                if file is not None and buffer.write_file(file, part.offset_bytes):
                    continue
                for offset, piece in self._stored(member):
                    buffer.write(piece, part.offset_bytes + offset)
        else:
            buffer.write(entry.bytes())
        self._bind(entry, base, parts)
        return OffloadedWeight(entry.names, buffer, spec, parts)

    def adopt(
        self, entry: Entry, spec: TensorSpec, remote_bytes: int, value: torch.Tensor
    ) -> OffloadedWeight:
        """As `divide` for an entry of one member still on meta, with its bytes from `value`."""
        buffer = self.tier.allocate(entry.nbytes, split=entry.nbytes - remote_bytes)
        buffer.label = spec.name
        parts = parts_of(entry)
        if is_contiguous(parts[0]):
            buffer.write(value.detach().contiguous())
        else:
            part_of(buffer, parts[0]).copy_(value.detach())
        return OffloadedWeight(entry.names, buffer, spec, parts)

    def keep_whole(self, entry: Entry) -> None:
        """Move an entry to the device as ordinary tensors; those that are there stay."""
        if entry.device == self.device:
            return
        if any(member.tensor.layout != torch.strided for member in entry.members):
            self._move_irregular(entry)
            return
        base = torch.empty(entry.nbytes, dtype=torch.uint8, device=self.device)
        parts = parts_of(entry)
        if entry.device.type == "meta":
            for member, part in zip(entry.members, parts, strict=True):
                if not is_contiguous(part):
                    part_tensor(base, part).copy_(self._stored_whole(member))
                    continue
                for offset, piece in self._stored(member):
                    start = part.offset_bytes + offset
                    base[start : start + piece.nbytes].copy_(piece.view(torch.uint8))
        else:
            base.copy_(entry.bytes())
        self._bind(entry, base, parts)

    def rewrap(self, wrapper: Wrapper) -> None:
        """Rebuild a wrapper subclass around its inner tensors, which are on another device now."""
        back = rewrapped(wrapper, self.device)
        if back is not None:
            self._undo.append(back)

    def freeze(self, inventory: Inventory) -> dict[str, bool]:
        """Take requires_grad off every parameter; returns what it was, by name."""
        before: dict[str, bool] = {}
        tensors: list[tuple[torch.Tensor, tuple[str, ...], bool]] = [
            (m.tensor, m.names, m.requires_grad)
            for e in inventory
            for m in e.members
            if m.is_parameter
        ]
        tensors += [(w.tensor, w.occurrences[0].names, w.requires_grad) for w in inventory.wrappers]
        for tensor, names, required in tensors:
            before.update(dict.fromkeys(names, required))
            if required and tensor.is_leaf:
                tensor.requires_grad_(False)
                self._undo.append(partial(_require_grad, tensor))
        return before

    def undo(self) -> None:
        """Put everything back as it was, last first. What cannot go back stays usable, logged."""
        while self._undo:
            step = self._undo.pop()
            try:
                step()
            except (RuntimeError, MemoryError) as error:
                log.error("a tensor could not be put back and stays in its tier: %s", error)

    def _bind(self, entry: Entry, base: torch.Tensor, parts: tuple[WeightPart, ...]) -> None:
        """Let every member of an entry lie on `base`, and note how to take that back."""
        device = entry.device
        if device.type == "meta":
            for member, part in zip(entry.members, parts, strict=True):
                self._replace(member, part_tensor(base, part))
            return
        strides = [member.tensor.stride() for member in entry.members]
        for member, part in zip(entry.members, parts, strict=True):
            set_data(member, part_tensor(base, part))

        def back() -> None:
            plain = torch.empty(entry.nbytes, dtype=torch.uint8, device=device)
            plain.copy_(base)
            for member, part, stride in zip(entry.members, parts, strides, strict=True):
                tensor = part_tensor(plain, part)
                if entry.compact:
                    tensor = torch.empty_strided(
                        part.shape, stride, dtype=part.dtype, device=device
                    ).copy_(tensor)
                set_data(member, tensor)

        self._undo.append(back)

    def _replace(self, member: Member, tensor: torch.Tensor) -> None:
        """A new object for a tensor on meta, in every place where the old one hung."""
        old = member.tensor
        new = like_parameter(old, tensor) if isinstance(old, nn.Parameter) else tensor
        for place in member.occurrences:
            place.set(new)
            refresh_flat_weights(place.module)
        member.tensor = new

        def back() -> None:
            for place in member.occurrences:
                place.set(old)
            member.tensor = old

        self._undo.append(back)

    def _stored(self, member: Member) -> Iterator[tuple[int, torch.Tensor]]:
        """Pieces of a meta tensor's contents, with their byte offsets. Raises CheckpointError."""
        checkpoint, name = self._source(member)
        return checkpoint.pieces(name, member.tensor.dtype)

    def _stored_bytes(self, member: Member) -> FileBytes | None:
        """Where a meta tensor's contents lie in a file as they are wanted. As `_stored`."""
        checkpoint, name = self._source(member)
        return checkpoint.file_bytes(name, member.tensor.dtype)

    def _stored_whole(self, member: Member) -> torch.Tensor:
        checkpoint, name = self._source(member)
        return checkpoint.read(name)

    def _source(self, member: Member) -> tuple[Checkpoint, str]:
        name = self.checkpoint.name_for(member) if self.checkpoint is not None else None
        if self.checkpoint is None or name is None:
            raise CheckpointError(
                f"{member.names[0]} is on meta and no checkpoint holds it: pass checkpoint=<path>, "
                "or use `with dak.loading(...): Model.from_pretrained(path)`"
            )
        return self.checkpoint, name

    def _move_irregular(self, entry: Entry) -> None:
        (member,) = entry.members
        before = member.tensor.detach()
        self._undo.append(partial(set_data, member, before))
        set_data(member, before.to(self.device))


def _require_grad(tensor: torch.Tensor) -> None:
    tensor.requires_grad_(True)

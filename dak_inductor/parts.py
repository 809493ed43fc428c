"""Tensors on shared memory: where an entry's members lie, and putting them there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.inventory import QUANTISED_PARAMETERS, Entry, Member
from dak_inductor.offloaded_model import WeightPart


def parts_of(entry: Entry) -> tuple[WeightPart, ...]:
    """Where each member will lie in a buffer that holds the entry's bytes."""
    parts = []
    for member in entry.members:
        tensor, stride = member.tensor, member.tensor.stride()
        if entry.compact:
            stride = torch.empty(tensor.shape, device="meta").stride()
        offset = 0 if entry.compact else member.start - entry.start
        parts.append(
            WeightPart(member.names, offset, tuple(tensor.shape), tuple(stride), tensor.dtype)
        )
    return tuple(parts)


def is_contiguous(part: WeightPart) -> bool:
    """True if the part's bytes are its elements in row-major order."""
    return part.stride == tuple(torch.empty(part.shape, device="meta").stride())


def part_tensor(base: torch.Tensor, part: WeightPart) -> torch.Tensor:
    """The part as a tensor that shares the storage of `base` (uint8, one dimension)."""
    start = base.storage_offset() + part.offset_bytes
    return torch.empty(0, dtype=part.dtype, device=base.device).set_(
        base.untyped_storage(), start // part.dtype.itemsize, part.shape, part.stride
    )


def parts_on(entry: Entry, address: int) -> tuple[WeightPart, ...]:
    """The parts of an entry whose tensors lie in a buffer that begins at `address`."""
    return tuple(
        replace(part, offset_bytes=member.tensor.data_ptr() - address)
        for member, part in zip(entry.members, parts_of(entry), strict=True)
    )


def part_of(buffer: TieredBuffer, part: WeightPart) -> torch.Tensor:
    """The part of a weight as a tensor on its buffer."""
    return buffer.tensor(part.dtype, part.shape, part.stride, part.offset_bytes)


def set_data(member: Member, tensor: torch.Tensor) -> None:
    """Put a member on other memory, keeping the tensor object and its quantisation state."""
    held = member.tensor
    shared = getattr(held, "CB", None)
    is_shared = isinstance(shared, torch.Tensor) and shared.data_ptr() == held.data_ptr()
    held.data = tensor
    held.grad = None
    if type(held).__name__ in QUANTISED_PARAMETERS:
        if is_shared:
            held.CB = held.data  # type: ignore[attr-defined]
        if isinstance(getattr(held, "SCB", None), torch.Tensor):
            held.SCB = held.SCB.to(tensor.device)  # type: ignore[attr-defined]
        state = getattr(held, "quant_state", None)
        if state is not None:
            state.to(tensor.device)


def plain_copy(entry: Entry, device: torch.device) -> None:
    """Put an entry into ordinary tensors on `device`, in place, unless it is that already."""
    if entry.device.type == "meta":
        return
    if any(member.tensor.layout != torch.strided for member in entry.members):
        for member in entry.members:
            set_data(member, member.tensor.detach().to(device))
        return
    first = entry.members[0].tensor
    if entry.device == device and address_table.lookup(first.data_ptr()) is None:
        return
    base = torch.empty(entry.nbytes, dtype=torch.uint8, device=device)
    base.copy_(entry.bytes())
    for member, part in zip(entry.members, parts_of(entry), strict=True):
        set_data(member, part_tensor(base, part))


def like_parameter(old: nn.Parameter, tensor: torch.Tensor) -> nn.Parameter:
    """A frozen parameter on `tensor` with the class and attributes of `old`."""
    kind = type(old)
    new = torch.Tensor._make_subclass(kind, tensor.detach(), False)
    new.__dict__.update(old.__dict__)
    return new


def refresh_flat_weights(module: nn.Module) -> None:
    """Recurrent modules keep a second list of their weights."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()

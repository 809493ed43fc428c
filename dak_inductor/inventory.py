"""What a model holds: which tensors can be divided between tiers, which stay whole, and why.

Tensors are grouped by the bytes they occupy: tied weights are one tensor with several names, views
that overlap in one storage are moved together, and disjoint parts of one storage are independent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils import _python_dispatch

from dak_inductor.refusal import Refusal

LARGE_BUFFER_BYTES = 16 << 20
"""Buffers from this size on are treated as weights (some quantisers keep weights in buffers)."""

QUANTISED_PARAMETERS = ("Params4bit", "Int8Params")
"""bitsandbytes' parameter classes: dense bytes, with a quantisation state beside them."""


@dataclass(frozen=True, slots=True, eq=False)
class Occurrence:
    """One place where a tensor hangs in the module tree."""

    module: nn.Module
    attribute: str
    names: tuple[str, ...]  # qualified; several where the module itself is shared
    is_parameter: bool

    def set(self, tensor: torch.Tensor) -> None:
        """Put `tensor` in this place."""
        table = self.module._parameters if self.is_parameter else self.module._buffers
        table[self.attribute] = tensor  # type: ignore[assignment]


@dataclass(slots=True, eq=False)
class Member:
    """One dense tensor: a parameter, a buffer, or an inner tensor of a wrapper subclass."""

    tensor: torch.Tensor
    names: tuple[str, ...]
    occurrences: tuple[Occurrence, ...]  # empty for an inner tensor
    start: int  # bytes [start, stop) of its storage
    stop: int
    is_parameter: bool
    readers: tuple[tuple[nn.Module, str], ...]  # modules that hold it, with its name there
    requires_grad: bool


@dataclass(slots=True, eq=False)
class Entry:
    """Bytes that move together: one tensor, or several that overlap in one storage."""

    members: tuple[Member, ...]
    compact: bool = False  # a lone tensor with gaps: its copy is contiguous

    @property
    def name(self) -> str:
        return self.members[0].names[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for member in self.members for name in member.names)

    @property
    def nbytes(self) -> int:
        if self.compact:
            return self.members[0].tensor.numel() * self.members[0].tensor.itemsize
        return max(member.stop for member in self.members) - self.start

    @property
    def start(self) -> int:
        return min(member.start for member in self.members)

    @property
    def device(self) -> torch.device:
        return self.members[0].tensor.device

    @property
    def is_parameter(self) -> bool:
        return any(member.is_parameter for member in self.members)

    def bytes(self) -> torch.Tensor:
        """The entry's bytes: uint8, one dimension, on its device; shared unless compact."""
        first = self.members[0].tensor.detach()
        if self.compact:
            return first.contiguous().reshape(-1).view(torch.uint8)
        return torch.empty(0, dtype=torch.uint8, device=first.device).set_(
            first.untyped_storage(), self.start, (self.nbytes,), (1,)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Wrapper:
    """A tensor subclass around inner tensors, and where it hangs."""

    tensor: torch.Tensor
    occurrences: tuple[Occurrence, ...]
    requires_grad: bool


@dataclass(slots=True, eq=False)
class Inventory:
    """`entries` can be divided, `resident` stay whole on the device; both in module order."""

    label: str
    entries: list[Entry] = field(default_factory=list)
    resident: list[Entry] = field(default_factory=list)
    wrappers: list[Wrapper] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def __iter__(self) -> Iterator[Entry]:
        yield from self.entries
        yield from self.resident

    @property
    def tierable_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def resident_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.resident)

    @property
    def total_bytes(self) -> int:
        return self.tierable_bytes + self.resident_bytes

    @property
    def parameter_count(self) -> int:
        return sum(len(entry.members) for entry in self if entry.is_parameter)

    @property
    def fingerprint(self) -> str:
        """Of names, shapes and dtypes of all parameters; equal for equal architectures, whatever
        the pages of a tier leave whole."""
        members = [m for entry in self if entry.is_parameter for m in entry.members]
        lines = sorted(f"{m.names} {tuple(m.tensor.shape)} {m.tensor.dtype}\n" for m in members)
        digest = hashlib.sha256("".join(lines).encode())
        return f"{self.label}-{digest.hexdigest()[:16]}"


def is_wrapper(tensor: torch.Tensor) -> bool:
    """True for a tensor subclass that is a shell around inner tensors."""
    return bool(_python_dispatch.is_traceable_wrapper_subclass(tensor))


def take_inventory(model: nn.Module, *, minimum_bytes: int) -> Inventory:
    """Everything that `model` holds. Tensors below `minimum_bytes` stay whole. Changes nothing."""
    inventory = Inventory(type(model).__name__)
    members: list[Member] = []
    for tensor, occurrences in _tensors(model).values():
        if is_wrapper(tensor):
            found = list(_inner_members(tensor, occurrences, occurrences[0].names[0]))
            inventory.wrappers.append(Wrapper(tensor, occurrences, tensor.requires_grad))
            inventory.refusals.append(_subclass_notice(tensor, occurrences))
        else:
            found = [_member(tensor, occurrences, _all_names(occurrences), is_inner=False)]
            if type(tensor).__name__ in QUANTISED_PARAMETERS:
                inventory.refusals.append(_subclass_notice(tensor, occurrences))
        members += found
    for group in _overlapping(members):
        entry = Entry(group, compact=len(group) == 1 and _has_gaps(group[0].tensor))
        reason = _reason_to_stay(entry, minimum_bytes)
        if reason is None:
            inventory.entries.append(entry)
            continue
        inventory.resident.append(entry)
        if reason:
            inventory.refusals.append(
                Refusal(entry.name, str(entry.members[0].tensor.layout), reason)
            )
    return inventory


def _tensors(model: nn.Module) -> dict[int, tuple[torch.Tensor, tuple[Occurrence, ...]]]:
    """Every distinct parameter and buffer, by identity, with all places where it hangs."""
    names: dict[tuple[int, str], list[str]] = {}
    places: dict[int, tuple[torch.Tensor, list[tuple[nn.Module, str, bool]]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for attribute, tensor in table.items():
                if tensor is None:
                    continue
                known = names.setdefault((id(module), attribute), [])
                if not known:
                    place = (module, attribute, table is module._parameters)
                    places.setdefault(id(tensor), (tensor, []))[1].append(place)
                known.append(f"{prefix}.{attribute}" if prefix else attribute)
    return {
        key: (
            tensor,
            tuple(
                Occurrence(module, attribute, tuple(names[id(module), attribute]), is_parameter)
                for module, attribute, is_parameter in found
            ),
        )
        for key, (tensor, found) in places.items()
    }


def _all_names(occurrences: Iterable[Occurrence]) -> tuple[str, ...]:
    return tuple(name for occurrence in occurrences for name in occurrence.names)


def _member(
    tensor: torch.Tensor,
    occurrences: tuple[Occurrence, ...],
    names: tuple[str, ...],
    *,
    is_inner: bool,
) -> Member:
    start, stop = 0, 0
    if tensor.layout == torch.strided:
        start = int(tensor.storage_offset()) * tensor.itemsize
        stop = start + _extent(tensor) * tensor.itemsize
    return Member(
        tensor=tensor,
        names=names,
        occurrences=() if is_inner else occurrences,
        start=start,
        stop=stop,
        is_parameter=any(occurrence.is_parameter for occurrence in occurrences),
        readers=tuple((o.module, names[0] if is_inner else o.names[0]) for o in occurrences),
        requires_grad=tensor.requires_grad,
    )


def _inner_members(
    tensor: torch.Tensor, occurrences: tuple[Occurrence, ...], name: str
) -> Iterator[Member]:
    """The dense tensors inside a wrapper subclass, which may hold wrappers itself."""
    attributes, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for attribute in attributes:
        inner = getattr(tensor, attribute)
        inner_name = f"{name}.{attribute}"
        if is_wrapper(inner):
            yield from _inner_members(inner, occurrences, inner_name)
        else:
            yield _member(inner, occurrences, (inner_name,), is_inner=True)


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one touched."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(1 + sum((size - 1) * step for size, step in steps))


def _has_gaps(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and _extent(tensor) > tensor.numel()


def _overlapping(members: list[Member]) -> list[tuple[Member, ...]]:
    """Members grouped by overlap in their storage, in the order of each group's first member."""
    by_storage: dict[int, list[int]] = {}
    groups: list[list[int]] = []
    for index, member in enumerate(members):
        if member.tensor.layout == torch.strided and member.stop > member.start:
            key = member.tensor.untyped_storage()._cdata
            by_storage.setdefault(key, []).append(index)
        else:
            groups.append([index])
    for indices in by_storage.values():
        end = -1
        for index in sorted(indices, key=lambda i: (members[i].start, i)):
            if members[index].start >= end:
                groups.append([])
            groups[-1].append(index)
            end = max(end, members[index].stop)
    ordered = sorted((sorted(group) for group in groups), key=lambda group: group[0])
    return [tuple(members[index] for index in group) for group in ordered]


def _reason_to_stay(entry: Entry, minimum_bytes: int) -> str | None:
    """None: can be divided. "": stays whole as a matter of course. Otherwise: refused, and why."""
    for member in entry.members:
        tensor = member.tensor
        if tensor.layout != torch.strided:
            return f"a tensor of layout {tensor.layout} has no one range of bytes to divide"
        if (member.start - entry.start) % tensor.itemsize:
            return "overlapping views of several dtypes that do not keep their alignment"
        if tensor.is_conj() or tensor.is_neg():
            return "a lazily conjugated or negated view cannot be divided"
    smallest = minimum_bytes if entry.is_parameter else max(minimum_bytes, LARGE_BUFFER_BYTES)
    return None if entry.nbytes >= smallest else ""


def _subclass_notice(tensor: torch.Tensor, occurrences: tuple[Occurrence, ...]) -> Refusal:
    kind = type(tensor)
    return Refusal(
        node=occurrences[0].names[0],
        target=f"{kind.__module__.partition('.')[0]}.{kind.__name__}",
        reason="its bytes are divided between the tiers, but its operators stay on the stock path",
    )

"""The record of an offloaded model: which tensor lies in which buffer."""

from __future__ import annotations

import weakref
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.plan import OpUse, Plan, TensorSpec
from dak_inductor.quantity_text import bytes_text, count_text
from dak_inductor.refusal import Refusal

if TYPE_CHECKING:
    from dak_inductor.budget import DeviceBudget
    from dak_inductor.plan_basis import PlanBasis


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One tensor of a weight: where in the buffer it lies, and its names in the model."""

    names: tuple[str, ...]
    offset_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class OffloadedWeight:
    """One buffer and the tensor in it, or the overlapping tensors."""

    names: tuple[str, ...]
    buffer: TieredBuffer
    spec: TensorSpec  # as planned at creation
    parts: tuple[WeightPart, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def stride(self) -> tuple[int, ...]:
        return self.parts[0].stride

    @property
    def live_spec(self) -> TensorSpec:
        """The spec with where the tensor lies now, and the page grid that its moves follow."""
        buffer = self.buffer
        first = -buffer.start_offset % buffer.page_bytes
        return replace(
            self.spec,
            current_remote=buffer.nbytes - buffer.split,
            page=buffer.page_bytes,
            first_page_split=first,
        )


class PlannedTensor(Protocol):
    """What a plan moves: a weight, or keys or values of a KV cache."""

    @property
    def name(self) -> str: ...
    @property
    def buffer(self) -> TieredBuffer: ...
    @property
    def live_spec(self) -> TensorSpec: ...


class PlannedCache(Protocol):
    """A KV cache (`kv_cache_storage`) whose tensors share a budget with weights."""

    @property
    def tensors(self) -> Sequence[PlannedTensor]: ...
    def default_uses(self) -> list[OpUse]: ...
    def as_expected(self, use: OpUse) -> OpUse: ...
    def give_back(self) -> None: ...


@dataclass(slots=True, eq=False, weakref_slot=True)
class OffloadedModel:
    """One model whose weights are divided between tiers. Holds the model and its caches weakly."""

    reference: weakref.ref[nn.Module]
    label: str  # class name
    device: torch.device
    remote: str
    tier: Tier
    weights: dict[str, OffloadedWeight]
    resident_bytes: int  # parameters and buffers that stay whole on the device
    total_bytes: int
    tensor_count: int  # parameters, and buffers that can be divided
    budget: DeviceBudget
    required_grad: Mapping[str, bool]  # by name, before the parameters were frozen
    fingerprint: str = ""
    offload_ratio: float | None = None
    strict: bool = False
    plan: Plan | None = None
    settled: PlanBasis | None = None  # of `plan`, where it changed nothing
    default_uses: tuple[OpUse, ...] = ()  # what a decode step is taken to read before it is seen
    refusals: tuple[Refusal, ...] = ()
    caches: weakref.WeakSet[PlannedCache] = field(default_factory=weakref.WeakSet)
    export_hook: RemovableHandle | None = None  # refuses torch.export while the model is offloaded
    _expected: list[tuple[Mapping[str, torch.Tensor | None], str, int, str]] = field(
        default_factory=list
    )

    @property
    def model(self) -> nn.Module | None:
        return self.reference()

    def bytes_by_tier(self) -> TierBytes:
        """Bytes of the divided weights by tier; whole tensors are not among them."""
        return sum((w.buffer.bytes_by_tier() for w in self.weights.values()), TierBytes())

    def tensors(self) -> list[PlannedTensor]:
        """The divided weights, and the keys and values of the model's caches."""
        return [*self.weights.values(), *(t for cache in list(self.caches) for t in cache.tensors)]

    def physical_bytes(self) -> TierBytes:
        """Bytes of the pages that weights and caches hold now."""
        return sum((tensor.buffer.physical_bytes() for tensor in self.tensors()), TierBytes())

    def claimed_bytes(self) -> TierBytes:
        """Bytes of the pages that weights and caches hold once all of these are committed."""
        return sum((tensor.buffer.claimed_bytes() for tensor in self.tensors()), TierBytes())

    def planned_bytes(self) -> TierBytes:
        """Bytes of weights and caches by tier, caches at their full length."""
        buffers = [tensor.buffer for tensor in self.tensors()]
        local = sum(buffer.split for buffer in buffers)
        return TierBytes(local, sum(buffer.nbytes for buffer in buffers) - local)

    def buffer_ids(self) -> set[int]:
        """Identities of the buffers, to find the model of a buffer."""
        return {id(tensor.buffer) for tensor in self.tensors()}

    def specs(self) -> tuple[TensorSpec, ...]:
        """Weights and caches as they lie now, for a new plan."""
        return tuple(tensor.live_spec for tensor in self.tensors())

    def required_remote_bytes(self) -> int:
        """Bytes of weights and caches that have to be remote, by ratio or budget.

        A ratio is one of the weights; what is remote of the caches then was asked for beside it.
        """
        planned = self.planned_bytes()
        if self.offload_ratio is not None:
            weights = self.bytes_by_tier()
            return round(self.offload_ratio * weights.total) + planned.remote - weights.remote
        rounding = self.claimed_bytes().local - planned.local  # pages that are held in part
        return min(
            planned.total,
            max(0, planned.total + rounding - self.budget.weight_bytes_available(self)),
        )

    def line(self) -> str:
        """One line for the user: what went where."""
        held = self.bytes_by_tier()
        total = held.total + self.resident_bytes
        share = f"{100 * held.remote / total if total else 0:.1f}%"
        local = held.local + self.resident_bytes
        divided = sum(len(weight.parts) for weight in self.weights.values())
        place, remote = places(self.device, self.remote)
        return (
            f"dak: {self.label} {bytes_text(total)}: {bytes_text(local)} {place}, "
            f"{bytes_text(held.remote)} {remote} ({share}), "
            f"{divided} of {count_text(self.tensor_count, 'tensor')} tiered; "
            f"resident reserve {bytes_text(self.budget.reserve)}"
        )


def find_resident_copies(
    record: OffloadedModel, addresses: Container[int] | None = None
) -> list[str]:
    """Names of weights that no longer lie in their buffer (`.half()`, `assign=True`, replaced);
    with `addresses` only of those that lie there now.

    Cheap enough for every call: one look-up and one address per tensor.
    """
    return [
        name
        for table, attribute, address, name in record._expected
        if not _lies_at(tensor := table.get(attribute), address)
        and (addresses is None or (tensor is not None and tensor.data_ptr() in addresses))
    ]


def expect_tensors(record: OffloadedModel) -> None:
    """Note where each weight hangs and its address, for `find_resident_copies`."""
    model = record.model
    record._expected.clear()
    if model is None:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    for weight in record.weights.values():
        for part in weight.parts:
            for name in part.names:
                path, _, attribute = name.rpartition(".")
                module = modules.get(path)
                if module is None:
                    continue  # an inner tensor of a wrapper subclass
                held = module._parameters if attribute in module._parameters else module._buffers
                address = weight.buffer.address + part.offset_bytes
                if _lies_at(held.get(attribute), address):
                    record._expected.append((held, attribute, address, name))


def _lies_at(tensor: torch.Tensor | None, address: int) -> bool:
    return tensor is not None and tensor.data_ptr() == address


def places(device: torch.device, remote: str) -> tuple[str, str]:
    """The two tiers in the user's words: "on ..." and "in ..."."""
    if remote == "simulated":
        return "on the simulated GPU", "in the simulated remote tier"
    return f"on {device}", "in host memory" if remote == "cpu" else f"on {remote}"

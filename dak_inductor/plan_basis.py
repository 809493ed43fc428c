"""What a plan was made from, to see without planning that another one would be the same."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from dak_inductor.binding import Binding
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.offloaded_model import OffloadedModel

_Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class PlanBasis:
    """All that plans of a model without caches depend on and that changes as it is called.

    room: bytes that the budget leaves for weights; None where a ratio is asked for.
    ring_bytes: of the ring of copies ahead.
    splits: of the weights, as they lie.
    graphs: those that read weights of the model, with the values of their symbols.
    calls: of each; () for a single one, which no other is weighed against.
    """

    room: int | None
    ring_bytes: int
    splits: tuple[int, ...]
    graphs: tuple[tuple[weakref.ref[Binding], _Sizes], ...]
    calls: tuple[int, ...]
    profile: HardwareProfile


def basis_of(
    model: OffloadedModel, bindings: Iterable[Binding], ring_bytes: int, profile: HardwareProfile
) -> PlanBasis | None:
    """As things are; None for a model with caches, of which more is expected with each token."""
    if model.caches:
        return None
    own = model.buffer_ids()
    readers = [binding for binding in bindings if binding.reads_any(own)]
    ratio = model.offload_ratio is not None
    return PlanBasis(
        None if ratio else model.budget.weight_bytes_available(model),
        ring_bytes,
        tuple([weight.buffer.split for weight in model.weights.values()]),
        tuple([(weakref.ref(each), tuple(each.values.items())) for each in readers]),
        tuple([each.calls for each in readers]) if len(readers) > 1 else (),
        profile,
    )

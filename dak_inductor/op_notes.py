"""What is known of operators besides their plan: how they were read, by which kernel, how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OpKey = tuple[str, str]  # graph and operator


@dataclass(frozen=True, slots=True)
class OpNotes:
    """By graph and operator. An operator that is missing from `strategies` has nothing remote, one
    that is missing from `kernels` was not compiled.

    seconds:    measured, of one call.
    strategies: "direct" or "staged".
    kernels:    what serves it: "cuda", "triton", "stock", or "simulated" on the simulated tier.
    """

    seconds: Mapping[OpKey, float] = field(default_factory=dict)
    strategies: Mapping[OpKey, str] = field(default_factory=dict)
    kernels: Mapping[OpKey, str] = field(default_factory=dict)

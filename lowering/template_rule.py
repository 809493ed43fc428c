"""A rule that a template has for calls, and the reason that users read where it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from dak_inductor.lowering.op_facts import OpFacts
from dak_inductor.lowering.refusals import HOPPER, TRITON_LEAST

Facts = TypeVar("Facts", contravariant=True)


@dataclass(frozen=True, slots=True)
class Rule(Generic[Facts]):
    """`reason` gives a sentence without a full stop; it is asked only where `holds` is False."""

    holds: Callable[[Facts], bool]
    reason: Callable[[Facts], str]


def first_reason(facts: Facts, rules: Iterable[Rule[Facts]]) -> str | None:
    """The reason of the first rule that does not hold; None where all do."""
    return next((rule.reason(facts) for rule in rules if not rule.holds(facts)), None)


def gpu_text(capability: tuple[int, int] | None) -> str:
    """What there is in place of the GPU that a rule asks for."""
    if capability is None:
        return "there is no such GPU here"
    return "this GPU has {}.{}".format(*capability)


def dtype_text(dtype: torch.dtype | None) -> str:
    """The dtype's name: "bfloat16"."""
    return "unknown" if dtype is None else str(dtype).removeprefix("torch.")


CUDA_INSTALLED: tuple[Rule[OpFacts], ...] = (
    Rule(
        lambda f: f.capability == HOPPER,
        lambda f: f"it is written for Hopper (compute capability 9.0); {gpu_text(f.capability)}",
    ),
    Rule(
        lambda f: f.extension,
        lambda f: "the compiled extension of dak_inductor cannot be loaded",
    ),
)
"""What every CUDA template needs."""
TRITON_INSTALLED: tuple[Rule[OpFacts], ...] = (
    Rule(
        lambda f: f.capability is not None and f.capability >= TRITON_LEAST,
        lambda f: f"it needs compute capability 8.0 or newer; {gpu_text(f.capability)}",
    ),
    Rule(lambda f: f.triton, lambda f: "triton is not installed"),
)
"""What every Triton template needs."""

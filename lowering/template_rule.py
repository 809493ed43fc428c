"""A rule that a template has for calls, and the reason that users read where it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Facts = TypeVar("Facts")

HALF = (torch.bfloat16, torch.float16)
"""What the CUDA templates take."""


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

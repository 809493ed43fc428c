"""Why an operator was not offloaded, in the user's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """One operator left to the stock path. `reason` is a sentence without a full stop."""

    node: str  # name in the graph
    target: str  # the operator, as torch spells it: "aten.convolution"
    reason: str
    module: str = ""  # "model.layers.3.mlp.up_proj"
    source: str = ""  # "modeling_llama.py:174"
    graph: str = ""


def in_one_line(reasons: Sequence[str]) -> str:
    """Several are numbered, "(1) ... (2) ...": a reason may have semicolons of its own."""
    if len(reasons) == 1:
        return reasons[0]
    return " ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))

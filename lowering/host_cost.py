"""What products take of the host's time outside of CUDA graphs; a replay of one takes none of it.

Measured on an H200 machine by `benchmarks/bench_host.py` (`host.json`): chains of 48 products that
the GPU ends before the host has queued the next. It is time of Python and of the driver: no figure
of the GPU scales it, and the same calls took up to 1.7 times as long from one minute to another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dak_inductor.lowering.linear.call_facts import CallFacts
    from dak_inductor.lowering.linear.ways import WayName

KERNEL_SECONDS = 28e-6
"""Of one by the kernel, whatever is fused into it."""
STOCK_SECONDS = 39e-6
"""Of one by the stock operator, with its count."""
FOLLOWING_SECONDS = 12e-6
"""Of each operator more that a product takes which is not by the kernel. Assumed: a launch by torch
took 5 to 8 us besides the call. Without it 24 products of BERT-large with 512 tokens, most of them
local, went by stock operators, and calls took half as long again (`models_encoders.json`)."""
RING_SECONDS = 50e-6
"""Of one through a ring of its own, besides the parts that this copies."""
RING_PART_SECONDS = 85e-6
"""Of each part that such a ring copies on a queue of its own: four take 391 us."""
IN_LINE_SECONDS = 75e-6
"""Of each part that is copied on the queue of the products: one takes 125 us."""
COPY_SECONDS = 72e-6
"""Of each copy ahead for a product that is one launch, besides the launch: with one it takes 101
us."""
STAGED_SECONDS = 110e-6
"""Of a product in parts, with a single one copied ahead."""
PART_SECONDS = 80e-6
"""Of each further part: with four it takes 350 us."""


def following_seconds(call: CallFacts) -> float:
    """Of what stock products leave to others: activation, a second product with its gate, residual
    sum."""
    more = (call.activation != "none") + 2 * call.problem.gated + call.residual
    return more * FOLLOWING_SECONDS


def way_seconds(way: WayName, call: CallFacts) -> float:
    """The least of a call by that way. A ring with nothing remote is the stock operator."""
    if way == "direct":
        return KERNEL_SECONDS
    rings = way == "ring" and any(call.remote_bytes)
    own = RING_SECONDS + IN_LINE_SECONDS if rings else STOCK_SECONDS
    return own + following_seconds(call)


def staged_seconds(parts: int) -> float:
    """Of a product with so many parts copied ahead."""
    return STAGED_SECONDS + (parts - 1) * PART_SECONDS

"""What products take of the host's time outside of CUDA graphs; a replay of one takes none of it.

Measured on an H200 machine by `benchmarks/bench_host.py` (`host.json`): chains of 48 products that
the GPU ends before the host has queued the next. It is time of Python and of the driver: no figure
of the GPU scales it, and the same calls took up to 1.7 times as long from one minute to another.
"""

from __future__ import annotations

PRODUCT_SECONDS = 34e-6
"""Of one that is a single launch: the kernel 28 us, the stock operator with its count 39."""
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


def ring_seconds(remote_bytes: int) -> float:
    """The least that a product through a ring of its own takes; with nothing remote it is the stock
    operator."""
    return RING_SECONDS + IN_LINE_SECONDS if remote_bytes else PRODUCT_SECONDS


def staged_seconds(parts: int) -> float:
    """Of a product with so many parts copied ahead."""
    return STAGED_SECONDS + (parts - 1) * PART_SECONDS

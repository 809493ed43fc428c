"""What the plan of the splits and the plan of a step both take of the ring of copies ahead."""

from __future__ import annotations

RING_BYTES = 64 * 2**20
"""Device memory of the ring at most: it bridges 1.2 ms of work without a copy on a PCIe link. Deep
in the link's region a part of a third of it hides all but 1% of what a copy costs besides its
bytes."""
RING_SHARE = 1 / 64
"""Of the budget, at most."""
LEAST_RING_BYTES = 4 * 2**20
PARTS_IN_RING = 3
"""Of the largest parts: one is copied, one is read, one lies ready."""
LAUNCHES_IN_RING = 2
"""Of products that are one launch each: one is copied, one is read. A launch takes a tenth of the
time of its copies."""
MARGIN = 0.02
"""What copies ahead must save, as a share of the step."""


def ring_within(room: int) -> int:
    """Bytes of the largest ring in so much memory; 0 where none is worth it."""
    return min(room, RING_BYTES) if room >= LEAST_RING_BYTES else 0


def expected_ring_bytes(budget: int) -> int:
    """The same where nothing but the budget is known."""
    return ring_within(int(RING_SHARE * budget))

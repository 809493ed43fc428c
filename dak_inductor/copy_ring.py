"""What the plan of the splits and the plan of a step both take of the ring of copies ahead."""

from __future__ import annotations

RING_BYTES = 32 * 2**20
"""Device memory of the ring at most: it bridges 0.6 ms of work without a copy on a PCIe link, and
each of its bytes is one of weights that is remote instead where `gpu_memory` is what binds."""
PARTS_IN_RING = 3
"""Of the largest parts: one is copied, one is read, one lies ready."""
LAUNCHES_IN_RING = 2
"""Of products that are one launch each: one is copied, one is read. A launch takes a tenth of the
time of its copies."""
MARGIN = 0.02
"""What copies ahead must save, as a share of the step."""

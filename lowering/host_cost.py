"""What products take of the host's time outside of CUDA graphs; a replay of one takes none of it.

Measured on the H200 machine, decode steps of 8 Llama-3-8B layers (48 products) at 2% remote: 3.6 ms
with stock kernels, 4.0 ms with all products direct, 7.2 ms with some 16 staged, where the GPU takes
1.05 to 1.5 ms. It is time of Python and of the driver: no figure of the GPU scales it.
"""

from __future__ import annotations

STOCK_SECONDS = 75e-6
"""Of a stock product with its count."""
DIRECT_SECONDS = 80e-6
"""Of one that the kernel serves."""
STAGED_SECONDS = 400e-6
"""Of one with a single part copied ahead. Read off before plans were prepared once for all plays
(`lowering/ahead/prepared_plan.py`), so it is an upper bound; the times above alone give 290e-6."""
PART_SECONDS = 150e-6
"""Of each further part; likewise."""


def staged_seconds(parts: int) -> float:
    """Of a product with so many parts copied ahead."""
    return STAGED_SECONDS + (parts - 1) * PART_SECONDS

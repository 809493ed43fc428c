"""What products take of the host's time outside of CUDA graphs; a replay of one takes none of it.

Measured on the H200 machine, decode steps of 8 Llama-3-8B layers (48 products): all direct 3.5 ms;
4 of them staged in 2 parts each 4.9 ms; 8 staged in 5 parts each 6.3 ms; stock kernels on divided
tensors 3.6 ms with a count for each. The GPU takes 1.05 to 1.5 ms of the first two. It is time of
Python and of the driver: no figure of the GPU scales it.
"""

from __future__ import annotations

PRODUCT_SECONDS = 75e-6
"""Of one that is a single launch: the kernel, or the stock operator with its count."""
RING_SECONDS = 190e-6
"""Of one whose ring has nothing to copy: 4 layers of BERT-large, 24 products all of which went that
way, took 5.1 ms. With copies it takes what one with a copy ahead does."""
RING_PART_SECONDS = 135e-6
"""Of each part that such a ring copies on a queue of its own: calls of BERT-large and ViT-huge,
4 layers each, all remote, 16 sequences, took 16.6 and 16.5 ms with 80 and 76 of them
(`models_encoders.json`)."""
IN_LINE_SECONDS = 60e-6
"""Of each part that is copied on the queue of the products. Assumed."""
COPY_SECONDS = 15e-6
"""Of each copy ahead for a product that is one launch, besides the launch."""
STAGED_SECONDS = 330e-6
"""Of a product in parts, with a single one copied ahead."""
PART_SECONDS = 15e-6
"""Of each further part."""


def ring_seconds(remote_bytes: int) -> float:
    """Of a product through a ring of its own."""
    return STAGED_SECONDS if remote_bytes else RING_SECONDS


def staged_seconds(parts: int) -> float:
    """Of a product with so many parts copied ahead."""
    return STAGED_SECONDS + (parts - 1) * PART_SECONDS

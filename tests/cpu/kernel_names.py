"""Instances of kernels by what they are compiled with, for tests of their instructions."""

from __future__ import annotations

import re

from dak_inductor.cuda_runtime.nvrtc import KernelInstance, assemble

MOST_REGISTERS = 65536 // 384 // 8 * 8
"""Of a thread, where a CTA of 384 threads is to fit an SM."""


def options(kernel: KernelInstance) -> dict[str, int | bool]:
    return dict(kernel.configuration)


def name_of(kernel: KernelInstance) -> str:
    """Numbers by their first letter, flags by their name where they are set."""
    parts = [
        name if value is True else f"{name[0]}{value}"
        for name, value in kernel.configuration
        if value is not False
    ]
    return "-".join(parts)


def barrier_names(kernel: KernelInstance) -> set[bytes]:
    """What the waits in the kernel's sources call their barriers."""
    source = assemble(kernel.name)
    texts = [source.text, *(text for _, text in source.headers)]
    found = re.findall(r'\bwait<[^;{]*?"([^"]+)"\s*\)', "\n".join(texts))
    return {name.encode() for name in found}

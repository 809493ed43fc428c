"""Every instance of the kernel that a launch may ask for, for compiling them ahead."""

from __future__ import annotations

import itertools

import torch

from dak_inductor.cuda_runtime.nvrtc import KernelInstance
from dak_inductor.lowering.linear.configuration import TOKEN_TILES, configurations
from dak_inductor.lowering.linear.problem import LinearProblem


def all_instances() -> tuple[KernelInstance, ...]:
    """Each once: tile shapes, clusters, gated or not, both layouts, both dtypes."""
    found: dict[KernelInstance, None] = {}
    flags = itertools.product((False, True), repeat=3)
    for gated, in_out, half in flags:
        dtype = torch.float16 if half else torch.bfloat16
        for tokens, cluster in itertools.product(TOKEN_TILES, (1, 2)):
            problem = LinearProblem(tokens * cluster, 4096, 4096, dtype, gated, in_out)
            for configuration in configurations(problem):
                if configuration.tokens == tokens:
                    found[configuration.kernel()] = None
    return tuple(found)

"""What a call of a graph does between its products: seconds, by the weight of the next product.

The link copies on meanwhile. In decode steps that is a fifth of the time with one sequence and more
with many, so a step planned without it looks bound by its copies where it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from dak_inductor.binding import Binding
from dak_inductor.cost_model import PRODUCTS, compute_seconds, local_bandwidth, op_floor
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.offloaded_model import PlannedCache


def seconds_between(
    binding: Binding,
    arguments: Sequence[object],
    values: Mapping[str, int],
    caches: Iterable[PlannedCache],
    profile: HardwareProfile,
) -> dict[int, list[float]]:
    """Of a call with these arguments and these `values` of the graph's symbols: by address of a
    weight, what lies ahead of each product that reads it, in their order, since the one before.

    Stock operators count as if all that they read were local; so does attention over `caches`, up
    to the context that is expected.
    """
    table = binding.table
    uses = table.uses(binding.names, graph=binding.graph, calls=1.0, values=values)
    for cache in caches:
        uses = [cache.as_expected(use) for use in uses]
    found: dict[int, list[float]] = {}
    bandwidth = local_bandwidth(profile)
    waiting, last = 0.0, ""
    for op, use in zip(table.in_order(), uses, strict=True):
        weight = arguments[op.operand] if op.operand in binding.buffers else None
        if use.kind in PRODUCTS and op.rewrite and isinstance(weight, torch.Tensor):
            found.setdefault(weight.data_ptr(), []).append(waiting)
            waiting = 0.0
            continue
        moved = (use.touched_bytes + use.other_bytes) / bandwidth
        waiting += max(moved, compute_seconds(use, profile))
        waiting += op_floor(use.kind, profile) if use.op != last else 0.0
        last = use.op  # one that reads two tensors is one kernel
    return found

"""The peers every comparison includes, each behind one small interface."""

from __future__ import annotations

from dak_inductor.benchmarks.harness.peers.accelerate_offload import AccelerateOffload
from dak_inductor.benchmarks.harness.peers.dak_backend import DakBackend
from dak_inductor.benchmarks.harness.peers.layer_prefetch import LayerPrefetch
from dak_inductor.benchmarks.harness.peers.linear_prefetch import LinearPrefetch
from dak_inductor.benchmarks.harness.peers.provider import Provider
from dak_inductor.benchmarks.harness.peers.resident import Resident
from dak_inductor.benchmarks.harness.peers.split import StockOnSplit

REFERENCE = Resident(compiled=False)
"""Its errors against fp32 are torch's own, by which the others are judged."""


def all_providers() -> dict[str, Provider]:
    """Every provider by name, the references first and `dak` last."""
    made: tuple[Provider, ...] = (
        REFERENCE,
        Resident(compiled=True),
        StockOnSplit(compiled=False),
        StockOnSplit(compiled=True),
        LinearPrefetch(compiled=False),
        LinearPrefetch(compiled=True),
        LayerPrefetch(compiled=False, charged=False),
        LayerPrefetch(compiled=True, charged=False),
        LayerPrefetch(compiled=True, charged=True),
        AccelerateOffload(),
        DakBackend("direct"),
        DakBackend("staged"),
        DakBackend(),
    )
    return {provider.name: provider for provider in made}

"""`dak.stats()`: what the operators read, by tier."""

from __future__ import annotations

from dataclasses import dataclass

from dak_inductor.cuda_runtime.tier_buffer import TierBytes
from dak_inductor.lowering import counters
from dak_inductor.lowering.counters import ReadCount
from dak_inductor.session import SESSION


@dataclass(frozen=True, slots=True)
class Stats:
    """Bytes read from tiered tensors since the last reset.

    On the simulated tier every op counts what it touches. On CUDA the stock kernels cannot count:
    the figures are the bytes of the compiled graphs' operators times their calls, by the placement
    at each call. Work outside compiled graphs is not seen there.
    """

    reads: tuple[ReadCount, ...]

    @property
    def total(self) -> TierBytes:
        """Bytes by tier, all tensors."""
        return sum((read.bytes for read in self.reads), TierBytes())

    def __str__(self) -> str:
        total = self.total
        lines = [f"read {total.local / 1e9:.3f} GB local, {total.remote / 1e9:.3f} GB remote"]
        lines += [
            f"  {read.kind:<10} {read.tensor:<60} {read.calls:>6} calls "
            f"{read.bytes.local / 1e6:>10.3f} MB local {read.bytes.remote / 1e6:>10.3f} MB remote"
            for read in self.reads
        ]
        return "\n".join(lines)


def stats(*, reset: bool = False) -> Stats:
    """Bytes read by tier and tensor since the last reset; `reset=True` starts anew afterwards."""
    SESSION.flush()
    result = Stats(counters.snapshot())
    if reset:
        counters.reset()
    return result

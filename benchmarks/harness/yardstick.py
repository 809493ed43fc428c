"""The yardstick: the least time a kernel or a step can take on ceilings measured in the same run.

    kernel:  L_direct = max(local_bytes / HBM_stream, remote_bytes / link_direct, flops / peak)
    step:    L = max(sum local / HBM_stream, sum remote / best link, sum flops / peak)

Results are reported as T / L. Absolute times are not results: machines differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this machine reaches, measured in the same run: bytes/s and flop/s.

    `link_write` is device to remote tier by copy engine. `methods` says how each was measured.
    """

    hbm_stream: float
    link_direct: float
    link_copy: float
    matmul_flops: float
    link_write: float = 0.0
    methods: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("hbm_stream", "link_direct", "link_copy", "matmul_flops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ceiling {name} must be positive, got {getattr(self, name)}")

    @property
    def best_link(self) -> float:
        """The fastest way to carry remote bytes to one card, without a relay."""
        return max(self.link_direct, self.link_copy)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "methods": dict(self.methods)}


@dataclass(frozen=True, slots=True)
class Work:
    """What must be moved and computed: bytes from each tier and floating-point operations."""

    local_bytes: float = 0.0
    remote_bytes: float = 0.0
    flops: float = 0.0

    @property
    def total_bytes(self) -> float:
        return self.local_bytes + self.remote_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.local_bytes + other.local_bytes,
            self.remote_bytes + other.remote_bytes,
            self.flops + other.flops,
        )


def direct_bound(work: Work, ceilings: Ceilings) -> float:
    """L_direct of one kernel in seconds: both memories drained at once, nothing copied first."""
    return max(
        work.local_bytes / ceilings.hbm_stream,
        work.remote_bytes / ceilings.link_direct,
        work.flops / ceilings.matmul_flops,
    )


def step_bound(parts: Iterable[Work], ceilings: Ceilings) -> float:
    """L of a step in seconds: the link may work ahead, so sums are bounded, not operators."""
    total = sum(parts, Work())
    return max(
        total.local_bytes / ceilings.hbm_stream,
        total.remote_bytes / ceilings.best_link,
        total.flops / ceilings.matmul_flops,
    )


def over_bound(seconds: float, bound: float) -> float:
    """T / L."""
    if bound <= 0:
        raise ValueError(f"a bound must be positive, got {bound}")
    return seconds / bound

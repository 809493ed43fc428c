"""Bytes of the two memories of a tiered buffer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierBytes:
    """Bytes by tier."""

    local: int = 0
    remote: int = 0

    def __add__(self, other: TierBytes) -> TierBytes:
        return TierBytes(self.local + other.local, self.remote + other.remote)

    @property
    def total(self) -> int:
        return self.local + self.remote

    @property
    def remote_share(self) -> float:
        """Share of the bytes that is remote, 0 for no bytes."""
        return self.remote / self.total if self.total else 0.0

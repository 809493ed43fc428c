"""Placement in any order of steps and failures, on the simulated tier."""

from __future__ import annotations

from hypothesis.stateful import run_state_machine_as_test

from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes

from .placement_machine import PlacementMachine
from .profiles import examples

_OPERATIONS = ("page", "write", "page", "allocate")


class SimulatedPlacement(PlacementMachine):
    """Counters of every tier that was made, whoever holds what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tiers: list[SimulatedTier] = []

    def make_tier(self) -> Tier:
        self.tiers.append(SimulatedTier(page_bytes=1024))
        return self.tiers[-1]

    def fail(self, tier: Tier, after: int) -> None:
        assert isinstance(tier, SimulatedTier)
        tier.inject_failure(_OPERATIONS[after % 4], after=after // 4)

    def heal(self, tier: Tier) -> None:
        assert isinstance(tier, SimulatedTier)
        tier._failures.clear()

    def check_tiers(self, expected: TierBytes) -> None:
        held = sum((tier.counters.held for tier in self.tiers), TierBytes())
        assert held == expected + self.kept_pages()


def test_any_order_of_steps_and_failures_loses_nothing() -> None:
    run_state_machine_as_test(SimulatedPlacement, settings=examples(30))

"""Placement in any order of steps and failures, through the real allocator."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis.stateful import run_state_machine_as_test

from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.vmm import VmmTier

from ..placement_machine import PlacementMachine
from ..profiles import examples

HOST = -1
# not those that give back: what a driver refuses to take back stays held, and is counted as held
FAILING = ("cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemcpyAsync",
           "cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuCtxPushCurrent")  # fmt: skip


def test_any_order_of_steps_and_failures_loses_nothing(fake: Any) -> None:
    class VmmPlacement(PlacementMachine):
        width = 800  # a weight lies on two pages

        def make_tier(self) -> Tier:
            return VmmTier("cpu", torch.device("cuda", 0), None)

        def fail(self, tier: Tier, after: int) -> None:
            fake.fail(FAILING[after % len(FAILING)], after // len(FAILING))

        def heal(self, tier: Tier) -> None:
            fake.heal()

        def check_tiers(self, expected: TierBytes) -> None:
            for tier in vmm._native_tiers.values():
                tier.reserve(0)
            assert vmm.drain()
            held = expected + self.kept_pages()
            assert (fake.used(0), fake.used(HOST)) == (held.local, held.remote)

    run_state_machine_as_test(VmmPlacement, settings=examples(8))

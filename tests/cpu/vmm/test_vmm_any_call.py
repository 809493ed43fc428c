"""A failure at every driver call of a model's whole life, on both kinds of remote tier: offloaded,
moved away, back and halfway, restored. Nothing is lost, nothing is left, and the next life works.

Every so many calls in CI; every one in the long profile, where that makes more than 1,000 failures.
"""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dak_inductor import hardware, placement
from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import DakError
from dak_inductor.offload import offload
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.plan import PlanProblem
from dak_inductor.planner import make_plan
from dak_inductor.restore import restore

from ..profiles import PROFILE

WIDTH = 800  # a weight lies on two pages
# not those that give back: what a driver refuses to take back stays held, and is counted as held
FAILING = ("cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemcpyAsync",
           "cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuCtxPushCurrent")  # fmt: skip
STATUSES = (1, 2, 719, 999)  # invalid value, out of memory, a launch that failed, unknown
STRIDE = 61 if PROFILE == "ci" else 1
LEAST = 20 if PROFILE == "ci" else 1000
MOST_CALLS = 1000


def go_to(record: OffloadedModel, share: float) -> None:
    asked = round(share * record.bytes_by_tier().total)
    problem = PlanProblem(record.specs(), (), asked, record.remote, model=record.fingerprint)
    placement.apply(make_plan(problem, hardware.load("h200")), record)


def live(model: nn.Module, ratio: float) -> None:
    """Offloaded, moved away, back and halfway, restored. A failure may end it at any point."""
    offload(model, offload_ratio=ratio, progress=False)
    record = record_of(model)
    assert record is not None
    go_to(record, 1.0)
    go_to(record, 0.3)
    go_to(record, 0.7)
    restore(model)


def recover(model: nn.Module, fake: Any) -> None:
    """What a user does after an error. Nothing may be left."""
    fake.heal()
    if record_of(model) is not None:
        restore(model)
    gc.collect()
    for tier in vmm._native_tiers.values():
        tier.reserve(0)
    assert vmm.drain() and vmm.live_handles() == 0 and not any(fake.leftovers().values())


@pytest.mark.timeout(1800)
def test_a_failure_at_any_call_of_a_models_life(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
    x = torch.randn(2, WIDTH)
    expected = model(x)
    monkeypatch.setattr(OffloadRequest, "resolved_device", lambda self: torch.device("cpu"))
    failures = point = 0
    for remote, ratio in itertools.product(("cpu", "cuda:1"), (0.5, 0.2)):
        tier = VmmTier(remote, torch.device("cuda", 0), None)
        monkeypatch.setattr(OffloadRequest, "open_tier", lambda *_, tier=tier: tier)
        for name in FAILING:
            before = fake.calls(name)
            live(model, ratio)
            calls = min(fake.calls(name) - before, MOST_CALLS)
            recover(model, fake)
            for after in range(calls):
                for status in STATUSES:
                    point += 1
                    if point % STRIDE:
                        continue
                    fake.fail(name, after, status)
                    try:
                        live(model, ratio)
                    except DakError as error:
                        assert "stand-in" in str(error) or name in str(error), error
                    failures += not fake.pending()
                    fake.heal()
                    assert torch.equal(model(x), expected), (remote, ratio, name, after, status)
                    recover(model, fake)
                    assert torch.equal(model(x), expected), (remote, ratio, name, after, status)
    print(f"{failures} failures of {point} possible ones injected, nothing lost")
    assert failures >= LEAST

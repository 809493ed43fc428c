"""A failure at every driver call of offloading, moving and restoring a model, and a driver that
lacks functions: nothing is lost, nothing is left."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dak_inductor import hardware, placement
from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import DakError, MoveError
from dak_inductor.offload import offload
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import record_of
from dak_inductor.plan import PlanProblem
from dak_inductor.planner import make_plan
from dak_inductor.restore import restore

WIDTH = 800
# not those that give back: what a driver refuses to take back stays held, and is counted as held
MOVING = ("cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemcpyAsync",
          "cuStreamSynchronize", "cuCtxPushCurrent")  # fmt: skip
MOST_CALLS = 400


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    monkeypatch.setattr(OffloadRequest, "resolved_device", lambda self: torch.device("cpu"))
    monkeypatch.setattr(
        OffloadRequest, "open_tier", lambda *_: VmmTier("cpu", torch.device("cuda", 0), None)
    )
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))


def nothing_left(fake: Any) -> None:
    gc.collect()
    for tier in vmm._native_tiers.values():
        tier.reserve(0)
    assert vmm.drain() and vmm.live_handles() == 0 and not any(fake.leftovers().values())


@pytest.mark.parametrize("status", [1, 2, 999])
def test_a_failure_at_any_call_of_an_offload_is_undone(
    model: nn.Sequential, fake: Any, status: int
) -> None:
    x = torch.randn(2, WIDTH)
    expected = model(x)
    failures = 0
    for after in range(MOST_CALLS):
        fake.fail("*", after, status)
        try:
            offload(model, offload_ratio=0.5)
        except DakError:
            failures += 1
        pending = fake.pending()
        fake.heal()
        assert torch.equal(model(x), expected)
        if record_of(model) is not None:
            restore(model)
        nothing_left(fake)
        if pending:
            break
    else:
        pytest.fail("the failures never ran out of calls")
    assert failures >= 20


@pytest.mark.parametrize("name", MOVING)
def test_a_failure_at_any_call_of_a_plans_moves_keeps_all_of_the_old_placement(
    model: nn.Sequential, fake: Any, name: str
) -> None:
    x = torch.randn(2, WIDTH)
    expected = model(x)
    for after in range(MOST_CALLS):
        offload(model, offload_ratio=0.5)
        record = record_of(model)
        assert record is not None
        before = [weight.buffer.split for weight in record.weights.values()]
        total = record.bytes_by_tier().total
        problem = PlanProblem(record.specs(), (), total, "cpu", model=record.fingerprint)
        plan = make_plan(problem, hardware.load("h200"))
        fake.fail(name, after)
        try:
            placement.apply(plan, record)
        except MoveError:
            assert [weight.buffer.split for weight in record.weights.values()] == before
        pending = fake.pending()
        fake.heal()
        assert torch.equal(model(x), expected)
        placement.apply(plan, record)
        assert record.bytes_by_tier().local == 0 and torch.equal(model(x), expected)
        restore(model)
        del record
        nothing_left(fake)
        if pending:
            break
    else:
        pytest.fail("the failures never ran out of calls")
    assert after >= 1  # some failures are recovered from: pages not made ahead are made in the move


NEEDED = ("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemAddressReserve", "cuMemUnmap",
          "cuMemRelease", "cuMemAddressFree", "cuEventDestroy", "cuCtxPushCurrent",
          "cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode",
          "cuStreamSynchronize")  # fmt: skip


def test_a_driver_without_a_function_is_refused_by_name(fake_library: Path) -> None:
    """Also what only destructors call: from there an error would end the process."""
    program = """
import os, sys, torch
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import DriverError

def named(name):
    os.environ["DAK_FAKE_MISSING"] = name
    try:
        buffer = VmmTier("cpu", torch.device("cuda", 0), None).allocate(5 << 20, split=1 << 20)
        buffer.write(torch.zeros(5 << 20, dtype=torch.uint8))
    except DriverError as error:
        return name in str(error)
    return False

for name in sys.argv[1:]:
    child = os.fork()  # before anything opens the driver
    if not child:
        os._exit(0 if named(name) else 1)
    status = os.waitpid(child, 0)[1]
    print(name, os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *NEEDED],
        env={**os.environ, "DAK_LIBCUDA": str(fake_library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [f"{name} 0" for name in NEEDED], done.stderr

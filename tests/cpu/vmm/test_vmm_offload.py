"""`offload`, moves and `restore` on the real allocator with the stand-in driver."""

from __future__ import annotations

import gc

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
from dak_inductor.plan import PlanProblem
from dak_inductor.planner import make_plan
from dak_inductor.restore import restore

PAGE = 2 << 20
WIDTH = 1024  # a layer is two pages


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """Layers, and `offload` made to take the CPU for the device that the stand-in plays."""
    monkeypatch.setattr(OffloadRequest, "resolved_device", lambda self: torch.device("cpu"))
    monkeypatch.setattr(
        OffloadRequest,
        "open_tier",
        lambda self, device: VmmTier("cpu", torch.device("cuda", 0), self.host_memory),
    )
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))


def test_a_model_goes_in_moves_and_comes_out(model: nn.Sequential, fake) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, WIDTH)
    expected = model(x)
    total = 3 * WIDTH * WIDTH * 4
    offload(model, gpu_memory=8 << 20)
    record = record_of(model)
    assert record is not None
    assert record.physical_bytes().local <= 8 << 20
    assert record.bytes_by_tier().total == total
    assert torch.equal(model(x), expected)
    specs = record.specs()
    problem = PlanProblem(specs, (), total, "cpu", model=record.fingerprint)
    report = placement.apply(make_plan(problem, hardware.load("h200")), record)
    assert record.bytes_by_tier().local == 0 and report.bytes_to_remote > 0
    assert torch.equal(model(x), expected)
    restore(model)
    assert torch.equal(model(x), expected)
    del record
    gc.collect()
    assert vmm.drain() and vmm.live_handles() == 0


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_failing_driver_call_is_undone(model: nn.Sequential, fake, after: int) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, WIDTH)
    expected = model(x)
    fake.fail("cuMemMap", after=after, status=2)
    with pytest.raises(DakError):
        offload(model, offload_ratio=0.5)
    fake.heal()
    assert record_of(model) is None and torch.equal(model(x), expected)
    gc.collect()
    assert vmm.drain()
    offload(model, offload_ratio=0.5)
    assert torch.equal(model(x), expected)
    restore(model)

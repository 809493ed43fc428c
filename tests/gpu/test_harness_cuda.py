"""The benchmark harness on a card: ceilings really read, peers right inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from dak_inductor.benchmarks.harness import ceilings
from dak_inductor.benchmarks.harness.comparison import compare, make_reference
from dak_inductor.benchmarks.harness.memory import device_bytes_used
from dak_inductor.benchmarks.harness.models import Shape, Workload
from dak_inductor.benchmarks.harness.peers import all_providers
from dak_inductor.benchmarks.harness.peers.provider import Setting
from dak_inductor.benchmarks.harness.timing import TimingRule, capture
from dak_inductor.benchmarks.harness.yardstick import Ceilings

RULE = TimingRule(target_seconds=0.03)
SMALL = Shape(layers=4, hidden=1024, heads=8, kv_heads=2, head_dim=128, intermediate=2816)
CEILINGS = Ceilings(hbm_stream=4.6e12, link_direct=5e10, link_copy=5e10, matmul_flops=8e14)


@pytest.mark.parametrize("name", list(all_providers()))
def test_provider_is_accurate_in_a_graph(device: torch.device, remote: str, name: str) -> None:
    if name.startswith("accelerate"):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    provider = all_providers()[name]
    setting = Setting(Workload(shape=SMALL, context=64), device, 0.25, remote)
    row = compare(provider, setting, make_reference(setting), CEILINGS, RULE)
    if name.startswith("accelerate") and remote != "cpu":
        assert row["status"] == "unavailable"
        return
    assert row["status"] == "ok", row.get("traceback") or row.get("reason")
    wanted = {"reference": 0.0}.get(provider.kind, 0.75 if "charged" in name else 0.25)
    assert float(str(row["realised"])) == pytest.approx(wanted, abs=0.02)


@pytest.mark.alone
def test_ceilings_are_measured_and_in_order(device: torch.device, remote: str) -> None:
    found = ceilings.measure(device, remote, TimingRule(target_seconds=0.1))
    assert found.hbm_stream > found.best_link > 1e9
    assert found.matmul_flops > 1e14
    methods = dict(found.methods)
    assert "not measured" not in methods["hbm_stream"], methods
    assert "not measured" not in methods["link_direct"], methods


def test_a_captured_step_replays_on_new_inputs(device: torch.device) -> None:
    x = torch.randn(1000, device=device)
    step = capture(lambda: x * 2)
    x.copy_(torch.randn(1000, device=device))
    output = step()
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output, x * 2)


@pytest.mark.alone
def test_driver_counts_what_is_allocated(device: torch.device) -> None:
    torch.cuda.synchronize()
    before = device_bytes_used(device.index)
    block = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    assert device_bytes_used(device.index) - before >= block.nbytes

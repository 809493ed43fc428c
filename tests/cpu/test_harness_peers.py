"""Every peer of the benchmarks on a tiny model: right, and as much remote as asked."""

from __future__ import annotations

import pytest
import torch

from dak_inductor.benchmarks.harness.comparison import compare, make_reference
from dak_inductor.benchmarks.harness.models import (
    LINEAR_NAMES,
    TINY,
    DecoderBlocks,
    StepInputs,
    Workload,
)
from dak_inductor.benchmarks.harness.peers import all_providers
from dak_inductor.benchmarks.harness.peers.layer_prefetch import (
    RemotePiece,
    charged_remote_bytes,
    remote_pieces,
)
from dak_inductor.benchmarks.harness.peers.provider import (
    Kind,
    Prepared,
    Provider,
    ProviderUnavailable,
    Setting,
)
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.yardstick import Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(hbm_stream=1e10, link_direct=1e9, link_copy=1e9, matmul_flops=1e10)
RULE = TimingRule(target_seconds=0.003, repeats=3, warmup=1)
WORKLOAD = Workload(shape=TINY, context=16)
COMPILED = {name for name in all_providers() if "inductor" in name}
COMPILED_HERE = ("split inductor", "layer prefetch charged inductor")  # all of them on a card


def run(provider: Provider, fraction: float = 0.375) -> dict[str, object]:
    setting = Setting(WORKLOAD, CPU, fraction, "simulated")
    return compare(provider, setting, make_reference(setting), CEILINGS, RULE)


@pytest.mark.parametrize("name", [n for n in all_providers() if n not in COMPILED])
def test_provider_is_accurate_at_the_fraction_asked_for(name: str) -> None:
    provider = all_providers()[name]
    row = run(provider)
    if name.startswith("accelerate"):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    assert row["status"] == "ok", row.get("traceback") or row.get("reason")
    realised = float(str(row["realised"]))
    if provider.kind == "reference":
        assert realised == 0
    elif name.startswith("accelerate"):
        assert realised == pytest.approx(0.5, abs=0.01)  # whole layers: 2 of 4
    else:
        assert realised == pytest.approx(0.375, abs=0.01)
        assert int(str(row["device_bytes"])) < WORKLOAD.linear_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_HERE)
def test_compiled_provider_is_accurate(name: str) -> None:
    row = run(all_providers()[name])
    assert row["status"] == "ok", row.get("traceback") or row.get("reason")
    if "charged" in name:  # room for two of four layers is taken by the slots
        assert float(str(row["realised"])) == pytest.approx(0.375 + 0.5, abs=0.01)


def test_charged_slots_that_do_not_fit_are_said_so() -> None:
    row = run(all_providers()["layer prefetch charged inductor"], fraction=0.75)
    assert row["status"] == "unavailable"
    assert "two slots" in str(row["reason"])
    assert charged_remote_bytes(800, 100, 0.5) == 600
    assert charged_remote_bytes(800, 100, 0.0) == 0
    with pytest.raises(ProviderUnavailable):
        charged_remote_bytes(800, 100, 0.8)


def test_remote_pieces_are_spread_and_exact() -> None:
    model = WORKLOAD.build(torch.device("meta"))
    layer = WORKLOAD.linear_bytes // TINY.layers
    assert remote_pieces(model, 0) == []
    two = remote_pieces(model, 2 * layer)
    assert sorted({piece.layer for piece in two}) == [1, 3]
    assert [piece.name for piece in two[: len(LINEAR_NAMES)]] == list(LINEAR_NAMES)
    some = remote_pieces(model, layer + layer // 2)
    assert sorted({piece.layer for piece in some}) == [1, 3]
    shapes = TINY.linear_shapes()
    nbytes = sum(piece.rows * shapes[piece.name][1] * 2 for piece in some)
    assert nbytes == pytest.approx(1.5 * layer, abs=2 * max(c for _, c in shapes.values()))
    assert some[0].name != "q"  # the partial layer gives its end
    assert isinstance(some[0], RemotePiece)


class _Broken(Provider):
    """A provider that writes nothing, or raises."""

    name = "broken"
    kind: Kind = "real peer"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def prepare(self, model: DecoderBlocks, inputs: StepInputs, setting: Setting) -> Prepared:
        if self.error is not None:
            raise self.error
        output = model(*inputs.arguments())
        return Prepared(lambda: output, remote_bytes=1, device_bytes=1)


def test_a_step_that_writes_nothing_is_inaccurate() -> None:
    row = run(_Broken())
    assert row["status"] == "inaccurate"
    assert row["accurate"] is False


def test_a_failing_provider_is_a_row_with_its_reason() -> None:
    row = run(_Broken(RuntimeError("no such kernel")))
    assert row["status"] == "failed"
    assert row["reason"] == "RuntimeError: no such kernel"
    row = run(_Broken(ProviderUnavailable("not here")))
    assert (row["status"], row["reason"]) == ("unavailable", "not here")

"""The tail of the linear kernel's local line, on weights so small that it has to be forced.

Pieces are claimed at run time, so what is looked at is that nothing depends on who claimed them:
every byte is read once, sums have the same bits, and the next launch finds its words at zero.
"""

from __future__ import annotations

import pytest
import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter
from dak_inductor.benchmarks.harness.linear_case import CallSpec, LinearCase, make_case
from dak_inductor.benchmarks.harness.linear_reference import make_reference
from dak_inductor.benchmarks.harness.timing import capture
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.lowering.linear import tail

pytestmark = pytest.mark.usefixtures("compiled_kernels")

N, K = 3080, 4104
NBYTES = N * K * 2
TOKENS = (1, 8, 16, 17, 64, 128)
PIECE_STEPS = {"short": 2, "usual": 8, "whole tiles": 1 << 10}


@pytest.fixture(params=PIECE_STEPS)
def forced_tail(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A third of the local tiles, however few pieces that makes."""
    monkeypatch.setattr(tail, "SHARE", 1 / 3)
    monkeypatch.setattr(tail, "PIECES_OF_WORKER", 0.0)
    monkeypatch.setattr(tail, "PIECE_COST", 0.0)
    monkeypatch.setattr(tail, "ADDED_BYTES", 1 << 30)
    monkeypatch.setattr(tail, "PIECE_BYTES", PIECE_STEPS[request.param] * 128 * 128)
    return str(request.param)


def cases(tier: Tier, device: torch.device, m: int, fraction: float) -> list[LinearCase]:
    split = NBYTES - int(NBYTES * fraction)
    gated = CallSpec(
        m, N, K, operator="gated_linear", gating="separate", activation="silu", splits=(split,)
    )
    return [make_case(spec, tier, device) for spec in (CallSpec(m, N, K, splits=(split,)), gated)]


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.3])
def test_every_launch_is_right_and_gives_the_same_bits(
    tier: Tier, device: torch.device, forced_tail: str, fraction: float
) -> None:
    for m in TOKENS:
        for case in cases(tier, device, m, fraction):
            what = f"M={m}, {case.problem.operator}, {forced_tail}"
            first = case.run().clone()
            verdict = make_reference(case.resident).judge(first)
            assert verdict.passed, f"{what}: {verdict}"
            others = [case.run() for _ in range(30)]  # back to back: launches overlap
            assert all(torch.equal(first, other) for other in others), what


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_every_byte_is_read_once(
    tier: Tier, device: torch.device, forced_tail: str, fraction: float
) -> None:
    for m in TOKENS:
        for case in cases(tier, device, m, fraction):
            counter = ReadCounter(case.buffers)
            torch.cuda.synchronize()
            counter.reset()
            for _ in range(3):
                case.run()
            torch.cuda.synchronize()
            reads, held = counter.read(), case.bytes_by_tier
            assert reads is not None and reads.local_bytes + reads.remote_bytes == 3 * (
                held.local + held.remote
            ), f"M={m}, {case.problem.operator}, {forced_tail}"


def test_replays_of_a_graph_give_the_same_bits(
    tier: Tier, device: torch.device, forced_tail: str
) -> None:
    case, gated = cases(tier, device, 16, 0.02)
    expected = (case.run().clone(), gated.run().clone())
    step = capture(lambda: (case.run(), gated.run(), case.run(), gated.run()))
    for _ in range(20):
        outputs = step()
        torch.cuda.synchronize()
        assert isinstance(outputs, tuple)
        for found, wanted in zip(outputs, expected * 2, strict=True):
            assert torch.equal(found, wanted), forced_tail

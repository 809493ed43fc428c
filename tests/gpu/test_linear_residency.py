"""Linear kernels and where the bytes are: moved splits, captured graphs, counts and the window."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
from dak_inductor.benchmarks.harness.accuracy import poison
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter, count_runs
from dak_inductor.benchmarks.harness.linear_case import (
    CallSpec,
    LinearCase,
    make_case,
    split_bytes,
)
from dak_inductor.benchmarks.harness.linear_reference import make_reference
from dak_inductor.benchmarks.harness.timing import CapturedStep, capture
from dak_inductor.cuda_runtime.device_records import RecordCounters
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.window import Window
from dak_inductor.lowering.linear import ways

pytestmark = pytest.mark.usefixtures("compiled_kernels")

N, K = 3072, 4096
NBYTES = N * K * 2
DECODE = (1, 2, 8, 16, 17, 33, 64, 128)
PREFILL = (129, 256, 1000, 2048, 4096)
PAST_CLUSTERS = (4097, 8192)
LARGEST_STAGE = 256 * 128
"""Bytes of weights in a stage; a window below it lets one through at a time."""


@pytest.fixture(autouse=True)
def _no_ring_within_reach_of_clusters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel is what these tests look at, also where the ring would be faster."""
    monkeypatch.setattr(ways, "prefers_ring", lambda *_: False)
    ways.ways_of.cache_clear()
    yield
    ways.ways_of.cache_clear()


def case_of(
    tier: Tier, device: torch.device, m: int, split: int, *, n: int = N, k: int = K
) -> LinearCase:
    return make_case(CallSpec(m, n, k, splits=(split,)), tier, device)


def counted(case: LinearCase, calls: int = 1) -> RecordCounters:
    """What `calls` runs of a case count."""
    reads = count_runs(case.run, case.buffers, calls)
    assert reads.calls == calls, f"not the kernel's: {reads}"
    return reads


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.77, 1.0])
def test_decode_counts_every_byte_once(tier: Tier, device: torch.device, fraction: float) -> None:
    for m in DECODE:
        case = case_of(tier, device, m, NBYTES - int(NBYTES * fraction))
        held, reads = case.bytes_by_tier, counted(case, 3)
        assert reads.remote_bytes == 3 * held.remote, f"M={m}"
        assert reads.local_bytes == 3 * held.local, f"M={m}"


@pytest.mark.parametrize("fraction", [0.02, 0.3, 1.0])
def test_prefill_crosses_the_link_once(tier: Tier, device: torch.device, fraction: float) -> None:
    for m in PREFILL:
        case = case_of(tier, device, m, NBYTES - int(NBYTES * fraction))
        held, reads = case.bytes_by_tier, counted(case)
        assert held.remote <= reads.remote_bytes <= 1.05 * held.remote, f"M={m}"


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_past_the_clusters_it_crosses_the_link_once(
    tier: Tier, device: torch.device, fraction: float
) -> None:
    for m in PAST_CLUSTERS:
        case = case_of(tier, device, m, NBYTES - int(NBYTES * fraction))
        verdict = case.check()
        assert verdict.passed, f"M={m}: {verdict}"
        held, reads = case.bytes_by_tier, counted(case)
        assert held.remote <= reads.remote_bytes <= 1.05 * held.remote, f"M={m}"


def test_a_split_moves_between_replays_of_one_graph(tier: Tier, device: torch.device) -> None:
    for m in (1, 17, 128, 300, 4097):
        case = case_of(tier, device, m, NBYTES // 2)
        (buffer,) = case.buffers
        reference = make_reference(case.resident)
        step = capture(case.run)
        counter = ReadCounter(case.buffers)
        seen = set()
        for wanted in (NBYTES // 2, 0, NBYTES, NBYTES // 3, NBYTES - (2 << 20), NBYTES // 2):
            torch.cuda.synchronize()
            split = buffer.move(wanted)
            seen.add(split)
            poison(step.output)
            counter.reset()
            output = step()
            torch.cuda.synchronize()
            assert isinstance(output, torch.Tensor)
            verdict = reference.judge(output)
            assert verdict.passed, f"M={m}, split {split}: {verdict}"
            reads, held = counter.read(), case.bytes_by_tier
            assert reads is not None and (reads.calls == 1 or m in PAST_CLUSTERS)
            if m not in PAST_CLUSTERS:
                assert held.remote <= reads.remote_bytes <= 1.05 * held.remote, (
                    f"M={m}, split {split}"
                )
        assert len(seen) >= 5


def test_two_graphs_replay_at_once_on_two_streams(tier: Tier, device: torch.device) -> None:
    for first_m, second_m in ((1, 1), (16, 300), (300, 2048), (128, 4097)):
        cases = [
            case_of(tier, device, first_m, NBYTES * 3 // 4),
            case_of(tier, device, second_m, NBYTES // 3, n=2056),
        ]
        references = [make_reference(case.resident) for case in cases]
        streams = [torch.cuda.Stream() for _ in cases]
        steps: list[CapturedStep] = []
        for case, stream in zip(cases, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                steps.append(capture(case.run))
        for step in steps:
            poison(step.output)
        torch.cuda.synchronize()
        for _ in range(20):
            for step, stream in zip(steps, streams, strict=True):
                with torch.cuda.stream(stream):
                    step()
        torch.cuda.synchronize()
        for step, reference in zip(steps, references, strict=True):
            assert isinstance(step.output, torch.Tensor)
            verdict = reference.judge(step.output)
            assert verdict.passed, f"M={first_m} beside M={second_m}: {verdict}"


def test_one_split_gives_the_same_bits(tier: Tier, device: torch.device) -> None:
    """Partial tiles are added in a fixed order, whoever computed them."""
    for m in (1, 16, 33, 128, 300, 2048):
        for name in ("all local", "all remote", "in a row", "last bytes"):
            case = case_of(tier, device, m, split_bytes(name, N, K * 2))
            first = case.run()
            step = capture(case.run)
            for attempt in range(10):
                poison(step.output)
                again = step() if attempt % 2 else case.run()
                assert isinstance(again, torch.Tensor)
                assert torch.equal(first, again), f"M={m}, {name}, attempt {attempt}"


def test_bytes_in_flight_stay_within_the_window(
    tier: Tier, device: torch.device, window: Window
) -> None:
    usual = window.nbytes
    for m in (1, 16, 128, 300, 2048):
        for fraction in (0.05, 1.0):
            case = case_of(tier, device, m, NBYTES - int(NBYTES * fraction))
            reference = make_reference(case.resident)
            step = capture(case.run)
            counter = ReadCounter(case.buffers)
            for nbytes in (usual, 1, 50_000, 200_000, usual, 8 << 20):
                torch.cuda.synchronize()
                window.set(nbytes)
                poison(step.output)
                counter.reset()
                output = step()
                torch.cuda.synchronize()
                what = f"M={m}, {fraction:.0%} remote, window {nbytes}"
                assert isinstance(output, torch.Tensor)
                assert reference.judge(output).passed, what
                reads = counter.read()
                assert reads is not None and reads.calls == 1, what
                assert 0 < reads.peak_window <= max(nbytes, LARGEST_STAGE), what

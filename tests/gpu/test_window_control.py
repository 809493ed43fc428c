"""Windows that kernels change: right results meanwhile, found from wrong starts, with a history."""

from __future__ import annotations

import itertools

import pytest
import torch

import dak_inductor as dak
import dak_inductor.lowering.ops
from dak_inductor.benchmarks.harness.accuracy import poison
from dak_inductor.benchmarks.harness.linear_case import CallSpec, LinearCase, make_case
from dak_inductor.benchmarks.harness.linear_reference import make_reference
from dak_inductor.benchmarks.harness.timing import CapturedStep, capture
from dak_inductor.benchmarks.harness.window_case import wide_limits
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.window import Window

# what others do on the card or the link is in the delays
pytestmark = [pytest.mark.usefixtures("compiled_kernels"), pytest.mark.alone]

N, K, M = 8192, 8192, 16
NBYTES = N * K * 2
# over NVLink launches see too few delays (docs/limits.md)
on_the_host_link = pytest.mark.parametrize("remote", ["cpu"], indirect=True)
LAUNCHES = 60


def case_of(tier: Tier, device: torch.device, remote_bytes: int) -> LinearCase:
    return make_case(CallSpec(M, N, K, splits=(NBYTES - remote_bytes,)), tier, device)


def remote_bytes(window: Window) -> int:
    """A tenth of a millisecond of the link, at most half of the weight."""
    return min(round(1e-4 * window.link.direct_bandwidth) // 256 * 256, NBYTES // 2)


def captured(case: LinearCase, window: Window) -> CapturedStep:
    """Under control, with room for the readers of the largest window."""
    window.set_automatic(16 * window.link.window_knee, limits=wide_limits(window))
    return capture(case.run)


@on_the_host_link
@pytest.mark.parametrize("start", ["below the floor", "above the knee"])
def test_a_window_is_found_from_a_wrong_start(
    tier: Tier, device: torch.device, window: Window, start: str
) -> None:
    case = case_of(tier, device, remote_bytes(window))
    step = captured(case, window)
    floor, knee = window.link.window_floor, window.link.window_knee
    first = floor // 4 if start == "below the floor" else 16 * knee
    window.set_automatic(first, limits=wide_limits(window))
    for _ in range(LAUNCHES):
        step()
    torch.cuda.synchronize()
    history = window.history()
    assert history.updates >= LAUNCHES // 4, "launches report what they see"
    assert 1 <= len(history.changes) <= 20, "it does not swing"
    assert window.nbytes >= floor // 2, [str(each) for each in history.changes]
    # over NVLink launches never have the knee in flight: nothing says that a window is too large
    unused = max(each.in_flight for each in history.changes) <= knee
    assert window.nbytes <= 2 * knee or unused, [str(each) for each in history.changes]
    for before, after in itertools.pairwise(history.changes):
        assert before.seconds <= after.seconds and before.update < after.update
        assert 0 < after.least_delay <= after.delay
    assert history in dak.stats().windows
    assert "automatic" in str(dak.stats())


def test_results_are_right_while_the_window_changes(
    tier: Tier, device: torch.device, window: Window
) -> None:
    """A launch divides its work by the window that it finds: all its CTAs must find the same."""
    knee = window.link.window_knee
    for remote in (remote_bytes(window), NBYTES // 8, NBYTES):
        case = case_of(tier, device, remote)
        reference = make_reference(case.resident)
        step = captured(case, window)
        seen = set()
        for start in (16 * 1024, 64 * 1024, knee, 16 * knee):
            torch.cuda.synchronize()
            window.set_automatic(start, limits=wide_limits(window))
            for _ in range(12):
                poison(step.output)
                output = step()
                assert isinstance(output, torch.Tensor)
                verdict = reference.judge(output)
                assert verdict.passed, f"{remote} bytes remote, from {start}: {verdict}"
                seen.add(window.nbytes)
        assert len(seen) > 2


def test_launches_that_overlap_agree_on_their_windows(
    tier: Tier, device: torch.device, window: Window
) -> None:
    """Products in one graph start before those ahead of them have ended, and the window changes."""
    first, second = case_of(tier, device, NBYTES // 16), case_of(tier, device, NBYTES // 4)
    references = [make_reference(case.resident) for case in (first, second)]
    window.set_automatic(16 * window.link.window_knee, limits=wide_limits(window))
    step = capture(lambda: [case.run() for _ in range(8) for case in (first, second)])
    for start in (16 * 1024, 16 * window.link.window_knee) * 3:
        torch.cuda.synchronize()
        window.set_automatic(start, limits=wide_limits(window))
        assert isinstance(step.output, list)
        for output in step.output:
            poison(output)
        step()
        step()
        for index, output in enumerate(step.output):
            verdict = references[index % 2].judge(output)
            assert verdict.passed, f"product {index} from {start}: {verdict}"
    assert window.history().updates > 0


def test_a_fixed_window_stays(tier: Tier, device: torch.device, window: Window) -> None:
    case = case_of(tier, device, remote_bytes(window))
    fixed = window.link.window_floor
    window.set(fixed)
    step = capture(case.run)
    for _ in range(LAUNCHES):
        step()
    torch.cuda.synchronize()
    assert window.nbytes == fixed
    history = window.history()
    assert not history.automatic and history.updates == 0 and history.changes == ()


def test_a_graph_captured_under_a_fixed_window_keeps_to_the_host_s(
    tier: Tier, device: torch.device, window: Window
) -> None:
    case = case_of(tier, device, remote_bytes(window))
    window.set(64 * 1024)
    step = capture(case.run)
    window.set("auto")
    dak.stats(reset=True)
    for _ in range(LAUNCHES):
        step()
    assert 0 < dak.stats().peak_window <= 64 * 1024
    assert window.history().updates == 0


@on_the_host_link
def test_control_can_be_switched_off_and_on_under_a_graph(
    tier: Tier, device: torch.device, window: Window
) -> None:
    case = case_of(tier, device, remote_bytes(window))
    step = captured(case, window)
    window.set_automatic(limits=wide_limits(window))
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    window.set(64 * 1024)
    dak.stats(reset=True)
    for _ in range(10):
        step()
    assert 0 < dak.stats().peak_window <= 64 * 1024
    window.set("auto")
    for _ in range(LAUNCHES):
        step()
    torch.cuda.synchronize()
    assert window.automatic and window.nbytes > 64 * 1024

"""Trials on the GPU: values by every way, counts of a first call, captures, choices that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter, count_runs
from dak_inductor.benchmarks.harness.linear_case import CallSpec, LinearCase, make_case
from dak_inductor.benchmarks.harness.linear_reference import make_reference
from dak_inductor.benchmarks.harness.timing import capture
from dak_inductor.cuda_runtime.device_records import RecordCounters
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.lowering.choices import LEAST_GAIN
from dak_inductor.lowering.linear import dispatch, stopwatch
from dak_inductor.lowering.linear.trials import OVERLAP_SECONDS, Trials

pytestmark = pytest.mark.usefixtures("compiled_kernels")

N, K = 3072, 4096
NBYTES = N * K * 2
TOKENS = (1, 8, 17, 128, 129, 300, 512, 513, 2048)


class Net(torch.nn.Module):
    """A product that is compiled as part of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.product = torch.nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    """Choices of this test alone, made by measurement."""
    made = Trials()
    made.switch(True)
    monkeypatch.setattr(dispatch, "TRIALS", made)
    return made


@pytest.fixture
def win(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Lets the way at a position win, after runs as in a real trial."""
    position = 0
    real = stopwatch.seconds_of

    def seconds_of(
        runs: Sequence[Callable[[], object]], device: torch.device, *, in_graph: bool
    ) -> tuple[float, ...]:
        assert all(seconds > 0 for seconds in real(runs, device, in_graph=in_graph))
        return tuple(1.0 if index == position else 2.0 for index in range(len(runs)))

    def choose(wanted: int) -> None:
        nonlocal position
        position = wanted

    monkeypatch.setattr(stopwatch, "seconds_of", seconds_of)
    yield choose


def case_of(tier: Tier, device: torch.device, m: int, share: float, **more: object) -> LinearCase:
    split = NBYTES - int(NBYTES * share)
    return make_case(CallSpec(m, N, K, splits=(split,), **more), tier, device)  # type: ignore[arg-type]


def counted(case: LinearCase, calls: int = 1) -> RecordCounters:
    return count_runs(case.run, case.buffers, calls)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_whichever_way_wins_the_result_is_right(
    tier: Tier, device: torch.device, share: float, win: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    served: dict[int, set[str]] = {m: set() for m in TOKENS}
    for position in range(3):
        made = Trials()
        made.switch(True)
        monkeypatch.setattr(dispatch, "TRIALS", made)
        win(position)
        for m in TOKENS:
            case = case_of(tier, device, m, share)
            for attempt in ("trial", "later"):
                verdict = case.check()
                assert verdict.passed, f"M={m}, way {position}, {attempt} call: {verdict}"
        for trial in made.results():
            served[trial.call.problem.m].add(trial.chosen)
    assert served[1] == {"direct", "stock"} and served[2048] <= {"direct", "ring"}


@pytest.mark.parametrize("gated", [False, True])
def test_epilogues(
    host_tier: Tier, device: torch.device, win: Callable[[int], None], gated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    epilogue: dict[str, object] = {"operator": "linear_epilogue", "residual": True}
    if gated:
        epilogue = {"operator": "gated_linear", "gating": "fused"}
    for position in range(3):
        made = Trials()
        made.switch(True)
        monkeypatch.setattr(dispatch, "TRIALS", made)
        win(position)
        for m in (1, 300):
            case = case_of(host_tier, device, m, 0.1, activation="silu", bias=True, **epilogue)
            before = counted(case)
            assert before.calls == counted(case).calls, "the first call, a trial, counts as one"
            verdict = case.check()
            assert verdict.passed, f"M={m}, way {position}: {verdict}"


def test_a_first_call_counts_as_one(tier: Tier, device: torch.device, trials: Trials) -> None:
    for m in (1, 128, 300, 2048):
        case = case_of(tier, device, m, 0.02)
        first, later = counted(case), counted(case)
        assert first.calls == later.calls == 1, f"M={m}"
        assert first == later, f"M={m}"
        assert first.local_bytes + first.remote_bytes >= NBYTES
    assert trials.results()


def test_counts_of_earlier_calls_survive_a_trial(
    host_tier: Tier, device: torch.device, trials: Trials
) -> None:
    case = case_of(host_tier, device, 1, 0.02)
    trials.switch(False)
    once = counted(case)
    counter = ReadCounter(case.buffers)
    torch.cuda.synchronize()
    counter.reset()
    case.run()
    trials.switch(True)
    case.run()
    torch.cuda.synchronize()
    reads = counter.read()
    assert reads is not None and reads.calls == 2 and len(trials.results()) == 1
    assert reads.remote_bytes == 2 * once.remote_bytes
    assert reads.peak_window == once.peak_window


def test_a_capture_without_warm_up_works_and_a_later_call_measures(
    tier: Tier, device: torch.device, trials: Trials
) -> None:
    for m in (1, 300):
        case = case_of(tier, device, m, 0.05)
        reference = make_reference(case.resident)
        before = len(trials.results())
        step = capture(case.run, warmup=0)
        assert len(trials.results()) == before, "nothing is measured while a graph is captured"
        for _ in range(3):
            output = step()
            assert isinstance(output, torch.Tensor) and reference.judge(output).passed
        assert reference.judge(case.run()).passed
        assert len(trials.results()) == before + 1
        output = step()
        assert isinstance(output, torch.Tensor) and reference.judge(output).passed


def test_a_choice_stays(tier: Tier, device: torch.device, trials: Trials) -> None:
    cases = [case_of(tier, device, m, 0.01) for m in (1, 128, 300)]
    for case in cases:
        case.run()
    measured = trials.results()
    for _ in range(5):
        for case in cases:
            case.run()
    assert trials.results() == measured
    for trial in measured:
        costs = dict(trial.seconds)  # in a step
        for name in costs.keys() - {"direct"}:
            costs[name] += OVERLAP_SECONDS
        least = min(costs.values())
        assert (1 - LEAST_GAIN) * costs[trial.chosen] <= least, trial


@pytest.mark.alone
def test_a_trial_leaves_no_memory_and_is_short(
    host_tier: Tier, device: torch.device, trials: Trials
) -> None:
    case = case_of(host_tier, device, 1, 0.01)
    trials.switch(False)
    case.run()
    torch.nn.functional.linear(case.tiered.x, case.tiered.weights[0])  # takes a workspace for good
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    trials.switch(True)
    case.run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held and len(trials.results()) == 1
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other = case_of(host_tier, device, 1, 0.1)  # another kind, with all kernels loaded
    start.record()
    other.run()
    stop.record()
    stop.synchronize()
    assert start.elapsed_time(stop) < 100


def test_a_compiled_step_with_cuda_graphs_measures_at_its_first_call(
    device: torch.device, trials: Trials
) -> None:
    import dak_inductor as dak

    # torch 2.11 does not compile a bare module of torch's own by its method `compile`
    model = Net().to(device)
    x = torch.randn(4, 4096, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        expected = model(x)
    dak.offload(model, offload_ratio=0.1)
    model.compile(backend="dak", options={"mode": "reduce-overhead", "trials": True})
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert len(trials.results()) >= 1
    dak.restore(model)

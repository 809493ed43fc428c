"""The staged path on the GPU: values, captured graphs, moved splits, streams, memory and counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.accuracy import poison
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter
from dak_inductor.benchmarks.harness.linear_case import CallSpec, LinearCase, make_case, split_bytes
from dak_inductor.benchmarks.harness.linear_reference import make_reference, poison_free_memory
from dak_inductor.benchmarks.harness.timing import capture
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.lowering.linear import ring, ring_plan

TOKENS = (129, 512, 4097, 8192)
N, K = 3072, 4096
NBYTES = N * K * 2
LAYOUTS = ("out_in", "in_out")
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=["plans of calls", "plans of graphs"])
def either_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls take few parts in line; here also those that a graph takes."""
    if request.param == "plans of graphs":
        monkeypatch.setattr(ring, "choose_for_calls", ring_plan.choose)
    ring.plan_of.cache_clear()
    yield
    ring.plan_of.cache_clear()


both_plans = pytest.mark.usefixtures("either_plan")


def stored_row_bytes(layout: str) -> int:
    return 2 * (K if layout == "out_in" else N)


def splits_of(layout: str, n: int = N, k: int = K) -> dict[str, int]:
    """Local bytes by name: in the middle of rows, none, all, few."""
    rows, columns = (n, k) if layout == "out_in" else (k, n)
    names = ("all local", "all remote", "in a row", "last bytes", "first bytes", "rows")
    return {name: split_bytes(name, rows, 2 * columns) for name in names}


def case_of(
    tier: Tier, device: torch.device, m: int, layout: str, *splits: int, **more: object
) -> LinearCase:
    options = {"operator": "linear_epilogue", "layout": layout, "splits": splits, **more}
    n, k = int(options.pop("n", N)), int(options.pop("k", K))  # type: ignore[call-overload]
    return make_case(CallSpec(m, n, k, **options), tier, device)  # type: ignore[arg-type]


def staged(case: LinearCase) -> Tensor:
    """The call of a case through the ring, whatever its M."""
    call = case.tiered
    asked = {"biases": call.biases, "residual": call.residual, "layout": call.layout}
    assert ring.refusal(call.x, call.weights, **asked) is None  # type: ignore[arg-type]
    buffers = tuple(address_table.lookup(weight.data_ptr()) for weight in call.weights)
    return ring.run(call.x, call.weights, buffers, activation=call.activation, **asked)  # type: ignore[arg-type]


def assert_right(case: LinearCase, what: object) -> None:
    reference = make_reference(case.resident)
    poison_free_memory(ring_plan.LARGE_RING * ring_plan.RING_BYTES, case.tiered.x.device)
    poison_free_memory(case.problem.m * case.problem.n * 2, case.tiered.x.device)
    verdict = reference.judge(staged(case))
    assert verdict.passed, f"{what}: {verdict}"


@both_plans
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_split(tier: Tier, device: torch.device, layout: str, dtype: torch.dtype) -> None:
    for name, split in splits_of(layout).items():
        for m in TOKENS:
            case = case_of(tier, device, m, layout, split, dtype=dtype)
            assert_right(case, f"M={m}, {name}")


@both_plans
@layouts
def test_odd_sizes_and_every_epilogue(tier: Tier, device: torch.device, layout: str) -> None:
    for n, k in ((1000, 4104), (264, 72), (8, 8), (5120, 1032)):
        for activation in ("none", "silu", "gelu", "gelu_tanh"):
            split = splits_of(layout, n, k)["in a row"]
            for bias in (False, True):
                case = case_of(
                    tier, device, 517, layout, split,
                    n=n, k=k, activation=activation, bias=bias, residual=bias,
                )  # fmt: skip
                assert_right(case, case.problem)


@both_plans
@layouts
@pytest.mark.parametrize("gating", ["separate", "fused"])
def test_gated(tier: Tier, device: torch.device, gating: str, layout: str) -> None:
    chosen = [(NBYTES // 2 + 528, NBYTES // 3), (0, NBYTES), (NBYTES, 0), (256, NBYTES - 256)]
    if gating == "fused":
        chosen = [(NBYTES + 528,), (0,), (2 * NBYTES,), (NBYTES // 4,)]
    for splits in chosen:
        for m in (129, 4097):
            case = case_of(
                tier, device, m, layout, *splits,
                operator="gated_linear", gating=gating, activation="silu", bias=True,
            )  # fmt: skip
            assert_right(case, f"{splits}, M={m}")


@both_plans
@layouts
def test_remote_bytes_cross_the_link_once_by_count(
    tier: Tier, device: torch.device, layout: str
) -> None:
    for name, split in splits_of(layout).items():
        case = case_of(tier, device, 4097, layout, split)
        counter = ReadCounter(case.buffers)
        torch.cuda.synchronize()
        counter.reset()
        staged(case)
        torch.cuda.synchronize()
        reads, held = counter.read(), case.bytes_by_tier
        assert reads is not None and reads.calls == 1, name
        assert abs(reads.remote_bytes - held.remote) <= stored_row_bytes(layout), name
        assert reads.local_bytes + reads.remote_bytes == NBYTES, name


@layouts
def test_a_captured_graph_survives_moved_splits(
    tier: Tier, device: torch.device, layout: str
) -> None:
    for m in (512, 4097):
        for captured_at in (NBYTES // 2, 0, NBYTES):
            case = case_of(tier, device, m, layout, captured_at)
            (buffer,) = case.buffers
            reference = make_reference(case.resident)
            step = capture(lambda case=case: staged(case))  # type: ignore[misc]
            counter = ReadCounter(case.buffers)
            for wanted in (captured_at, NBYTES, NBYTES // 3, 0, NBYTES - (2 << 20), NBYTES // 2):
                torch.cuda.synchronize()
                split = buffer.move(wanted)
                poison(step.output)
                counter.reset()
                output = step()
                torch.cuda.synchronize()
                assert isinstance(output, torch.Tensor)
                verdict = reference.judge(output)
                assert verdict.passed, f"M={m}, captured at {captured_at}, now {split}: {verdict}"
                reads = counter.read()
                assert reads is not None and reads.calls == 1
                assert reads.remote_bytes == case.bytes_by_tier.remote


@layouts
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_two_streams_at_once(tier: Tier, device: torch.device, layout: str, captured: bool) -> None:
    cases = [
        case_of(tier, device, 4097, layout, NBYTES // 3),
        case_of(tier, device, 1000, layout, 0),
        case_of(tier, device, 2048, layout, NBYTES // 2 + 512),
    ]
    references = [make_reference(case.resident) for case in cases]
    # the default stream is one of them
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    calls = []
    for case, stream in zip(cases, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls.append(capture(lambda case=case: staged(case)) if captured else None)  # type: ignore[misc]
    torch.cuda.synchronize()
    for _ in range(10):
        outputs = []
        for case, stream, call in zip(cases, streams, calls, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(staged(case) if call is None else call())
        torch.cuda.synchronize()
        for output, reference in zip(outputs, references, strict=True):
            assert isinstance(output, torch.Tensor)
            assert reference.judge(output).passed


@both_plans
@layouts
def test_the_input_may_still_be_in_the_making_and_its_memory_is_reused_at_once(
    tier: Tier, device: torch.device, layout: str
) -> None:
    """Eager calls in a row share slots and outputs through torch's allocator."""
    case = case_of(tier, device, 512, layout, NBYTES // 4)
    expected = make_reference(case.resident)
    first = staged(case)
    assert expected.judge(first).passed
    for _ in range(20):
        busy = torch.full((ring_plan.RING_BYTES // 2,), float("nan"), dtype=torch.bfloat16,
                          device=device)  # fmt: skip
        busy.mul_(2)
        del busy
        again = staged(case)
        torch.full((ring_plan.RING_BYTES // 2,), float("nan"), dtype=torch.bfloat16, device=device)
        assert torch.equal(first, again)


@layouts
@pytest.mark.parametrize("k", [4096, 28672])
def test_slots_take_no_more_than_the_ring(
    tier: Tier, device: torch.device, layout: str, k: int
) -> None:
    n, m = 8192, 4097
    nbytes = n * k * 2
    for split in (0, nbytes // 2):
        case = case_of(tier, device, m, layout, split, n=n, k=k)
        staged(case)  # cuBLAS takes its workspace, once
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = staged(case)
        torch.cuda.synchronize()
        more = torch.cuda.max_memory_allocated() - before
        ring_bytes = ring_plan.LARGE_RING * ring_plan.RING_BYTES
        rounding = 8 << 20
        assert more <= ring_bytes + output.nbytes + rounding, "a temporary, or more slots"
        del output


@pytest.mark.alone
def test_time_is_near_the_estimate(tier: Tier, device: torch.device) -> None:
    """Copies and products overlap: staged is faster than one after the other."""
    from dak_inductor import hardware
    from dak_inductor.lowering.linear.problem import LinearProblem

    n, k, m = 16384, 8192, 4097
    nbytes = n * k * 2
    case = case_of(tier, device, m, "out_in", nbytes // 2, n=n, k=k)
    step = capture(lambda: staged(case))
    seconds = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    profile = hardware.current(device)
    problem = LinearProblem(m, n, k, torch.bfloat16)
    estimate = ring_plan.estimate(problem, (nbytes // 2,), profile, profile.link(tier.name))
    median = sorted(seconds)[5]
    print(f"{tier.name}: {1e3 * median:.3f} ms, estimated {1e3 * estimate:.3f} ms")
    assert median < 1.5 * estimate

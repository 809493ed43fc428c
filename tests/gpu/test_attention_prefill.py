"""Attention of many queries, staged: values by every forward, masks, graphs, streams and counts.

Operands are fresh and random, outputs poisoned, and what no query may read is NaN; errors are at
most twice those of torch's own attention in the same dtype (`harness/accuracy.py`), but the largest
error where a test lets stock forwards alone serve the calls: they round what is merged, and two
more roundings, of values up to twice as large, add up to 4 times torch's one. Left to itself the
plan takes no rounded parts for so few tokens.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dak_inductor import hardware
from dak_inductor.benchmarks.harness import accuracy
from dak_inductor.benchmarks.harness.accuracy import poison
from dak_inductor.benchmarks.harness.attention_case import (
    SPLITS,
    AttentionCase,
    AttentionSpec,
    make_case,
    split_bytes,
)
from dak_inductor.benchmarks.harness.attention_reference import AttentionCall, make_reference
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter
from dak_inductor.benchmarks.harness.linear_reference import poison_free_memory
from dak_inductor.benchmarks.harness.timing import capture
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.lowering.attention import (
    host_lengths,
    partial_results,
    staged,
    staged_plan,
    staged_timing,
    stock_forward,
)
from dak_inductor.lowering.attention.staged_parts import Forward, PrefillProblem
from dak_inductor.lowering.op_facts import triton_importable

HALF = (torch.bfloat16, torch.float16)
FORWARDS: tuple[Forward, ...] = ("cudnn", "flash", "triton")
dtypes = pytest.mark.parametrize("dtype", HALF, ids=str)
forwards = pytest.mark.parametrize("forward", FORWARDS)

Restrict = Callable[[Forward], None]

LARGEST_ERROR = accuracy.ALLOWED_FACTOR
ROUNDED = 4.0


@pytest.fixture
def restrict(monkeypatch: pytest.MonkeyPatch) -> Restrict:
    """Let one forward alone serve the calls of a test that it can serve."""
    every = staged._forwards

    def to(forward: Forward) -> None:
        query = torch.empty(1, 1, 17, 64, dtype=torch.bfloat16, device="cuda")
        if forward == "triton":
            pytest.importorskip("triton", reason="triton is not installed")
        elif forward in stock_forward.available(query, 64):
            monkeypatch.setattr(sys.modules[__name__], "LARGEST_ERROR", ROUNDED)
        else:
            pytest.skip(f"torch has no {forward} attention here")

        def alone(*call: Any) -> tuple[Forward, ...]:
            found = every(*call)
            return (forward,) if forward in found else found

        monkeypatch.setattr(staged, "_forwards", alone)

    return to


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rings so small that a few thousand tokens take many turns, and merges of few results."""
    monkeypatch.setattr(staged_plan, "RING_BYTES", 1 << 20)
    monkeypatch.setattr(partial_results, "MOST_PENDING", 3)
    staged._plan.cache_clear()
    yield
    staged._plan.cache_clear()


def at(spec: AttentionSpec, *names: str) -> AttentionSpec:
    """With keys and values split at these places; one name is for both."""
    return replace(spec, splits=(split_bytes(names[0], spec), split_bytes(names[-1], spec)))


def halves(spec: AttentionSpec) -> AttentionSpec:
    """Keys and values split at different odd places about the middle."""
    return replace(
        spec,
        splits=(split_bytes("in a token", spec), spec.tokens // 3 * spec.token_bytes + 512),
    )


def run_staged(call: AttentionCall) -> Tensor:
    output = staged.run(call.operands())
    assert output is not None, f"declined a query of {tuple(call.query.shape)}"
    return output


def assert_right(case: AttentionCase, what: object = "") -> None:
    """Run into poisoned memory, twice; the errors within what the top of this file allows."""
    reference = make_reference(case.resident)
    for _ in range(2):  # the second time nothing is compiled between poison and call
        query = case.tiered.query
        poison_free_memory(staged_plan.RING_BYTES // 2, query.device)
        poison_free_memory(query.nbytes, query.device)
        output = run_staged(case.tiered)
        verdict = reference.judge(output)
        # In fp32 only the order of summation tells the two apart.
        slack = 2e-5 if case.spec.dtype == torch.float32 else 0.0
        ours, own = verdict.ours, verdict.torch_own
        passed = ours.rms <= accuracy.ALLOWED_FACTOR * own.rms
        passed = passed and ours.max_abs <= LARGEST_ERROR * own.max_abs
        assert passed or ours.max_abs <= slack, f"{what} {case.spec}: {verdict}"
        assert output.transpose(1, 2).is_contiguous()


# --- values ---


@forwards
def test_smoke(host_tier: Tier, device: torch.device, restrict: Restrict, forward: Forward) -> None:
    """The first thing to run after a change."""
    restrict(forward)
    for batch, queries, tokens, split in (
        (1, 512, 512, "all local"),
        (1, 512, 512, "all remote"),
        (2, 300, 1000, "tokens"),
        (1, 2048, 4096, "in a token"),
    ):
        spec = at(AttentionSpec(batch, 2, 4, queries, tokens), split)
        assert_right(make_case(spec, host_tier, device), split)


@pytest.mark.parametrize("forward", ["cudnn", "flash"])
@dtypes
def test_stock_forwards_give_what_is_merged(
    device: torch.device, restrict: Restrict, forward: Forward, dtype: torch.dtype
) -> None:
    """Heads in groups, any strides, the natural log-sum-exp, the alignment of the triangle."""
    restrict(forward)
    for head, rows, tokens, causal in (
        (64, 200, 200, True), (128, 77, 500, False), (128, 500, 77, False), (128, 333, 333, True),
        *([(128, 77, 500, True)] if forward == "flash" else []),
    ):  # fmt: skip
        query = torch.randn(2, rows, 8, head, dtype=dtype, device=device).transpose(1, 2)
        key, value = (
            torch.randn(tokens, 2, 2, head, dtype=dtype, device=device).permute(1, 2, 0, 3)
            for _ in range(2)
        )
        out, lse = stock_forward.attend(forward, query, key, value, causal=causal, scale=0.2)
        repeated = (t.float().repeat_interleave(4, 1) for t in (key, value))
        keys, values = repeated
        scores = query.float() @ keys.transpose(-1, -2) * 0.2
        if causal:
            hidden = torch.ones(rows, tokens, device=device).tril(tokens - rows) == 0
            scores = scores.masked_fill(hidden, -torch.inf)
        assert out.shape == (2, rows, 8, head) and out.is_contiguous()
        assert lse.shape == (2, 8, rows) and lse.dtype == torch.float32 and lse.is_contiguous()
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=2e-3, atol=2e-3)
        exact = (scores.softmax(-1) @ values).transpose(1, 2)
        torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


@forwards
@dtypes
@pytest.mark.parametrize("name", SPLITS)
def test_every_split(
    tier: Tier,
    device: torch.device,
    small_ring: None,
    restrict: Restrict,
    forward: Forward,
    dtype: torch.dtype,
    name: str,
) -> None:
    restrict(forward)
    for batch, kv_heads, queries, tokens, causal in (
        (1, 8, 1100, 1100, True), (3, 2, 200, 3000, True), (2, 2, 17, 2500, True),
        (1, 2, 600, 1500, False),
    ):  # fmt: skip
        spec = AttentionSpec(batch, kv_heads, 4, queries, tokens, dtype=dtype, causal=causal)
        for splits in ((name, name), (name, "all local"), ("tokens", name)):
            assert_right(make_case(at(spec, *splits), tier, device), splits)


@pytest.mark.parametrize("layout", ["token_major", "plain"])
@pytest.mark.parametrize("name", SPLITS)
def test_either_order_in_memory(
    host_tier: Tier, device: torch.device, small_ring: None, name: str, layout: str
) -> None:
    for batch, kv_heads in ((1, 1), (1, 4), (3, 2)):
        spec = AttentionSpec(batch, kv_heads, 2, 400, 1300, layout=layout)  # type: ignore[arg-type]
        assert_right(make_case(at(spec, name), host_tier, device), name)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_every_head_size(
    host_tier: Tier, device: torch.device, small_ring: None, head_dim: int, dtype: torch.dtype
) -> None:
    for ratio, queries in itertools.product((1, 7), (33, 260)):
        spec = AttentionSpec(2, 2, ratio, queries, 700, head_dim, dtype)
        assert_right(make_case(halves(spec), host_tier, device))


def test_lengths_starts_windows_and_soft_caps(tier: Tier, device: torch.device) -> None:
    """Masks that only the device knows, over whole rings."""
    pytest.importorskip("triton", reason="triton is not installed")
    tokens = 640
    lengths, starts = (640, 640, 300, 129, 128, 40, 7, 0), (0, 250, 299, 0, 100, 8, 0, 0)
    for causal, window, softcap, padded in itertools.product(
        (True, False), (0, 1, 100, 5000), (0.0, 20.0), (False, True)
    ):
        spec = AttentionSpec(
            8, 2, 4, 130, tokens, lengths=lengths, starts=starts if padded else None,
            causal=causal, window=window, softcap=softcap,
        )  # fmt: skip
        assert_right(make_case(halves(spec), tier, device))


def test_masks_of_the_device_over_many_turns(
    host_tier: Tier, device: torch.device, small_ring: None
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    for window, head_dim in itertools.product((0, 700), (64, 96, 256)):
        spec = AttentionSpec(
            3, 2, 4, 500, 3000, head_dim, lengths=(3000, 1700, 499), starts=(0, 900, 3),
            window=window,
        )  # fmt: skip
        assert_right(make_case(halves(spec), host_tier, device))


def test_operands_of_any_stride(host_tier: Tier, device: torch.device, small_ring: None) -> None:
    spec = AttentionSpec(2, 2, 4, 240, 900)
    case = make_case(halves(spec), host_tier, device)
    batch, heads, queries, head_dim = case.tiered.query.shape

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=spec.dtype, device=device)

    for what, query in {
        "as projected": random(batch, queries, heads, head_dim).transpose(1, 2),
        "part of a fused projection": random(batch, queries, heads + 4, head_dim)[
            :, :, 2:-2
        ].transpose(1, 2),
        "an odd element first": random(batch, heads, queries, head_dim + 1)[..., 1:],
        "every other element": random(batch, heads, queries, 2 * head_dim)[..., ::2],
        "one row for all": random(1, 1, 1, head_dim).expand(batch, heads, queries, head_dim),
    }.items():
        calls = [replace(call, query=query) for call in (case.tiered, case.resident)]
        poison_free_memory(query.numel() * 2, device)
        verdict = make_reference(calls[1]).judge(run_staged(calls[0]))
        assert verdict.passed, f"{what}: {verdict}"


@pytest.mark.parametrize("forward", ["cudnn", "flash"])
@dtypes
def test_rows_of_few_tokens_by_the_triton_forward_and_others_by_a_stock_one(
    host_tier: Tier,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    forward: Forward,
    dtype: torch.dtype,
) -> None:
    """Plans with both, and their rows of few tokens alone, which no rounding may add to."""
    pytest.importorskip("triton", reason="triton is not installed")
    if forward not in stock_forward.available(
        torch.empty(1, 1, 1, 128, dtype=dtype, device=device), 128
    ):
        pytest.skip(f"torch has no {forward} attention here")
    monkeypatch.setattr(staged, "_forwards", lambda *_: (forward, "triton"))
    monkeypatch.setattr(staged_plan, "PRECISION_COST", 1.0)
    monkeypatch.setattr(staged_plan, "PRECISION_SECONDS", 0.0)
    monkeypatch.setattr(staged_plan, "ROUNDED_TOKENS", few := 1024)
    monkeypatch.setitem(staged_timing.RATE, "triton", 0.01)  # as few of its calls as may be
    monkeypatch.setattr(staged_plan, "RING_BYTES", 4 << 20)
    used: set[str] = set()
    plan_of = staged._plan.__wrapped__  # others keep theirs

    def noted(*asked: Any) -> Any:
        plan = plan_of(*asked)
        used.update(piece.forward for piece in plan.pieces)
        return plan

    monkeypatch.setattr(staged, "_plan", noted)
    for queries, tokens in ((2000, 2000), (1700, 2100)):
        used.clear()
        case = make_case(
            at(AttentionSpec(1, 8, 4, queries, tokens, dtype=dtype), "all remote"),
            host_tier,
            device,
        )
        rows = few - 1 - (tokens - queries)
        poison_free_memory(case.tiered.query.nbytes, device)
        output = run_staged(case.tiered)
        assert used == {forward, "triton"}
        exact = case.resident.to(torch.float32).stock()
        own = case.resident.stock()
        for part, factor in (
            (slice(0, rows), accuracy.ALLOWED_FACTOR),
            (slice(rows, None), ROUNDED),
        ):
            found, allowed = (
                accuracy.errors(result[:, :, part], exact[:, :, part]) for result in (output, own)
            )
            assert found.rms <= accuracy.ALLOWED_FACTOR * allowed.rms, (queries, part)
            assert found.max_abs <= factor * allowed.max_abs, (queries, part)


# --- what the host knows ---


def test_a_noted_length_ends_the_reads(tier: Tier, device: torch.device) -> None:
    """What lies behind it is NaN, and is neither copied nor counted."""
    for stop in (777, 1024):
        spec = AttentionSpec(2, 2, 4, 300, 2000, lengths=(stop, stop), starts=(0, 0))
        case = make_case(halves(spec), tier, device)
        starts = case.tiered.starts
        assert starts is not None
        for exact, zeros in ((True, starts.data_ptr()), (True, 0), (False, 0)):
            host_lengths.note_length(case.buffers[0], stop, exact=exact, zero_starts=zeros)
            assert_right(case)
            assert_counted(case, 0, stop)
        host_lengths.forget_length(case.buffers[0])
        assert_right(case)
        assert_counted(case, 0, 2000)


def test_a_window_of_a_noted_length_begins_the_reads(host_tier: Tier, device: torch.device) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    spec = AttentionSpec(2, 2, 4, 100, 2000, lengths=(1500, 1500), window=256)
    case = make_case(halves(spec), host_tier, device)
    host_lengths.note_length(case.buffers[0], 1500, exact=True)
    assert_right(case)
    assert_counted(case, 1500 - 100 - 256 + 1, 1500)


# --- counts, graphs, streams ---


def assert_counted(case: AttentionCase, first: int, stop: int) -> None:
    for side, buffer in enumerate(case.buffers):
        counter = ReadCounter((buffer,))
        torch.cuda.synchronize()
        counter.reset()
        run_staged(case.tiered)
        torch.cuda.synchronize()
        reads = counter.read()
        token = case.spec.token_bytes
        held = buffer.bytes_in(first * token, stop * token)
        assert reads is not None and reads.calls == 1, f"side {side}: {reads}"
        assert TierBytes(reads.local_bytes, reads.remote_bytes) == held, f"side {side}"


@forwards
@pytest.mark.parametrize("name", SPLITS)
def test_every_byte_is_counted_once(
    tier: Tier, device: torch.device, restrict: Restrict, forward: Forward, name: str
) -> None:
    restrict(forward)
    for queries, tokens in ((500, 500), (64, 3000)):
        spec = AttentionSpec(2, 3, 4, queries, tokens)
        assert_counted(make_case(at(spec, name), tier, device), 0, tokens)
        assert_counted(make_case(at(spec, name, "page"), tier, device), 0, tokens)
        plain = replace(spec, layout="plain")
        assert_counted(make_case(at(plain, name), tier, device), 0, tokens)


@forwards
def test_a_captured_graph_survives_moved_splits(
    tier: Tier, device: torch.device, restrict: Restrict, forward: Forward
) -> None:
    restrict(forward)
    spec = AttentionSpec(1, 8, 4, 2048, 6000)
    whole = spec.cache_bytes
    for captured_at in (whole // 2, 0, whole):
        case = make_case(replace(spec, splits=(captured_at, captured_at)), tier, device)
        reference = make_reference(case.resident)
        step = capture(lambda case=case: run_staged(case.tiered))  # type: ignore[misc]
        for wanted in (captured_at, whole, whole // 3, 0, whole - (2 << 20), whole // 2):
            torch.cuda.synchronize()
            splits = (case.buffers[0].move(wanted), case.buffers[1].move(whole - wanted))
            counter = ReadCounter(case.buffers)
            counter.reset()
            poison(step.output)
            output = step()
            torch.cuda.synchronize()
            assert isinstance(output, Tensor)
            verdict = reference.judge(output)
            assert verdict.passed, f"captured at {captured_at}, now {splits}: {verdict}"
            reads = counter.read()
            assert reads is not None and reads.calls == 2
            remote = sum(buffer.bytes_by_tier().remote for buffer in case.buffers)
            assert reads.remote_bytes == remote
            assert reads.local_bytes == 2 * whole - remote


def test_lengths_change_between_replays(host_tier: Tier, device: torch.device) -> None:
    """A graph trusts no note, since it is replayed when the note is stale."""
    pytest.importorskip("triton", reason="triton is not installed")
    spec = AttentionSpec(2, 2, 4, 64, 1500, lengths=(200, 200), starts=(0, 0))
    case = make_case(halves(spec), host_tier, device)
    for cache in (case.tiered.key, case.tiered.value):
        cache.normal_()
    copies = {"key": case.tiered.key.clone(), "value": case.tiered.value.clone()}
    lengths, starts = case.tiered.lengths, case.tiered.starts
    assert lengths is not None and starts is not None
    host_lengths.note_length(case.buffers[0], 200, exact=True, zero_starts=starts.data_ptr())
    step = capture(lambda: run_staged(case.tiered))
    for now, first in (((200, 200), (0, 0)), ((1500, 900), (0, 30)), ((64, 1), (0, 0))):
        lengths.copy_(torch.tensor(now))
        starts.copy_(torch.tensor(first))
        poison(step.output)
        output = step()
        assert isinstance(output, Tensor)
        verdict = make_reference(replace(case.tiered, **copies)).judge(output)
        assert verdict.passed, f"{now}: {verdict}"


@forwards
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_several_streams_at_once(
    tier: Tier, device: torch.device, restrict: Restrict, forward: Forward, captured: bool
) -> None:
    restrict(forward)
    specs = [
        at(AttentionSpec(1, 4, 4, 1500, 1500), "tokens"),
        at(AttentionSpec(2, 2, 4, 200, 2500), "all remote"),
        at(AttentionSpec(1, 8, 4, 700, 3000), "in a token"),
    ]
    cases = [make_case(spec, tier, device) for spec in specs]
    references = [make_reference(case.resident) for case in cases]
    # the default stream is one of them
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    calls = []
    for case, stream in zip(cases, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step = capture(lambda case=case: run_staged(case.tiered)) if captured else None  # type: ignore[misc]
            calls.append(step)
    torch.cuda.synchronize()
    for _ in range(10):
        outputs = []
        for case, stream, call in zip(cases, streams, calls, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(run_staged(case.tiered) if call is None else call())
        torch.cuda.synchronize()
        for output, reference in zip(outputs, references, strict=True):
            assert isinstance(output, Tensor)
            assert reference.judge(output).passed


def test_keys_may_still_be_in_the_making(
    tier: Tier, device: torch.device, small_ring: None
) -> None:
    """Copies wait for the kernel that writes fresh tokens to the cache."""
    spec = at(AttentionSpec(1, 8, 4, 512, 2048), "tokens")
    case = make_case(spec, tier, device)
    fresh = [tensor[:, :, -512:].clone() for tensor in (case.resident.key, case.resident.value)]
    reference = make_reference(case.resident)
    for _ in range(5):
        for cache, tokens in zip((case.tiered.key, case.tiered.value), fresh, strict=True):
            cache[:, :, -512:].zero_()
            torch.cuda._sleep(20_000_000)
            cache[:, :, -512:].copy_(tokens)
        assert reference.judge(run_staged(case.tiered)).passed


@forwards
def test_a_call_waits_for_nothing(
    host_tier: Tier, device: torch.device, restrict: Restrict, forward: Forward
) -> None:
    restrict(forward)
    lengths = (2500, 2500) if forward == "triton" else None
    spec = halves(AttentionSpec(2, 4, 4, 300, 2500, lengths=lengths))
    case = make_case(spec, host_tier, device)
    run_staged(case.tiered)  # compiles, loads and makes plans
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second
        behind = torch.cuda.Event()
        behind.record()
        run_staged(case.tiered)
        assert not behind.query(), "the host waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


# --- memory and time ---


def test_slots_take_no_more_than_the_ring(tier: Tier, device: torch.device) -> None:
    for split in ("all remote", "tokens"):
        spec = at(AttentionSpec(1, 32, 1, 256, 12000), split)  # 197 MB of keys and values
        case = make_case(spec, tier, device)
        run_staged(case.tiered)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = run_staged(case.tiered)
        torch.cuda.synchronize()
        more = torch.cuda.max_memory_allocated() - before
        partials = (partial_results.MOST_PENDING + 4) * output.nbytes
        rounding = 8 << 20
        assert more <= staged_plan.RING_BYTES + partials + rounding, "a temporary, or more slots"


@pytest.mark.alone
@pytest.mark.parametrize("queries", [2048, 8192])
def test_time_is_near_the_estimate(tier: Tier, device: torch.device, queries: int) -> None:
    """Copies and forwards overlap: staged is faster than one after the other."""
    profile = hardware.current(device)
    link = profile.link(tier.name)
    for fraction in (0.0, 0.1, 0.5, 1.0):
        spec = AttentionSpec(1, 8, 4, queries, queries)
        local = round((1 - fraction) * queries)
        spec = replace(spec, splits=(local * spec.token_bytes,) * 2)
        case = make_case(spec, tier, device)
        step = capture(lambda case=case: run_staged(case.tiered))  # type: ignore[misc]
        seconds = median_seconds(step)
        problem = PrefillProblem(1, 32, 8, queries, queries, 128, 128, "bfloat16", True)
        names: tuple[Forward, ...] = stock_forward.available(case.tiered.query, 128)
        if triton_importable():
            names = (*names, "triton")
        plan = staged_plan.choose(problem, local, profile, link, names)
        remote = sum(buffer.bytes_by_tier().remote for buffer in case.buffers)
        print(
            f"{tier.name}, {queries} queries, {fraction:.1f} remote: {1e6 * seconds:.0f} us, "
            f"estimated {1e6 * plan.seconds:.0f}, link {1e6 * remote / link.direct_bandwidth:.0f}"
        )
        print(*plan.parts, sep="\n")
        assert seconds < 2 * plan.seconds


def median_seconds(step: Callable[[], object]) -> float:
    found = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found)[7]

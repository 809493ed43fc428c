"""The decode attention kernel and where the bytes are: moved splits, graphs, counts, the window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dak_inductor.benchmarks.harness.accuracy import poison
from dak_inductor.benchmarks.harness.attention_case import (
    SPLITS,
    AttentionCase,
    AttentionSpec,
    make_case,
    split_bytes,
)
from dak_inductor.benchmarks.harness.attention_reference import make_reference
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter, count_runs
from dak_inductor.benchmarks.harness.timing import CapturedStep, capture
from dak_inductor.cuda_runtime.device_records import RecordCounters
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.window import Window
from dak_inductor.lowering.attention import dispatch
from dak_inductor.lowering.attention.configuration import HEAD_DIMS, NO_SWEEP, choose, tile_of
from dak_inductor.lowering.attention.tensor_maps import byte_strides

SPEC = AttentionSpec(4, 8, 4, 1, 6000)  # 49 MB of keys, as much of values
LARGEST_SLOT = 16 << 10
"""Bytes of a tile of keys; a window below it lets one through at a time."""


def at(spec: AttentionSpec, *names: str) -> AttentionSpec:
    """With keys and values split at these places; one name is for both."""
    return replace(spec, splits=(split_bytes(names[0], spec), split_bytes(names[-1], spec)))


def counted(case: AttentionCase, side: int, calls: int) -> RecordCounters:
    """What `calls` runs of a case count for keys or values."""
    reads = count_runs(case.run, (case.buffers[side],), calls)
    assert reads.calls == calls, reads
    return reads


def assert_counted(case: AttentionCase, what: object, calls: int = 3) -> None:
    for side in (0, 1):
        read, held = counted(case, side, calls), case.bytes_read(side)
        found = TierBytes(read.local_bytes, read.remote_bytes)
        assert found == TierBytes(calls * held.local, calls * held.remote), f"{what}, side {side}"


@pytest.mark.parametrize("name", SPLITS)
def test_every_byte_is_counted_once(tier: Tier, device: torch.device, name: str) -> None:
    tokens = 1100
    for layout in ("token_major", "plain"):
        for lengths, starts, window in (
            (None, None, 0),
            ((0, 1, 1100, 700), (0, 0, 3, 690), 0),
            ((1000, 64, 65, 800), None, 100),
        ):
            spec = AttentionSpec(
                4, 3, 4, 2, tokens, layout=layout, lengths=lengths, starts=starts, window=window
            )  # type: ignore[arg-type]
            assert_counted(make_case(at(spec, name), tier, device), (name, layout, lengths))
            assert_counted(make_case(at(spec, name, "page"), tier, device), (name, lengths))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_size_is_counted(host_tier: Tier, device: torch.device, head_dim: int) -> None:
    spec = AttentionSpec(2, 3, 4, 1, 777, head_dim, lengths=(777, 500))
    assert_counted(make_case(at(spec, "in a token", "tokens"), host_tier, device), head_dim)


def test_a_split_moves_between_replays_of_one_graph(tier: Tier, device: torch.device) -> None:
    for spec in (SPEC, replace(SPEC, batch=1, tokens=24000), replace(SPEC, queries=16)):
        case = make_case(at(spec, "tokens"), tier, device)
        reference = make_reference(case.resident)
        step = capture(case.run)
        whole = spec.cache_bytes
        seen = set()
        for wanted in (whole // 2, 0, whole, whole // 3, whole - (2 << 20), 5 << 20, whole // 2):
            torch.cuda.synchronize()
            splits = (case.buffers[0].move(wanted), case.buffers[1].move(whole - wanted))
            seen.add(splits)
            poison(step.output)
            output = step()
            torch.cuda.synchronize()
            assert isinstance(output, torch.Tensor)
            verdict = reference.judge(output)
            assert verdict.passed, f"{spec}, splits {splits}: {verdict}"
        assert len(seen) >= 5
        assert_counted(case, "after moves")


def test_lengths_and_queries_change_between_replays(tier: Tier, device: torch.device) -> None:
    spec = replace(SPEC, tokens=1500, lengths=(1, 1, 1, 1), starts=(0, 0, 0, 0))
    case = make_case(at(spec, "tokens"), tier, device)
    lengths, starts = case.tiered.lengths, case.tiered.starts
    assert lengths is not None and starts is not None
    for cache in (case.tiered.key, case.tiered.value):
        cache.normal_()
    resident = replace(case.tiered, key=case.tiered.key.clone(), value=case.tiered.value.clone())
    step = capture(case.run)
    for wanted in ((1, 2, 3, 4), (1500, 64, 900, 937), (0, 0, 0, 0), (938, 1500, 0, 65)):
        lengths.copy_(torch.tensor(wanted, dtype=torch.int32))
        starts.copy_((lengths // 3).int())
        case.tiered.query.normal_()
        reference = make_reference(resident)
        poison(step.output)
        output = step()
        torch.cuda.synchronize()
        assert isinstance(output, torch.Tensor)
        verdict = reference.judge(output)
        assert verdict.passed or (not any(wanted) and not bool(output.any())), (
            f"{wanted}: {verdict}"
        )
        assert_counted(case, wanted, calls=1)


def test_two_graphs_replay_at_once_on_two_streams(tier: Tier, device: torch.device) -> None:
    cases = [
        make_case(at(SPEC, "tokens"), tier, device),
        make_case(at(replace(SPEC, batch=1, ratio=8, queries=3), "page"), tier, device),
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
        assert verdict.passed, verdict


FAR = AttentionSpec(32, 8, 4, 1, 700)  # 64 KiB from token to token


def test_sweeps_over_far_tokens(host_tier: Tier, device: torch.device) -> None:
    """All units of a reader in turn for some tokens, taken up again for the next: right, the same
    bits each time, and each byte read once."""
    lengths = tuple(range(7, 7 + 32 * 22, 22))
    for spec, names in (
        (FAR, ("all remote", "all remote")),
        (FAR, ("tokens", "in a token")),
        (FAR, ("last bytes", "first bytes")),
        (replace(FAR, batch=128, tokens=300), ("tokens", "tokens")),  # 256 KiB
        (replace(FAR, kv_heads=32, ratio=1), ("in a token", "page")),
        (replace(FAR, lengths=lengths, starts=tuple(x // 3 for x in lengths)), ("tokens",)),
        (replace(FAR, lengths=(700,) + (90,) * 31, window=64), ("all remote",)),
        (replace(FAR, ratio=8, queries=16), ("tokens", "in a token")),  # teams of two warpgroups
        (replace(FAR, batch=64, head_dim=80, tokens=333), ("in a token", "tokens")),
        (replace(FAR, head_dim=256, softcap=20.0, tokens=333), ("in a token", "tokens")),
    ):
        case = make_case(at(spec, *names), host_tier, device)
        problem = dispatch.problem_of(case.tiered.query, case.tiered.key)
        strides = [byte_strides(each) for each in (case.tiered.key, case.tiered.value)]
        assert choose(problem).sweep_tokens(problem, *strides) < NO_SWEEP, spec
        verdict = case.check()
        assert verdict.passed, f"{spec}, {names}: {verdict}"
        first = case.run()
        assert all(torch.equal(first, case.run()) for _ in range(5)), (spec, names)
        assert_counted(case, (spec, names))


def test_copies_end_with_the_tokens(host_tier: Tier, device: torch.device) -> None:
    """Remote tokens of each number up to a tile's: boxes of 1, 2 and 4 rows lie inside an atom of
    the swizzle."""
    for head_dim in HEAD_DIMS:
        remote = tuple(range(66))
        spec = AttentionSpec(66, 2, 4, 1, 200, head_dim, lengths=tuple(100 + x for x in remote))
        case = make_case(replace(spec, splits=(100 * spec.token_bytes,) * 2), host_tier, device)
        verdict = case.check()
        assert verdict.passed, f"{spec}: {verdict}"
        assert_counted(case, spec)


def test_results_of_many_workers_are_added_up_in_groups(
    host_tier: Tier, device: torch.device
) -> None:
    for spec in (
        AttentionSpec(1, 1, 7, 1, 60_000),
        AttentionSpec(1, 2, 4, 4, 70_000),
        AttentionSpec(1, 1, 8, 16, 40_000),
        AttentionSpec(1, 1, 4, 1, 30_000, 80),
    ):
        for name in ("all local", "in a token", "all remote", "last bytes"):
            case = make_case(at(spec, name), host_tier, device)
            verdict = case.check()
            assert verdict.passed, f"{spec}, {name}: {verdict}"
            step, first = capture(case.run), case.run()
            for _ in range(5):
                poison(step.output)
                again = step()
                assert isinstance(again, torch.Tensor)
                assert torch.equal(first, again), f"{spec}, {name}"


def test_one_split_gives_the_same_bits(tier: Tier, device: torch.device) -> None:
    """Parts are added in a fixed order, whoever came last."""
    for spec in (SPEC, replace(SPEC, batch=1, kv_heads=1), replace(SPEC, ratio=8, queries=16)):
        for name in ("all local", "all remote", "in a token", "last bytes"):
            case = make_case(at(spec, name), tier, device)
            first = case.run()
            step = capture(case.run)
            for attempt in range(10):
                poison(step.output)
                again = step() if attempt % 2 else case.run()
                assert isinstance(again, torch.Tensor)
                assert torch.equal(first, again), f"{spec}, {name}, attempt {attempt}"


def test_bytes_in_flight_stay_within_the_window(
    tier: Tier, device: torch.device, window: Window
) -> None:
    usual = window.nbytes
    assert max(tile_of(size) * size * 2 for size in HEAD_DIMS if size <= 128) == LARGEST_SLOT
    for spec, name in (
        (SPEC, "in a token"),
        (SPEC, "all remote"),
        (SPEC, "last bytes"),
        (replace(SPEC, batch=16, tokens=900, lengths=tuple(range(45, 900, 55))), "tokens"),
    ):
        case = make_case(at(spec, name), tier, device)
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
            what = f"{name}, window {nbytes}"
            assert isinstance(output, torch.Tensor)
            assert reference.judge(output).passed, what
            reads = counter.read()
            assert reads is not None and reads.calls == 2, what  # keys and values
            assert 0 < reads.peak_window <= max(nbytes, LARGEST_SLOT), what

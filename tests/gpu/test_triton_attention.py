"""The portable decode kernels over tiered keys and values, against fp32, and what they count.

Operands are fresh and random, outputs poisoned, and what no query may read is NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

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
from dak_inductor.cuda_runtime.window import Window
from dak_inductor.lowering.triton_attention import launch
from dak_inductor.lowering.triton_attention.configuration import tile_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def at(spec: AttentionSpec, *names: str) -> AttentionSpec:
    """With keys and values split at these places; one name is for both."""
    return replace(spec, splits=(split_bytes(names[0], spec), split_bytes(names[-1], spec)))


def run(call: AttentionCall) -> Tensor:
    output = launch.run(call.operands())
    assert output is not None, f"declined a query of {tuple(call.query.shape)}"
    return output


def assert_right(case: AttentionCase, what: object = "") -> None:
    reference = make_reference(case.resident)
    for _ in range(2):  # the second time nothing is compiled between poison and call
        poison_free_memory(case.tiered.query.nbytes, case.tiered.query.device)
        output = run(case.tiered)
        verdict = reference.judge(output)
        # In fp32 only the order of summation tells the two apart.
        slack = 2e-5 if case.spec.dtype == torch.float32 else 0.0
        assert verdict.passed or verdict.ours.max_abs <= slack, f"{what} {case.spec}: {verdict}"
        assert output.transpose(1, 2).is_contiguous()


@dtypes
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_size(
    host_tier: Tier, device: torch.device, head_dim: int, dtype: torch.dtype
) -> None:
    for ratio, queries in itertools.product((1, 4, 7), (1, 3, 16)):
        spec = AttentionSpec(
            3, 2, ratio, queries, 1111, head_dim, dtype,
            lengths=(1111, 700, queries), starts=(0, 5, 0),
        )  # fmt: skip
        assert_right(make_case(at(spec, "in a token", "tokens"), host_tier, device))


@pytest.mark.parametrize("queries", [1, 16])
def test_lengths_starts_windows_and_soft_caps(
    tier: Tier, device: torch.device, queries: int
) -> None:
    lengths = (0, 1, 2, 7, 63, 64, 65, 129, 500, 639, 640, 300)
    starts = (0, 0, 1, 0, 62, 0, 1, 129, 499, 100, 0, 64)
    for causal, window, softcap, padded in itertools.product(
        (True, False), (0, 1, 100, 5000), (0.0, 20.0), (False, True)
    ):
        spec = AttentionSpec(
            len(lengths), 2, 4, queries, 640, lengths=lengths, starts=starts if padded else None,
            causal=causal, window=window, softcap=softcap,
        )  # fmt: skip
        assert_right(make_case(at(spec, "in a token", "tokens"), tier, device))


@pytest.mark.parametrize("layout", ["token_major", "plain"])
@pytest.mark.parametrize("name", SPLITS)
def test_every_split_and_every_byte_counted(
    tier: Tier, device: torch.device, name: str, layout: str
) -> None:
    for batch, kv_heads, tokens, lengths in (
        (1, 8, 3000, None), (4, 3, 1100, (0, 1, 1100, 700)), (7, 3, 130, None),
    ):  # fmt: skip
        spec = AttentionSpec(
            batch,
            kv_heads,
            4,
            2,
            tokens,
            layout=layout,
            lengths=lengths,  # type: ignore[arg-type]
        )
        for splits in ((name, name), (name, "all local"), ("page", name)):
            case = make_case(at(spec, *splits), tier, device)
            assert_right(case, splits)
            for side, buffer in enumerate(case.buffers):
                counter = ReadCounter((buffer,))
                torch.cuda.synchronize()
                counter.reset()
                run(case.tiered)
                torch.cuda.synchronize()
                reads = counter.read()
                assert reads is not None and reads.calls == 1
                found = TierBytes(reads.local_bytes, reads.remote_bytes)
                assert found == case.bytes_read(side), f"{splits}, side {side}"


def test_many_queries(host_tier: Tier, device: torch.device) -> None:
    """Several tiles of rows, each of which asks for the remote tokens again."""
    spec = at(AttentionSpec(2, 2, 4, 200, 900, lengths=(900, 512)), "tokens")
    case = make_case(spec, host_tier, device)
    assert_right(case)
    counter = ReadCounter((case.buffers[0],))
    torch.cuda.synchronize()
    counter.reset()
    run(case.tiered)
    torch.cuda.synchronize()
    tiles = -(-200 * 4 // tile_shape(800, 128, 128, spec.dtype).rows)
    reads, held = counter.read(), case.bytes_read(0)
    assert reads is not None
    assert (reads.local_bytes, reads.remote_bytes) == (held.local, tiles * held.remote)


def test_a_split_and_the_lengths_move_between_replays_of_one_graph(
    tier: Tier, device: torch.device
) -> None:
    spec = at(AttentionSpec(2, 8, 4, 1, 6000, lengths=(6000, 6000)), "tokens")
    case = make_case(spec, tier, device)
    copies = {"key": case.tiered.key.clone(), "value": case.tiered.value.clone()}
    step = capture(lambda: run(case.tiered))
    whole, lengths = spec.cache_bytes, case.tiered.lengths
    assert lengths is not None
    places = (whole // 2, 0, whole, whole // 3, whole - (2 << 20), whole // 2)
    for wanted, now in zip(places, (6000, 1, 4097, 17, 5999, 0), strict=True):
        torch.cuda.synchronize()
        splits = (case.buffers[0].move(wanted), case.buffers[1].move(whole - wanted))
        lengths.copy_(torch.tensor((now, now // 2)))
        reference = make_reference(replace(case.tiered, **copies))
        poison(step.output)
        output = step()
        torch.cuda.synchronize()
        assert isinstance(output, Tensor)
        verdict = reference.judge(output)
        assert verdict.passed or not now, f"{splits}, {now} tokens: {verdict}"
        assert bool(output.isfinite().all())


def test_the_window_is_kept(tier: Tier, device: torch.device, window: Window) -> None:
    spec = at(AttentionSpec(1, 8, 4, 1, 20000), "tokens")
    case = make_case(spec, tier, device)
    usual = window.nbytes
    each = tile_shape(4, 128, 128, spec.dtype).bytes_in_flight(2)
    counter = ReadCounter(case.buffers)
    for nbytes in (1, usual, 8 * each):
        window.set(nbytes)
        torch.cuda.synchronize()
        counter.reset()
        assert_right(case, nbytes)
        torch.cuda.synchronize()
        reads = counter.read()
        assert reads is not None and 0 < reads.peak_window <= max(nbytes, each)


def test_what_is_refused(host_tier: Tier, device: torch.device) -> None:
    case = make_case(AttentionSpec(2, 2, 4, 1, 100), host_tier, device)
    call = case.tiered

    def declined(call: AttentionCall, mask: Tensor | None = None) -> bool:
        return launch.run(call.operands(mask=mask)) is None

    assert not declined(call)
    assert declined(call, torch.ones(2, 1, 1, 100, dtype=torch.bool, device=device))
    assert declined(replace(call, query=call.query.half()))
    assert declined(replace(call, query=call.query.double()))
    assert declined(replace(call, query=call.query[:, :7]))
    assert declined(replace(call, query=call.query[:, :, :0]))
    assert declined(replace(call, key=call.key[:, :, :50]))

"""The decode attention kernel on tiered keys and values against fp32: sizes, masks and splits.

Operands are fresh and random, outputs poisoned, and what no query may read is NaN; errors are at
most twice those of torch's own attention in the same dtype (`harness/accuracy.py`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dak_inductor.benchmarks.harness.attention_case import (
    SPLITS,
    AttentionCase,
    AttentionSpec,
    make_case,
    run_kernel,
    split_bytes,
)
from dak_inductor.benchmarks.harness.attention_reference import AttentionCall, make_reference
from dak_inductor.benchmarks.harness.linear_reference import poison_free_memory
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.lowering.attention import dispatch
from dak_inductor.lowering.attention.configuration import HEAD_DIMS

DTYPES = (torch.bfloat16, torch.float16)
RATIOS = (1, 4, 7, 8)
QUERIES = (1, 3, 16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_right(case: AttentionCase, what: object = "") -> None:
    """Run into poisoned memory; both errors within twice torch's own."""
    verdict = case.check()
    assert verdict.passed, f"{what} {case.spec}: {verdict}"


def halves(spec: AttentionSpec) -> AttentionSpec:
    """Keys and values split at different odd places about the middle."""
    return replace(
        spec,
        splits=(split_bytes("in a token", spec), spec.tokens // 3 * spec.token_bytes + 512),
    )


def test_smoke(host_tier: Tier, device: torch.device) -> None:
    """The first thing to run after a change: one head size, all parts of the way."""
    for batch, tokens, split in (
        (1, 64, "all local"),  # one tile
        (1, 128, "all local"),  # tiles for several workers, added up
        (1, 1000, "all local"),
        (2, 5000, "tokens"),  # both lines
        (2, 5000, "all remote"),
        (3, 777, "in a token"),
    ):
        spec = AttentionSpec(batch, 2, 4, 1, tokens)
        spec = replace(spec, splits=(split_bytes(split, spec),) * 2)
        assert_right(make_case(spec, host_tier, device), split)


@dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_size(
    host_tier: Tier, device: torch.device, head_dim: int, dtype: torch.dtype
) -> None:
    for ratio, queries, tokens in itertools.product(RATIOS, QUERIES, (70, 1111)):
        lengths = (tokens, tokens - 13, queries)
        spec = AttentionSpec(
            3, 2, ratio, queries, tokens, head_dim, dtype, lengths=lengths, starts=(0, 5, 0)
        )
        assert_right(make_case(halves(spec), host_tier, device))


@pytest.mark.parametrize("ratio", [5, 16, 33, 71])
@pytest.mark.parametrize("queries", [1, 5, 16])
def test_many_queries_of_a_head(
    host_tier: Tier, device: torch.device, ratio: int, queries: int
) -> None:
    """More rows than a warpgroup, and than a team, has."""
    for kv_heads, tokens in ((1, 900), (3, 65)):
        spec = AttentionSpec(2, kv_heads, ratio, queries, tokens, lengths=(tokens, tokens - 9))
        assert_right(make_case(halves(spec), host_tier, device))


@pytest.mark.parametrize("queries", QUERIES)
def test_lengths_starts_and_windows(tier: Tier, device: torch.device, queries: int) -> None:
    tokens = 640
    lengths = (0, 1, 2, 7, 8, 9, 63, 64, 65, 128, 129, 500, 639, 640, 640, 300)
    starts = (0, 0, 1, 0, 8, 3, 62, 0, 1, 5, 129, 499, 100, 0, 639, 64)
    for causal, window, with_starts in itertools.product(
        (True, False), (0, 1, 2, 64, 100, 5000), (False, True)
    ):
        spec = AttentionSpec(
            len(lengths), 2, 4, queries, tokens, lengths=lengths,
            starts=starts if with_starts else None, causal=causal, window=window,
        )  # fmt: skip
        assert_right(make_case(halves(spec), tier, device))


def test_what_is_not_valid_reads_nothing_and_gives_zero(
    host_tier: Tier, device: torch.device
) -> None:
    lengths, starts = (0, -3, 5, 90, 4), (0, 0, 5, 200, 0)
    for queries in QUERIES:
        spec = AttentionSpec(5, 2, 4, queries, 100, lengths=lengths, starts=starts)
        case = make_case(halves(spec), host_tier, device)
        assert_right(case)
        output = case.run()
        assert not bool(output[:4].any())
        assert not bool(output[4, :, : max(0, queries - 4)].any())


@pytest.mark.parametrize("softcap", [5.0, 50.0])
def test_softcap(host_tier: Tier, device: torch.device, softcap: float) -> None:
    for head_dim, queries in ((128, 1), (256, 4), (64, 16)):
        spec = AttentionSpec(
            2, 2, 4, queries, 700, head_dim, softcap=softcap, lengths=(700, 333), window=200
        )
        assert_right(make_case(halves(spec), host_tier, device))


@pytest.mark.parametrize("layout", ["token_major", "plain"])
@pytest.mark.parametrize("name", SPLITS)
def test_every_split(tier: Tier, device: torch.device, name: str, layout: str) -> None:
    for batch, kv_heads, tokens in ((1, 8, 3000), (4, 2, 1100), (7, 3, 130)):
        spec = AttentionSpec(batch, kv_heads, 4, 1, tokens, layout=layout)  # type: ignore[arg-type]
        split = split_bytes(name, spec)
        for splits in ((split, split), (split, spec.cache_bytes), (spec.cache_bytes // 2, split)):
            assert_right(make_case(replace(spec, splits=splits), tier, device), name)


def test_scores_of_any_size(host_tier: Tier, device: torch.device) -> None:
    """Large scores, where only the largest counts, and sequences that contain NaN."""
    spec = AttentionSpec(3, 2, 4, 2, 900, lengths=(900, 450, 30))
    case = make_case(halves(spec), host_tier, device)
    for factor in (0.0, 1e-3, 30.0, 300.0):
        tiered, resident = (
            replace(call, query=call.query * factor) for call in (case.tiered, case.resident)
        )
        verdict = make_reference(resident).judge(run_kernel(tiered))
        assert verdict.passed, f"factor {factor}: {verdict}"
    poisoned = case.tiered.value
    poisoned[1, :, 7] = torch.nan
    output = run_kernel(case.tiered)
    assert bool(output[1].isnan().all())
    expected = make_reference(case.resident).exact
    assert bool(output[[0, 2]].isfinite().all())
    assert torch.allclose(output[[0, 2]].float(), expected[[0, 2]], atol=0.05)


def test_operands_of_any_stride(host_tier: Tier, device: torch.device) -> None:
    spec = AttentionSpec(2, 2, 4, 3, 500, lengths=(500, 77))
    case = make_case(halves(spec), host_tier, device)
    batch, heads, queries, head_dim = case.tiered.query.shape

    def random(*shape: int) -> torch.Tensor:
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
        tiered, resident = (replace(call, query=query) for call in (case.tiered, case.resident))
        poison_free_memory(query.numel() * 2, device)
        verdict = make_reference(resident).judge(run_kernel(tiered))
        assert verdict.passed, f"{what}: {verdict}"


def test_views_of_a_cache(host_tier: Tier, device: torch.device) -> None:
    """Some tokens, sequences or heads of the buffers."""
    spec = AttentionSpec(3, 4, 2, 1, 400, lengths=None)
    case = make_case(halves(spec), host_tier, device)
    for batch, heads, tokens in (
        (slice(0, 3), slice(0, 4), slice(0, 200)),
        (slice(0, 3), slice(0, 4), slice(100, 333)),
        (slice(1, 2), slice(0, 4), slice(0, 400)),
        (slice(1, 3), slice(1, 3), slice(7, 400)),
    ):
        queries = slice(2 * heads.start, 2 * heads.stop)
        tiered, resident = (
            replace(
                call,
                query=call.query[batch, queries],
                key=call.key[batch, heads, tokens],
                value=call.value[batch, heads, tokens],
            )
            for call in (case.tiered, case.resident)
        )
        verdict = make_reference(resident).judge(run_kernel(tiered))
        assert verdict.passed, f"{batch}, {heads}, {tokens}: {verdict}"


def test_the_result_is_stored_by_query(host_tier: Tier, device: torch.device) -> None:
    case = make_case(AttentionSpec(2, 2, 4, 3, 100), host_tier, device)
    output = case.run()
    assert output.shape == case.tiered.query.shape and output.transpose(1, 2).is_contiguous()


def test_what_the_kernel_refuses(host_tier: Tier, device: torch.device) -> None:
    case = make_case(AttentionSpec(2, 2, 4, 1, 100), host_tier, device)
    call = case.tiered

    def declined(call: AttentionCall, **more: object) -> bool:
        return dispatch.run(call.operands(**more)) is None

    assert not declined(call)
    assert declined(case.resident), "nothing is tiered"
    assert declined(call, mask=torch.ones(2, 1, 1, 100, dtype=torch.bool, device=device))
    assert declined(call, scale=0.0) and declined(call, scale=-1.0)
    assert declined(call, lengths=torch.tensor([3, 4], device=device))  # int64
    assert declined(replace(call, query=call.query.half()))
    assert declined(replace(call, query=call.query.float()))
    assert declined(replace(call, query=call.query[:, :7]))
    assert declined(replace(call, query=call.query[:, :, :0]))
    assert declined(replace(call, key=call.key[:, :, :50]))
    assert declined(replace(call, key=call.key[:, :1].expand(2, 2, 100, 128)))
    narrow = {name: getattr(call, name)[..., :72] for name in ("query", "key", "value")}
    assert declined(replace(call, **narrow)), "no such head size"

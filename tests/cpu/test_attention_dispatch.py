"""From a call of dak::attention to a launch of the kernel, up to where a GPU is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.lowering.attention import dispatch, launch, staged, tensor_maps
from dak_inductor.lowering.attention.configuration import (
    HEAD_DIMS,
    MAXIMUM_BATCH,
    MOST_AT_ONCE,
    MOST_CHUNKS,
    NO_SWEEP,
    AttentionConfiguration,
    choose,
    refusal,
)
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.attention.problem import AttentionMasking, AttentionProblem

PROBLEM = AttentionProblem(2, 4, 8, 1, 100, 128, torch.bfloat16)
Options = dict[str, Any]


@dataclass(frozen=True)
class Buffer:
    """As much of a tiered buffer as a launch asks for."""

    address: int
    tier: str = "cpu"
    device_record: int = 4096


class Launches(list[Options]):
    """What would have been launched."""

    def __call__(self, problem: Any, configuration: Any, **options: Any) -> None:
        self.append({"problem": problem, "configuration": configuration, **options})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """A Hopper card, on which every cache is tiered."""
    found = Launches()
    monkeypatch.setattr(dispatch, "capability", lambda _: (9, 0))
    monkeypatch.setattr(address_table, "lookup", lambda address: Buffer(address))
    monkeypatch.setattr(dispatch, "launch", found)
    return found


def operands(
    batch: int = 2, heads: int = 8, kv_heads: int = 2, queries: int = 1, dim: int = 128
) -> dict[str, Tensor]:
    """query, and key and value with tokens outermost."""
    stored = (50, batch, kv_heads, dim)
    return {
        "query": torch.randn(batch, heads, queries, dim, dtype=torch.bfloat16),
        "key": torch.randn(stored).to(torch.bfloat16).permute(1, 2, 0, 3),
        "value": torch.randn(stored).to(torch.bfloat16).permute(1, 2, 0, 3),
    }


def run(**more: Any) -> Tensor | None:
    call: Options = {
        **operands(), "lengths": None, "starts": None, "mask": None, "scale": 0.1, "causal": True,
        "window": 0, "softcap": 0.0, **more,
    }  # fmt: skip
    return dispatch.run(AttentionOperands(**call))


def test_a_call_becomes_a_launch(launches: Launches) -> None:
    lengths = torch.tensor([3, 50], dtype=torch.int32)
    output = run(lengths=lengths, window=7, softcap=2.0)
    assert output is not None and output.shape == (2, 8, 1, 128)
    assert output.transpose(1, 2).is_contiguous()
    (made,) = launches
    assert made["problem"] == AttentionProblem(2, 2, 4, 1, 50, 128, torch.bfloat16)
    assert made["masking"] == AttentionMasking(0.1, True, 7, 2.0)
    assert made["lengths"] is lengths and made["starts"] is None
    assert made["out"].shape == (2, 1, 8, 128)


def test_queries_are_copied_only_where_the_kernel_cannot_read_them(launches: Launches) -> None:
    plain = operands(queries=3)["query"]
    readable = (plain, plain.transpose(1, 2).contiguous().transpose(1, 2), plain[:, :, :2])
    wide = torch.randn(2, 8, 3, 2 * 128 + 1, dtype=torch.bfloat16)
    for query in readable:
        run(query=query)
        assert launches.pop()["query"] is query
    for query in (
        wide[..., :128],
        wide[..., 1:257:2],
        torch.randn(6145).bfloat16()[1:].view(2, 8, 3, 128),
    ):
        run(query=query)
        seen = launches.pop()["query"]
        assert torch.equal(seen, query) and seen.stride(3) == 1
        assert seen.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in seen.stride()[:3])


def test_what_the_kernel_does_not_take_is_declined(launches: Launches) -> None:
    usual = operands()
    expanded = usual["key"][:, :1].expand(2, 2, 50, 128)
    for what, more in {
        "mask": {"mask": torch.ones(2, 1, 1, 50, dtype=torch.bool)},
        "scale": {"scale": 0.0},
        "negative scale": {"scale": -1.0},
        "infinite scale": {"scale": math.inf},
        "softcap": {"softcap": math.nan},
        "window": {"window": 2**31},
        "int64 lengths": {"lengths": torch.tensor([1, 2])},
        "lengths of another batch": {"lengths": torch.ones(3, dtype=torch.int32)},
        "other dtype": {name: tensor.float() for name, tensor in usual.items()},
        "two dtypes": {"query": usual["query"].half()},
        "heads": {"query": usual["query"][:, :7]},
        "no queries": {"query": usual["query"][:, :, :0]},
        "values of another size": {"value": usual["value"][..., :64]},
        "a head size": operands(dim=72),
        "a batch": operands(batch=MAXIMUM_BATCH + 1),
        "expanded heads": {"key": expanded, "value": expanded},
    }.items():
        assert run(**more) is None, what
    assert not launches


def test_declined_without_a_word_where_nothing_is_tiered(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address_table, "lookup", lambda _: None)
    monkeypatch.setattr(dispatch, "_log_once", lambda reason: pytest.fail(reason))
    assert run() is None and not launches


@pytest.mark.parametrize("other", [{"tier": "cuda:1"}, {"device_record": 0}])
def test_both_tiers_must_be_served(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, other: Options
) -> None:
    buffers = iter((Buffer(0), Buffer(0, **other)))
    monkeypatch.setattr(address_table, "lookup", lambda _: next(buffers))
    assert run() is None and not launches


def test_many_queries_are_staged(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = torch.zeros(1)
    monkeypatch.setattr(staged, "run", lambda *_, **__: marker)
    assert run(**operands(queries=17)) is marker
    assert run(**operands(queries=16)) is not marker and len(launches) == 1


def test_maps_and_arguments_see_the_strides_of_a_cache() -> None:
    key = operands()["key"]
    assert tensor_maps.byte_strides(key) == (256, 512, 1024)
    assert tensor_maps.byte_strides(key.contiguous()) == (50 * 256, 100 * 256, 256)
    assert tensor_maps.byte_strides(key[:1, :, :1]) == (256, 256, 256), "of one any does"
    assert tensor_maps.refusal(key) is None
    for cache in (
        key.transpose(2, 3),
        key[..., 1:],
        torch.randn(2, 2, 50, 129).bfloat16()[..., :128],
        key.flip(3)[..., ::2],
        torch.empty(1, 1, 2, 64, dtype=torch.bfloat16, device="meta").as_strided(
            (1, 1, 2, 64), (0, 0, 1 << 39, 1)
        ),
    ):
        assert tensor_maps.refusal(cache) is not None
    packed = launch.CachedTensor(key, Buffer(key.data_ptr() - 512)).packed()  # type: ignore[arg-type]
    assert launch._CACHE.unpack(packed) == (
        4096, 512, 512, 256, 1024, *launch.divisor(64)
    )  # fmt: skip
    assert launch._CACHE.unpack(launch.CachedTensor(key, None).packed())[0] == 0
    assert 2 * launch._CACHE.size + launch._REST.size == 264


@pytest.mark.parametrize(("size", "bytes_at_once"), [(64, 2), (80, 0), (96, 1), (128, 2), (192, 2)])
def test_l2_fetches_no_other_head_and_no_other_box(size: int, bytes_at_once: int) -> None:
    assert tensor_maps._promotion(2 * size) == bytes_at_once


def test_scores_are_scaled_for_powers_of_two() -> None:
    scale, cap = launch._score_factors(AttentionMasking(0.25))
    assert scale == pytest.approx(0.25 / math.log(2)) and cap == 0
    scale, cap = launch._score_factors(AttentionMasking(0.25, softcap=30.0))
    score = 7.0
    power = 2 ** (cap * score)
    capped = scale * (1 - 2 / (power + 1))
    assert 2**capped == pytest.approx(math.exp(30 * math.tanh(score * 0.25 / 30)))


def test_sweeps_are_for_far_tokens() -> None:
    problem = replace(PROBLEM, batch=64, kv_heads=8, tokens=100)
    found = choose(problem)
    row = problem.row_bytes
    far = (row, 8 * row, 64 * 8 * row)
    assert found.sweep_tokens(problem, far, far) == found.tile
    near = (row, 8 * row, 32 * 8 * row)
    assert found.sweep_tokens(replace(problem, batch=32), near, near) == 2 * found.tile
    nearer = (row, 8 * row, 16 * 8 * row)
    assert found.sweep_tokens(replace(problem, batch=16), nearer, nearer) == NO_SWEEP
    # some sequences of a cache, with the tokens as far apart
    assert found.sweep_tokens(replace(problem, batch=3), far, far) == found.tile
    plain = (100 * row, 8 * 100 * row, row)
    assert found.sweep_tokens(problem, plain, plain) == NO_SWEEP
    assert found.sweep_tokens(problem, far, plain) == NO_SWEEP


def test_configurations_hold_their_queries() -> None:
    for head_dim in HEAD_DIMS:
        for ratio, queries in ((1, 1), (4, 16), (8, 16), (71, 16)):
            problem = replace(PROBLEM, head_dim=head_dim, ratio=ratio, queries=queries)
            assert refusal(problem) is None
            found = choose(problem)
            assert found.rows * found.row_blocks(problem) >= problem.rows
            assert found.row_blocks(problem) == 1 or found.teams == 1
            assert found.slot_floats(problem) % 4 == 0
            assert 0 < found.most_chunks(problem) <= MOST_CHUNKS
            # a chunk's result is a small part of its keys and values
            read = found.least_chunk(problem) * 2 * found.slot_bytes
            assert 2 * min(found.rows, problem.rows) * head_dim <= read
            rows = min(found.rows, problem.rows)
            assert found.slot_floats(problem) >= rows * (head_dim + 4)
            # boxes of r rows begin at multiples of 2 r, and in each panel of 128 bytes
            assert 2 * found.finest_rows * 2 * (head_dim % 64 or 64) % 128 == 0
            for workers in (8, 264):
                slots = found.partial_slots(problem, workers)
                words = found.counters(problem, workers)
                units = found.units(problem)
                assert words >= 1 + units * found.warpgroups
                assert slots <= MOST_AT_ONCE or words >= 1 + (units + slots) * found.warpgroups
    assert choose(replace(PROBLEM, dtype=torch.float16)) == AttentionConfiguration(128, 64, 2, True)
    assert refusal(replace(PROBLEM, queries=17)) and refusal(replace(PROBLEM, tokens=0))

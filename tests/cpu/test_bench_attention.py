"""The benchmark of decode attention where no GPU is needed: its bars, grid, peers and record."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operator
from dak_inductor.benchmarks import bench_attention
from dak_inductor.benchmarks.harness import attention_bars, attention_grid, attention_peers
from dak_inductor.benchmarks.harness.attention_bars import AttentionCell
from dak_inductor.benchmarks.harness.attention_case import (
    SPLITS,
    AttentionSpec,
    make_case,
    split_bytes,
)
from dak_inductor.benchmarks.harness.attention_grid import AttentionShape
from dak_inductor.benchmarks.harness.attention_reference import AttentionCall, make_reference
from dak_inductor.benchmarks.harness.attention_table import grid_table, over_table
from dak_inductor.benchmarks.harness.linear_grid import Shard
from dak_inductor.cuda_runtime.simulated import SimulatedTier

BIG, SMALL = 470 * 10**6, 64 * 10**6


def cell(fraction: float, **more: float) -> AttentionCell:
    """A cell whose three times are equal: it meets every bar that it is not made to miss."""
    usual = {"cache_bytes": BIG, "seconds": 1e-4, "direct": 1e-4, "resident": 1e-4}
    return AttentionCell(fraction, **{**usual, **more})  # type: ignore[arg-type]


def test_every_cell_has_a_bar() -> None:
    for fraction in attention_grid.FRACTIONS:
        assert not attention_bars.missed(cell(fraction))
        assert len(attention_bars.missed(cell(fraction, seconds=1e-3))) == 1


def test_bars_are_against_the_bound_or_the_resident_kernel() -> None:
    allowed = 1.06 * 1e-4 + 8e-6
    assert not attention_bars.missed(cell(0.1, seconds=allowed, resident=1e-9))
    (excess,) = attention_bars.missed(cell(0.1, seconds=1.01 * allowed)).values()
    assert excess == pytest.approx(1.01)
    assert not attention_bars.missed(cell(0.0, seconds=1.03e-4, direct=1e-9))
    assert attention_bars.missed(cell(0.0, seconds=1.04e-4, direct=1.0))


def test_a_prefill_is_against_the_larger_of_both() -> None:
    for fraction in attention_grid.PREFILL_FRACTIONS:
        slow = cell(fraction, seconds=1.16e-4, prefill=True)
        assert list(attention_bars.missed(slow)) == ["prefill: T <= 1.15 max(L, C)"]
        for other in ("direct", "resident"):
            assert not attention_bars.missed(replace(slow, **{other: 1.01e-4}))  # type: ignore[arg-type]
    assert attention_bars.mean_over_direct([slow]) is None


def test_flops_are_of_what_queries_see() -> None:
    step, prompt = AttentionShape(2, 40, 3, 4, 64), AttentionShape(2, 40, 3, 4, 64, 40)
    assert step.flops == 4 * 2 * 12 * 40 * 64 and not step.is_prefill
    assert prompt.flops == 4 * 2 * 12 * (40 * 41 // 2) * 64 and prompt.is_prefill
    assert len(attention_grid.units([prompt], attention_grid.FRACTIONS)) == 4


def test_verdicts_name_the_worst_cell_and_the_geometric_mean() -> None:
    cells = [
        cell(0.02, seconds=1.02e-4),
        cell(0.5, seconds=1.2e-4),
        cell(0.02, seconds=2e-4, cache_bytes=SMALL),
        cell(0.0, seconds=9.0),
    ]
    direct, resident, mean = attention_bars.verdicts(cells, on_gpu=True)
    assert direct.passed is False and "2 over" in direct.note
    assert resident.passed is False
    assert mean.measured == pytest.approx(math.sqrt(1.02 * 1.2)) and mean.passed is False
    assert all(found.passed is None for found in attention_bars.verdicts(cells, on_gpu=False))


def test_the_grid_covers_what_was_asked_and_shards_cover_it_once() -> None:
    shapes = attention_grid.SHAPES
    assert {shape.head_dim for shape in shapes} == {64, 80, 96, 128, 192, 256}
    assert {shape.ratio for shape in shapes} >= {1, 4, 7, 8}
    assert {shape.batch for shape in shapes} >= {1, 128}
    sizes = [shape.cache_bytes(torch.bfloat16) for shape in shapes]
    assert min(sizes) <= 64 << 20 and max(sizes) > 30e9
    whole = attention_grid.units(shapes, attention_grid.FRACTIONS)
    parts = [
        attention_grid.units(shapes, attention_grid.FRACTIONS, Shard(index, 7))
        for index in range(1, 8)
    ]
    assert list(itertools.chain(*parts)) == whole
    assert attention_grid.parse_shapes("1x2x3x4x5, 8x64x2x4x128x16") == (
        AttentionShape(1, 2, 3, 4, 5),
        AttentionShape(8, 64, 2, 4, 128, 16),
    )
    assert [str(shape) for shape in attention_grid.parse_shapes("8x64x2x4x128x16")] == [
        "8x64x2x4x128x16"
    ]
    for text in ("8x64x2x4", "0x1x1x1x64", "8"):
        with pytest.raises(argparse.ArgumentTypeError):
            attention_grid.parse_shapes(text)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_stock_variants_compute_the_same(queries: int) -> None:
    shape = (2, 2, 40, 64)
    cache = (torch.randn(shape), torch.randn(shape))
    query = torch.randn(2, 8, queries, 64)
    expected = AttentionCall(query, *cache, scale=1 / 8).stock()
    variants = [attention_peers.StockAttention()]
    if queries == 1:
        variants.append(attention_peers.StockAttention(packed=True))
    for variant in variants:
        torch.testing.assert_close(variant(query, cache), expected)
    layers = attention_peers.OffloadedLayers([cache] * 3, "cpu")
    torch.testing.assert_close(layers.round(variants[0], query)(), expected)


def test_peers_of_a_cell() -> None:
    assert attention_peers.chosen("none", 0.5, SMALL) == ()
    assert attention_peers.chosen("all", 0.0, SMALL) == ()
    assert attention_peers.chosen("fast", 0.5, SMALL) == (attention_peers.STOCK,)
    assert attention_peers.chosen("all", 0.5, 40 << 30) == (attention_peers.STOCK,)
    assert len(attention_peers.chosen("all", 0.5, SMALL)) == 2


@pytest.mark.parametrize("name", SPLITS)
def test_cases_count_what_queries_see(name: str) -> None:
    spec = AttentionSpec(
        3, 2, 2, 2, 50, 64, lengths=(50, 0, 21), starts=(3, 0, 20), window=30, causal=True
    )
    split = split_bytes(name, spec)
    case = make_case(replace(spec, splits=(split, split)), SimulatedTier(), torch.device("cpu"))
    row_bytes = 128
    # window: 30 tokens back from the first of two queries
    tokens = {0: range(19, 50), 1: range(0), 2: range(20, 21)}
    buffer = case.buffers[0]
    local = remote = 0
    for sequence, seen in tokens.items():
        for token, head in itertools.product(seen, range(2)):
            place = (token * 3 + sequence) * 2 * row_bytes + head * row_bytes
            inside = min(max(buffer.split - place, 0), row_bytes)
            local, remote = local + inside, remote + row_bytes - inside
    found = case.bytes_read(0)
    assert (found.local, found.remote) == (local, remote)
    unread = ~case.resident.seen().any(2)[:, 0]
    assert bool(case.tiered.key.isnan().any(1).any(-1).eq(unread).all())


def test_reference_tells_right_from_wrong() -> None:
    spec = AttentionSpec(2, 2, 4, 3, 40, 64, lengths=(40, 2), softcap=5.0)
    call = make_case(spec, SimulatedTier(), torch.device("cpu")).resident
    reference = make_reference(call)
    assert reference.judge(call.stock()).passed
    assert not reference.judge(replace(call, causal=False).stock()).passed
    assert not bool(reference.exact[1, :, 0].any()), "it sees nothing"


def test_benchmark_runs_and_writes_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = bench_attention.main(
        ["--out", str(tmp_path), "--remote", "simulated", "--fractions", "0,0.25",
         "--seconds-per-cell", "0.001", "--peers", "all", "--record", "attention_small"]
    )  # fmt: skip
    read = json.loads((tmp_path / "attention_small.json").read_text())
    assert status == 0
    assert len(read["cells"]) == 2 * len(attention_grid.TINY_SHAPES)
    for row in read["cells"]:
        assert row["status"] == "ok" and row["accurate"] and row["repeatable"]
        assert row["counted_remote_bytes"] == row["remote_bytes"]
        assert len(row["peers_microseconds"]) == (2 if row["fraction"] else 0)
        assert all(isinstance(value, float) for value in row["peers_microseconds"].values())
    assert "2x40x2x4x64" in capsys.readouterr().out


def test_benchmark_keeps_what_it_has_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = bench_attention.measure_cell

    def failing(case, tiered, fraction, *arguments):  # type: ignore[no-untyped-def]
        if fraction == 0.5:
            raise RuntimeError("injected")
        return measured(case, tiered, fraction, *arguments)

    monkeypatch.setattr(bench_attention, "measure_cell", failing)
    options = ["--out", str(tmp_path), "--remote", "simulated", "--seconds-per-cell", "0.001"]
    options += ["--shapes", "1x33x2x1x64"]
    assert bench_attention.main([*options, "--fractions", "0,0.5,1"]) == 1
    read = json.loads((tmp_path / "attention.json").read_text())
    assert [row["status"] for row in read["cells"]] == ["ok", "failed", "ok"]
    assert "injected" in capsys.readouterr().out
    assert bench_attention.main([*options, "--limit-seconds", "1e-9"]) == 1
    assert "cells were left out" in capsys.readouterr().out


def test_tables_mark_what_is_over_wrong_or_failed() -> None:
    shared = {"shape": "s", "accurate": True, "T/L": 1.2, "T/C": 0.9}
    rows: list[dict[str, object]] = [
        {**shared, "fraction": 0.0, "over": {}},
        {**shared, "fraction": 0.1, "over": {"bar one": 1.1, "bar two": 1.5}},
        {**shared, "fraction": 0.2, "accurate": False},
        {**shared, "fraction": 0.3, "status": "failed"},
    ]
    assert grid_table(rows).splitlines()[-1].split()[1:] == ["0.900", "1.200!", "bad", "x"]
    assert [line.split()[-1] for line in over_table(rows).splitlines()[2:]] == ["two", "one"]

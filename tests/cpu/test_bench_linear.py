"""The benchmark of single linears where no GPU is needed: its bars, grid, peers and record."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
from dak_inductor.benchmarks import bench_linear
from dak_inductor.benchmarks.harness import linear_bars, linear_grid, linear_peers
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter
from dak_inductor.benchmarks.harness.linear_bars import LinearCell
from dak_inductor.benchmarks.harness.linear_grid import LinearShape, Shard
from dak_inductor.benchmarks.harness.linear_reference import LinearCall, make_reference
from dak_inductor.benchmarks.harness.linear_table import grid_table, over_table
from dak_inductor.benchmarks.harness.linear_weights import split_at, tiered_copies
from dak_inductor.cuda_runtime.simulated import SimulatedTier

BIG, SMALL, TINY = 470 * 10**6, 20 * 10**6, 8 * 10**6


def cell(
    tokens: int,
    fraction: float,
    *,
    seconds: float = 1e-4,
    direct: float = 1e-4,
    resident: float = 1e-4,
    weight_bytes: int = BIG,
    amplification: float | None = 1.0,
) -> LinearCell:
    """A cell whose three times are equal: it meets every bar that it is not made to miss."""
    return LinearCell(
        tokens, fraction, weight_bytes, seconds, direct, resident, direct, amplification
    )


def names(found: LinearCell) -> list[str]:
    return [bar.name for bar, _ in linear_bars.missed(found)]


def test_every_cell_of_a_large_weight_has_a_bar() -> None:
    every = linear_grid.DECODE_TOKENS + linear_grid.PREFILL_TOKENS
    for tokens, fraction in itertools.product(every, linear_grid.FRACTIONS):
        good = cell(tokens, fraction)
        assert any(bar.covers(good) for bar in linear_bars.BARS), (tokens, fraction)
        assert not linear_bars.missed(good), (tokens, fraction)
        assert linear_bars.missed(cell(tokens, fraction, seconds=1e-3)), (tokens, fraction)


@pytest.mark.parametrize(("tokens", "limit"), [(1, 1.05), (32, 1.05), (64, 1.08), (128, 1.15)])
def test_decode_may_take_a_share_and_four_microseconds(tokens: int, limit: float) -> None:
    allowed = limit * 1e-4 + 4e-6
    assert not names(cell(tokens, 0.02, seconds=allowed))
    (missed,) = linear_bars.missed(cell(tokens, 0.02, seconds=allowed * 1.01))
    assert missed[1] == pytest.approx(1.01)
    assert not names(cell(tokens, 0.02, seconds=1, weight_bytes=TINY))  # no bar below 16 MB


@pytest.mark.parametrize(("tokens", "share"), [(1, 0.92), (32, 0.92), (64, 0.90), (128, 0.85)])
def test_nothing_remote_is_against_the_stock_kernel_and_hbm(tokens: int, share: float) -> None:
    slow = cell(tokens, 0.0, seconds=1e-4 / share * 1.01, resident=1)
    assert [name.split(":")[1] for name in names(slow)] == [f" HBM >= {share:.0%}"]
    assert not names(cell(tokens, 0.0, seconds=1e-4 / share, resident=1))
    assert not names(cell(tokens, 0.0, seconds=1.01, resident=1, weight_bytes=SMALL))
    assert names(cell(tokens, 0.0, seconds=1.03, resident=1, weight_bytes=SMALL)) == [
        "nothing remote: T <= 1.02 C"
    ]


def test_prefill_is_against_the_larger_bound_and_the_bytes_on_the_link() -> None:
    assert not names(cell(1024, 0.1, seconds=1.09, direct=1, resident=0.5))
    assert not names(cell(1024, 0.1, seconds=1.09, direct=0.5, resident=1))
    assert names(cell(1024, 0.1, seconds=1.11, direct=1, resident=1))
    assert names(cell(1024, 0.01, seconds=1.09, direct=1, resident=1))
    assert not names(cell(1024, 0.01, seconds=1.07, direct=1, resident=1))
    assert names(cell(1024, 0.1, amplification=1.06))
    ((bar, excess),) = linear_bars.missed(cell(1024, 0.1, amplification=None))
    assert bar.against == "link bytes" and excess == math.inf  # not counted is not passed


def test_verdicts_name_the_worst_cell_and_the_geometric_mean() -> None:
    cells = [cell(1, 0.02, seconds=1.02e-4), cell(16, 0.02, seconds=1.2e-4)]
    decode, mean = linear_bars.verdicts(cells, on_gpu=True)
    assert decode.passed is False and decode.measured == pytest.approx(1.2e-4 / 1.09e-4)
    assert "1 over" in decode.note
    assert mean.measured == pytest.approx(math.sqrt(1.02 * 1.2)) and mean.passed is False
    assert all(v.passed is None for v in linear_bars.verdicts(cells, on_gpu=False))
    (without_mean,) = linear_bars.verdicts([cell(1, 0.02, weight_bytes=SMALL)], on_gpu=True)
    assert without_mean.passed is True


def test_shards_cover_the_grid_once() -> None:
    whole = linear_grid.units(linear_grid.SHAPES, linear_grid.FRACTIONS)
    parts = [
        linear_grid.units(linear_grid.SHAPES, linear_grid.FRACTIONS, Shard(index, 7))
        for index in range(1, 8)
    ]
    assert list(itertools.chain(*parts)) == whole and len(whole) == 100
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert linear_grid.units(linear_grid.TINY_SHAPES, (0.5,), Shard(3, 3))


def test_options_of_the_grid() -> None:
    assert linear_grid.parse_shapes("264x72, 8x8") == (LinearShape(264, 72), LinearShape(8, 8))
    assert linear_grid.parse_tokens("prefill,1") == (1, *linear_grid.PREFILL_TOKENS)
    assert linear_grid.parse_shard("2/4") == Shard(2, 4)
    for read, text in (
        (linear_grid.parse_shapes, "264"),
        (linear_grid.parse_shapes, "0x8"),
        (linear_grid.parse_tokens, "0"),
        (linear_grid.parse_tokens, "some"),
        (linear_grid.parse_shard, "3/2"),
        (linear_grid.parse_shard, "0/2"),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


def test_splits_are_exact_to_256_bytes() -> None:
    values = torch.randn(264, 72).to(torch.bfloat16)
    for fraction in linear_grid.FRACTIONS:
        made = tiered_copies(
            values, SimulatedTier(), split=split_at(values.nbytes, fraction), copies=2
        )
        held = made.bytes_each
        assert 0 <= held.remote - fraction * values.nbytes <= 256
        assert all(torch.equal(tensor, values) for tensor in made.tensors)
        counter = ReadCounter(made.buffers)
        counter.reset()
        for tensor in made.tensors:
            torch.ops.dak.linear.default(torch.randn(2, 72).to(torch.bfloat16), tensor)
        reads = counter.read()
        assert reads is not None and reads.calls == 2
        assert (reads.local_bytes, reads.remote_bytes) == (2 * held.local, 2 * held.remote)


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_reference_agrees_with_the_operators(activation: str, layout: str) -> None:
    x = torch.randn(2, 3, 72).to(torch.bfloat16)
    shape = (264, 72) if layout == "out_in" else (72, 264)
    gate, up = (torch.randn(shape).to(torch.bfloat16) for _ in range(2))
    bias = torch.randn(264).to(torch.bfloat16)
    residual = torch.randn(2, 3, 264).to(torch.bfloat16)
    plain = LinearCall(x, (gate,), (bias,), residual, activation, layout)
    ours = torch.ops.dak.linear_epilogue.default(x, gate, bias, residual, activation, layout)
    assert torch.equal(ours, plain.stock())
    assert make_reference(plain).judge(ours).passed
    assert not make_reference(plain).judge(ours + residual).passed
    gated = LinearCall(x, (gate, up), (bias, None), None, activation, layout)
    ours = torch.ops.dak.gated_linear.default(x, gate, up, bias, None, activation, layout)
    assert torch.equal(ours, gated.stock())


def test_peers_of_a_cell() -> None:
    assert linear_peers.chosen("none", 1, 0.5) == ()
    assert linear_peers.chosen("all", 1, 0.0) == ()
    assert linear_peers.chosen("fast", 128, 0.5) == (linear_peers.STOCK,)
    assert linear_peers.chosen("fast", 256, 0.5) == ()
    assert linear_peers.chosen("all", 256, 0.5) == (linear_peers.STOCK, linear_peers.PREFETCH)
    weights = [torch.randn(16, 8), torch.randn(16, 8)]
    prefetched = linear_peers.PrefetchedRows([weight.clone() for weight in weights], 0.25, "cpu")
    for weight in prefetched.weights:
        weight[12:].fill_(math.nan)  # what the copies must bring in again
    x = torch.randn(3, 8)
    output = prefetched.round(x)()
    assert torch.equal(output, torch.nn.functional.linear(x, weights[-1]))
    assert not any(bool(weight.isnan().any()) for weight in prefetched.weights)


def test_benchmark_runs_and_writes_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = bench_linear.main(
        ["--out", str(tmp_path), "--remote", "simulated", "--m", "1,256", "--fractions", "0,0.25",
         "--seconds-per-cell", "0.001", "--peers", "all", "--record", "linear_small"]
    )  # fmt: skip
    read = json.loads((tmp_path / "linear_small.json").read_text())
    assert status == 0
    assert len(read["cells"]) == len(linear_grid.TINY_SHAPES) * 2 * 2
    for row in read["cells"]:
        assert row["status"] == "ok" and row["accurate"] and row["repeatable"]
        assert row["counted_remote_bytes"] == row["remote_bytes"]
        assert set(row["peers_microseconds"]) == (
            {linear_peers.STOCK, linear_peers.PREFETCH} if row["fraction"] else set()
        )
    assert {"hbm_stream", "link_direct"} <= set(read["ceilings"])
    assert "264x72" in capsys.readouterr().out


def test_benchmark_keeps_what_it_has_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = bench_linear.measure_cell

    def failing(case, *arguments):  # type: ignore[no-untyped-def]
        if case.tokens == 8:
            raise RuntimeError("injected")
        return measured(case, *arguments)

    monkeypatch.setattr(bench_linear, "measure_cell", failing)
    options = ["--out", str(tmp_path), "--remote", "simulated", "--seconds-per-cell", "0.001"]
    assert bench_linear.main([*options, "--fractions", "0.5", "--shapes", "64x128"]) == 1
    read = json.loads((tmp_path / "linear.json").read_text())
    assert [row["status"] for row in read["cells"]] == ["ok", "failed", "ok"]
    assert "injected" in capsys.readouterr().out
    assert bench_linear.main([*options, "--limit-seconds", "1e-9"]) == 1
    assert "cells were left out" in capsys.readouterr().out


def test_tables_mark_what_is_over_wrong_or_failed() -> None:
    shared = {"shape": "8x8", "fraction": 0.5, "accurate": True, "T/L": 1.2}
    rows: list[dict[str, object]] = [
        {**shared, "M": 1, "over": {}},
        {**shared, "M": 2, "over": {"bar one": 1.1, "bar two": math.inf}},
        {**shared, "M": 4, "accurate": False},
        {**shared, "M": 8, "status": "failed"},
    ]
    assert grid_table(rows).splitlines()[-1].split()[2:] == ["1.200", "1.200!", "bad", "x"]
    assert [line.split()[-1] for line in over_table(rows).splitlines()[2:]] == ["two", "one"]

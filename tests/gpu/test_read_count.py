"""Reads of stock kernels, counted on the card: one by one, and by the tables of captured graphs."""

from __future__ import annotations

import pytest
import torch

from dak_inductor.cuda_runtime.device_records import RecordCounters, records_of
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import device_counters, reads

pytestmark = pytest.mark.usefixtures("no_grad")

PAGE = 2 << 20
COUNT = 45  # buffers: with two reads each more than one table holds


def made(tier: Tier, split: int) -> tuple[TieredBuffer, torch.Tensor]:
    buffer = tier.allocate(2 * PAGE, split=split)
    return buffer, buffer.tensor(torch.uint8, (2 * PAGE,), None, 0)


def counted(buffer: TieredBuffer, device: torch.device) -> RecordCounters:
    torch.cuda.synchronize(device)
    return records_of(device).read_counters()[buffer]


def test_a_call_outside_of_a_capture(tier: Tier, device: torch.device) -> None:
    buffer, whole = made(tier, PAGE)
    reads.count_dense("linear", whole[PAGE // 2 :], whole[:16])
    reads.count_dense("linear", whole)
    assert counted(buffer, device) == RecordCounters(3 * PAGE // 2 + 16, 2 * PAGE, 2)


def test_replays_count_each_read_of_many_buffers(tier: Tier, device: torch.device) -> None:
    """In tables that later captures do not touch, on a side stream of the capture as well, and by
    the split of each replay."""
    held = [made(tier, PAGE) for _ in range(COUNT)]
    reads.count_dense("linear", held[0][1])  # what a model does before it is captured
    side = torch.cuda.Stream(device)
    graphs = []
    for first in (0, 1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            current = torch.cuda.current_stream(device)
            for position, (_, whole) in enumerate(held[first:]):
                reads.count_dense("linear", whole[: PAGE + position], whole[2 * PAGE - 8 :])
            side.wait_stream(current)
            with torch.cuda.stream(side):
                reads.count_dense("linear", held[-1][1])
            current.wait_stream(side)
        graphs.append(graph)
    device_counters.reset()
    for graph in (graphs[0], graphs[1], graphs[0]):
        graph.replay()
    for position, (buffer, _) in enumerate(held):
        wanted = RecordCounters()
        for first, replays in ((0, 2), (1, 1)):
            if position >= first:
                local, remote = replays * PAGE, replays * (position - first + 8)
                wanted = RecordCounters(
                    wanted.local_bytes + local, wanted.remote_bytes + remote, wanted.calls + replays
                )
        if position == COUNT - 1:
            wanted = RecordCounters(
                wanted.local_bytes + 3 * PAGE, wanted.remote_bytes + 3 * PAGE, wanted.calls + 3
            )
        assert counted(buffer, device) == wanted, position
    buffer, _ = held[5]
    device_counters.reset()
    torch.cuda.synchronize(device)
    buffer.move(0)
    graphs[0].replay()
    assert counted(buffer, device) == RecordCounters(0, PAGE + 5 + 8, 1)


def test_a_capture_that_failed_leaves_the_next_one_right(tier: Tier, device: torch.device) -> None:
    buffer, whole = made(tier, PAGE)
    reads.count_dense("linear", whole)
    with pytest.raises(ValueError, match="given up"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        reads.count_dense("linear", whole)
        raise ValueError("given up")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reads.count_dense("linear", whole)
    device_counters.reset()
    graph.replay()
    assert counted(buffer, device) == RecordCounters(PAGE, PAGE, 1)


def test_nothing_is_counted_inside_of_uncounted(tier: Tier, device: torch.device) -> None:
    buffer, whole = made(tier, PAGE)
    with reads.uncounted():
        reads.count_dense("linear", whole)
    assert counted(buffer, device) == RecordCounters()

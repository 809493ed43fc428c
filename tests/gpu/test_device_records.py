"""Records in device memory, as kernels see them: splits after moves, counters, captures."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.device_records import RECORD_BYTES, RecordCounters, records_of
from dak_inductor.cuda_runtime.exported import bytes_tensor
from dak_inductor.cuda_runtime.registered import RegisteredTier
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.window import window_of

PAGE = 2 << 20
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.synchronize()
    assert vmm.drain(60)


@pytest.fixture(params=["cpu", pytest.param("cuda:1", marks=pytest.mark.gpus(2)), "registered"])
def tier(request: pytest.FixtureRequest) -> Tier:
    if request.param == "registered":
        return RegisteredTier(DEVICE)
    return open_tier(request.param, device=DEVICE)


def record(buffer: TieredBuffer) -> torch.Tensor:
    """The record as eight int64 on the GPU: what kernels read and add to."""
    return bytes_tensor(buffer, buffer.device_record, RECORD_BYTES, DEVICE).view(torch.int64)


def test_a_new_buffer_has_its_split_on_the_device(tier: Tier) -> None:
    for split in (0, 3 * PAGE):
        buffer = tier.allocate(3 * PAGE, split=split)
        assert buffer.device_record % 16 == 0
        window = window_of(DEVICE, buffer.tier).address
        assert record(buffer).tolist() == [buffer.split, 0, 0, 0, 0, buffer.address, window, 0]


def test_moves_reach_work_launched_after_them() -> None:
    tier = open_tier("cpu", device=DEVICE)
    buffer = tier.allocate(8 * PAGE, split=4 * PAGE)
    address, words = buffer.device_record, record(buffer)
    seen = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        seen.copy_(words[:1])
    for split in (2 * PAGE, 0, 8 * PAGE, 5 * PAGE):
        torch.cuda.synchronize()
        assert buffer.move(split) == split
        graph.replay()
        assert seen.item() == split and buffer.device_record == address


def test_counters_of_kernels_are_read_and_reset(tier: Tier) -> None:
    buffer, records = tier.allocate(PAGE, split=0), records_of(DEVICE)
    records.reset_counters()
    record(buffer)[1:5] += torch.tensor([5, 6, 1, 7], device=DEVICE)
    torch.cuda.synchronize()
    assert records.read_counters()[buffer] == RecordCounters(5, 6, 1, 7)
    records.reset_counters()
    assert records.read_counters()[buffer] == RecordCounters()
    assert record(buffer)[0].item() == buffer.split


def test_publishing_does_not_break_a_capture(tier: Tier) -> None:
    buffer, records = tier.allocate(PAGE, split=0), records_of(DEVICE)
    x = torch.zeros(8, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        x += 1
        records.publish(buffer)
        x += 1
    graph.replay()
    assert x.sum().item() == 16 and record(buffer)[0].item() == buffer.split

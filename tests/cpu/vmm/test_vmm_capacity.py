"""What tiers take, what they refuse, and what they do where host pages are refused."""

from __future__ import annotations

import gc
import logging
import time
from typing import Any

import pytest
import torch

from dak_inductor.cuda_runtime import address_table, host_memory, vmm
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.probe_support import host_page_support
from dak_inductor.cuda_runtime.registered import RegisteredTier
from dak_inductor.cuda_runtime.vmm import VmmTier, open_device_tier
from dak_inductor.errors import (
    DeviceMemoryError,
    DriverError,
    HostMemoryError,
    MoveError,
    TierError,
    UnsupportedDriverError,
)

PAGE = 2 << 20
HOST = -1
GPU = torch.device("cuda", 0)
HOST_NUMA_SUPPORTED, VMM_SUPPORTED = 141, 102


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pages_are_prepared_ahead_and_none_too_many(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    total = 100 * PAGE
    tier.reserve(total)
    wait_for(lambda: tier.prepared_bytes() == total)
    buffers = []
    for pages in (1, 40, 9, 30, 20):
        buffers.append(tier.allocate(pages * PAGE, split=256))
        assert fake.used(HOST) <= total + len(buffers) * PAGE
    wait_for(lambda: tier.prepared_bytes() == 0)
    vmm.drain()
    held = sum(buffer.physical_bytes().remote for buffer in buffers)
    assert fake.used(HOST) == vmm.memory_in_use()["cpu"] == held
    assert held < sum(buffer.bytes_by_tier().remote for buffer in buffers) + len(buffers) * PAGE


def test_prepared_pages_nobody_takes_are_given_back(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    tier.reserve(50 * PAGE)
    wait_for(lambda: tier.prepared_bytes() == 50 * PAGE)
    tier.reserve(10 * PAGE)
    wait_for(lambda: fake.used(HOST) == 10 * PAGE)
    tier.trim()
    wait_for(lambda: fake.used(HOST) == 0)


def test_prepared_pages_make_allocation_cheap(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    tier.reserve(8 * PAGE)
    wait_for(lambda: tier.prepared_bytes() == 8 * PAGE)
    calls = fake.calls("cuMemCreate")
    buffer = tier.allocate(8 * PAGE, split=256)  # the local page and the remote rest
    assert fake.calls("cuMemCreate") == calls + 1
    assert buffer.physical_bytes().remote == 8 * PAGE


def test_host_memory_is_refused_before_anything_is_taken(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, 10 * PAGE)
    calls = fake.calls("cuMemCreate")
    with pytest.raises(HostMemoryError, match="host_memory"):
        tier.allocate(11 * PAGE, split=0)
    with pytest.raises(HostMemoryError):
        tier.reserve(11 * PAGE)
    assert fake.calls("cuMemCreate") == calls
    held = tier.allocate(8 * PAGE, split=0)
    with pytest.raises(HostMemoryError):
        tier.allocate(3 * PAGE, split=0)
    buffer = tier.allocate(12 * PAGE, split=10 * PAGE)
    with pytest.raises(MoveError, match="the split stays"):
        buffer.move(PAGE)
    del held
    assert buffer.move(5 * PAGE) == 5 * PAGE
    with pytest.raises(HostMemoryError):
        VmmTier("cpu", GPU, None).allocate(1 << 50, split=0)


def test_a_full_gpu_is_refused_before_anything_is_taken(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    fake.capacity(0, 6 * PAGE)
    calls = fake.calls("cuMemCreate")
    with pytest.raises(DeviceMemoryError, match="cuda:0"):
        tier.allocate(8 * PAGE, split=7 * PAGE)
    assert fake.calls("cuMemCreate") == calls
    buffer = tier.allocate(8 * PAGE, split=PAGE)
    with pytest.raises(MoveError):
        buffer.move(8 * PAGE)
    assert buffer.move(5 * PAGE) == 5 * PAGE
    peer = VmmTier("cuda:1", GPU, None)
    fake.capacity(1, PAGE)
    with pytest.raises(DeviceMemoryError, match="cuda:1"):
        peer.reserve(2 * PAGE)


def test_memory_that_runs_out_while_pages_are_made(fake: Any) -> None:
    fake.capacity(HOST, 5 * PAGE)
    tier = VmmTier("cpu", GPU, None)
    with pytest.raises(HostMemoryError, match="cuMemCreate"):
        tier.allocate(20 * PAGE, split=10 * PAGE)
    vmm.drain()
    assert fake.used(0) == fake.used(HOST) == 0
    tier.reserve(20 * PAGE)  # the pool stops at what there is
    wait_for(lambda: tier.prepared_bytes() == 0)


def test_local_memory_is_free_when_a_move_returns(fake: Any) -> None:
    buffer = VmmTier("cpu", GPU, None).allocate(10 * PAGE, split=10 * PAGE)
    buffer.move(2 * PAGE)
    assert fake.used(0) == 2 * PAGE


@pytest.mark.parametrize("mode", ["refuse", "crash"])
def test_registered_memory_where_host_pages_are_refused(
    fake: Any, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DAK_FAKE_HOST_NUMA", mode)
    host_page_support.cache_clear()
    with caplog.at_level(logging.WARNING):
        tier = open_device_tier("cpu", device=GPU)
    host_page_support.cache_clear()
    assert isinstance(tier, RegisteredTier)
    expected = "signal" if mode == "crash" else "cuMemCreate"
    assert "registered host memory" in caplog.text and expected in caplog.text
    source = torch.randint(0, 255, (100_000,), dtype=torch.uint8)
    for split, remote in ((0, 100_000), (50_000, 100_000), (100_000, 0)):
        buffer = tier.allocate(100_000, split=split)
        assert buffer.bytes_by_tier().remote == remote
        held = buffer.physical_bytes()
        assert held == tier.held_bytes(100_000, split)
        assert held.remote < remote + 4096
        buffer.write(source)
        assert buffer.nearest_split(70_000) == buffer.move(70_000) == buffer.split
        assert torch.equal(buffer.tensor(torch.uint8, (100_000,)), source)
        assert torch.equal(buffer.remote_view().tensor(), source[buffer.split :])
        del buffer
        vmm.drain()
        assert vmm.memory_in_use().get("cpu", 0) == 0
    with pytest.raises(HostMemoryError):
        RegisteredTier(GPU, 1000).allocate(2000, split=0)
    fake.fail("cuMemHostRegister", 0, 2)
    with pytest.raises(Exception, match="cuMemHostRegister"):
        tier.allocate(5000, split=0)
    assert vmm.memory_in_use().get("cpu", 0) == 0


def test_cpu_access_by_location_host(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAK_FAKE_HOST_NUMA", "host")
    host_page_support.cache_clear()
    tier = open_device_tier("cpu", device=GPU)
    host_page_support.cache_clear()
    assert isinstance(tier, VmmTier)
    tier.allocate(PAGE, split=0).write(torch.ones(PAGE, dtype=torch.uint8))


def test_host_pages_are_used_where_they_work(fake: Any) -> None:
    tier = open_device_tier("cpu", device=GPU)
    assert isinstance(tier, VmmTier) and tier.name == "cpu"
    assert isinstance(open_device_tier("cuda:1", device=GPU), VmmTier)


def test_a_device_without_virtual_memory_is_refused(fake: Any) -> None:
    fake.attribute(VMM_SUPPORTED, 0)
    try:
        with pytest.raises(UnsupportedDriverError):
            extension().Tier(0)
    finally:
        fake.attribute(VMM_SUPPORTED, 1)


def test_driver_errors_say_what_failed(fake: Any) -> None:
    fake.fail("cuMemMap", 0, 999)
    with pytest.raises(Exception, match="cuMemMap failed with") as caught:
        VmmTier("cpu", GPU, None).allocate(PAGE, split=0)
    assert caught.value.call == "cuMemMap" and caught.value.status == 999  # type: ignore[attr-defined]
    with pytest.raises(TierError):
        extension().Tier(0).allocate(PAGE, 0).write(0, 2 * PAGE, 0)


@pytest.mark.parametrize("room", [3, 100])
def test_buffers_of_a_load_are_made_within_the_limit(fake: Any, room: int) -> None:
    """Where not all fit at once, what the caller gives up makes room for the next."""
    tier = VmmTier("cpu", GPU, room * PAGE)
    contents = torch.arange(2 * PAGE // 8)
    seen = 0
    for buffer in tier.allocate_each([(2 * PAGE, 0)] * 6):
        assert fake.used(HOST) <= room * PAGE
        buffer.write(contents)
        assert torch.equal(buffer.tensor(torch.int64, (contents.numel(),)), contents)
        assert address_table.lookup(buffer.address) is buffer
        seen += 1
        del buffer
        gc.collect()
    assert seen == 6


def test_a_load_does_not_look_for_room_at_each_tensor(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        host_memory, "_memory_available", lambda root: asked.append(root) or 64 << 30
    )
    for buffer in VmmTier("cpu", GPU, None).allocate_each([(2 * PAGE, 0)] * 40):
        del buffer
    assert 1 <= len(asked) <= 3


def test_a_load_that_stops_early_leaves_nothing(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffers = tier.allocate_each([(2 * PAGE, PAGE)] * 20)
    first = next(buffers)
    buffers.close()
    assert vmm.drain()
    assert fake.used(HOST) == fake.used(0) == PAGE == first.physical_bytes().remote
    fake.fail("cuMemSetAccess", after=5, lasting=True)
    with pytest.raises(DriverError):
        list(tier.allocate_each([(2 * PAGE, PAGE)] * 20))
    fake.heal()
    gc.collect()
    assert vmm.drain() and fake.used(HOST) == PAGE


def test_pages_that_are_not_mapped_are_not_used(fake: Any) -> None:
    pages = extension().Tier(0).make(PAGE, 0)
    with pytest.raises(TierError, match="not mapped yet"):
        pages.read(1, 0)
    pages.map()
    pages.map()
    assert len(pages.read(1, 0)) == 1 and pages.make_times.create_seconds > 0

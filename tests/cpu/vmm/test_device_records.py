"""Records that kernels read: layout, publication, counters, reuse of places."""

from __future__ import annotations

import ctypes
import gc
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dak_inductor import hardware
from dak_inductor.cuda_runtime import device_records, vmm, window
from dak_inductor.cuda_runtime.device_records import (
    RECORD_BYTES,
    RECORDS_IN_CHUNK,
    DeviceRecords,
    RecordCounters,
)
from dak_inductor.cuda_runtime.registered import RegisteredTier
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import DeviceMemoryError, MoveError, OptionError

PAGE = 2 << 20
DEVICE = torch.device("cuda", 0)
WINDOW_BYTES = window.RECORD_BYTES
"""The record of a link's window; both kinds are accounted together."""


def words(address: int) -> tuple[int, ...]:
    """The record as a kernel reads it; the stand-in's device memory is CPU memory."""
    return struct.unpack("<8Q", ctypes.string_at(address, RECORD_BYTES))


def count(address: int, *, local: int, remote: int, peak: int) -> None:
    """Do what a kernel does: add to the sums, raise the peak."""
    record = (ctypes.c_uint64 * 8).from_address(address)
    record[1] += local
    record[2] += remote
    record[3] += 1
    record[4] = max(record[4], peak)


def buffer_of(split: int = PAGE, nbytes: int = 3 * PAGE) -> TieredBuffer:
    return VmmTier("cpu", DEVICE, None).allocate(nbytes, split=split)


@pytest.fixture(autouse=True)
def no_windows_left(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words in the stand-in's memory go with the test."""
    monkeypatch.setattr(window, "_windows", {})


@pytest.fixture
def records(fake: Any) -> DeviceRecords:
    return DeviceRecords(DEVICE)


def places(buffer: TieredBuffer) -> tuple[int, int, int]:
    """The last words of a buffer's record."""
    return (buffer.address, window.window_of(DEVICE, buffer.tier).address, 0)


def test_a_record_holds_the_split_and_its_places_and_zeros(records: DeviceRecords) -> None:
    first, second = buffer_of(PAGE), buffer_of(512)
    assert (first.device_record, second.device_record) == (0, 0)
    addresses = [records.record(first), records.record(second)]
    assert addresses == [first.device_record, second.device_record]
    assert records.record(first) == addresses[0]
    assert abs(addresses[0] - addresses[1]) >= RECORD_BYTES
    assert (addresses[0] - addresses[1]) % RECORD_BYTES == 0
    assert words(addresses[0]) == (PAGE, 0, 0, 0, 0, *places(first))
    assert words(addresses[1]) == (512, 0, 0, 0, 0, *places(second))
    assert words(addresses[0])[6] == words(addresses[1])[6], "one window for a link"
    assert vmm.memory_in_use()["records"] == RECORDS_IN_CHUNK * RECORD_BYTES + WINDOW_BYTES


def test_a_move_publishes_and_keeps_counters(records: DeviceRecords) -> None:
    buffer = buffer_of(PAGE)
    address = records.record(buffer)
    count(address, local=10, remote=20, peak=30)
    for split in (2 * PAGE, 0, 3 * PAGE):
        assert buffer.move(split) == split
        assert words(address) == (split, 10, 20, 1, 30, *places(buffer))
        assert buffer.device_record == address


def test_a_move_that_fails_publishes_nothing(fake: Any, records: DeviceRecords) -> None:
    buffer = buffer_of(PAGE)
    address = records.record(buffer)
    fake.fail("cuMemCreate", lasting=True)
    with pytest.raises(MoveError):
        buffer.move(2 * PAGE)
    assert words(address)[0] == buffer.split == PAGE


def test_publish_writes_the_current_split(records: DeviceRecords) -> None:
    buffer = buffer_of(PAGE)
    records.publish(buffer)  # has no record: nothing to write
    address = records.record(buffer)
    ctypes.memset(address, 0xFF, 8)
    records.publish(buffer)
    assert words(address)[0] == PAGE


def test_counters_are_read_since_the_last_reset(records: DeviceRecords) -> None:
    first, second = buffer_of(), buffer_of()
    count(records.record(first), local=5, remote=7, peak=100)
    records.record(second)
    assert records.read_counters() == {
        first: RecordCounters(5, 7, 1, 100),
        second: RecordCounters(),
    }
    records.reset_counters()
    assert records.read_counters()[first] == RecordCounters()
    count(first.device_record, local=1, remote=2, peak=3)
    assert records.read_counters()[first] == RecordCounters(1, 2, 1, 3)
    assert words(first.device_record)[0] == PAGE


def test_what_the_host_counts_is_added(records: DeviceRecords) -> None:
    """And none of it is lost that threads count at once."""
    buffer = buffer_of()
    count(records.record(buffer), local=5, remote=7, peak=100)
    record = buffer.record
    assert record is not None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: record.count_call(TierBytes(2, 3)), range(1000)))
    assert records.read_counters()[buffer] == RecordCounters(2005, 3007, 1001, 100)
    records.reset_counters()
    record.count_call(TierBytes(1, 0))
    assert records.read_counters()[buffer] == RecordCounters(1, 0, 1)


def test_the_place_of_a_dead_buffer_is_used_again_after_the_work(
    fake: Any, records: DeviceRecords
) -> None:
    buffers = [buffer_of(nbytes=512, split=0) for _ in range(3)]
    used = {records.record(buffer) for buffer in buffers}
    count(buffers[0].device_record, local=1, remote=1, peak=1)
    fake.capturing(True)  # the reaper cannot wait for the device: kernels may still write there
    del buffers
    gc.collect()
    early = buffer_of(nbytes=512, split=0)
    assert records.record(early) not in used
    fake.capturing(False)
    assert vmm.drain()
    later = [buffer_of(nbytes=512, split=0) for _ in range(3)]
    assert used & {records.record(buffer) for buffer in later}
    assert all(words(b.device_record) == (0, 0, 0, 0, 0, *places(b)) for b in later)
    assert vmm.memory_in_use()["records"] == RECORDS_IN_CHUNK * RECORD_BYTES + WINDOW_BYTES


def test_one_buffer_more_than_a_chunk_holds(
    monkeypatch: pytest.MonkeyPatch, records: DeviceRecords
) -> None:
    monkeypatch.setattr(device_records, "RECORDS_IN_CHUNK", 4)
    buffers = [buffer_of(nbytes=512, split=0) for _ in range(9)]
    addresses = {records.record(buffer) for buffer in buffers}
    assert len(addresses) == 9
    assert vmm.memory_in_use()["records"] == 3 * 4 * RECORD_BYTES + WINDOW_BYTES


def test_threads_get_different_records(records: DeviceRecords) -> None:
    buffers = [buffer_of(nbytes=512, split=0) for _ in range(16)]
    threads = [threading.Thread(target=records.record, args=(buffer,)) for buffer in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({buffer.device_record for buffer in buffers}) == 16


def test_no_memory_for_records(fake: Any, records: DeviceRecords) -> None:
    buffer = buffer_of()
    fake.fail("cuMemAlloc", status=2)
    with pytest.raises(DeviceMemoryError):
        records.record(buffer)
    assert buffer.device_record == 0
    fake.fail("cuStreamCreate")
    with pytest.raises(RuntimeError):
        records.record(buffer)
    assert "records" not in vmm.memory_in_use()
    assert records.record(buffer) != 0


@pytest.mark.parametrize("kind", [VmmTier, RegisteredTier])
def test_tiers_of_a_gpu_attach_a_record(
    fake: Any, records: DeviceRecords, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.setitem(device_records._by_device, 0, records)
    tier = kind("cpu", DEVICE, None) if kind is VmmTier else kind(DEVICE)
    assert tier.allocate(PAGE, split=0).device_record == 0  # the stand-in's memory is the CPU's
    tier.exported_device = DEVICE
    buffer = tier.allocate(PAGE, split=0)
    assert words(buffer.device_record)[0] == buffer.split == 0


def test_the_simulated_tier_has_no_records() -> None:
    assert SimulatedTier().allocate(8192, split=4096).device_record == 0


def test_a_place_dropped_with_its_records_frees_the_chunk(fake: Any) -> None:
    records, buffer = DeviceRecords(DEVICE), buffer_of()
    records.record(buffer)
    del records, buffer
    window._windows.clear()
    gc.collect()
    assert vmm.drain()
    assert "records" not in vmm.memory_in_use()


def test_a_window_is_the_host_s_or_the_kernels(fake: Any) -> None:
    found = window.window_of(DEVICE, "cpu")
    found.set(128_000)
    assert struct.unpack("<2I", ctypes.string_at(found.address, 8)) == (128_000, 0)
    assert (found.nbytes, found.most, found.automatic) == (128_000, 128_000, False)
    found.set("auto")
    assert found.automatic and found.nbytes == 128_000
    assert found.most == found.limits[1]
    host = struct.unpack("<4I", ctypes.string_at(found.address, 16))
    assert host == (128_000, 1, *found.limits)
    ctypes.c_uint32.from_address(found.address + 128).value = 320_005  # as kernels do, with a tag
    assert found.nbytes == 320_000
    found.set("auto")
    assert found.nbytes == 320_000, "what is automatic already goes on"
    found.set_automatic(9_600_010, limits=(16_000, 9_999_999))
    assert (found.nbytes, found.most) == (9_600_000, 9_999_999)
    for start, limits in ((8, None), (400_000, (600_000, 200_000)), (400_000, (0, 200_000))):
        with pytest.raises(OptionError, match="in order"):
            found.set_automatic(start, limits=limits)
    found.set(1)
    assert (found.nbytes, found.automatic) == (1, False)


def test_links_of_a_gpu_have_numbers(fake: Any) -> None:
    first, second = window.window_of(DEVICE, "cpu"), window.window_of(DEVICE, "cuda:1")
    assert (first.number, second.number) == (0, 1)
    assert window.window_of(torch.device("cuda", 1), "cpu").number == 0
    assert window.windows()[:2] == (first, second)


def test_a_guessed_profile_sets_wide_limits() -> None:
    guess = hardware.generic("some GPU", sm_count=100, memory_bytes=1 << 34)
    floor, cap = window.default_limits(guess.link("cpu"), guessed=guess.is_guess)
    measured = window.default_limits(guess.link("cpu"), guessed=False)
    assert floor < measured[0] and measured[1] < cap

"""Creation and moves of a tiered range, through the real C++ on a stand-in driver."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dak_inductor.cuda_runtime import address_table, vmm
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.cuda_runtime.vmm_buffer import VmmBuffer
from dak_inductor.errors import DakError, DriverError, MoveError

PAGE = 2 << 20
HOST = -1
SMALL = 5 * PAGE + 1000  # all its allocations are single pages
LARGE = 84 * PAGE + 4096  # has allocations of 16 pages on both sides of a split in the middle


def tier(remote: str = "cpu") -> VmmTier:
    return VmmTier(remote, torch.device("cuda", 0), None)


def filled(nbytes: int, split: int, remote: str = "cpu") -> tuple[VmmBuffer, torch.Tensor]:
    """A buffer and a copy of its contents."""
    buffer = tier(remote).allocate(nbytes, split=split)
    contents = torch.arange(-(-nbytes // 8)).mul_(0x9E3779B97F4A7C15 - 2**64).view(torch.uint8)
    contents = contents[:nbytes]
    buffer.write(contents)
    return buffer, contents


def check(buffer: VmmBuffer, contents: torch.Tensor) -> None:
    """Contents, and that the driver holds exactly what the buffer says."""
    assert torch.equal(buffer.tensor(torch.uint8, (buffer.nbytes,)), contents)
    assert address_table.lookup(buffer.address + buffer.nbytes - 1) is buffer
    assert buffer.address % PAGE == buffer.start_offset
    held, pages = buffer.bytes_by_tier(), buffer.physical_bytes()
    assert held.total == buffer.nbytes
    assert held.local <= pages.local < held.local + 2 * PAGE
    assert pages.total == buffer.page_count * PAGE
    local = buffer.local_pages(buffer.split)
    assert pages.local == local * PAGE


@pytest.mark.parametrize("nbytes", [1, 256, PAGE - 1, PAGE, PAGE + 1, SMALL])
@pytest.mark.parametrize("wanted", [0, 256, 1000, PAGE, 2 * PAGE + 512, SMALL])
def test_split_lands_where_it_was_asked(fake: Any, nbytes: int, wanted: int) -> None:
    buffer, contents = filled(nbytes, wanted)
    assert buffer.split == (nbytes if wanted >= nbytes else wanted // 256 * 256)
    check(buffer, contents)
    assert fake.used(0) == buffer.physical_bytes().local
    assert fake.used(HOST) == buffer.physical_bytes().remote
    remote = buffer.bytes_by_tier().remote
    assert fake.used(HOST) < remote + PAGE
    if buffer.split in (0, nbytes):
        assert buffer.start_offset == 0


BOUNDARIES = [0, 256, PAGE - 256, PAGE, PAGE + 256, 3 * PAGE, SMALL - 256, SMALL - 1, SMALL]


@pytest.mark.parametrize("first", [0, 256, 2 * PAGE, 2 * PAGE + 768, SMALL])
@pytest.mark.parametrize("second", BOUNDARIES)
def test_moves_keep_address_and_contents(fake: Any, first: int, second: int) -> None:
    buffer, contents = filled(SMALL, first)
    tensor = buffer.tensor(torch.uint8, (SMALL,))
    address, generation = buffer.address, buffer.generation
    for split in (second, first, SMALL - 5, second, 0, SMALL, 0):
        expected = buffer.nearest_split(split)
        moved = expected != buffer.split
        assert buffer.move(split) == expected == buffer.split
        generation += moved
        assert buffer.generation == generation
        assert expected <= split or expected == buffer.nbytes or not moved
        check(buffer, contents)
        assert tensor.data_ptr() == buffer.address == address
        assert torch.equal(tensor, contents)
        vmm.drain()
        assert fake.used(0) == buffer.physical_bytes().local
        assert fake.used(HOST) == buffer.physical_bytes().remote
    assert len(contents) == SMALL


@pytest.mark.parametrize("first", [0, 42 * PAGE, LARGE])
def test_a_move_may_land_inside_a_large_allocation(fake: Any, first: int) -> None:
    buffer, contents = filled(LARGE, first)
    assert vmm.live_handles() < buffer.page_count  # or there is no large allocation to land in
    for page in (3, 55, 54, 83, 17, 1):
        buffer.move(page * PAGE)
        check(buffer, contents)
        vmm.drain()
        assert fake.used(0) == buffer.physical_bytes().local
    buffer.move(LARGE)
    check(buffer, contents)


def test_writes_after_a_move_reach_every_tensor(fake: Any) -> None:
    buffer, contents = filled(SMALL, 2 * PAGE)
    early = buffer.tensor(torch.uint8, (SMALL,))
    buffer.move(4 * PAGE)
    early[PAGE - 3 : 4 * PAGE + 3] = 7
    expected = contents.clone()
    expected[PAGE - 3 : 4 * PAGE + 3] = 7
    buffer.move(PAGE)
    check(buffer, expected)


def test_a_prepared_move_copies_and_remaps_only(fake: Any) -> None:
    buffer, contents = filled(SMALL, SMALL)
    buffer.prepare_move(2 * PAGE).wait()
    assert fake.used(HOST) >= 3 * PAGE
    created = fake.calls("cuMemCreate")
    assert buffer.move(2 * PAGE) == 2 * PAGE
    assert fake.calls("cuMemCreate") == created
    assert buffer.last_move.prepared_ahead
    assert buffer.last_move.bytes_copied >= 3 * PAGE
    check(buffer, contents)


def test_preparations_are_dropped_when_another_move_comes(fake: Any) -> None:
    buffer, contents = filled(SMALL, SMALL)
    buffer.prepare_move(2 * PAGE)
    buffer.prepare_move(PAGE)
    buffer.move(3 * PAGE)
    check(buffer, contents)
    buffer.prepare_move(0).wait()
    buffer.cancel_move()
    vmm.drain()
    assert fake.used(HOST) == buffer.physical_bytes().remote
    buffer.prepare_move(PAGE)  # dropped with the buffer


def test_residency_need_not_be_a_prefix(fake: Any) -> None:
    buffer, contents = filled(LARGE, LARGE)
    pages = buffer.page_count
    memory = buffer._memory
    for step in (2, 7, 40):
        target = bytes(int(page // step % 2) for page in range(pages))
        memory.move(target)
        assert memory.residency() == target
        assert torch.equal(buffer.tensor(torch.uint8, (LARGE,)), contents)
        expected = sum(min(LARGE, (p + 1) * PAGE) - p * PAGE for p in range(pages) if target[p])
        assert memory.remote_bytes_in(0, LARGE) == expected
    with pytest.raises(DakError):
        memory.move(b"\0")


FAILING = ("cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemcpyAsync",
           "cuStreamSynchronize", "cuMemUnmap", "cuCtxPushCurrent")  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("pair", [(SMALL, 3 * PAGE), (PAGE, 4 * PAGE), (768, SMALL)])
def test_a_failure_at_any_call_of_a_move_leaves_the_old_state(
    fake: Any, name: str, pair: tuple[int, int]
) -> None:
    first, second = pair
    failures = 0
    for after in range(100):
        buffer, contents = filled(SMALL, first)
        vmm.drain()
        before = (buffer.split, buffer.generation, buffer.address, buffer.physical_bytes())
        handles, used = vmm.live_handles(), (fake.used(0), fake.used(HOST))
        if name == "cuMemUnmap" and after == 1:
            break  # the second gives back the staging addresses, after the move
        fake.fail(name, after)
        try:
            buffer.move(second)
        except MoveError as error:
            assert name in str(error)
            failures += 1
        fake_done = not fake.pending()
        fake.heal()
        vmm.drain()
        if buffer.generation:
            check(buffer, contents)
            if not fake_done:
                break
            continue
        assert (buffer.split, buffer.generation, buffer.address, buffer.physical_bytes()) == before
        assert (vmm.live_handles(), (fake.used(0), fake.used(HOST))) == (handles, used)
        check(buffer, contents)
        buffer.move(second)
        check(buffer, contents)
    else:
        pytest.fail("the failures never ran out of calls")
    assert failures >= 1


@pytest.mark.parametrize("name", ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"])
def test_a_failure_between_patches_restores_all_of_them(fake: Any, name: str) -> None:
    target = bytes([0, 1, 1, 0, 1, 0])
    probe, _ = filled(SMALL, SMALL)
    vmm.drain()
    start = fake.calls(name)
    probe._memory.move(target)
    vmm.drain()
    calls = fake.calls(name) - start
    del probe
    for after in range(calls - (2 if name == "cuMemUnmap" else 0)):
        buffer, contents = filled(SMALL, SMALL)
        vmm.drain()
        fake.fail(name, after)
        with pytest.raises(MoveError):
            buffer._memory.move(target)
        check(buffer, contents)
        buffer._memory.move(target)
        assert torch.equal(buffer.tensor(torch.uint8, (SMALL,)), contents)


def test_a_buffer_that_cannot_be_restored_says_so(fake: Any) -> None:
    buffer, _ = filled(SMALL, SMALL)
    buffer.prepare_move(PAGE).wait()
    fake.fail("cuMemMap", 0, lasting=True)
    with pytest.raises(DriverError, match="is lost"):
        buffer.move(PAGE)
    fake.heal()
    with pytest.raises(DriverError, match="is lost"):
        buffer.write(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(DriverError, match="is lost"):
        buffer.move(2 * PAGE)


@pytest.mark.parametrize("split", [0, SMALL // 2, SMALL])
def test_a_failure_at_any_call_of_a_creation_leaves_nothing(fake: Any, split: int) -> None:
    own = tier()
    failed = 0
    for after in range(200):
        fake.fail("*", after)
        try:
            buffer = own.allocate(SMALL, split=split)
        except DakError:
            failed += 1
            fake.heal()
            vmm.drain()
            assert vmm.live_handles() == 0
            assert not any(fake.leftovers().values())
            assert vmm.memory_in_use().get("cpu", 0) == 0
            continue
        pending = fake.pending()
        fake.heal()
        del buffer
        if pending:
            break
    else:
        pytest.fail("the failures never ran out of calls")
    assert failed >= 5


def test_the_peer_tier_puts_bytes_on_the_other_device(fake: Any) -> None:
    buffer, contents = filled(SMALL, 2 * PAGE, "cuda:1")
    check(buffer, contents)
    assert (fake.used(1), fake.used(HOST)) == (buffer.physical_bytes().remote, 0)
    buffer.move(4 * PAGE)
    check(buffer, contents)
    vmm.drain()
    assert fake.used(1) == buffer.physical_bytes().remote
    with pytest.raises(DakError, match="cannot read"):
        buffer.remote_view().tensor()

"""Room that is looked for many pages at once: no page is made that was not found to fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dak_inductor.cuda_runtime.checked_room import AT_ONCE, CheckedRoom
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import DeviceMemoryError, HostMemoryError

MIB = 1 << 20


class Memory:
    """Free bytes of both tiers, and how often they were asked for."""

    def __init__(self, local: int, remote: int) -> None:
        self.free = TierBytes(local, remote)
        self.asked = 0

    def has_room(self, more: TierBytes) -> bool:
        self.asked += bool(more.remote)
        return more.local <= self.free.local and more.remote <= self.free.remote

    def check_room(self, more: TierBytes, what: str) -> None:
        self.asked += bool(more.remote)
        if more.local > self.free.local:
            raise DeviceMemoryError(what)
        if more.remote > self.free.remote:
            raise HostMemoryError(what)

    def take(self, held: TierBytes) -> None:
        self.free = TierBytes(self.free.local - held.local, self.free.remote - held.remote)


@given(st.integers(0, 4), st.lists(st.integers(0, 700), max_size=40))
def test_who_is_alone_never_takes_more_than_there_is(gibibytes: int, sizes: list[int]) -> None:
    memory = Memory(0, gibibytes << 30)
    room = CheckedRoom(memory)
    for size in sizes:
        held = TierBytes(0, size * MIB)
        fits = held.remote <= memory.free.remote
        try:
            room.need(held, "a tensor")
        except HostMemoryError:
            assert not fits
            return
        assert fits
        memory.take(held)


def test_it_is_looked_for_once_in_a_gibibyte() -> None:
    memory = Memory(0, 64 << 30)
    room = CheckedRoom(memory)
    for _ in range(128):
        room.need(TierBytes(0, 64 * MIB), "a tensor")
        memory.take(TierBytes(0, 64 * MIB))
    assert memory.asked == pytest.approx(8, abs=1)


def test_local_bytes_are_looked_for_each_time() -> None:
    memory = Memory(3 * MIB, 64 << 30)
    room = CheckedRoom(memory)
    for _ in range(3):
        room.need(TierBytes(MIB, MIB), "a tensor")
        memory.take(TierBytes(MIB, MIB))
    with pytest.raises(DeviceMemoryError, match="a tensor"):
        room.need(TierBytes(MIB, MIB), "a tensor")


def test_what_others_take_meanwhile_is_seen_a_gibibyte_later() -> None:
    memory = Memory(0, AT_ONCE)
    room = CheckedRoom(memory, 2 * MIB)
    room.need(TierBytes(0, MIB), "the first")
    memory.free = TierBytes(0, 0)
    room.need(TierBytes(0, 2 * MIB), "what was found with it")
    with pytest.raises(HostMemoryError, match="the last"):
        room.need(TierBytes(0, MIB), "the last")


def test_each_time_all_is_looked_for_where_nothing_is_ahead() -> None:
    memory = Memory(0, 3 * MIB)
    room = CheckedRoom(memory, 0)
    for _ in range(3):
        room.need(TierBytes(0, MIB), "a tensor")
        memory.take(TierBytes(0, MIB))
    assert memory.asked == 3
    with pytest.raises(HostMemoryError, match="the last"):
        room.need(TierBytes(0, MIB), "the last")

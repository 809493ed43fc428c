"""The record of a link's window as kernels use it: one window a launch, sums, updates, history."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import pytest

from dak_inductor.cuda_runtime import window as window_module
from dak_inductor.cuda_runtime.window_history import HISTORY_LENGTH, read_changes

from .window_library import CYCLES, FLOOR, KNEE, SimulatedLink, window_library

HOST, CONTROLLER, HISTORY = 0, 128, 256


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return window_library(tmp_path_factory.mktemp("window"))


class Link:
    """A record in this process's memory, as the host makes it, and launches that read it."""

    def __init__(self, library: ctypes.CDLL, start: int, *, automatic: bool = True) -> None:
        self.library = library
        self.memory = ctypes.create_string_buffer(window_module.RECORD_BYTES)
        struct.pack_into("<4I", self.memory, HOST, start, automatic, FLOOR, KNEE)
        struct.pack_into("<I", self.memory, CONTROLLER, start if automatic else 0)
        self.launch = (ctypes.c_uint * 2)()

    def read(self) -> tuple[int, int]:
        """Window, and what is controlled, as a CTA reads them."""
        controlled = ctypes.c_uint()
        found = self.library.read_window(self.memory, self.launch, ctypes.byref(controlled))
        return found, controlled.value

    def report(
        self, window: int, in_flight: int, delays: list[int], time: int = 0, missed: int = 0
    ) -> None:
        array = (ctypes.c_uint * len(delays))(*delays)
        self.library.report_delays(
            self.memory, window, in_flight, array, len(delays), ctypes.c_uint64(time), missed
        )

    def start_launch(self, ctas: int = 132) -> int:
        """All CTAs read; returns the window that they found."""
        found = set()
        for _ in range(ctas):
            found.add(self.read())
            self.library.end_read(self.memory, self.launch, ctas)
        assert len(found) == 1, "one launch, two windows"
        assert self.launch[1] == 0
        return found.pop()[0]

    @property
    def next(self) -> int:
        return int(struct.unpack_from("<I", self.memory, CONTROLLER)[0])

    @property
    def updates(self) -> int:
        return int(struct.unpack_from("<I", self.memory, CONTROLLER + 8)[0])

    def changes(self) -> Any:
        count = struct.unpack_from("<I", self.memory, CONTROLLER + 12)[0]
        return read_changes(self.memory.raw[HISTORY:], count, CYCLES)


def test_host_and_device_agree_on_the_layout(library: ctypes.CDLL) -> None:
    assert library.record_bytes() == window_module.RECORD_BYTES


def test_a_launch_reads_one_window_and_leaves_the_newest_to_the_next(library: ctypes.CDLL) -> None:
    link = Link(library, 400_000)
    assert link.start_launch() == 400_000
    struct.pack_into("<I", link.memory, CONTROLLER, 320_001)
    # CTAs of one launch that read before and after the change
    assert link.read() == (400_000, 400_000)
    assert link.start_launch() == 400_000
    assert link.start_launch(ctas=7) == 320_001


def test_a_fixed_window_is_the_host_s_at_once(library: ctypes.CDLL) -> None:
    link = Link(library, 400_000)
    link.start_launch()
    struct.pack_into("<2I", link.memory, HOST, 128_000, 0)
    assert link.read() == (128_000, 0)


def test_a_launch_without_a_word_of_its_own_keeps_to_the_host(library: ctypes.CDLL) -> None:
    link = Link(library, 400_000)
    controlled = ctypes.c_uint(1)
    assert library.read_window(link.memory, None, ctypes.byref(controlled)) == 400_000
    assert controlled.value == 0


def run_launch(link: Link, simulated: SimulatedLink, time: int) -> None:
    """Every reader reports at the end, each from a thread of its own."""
    tagged = link.start_launch()
    window = tagged // 16 * 16
    readers, _ = simulated.readers(window)
    delay = round(simulated.delay(window) * CYCLES)
    first = round(simulated.least(window) * CYCLES)
    samples = max(2, 320 // readers)
    threads = [
        threading.Thread(
            target=link.report,
            args=(tagged, simulated.in_flight(window), [first] + [delay] * (samples - 1), time),
        )
        for _ in range(readers)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


@pytest.mark.parametrize("start", [48_000, 400_000, 9_600_000])
def test_launches_find_the_window_and_keep_it(library: ctypes.CDLL, start: int) -> None:
    link, simulated = Link(library, start), SimulatedLink()
    for time in range(12):
        run_launch(link, simulated, time)
    found = link.next // 16 * 16
    assert FLOOR <= found <= KNEE and simulated.rate(found) >= 0.98 * simulated.bandwidth
    for time in range(12, 60):
        run_launch(link, simulated, time)
    assert link.next // 16 * 16 == found
    assert 20 <= link.updates <= 60 * 6
    changes = link.changes()
    assert changes[0].update == 1 and changes[-1].nbytes == found
    assert [change.seconds for change in changes] == sorted(change.seconds for change in changes)
    assert changes[0].cause in ("start", "dip") and len(changes) <= 8
    assert struct.unpack_from("<I", link.memory, CONTROLLER + 4)[0] == 0, "the lock is free"


def test_delays_under_another_window_do_not_count(library: ctypes.CDLL) -> None:
    link = Link(library, 400_000)
    link.report(400_001, 400_000, [10_000] * 500)
    assert link.updates == 0
    link.report(400_000, 400_000, [10_000] * 10)
    assert link.updates == 0, "too few"
    link.report(400_000, 400_000, [10_000] * 60)
    assert link.updates == 1


def test_workers_whose_copies_wait_for_them_say_nothing(library: ctypes.CDLL) -> None:
    link = Link(library, 400_000)
    link.report(400_000, 400_000, [10_000] * 100, missed=100)
    assert link.updates == 0
    link.report(400_000, 400_000, [10_000] * 100, missed=99)
    assert link.updates == 1


def test_nothing_seen_changes_nothing(library: ctypes.CDLL) -> None:
    link = Link(library, 400_000)
    before = link.memory.raw
    link.report(400_000, 400_000, [])
    assert link.memory.raw == before


def test_the_history_is_a_ring_of_the_last_changes(library: ctypes.CDLL) -> None:
    link = Link(library, 400_000)
    for time in range(600):
        # the least delay falls each time, which is a change
        link.report(link.next, 300_000, [40_000] * 80 + [30_000 - 10 * time], time)
    changes = link.changes()
    assert len(changes) == HISTORY_LENGTH
    numbers = [change.update for change in changes]
    assert numbers == sorted(numbers) and numbers[-1] == link.updates
    assert changes[-1].seconds == pytest.approx(599e-9)

"""The record of a link's window as kernels use it: one window a launch, sums, updates, history."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import pytest

from dak_inductor.cuda_runtime import window as window_module
from dak_inductor.cuda_runtime.window_history import HISTORY_LENGTH, read_changes

from .window_library import (
    CYCLES,
    FLOOR,
    KNEE,
    SimulatedLink,
    SimulatedWorker,
    Tile,
    window_library,
)

HOST, CONTROLLER, HISTORY = 0, 128, 256


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return window_library(tmp_path_factory.mktemp("window"))


class Link:
    """A record in this process's memory, as the host makes it, and launches that read it."""

    def __init__(
        self,
        library: ctypes.CDLL,
        start: int,
        *,
        automatic: bool = True,
        limits: tuple[int, int] = (FLOOR, KNEE),
    ) -> None:
        self.library = library
        self.memory = ctypes.create_string_buffer(window_module.RECORD_BYTES)
        struct.pack_into("<4I", self.memory, HOST, start, automatic, *limits)
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


def test_workers_whose_copies_wait_for_them_count_a_quarter(library: ctypes.CDLL) -> None:
    link = Link(library, 400_000)
    link.report(400_000, 400_000, [10_000] * 100, missed=100)
    link.report(400_000, 400_000, [10_000] * 100, missed=1000)
    assert link.updates == 0
    link.report(400_000, 400_000, [10_000] * 100, missed=100)
    assert link.updates == 1
    link = Link(library, 400_000)
    link.report(400_000, 400_000, [10_000] * 100, missed=99)
    assert link.updates == 1


def test_they_are_not_heard_beside_others(library: ctypes.CDLL) -> None:
    """The dip at the start, and the end of it, are due to those who waited."""
    link = Link(library, 400_000)
    for _ in range(2):
        link.report(link.next, 400_000, [10_000] * 60, missed=1000)
        link.report(link.next, 400_000, [3_000] * 70)
    found, updates = link.next, link.updates
    assert updates == 2
    for _ in range(20):  # three late samples to one
        link.report(found, found, [9_000] * 210, missed=1000)
        link.report(found, found, [9_000] * 70)
    assert link.updates == updates + 20 and link.next == found


def test_workers_that_are_always_late_may_open_the_window_and_not_shrink_it(
    library: ctypes.CDLL,
) -> None:
    link = Link(library, 400_000)
    for delay in (4_000, 3_000, 3_000, 12_000, 40_000, 100_000):
        before = link.next // 16 * 16
        for _ in range(4):
            link.report(link.next, before, [delay] * 70, missed=100)
    causes = [change.cause for change in link.changes()]
    assert causes[:2] == ["dip", "law"]
    assert link.next // 16 * 16 == KNEE


def launch_workers(link: Link, work: list[tuple[SimulatedWorker, tuple[Tile, ...]]]) -> None:
    """Each has 32 KiB in flight, and reports when it has done its tiles."""
    tagged = link.start_launch()
    for worker, tiles in work:
        delays, missed = worker.looks(*tiles)
        link.report(tagged, len(work) * 32 * 1024, delays, missed=missed)


def test_few_remote_bytes_open_a_window_below_the_floor(library: ctypes.CDLL) -> None:
    """Of 160 remote rows one worker read all: a whole tile, and one of 32 rows in eight copies at a
    time, each of which was there when it looked. On the H200 that was more than half of its copies,
    launch for launch, and the window stayed at 50000."""
    host = SimulatedWorker(latency=1.5e-6, rate=18e9)
    whole, last = Tile(128, 16 * 1024, 2), Tile(128, 4 * 1024, 8)
    delays, missed = host.looks(whole, last)
    assert 0 < len(delays) <= missed
    link = Link(library, 50_000)
    for _ in range(12):
        readers = max(1, link.next // (32 * 1024))
        if readers == 1:
            launch_workers(link, [(host, (whole, last))])
        else:
            share = Tile(whole.steps // (readers - 1), whole.nbytes, whole.quota)
            launch_workers(link, [(host, (share,))] * (readers - 1) + [(host, (last,))])
    assert FLOOR <= link.next // 16 * 16 <= KNEE, [str(change) for change in link.changes()]


@pytest.mark.parametrize("start", [250_000, 4_000_000, 150_000_000])
def test_over_nvlink_copies_arrive_two_at_a_time(library: ctypes.CDLL, start: int) -> None:
    """A worker's two copies are under way together: it waits for one and finds the other there, so
    that no more than half were waited for. The bytes in flight end between floor and knee."""
    floor, knee, bandwidth, nbytes = 1_000_000, 9_400_000, 376e9, 37_600_000
    one = SimulatedWorker(latency=1.3e-6, rate=80e9)
    delays, missed = one.looks(Tile(330, 16 * 1024, 2))
    assert len(delays) == missed
    link = Link(library, start, limits=(16 * 1024, 16 * knee))
    readers = 0
    for _ in range(60):
        readers = max(1, min(33, link.next // (32 * 1024)))
        queued = readers * 32 * 1024 / bandwidth
        worker = SimulatedWorker(max(one.latency, queued), one.rate)
        steps = nbytes // readers // (16 * 1024) // 2 * 2
        launch_workers(link, [(worker, (Tile(steps, 16 * 1024, 2),))] * readers)
    assert link.updates >= 15
    assert floor // 2 <= readers * 32 * 1024 <= 2 * knee
    assert link.next >= floor // 2 and len(link.changes()) <= 12


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

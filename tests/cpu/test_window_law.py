"""The law of a link's window (kernels/window/law.cuh) against a simulated link.

From any start, whatever the delays: it ends where the link is full and reads of GPU memory do not
suffer, it never exceeds its cap and never starves the link, and it does not swing.
"""

from __future__ import annotations

import ctypes
import itertools
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .window_library import (
    FLOOR,
    KNEE,
    Controller,
    Limits,
    Measured,
    SimulatedLink,
    State,
    window_library,
)

WIDE = (16 * 1024, 16 * KNEE)
LIFETIME = 2048


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return window_library(tmp_path_factory.mktemp("window"))


def controller(
    library: ctypes.CDLL,
    link: SimulatedLink,
    start: int,
    limits: tuple[int, int] = (FLOOR, KNEE),
) -> Controller:
    return Controller(library, link, State(window=start // 16 * 16), Limits(*limits))


def changes(windows: list[int]) -> int:
    return sum(a != b for a, b in itertools.pairwise(windows))


links = st.builds(
    SimulatedLink,
    bandwidth=st.floats(10e9, 60e9),
    latency=st.floats(1.5e-6, 4e-6),
    together=st.floats(0, 0.6),
    noise=st.floats(0, 0.1),
    random=st.integers(0, 1000).map(Random),
)


@settings(max_examples=100, deadline=None)
@given(link=links, start=st.integers(FLOOR // 4, 16 * KNEE))
def test_any_start_fills_the_link_within_its_limits(
    library: ctypes.CDLL, link: SimulatedLink, start: int
) -> None:
    found = controller(library, link, start)
    found.run(5)  # a millisecond of the link, two launches of 0.1 ms for each update
    found.run(200)
    windows = found.settled(200)
    assert all(FLOOR <= window <= KNEE for window in windows), windows
    product = link.bandwidth * link.latency
    for window in windows:
        full = min(window, KNEE) >= 2.2 * product or window == KNEE // 16 * 16
        assert full or link.rate(window) >= 0.98 * link.bandwidth, (window, product)
    assert changes(windows) <= 4, windows


@pytest.mark.parametrize("together", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("start", [FLOOR // 4, FLOOR, 400_000, KNEE, 4 * KNEE, 16 * KNEE])
def test_without_a_probe_the_h200_is_found(
    library: ctypes.CDLL, start: int, together: float
) -> None:
    """Limits so wide that they say nothing."""
    link = SimulatedLink(together=together)
    found = controller(library, link, start, WIDE)
    found.run(3)
    window = found.state.window
    assert FLOOR <= window <= KNEE, found.windows
    assert link.rate(window) >= 0.98 * link.bandwidth
    found.run(LIFETIME // 2)
    assert changes(found.settled(LIFETIME // 2)) <= 3, found.windows


def test_over_nvlink_the_window_is_above_a_megabyte(library: ctypes.CDLL) -> None:
    link = SimulatedLink(bandwidth=376e9, latency=1.5e-6)
    found = controller(library, link, 250_000, (1_000_000, 9_400_000))
    found.run(8)
    assert 1_000_000 <= found.state.window <= 4_000_000, found.windows


def test_a_link_that_turns_slow_is_followed_when_it_stays_so_and_back(
    library: ctypes.CDLL,
) -> None:
    link = SimulatedLink(noise=0.05)
    found = controller(library, link, 400_000, WIDE)
    found.run(20)
    before = found.state.window
    link.bandwidth /= 2
    found.run(LIFETIME // 2)
    assert found.state.window == before
    found.run(LIFETIME)
    slow = found.state.window
    assert slow < 0.7 * before
    assert link.rate(slow) >= 0.98 * link.bandwidth
    found.run(100)
    assert changes(found.settled(100)) <= 2, found.windows[-100:]
    link.bandwidth *= 2
    found.run(4)
    assert link.rate(found.state.window) >= 0.98 * link.bandwidth
    found.run(100)
    assert changes(found.settled(100)) <= 2, found.windows[-100:]


@settings(max_examples=50, deadline=None)
@given(
    others=st.floats(50_000, 1_000_000),
    in_turn=st.booleans(),
    together=st.floats(0, 1),
    updates=st.integers(5, 400),
    limits=st.sampled_from([(FLOOR, KNEE), WIDE]),
)
def test_beside_a_copy_the_window_stays(
    library: ctypes.CDLL,
    others: float,
    in_turn: bool,
    together: float,
    updates: int,
    limits: tuple[int, int],
) -> None:
    """So reads have what the link gives to so many bytes beside others, and all of it when those
    end. A copy of 1 GB takes 180 updates."""
    link = SimulatedLink(together=together, noise=0.03, in_turn=in_turn)
    found = controller(library, link, 400_000, limits)
    found.run(20)
    before = found.state.window
    link.others = others
    found.run(updates)
    window = found.state.window
    assert window == before <= limits[1]
    share = 0.5 if in_turn else link.in_flight(window) / (link.in_flight(window) + others)
    assert link.rate(window) >= 0.95 * share * link.bandwidth
    link.others = 0
    assert link.rate(window) >= 0.98 * link.bandwidth, "at once"
    found.run(20)  # noise may take a step that was due before
    assert changes([window, *found.settled(20)]) <= 1
    assert window <= found.state.window <= min(1.3 * window, limits[1])


@pytest.mark.parametrize("in_turn", [False, True])
def test_beside_others_that_stay_reads_go_on(library: ctypes.CDLL, in_turn: bool) -> None:
    """They cannot be told from a slow link for ever."""
    link = SimulatedLink(noise=0.03, in_turn=in_turn)
    found = controller(library, link, 400_000)
    found.run(20)
    link.others = 400_000
    found.run(3 * LIFETIME)
    windows = found.settled(LIFETIME)
    assert all(FLOOR <= window <= KNEE for window in windows)
    assert changes(windows) <= 6
    link.others = 0
    found.run(4)
    assert link.rate(found.state.window) >= 0.98 * link.bandwidth


@settings(max_examples=100, deadline=None)
@given(
    link=links,
    start=st.integers(FLOOR // 4, 16 * KNEE),
    factors=st.lists(st.floats(1, 3), min_size=200, max_size=200),
)
def test_who_came_late_opens_the_window_and_never_shrinks_it(
    library: ctypes.CDLL, link: SimulatedLink, start: int, factors: list[float]
) -> None:
    """The slowest copies' delays are up to `factors` times the mean's."""
    found = controller(library, link, start)
    bounds = Limits(FLOOR, KNEE)
    for factor in factors:
        before = found.state.kept or found.state.window
        seen = link.measured(found.state.window)
        window = found.step(Measured(seen.delay * factor, seen.least, seen.in_flight, 1))
        if found.causes[-1] != "dip":
            assert window >= min(before, bounds.cap) // 16 * 16
            assert FLOOR <= window <= KNEE
    found.run(10)
    product = link.bandwidth * link.latency
    window = found.state.window
    full = window >= 2.2 * product or window == KNEE
    assert full or link.rate(window) >= 0.98 * link.bandwidth, (window, product)


def test_two_links_of_one_root_share_it(library: ctypes.CDLL) -> None:
    """Each sees the other's bytes in flight; the root carries what one link can. Who started while
    the other was reading takes a longer delay for that of an idle link, and has more, within its
    limits."""
    pair = [SimulatedLink(random=Random(i), noise=0.03) for i in range(2)]
    found = [
        controller(library, link, start)
        for link, start in zip(pair, (50_000, 9_000_000), strict=True)
    ]
    for _ in range(100):
        for index in range(2):
            other = found[1 - index].state.window
            pair[index].others = pair[1 - index].in_flight(other)
            found[index].step()
    windows = [each.state.window for each in found]
    rates = [link.rate(window) for link, window in zip(pair, windows, strict=True)]
    assert sum(rates) >= 0.95 * pair[0].bandwidth, (windows, rates)
    assert min(rates) >= 0.2 * sum(rates), (windows, rates)
    assert all(changes(each.settled(50)) <= 3 for each in found)


def test_a_longer_route_is_noticed(library: ctypes.CDLL) -> None:
    link = SimulatedLink(together=0.2)
    found = controller(library, link, 400_000, WIDE)
    found.run(20)
    link.latency *= 1.5
    found.run(4 * LIFETIME)
    assert link.rate(found.state.window) >= 0.98 * link.bandwidth
    assert found.causes.count("dip") <= 6


def test_launches_with_little_to_read_do_not_open_the_window(library: ctypes.CDLL) -> None:
    found = controller(library, SimulatedLink(), 400_000)
    found.run(10)
    before = found.state.window
    few = Measured(9000.0, found.state.least, 64 * 1024)
    for _ in range(50):
        found.step(few)
    assert found.state.window == before


def test_large_and_small_launches_in_turn_do_not_swing(library: ctypes.CDLL) -> None:
    """Small ones have fewer readers than the window has room for, and see shorter delays."""
    for small in range(96 * 1024, 400_000, 16 * 1024):
        link = SimulatedLink(noise=0.03)
        found = controller(library, link, 400_000)
        found.run(10)
        for turn in range(200):
            room = found.state.window
            window = min(room, small) if turn % 2 else room
            measured = link.measured(window)
            found.step(measured)
        assert changes(found.settled(200)) <= 4, (small, found.settled(200))


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(16, 2**31 - 1),
    limits=st.tuples(st.integers(16, 2**30), st.integers(16, 2**31 - 1)).map(sorted),
    trace=st.lists(
        st.tuples(
            st.floats(1, 4e9), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.booleans()
        ),
        min_size=3, max_size=60,
    ),
)  # fmt: skip
@example(start=1_048_832, limits=[16, 65_552], trace=[(1.0, 0, 0, False)] * 3)
def test_whatever_the_delays_it_keeps_its_limits(
    library: ctypes.CDLL,
    start: int,
    limits: list[int],
    trace: list[tuple[float, int, int, bool]],
) -> None:
    found = controller(library, SimulatedLink(), start, (limits[0], limits[1]))
    for delay, least, in_flight, late in trace:
        before = found.state.window
        window = found.step(Measured(delay, min(least, int(delay)), in_flight, late))
        assert window > 0 and window % 16 == 0
        if found.causes[-1] == "dip":
            assert window < before
        else:
            assert max(limits[0] - 15, 16) <= window <= max(limits[1], 16)
    dips = [i for i, cause in enumerate(found.causes) if cause == "dip"]
    assert len(dips) <= 1, "one at the start, the next after a lifetime"

"""The window's device code (kernels/window) as a library for this machine, and a link for it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from .host_library import compile_for_host

SOURCE = """
#include <atomic>
#define __device__
#define __forceinline__ inline
#define __fdividef(a, b) ((a) / (b))
template <class T> T __ldcg(const T* address) { return __atomic_load_n(address, __ATOMIC_RELAXED); }
inline float __ldcg(const float* address) { return *address; }
template <class T> void __stcg(T* address, T value) {
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
}
inline void __stcg(float* address, float value) { *address = value; }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T> T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T> T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* address, int value) {
  return atomicExch(address, static_cast<unsigned>(value));
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  unsigned before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(address, &before, value, true,
                                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_ACQ_REL,
                              __ATOMIC_ACQUIRE);
  return expected;
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  unsigned before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &before, before >= last ? 0 : before + 1, true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
#include "window/delays.cuh"
#include "window/reading.cuh"

using namespace dak;
using namespace dak::window;

extern "C" u32 record_bytes() { return sizeof(Record); }

extern "C" u32 update_state(State* state, const Limits* limits, const Measured* measured) {
  return static_cast<u32>(update(*state, *limits, *measured));
}

extern "C" u32 read_window(const Record* link, const LaunchWindow* launch, u32* controlled) {
  const Reading found = read(link, launch);
  *controlled = found.controlled;
  return found.window;
}

extern "C" void end_read(const Record* link, LaunchWindow* launch, u32 ctas) {
  end_reading(link, launch, ctas);
}

// One worker's delays, and how many copies were there before it looked.
extern "C" void report_delays(Record* link, u32 window, u32 in_flight, const u32* delays, u32 count,
                              u64 time, u32 missed) {
  Delays seen;
  for (u32 i = 0; i < missed; ++i) seen.missed(1);
  seen.missed(untimed);
  for (u32 i = 0; i < count; ++i) {
    const u32 mark = Delays::mark(7 * i);
    seen.arrived(mark, mark + delays[i]);
  }
  seen.arrived(untimed, 12345);
  seen.report(link, window, in_flight, time);
}
"""

FLOOR, KNEE = 200_000, 600_000
CYCLES = 1.98e9


class Limits(ctypes.Structure):
    _fields_ = (("floor", ctypes.c_uint), ("cap", ctypes.c_uint))


class State(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("window", "least", "age", "kept", "kept_in_flight")),
        ("kept_delay", ctypes.c_float),
        ("rate", ctypes.c_float),
        ("slower", ctypes.c_uint),
    )


class Measured(ctypes.Structure):
    _fields_ = (
        ("delay", ctypes.c_float),
        ("least", ctypes.c_uint),
        ("in_flight", ctypes.c_uint),
        ("late", ctypes.c_uint),
    )


CAUSES = ("start", "dip", "law", "hold")


def window_library(folder: Path) -> ctypes.CDLL:
    return compile_for_host(SOURCE, folder, "-pthread")


@dataclass
class SimulatedLink:
    """A link that brings `bandwidth` bytes/s, each copy after `latency` seconds at least.

    Readers have `stage` bytes a copy and two copies each, of which an SM has one under way at a
    time. `others`: bytes that other traffic keeps in flight, in one queue with the readers'; where
    the link serves them `in_turn` the readers have half of it instead, whatever they ask for.
    `together` is how much of the burst, with which all readers start, the first copy of a launch
    waits for: 0 where SMs start apart, 1 where they start at once. `noise` spreads the mean delays
    of launches.
    """

    bandwidth: float = 51.4e9
    latency: float = 2.3e-6
    stage: int = 16 * 1024
    most_readers: int = 33
    others: float = 0.0
    in_turn: bool = False
    together: float = 0.3
    noise: float = 0.0
    random: Random = field(default_factory=lambda: Random(0))

    def readers(self, window: int) -> tuple[int, int]:
        """How many read, and the copies of each (kernels/linear/plan.cuh)."""
        copies = 2 if window >= 2 * self.stage else 1
        return max(1, min(self.most_readers, window // (copies * self.stage))), copies

    def in_flight(self, window: int) -> int:
        readers, copies = self.readers(window)
        return readers * copies * self.stage

    def delay(self, window: int) -> float:
        """Seconds from issue to arrival, in the mean."""
        _, copies = self.readers(window)
        return max(copies * self.latency, self._queued(self.in_flight(window)))

    def least(self, window: int) -> float:
        readers, _ = self.readers(window)
        ahead = self.together * self._queued(readers * self.stage)
        return min(self.latency + ahead, self.delay(window))

    def _queued(self, nbytes: int) -> float:
        """Seconds until the link has brought the readers' `nbytes`."""
        if self.in_turn:
            return (2 if self.others else 1) * nbytes / self.bandwidth
        return (nbytes + self.others) / self.bandwidth

    def rate(self, window: int) -> float:
        """Bytes/s that the readers get."""
        return self.in_flight(window) / self.delay(window)

    def measured(self, window: int) -> Measured:
        spread = 1 + self.noise * self.random.uniform(-1, 1)
        delay = self.delay(window) * spread * CYCLES
        least = min(self.least(window) * CYCLES * (1 + self.noise * self.random.random()), delay)
        return Measured(delay, round(least), self.in_flight(window))


@dataclass
class Controller:
    """The law on a link."""

    library: ctypes.CDLL
    link: SimulatedLink
    state: State
    limits: Limits = field(default_factory=lambda: Limits(FLOOR, KNEE))
    windows: list[int] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)

    def step(self, measured: Measured | None = None) -> int:
        measured = measured or self.link.measured(self.state.window)
        cause = self.library.update_state(
            ctypes.byref(self.state), ctypes.byref(self.limits), ctypes.byref(measured)
        )
        self.windows.append(self.state.window)
        self.causes.append(CAUSES[cause])
        return int(self.state.window)

    def run(self, updates: int) -> None:
        for _ in range(updates):
            self.step()

    def settled(self, last: int) -> list[int]:
        """The last windows, dips apart."""
        pairs = zip(self.windows[-last:], self.causes[-last:], strict=True)
        return [window for window, cause in pairs if cause != "dip"]


@dataclass(frozen=True, slots=True)
class Tile:
    """Steps of a worker that bring as many bytes each, so many of them in flight at once."""

    steps: int
    nbytes: int
    quota: int


@dataclass(frozen=True, slots=True)
class SimulatedWorker:
    """A worker on a link that nobody else uses: what its thread waits for, and what was there.

    It takes `loop` seconds for a step besides waiting. An SM brings `rate` bytes/s, one copy behind
    the other, each `latency` seconds after it was asked for at least.
    """

    latency: float
    rate: float
    loop: float = 0.25e-6

    def looks(self, *tiles: Tile) -> tuple[list[int], int]:
        """Delays of copies that it waited for, cycles, and how many others it asked for in time.

        Copies issued ahead of the first tile's quota are not timed (kernels/linear/producer.cuh).
        """
        issued: list[float] = []
        arrived: list[float] = []
        delays, missed, now = [], 0, 0.0
        untimed = tiles[0].quota
        for tile in tiles:
            for _ in range(tile.steps):
                now += self.loop
                behind = len(issued) - tile.quota
                if behind >= 0 and arrived[behind] > now:
                    now = arrived[behind]
                    if behind >= untimed:
                        delays.append(round((now - issued[behind]) * CYCLES))
                elif behind >= untimed:
                    missed += 1
                issued.append(now)
                last = arrived[-1] if arrived else 0.0
                arrived.append(max(now + self.latency, last + tile.nbytes / self.rate))
        return delays, missed

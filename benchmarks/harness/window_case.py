"""Products whose time tells what a window gives the link and leaves to GPU memory.

Two weights: one whose remote part takes the link `LINK_SECONDS` and twice as long as the rest takes
GPU memory, so that its time is the link's; and one with a quarter of that remote, whose time is
that of its local reads. A launch is a replay of a CUDA graph between two events.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
from dak_inductor.benchmarks.harness.linear_case import CallSpec, LinearCase, make_case
from dak_inductor.benchmarks.harness.timing import CapturedStep, capture
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.window import Window, default_limits

LINK_SECONDS = 2e-4
_TOKENS, _DEPTH = 16, 8192
_PAGE = 256  # a split at creation is free to this many bytes

Mode = (
    str  # "fixed", "auto" within the profile's limits, "wide": auto within limits that say nothing
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A window as it is at first, and who changes it."""

    mode: Mode
    start: int

    def __str__(self) -> str:
        return f"{self.mode} from {self.start} bytes"


@dataclass(frozen=True, slots=True)
class Launch:
    """One product: when it began and how long it took, seconds on the GPU's clock."""

    begun: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Product:
    """A product on one weight, and its window."""

    case: LinearCase
    window: Window

    @property
    def remote_bytes(self) -> int:
        return self.case.bytes_by_tier.remote

    @property
    def local_bytes(self) -> int:
        return self.case.bytes_by_tier.local

    def captured(self, setting: Setting) -> CapturedStep:
        """Captured anew, so that its first replay runs under the setting's first window."""
        if setting.mode == "fixed":
            self.window.set(setting.start)
            return capture(self.case.run, warmup=1)
        wide = wide_limits(self.window)
        # under limits with room for the readers of the largest window
        self.window.set_automatic(wide[1], limits=wide)
        step = capture(self.case.run, warmup=1)
        limits = profile_limits(self.window) if setting.mode == "auto" else wide
        self.window.set_automatic(setting.start, limits=limits)
        return step


def profile_limits(window: Window) -> tuple[int, int]:
    """Floor and knee."""
    return default_limits(window.link, guessed=False)


def wide_limits(window: Window) -> tuple[int, int]:
    """Limits that say nothing."""
    return 16 * 1024, 16 * window.link.window_knee


def make_products(
    tier: Tier, window: Window, device: torch.device, hbm: float, link: float
) -> tuple[Product, Product]:
    """Those bound by the link and by GPU memory, on ceilings in bytes/s."""
    found = []
    for link_seconds, local_seconds in ((1.0, 0.5), (0.25, 0.5)):
        remote = round(link_seconds * LINK_SECONDS * link)
        rows = round((local_seconds * LINK_SECONDS * hbm + remote) / (2 * _DEPTH) / 128) * 128
        split = (rows * _DEPTH * 2 - remote) // _PAGE * _PAGE
        spec = CallSpec(_TOKENS, rows, _DEPTH, splits=(split,))
        found.append(Product(make_case(spec, tier, device), window))
    return found[0], found[1]


def all_local(product: Product, tier: Tier, device: torch.device) -> Product:
    """The same with nothing remote."""
    problem = product.case.problem
    spec = replace(problem, splits=(problem.n * problem.k * 2,))
    return Product(make_case(spec, tier, device), product.window)


def run_series(
    step: CapturedStep, count: int, beside: Callable[[int], None] | None = None
) -> list[Launch]:
    """`count` replays, one behind the other. `beside` is called before each with its number."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for index in range(count):
        if beside is not None:
            beside(index)
        step()
        events[index + 1].record()
    torch.cuda.synchronize()
    times = [events[0].elapsed_time(event) / 1e3 for event in events]
    return [Launch(begun, ended - begun) for begun, ended in itertools.pairwise(times)]


@dataclass(frozen=True, slots=True)
class CopySpan:
    """A copy's bytes, and from when to when it ran on the clock of a series."""

    nbytes: int
    begun: float
    ended: float

    def covers(self, launch: Launch) -> bool:
        return self.begun <= launch.begun and launch.begun + launch.seconds <= self.ended


def run_beside_copy(
    step: CapturedStep, source: torch.Tensor, target: torch.Tensor, *, before: int, count: int
) -> tuple[list[Launch], CopySpan]:
    """A series in which a copy of `source` is queued on another stream after `before` launches."""
    side = torch.cuda.Stream(target.device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    here = torch.cuda.Event()

    def beside(index: int) -> None:
        if index == 0:
            marks[0].record()
        if index != before:
            return
        here.record()
        with torch.cuda.stream(side):
            side.wait_event(here)
            marks[1].record()
            target.copy_(source, non_blocking=True)
            marks[2].record()

    launches = run_series(step, count, beside)
    begun, ended = (marks[0].elapsed_time(mark) / 1e3 for mark in marks[1:])
    return launches, CopySpan(source.nbytes, begun, ended)


def median_seconds(launches: Sequence[Launch]) -> float | None:
    """None of none."""
    return statistics.median(each.seconds for each in launches) if launches else None


def settled(launches: Sequence[Launch], first: int, count: int = 10) -> float:
    """Median seconds of `count` launches from number `first` on."""
    return statistics.median(each.seconds for each in launches[first : first + count])

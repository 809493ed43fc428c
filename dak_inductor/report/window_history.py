"""How a link's window was moved while work ran: its bytes, and the delay that moved it, by time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dak_inductor.quantity_text import bytes_text, count_text
from dak_inductor.report.chart import Axis, Picture, Series, chart
from dak_inductor.report.html import Html, join, tag

MOST_POINTS = 400
"""Of a chart; of a longer history every n-th update is drawn."""
_KEYS = ("nanoseconds", "window", "delay_nanoseconds")


@dataclass(frozen=True, slots=True)
class WindowUpdate:
    """The window from a time on, in bytes, and the mean delay of reads that it was chosen by."""

    nanoseconds: float
    window: float
    delay_nanoseconds: float


def updates_of(found: object) -> tuple[WindowUpdate, ...]:
    """Those of a record's `window_history`, in order of time; what is none is left out."""
    updates = []
    for entry in found if isinstance(found, list | tuple) else ():
        values = [entry.get(key) for key in _KEYS] if isinstance(entry, dict) else []
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(_KEYS) and all(0 <= number < 2.0**63 for number in numbers):
            updates.append(WindowUpdate(*numbers))
    return tuple(sorted(updates, key=lambda update: update.nanoseconds))


def window_history(name: str, updates: Sequence[WindowUpdate]) -> Html:
    """Both charts, and what the window did in a sentence; nothing for no updates."""
    if not updates:
        return Html("")
    windows = [update.window for update in updates]
    words = (
        f"{count_text(len(updates), 'update')}: from {bytes_text(windows[0])} to "
        f"{bytes_text(windows[-1])}, least {bytes_text(min(windows))}, "
        f"most {bytes_text(max(windows))}"
    )
    return join([tag("p", words), *map(chart, window_pictures(name, updates))])


def window_pictures(name: str, updates: Sequence[WindowUpdate]) -> list[Picture]:
    """The window and the delay over time; none where nothing changed over time."""
    kept = list(updates)[:: -(-len(updates) // MOST_POINTS) or 1]
    if not kept or kept[-1].nanoseconds <= kept[0].nanoseconds:
        return []
    last = kept[-1].nanoseconds - kept[0].nanoseconds
    scale, unit = next((s, u) for s, u in _UNITS if last >= s or s == 1)
    times = [(update.nanoseconds - kept[0].nanoseconds) / scale for update in kept]

    def picture(key: str, title: str, label: str, values: Sequence[float]) -> Picture:
        points = tuple(zip(times, values, strict=True))
        low, high = min(values), max(values)
        y = Axis(label, 0.9 * low, 1.1 * high or 1.0, linear=True)
        x = Axis(f"{unit} since the first update", 0.0, times[-1], linear=True)
        series = (Series("in force", _stairs(points), curve=True), Series("updates", points))
        return Picture(f"{name}-{key}", f"{name}: {title}", x, y, series)

    return [
        picture("window", "window of the link", "kB in flight", [u.window / 1e3 for u in kept]),
        picture("delay", "mean delay of reads", "us", [u.delay_nanoseconds / 1e3 for u in kept]),
    ]


_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1, "ns"))


def _stairs(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Each value until the next one."""
    found = [points[0]]
    for x, y in points[1:]:
        found += [(x, found[-1][1]), (x, y)]
    return tuple(found)

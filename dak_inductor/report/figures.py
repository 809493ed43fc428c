"""The charts of records as files: SVG, and PNG for where that is not shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dak_inductor.errors import OptionError
from dak_inductor.report.chart import COLOURS, Axis, Picture, standalone
from dak_inductor.report.records import LoadedRecord
from dak_inductor.report.roofline import pictures
from dak_inductor.report.style import FIGURE_STYLE, SERIES
from dak_inductor.report.window_history import updates_of, window_pictures

_INCHES, _DOTS = (6.4, 4.6), 150
_FOREGROUND, _DIM, _GRID = "#1b2027", "#5a6472", "#d9dee5"  # of the light style


def all_pictures(record: LoadedRecord) -> list[Picture]:
    """Every chart that the page shows of a record."""
    updates = updates_of(record.data.get("window_history"))
    return [*pictures(record), *window_pictures(record.benchmark, updates)]


def write_figures(records: Sequence[LoadedRecord], folder: Path, *, png: bool) -> list[Path]:
    """One SVG file for each chart, with `png` one PNG file beside it. Returns what was written.

    Raises OptionError where that cannot be, or matplotlib is missing.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{folder} is no folder: {error.strerror or error}") from error
    try:
        for picture in (each for record in records for each in all_pictures(record)):
            path = folder / f"{picture.name}.svg"
            path.write_text(standalone(picture, FIGURE_STYLE), encoding="utf-8")
            written.append(path)
            if png:
                written.append(_write_png(picture, path.with_suffix(".png")))
    except OSError as error:
        raise OptionError(f"{folder} cannot be written to: {error.strerror or error}") from error
    return written


def _write_png(picture: Picture, path: Path) -> Path:
    """The light style of the SVG, drawn by matplotlib: CSS variables are beyond most converters."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        advice = "PNG files need matplotlib: pip install 'dak-inductor[figures]'"
        raise OptionError(advice) from error
    drawn = Figure(figsize=_INCHES, dpi=_DOTS, layout="constrained")
    axes = drawn.subplots()
    axes.set_title(picture.title, loc="left", color=_FOREGROUND, fontsize=10)
    _set_axis(axes, "x", picture.x)
    _set_axis(axes, "y", picture.y)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    colours = iter(range(len(picture.series)))
    for series in picture.series:
        x, y = zip(*series.points, strict=True)
        if series.curve:
            axes.plot(x, y, color=_FOREGROUND, linewidth=1.5, label=series.name)
        else:
            colour = SERIES[next(colours) % COLOURS]
            axes.plot(x, y, "o", color=colour, markersize=4, clip_on=False, label=series.name)
    drawn.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor=_DIM)
    drawn.savefig(path, metadata={"Software": None})
    return path


def _set_axis(axes: Any, which: str, wanted: Axis) -> None:
    """Limits, ticks and texts as in the SVG."""
    ticks = wanted.ticks()
    axes.set(**{
        f"{which}scale": "linear" if wanted.linear else "log",
        f"{which}lim": (wanted.low, wanted.high),
        f"{which}label": wanted.label,
    })  # fmt: skip
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(ticks, labels=[wanted.text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)
    axis.label.set(color=_DIM, fontsize=8)
    axes.tick_params(axis=which, length=0, labelsize=8, labelcolor=_DIM)

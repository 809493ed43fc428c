"""A small chart as inline SVG, logarithmic or linear: curves, points, grid, legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dak_inductor.report.html import Html, join, tag

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 14, 44
_COLUMNS, _LINE, _HEAD = 2, 18, 30  # of the legend below a chart of its own, and its title
COLOURS = 14
"""Series take the classes s0 to s13 in turn, filled and then hollow."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y), above zero on logarithmic axes; `curve` joins them by a line without marks."""

    name: str
    points: tuple[tuple[float, float], ...]
    curve: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    label: str
    low: float
    high: float
    percent: bool = False
    linear: bool = False

    def ticks(self) -> list[float]:
        """Powers of ten, with more between them the shorter the axis is; of a linear one four to
        ten round values."""
        if self.linear:
            return self._even_ticks()
        decades = math.log10(self.high / self.low)
        steps: tuple[float, ...] = (1, 2, 5) if decades < 2.2 else (1,)
        if decades < 0.7:
            steps = (1, 1.2, 1.5, 2, 3, 5, 7)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        near = 1 + 1e-9
        return [value for value in values if self.low / near <= value <= self.high * near]

    def _even_ticks(self) -> list[float]:
        length = self.high - self.low
        power = 10.0 ** math.floor(math.log10(length))
        step = next(s * power for s in (0.1, 0.2, 0.5, 1, 2) if length / (s * power) <= 10)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(number * step, 12) for number in range(first, last + 1)]

    def share(self, value: float) -> float:
        """Where on the axis it lies, from 0 to 1."""
        clipped = min(max(value, self.low), self.high)
        if self.linear:
            return (clipped - self.low) / (self.high - self.low)
        return math.log(clipped / self.low) / math.log(self.high / self.low)

    def text(self, value: float) -> str:
        return f"{value * 100:g}%" if self.percent else f"{value:,g}"


@dataclass(frozen=True, slots=True)
class Picture:
    """What a chart shows. `name` is that of its file."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]


def chart(picture: Picture) -> Html:
    """The chart with its legend; each point's figures are in its title."""
    legend = join(
        tag("li", tag("span", class_=f"dot {kind}"), one.name)
        for one, kind in zip(picture.series, _classes(picture.series), strict=True)
    )
    parts = [tag("title", picture.title), *_drawn(picture)]
    drawn = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart")
    return tag(
        "figure",
        tag("figcaption", picture.title),
        tag("div", drawn, class_="scroll"),
        tag("ul", legend, class_="legend"),
    )


def standalone(picture: Picture, style: str) -> str:
    """The chart as an SVG file of its own, its title above and its legend below."""
    parts = [tag("text", picture.title, x=LEFT, y=-10, class_="heading"), *_drawn(picture)]
    for place, (one, kind) in enumerate(zip(picture.series, _classes(picture.series), strict=True)):
        column, row = place % _COLUMNS, place // _COLUMNS
        x, y = LEFT + column * (WIDTH - LEFT) / _COLUMNS, HEIGHT + 14 + row * _LINE
        mark = (
            tag("path", d=f"M{x - 5:.0f} {y}h10", class_="line limit")
            if one.curve
            else tag("circle", cx=f"{x:.0f}", cy=y, r=4, class_=kind)
        )
        parts += [mark, tag("text", one.name, x=f"{x + 10:.0f}", y=y, dy="0.35em")]
    rows = -(-len(picture.series) // _COLUMNS)
    box = f"0 {-_HEAD} {WIDTH} {HEIGHT + _HEAD + 10 + rows * _LINE}"
    drawn = tag(
        "svg",
        tag("title", picture.title),
        Html(f"<style>{style}</style>"),
        tag("rect", x=0, y=-_HEAD, width="100%", height="100%", class_="ground"),
        *parts,
        xmlns="http://www.w3.org/2000/svg", viewBox=box, width=WIDTH, role="img",
    )  # fmt: skip
    return f"{drawn}\n"


def _drawn(picture: Picture) -> list[Html]:
    """Grid, curves and points, those of the first series on top."""
    x, y = picture.x, picture.y
    parts = _grid(x, y)
    series = list(zip(picture.series, _classes(picture.series), strict=True))
    series.reverse()
    series.sort(key=lambda entry: not entry[0].curve)
    for one, kind in series:
        if one.curve:
            path = " ".join(
                f"{'M' if i == 0 else 'L'}{_x(x, a):.1f} {_y(y, b):.1f}"
                for i, (a, b) in enumerate(one.points)
            )
            parts.append(tag("path", d=path, class_=f"line {kind}"))
            continue
        for a, b in one.points:
            mark = tag("title", f"{one.name}: {x.text(a)}, {y.text(float(f'{b:.4g}'))}")
            parts.append(
                tag("circle", mark, cx=f"{_x(x, a):.1f}", cy=f"{_y(y, b):.1f}", r=4, class_=kind)
            )
    return parts


def _classes(series: Sequence[Series]) -> list[str]:
    """A colour for each series of points, hollow ones the second time; curves are limits and take
    none."""
    kinds, points = [], 0
    for one in series:
        if one.curve:
            kinds.append("limit")
            continue
        hollow = " hollow" if points // COLOURS % 2 else ""
        kinds.append(f"s{points % COLOURS}{hollow}")
        points += 1
    return kinds


def _grid(x: Axis, y: Axis) -> list[Html]:
    parts = []
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in x.ticks():
        at = f"{_x(x, value):.1f}"
        parts.append(tag("path", d=f"M{at} {TOP}V{base}", class_="grid"))
        parts.append(tag("text", x.text(value), x=at, y=base + 16, class_="mid"))
    for value in y.ticks():
        at = f"{_y(y, value):.1f}"
        parts.append(tag("path", d=f"M{LEFT} {at}H{end}", class_="grid"))
        parts.append(tag("text", y.text(value), x=LEFT - 6, y=at, dy="0.35em", class_="end"))
    parts.append(tag("text", x.label, x=(LEFT + end) / 2, y=HEIGHT - 8, class_="mid"))
    middle = (TOP + base) / 2
    turned = f"rotate(-90 14 {middle})"
    parts.append(tag("text", y.label, x=14, y=middle, transform=turned, class_="mid"))
    return parts


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)

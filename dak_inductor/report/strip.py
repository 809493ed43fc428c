"""A timeline as a strip: one row for each lane, a bar for each span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dak_inductor.quantity_text import count_text, seconds_text
from dak_inductor.report.html import Html, tag

MOST_SPANS = 600
"""In one picture, the longest ones: more are thinner than a pixel."""
_WIDTH, _HEIGHT, _LEFT = 1000, 24, 60


class Bar(NamedTuple):
    """`lane` names the row and the colour; seconds from the picture's left edge."""

    lane: str
    label: str
    start: float
    seconds: float


def strip(bars: Sequence[Bar], lanes: Sequence[tuple[str, str]], words: str) -> Html:
    """A figure with `words` below it; nothing where no bar has a length.

    lanes: names and the texts beside them, from top to bottom; those without bars are left out.
    """
    total = max((bar.start + bar.seconds for bar in bars), default=0.0)
    if not total:
        return Html("")
    shown = sorted(bars, key=lambda bar: -bar.seconds)[:MOST_SPANS]
    kept = [(name, text) for name, text in lanes if any(bar.lane == name for bar in shown)]
    parts: list[Html] = []
    for row, (name, text) in enumerate(kept):
        y = row * _HEIGHT
        parts.append(tag("text", text, x=0, y=y + 16))
        parts += [_rectangle(bar, total, y) for bar in shown if bar.lane == name]
    picture = tag(
        "svg", *parts, viewBox=f"0 0 {_LEFT + _WIDTH} {_HEIGHT * len(kept)}", class_="strip",
        role="img",
    )  # fmt: skip
    if len(bars) > len(shown):
        words += f"; the {len(shown)} longest of {count_text(len(bars), 'span')}"
    return tag("figure", tag("div", picture, class_="scroll"), tag("figcaption", words))


def _rectangle(bar: Bar, total: float, y: int) -> Html:
    told = f"{bar.label}: {seconds_text(bar.seconds)} at {seconds_text(bar.start)}"
    return tag(
        "rect",
        tag("title", told),
        x=f"{_LEFT + bar.start / total * _WIDTH:.2f}",
        y=y + 3,
        width=f"{max(bar.seconds / total * _WIDTH, 1.0):.2f}",
        height=18,
        class_=f"lane-{bar.lane}",
    )

"""Charts of a link's window over time, from records that have its history."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dak_inductor.report.chart import Axis, standalone
from dak_inductor.report.document import document
from dak_inductor.report.figures import all_pictures
from dak_inductor.report.records import load_all
from dak_inductor.report.style import FIGURE_STYLE
from dak_inductor.report.window_history import MOST_POINTS, updates_of, window_pictures


def history(count: int = 20) -> list[dict[str, Any]]:
    """Windows around 400 kB, an update each 5 ms."""
    return [
        {"nanoseconds": 10**12 + 5_000_000 * i, "window": 400_000 + 16_384 * (i % 4 - 1),
         "delay_nanoseconds": 2900.5 + i}
        for i in range(count)
    ]  # fmt: skip


def written(folder: Path, found: object) -> Path:
    path = folder / "stress.json"
    path.write_text(json.dumps({"benchmark": "stress", "cells": [], "window_history": found}))
    return path


def test_a_record_with_a_history_has_two_charts(tmp_path: Path) -> None:
    records = load_all([written(tmp_path, history())])
    page = document(records)
    assert "20 updates: from 383.6 kB to 432.8 kB, least 383.6 kB, most 432.8 kB" in page
    assert "kB in flight" in page and "mean delay of reads" in page
    assert page.count('class="chart"') == 2
    assert [each.name for each in all_pictures(records[0])] == ["stress-window", "stress-delay"]


def test_a_window_holds_until_the_next_update() -> None:
    updates = updates_of(history(3))
    window, delay = window_pictures("x", updates)
    stairs, points = window.series
    assert points.points == ((0.0, 383.616), (5.0, 400.0), (10.0, 416.384))
    assert stairs.points == ((0.0, 383.616), (5.0, 383.616), (5.0, 400.0), (10.0, 400.0),
                             (10.0, 416.384))  # fmt: skip
    assert window.x.label == "ms since the first update" and delay.series[1].points[0][1] == 2.9005


@pytest.mark.parametrize(
    "found",
    [
        None, "none", {}, [], [1, None, "x"], [{"nanoseconds": 1}],
        [{"nanoseconds": 1, "window": "2", "delay_nanoseconds": 3}],
        [{"nanoseconds": -1, "window": 2, "delay_nanoseconds": 3}],
        [{"nanoseconds": float("nan"), "window": 2, "delay_nanoseconds": 3}],
    ],
)  # fmt: skip
def test_what_is_no_history_is_no_chart(tmp_path: Path, found: object) -> None:
    assert updates_of(found) == ()
    assert 'class="chart"' not in document(load_all([written(tmp_path, found)]))


def test_a_single_update_is_told_in_words(tmp_path: Path) -> None:
    page = document(load_all([written(tmp_path, history(1))]))
    assert "1 update:" in page and 'class="chart"' not in page


def test_updates_are_put_in_order_and_long_histories_thinned() -> None:
    updates = updates_of(history(5 * MOST_POINTS)[::-1])
    assert [u.nanoseconds for u in updates] == sorted(u.nanoseconds for u in updates)
    picture = window_pictures("x", updates)[0]
    assert 100 < len(picture.series[1].points) <= MOST_POINTS
    drawn = ElementTree.fromstring(standalone(picture, FIGURE_STYLE))
    assert len([n for n in drawn.iter() if n.tag.endswith("}circle")]) <= MOST_POINTS + 1


@pytest.mark.parametrize(("low", "high"), [(0, 7.3), (350, 450), (0, 1e-6), (12, 9e5), (2.9, 2.95)])
def test_even_ticks_are_round_and_neither_few_nor_many(low: float, high: float) -> None:
    axis = Axis("x", low, high, linear=True)
    ticks = axis.ticks()
    assert 4 <= len(ticks) <= 11 and all(low <= tick <= high for tick in ticks)
    assert axis.share(low) == 0 and axis.share(high) == 1
    assert axis.share((low + high) / 2) == pytest.approx(0.5)

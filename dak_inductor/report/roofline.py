"""Aggregate bandwidth of both memories against the offload ratio: the limit, and each provider."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dak_inductor.report.chart import Axis, Picture, Series, chart
from dak_inductor.report.html import Html, join, tag
from dak_inductor.report.records import LoadedRecord

LEAST = 0.003
"""Ratios below are drawn here: nothing remote has no place on a logarithmic axis."""
CURVE = 60
"""Pieces of the limit's curve, besides its corner."""
MOST_TOKENS = 32
"""With more tokens a product, and with more queries attention, may be bound by compute, which this
picture does not show."""

_QUERIES = re.compile(r"(?:[^x]+x){5}(\d{1,9})")
"""A shape of attention that ends with them; one query is left out."""


def limit(ratio: float, hbm: float, link: float) -> float:
    """Bytes/s of both memories drained side by side, `ratio` of the bytes remote."""
    return 1 / max((1 - ratio) / hbm, ratio / link)


def roofline(record: LoadedRecord) -> Html:
    """The pictures for records with ceilings and memory-bound cells; nothing for others."""
    found = pictures(record)
    if not found:
        return Html("")
    text = "Points at the left edge have nothing remote. "
    text += (
        "Bandwidth of a step is the limit at the share asked for divided by T / L."
        if _is_of_steps(record)
        else f"Cells of at most {MOST_TOKENS} tokens or queries: bytes of the tensor over the time."
    )
    return join([tag("p", text, class_="small"), *map(chart, found)])


def pictures(record: LoadedRecord) -> list[Picture]:
    """Bandwidth, and the limit over it, where small differences show."""
    hbm, direct = (_number(record.ceilings.get(n)) for n in ("hbm_stream", "link_direct"))
    copy = _number(record.ceilings.get("link_copy")) or direct
    if not hbm or not direct or not copy or record.is_prefill:
        return []
    steps = _is_of_steps(record)
    link = max(direct, copy) if steps else direct  # the yardstick of steps, and that of kernels
    found: list[Picture] = []
    for (name, title), cells in _by_model(record).items():
        points = _of_steps(cells, hbm, link) if steps else _of_kernels(cells)
        if points:
            pair = (_bandwidth(points, hbm, link), _over(points, hbm, link))
            found += [
                replace(each, name=f"{name}-{each.name}", title=f"{title}: {each.title}")
                for each in pair
            ]
    return found


def _by_model(record: LoadedRecord) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The cells by what files of their pictures are called, and their titles: steps of whole models
    by model and batch."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in record.cells:
        name = title = record.benchmark
        if "model" in row:
            name += f"-{row['model']}-b{row.get('batch')}"
            title = f"{row['model']}, batch {row.get('batch')}, remote tier {row.get('remote')}"
        found.setdefault((name, title), []).append(row)
    return found


def _is_of_steps(record: LoadedRecord) -> bool:
    return any("provider" in row for row in record.cells)


Points = dict[str, list[tuple[float, float]]]


def _bandwidth(points: Points, hbm: float, link: float) -> Picture:
    corner = link / (hbm + link)  # left of it HBM is the limit, right of it the link
    ratios = sorted([corner, *(LEAST * (1 / LEAST) ** (i / CURVE) for i in range(CURVE + 1))])
    curve = tuple((ratio, limit(ratio, hbm, link) / 1e9) for ratio in ratios)
    series = [Series("limit: HBM and link together", curve, curve=True), *_series(points)]
    values = [y for one in series for _, y in one.points]
    y = Axis("GB/s, both memories", min(values) / 1.3, max(values) * 1.3)
    title = "aggregate bandwidth against offload ratio"
    return Picture("bandwidth", title, _ratio_axis(), y, tuple(series))


def _over(points: Points, hbm: float, link: float) -> Picture:
    """The same as multiples of the limit, where near ones can be told apart."""
    over = {
        provider: [(x, limit(x if x > LEAST else 0.0, hbm, link) / 1e9 / y) for x, y in at]
        for provider, at in points.items()
    }
    most = max(y for at in over.values() for _, y in at)
    y = Axis("time over the limit's", 0.9, max(most * 1.1, 2.0))
    one = Series("at the limit", ((LEAST, 1.0), (1.0, 1.0)), curve=True)
    title = "how many times the limit's time; 1 is best"
    return Picture("over", title, _ratio_axis(), y, (one, *_series(over)))


def _ratio_axis() -> Axis:
    return Axis("remote share of the bytes", LEAST, 1.0, percent=True)


def _series(points: Points) -> list[Series]:
    """`dak` first, so that its colour is the same in every picture."""
    names = sorted(points, key=lambda name: name != "dak")
    return [Series(name, tuple(sorted(points[name]))) for name in names]


def _of_kernels(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """By shape; the least amount of tokens of each."""
    found: dict[str, list[tuple[float, float]]] = {}
    best: dict[tuple[str, float], float] = {}
    for row in cells:
        size, time = _number(row.get("weight_bytes", row.get("cache_bytes"))), row.get("T/L")
        microseconds = _number(row.get("microseconds"))
        m = _tokens(row)
        if not size or not microseconds or time is None or m > MOST_TOKENS:
            continue
        name, ratio = str(row.get("shape")), float(row.get("realised", row.get("fraction", 0)))
        if best.setdefault((name, ratio), m) != m:
            continue
        found.setdefault(name, []).append((max(ratio, LEAST), size / microseconds / 1e3))
    return found


def _tokens(row: Mapping[str, Any]) -> float:
    """Of a product, or the queries of a sequence."""
    if (m := _number(row.get("M"))) is not None:
        return m
    found = _QUERIES.fullmatch(str(row.get("shape")))
    return float(found[1]) if found else 1.0


def _of_steps(
    cells: Sequence[Mapping[str, Any]], hbm: float, link: float
) -> dict[str, list[tuple[float, float]]]:
    """By provider."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in cells:
        ratio = _number(row.get("realised"))
        over = _number(row.get("T/L", row.get("tpot T/L")))
        if row.get("status") != "ok" or over is None or ratio is None:
            continue
        # L is that of the share asked for; a peer with slots of its own has more remote
        asked = float(row.get("fraction", row.get("share", ratio))) if ratio else 0.0
        at = limit(asked, hbm, link) / over / 1e9
        found.setdefault(str(row["provider"]), []).append((max(min(ratio, 1.0), LEAST), at))
    return found


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)

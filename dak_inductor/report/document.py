"""The page: verdicts of all records first, then each record's views, then runs compared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

from dak_inductor.quantity_text import count_text
from dak_inductor.report.heat_map import heat_maps
from dak_inductor.report.html import Html, cell, details, join, number, table, tag
from dak_inductor.report.model_map import model_maps
from dak_inductor.report.model_table import SHOWN, model_tables
from dak_inductor.report.plan_view import plan_view
from dak_inductor.report.records import LoadedRecord
from dak_inductor.report.roofline import roofline
from dak_inductor.report.run_comparison import comparison, share_cells
from dak_inductor.report.style import STYLE
from dak_inductor.report.trace_view import trace_view
from dak_inductor.report.verdict_table import verdict_table
from dak_inductor.report.window_history import updates_of, window_history

_LONG = 120
_ROWS = 300
_LAST = ("note", "reason")
_ALWAYS = ("figure", "status", *_LAST)
_FIGURES = {"prediction": "open", "simulation": "open", "measured": "ok"}


def page(title: str, *parts: object) -> str:
    """A whole document that loads nothing: style inside, no script."""
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width,initial-scale=1">'),
            tag("title", title),
            Html(f"<style>{STYLE}</style>"),
        ]
    )
    body = tag("body", tag("h1", title), *parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{body}</html>\n'


def document(records: Sequence[LoadedRecord]) -> str:
    """The report of `records`, in the order given."""
    pairs = [
        (old, new)
        for _, group in itertools.groupby(
            sorted(records, key=lambda r: (r.benchmark, str(r.data.get("date")))),
            key=lambda r: r.benchmark,
        )
        for old, new in itertools.pairwise(list(group))
        if new.is_record and share_cells(old, new)
    ]
    links = [
        tag("li", tag("a", f"{record.benchmark} ({record.path.name})", href=f"#r{index}"))
        for index, record in enumerate(records)
    ]
    if pairs:
        links.append(tag("li", tag("a", "runs compared", href="#compared")))
    parts: list[object] = [tag("nav", tag("ul", *links))]
    told = verdict_table(records)
    if told:
        parts += [tag("h2", "Verdicts"), told]
    parts += [_section(index, record) for index, record in enumerate(records)]
    if pairs:
        parts.append(tag("h2", "Runs compared", id="compared"))
    for old, new in pairs:
        parts += [tag("h3", new.benchmark), comparison(old, new)]
    return page("dak report", *parts)


def _section(index: int, record: LoadedRecord) -> Html:
    title = tag("h2", f"{record.benchmark}: {record.path.name}", id=f"r{index}")
    if record.plan is not None:
        return join([title, plan_view(record.plan)])
    if record.trace is not None:
        return join([title, trace_view(record.trace)])
    notes, models = record.data.get("notes"), record.benchmark == "models"
    lines = [tag("li", note) for note in notes] if isinstance(notes, list) else []
    return join(
        [
            title,
            _facts(record),
            tag("ul", *lines, class_="small") if lines else "",
            heat_maps(record.cells),
            model_maps(record.cells) if models else "",
            roofline(record),
            window_history(record.benchmark, updates_of(record.data.get("window_history"))),
            model_tables(record.cells) if models else "",
            _cells(record.cells, folded=models, without=SHOWN if models else frozenset()),
            _folded(record),
        ]
    )


def _facts(record: LoadedRecord) -> Html:
    """Machine, versions, sources, command: what a figure means nothing without."""
    found, data = record.environment, record.data
    command = data.get("command")
    words = " ".join(map(str, command)) if isinstance(command, list) else str(command or "")
    items = {
        "GPU": found.get("gpu") or "none: nothing here is a measurement of a card",
        "driver": found.get("driver"),
        "torch": found.get("torch"),
        "date": data.get("date"),
        "commit": data.get("parent_commit") or "unknown",
        "sources": str(data.get("sources_sha256") or "unknown")[:12],
        "command": words,
    }
    return tag("p", "; ".join(f"{k}: {v}" for k, v in items.items() if v), class_="facts")


def _cells(
    cells: Sequence[Mapping[str, Any]], *, folded: bool, without: Set[str] = frozenset()
) -> Html:
    """Rows with all entries but those `without`, which are shown elsewhere; those of a grid are
    folded, since its map shows them."""
    if not cells:
        return Html("")
    kept = list(cells)[:_ROWS]
    found = dict.fromkeys(key for row in kept for key in row if key not in without)
    names = [name for name in found if _shown(name, kept)]
    names.sort(key=lambda name: name in _LAST)  # long texts, behind the figures
    same = [name for name in names if len(kept) > 1 and _is_same(name, kept)]
    names = [name for name in names if name not in same]
    texts = {n for n in names if any(isinstance(row.get(n), str) for row in kept)}
    rows = [[_entry(name, row.get(name), name in texts) for name in names] for row in kept]
    numeric = {i for i, name in enumerate(names) if name not in texts}
    words = count_text(len(cells), "row")
    if len(cells) > len(kept):
        words = f"{len(kept)} of {words}"
    told = "; ".join(f"{name}: {number(kept[0][name])}" for name in same)
    return details(
        words,
        tag("p", f"the same in all: {told}", class_="small") if told else "",
        table(names, rows, numbers=numeric),
        open_=not folded and "shape" not in kept[0],
    )


def _is_same(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column says one thing in all rows; what stands out by its colour is no such."""
    return name not in _ALWAYS and all(row.get(name) == rows[0].get(name) for row in rows)


def _shown(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Columns of short scalars that say something: no tracebacks, lists, keys of --resume."""
    values = [row.get(name) for row in rows]
    if name in ("traceback", "case") or all(v is None or v == "" for v in values):
        return False
    return not any(
        isinstance(v, list | dict) or (isinstance(v, str) and len(v) > _LONG * 4) for v in values
    )


def _entry(name: str, value: object, among_texts: bool) -> object:
    if name == "figure":
        return cell(str(value), _FIGURES.get(str(value), ""))
    if name == "status":
        return cell(str(value), "ok" if value == "ok" else "bad")
    if isinstance(value, str) and len(value) > 40:
        return cell(value[:_LONG] + ("..." if len(value) > _LONG else ""), "note", value)
    if among_texts and isinstance(value, int | float):
        return cell(number(value), "n")
    return number(value)


def _folded(record: LoadedRecord) -> Html:
    """Ceilings and how they were measured, what plans miss of the optimum, and long texts of rows
    such as an explanation."""
    parts: list[Html] = []
    methods = record.ceilings.get("methods")
    rows = [
        [name, _rate(name, value), methods.get(name, "") if isinstance(methods, dict) else ""]
        for name, value in record.ceilings.items()
        if not isinstance(value, dict)
    ]
    if rows:
        parts.append(
            details(
                "ceilings of this run",
                table(("ceiling", "measured", "how"), rows, numbers=range(1, 2)),
            )
        )
    gaps = record.data.get("gaps")
    if isinstance(gaps, dict):
        found = [[name.replace("_", " "), number(value)] for name, value in gaps.items()]
        parts.append(
            details(
                "plans against the LP optimum",
                table(("of random problems", ""), found, numbers=range(1, 2)),
            )
        )
    texts = [row["explain"] for row in record.cells if isinstance(row.get("explain"), str)]
    return join([*parts, *(details("dak.explain", tag("pre", text)) for text in texts)])


def _rate(name: str, value: object) -> str:
    """A ceiling in its unit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return number(value)
    if name.endswith("flops"):
        return f"{value / 1e12:,.1f} TFLOP/s"
    return f"{value / 1e9:,.1f} GB/s"

"""HTML of the report: every text that comes from a record is escaped here, and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence

MOST_COLUMNS = 98
"""That a table can align; see `style`."""
_ALL_BUT_THE_FIRST = range(1, MOST_COLUMNS)
_NUMBER = "n"
_ENDED_BY_THE_NEXT = ("td", "tr")
"""Elements that HTML ends without a tag: a report has 70,000 cells."""


class Html(str):
    """Markup. A plain `str` is text, and is escaped where it meets markup."""

    __slots__ = ()


def markup(value: object) -> Html:
    """`value` as markup: Html as it is, None as nothing, anything else escaped."""
    if isinstance(value, Html):
        return value
    return Html("" if value is None else html.escape(str(value), quote=True))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. `class_` is the attribute class; other underscores become hyphens."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{markup(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in _ENDED_BY_THE_NEXT else f"</{name}>"
    return Html(f"<{name}{given}>{join(children)}{end}")


def join(children: Iterable[object]) -> Html:
    return Html("".join(markup(child) for child in children))


def table(
    headings: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Container[int] = _ALL_BUT_THE_FIRST,
) -> Html:
    """A table that scrolls by itself; those `numbers` of columns are aligned right, by the table's
    class: a report has 50,000 cells of numbers.

    An entry that is markup of a whole cell (`cell`) stands as it is.
    """

    found = list(rows)
    width = max(map(len, (headings, *found)), default=0)
    aligned = [f"r{index + 1}" for index in range(width) if index in numbers]
    head = join(
        tag("th", entry, class_=_NUMBER if i in numbers else None)
        for i, entry in enumerate(headings)
    )
    body = join(
        tag("tr", *(each if isinstance(each, Cell) else tag("td", each) for each in row))
        for row in found
    )
    inner = tag(
        "table",
        tag("thead", tag("tr", head)),
        tag("tbody", body),
        class_=" ".join(aligned) or None,
    )
    return tag("div", inner, class_="scroll")


class Cell(Html):
    """A whole `<td>`."""

    __slots__ = ()


def cell(content: object, class_: str | None, title: str | None = None) -> Cell:
    return Cell(tag("td", content, class_=class_ or None, title=title))


def details(summary: object, *children: object, open_: bool = False) -> Html:
    """A part that is folded away."""
    return tag("details", tag("summary", summary), *children, open="" if open_ else None)


def number(value: object) -> str:
    """Four significant digits; texts as they are, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value == int(value) < 1e15):
        return f"{int(value):,}"
    if isinstance(value, float):
        if abs(value) >= 1e9 or abs(value) < 1e-4:
            return f"{value:.3e}"
        return f"{value:#.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)

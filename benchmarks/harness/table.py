"""A short table on a terminal: fixed columns, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dak_inductor.benchmarks.harness.record import Record, Verdict


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """`rows` under `columns`; a missing entry is '-', floats have four significant digits."""
    cells = [list(columns)] + [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def verdict_rows(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """Verdicts as rows for `table`."""
    words = {True: "pass", False: "MISS", None: "open"}
    return [
        {
            "what": verdict.name,
            "measured": verdict.measured,
            "bar": verdict.bar,
            "unit": verdict.unit,
            "verdict": words[verdict.passed],
            "note": verdict.note,
        }
        for verdict in verdicts
    ]


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """What was measured beside its bar, a line each."""
    return table(verdict_rows(verdicts), ("what", "measured", "bar", "unit", "verdict", "note"))


def summary(record: Record, columns: Sequence[str]) -> str:
    """What a script prints last: its cells, then its verdicts."""
    parts = [f"== {record.benchmark}: {record.environment.get('gpu') or 'no GPU'} =="]
    if record.cells:
        parts.append(table(record.cells, columns))
    if record.verdicts:
        parts.append(verdict_table(record.verdicts))
    parts += [f"note: {note}" for note in record.notes]
    return "\n".join(parts)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)

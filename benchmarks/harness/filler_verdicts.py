"""What the cells of the fillers' benchmark say of copies and streamers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dak_inductor.benchmarks.harness.record import Verdict

COPIES = "copies"
COLUMNS = (
    "part", "filler", "part_bytes", "in_flight", "product", "binds", "gigabytes_per_second",
    "gap_microseconds", "over_alone", "milliseconds", "T/L", "spread", "status",
)  # fmt: skip
_WINS = "below 1 the streamer wins"


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """One bar: what arrives is right. All else informs: a streamer goes where it wins."""
    found = _right(rows)
    for size in dict.fromkeys(row["part_bytes"] for row in rows if row["part"] == "link"):
        own = [row for row in rows if row["part"] == "link" and row["part_bytes"] == size]
        found += _compared(
            f"link, parts of {size >> 20} MiB: the best streamer's time over that of copies",
            own, "seconds",
        )  # fmt: skip
    for row in rows:
        if row["part"] == "gap":
            found.append(
                Verdict(f"{row['filler']}: from part to part", row["gap_microseconds"], 0.0, "us",
                        None, f"between them {row['gigabytes_per_second']:.1f} GB/s")
            )  # fmt: skip
    for product in dict.fromkeys(row["product"] for row in rows if row["part"] == "beside"):
        own = [row for row in rows if row["part"] == "beside" and row["product"] == product]
        own = [row for row in own if row["filler"] != "none"]
        found += _compared(
            f"{product} beside the best streamer, over beside copies", own, "over_alone"
        )
    for binds in dict.fromkeys(row["binds"] for row in rows if row["part"] == "step"):
        own = [row for row in rows if row["part"] == "step" and row["binds"] == binds]
        name = f"step, {binds} binds: the best streamer's T over that of copies"
        found += _compared(name, own, "T/L")
    return found


def _right(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    checked = [row for row in rows if row["part"] in ("link", "step") and row["filler"] != "none"]
    if not checked:
        return []
    share = sum(row["status"] == "ok" for row in checked) / len(checked)
    wrong = "; ".join(
        f"{row['filler']}: {row['status']}" for row in checked if row["status"] != "ok"
    )
    name = "cells in which all parts were there when they were read"
    return [Verdict(name, share, 1.0, "of them", share == 1.0, wrong)]


def _compared(name: str, rows: Sequence[dict[str, Any]], key: str) -> list[Verdict]:
    """The least of the streamers over the copies; nothing where either is missing."""
    timed = [row for row in rows if key in row and row["status"] == "ok"]
    copies = [row[key] for row in timed if row["filler"] == COPIES]
    streamers = [row for row in timed if row["filler"] != COPIES]
    if not copies or not streamers:
        return []
    best = min(streamers, key=lambda row: float(row[key]))
    note = f"{best['filler']}; {_WINS}"
    return [Verdict(name, best[key] / copies[0], 1.0, "of it", None, note)]

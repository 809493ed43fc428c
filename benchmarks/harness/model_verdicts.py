"""Verdicts and the table of `dak bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dak_inductor.benchmarks.harness.model_case import MEASURED
from dak_inductor.benchmarks.harness.record import Verdict
from dak_inductor.quantity_text import bytes_text
from dak_inductor.report.model_table import LEFT_OUT
from dak_inductor.report.peer_ratios import against_fastest

BAR_AGAINST_PEERS = 1.0
BAR_REALISED = 0.98
QUICK_SECONDS = {True: 180.0, False: 300.0}
Row = Mapping[str, Any]


def verdicts(
    rows: Sequence[Row], *, wanted: int, quick_seconds: float | None, on_gpu: bool
) -> list[Verdict]:
    """`dak` against the fastest real peer of each setting; rows that are no result; the time.

    wanted: rows that the run was to have. One that was left out, or that is not there since the run
    was stopped, is a miss: nobody knows what it would have said.
    """
    made: list[Verdict] = []
    for setting, peers in _settings(rows).items():
        made += _against_peers(setting, peers)
    bad = [row for row in rows if row["status"] in ("failed", "inaccurate")]
    note = "; ".join(str(row["case"]) for row in bad[:3])
    made.append(Verdict("rows failed or inaccurate", len(bad), 0, "rows", not bad, note))
    left = wanted - sum(row["status"] != LEFT_OUT for row in rows)
    advice = f"{left} of {wanted} left out: run again with --resume" if left else ""
    made.append(Verdict("rows left out", left, 0, "rows", not left, advice))
    if quick_seconds is not None:
        bar, whole = QUICK_SECONDS[on_gpu], not left
        made.append(Verdict("quick run, every row", quick_seconds, bar, "s",
                            whole and quick_seconds <= bar))  # fmt: skip
    return made


METRICS = (
    ("tpot_ms", "decode"),
    ("ttft_ms", "first token"),
    ("ttft_calls_ms", "first token in calls"),
)
"""Of rows, which are compared between providers, and what they are called."""


def _settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows with one model, batch and share remote."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["figure"] == MEASURED and row["share"]:
            name = f"{row['model']} x{row['layers']}, batch {row['batch']}, {row['share']:.0%}"
            found.setdefault(name, []).append(row)
    return found


def _against_peers(setting: str, rows: Sequence[Row]) -> list[Verdict]:
    ok = [row for row in rows if row["status"] == "ok"]
    ours = next((row for row in ok if row["provider"] == "dak"), None)
    if ours is None:
        return [Verdict(f"dak, {setting}", None, BAR_AGAINST_PEERS, "x", False, "no accurate row")]
    waiting = [str(row["provider"]) for row in rows if row["status"] == LEFT_OUT]
    asked = ours["realised"] / ours["share"]
    made = [
        Verdict(f"dak, {setting}: share realised / asked", asked, BAR_REALISED, "x",
                asked >= BAR_REALISED)
    ]  # fmt: skip
    for metric, word in METRICS:
        found = against_fastest(rows, metric)
        if found is not None:
            passed = False if found.ratio > BAR_AGAINST_PEERS else None if waiting else True
            note = f"{found.peer}; not yet run: {', '.join(waiting)}" if waiting else found.peer
            made.append(
                Verdict(f"dak / fastest real peer, {word}, {setting}", found.ratio,
                        BAR_AGAINST_PEERS, "x", passed, note)
            )  # fmt: skip
    return made


def _bytes(size: object) -> str | None:
    return bytes_text(float(size)) if isinstance(size, int | float) else None


COLUMNS = ("figure", "model", "layers", "batch", "share", "provider", "TTFT ms", "TPOT ms",
           "tokens/s", "T/L", "GB/s", "remote", "read remote", "compile s", "status")  # fmt: skip


def table_rows(rows: Sequence[Row]) -> list[dict[str, object]]:
    """For `table`; T/L is that of decode, or of an encoder's only step."""
    return [
        {
            "figure": row["figure"],
            "model": row["model"],
            "layers": f"{row['layers']}/{row['model_layers']}",
            "batch": row["batch"],
            "share": row["share"],
            "provider": row["provider"],
            "TTFT ms": row.get("ttft_ms"),
            "TPOT ms": row.get("tpot_ms"),
            "tokens/s": row.get("tokens_per_second"),
            "T/L": row.get("tpot T/L", row.get("ttft T/L")),
            "GB/s": row["bandwidth"] / 1e9 if "bandwidth" in row else None,
            "remote": _bytes(row.get("remote_bytes")),
            "read remote": _bytes(row.get("tpot_counted_remote", row.get("ttft_counted_remote"))),
            "compile s": row.get("compile_seconds"),
            "status": row["status"] if row["status"] in ("ok", LEFT_OUT)
            else f"{row['status']}: {str(row.get('reason', ''))[:60]}",
        }
        for row in rows
    ]  # fmt: skip

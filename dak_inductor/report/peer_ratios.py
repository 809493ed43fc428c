"""Rows of `dak bench` against the fastest real peer of their model, batch and share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "dak"
PHASES: Mapping[str, str] = {
    "tpot_ms": "Decode step",
    "ttft_ms": "First token, and an encoder's step",
    "ttft_calls_ms": "First token, and an encoder's step, in calls",
}
"""The entry of a row with the milliseconds of a phase, and what the phase is called."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PeerRatio:
    """Milliseconds of this package and of the fastest real peer."""

    ours: float
    theirs: float
    peer: str

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def peer_ratios(rows: Sequence[Row], phase: str) -> dict[str, dict[float, PeerRatio]]:
    """By "model, batch", and by share remote, of measured rows; without settings that lack either.

    All resident is no peer: it needs the memory that is missing.
    """
    settings: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.get("figure") == "measured" and row.get("share"):
            where = "" if row.get("remote") == "cpu" else f", remote tier {row.get('remote')}"
            line = f"{row.get('model')}, batch {row.get('batch')}{where}"
            settings.setdefault((line, float(row["share"])), []).append(row)
    found: dict[str, dict[float, PeerRatio]] = {}
    for (line, share), peers in settings.items():
        ratio = against_fastest(peers, phase)
        if ratio is not None:
            found.setdefault(line, {})[share] = ratio
    return found


def against_fastest(rows: Sequence[Row], phase: str) -> PeerRatio | None:
    """Of rows that differ in the provider alone; None where a result of either is missing."""
    ok = [
        row for row in rows if row.get("status") == "ok" and isinstance(row.get(phase), int | float)
    ]
    ours = [float(row[phase]) for row in ok if row["provider"] == OURS]
    theirs = {
        str(row["provider"]): float(row[phase])
        for row in ok
        if row["provider"] != OURS and row.get("kind") == "real peer" and row[phase] > 0
    }
    if not ours or not theirs:
        return None
    best = min(theirs, key=lambda name: theirs[name])
    return PeerRatio(ours[0], theirs[best], best)

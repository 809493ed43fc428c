"""Rows of `dak bench` at a glance: time over that of the fastest real peer, by model and share."""

from __future__ import annotations

from collections.abc import Sequence

from dak_inductor.report.heat_map import colour
from dak_inductor.report.html import Cell, Html, cell, join, table, tag
from dak_inductor.report.peer_ratios import PHASES, PeerRatio, Row, peer_ratios


def model_maps(rows: Sequence[Row]) -> Html:
    """One map for each phase: a row for each model and batch, a column for each share remote."""
    return join(_map(rows, phase, title) for phase, title in PHASES.items())


def _map(rows: Sequence[Row], phase: str, title: str) -> Html:
    found = peer_ratios(rows, phase)
    if not found:
        return Html("")
    shares = sorted({share for line in found.values() for share in line})
    headings = ["", *(f"{share:.0%}" for share in shares)]
    body = [[name, *(_cell(line.get(share)) for share in shares)] for name, line in found.items()]
    words = (
        f"{title}: time over that of the fastest real peer, by the share remote; below 1 is "
        "faster, above it framed"
    )
    return join([tag("p", words), table(headings, body)])


def _cell(found: PeerRatio | None) -> Cell:
    if found is None:
        return cell("", "n")
    frame = " miss" if found.ratio > 1 else ""
    told = f"{found.ours:.3g} ms; {found.peer}: {found.theirs:.3g} ms"
    return cell(f"{found.ratio:.2f}", f"n {colour(found.ratio)}{frame}", told)

"""Quantities as people read them: bytes, seconds, and counts of things."""

from __future__ import annotations


def bytes_text(size: float) -> str:
    """Decimal bytes, as vendors count: "16.1 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:.0f} B"


def seconds_text(seconds: float) -> str:
    """Three digits with the unit that fits: "1.24 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def count_text(count: int, noun: str, plural: str | None = None) -> str:
    """A number and its noun, which has an "s" in the plural if nothing else is said: "1 token",
    "2 tokens"."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"

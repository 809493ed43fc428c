"""Placement patterns: which tensors the user wants on the GPU, and which in the remote tier."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

from dak_inductor.errors import PatternError
from dak_inductor.inventory import Entry, Inventory

GPU_PLACES = ("gpu", "cuda", "local")
REMOTE_PLACES = ("cpu", "remote")


def placed_entries(
    placement: Mapping[str, str] | None, inventory: Inventory, remote: str
) -> dict[str, str]:
    """ "gpu" or "remote" by entry name, for the entries that a pattern speaks of.

    A pattern matches qualified names of tensors, or of modules and with them all that is below; the
    last pattern that matches wins. Raises PatternError for an unknown place, a pattern that matches
    nothing, or one that sends only tensors to the remote tier that are too small to go.
    """
    chosen: dict[str, str] = {}
    for pattern, wanted in (placement or {}).items():
        place = _place(pattern, wanted, remote)
        divided = [entry for entry in inventory.entries if _matches(pattern, entry)]
        whole = [entry for entry in inventory.resident if _matches(pattern, entry)]
        if not divided and not whole:
            raise PatternError(_no_match(pattern, inventory))
        if not divided and place == "remote":
            largest = max(entry.nbytes for entry in whole)
            raise PatternError(
                f"placement[{pattern!r}] = {wanted!r} matches only tensors that stay whole on the "
                f"GPU: {len(whole)}, the largest {largest} bytes (small, or buffers). Leave it out."
            )
        chosen.update((entry.name, place) for entry in divided)
    return chosen


def _place(pattern: object, wanted: object, remote: str) -> str:
    if not isinstance(pattern, str) or not isinstance(wanted, str):
        raise PatternError(
            f"placement[{pattern!r}] = {wanted!r}: names to places, such as {{'lm_head': 'gpu'}}"
        )
    if wanted in GPU_PLACES:
        return "gpu"
    if wanted in REMOTE_PLACES or wanted == remote:
        return "remote"
    raise PatternError(
        f"placement[{pattern!r}] = {wanted!r}: unknown place; 'gpu', or 'cpu' for the remote tier"
    )


def _matches(pattern: str, entry: Entry) -> bool:
    return any(fnmatchcase(prefix, pattern) for name in entry.names for prefix in _prefixes(name))


def _prefixes(name: str) -> list[str]:
    """The name, and the modules it is in: "a.b.weight", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _no_match(pattern: str, inventory: Inventory) -> str:
    known = {prefix for entry in inventory for name in entry.names for prefix in _prefixes(name)}
    bare = pattern.strip("*").strip(".")
    close = difflib.get_close_matches(bare, sorted(known), n=3, cutoff=0.5)
    tails = {name.rpartition(".")[2] for name in known}
    close += [f"*{tail}*" for tail in difflib.get_close_matches(bare, sorted(tails), n=2)]
    hint = f"Close: {', '.join(close)}" if close else f"Names look like {sorted(known)[-1]!r}"
    return f"placement pattern {pattern!r} matches no tensor and no module. {hint}."

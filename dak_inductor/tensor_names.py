"""What the dotted name of a tensor says about its place in a model."""

from __future__ import annotations

import re
from functools import lru_cache

_NUMBER = re.compile(r"(\d+)")


@lru_cache(maxsize=16384)
def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts layer 2 ahead of layer 10."""
    return tuple((int(part) if part.isdecimal() else -1, part) for part in _NUMBER.split(name))


@lru_cache(maxsize=16384)
def role(name: str) -> str:
    """The name without the numbers: the same for one tensor of every block."""
    return _NUMBER.sub("*", name)

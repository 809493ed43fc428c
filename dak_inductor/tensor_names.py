"""What a dotted name says about a place in a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_NUMBER = re.compile(r"(\d+)")
_BLOCK = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


@lru_cache(maxsize=16384)
def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts layer 2 ahead of layer 10."""
    return tuple((int(part) if part.isdecimal() else -1, part) for part in _NUMBER.split(name))


@lru_cache(maxsize=16384)
def role(name: str) -> str:
    """The same for one tensor or module of every block: a star for each number that is a whole part
    of the name. Other numbers tell apart what one block has: "fc1" and "fc2", "w1" and "w3".
    """
    return _BLOCK.sub("*", name)


def few_of(names: Sequence[str]) -> str:
    """The first three, and how many there are besides; "none" of none."""
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

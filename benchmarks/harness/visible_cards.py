"""The GPUs that a process may see, as CUDA_VISIBLE_DEVICES names them."""

from __future__ import annotations

from collections.abc import Mapping


def visible_cards(environment: Mapping[str, str], present: int) -> list[str]:
    """Their names, by which a process that is started can be given some of them.

    `present` is how many there are where the variable does not say it.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(present))) if named is None else named.split(",")

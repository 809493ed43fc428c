"""The versions of torch that this package was tested with."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache

import torch

OLDEST, NEWEST = (2, 11), (2, 13)


@lru_cache(maxsize=1)
def warn_of_newer_torch() -> None:
    """One warning where torch is newer than any that was tested: its internals may have moved."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or (int(found[1]), int(found[2])) <= NEWEST:
        return
    tested = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
    warnings.warn(
        f"torch {torch.__version__} is newer than those that dak_inductor was tested with "
        f"({tested}); should a model fail to compile, try one of them",
        stacklevel=3,
    )

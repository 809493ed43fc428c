"""Torch's compile caches by what is compiled: empty the first time, filled from then on."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from unittest.mock import patch

from torch._inductor.utils import clear_caches


class CompileCaches:
    """Folders of Inductor's and Triton's caches, one for each key of a group.

    A group's folders go when another group comes, and all of them with this object: what is kept
    is what the cases of one comparison compile.
    """

    def __init__(self) -> None:
        self._group: Hashable = None
        self._root: tempfile.TemporaryDirectory[str] | None = None
        self._known: dict[Hashable, Path] = {}

    @contextlib.contextmanager
    def of(self, group: Hashable, key: Hashable) -> Iterator[bool]:
        """Compile with the caches of `key` in here; whether they were empty."""
        if self._root is None or group != self._group:
            self.close()
            self._group, self._root = group, tempfile.TemporaryDirectory(prefix="dak-bench-")
        cold = key not in self._known
        folder = self._known.setdefault(key, Path(self._root.name) / str(len(self._known)))
        folder.mkdir(exist_ok=True)
        own = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
        clear_caches()
        try:
            with patch.dict(os.environ, own):
                yield cold
        finally:
            clear_caches()

    def close(self) -> None:
        """Delete all folders."""
        self._known.clear()
        if self._root is not None:
            self._root.cleanup()
            self._root = None

"""Imported by every interpreter that tests/sanitize.sh starts, tests' child processes too.

Puts the sanitized extension in the place of the installed one, and looks for leaks when the
interpreter is about to end: later, what Python itself never frees would be found.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

NAME = "dak_inductor.cuda_runtime._driver"


class Finder:
    """Finds the extension alone."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != NAME:
            return None
        return importlib.util.spec_from_file_location(name, os.environ["SANITIZED_DRIVER"])


@atexit.register
def look_for_leaks() -> None:
    """Of everything that was allocated in this process and that nothing points at."""
    if NAME not in sys.modules:
        return  # the tool itself can crash in a probe's child, whose threads still run
    from dak_inductor.cuda_runtime import vmm

    vmm.drain(5)  # what the thread that frees memory has in hand is no leak
    gc.collect()
    ctypes.CDLL(None).__lsan_do_recoverable_leak_check()


sys.meta_path.insert(0, Finder)

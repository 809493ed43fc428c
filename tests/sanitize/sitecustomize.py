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
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NAME = "dak_inductor.cuda_runtime._driver"
READER = "dak_inductor.checkpoint"


class UnwatchedFile:
    """A safetensors file, each read of which loses two integers.

    `get_tensor` of safetensors 0.8.0 slices a storage and never releases the bounds of the slice.
    Their stacks, which end in libpython since it has no frame pointers, tell them from no other
    integer: a suppression by name would hide the extension's own.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        from safetensors import safe_open

        self._file = safe_open(*given, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Any:
        tool = ctypes.CDLL(None)
        getattr(tool, "__lsan_disable")()  # by a string, which the class's name is not put before
        try:
            return self._file.get_tensor(name)
        finally:
            getattr(tool, "__lsan_enable")()


def find_reader(path: Sequence[str] | None) -> ModuleSpec | None:
    """The module that reads checkpoints, with such files in the place of safetensors' own."""
    spec = PathFinder.find_spec(READER, path)
    if spec is None or spec.loader is None:
        return None
    load = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        load(module)
        vars(module)["safe_open"] = UnwatchedFile

    vars(spec.loader)["exec_module"] = exec_module
    return spec


class Finder:
    """Finds the extension, and what reads checkpoints."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == READER:
            return find_reader(path)
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


# A forked child does not look: CPython gives up its locks there on purpose
# (`_PyThread_at_fork_reinit`) and what frames of the parent's other threads held, and the extension
# frees nothing.
os.register_at_fork(after_in_child=lambda: atexit.unregister(look_for_leaks))
sys.meta_path.insert(0, Finder)

"""What names and orders the lanes in a file of Chrome's trace events."""

from __future__ import annotations

from typing import Any


def process_name(process: int, name: str) -> dict[str, Any]:
    """The event that names a process."""
    return _event("process_name", process, 0, name=name)


def thread_name(process: int, thread: int, name: str) -> dict[str, Any]:
    """The event that names a thread of it."""
    return _event("thread_name", process, thread, name=name)


def thread_position(process: int, thread: int) -> dict[str, Any]:
    """The event by which threads are shown in the order of their numbers."""
    return _event("thread_sort_index", process, thread, sort_index=thread)


def _event(kind: str, process: int, thread: int, **arguments: object) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": arguments}

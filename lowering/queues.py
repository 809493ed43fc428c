"""Queues of work on a device and the order between them: streams, behind what tests replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch


class Queue(Protocol):
    """Work runs in the order in which it was given."""

    def run(self, work: Callable[[], object]) -> None:
        """Queue what `work` launches."""

    def launch(self, work: Callable[[int], object]) -> None:
        """Queue what `work` launches on the CUstream that it is given; 0 on the CPU."""

    def record(self, again: Any = None) -> Any:
        """A mark behind all work so far: `again`, an earlier one of this queue's, is set anew. Who
        waited for it before has waited for what it was."""

    def wait(self, mark: Any) -> None:
        """Work from here on starts after what is before `mark`, of any queue."""


class StreamQueue:
    """A CUDA stream. While it is being captured, or waits for one that is, it queues nodes."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._handle: int = stream.cuda_stream

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def launch(self, work: Callable[[int], object]) -> None:
        work(self._handle)

    def record(self, again: torch.cuda.Event | None = None) -> torch.cuda.Event:
        return self._stream.record_event(again)

    def wait(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)


class CurrentQueue(StreamQueue):
    """The stream that is current while work is queued; to make it so takes the host 25 us."""

    def run(self, work: Callable[[], object]) -> None:
        work()


class InlineQueue:
    """The CPU: work is done when it is queued."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def launch(self, work: Callable[[int], object]) -> None:
        work(0)

    def record(self, again: None = None) -> None:
        return None

    def wait(self, mark: None) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Queues:
    """The current queue of a device, and one for copies beside it."""

    main: Queue
    copies: Queue


def queues_of(device: torch.device, *, ahead: bool = False) -> Queues:
    """The current stream of `device`, and one beside it that belongs to it alone: another for
    copies `ahead` of their product, so that none of a product's own waits behind them.

    For work that is queued while that stream is current.
    """
    if device.type == "cpu":
        return Queues(InlineQueue(), InlineQueue())
    main = torch.cuda.current_stream(device)
    return Queues(
        CurrentQueue(main), StreamQueue(_side(main.device_index, main.cuda_stream, ahead))
    )


@lru_cache(maxsize=256)
def _side(device_index: int, main: int, ahead: bool) -> torch.cuda.Stream:
    """Two for each main stream: a capture on one stream must not meet work for another.

    Of torch's pool of high priority, which exists before any capture starts.
    """
    return torch.cuda.Stream(device_index, priority=-1)

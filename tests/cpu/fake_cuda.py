"""Streams, events and graphs without a card: what runs advances a clock, events note it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


@dataclass
class FakeCard:
    """`now`: seconds on its clock. `calls`: what streams and graphs were asked for, in order."""

    now: float = 0.0
    calls: list[str] = field(default_factory=list)
    capturing: list[Callable[[], object]] | None = None

    def work(self, seconds: float) -> Callable[[], str]:
        """A step that takes so long, now or, in a capture, with each replay."""

        def step() -> str:
            if self.capturing is None:
                self.now += seconds
            else:
                self.capturing.append(step)
            return f"after {seconds} s"

        return step


def install(patch: pytest.MonkeyPatch) -> FakeCard:
    """torch.cuda on a pretended card until `patch` is undone."""
    card = FakeCard()

    class Event:
        def __init__(self, **_: Any) -> None:
            self.at = -1.0

        def record(self, stream: Stream | None = None) -> None:
            self.at = card.now
            card.calls.append(f"record on {stream.name if stream else 'current'}")

        def synchronize(self) -> None:
            assert self.at >= 0, "an event that was not recorded is waited for"

        def elapsed_time(self, other: Event) -> float:
            assert min(self.at, other.at) >= 0, "an event that was not recorded has no time"
            return (other.at - self.at) * 1e3

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0, name: str = "side") -> None:
            self.device, self.device_index, self.name = device, 0, name
            self.cuda_stream = 7 if name == "current" else 8

        def record_event(self, again: Event | None = None) -> Event:
            event = again or Event()
            event.record(self)
            return event

        def wait_stream(self, other: Stream) -> None:
            card.calls.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            assert event.at >= 0, "an event that was not recorded is waited for in vain"
            card.calls.append(f"{self.name} waits for an event")

    class Graph:
        def __init__(self) -> None:
            self.steps: list[Callable[[], object]] = []

        def replay(self) -> None:
            for step in self.steps:
                step()

    @contextlib.contextmanager
    def graph(made: Graph) -> Iterator[None]:
        card.capturing = made.steps
        yield
        card.capturing = None

    @contextlib.contextmanager
    def stream(used: Stream) -> Iterator[None]:
        card.calls.append(f"enter {used.name}")
        yield

    current = Stream(name="current")
    for name, value in {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "stream": stream,
        "current_stream": lambda *_: current, "synchronize": lambda *_: card.calls.append("sync"),
        "device": lambda *_: contextlib.nullcontext(), "empty_cache": lambda: None,
        "_sleep": lambda cycles: card.calls.append(f"sleep {cycles}"),
    }.items():  # fmt: skip
        patch.setattr(torch.cuda, name, value)
    return card

"""Queues of the staged paths without a GPU: their work runs in any order that the marks allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Scheduler:
    """Queues, of which `random` chooses the next that is able to go on."""

    random: random.Random
    queues: list[FakeQueue] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    marks: int = 0

    def queue(self) -> FakeQueue:
        self.queues.append(FakeQueue(self))
        return self.queues[-1]

    def drain(self) -> None:
        while any(queue.entries for queue in self.queues):
            able = [queue for queue in self.queues if queue.able()]
            assert able, "the queues wait for each other"
            self.random.choice(able).step()


class FakeQueue:
    """Entries in order: work to run, a mark to set, or a mark to wait for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.entries: deque = deque()

    def run(self, work: Callable[[], object]) -> None:
        self.entries.append(("run", work))

    def launch(self, work: Callable[[int], object]) -> None:
        self.run(lambda: work(0))

    def record(self, again: int | None = None) -> int:
        """A number of its own each time: who waits for a mark waits for what it is then."""
        self.scheduler.marks += 1
        self.entries.append(("record", self.scheduler.marks))
        return self.scheduler.marks

    def wait(self, mark: int) -> None:
        assert any(("record", mark) in queue.entries for queue in self.scheduler.queues), (
            "a mark that was not recorded yet is waited for in vain"
        )
        self.entries.append(("wait", mark))

    def able(self) -> bool:
        if not self.entries:
            return False
        kind, what = self.entries[0]
        return kind != "wait" or what in self.scheduler.reached

    def step(self) -> None:
        kind, what = self.entries.popleft()
        if kind == "run":
            what()
        elif kind == "record":
            self.scheduler.reached.add(what)

"""The threads of the ring's streamer and of its gates, as generators that any order may resume.

A port of benchmarks/harness/kernels/ring_streamer.cu and ring_gate.cu: each `yield` is a place
where a thread may be held up. Asynchronous copies end whenever the order says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from dak_inductor.benchmarks.harness.streamer_shape import STORES, StreamerShape
from dak_inductor.lowering.ahead.ring_places import Place

Thread = Iterator[bool]
"""Gives whether it got on."""


@dataclass
class Barrier:
    """An mbarrier with one arrival: how many phases it has completed."""

    phases: int = 0

    def done(self, parity: int) -> bool:
        """As `try_wait.parity`: the phase under way has the other parity."""
        return self.phases % 2 != parity


@dataclass
class Cta:
    """One CTA: what its copies do, besides its two threads."""

    rank: int
    stages: int
    full: list[Barrier] = field(init=False)
    empty: list[Barrier] = field(init=False)
    shared: list[tuple[int, int] | None] = field(init=False)
    loads: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    stores: list[tuple[int, int, int, tuple[int, int]]] = field(default_factory=list)
    stopped: int | None = None

    def __post_init__(self) -> None:
        self.full = [Barrier() for _ in range(self.stages)]
        self.empty = [Barrier() for _ in range(self.stages)]
        self.shared = [None] * self.stages


class StreamerModel:
    """A ring of pieces; `read` collects what products found in their parts, in order."""

    def __init__(
        self, pieces: int, places: list[Place], shape: StreamerShape, *, patient: bool = True
    ) -> None:
        self.pieces, self.places, self.shape, self.patient = pieces, places, shape, patient
        self.ring: dict[int, tuple[int, int]] = {}
        self.ctas = [Cta(rank, shape.stages) for rank in range(shape.ctas)]
        self.arrivals = [0] * len(places)
        self.parts_read = 0
        self.given_up = False
        self.most_in_flight = 0
        self.read: list[list[tuple[int, int] | None]] = []

    def run(self, order: random.Random, *, streamed: bool = True) -> None:
        """All threads and copies, one step at a time. AssertionError where nothing gets on.

        `streamed`: whether the streamer is ever started.
        """
        threads: list[Thread] = [self._products()]
        if streamed:
            for cta in self.ctas:
                threads += [self._load(cta), self._store(cta)]
        while threads or self._copies():
            moved = False
            choices = [*threads, *self._copies()]
            order.shuffle(choices)
            for choice in choices:
                if isinstance(choice, tuple):
                    self._end(*choice)
                    moved = True
                    continue
                try:
                    moved |= next(choice)
                except StopIteration:
                    threads.remove(choice)
                    moved = True
                if order.random() < 0.5:
                    break
            else:
                if not moved:
                    assert not self.patient, "nothing gets on"
                    self.given_up = True

    def _copies(self) -> list[tuple[Cta, str, int]]:
        return [
            (cta, kind, number)
            for cta in self.ctas
            for kind, copies in (("load", cta.loads), ("store", cta.stores))
            for number in range(min(1, len(copies)))
        ]

    def _end(self, cta: Cta, kind: str, number: int) -> None:
        if kind == "load" and cta.loads:
            stage, piece = cta.loads.pop(number)
            cta.shared[stage] = piece
            cta.full[stage].phases += 1
        elif kind == "store" and cta.stores:
            _, stage, target, piece = cta.stores.pop(number)
            assert cta.shared[stage] == piece, "a stage was loaded before it had been stored"
            self.ring[target] = piece

    def _load(self, cta: Cta) -> Thread:
        shape, loaded = self.shape, 0
        for number, place in enumerate(self.places):
            while self.parts_read < place.after + 1:
                if self.given_up:
                    cta.stopped = loaded
                    return
                yield False
            for piece in range(cta.rank, self.pieces, shape.ctas):
                if loaded >= shape.loads:
                    turn, stage = divmod(loaded - shape.loads, shape.stages)
                    while not cta.full[stage].done(turn % 2):
                        yield False
                turn, stage = divmod(loaded, shape.stages)
                if loaded >= shape.stages:
                    while not cta.empty[stage].done(turn % 2 ^ 1):
                        yield False
                cta.loads.append((stage, (number, piece)))
                loaded += 1
                self.most_in_flight = max(
                    self.most_in_flight, sum(len(each.loads) for each in self.ctas)
                )
                yield True

    def _store(self, cta: Cta) -> Thread:
        shape, stored, freed = self.shape, 0, 0
        for number, place in enumerate(self.places):
            for piece in range(cta.rank, self.pieces, shape.ctas):
                turn, stage = divmod(stored, shape.stages)
                while not cta.full[stage].done(turn % 2):
                    if cta.stopped is not None and cta.stopped <= stored:
                        while cta.stores:
                            yield False
                        return
                    yield False
                cta.stores.append((stored, stage, place.offset + piece, (number, piece)))
                stored += 1
                while len(cta.stores) > STORES:  # the groups not read yet
                    yield False
                while freed < stored - STORES:
                    cta.empty[freed % shape.stages].phases += 1
                    freed += 1
                yield True
            while cta.stores:
                yield False
            while freed < stored:
                cta.empty[freed % shape.stages].phases += 1
                freed += 1
            self.arrivals[number] += 1
            yield True

    def _products(self) -> Thread:
        for number, place in enumerate(self.places):
            self.parts_read = number
            while self.arrivals[number] < self.shape.ctas and not self.given_up:
                yield False
            found: list[tuple[int, int] | None] = []
            for piece in range(self.pieces):
                found.append(self.ring.get(place.offset + piece))
                if piece % 3 == 0:
                    yield True
            self.read.append(found)

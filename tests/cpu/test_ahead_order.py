"""What a played step queues, in which order, and marks that are set anew at each play."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from dak_inductor.lowering.ahead import player as player_module
from dak_inductor.lowering.ahead.player import Player
from dak_inductor.lowering.ahead.prepared_plan import PreparedPlan
from dak_inductor.lowering.ahead.step_plan import StepPlan
from dak_inductor.lowering.ahead.timeline import LOCAL
from dak_inductor.lowering.queues import Queues

from .ahead_model import assert_close, shrink
from .test_ahead_player import CPU, inputs_of, layers, planned


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@dataclass(eq=False)
class Traced:
    """A queue that does its work at once, as the CPU's, and notes what it was given; marks can be
    set anew, as events can."""

    name: str
    seen: list[tuple[str, str, object]]

    def run(self, work) -> None:
        self.seen.append((self.name, "run", None))
        work()

    def launch(self, work) -> None:
        self.run(lambda: work(0))

    def record(self, again: object = None) -> object:
        mark = object() if again is None else again
        self.seen.append((self.name, "record", mark))
        return mark

    def wait(self, mark: object) -> None:
        self.seen.append((self.name, "wait", mark))


def order_of(plan: StepPlan) -> list[tuple[str, str, str]]:
    """What a play queues, in order; marks are named by what is ahead of them."""
    found: list[tuple[str, str, str]] = [("main", "run", ""), ("main", "record", "begin")]
    found.append(("copies", "wait", "begin"))
    awaited = {place.after for place in plan.at}
    copied = read = 0
    waited = -1

    def fetch(more: int) -> None:
        nonlocal copied, waited
        for _ in range(more):
            if copied == len(plan.parts) or plan.at[copied].after >= read:
                return
            after = plan.at[copied].after
            if after > waited:
                waited = after
                found.append(("copies", "wait", f"read {after}"))
            found.append(("copies", "run", ""))
            found.append(("copies", "record", f"copied {copied}"))
            copied += 1

    fetch(player_module._FIRST)
    for op in plan.ops:
        if op.strategy == "staged":
            found.append(("main", "run", ""))  # the count
            for number in op.order:
                if number == LOCAL:
                    found.append(("main", "run", ""))
                    fetch(player_module._MORE)
                    continue
                fetch(number + 1 - copied)
                found.append(("main", "wait", f"copied {number}"))
                found.append(("main", "run", ""))
                if number in awaited:
                    found.append(("main", "record", f"read {number}"))
                read += 1
        fetch(player_module._MORE)
        if op.strategy == "staged":
            found.append(("main", "run", ""))  # activation, gate, residual
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_order_of_what_is_queued_and_of_marks_that_are_set_anew(seed: int) -> None:
    pick = random.Random(seed)
    made = layers(pick)
    inputs = inputs_of(made, 3)
    plan, calls = planned(made, inputs)
    prepared = PreparedPlan(plan, calls)
    known: list[object] = []
    for turn in range(3):
        seen: list[tuple[str, str, object]] = []
        queues = Queues(Traced("main", seen), Traced("copies", seen))
        player = Player(prepared, queues, CPU)
        player.begin()
        for number, layer in enumerate(made):
            if plan.ops[number].strategy == "direct":
                player.pass_by()
            else:
                result = player.run(number, layer.product(inputs[number]))
                assert_close(result, layer.expected(inputs[number]))
        player.close()
        expected = order_of(plan)
        assert [each[:2] for each in seen] == [each[:2] for each in expected]
        names: dict[int, str] = {}
        for (_, kind, mark), (_, _, name) in zip(seen, expected, strict=True):
            if kind == "record":
                names[id(mark)] = name
            elif kind == "wait":
                assert names.get(id(mark)) == name, "waits for what this play did not set"
        marks = [mark for mark in (*prepared.copied, *prepared.read) if mark is not None]
        assert turn == 0 or list(map(id, marks)) == list(map(id, known)), "made once"
        known = marks

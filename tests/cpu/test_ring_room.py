"""What a ring may take when a step is planned, predicted or captured, and what was taken."""

from __future__ import annotations

import pytest
import torch

from dak_inductor.lowering.ahead.ring_room import RingRoom, Room

CPU = torch.device("cpu")


def room_of(*answers: int, charged: bool = False) -> RingRoom:
    """Each question has the next answer; more questions are an error."""
    left = iter(answers)
    return RingRoom(lambda: Room(next(left), charged))


def test_room_is_asked_for_at_each_plan_outside_of_captures() -> None:
    ring = room_of(100, 80, 90)
    assert ring.to_plan(capturing=True) is None and ring.least is None
    found = [ring.to_plan(capturing=capturing) for capturing in (False, True, False, True, False)]
    assert found == [Room(nbytes) for nbytes in (100, 100, 80, 80, 90)]
    assert ring.least == 80


def test_predictions_have_the_room_of_the_last_plan_and_leave_no_trace() -> None:
    ring = room_of(100, 80)
    assert ring.to_predict() == Room(100) and ring.least is None
    ring.to_plan(capturing=False)
    assert ring.to_predict() == Room(80) and ring.least == 80


def test_what_a_ring_has_it_may_have_again() -> None:
    ring = room_of(100, charged=True)
    ring.note(300)
    assert ring.to_plan(capturing=False) == ring.to_predict() == Room(300, charged=True)


def test_a_ring_grew_where_it_is_larger_than_all_before() -> None:
    ring = room_of()
    grew = []
    for nbytes in (0, 10, 10, 5, 11):
        ring.note(nbytes)
        grew.append(ring.grew())
    assert grew == [False, True, False, False, True] and ring.largest == 11
    ring.note(12)
    ring.note(1)
    assert ring.grew() and not ring.grew()


def test_the_ring_of_captures_is_held_where_none_was_as_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring = room_of()
    ring.note(10)
    ring.hold(10, CPU)
    assert ring._held is None
    ring.hold(20, CPU)
    assert ring._held is not None and ring._held.nbytes == ring.largest == 20
    ring.release()
    assert ring._held is None and ring.largest == 20

    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    ring.hold(30, CPU)
    assert ring._held is None and ring.largest == 20

"""How prefill and decode are weighed against each other, whatever of their calls is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from dak_inductor.expected_calls import expected_calls
from dak_inductor.hardware import load
from dak_inductor.plan import Plan, PlanProblem
from dak_inductor.planner import make_plan

from .test_ahead_placement import decoder

H200 = load("h200")
WEIGHTS = {"q": object(), "down": object()}


@dataclass(frozen=True)
class Called:
    """What is asked of a binding."""

    rows: int
    calls: int
    names: tuple[str, ...] = ("q", "down")

    def live_buffers(self) -> dict[int, object]:
        return {index: WEIGHTS[name] for index, name in enumerate(self.names)}


def expected(*bindings: Called) -> list[float]:
    return expected_calls(cast(Sequence[Any], bindings))


def test_calls_to_come_are_those_that_were_and_sixteen_of_a_decode_step() -> None:
    assert expected(Called(512, 0)) == [1]
    assert expected(Called(512, 40)) == [40]
    assert expected(Called(1, 3)) == [16]
    assert expected(Called(1, 40)) == [40]
    assert expected() == []


@pytest.mark.parametrize(("counted", "decodes"), [(7, 4096), (4000, 4096), (8000, 8000)])
def test_each_prefill_is_followed_by_sixteen_decode_steps_at_least(
    counted: int, decodes: int
) -> None:
    """Replays of a CUDA graph count nowhere: 7 calls came before its capture."""
    assert expected(Called(512, 256), Called(1, counted)) == [256, decodes]
    assert expected(Called(1, counted), Called(512, 256)) == [decodes, 256]


def test_decode_steps_of_several_batches_share_what_follows() -> None:
    prefill, one, more = expected(Called(4096, 100), Called(1, 10), Called(64, 48))
    assert prefill == 100
    assert one + more == pytest.approx(1600)
    assert more == pytest.approx(3 * one)


def test_prefills_of_several_lengths_add_up_and_those_of_other_weights_do_not() -> None:
    decode = Called(1, 7, ("down",))
    lengths = Called(512, 20, ("down",)), Called(1024, 30, ("q", "down"))
    assert expected(*lengths, decode) == [20, 30, 800]
    assert expected(Called(512, 90, ("q",)), decode) == [90, 16]


def test_shorter_inputs_of_an_encoder_are_no_decode_steps() -> None:
    assert expected(Called(512, 256), Called(128, 7)) == [256, 16]


def test_what_holds_nothing_offloaded_has_its_own_calls() -> None:
    assert expected(Called(512, 256), Called(1, 7, ())) == [256, 16]


PROMPT = 384


def problem(share: float, prefills: float, decodes: float) -> PlanProblem:
    """Linears of 8 Llama-3-8B layers in another GPU's memory: prompts of PROMPT tokens, one a
    step."""
    whole = decoder(share, remote="peer")
    own = tuple(replace(use, calls=decodes) for use in whole.uses[1:])
    prefill = tuple(
        replace(use, graph="prefill", calls=prefills, m=PROMPT, flops=PROMPT * use.flops,
                other_bytes=PROMPT * use.other_bytes)
        for use in own
    )  # fmt: skip
    asked = whole.remote_bytes - whole.tensors[0].nbytes
    return replace(whole, tensors=whole.tensors[1:], uses=own + prefill, remote_bytes=asked)


def planned_again(share: float, prefills: float, decodes: float) -> tuple[Plan, Plan]:
    """For decode steps alone, and for these calls once tensors lie as that plan has them."""
    first = make_plan(problem(share, 0.0, 1.0), H200)
    then = problem(share, prefills, decodes)
    placed = tuple(replace(t, current_remote=first.splits[t.name]) for t in then.tensors)
    return first, make_plan(replace(then, tensors=placed), H200)


def test_many_prefills_do_not_undo_the_placement_made_for_decode_steps() -> None:
    """Weighed 256 to 16, decode steps are to take 5% longer; it was 19% while prefill was priced
    without what divided products pay: then every product was to have a tenth."""
    first, moved = planned_again(0.1, 256.0, 16.0)
    assert moved.step_times["decode"] > 1.04 * first.step_times["decode"]
    prefills, decodes = expected(Called(PROMPT, 256), Called(1, 7))
    assert planned_again(0.1, prefills, decodes)[1].splits == first.splits

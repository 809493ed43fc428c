"""How often each graph is taken to be called from here on, which is what a plan weighs it by."""

from __future__ import annotations

from collections.abc import Sequence

from dak_inductor.binding import Binding

# A graph of few rows is a decode step, of which more will come; a prefill may never come again.
_DECODE_ROWS = 256
_DECODE_CALLS = 16
_PROMPT_TOKENS = 16
"""Of a prefill, at least: so many times the rows of the decode steps that follow it. What has fewer
is no decode step of it, but a shorter input to the same encoder."""


def expected_calls(bindings: Sequence[Binding]) -> list[float]:
    """Calls still to come, by binding: as many as there were.

    Of a decode step at least 16, and 16 for each call of a prefill that reads the same weights,
    with any other decode steps of these: replays of a CUDA graph are calls that nobody counts. With
    256 prefills beside 16 steps, remote bytes would lie where they suit the prefill.
    """
    rows = [binding.rows for binding in bindings]
    steps = [few <= _DECODE_ROWS for few in rows]
    calls = [
        float(max(binding.calls, _DECODE_CALLS if is_step else 1))
        for binding, is_step in zip(bindings, steps, strict=True)
    ]
    read = [[id(buffer) for buffer in binding.live_buffers().values()] for binding in bindings]
    prefills: dict[int, list[tuple[int, float]]] = {}  # rows and calls, by weight
    counted: dict[int, float] = {}  # decode steps, by weight
    for few, is_step, own, weights in zip(rows, steps, calls, read, strict=True):
        for weight in weights:
            if is_step:
                counted[weight] = counted.get(weight, 0.0) + own
            else:
                prefills.setdefault(weight, []).append((few, own))
    return [
        own * max(1.0, *(_following(few, prefills.get(w, ())) / counted[w] for w in weights))
        if is_step and weights
        else own
        for few, is_step, own, weights in zip(rows, steps, calls, read, strict=True)
    ]


def _following(rows: int, prefills: Sequence[tuple[int, float]]) -> float:
    """Decode steps of so many rows that follow these prefills, each with its rows and calls."""
    return _DECODE_CALLS * sum(own for many, own in prefills if many >= _PROMPT_TOKENS * rows)

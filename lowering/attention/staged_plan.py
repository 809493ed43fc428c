"""Staged attention as data: tokens that go through the ring, the calls that see them, the time.

Remote keys and values are copied once, by copy engine, into slots of a ring in device memory. A
stock forward attends to each slot, and to the local tokens where they lie; what the calls give is
merged by its log-sum-exp. Nothing here knows streams or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dak_inductor.hardware import HardwareProfile, LinkProfile
from dak_inductor.lowering.attention.staged_parts import (
    Forward,
    Part,
    Piece,
    PrefillProblem,
    pieces_of,
)
from dak_inductor.lowering.attention.staged_timing import ROWS, StagedTiming

RING_BYTES = 64 * 2**20
"""Device memory of all slots together, at most; only tokens of more than 170 KiB need more."""
SLOTS = (2, 3)
UNIT = 128
"""Tokens of a staged part are a multiple of it where possible: whole key blocks of the kernels."""

_LOCAL_ROW_BLOCKS = (1, 2, 4, 8)
_RISING = ((4, 2), (2, 4), (4, 4), (8, 3))  # units of the first chunk, growth of the next ones
_MANY = 48  # chunks: with more of them only the largest size is tried


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """Parts in the order of their calls; those that are staged are copied in the same order."""

    forward: Forward
    parts: tuple[Part, ...]
    slots: int
    seconds: float

    @property
    def staged(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.staged)

    @property
    def slot_tokens(self) -> int:
        """Of the largest staged part; 0 for none."""
        return max((part.tokens for part in self.staged), default=0)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(piece for part in self.parts for piece in part.pieces)


def choose(
    problem: PrefillProblem,
    local: int,
    profile: HardwareProfile,
    link: LinkProfile,
    forwards: tuple[Forward, ...],
) -> StagedPlan:
    """The fastest of some plans: each forward; chunks of a few sizes, smaller ones at the end or
    not, and at the start where no local work hides the first copy; local rows in some blocks; all
    tokens copied together, so that one call sees them, where they fit the ring.

    Tokens before `local` are in local memory, so that they may be read in place.
    """
    local = min(max(local, problem.first), problem.tokens)
    total = problem.tokens - problem.first
    found = []
    for forward in forwards:
        timing = StagedTiming(problem, local, forward, profile, link)
        if local < problem.tokens and total * problem.token_bytes <= RING_BYTES:
            together = _staged(problem, problem.first, (total,), forward)
            found.append(_schedule((), together, 1, timing))
        for blocks in _LOCAL_ROW_BLOCKS if problem.first < local < problem.tokens else (1,):
            in_place = _local(problem, local, forward, blocks)
            for slots, sizes in _chunks(problem, local):
                staged = _staged(problem, local, sizes, forward)
                found.append(_schedule(in_place, staged, min(slots, len(staged)), timing))
    return min(found, key=lambda plan: plan.seconds)


def _local(problem: PrefillProblem, local: int, forward: Forward, blocks: int) -> tuple[Part, ...]:
    """Local tokens in one part for each of its calls; wide ones in row blocks, so that a chunk
    that has arrived need not wait for all of them. Row blocks share no row: no merge is added."""
    if local <= problem.first:
        return ()
    found = []
    for piece in pieces_of(problem, problem.first, local, forward):
        size = piece.rows
        if not piece.causal:
            size = max(ROWS, math.ceil(piece.rows / blocks / ROWS) * ROWS)
        for row in range(piece.first_row, piece.last_row, size):
            block = Piece(row, min(row + size, piece.last_row), piece.start, piece.stop, False)
            found.append(piece if size == piece.rows else block)
    return tuple(Part(piece.start, piece.stop, False, (piece,)) for piece in found)


def _staged(
    problem: PrefillProblem, local: int, sizes: tuple[int, ...], forward: Forward
) -> tuple[Part, ...]:
    parts, start = [], local
    for size in sizes:
        pieces = pieces_of(problem, start, start + size, forward)
        parts.append(Part(start, start + size, True, pieces))
        start += size
    return tuple(parts)


def _chunks(problem: PrefillProblem, local: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """How many slots there are, and the sizes of the chunks that go through them."""
    total = problem.tokens - local
    if not total:
        yield 0, ()
        return
    seen = set()
    for slots in SLOTS:
        largest = max(UNIT, RING_BYTES // slots // problem.token_bytes // UNIT * UNIT)
        for body in sorted({max(UNIT, largest // part // UNIT * UNIT) for part in (1, 2, 4, 8)}):
            if body < largest and total > _MANY * body:
                continue
            for rising in (None, *_RISING) if local == problem.first else (None,):
                for falling in (False, True):
                    sizes = _sizes(total, body, rising=rising, falling=falling)
                    if (slots, sizes) not in seen:
                        seen.add((slots, sizes))
                        yield slots, sizes


def _sizes(
    total: int, body: int, *, rising: tuple[int, int] | None, falling: bool
) -> tuple[int, ...]:
    """Sizes that sum to `total`, at most `body` each, all but one multiples of UNIT."""
    ragged, left = total % UNIT, total // UNIT * UNIT
    if not left:
        return (ragged,)
    up = _ramp(body, left, *rising) if rising else ()
    left -= sum(up)
    down = _ramp(body, left, 4, 2)[::-1] if falling else ()
    left -= sum(down)
    count = math.ceil(left / body)
    each = math.ceil(left / count / UNIT) * UNIT
    middle = [min(each, left - start) for start in range(0, left, each)]
    if middle[-1] + ragged <= body:
        middle[-1] += ragged
    elif ragged:
        middle.append(ragged)
    return (*up, *middle, *down)


def _ramp(body: int, total: int, units: int, growth: int) -> tuple[int, ...]:
    """Growing sizes below `body`, which leave at least one unit of `total`."""
    found: list[int] = []
    size = units * UNIT
    while size < body and sum(found) + size < total:
        found.append(size)
        size *= growth
    return tuple(found)


def _schedule(
    local: tuple[Part, ...], staged: tuple[Part, ...], slots: int, timing: StagedTiming
) -> StagedPlan:
    """A staged part as soon as it is there, else a local one; and the time it takes by `timing`."""
    now = arrived = 0.0
    order: list[Part] = []
    done: list[float] = []
    waiting = list(reversed(local))
    for position, part in enumerate(staged):
        if position >= slots:
            arrived = max(arrived, done[position - slots])
        arrived += timing.copy(part)
        while waiting and now < arrived:
            order.append(waiting.pop())
            now += sum(map(timing.attend, order[-1].pieces))
        order.append(part)
        now = max(now, arrived) + sum(map(timing.attend, part.pieces))
        done.append(now)
    now += sum(timing.attend(piece) for part in waiting for piece in part.pieces)
    parts = (*order, *reversed(waiting))
    pieces = tuple(piece for part in parts for piece in part.pieces)
    return StagedPlan(timing.forward, parts, slots, now + timing.merge(pieces))


def plan_lines(plan: StagedPlan) -> tuple[str, ...]:
    """The plan in words, a line for each part in the order of its calls."""
    lines = [f"{plan.forward}, {plan.slots} slots, about {1e3 * plan.seconds:.3f} ms"]
    for part in plan.parts:
        how = "copied" if part.staged else "in place"
        calls = ", ".join(
            f"rows [{p.first_row}, {p.last_row}){' causal' if p.causal else ''}"
            for p in part.pieces
        )
        lines.append(f"tokens [{part.start}, {part.stop}) {how}: {calls}")
    return tuple(lines)

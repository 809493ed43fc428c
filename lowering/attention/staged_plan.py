"""Staged attention as data: tokens that go through the ring, the calls that see them, the time.

Remote keys and values are copied once, by copy engine, into slots of a ring in device memory. A
stock forward attends to each slot, and to the local tokens where they lie; what the calls give is
merged by its log-sum-exp. Nothing here knows streams or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.lowering.attention.staged_parts import (
    ROWS,
    Forward,
    Part,
    Piece,
    PrefillProblem,
    merged_rows,
    pieces_of,
)
from dak_inductor.lowering.attention.staged_timing import StagedTiming
from dak_inductor.lowering.copy_cost import JOIN_SECONDS
from dak_inductor.lowering.part_order import order_parts
from dak_inductor.lowering.slots import slot_sizes

RING_BYTES = 64 * 2**20
"""Device memory of all slots together, at most; only tokens of more than 500 KiB need more."""
UNIT = 128
"""Tokens of a staged part are a multiple of it where possible: whole key blocks of the kernels."""

ROUNDED_TOKENS = 4096
"""A row that sees fewer is not merged from rounded results where the Triton forward is there to
give fp32 ones. What one call gives is not merged, so it may be rounded.

A row in which one token outweighs the others has the largest elements of all; rounded once for each
part and once at the end, they err up to three times as much as torch's one rounding where that
happens to be small. Simulated draws of 32 heads of 512 rows, two or three rounded parts: 2% err by
more than twice torch's largest error over 2048 tokens and over 4096, 1% over 8192 (scores of
deviation 1; of 1.6, 8% and 6%); of fp32 parts none by more than 1.13 times. So the limit is one of
cost, no bound for longer rows. Few tokens are where fp32 parts cost least: by prediction at most a
third of a call that is short, and 0.13 and 1.6 ms of 1.1 and 9.2 where 8192 tokens are all remote.
Without a limit most long prefills would take a third longer.
"""
PRECISION_COST, PRECISION_SECONDS = 1.05, 20e-6
"""What a plan may take that merges no rounded results at all: so many times the fastest plan, or so
much more."""

_LOCAL_ROW_BLOCKS = (1, 2, 4)
_BODIES = (1, 2, 3, 4, 8)  # chunks of equal size in what the ring holds
_RISING = ((2, 4), (4, 2), (4, 4), (8, 3))  # units of the first chunk, growth of the next ones
_FALLING = ((4, 2), (8, 2), (8, 4))  # the same from the last one backwards
_FEW = (2, 3, 4, 5, 6)  # chunks of which each is as many times the one before
_GROWTH = (0.4, 0.7, 1.0, 1.5, 2.5, 4.0)
_MANY = 32  # chunks: with more of them only few sizes are tried


@dataclass(frozen=True, slots=True)
class Layout:
    """Tokens [first, local) in place, with wide calls in so many row blocks; behind them chunks of
    these sizes."""

    first: int
    local: int
    sizes: tuple[int, ...]
    blocks: int

    def merged_rows(self, problem: PrefillProblem, forward: Forward, *, below: int) -> range:
        first_stop = self.local if self.local > self.first else self.first + self.sizes[0]
        return merged_rows(problem, first_stop, forward, below=below)


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """Parts in the order of their calls; those that are staged are copied in the same order.

    Attributes:
        slots: tokens that each slot of the ring has room for; `staged[i]` takes slot i % slots.
        copy_bound: the last calls wait for their copy.
    """

    parts: tuple[Part, ...]
    slots: tuple[int, ...]
    seconds: float
    copy_bound: bool

    @property
    def staged(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.staged)

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
    """The fastest of some plans, or one nearly as fast that merges unrounded results: each forward;
    chunks of a few sizes; local rows in some blocks; all tokens copied together, so that one call
    sees them, where they fit the ring.

    Each chunk adds calls and partial results to merge; fewer leave more to do behind the last copy.

    Tokens before `local` are in local memory, so that they may be read in place.
    """
    local = min(max(local, problem.first), problem.tokens)
    room = RING_BYTES // problem.token_bytes
    timing = StagedTiming(problem, local, profile, link)
    layouts = list(_layouts(problem, local, room))
    found, unrounded = [], []
    for forward, layout in product(forwards, layouts):
        merged = range(0)
        if forward != "triton":
            merged = layout.merged_rows(problem, forward, below=problem.tokens + 1)
        few = layout.merged_rows(problem, forward, below=ROUNDED_TOKENS)
        apart = {few, merged} if merged and "triton" in forwards else {range(0)}
        for rows in apart:
            if len(rows) < problem.queries:  # else it is a plan of the Triton forward
                found.append(_schedule(problem, layout, forward, rows, room, timing))
                if rows == merged:
                    unrounded.append(found[-1])
    best = min(found, key=_seconds)
    if best in unrounded or not unrounded:
        return best
    precise = min(unrounded, key=_seconds)
    allowed = max(PRECISION_COST * best.seconds, best.seconds + PRECISION_SECONDS)
    return precise if precise.seconds <= allowed else best


def _seconds(plan: StagedPlan) -> float:
    return plan.seconds


def _layouts(problem: PrefillProblem, local: int, room: int) -> Iterator[Layout]:
    """Of tokens before `local` in local memory, and a ring that has room for so many."""
    total = problem.tokens - problem.first
    if local < problem.tokens and total <= room:
        yield Layout(problem.first, problem.first, (total,), 1)
    for sizes in _chunks(problem, local, room):
        for blocks in _LOCAL_ROW_BLOCKS if problem.first < local < problem.tokens else (1,):
            yield Layout(problem.first, local, sizes, blocks)


def _local(
    problem: PrefillProblem, layout: Layout, forward: Forward, unrounded: range
) -> tuple[Part, ...]:
    """Local tokens in one part for each of its calls; wide ones in row blocks, so that a chunk
    that has arrived need not wait for all of them. Row blocks share no row: no merge is added."""
    if layout.local <= problem.first:
        return ()
    found = []
    for piece in pieces_of(problem, problem.first, layout.local, forward, unrounded):
        size = piece.rows
        if not piece.causal:
            size = max(ROWS, math.ceil(piece.rows / layout.blocks / ROWS) * ROWS)
        for row in range(piece.first_row, piece.last_row, size):
            last = min(row + size, piece.last_row)
            found.append(replace(piece, first_row=row, last_row=last))
    return tuple(Part(piece.start, piece.stop, False, (piece,)) for piece in found)


def _staged(
    problem: PrefillProblem, layout: Layout, forward: Forward, unrounded: range
) -> tuple[Part, ...]:
    parts, start = [], layout.local
    for size in layout.sizes:
        pieces = pieces_of(problem, start, start + size, forward, unrounded)
        parts.append(Part(start, start + size, True, pieces))
        start += size
    return tuple(parts)


def _chunks(problem: PrefillProblem, local: int, room: int) -> Iterator[tuple[int, ...]]:
    """Sizes of the chunks that go through the ring, which has room for so many tokens."""
    total = problem.tokens - local
    if not total:
        yield ()
        return
    seen = set()
    for sizes in _sizes_tried(total, room, hidden=local > problem.first):
        if sizes not in seen:
            seen.add(sizes)
            yield sizes


def _sizes_tried(total: int, room: int, *, hidden: bool) -> Iterator[tuple[int, ...]]:
    """May repeat. Where local work hides the first copy it need not be small."""
    if total <= room:
        for number in _FEW:
            for growth in _GROWTH:
                yield _geometric(total, number, growth)
    most = total if total <= room else max(UNIT, room - UNIT)  # one chunk may be a UNIT longer
    for number in _BODIES:
        body = max(UNIT, most // number // UNIT * UNIT)
        if total > room and number == 1:
            continue  # a single slot: copies and calls would take turns
        if number > 2 and total > _MANY * body:
            continue
        for rising in (None,) if hidden else (None, *_RISING):
            for falling in (None, *_FALLING):
                yield _sizes(total, body, rising=rising, falling=falling)


def _geometric(total: int, number: int, growth: float) -> tuple[int, ...]:
    """Sizes that sum to `total`, each `growth` times the one before, all but one whole UNITs."""
    weights = [growth**position for position in range(number)]
    ends = [sum(weights[: position + 1]) / sum(weights) for position in range(number)]
    cuts = [0, *(min(round(total * end / UNIT) * UNIT, total) for end in ends[:-1]), total]
    return tuple(stop - start for start, stop in pairwise(cuts) if stop > start)


def _sizes(
    total: int,
    body: int,
    *,
    rising: tuple[int, int] | None,
    falling: tuple[int, int] | None,
) -> tuple[int, ...]:
    """Sizes that sum to `total`, at most `body` each, all but one multiples of UNIT."""
    ragged, left = total % UNIT, total // UNIT * UNIT
    if not left:
        return (ragged,)
    up = _ramp(body, left, *rising) if rising else ()
    left -= sum(up)
    down = _ramp(body, left, *falling)[::-1] if falling else ()
    left -= sum(down)
    count = math.ceil(left / body)
    each = math.ceil(left / count / UNIT) * UNIT
    middle = [min(each, left - start) for start in range(0, left, each)]
    if body > UNIT or not ragged:
        middle[-1] += ragged
    else:
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
    problem: PrefillProblem,
    layout: Layout,
    forward: Forward,
    unrounded: range,
    room: int,
    timing: StagedTiming,
) -> StagedPlan:
    staged = _staged(problem, layout, forward, unrounded)
    slots = slot_sizes(layout.sizes, room)
    ordered = order_parts(
        _local(problem, layout, forward, unrounded),
        staged,
        len(slots),
        copy=timing.copy,
        compute=lambda part: sum(map(timing.attend, part.pieces)),
    )
    pieces = tuple(piece for part in ordered.parts for piece in part.pieces)
    seconds = ordered.seconds + timing.merge(pieces) + (JOIN_SECONDS if staged else 0.0)
    return StagedPlan(ordered.parts, slots, seconds, ordered.copy_bound)

"""The staged path as data: which parts of a weight go through the ring, in what order, how long.

Remote memory is copied once, by copy engine, into slots of a ring in device memory, and the stock
GEMM multiplies the slots. Work comes in parts: runs of output features, which are rows of a weight
[N, K] or columns of a weight [K, N], so that no sum is ever cut. What is all local is multiplied
where it lies, beside the copies. Products run one after the other: the stock GEMM is persistent and
holds every SM until it ends, whatever the priority of a stream beside it.

So there are three cases. Where the copies are there before the local product has ended, one product
more is the least. Where they are not, what shows is the product behind the last copy: it is small.
Where the ring is too small for all copies, local work comes in blocks: the first slots are
multiplied between them, so that copies go on.

Nothing here knows streams or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.lowering.copy_cost import JOIN_SECONDS
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_timing import RingTiming
from dak_inductor.lowering.part_order import order_parts
from dak_inductor.lowering.slots import slot_sizes

RING_BYTES = 64 * 2**20
"""Device memory of all slots together; only K > 10^6 needs more (LEAST_FEATURES)."""
LARGE_RING = 2
"""How many times that they may take where long rows leave no room for parts as large as a wave of
tiles, and it saves a share of LARGE_RING_SAVES. Of half of 8192 x 28672 over NVLink, 1024 tokens,
64 MiB hold 1170 rows: 856 us by the timing, 934 measured (`linear_peer_prefill.json`), and 739 by
the timing with 128 MiB."""
LARGE_RING_SAVES = 0.03
UNIT = 256
"""Features of a part are a multiple of it where possible: whole tiles of the stock GEMM."""
LEAST_FEATURES = 8
"""A part starts at a multiple of it: output columns start on a 16-byte boundary. So at most 7 whole
local rows are copied with the remote ones."""

_MARGIN = 0.05  # what the ring must save to be worth its memory
_BODIES = (1, 2, 3, 4, 6, 8)  # parts of equal size in what the ring holds
_RISING = ((), (1,), (1, 2), (1, 2, 4), (4,))  # units of the first parts
_FALLING = ((), (1,), (2,), (4,), (2, 1), (4, 2, 1), (8, 4, 2, 1))  # units of the last parts
_LOCAL_BLOCKS = (1, 2, 4, 8)
_MANY = 48  # parts: with more of them only few plans are tried


@dataclass(frozen=True, slots=True)
class Residency:
    """Stored rows [0, local) of a weight are all local, rows [remote, ...) are all remote.

    `remote` is `local`, or one more where the split cuts a row.
    """

    local: int
    remote: int


@dataclass(frozen=True, slots=True)
class Part:
    """Output features [start, stop) of one weight: through a slot of the ring, or in place."""

    weight: int
    start: int
    stop: int
    staged: bool

    @property
    def features(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RingPlan:
    """Parts in the order of their products; the staged ones are copied in the same order.

    Attributes:
        slots: features that each slot of the ring has room for; `staged[i]` takes slot i % slots.
        seconds: on the card, from the start to the end of the call.
        copy_bound: the last staged product waits for its copy.
        in_line: copies are queued among the products, and nothing overlaps.
    """

    parts: tuple[Part, ...]
    slots: tuple[int, ...]
    seconds: float
    copy_bound: bool
    in_line: bool = False

    @property
    def local(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if not part.staged)

    @property
    def staged(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.staged)


def residencies(problem: LinearProblem, remote_bytes: tuple[int, ...]) -> tuple[Residency, ...]:
    """Of weights without gaps between rows, from the bytes at the end of each that are remote."""
    rows, columns = (problem.k, problem.n) if problem.in_out else (problem.n, problem.k)
    row_bytes = columns * ELEMENT_BYTES
    found = []
    for nbytes in remote_bytes:
        local = rows * row_bytes - nbytes
        found.append(Residency(local // row_bytes, -(-local // row_bytes)))
    return tuple(found)


def card_seconds(plan: RingPlan) -> float:
    """What a plan takes where nobody has to queue it: in a replay of a graph."""
    return plan.seconds


def choose(
    problem: LinearProblem,
    residency: tuple[Residency, ...],
    profile: HardwareProfile,
    link: LinkProfile,
    *,
    cost: Callable[[RingPlan], float] = card_seconds,
) -> RingPlan:
    """The fastest, by `cost`, of some plans: parts of a few sizes; smaller ones at the end or not,
    and at the start where no local work hides the first copy; local work in one block or, where the
    ring does not hold all copies, in some; and then a larger ring, if that saves enough."""
    timing = RingTiming(problem, residency, profile, link)
    in_place = tuple(features_in_place(problem, where) for where in residency)
    row_bytes = problem.k * ELEMENT_BYTES
    plan = _fastest(problem, in_place, RING_BYTES // row_bytes, timing, cost)
    if sum(part.features for part in plan.staged) * row_bytes <= RING_BYTES:
        return plan
    large = _fastest(problem, in_place, LARGE_RING * RING_BYTES // row_bytes, timing, cost)
    return large if cost(large) < (1 - LARGE_RING_SAVES) * cost(plan) else plan


def _fastest(
    problem: LinearProblem,
    in_place: tuple[int, ...],
    room: int,
    timing: RingTiming,
    cost: Callable[[RingPlan], float],
) -> RingPlan:
    """With slots for `room` features in all."""
    total = sum(problem.n - features for features in in_place)
    divisions = tuple(_divisions(problem, in_place, room))
    found = []
    for blocks in _LOCAL_BLOCKS if any(in_place) and total > room else (1,):
        local = _local(in_place, blocks)
        found += [_schedule(local, staged, room, timing) for staged in divisions]
    return min(found, key=cost)


def _local(in_place: tuple[int, ...], blocks: int) -> tuple[Part, ...]:
    found = []
    for weight, features in enumerate(in_place):
        size = max(UNIT, math.ceil(features / blocks / UNIT) * UNIT)
        for start in range(0, features, size):
            found.append(Part(weight, start, min(start + size, features), False))
    return tuple(found)


def features_in_place(problem: LinearProblem, where: Residency) -> int:
    """Features whose product needs no copy. Too few for a product of their own are copied too."""
    if problem.in_out:
        return problem.n if where.local >= problem.k else 0
    if where.local >= problem.n:
        return problem.n
    return where.local // LEAST_FEATURES * LEAST_FEATURES if where.local >= UNIT else 0


def _divisions(
    problem: LinearProblem, in_place: tuple[int, ...], room: int
) -> Iterator[tuple[Part, ...]]:
    """What is not in place, in parts of a few sizes."""
    unit = max(LEAST_FEATURES, min(UNIT, room // 4 // LEAST_FEATURES * LEAST_FEATURES))
    total = sum(problem.n - features for features in in_place)
    if not total:
        yield ()
        return
    longest = max(problem.n - features for features in in_place)
    spare = unit * sum(features < problem.n for features in in_place)  # what first parts may exceed
    most = longest if total <= room else max(unit, room - spare)
    seen: set[tuple[Part, ...]] = set()
    for number in _BODIES:
        if total > room and number == 1:
            continue  # a single slot: copies and products would take turns
        body = max(unit, math.ceil(most / number / unit) * unit)
        if total > room:
            body = max(unit, most // number // unit * unit)
        many = total > _MANY * body
        if many and seen:
            return
        for rising in _RISING if not any(in_place) and not many else _RISING[:1]:
            for falling in _FALLING[:2] if many else _FALLING:
                parts = _staged(problem, in_place, body, unit, rising, falling)
                if parts not in seen:
                    seen.add(parts)
                    yield parts


def _staged(
    problem: LinearProblem,
    in_place: tuple[int, ...],
    body: int,
    unit: int,
    rising: tuple[int, ...],
    falling: tuple[int, ...],
) -> tuple[Part, ...]:
    weights = [weight for weight, features in enumerate(in_place) if features < problem.n]
    parts = []
    for weight in weights:
        start = in_place[weight]
        up = rising if weight == weights[0] else ()
        down = falling if weight == weights[-1] else ()
        for size in _sizes(problem.n - start, body, unit, up, down):
            parts.append(Part(weight, start, start + size, True))
            start += size
    return tuple(parts)


def _sizes(
    total: int, body: int, unit: int, rising: tuple[int, ...], falling: tuple[int, ...]
) -> list[int]:
    """Sizes that sum to `total`, multiples of `unit`, at most `body`.

    What is left over is with the first, whose product is not the one that is waited for; all but
    the last start at a multiple of LEAST_FEATURES.
    """
    units, most = total // unit, body // unit
    if not units:
        return [total]
    up = [min(size, most) for size in rising]
    if sum(up) >= units:
        up = []
    down = [min(size, most) for size in falling]
    if sum(up) + sum(down) >= units:
        down = []
    middle = units - sum(up) - sum(down)
    each = math.ceil(middle / math.ceil(middle / most))
    sizes = [*up, *(min(each, middle - first) for first in range(0, middle, each)), *down]
    sizes = [size * unit for size in sizes]
    odd = total % LEAST_FEATURES
    sizes[0] += total % unit - odd
    sizes[-1] += odd
    return sizes


def _schedule(
    local: tuple[Part, ...], staged: tuple[Part, ...], room: int, timing: RingTiming
) -> RingPlan:
    slots = slot_sizes([part.features for part in staged], room)
    ordered = order_parts(
        local,
        staged,
        len(slots),
        copy=timing.copy,
        compute=lambda part: timing.multiply(part.features),
    )
    seconds = ordered.seconds + timing.epilogue + (JOIN_SECONDS if staged else 0.0)
    return RingPlan(ordered.parts, slots, seconds, ordered.copy_bound)


def estimate(
    problem: LinearProblem,
    remote_bytes: tuple[int, ...],
    profile: HardwareProfile,
    link: LinkProfile,
) -> float:
    """Seconds of the staged path with that many bytes of each weight remote, at its end."""
    return choose(problem, residencies(problem, remote_bytes), profile, link).seconds


def prefers_ring(
    problem: LinearProblem,
    remote_bytes: tuple[int, ...],
    profile: HardwareProfile,
    link: LinkProfile,
    direct_seconds: float,
) -> bool:
    """Whether staging beats a direct kernel that takes `direct_seconds` by enough to be worth it.

    A captured CUDA graph keeps what was chosen for the split at its capture. After a later move its
    results stay right, since both paths read through addresses; only the speed suffers.
    """
    staged = estimate(problem, remote_bytes, profile, link)
    return staged < (1 - _MARGIN) * direct_seconds

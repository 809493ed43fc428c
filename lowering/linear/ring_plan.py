"""The staged path as data: which parts of a weight go through the ring, in what order, how long.

Remote memory is copied once, by copy engine, into slots of a ring in device memory, and the stock
GEMM multiplies the slots. Work comes in parts: runs of output features, which are rows of a weight
[N, K] or columns of a weight [K, N], so that no sum is ever cut. What is all local is multiplied
where it lies, beside the copies and the products of what they bring: those few tiles get SMs as
soon as some are free, and a slot is free again as soon as it is multiplied.

Nothing here knows streams or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from dak_inductor.hardware import HardwareProfile, LinkProfile
from dak_inductor.lowering.linear.problem import ELEMENT_BYTES, LinearProblem

RING_BYTES = 64 * 2**20
"""Device memory of all slots together, at most; only K > 10^6 needs more (LEAST_FEATURES)."""
SLOTS = (2, 3)
"""Two large ones for large K, three where copies are to go on while a slot waits to be used."""
UNIT = 256
"""Features of a part, and where it starts, are multiples of it where possible: whole tiles of the
stock GEMM, and output columns that start on a 16-byte boundary."""
LEAST_FEATURES = 8

_PIECE = 4 * 2**20  # bytes, as LinkProfile.piece_copy_bandwidth is measured
_TILE = 128  # tokens and features of a tile of the stock GEMM
_LOCAL_COPY_SHARE = 0.25  # of HBM bandwidth, assumed of copies inside device memory
_MARGIN = 0.05  # what the ring must save to be worth its memory


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
    """What is multiplied in place, and what is copied and multiplied in this order beside it."""

    local: tuple[Part, ...]
    staged: tuple[Part, ...]
    slots: int
    seconds: float

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.local, *self.staged)

    @property
    def slot_features(self) -> int:
        """Of the largest staged part; 0 for none."""
        return max((part.features for part in self.staged), default=0)


def residencies(problem: LinearProblem, remote_bytes: tuple[int, ...]) -> tuple[Residency, ...]:
    """Of weights without gaps between rows, from the bytes at the end of each that are remote."""
    rows, columns = (problem.k, problem.n) if problem.in_out else (problem.n, problem.k)
    row_bytes = columns * ELEMENT_BYTES
    found = []
    for nbytes in remote_bytes:
        local = rows * row_bytes - nbytes
        found.append(Residency(local // row_bytes, -(-local // row_bytes)))
    return tuple(found)


def choose(
    problem: LinearProblem,
    residency: tuple[Residency, ...],
    profile: HardwareProfile,
    link: LinkProfile,
) -> RingPlan:
    """The fastest of some plans: chunks of a few sizes; smaller ones at the end or not, and at the
    start where no local work hides the first copy."""
    timing = _Timing(problem, residency, profile, link)
    in_place = tuple(_in_place(problem, where) for where in residency)
    local = tuple(
        Part(weight, 0, features, False) for weight, features in enumerate(in_place) if features
    )
    if min(in_place) == problem.n:
        return _schedule(local, (), 0, timing)
    found = []
    for slots, body, unit in _bodies(problem):
        for rising in (False, True) if not any(in_place) else (False,):
            for falling in (False, True):
                staged = _staged(problem, in_place, body, unit, rising=rising, falling=falling)
                found.append(_schedule(local, staged, min(slots, len(staged)), timing))
    return min(found, key=lambda plan: plan.seconds)


def _bodies(problem: LinearProblem) -> Iterator[tuple[int, int, int]]:
    """Slots, the most features in each, and what the features of a part are a multiple of."""
    for slots in SLOTS:
        most = max(LEAST_FEATURES, RING_BYTES // slots // (problem.k * ELEMENT_BYTES))
        unit = min(UNIT, most // LEAST_FEATURES * LEAST_FEATURES)
        largest = most // unit * unit
        for body in sorted({max(unit, largest // part // unit * unit) for part in (1, 2, 4)}):
            yield slots, body, unit


def _staged(
    problem: LinearProblem,
    in_place: tuple[int, ...],
    body: int,
    unit: int,
    *,
    rising: bool,
    falling: bool,
) -> tuple[Part, ...]:
    weights = [weight for weight, features in enumerate(in_place) if features < problem.n]
    parts = []
    for weight in weights:
        start = in_place[weight]
        first, last = rising and weight == weights[0], falling and weight == weights[-1]
        for size in _sizes(problem.n - start, body, unit, rising=first, falling=last):
            parts.append(Part(weight, start, start + size, True))
            start += size
    return tuple(parts)


def _in_place(problem: LinearProblem, where: Residency) -> int:
    if problem.in_out:
        return problem.n if where.local >= problem.k else 0
    return problem.n if where.local >= problem.n else where.local // UNIT * UNIT


def _sizes(total: int, body: int, unit: int, *, rising: bool, falling: bool) -> list[int]:
    """Sizes that sum to `total`, at most `body` each, all but the last multiples of `unit`."""
    ragged, left = total % unit, total // unit * unit
    if not left:
        return [ragged]
    ramp: list[int] = []
    while (unit << len(ramp)) < body:
        ramp.append(unit << len(ramp))
    up = ramp if rising and sum(ramp) < left else []
    left -= sum(up)
    down = ramp[::-1] if falling and sum(ramp) < left else []
    left -= sum(down)
    count = math.ceil(left / body)
    each = math.ceil(left / count / unit) * unit
    sizes = [*up, *[each] * (count - 1), left - each * (count - 1), *down]
    if sizes[-1] + ragged <= body:
        sizes[-1] += ragged
    else:
        sizes.append(ragged)
    return sizes


class _Timing:
    """How long copies and products of parts take; few differ."""

    def __init__(
        self,
        problem: LinearProblem,
        residency: tuple[Residency, ...],
        profile: HardwareProfile,
        link: LinkProfile,
    ) -> None:
        self.multiply = lru_cache(lambda features: multiply_seconds(problem, features, profile))
        self.work = lru_cache(lambda features: work_seconds(problem, features, profile))
        self._copy = lru_cache(
            lambda local, remote: copy_seconds(problem, local, remote, profile, link)
        )
        self._problem, self._residency = problem, residency
        passes = 5 if problem.gated else 0  # over the result: activation and product, in place
        self.epilogue = passes * problem.m * problem.n * ELEMENT_BYTES / profile.hbm_bandwidth

    def copy(self, part: Part) -> float:
        """Local rows of what is staged are copied too."""
        where = self._residency[part.weight]
        if self._problem.in_out:
            local, of = where.local, self._problem.k
            return self._copy(local * part.features, (of - local) * part.features)
        local = min(max(where.local, part.start), part.stop) - part.start
        return self._copy(local * self._problem.k, (part.features - local) * self._problem.k)


def _schedule(
    local: tuple[Part, ...], staged: tuple[Part, ...], slots: int, timing: _Timing
) -> RingPlan:
    """The plan with its time: the link and the staged products in their order, or all work on the
    SMs, whichever takes longer."""
    arrived = 0.0
    done: list[float] = [0.0]
    for position, part in enumerate(staged):
        if position >= slots:
            arrived = max(arrived, done[position - slots + 1])
        arrived += timing.copy(part)
        done.append(max(done[-1], arrived) + timing.multiply(part.features))
    work = sum(timing.multiply(part.features) for part in local)
    work += sum(timing.work(part.features) for part in staged)
    return RingPlan(local, staged, slots, max(done[-1], work) + timing.epilogue)


_TILE_SHAPES = ((_TILE, 1.0), (_TILE // 2, 0.65))
"""Features of a tile of the stock GEMM, and how near it comes to the peak; the narrower one where
the wider gives too few tiles. Fits 4096 x 4096 at M = 256 and 28672 x 8192 at M = 256 to 10%."""


def multiply_seconds(problem: LinearProblem, features: int, profile: HardwareProfile) -> float:
    """The stock GEMM over that many features of one weight, alone: whole waves of tiles, or HBM."""
    rate = _rate(problem, profile) / profile.sm_count
    rows = math.ceil(problem.m / _TILE)
    compute = min(
        math.ceil(rows * math.ceil(features / width) / profile.sm_count)
        * 2 * _TILE * width * problem.k / (rate * efficiency)
        for width, efficiency in _TILE_SHAPES
    )  # fmt: skip
    return profile.operator_floor + max(compute, _stream_seconds(problem, features, profile))


def work_seconds(problem: LinearProblem, features: int, profile: HardwareProfile) -> float:
    """What the same product adds to others that fill the GPU."""
    flops = 2 * problem.m * features * problem.k
    return max(flops / _rate(problem, profile), _stream_seconds(problem, features, profile))


def _rate(problem: LinearProblem, profile: HardwareProfile) -> float:
    return profile.matmul_flops[str(problem.dtype).removeprefix("torch.")]


def _stream_seconds(problem: LinearProblem, features: int, profile: HardwareProfile) -> float:
    elements = problem.k * (problem.m + features) + problem.m * features
    return elements * ELEMENT_BYTES / profile.hbm_bandwidth


def copy_seconds(
    problem: LinearProblem, local: int, remote: int, profile: HardwareProfile, link: LinkProfile
) -> float:
    """Local and remote elements into a slot, one copy each."""
    pieces = bool(local) + bool(remote)
    local_rate = profile.hbm_bandwidth * _LOCAL_COPY_SHARE
    return (
        pieces * piece_overhead(profile, link)
        + local * ELEMENT_BYTES / local_rate
        + remote * ELEMENT_BYTES / link.copy_bandwidth
    )


def piece_overhead(profile: HardwareProfile, link: LinkProfile) -> float:
    """What a copy costs besides its bytes: on the H200's host link 2.4 us, for 4 MiB pieces as for
    1 MiB and 256 KiB ones."""
    if not 0 < link.piece_copy_bandwidth < link.copy_bandwidth:
        return profile.operator_floor
    return _PIECE / link.piece_copy_bandwidth - _PIECE / link.copy_bandwidth


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

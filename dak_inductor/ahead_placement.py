"""Where bytes go that the link copies ahead of the products that read them.

Copies ahead keep the link busy through a whole step, so what counts is the step's sum of remote
bytes, and that the next of them are never further away than the ring of copies reaches. The remote
bytes then lie in few products, since each that is copied for pays for it once, in equal parts all
over the model: the last matrix of every block, say. Direct reads are better where a product reads
more than the ring holds while the link idles ahead of it, as over NVLink: there each hides its own
remote bytes behind its local ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dak_inductor.copy_ring import LAUNCHES_IN_RING, PARTS_IN_RING
from dak_inductor.cost_curve import Line, Piece
from dak_inductor.cost_model import FEW_TOKENS, copy_slowdown
from dak_inductor.hardware import HardwareProfile, LinkProfile
from dak_inductor.plan import OpUse, PlanProblem
from dak_inductor.split_grid import SplitGrid
from dak_inductor.tensor_names import natural, role

_PARTS_SECONDS = 10e-6
"""What a product takes longer whose remote rows are copied ahead: a product and a sum over them of
their own. Measured on the H200 in a decode step of Llama-3-8B's layers."""
_LAUNCH_SECONDS = 5e-6
"""The same of few tokens: one launch, which starts when all of its rows are there, and not before
the work ahead of it has ended."""
_FURTHER_SECONDS = 5e-6
"""Of each further part: a product of its own (`op_floor`)."""

_ENDS_SECONDS = 10e-6  # of a step with copies: they start and are joined
_LEAST_COPY_SECONDS = 0.15e-3
"""Of the link, copied ahead of a tensor where there are as many bytes: each product with copies
pays for them. On a PCIe link that is 8 MB."""
_BLOCKS = 8
"""Of a tensor's row blocks, whose multiples are copied ahead where a tensor has as many: that is 64
rows, of which a kernel's tiles have an even number or half."""
_FEW = 4  # tensors: so few do not lie all over a model


class StagedStep(NamedTuple):
    """A graph's step with its remote bytes copied ahead. `besides` is what it takes more than its
    products one after the other, never negative: waiting for the link, and slower HBM."""

    seconds: float
    besides: float
    copied: float  # bytes


def staged_steps(
    lines: Sequence[Line],
    shares: Sequence[float],
    direct: Sequence[float],
    profile: HardwareProfile,
    link: LinkProfile,
    ring_bytes: int,
) -> dict[str, StagedStep]:
    """By graph that has products with remote rows that can be copied ahead.

    direct: what each use takes that reads its `shares` in place.
    """
    copied: dict[str, float] = {}
    products: dict[str, float] = {}
    read: dict[str, float] = {}
    own: dict[tuple[str, str], float] = {}
    arriving = copied_bytes(lines, shares)
    for line, seconds in zip(lines, direct, strict=True):
        use, share = line.use, shares[line.tensor]
        graph, took = use.graph, seconds
        if line.copied and share > 0:
            far = share * use.touched_bytes
            copied[graph] = copied.get(graph, 0.0) + far
            product = (graph, use.op)
            took = line.alone + product_seconds(use, arriving[product], ring_bytes) * (
                far / arriving[product]
            )
            own[product] = own.get(product, 0.0) + took
        elif share > 0:
            far = line.cost.touched(share) * use.touched_bytes
            read[graph] = read.get(graph, 0.0) + far
        products[graph] = products.get(graph, 0.0) + took
    # The link stands still once the ring is full: what a product reads beyond that comes while it
    # runs. Over an NVLink that is most of its bytes, since the ring bridges 0.2 ms there.
    waits: dict[str, float] = {}
    for (graph, op), nbytes in arriving.items():
        late = (nbytes - ring_bytes) / link.copy_bandwidth - own[graph, op]
        waits[graph] = waits.get(graph, 0.0) + max(0.0, late)
    slower = copy_slowdown(profile, link) - 1
    steps = {}
    for graph, nbytes in copied.items():
        copies = nbytes / link.copy_bandwidth
        alone = products[graph]
        slowed = alone + slower * min(alone, copies) + waits[graph]
        busy = copies + read.get(graph, 0.0) / link.direct_bandwidth
        seconds = max(slowed, busy) + _ENDS_SECONDS
        steps[graph] = StagedStep(seconds, seconds - alone, nbytes)
    return steps


def copied_bytes(lines: Sequence[Line], shares: Sequence[float]) -> dict[tuple[str, str], float]:
    """What is copied ahead of each product, by graph and name: of both weights of gate and up."""
    found: dict[tuple[str, str], float] = {}
    for line in lines:
        if line.copied and shares[line.tensor] > 0:
            product = (line.use.graph, line.use.op)
            far = shares[line.tensor] * line.use.touched_bytes
            found[product] = found.get(product, 0.0) + far
    return found


def product_seconds(use: OpUse, copied: float, ring_bytes: int) -> float:
    """What a product takes longer with so many bytes copied ahead. One launch reads them where the
    ring holds twice as many."""
    if 0 < use.m <= FEW_TOKENS and LAUNCHES_IN_RING * copied <= ring_bytes:
        return _LAUNCH_SECONDS
    return _PARTS_SECONDS + (math.ceil(PARTS_IN_RING * copied / ring_bytes) - 1) * _FURTHER_SECONDS


def placements(
    problem: PlanProblem,
    lines: Sequence[Line],
    pieces: Sequence[Sequence[Piece]],
    grids: Sequence[SplitGrid],
    asked: int,
    link: LinkProfile,
) -> list[list[int]]:
    """Remote bytes by tensor, `asked` in all: without a bound, and with no more to a tensor than
    one launch reads through the ring before all that can have as much. Nothing where no product can
    be copied for.

    What costs less than a copied byte goes first, as the rows of an embedding or the tokens of a
    context that is still to come; then groups of equal tensors, level by level; then the rest.
    """
    groups = _groups(problem, lines, grids, link) if problem.ring_bytes >= LAUNCHES_IN_RING else []
    if not groups:
        return []
    carriers = {tensor for group in groups for tensor in group.tensors}
    rest = sorted(
        (piece.slope, piece.tensor, piece.start, piece)
        for own in pieces
        for piece in own
        if piece.tensor not in carriers
    )
    most = problem.ring_bytes // LAUNCHES_IN_RING
    bounded = [group._replace(most=min(group.most, most)) for group in groups]
    found = []
    for stages in ([groups], [bounded, groups]):
        todo: list[tuple[float, int, _Group | Piece]] = [
            (slope, 0, piece) for slope, _, _, piece in rest
        ]
        for stage, own in enumerate(stages, 1):
            todo += [(group.price, stage, group) for group in own]
        placed = _filled(problem, grids, asked, todo, link)
        if placed is not None and placed not in found:
            found.append(placed)
    return found


def _filled(
    problem: PlanProblem,
    grids: Sequence[SplitGrid],
    asked: int,
    todo: list[tuple[float, int, _Group | Piece]],
    link: LinkProfile,
) -> list[int] | None:
    """By price, then by stage; None where all of it is not enough."""
    most = problem.ring_bytes // LAUNCHES_IN_RING
    least = min(most, round(_LEAST_COPY_SECONDS * link.copy_bandwidth))
    rounded = [grid.low for grid in grids]
    missing = asked - sum(rounded)
    for _, _, part in sorted(todo, key=lambda entry: entry[:2]):  # stable: in their order
        if missing <= 0:
            break
        if isinstance(part, Piece):
            tensor = part.tensor
            wanted = grids[tensor].at_least(math.ceil(min(part.stop, rounded[tensor] + missing)))
            missing -= wanted - rounded[tensor]
            rounded[tensor] = wanted
        else:
            missing = _level(part, problem, grids, rounded, missing, least, most)
    return rounded if missing <= 0 else None


class _Group(NamedTuple):
    """Tensors of one size and role, in the model's order. `price` is seconds per byte; each may
    have up to `most` remote bytes."""

    price: float
    tensors: list[int]
    most: int


def _groups(
    problem: PlanProblem, lines: Sequence[Line], grids: Sequence[SplitGrid], link: LinkProfile
) -> list[_Group]:
    """The cheapest first, of equal ones those of many, large tensors, each read on its own."""
    able: dict[int, bool] = {}
    calls: dict[int, float] = {}
    reads: dict[tuple[str, str], int] = {}
    for line in lines:
        if line.tensor >= 0:
            able[line.tensor] = able.get(line.tensor, True) and line.copied
            calls[line.tensor] = calls.get(line.tensor, 0.0) + line.use.calls
            product = (line.use.graph, line.use.op)
            reads[product] = reads.get(product, 0) + 1
    shared = {
        line.tensor for line in lines if reads.get((line.use.graph, line.use.op), 0) > 1
    }  # of products that read two, such as gate and up
    alike: dict[tuple[str, int, float], list[int]] = {}
    for tensor, carries in able.items():
        if carries and grids[tensor].high > grids[tensor].low:
            spec = problem.tensors[tensor]
            key = (role(spec.name), spec.nbytes, calls[tensor])
            alike.setdefault(key, []).append(tensor)
    found = []
    for (name, nbytes, called), tensors in alike.items():
        tensors.sort(key=lambda tensor: natural(problem.tensors[tensor].name))
        order = (
            called,
            len(tensors) < _FEW,
            -nbytes,
            any(tensor in shared for tensor in tensors),
            name,
        )
        found.append((order, _Group(called / link.copy_bandwidth, tensors, nbytes)))
    return [group for _, group in sorted(found, key=lambda entry: entry[0])]


def _level(
    group: _Group,
    problem: PlanProblem,
    grids: Sequence[SplitGrid],
    rounded: list[int],
    missing: int,
    least: int,
    most: int,
) -> int:
    """Make equal shares of the tensors remote, `missing` bytes in all or all there are; what is
    missing then. Few bytes go to every second, third, ... tensor, `least` to each, and where it can
    be no more than `most`.
    """
    number, nbytes = len(group.tensors), problem.tensors[group.tensors[0]].nbytes
    allowed = nbytes
    if group.most < nbytes:  # in whole blocks, or what is left over would go above `most`
        rows = problem.tensors[group.tensors[0]].row_block
        rows *= _BLOCKS if _BLOCKS * rows <= group.most else 1
        allowed = group.most // rows * rows or group.most
    fewest = max(-(-missing // most), -(-missing // allowed))
    count = min(number, max(1, missing // least, fewest))
    # the last of each stretch, the longer ones first: the link works ahead of it, and of the first
    # only since the step began
    chosen = [group.tensors[-(-(place + 1) * number // count) - 1] for place in range(count)]
    for place, tensor in enumerate(chosen):
        if missing <= 0:
            break
        spec, grid = problem.tensors[tensor], grids[tensor]
        share = math.ceil(missing / (count - place))
        block = spec.row_block
        if share >= _BLOCKS * block <= group.most:
            block *= _BLOCKS
        before = rounded[tensor]
        allowed = group.most if group.most >= nbytes else group.most // block * block
        wanted = min(before + -(-share // block) * block, before + missing, allowed)
        there = grid.at_least(wanted)
        if there > group.most:  # of a tensor that lives pages are split, not rows
            there = grid.at_most(group.most)
        rounded[tensor] = max(before, there)
        missing -= rounded[tensor] - before
    return missing

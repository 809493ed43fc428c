"""Where bytes go that the link copies ahead of the products that read them.

Copies ahead keep the link busy through a whole step, so what counts is the step's sum of remote
bytes, and that the next of them are never further away than the ring of copies reaches. The remote
bytes then lie in few products, since each that is copied for pays for it once, in equal parts all
over the model: the last matrix of every block, say, or of every third where they are few. Direct
reads are better where a product reads more than the ring holds while the link idles ahead of it, as
over NVLink: there each hides its own remote bytes behind its local ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from dak_inductor.copy_ring import LAUNCHES_IN_RING
from dak_inductor.cost_curve import Piece
from dak_inductor.plan import PlanProblem
from dak_inductor.split_grid import SplitGrid
from dak_inductor.tensor_names import natural, role
from dak_inductor.use_columns import UseColumns, sums

_LEAST_COPY_SECONDS = (0.15e-3, 0.3e-3, 0.6e-3)
"""Of the link, copied ahead of a tensor where there are as many bytes: each product with copies
pays for them, and between two of them the link must have time for the second. On a PCIe link these
are 8, 17 and 33 MB: a decode step with 70 MB of 8 Llama-3-8B layers in host memory takes 1.427,
1.421 and 1.314 ms with one sequence, 1.483, 1.458 and 1.408 with 16 (H200)."""
_BLOCKS = 8
"""Of a tensor's row blocks, whose multiples are copied ahead where a tensor has as many: that is 64
rows, of which a kernel's tiles have an even number or half."""
_FEW = 4  # tensors: so few do not lie all over a model


def placements(
    columns: UseColumns,
    pieces: Sequence[Sequence[Piece]],
    grids: Sequence[SplitGrid],
    asked: int,
) -> list[list[list[int]]]:
    """Remote bytes by tensor, `asked` in all: without a bound, then with no more to a tensor than
    one launch reads through the ring before all that can have as much. Of either some, in which few
    bytes lie in fewer and fewer tensors. Nothing where no product can be copied for.

    What costs less than a copied byte goes first, as the rows of an embedding or the tokens of a
    context that is still to come; then groups of equal tensors, level by level; then the rest.
    """
    problem, link = columns.problem, columns.link
    groups = _groups(columns, grids) if problem.ring_bytes >= LAUNCHES_IN_RING else []
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
    bounded = [group if group.most <= most else group._replace(most=most) for group in groups]
    found: list[list[list[int]]] = []
    for stages in ([groups], [bounded, groups]):
        todo: list[tuple[float, int, _Group | Piece]] = [
            (slope, 0, piece) for slope, _, _, piece in rest
        ]
        for stage, own in enumerate(stages, 1):
            todo += [(group.price, stage, group) for group in own]
        alike: list[list[int]] = []
        each = 0.0
        for seconds in _LEAST_COPY_SECONDS:
            least = min(most, round(seconds * link.copy_bandwidth))
            if each >= least:  # with as many tensors as there are
                break
            placed, each = _filled(problem, grids, asked, todo, least)
            if placed is not None and not any(placed in known for known in (*found, alike)):
                alike.append(placed)
        if alike:
            found.append(alike)
    return found


def _filled(
    problem: PlanProblem,
    grids: Sequence[SplitGrid],
    asked: int,
    todo: list[tuple[float, int, _Group | Piece]],
    least: int,
) -> tuple[list[int] | None, float]:
    """By price, then by stage; None where all of it is not enough. And the fewest bytes that each
    tensor of a group would have, had all as many."""
    most = problem.ring_bytes // LAUNCHES_IN_RING
    rounded, each = [grid.low for grid in grids], math.inf
    missing = asked - sum(rounded)
    for _, _, part in sorted(todo, key=itemgetter(0, 1)):  # stable: in their order
        if missing <= 0:
            break
        if isinstance(part, Piece):
            tensor = part.tensor
            wanted = grids[tensor].at_least(math.ceil(min(part.stop, rounded[tensor] + missing)))
            missing -= wanted - rounded[tensor]
            rounded[tensor] = wanted
        else:
            each = min(each, missing / len(part.tensors))
            missing = _level(part, problem, grids, rounded, missing, least, most)
    return (rounded if missing <= 0 else None), each


class _Group(NamedTuple):
    """Tensors of one size and role, in the model's order. `price` is seconds per byte; each may
    have up to `most` remote bytes."""

    price: float
    tensors: list[int]
    most: int


def _groups(columns: UseColumns, grids: Sequence[SplitGrid]) -> list[_Group]:
    """The cheapest first, of equal ones those of many, large tensors, each read on its own, and
    late: behind the last of them the link stands still."""
    tensors, count = columns.problem.tensors, len(grids)
    ours = columns.tensor >= 0
    tensor, product = columns.tensor[ours], columns.product[ours]
    reads = np.bincount(tensor, minlength=count)
    copied = np.bincount(tensor[columns.copied[ours]], minlength=count)
    calls = sums(columns.calls[ours], tensor, count).tolist()
    # of products that read two, such as gate and up
    shared = set(tensor[np.bincount(product)[product] > 1].tolist())
    place = np.zeros(columns.products, dtype=np.intp)  # of gate and up alike
    np.maximum.at(place, columns.product, np.arange(len(columns.product)))
    read_at = dict(zip(tensor.tolist(), place[product].tolist(), strict=True))
    alike: dict[tuple[str, int, float], list[int]] = {}
    for number in np.flatnonzero((reads > 0) & (copied == reads)).tolist():
        if grids[number].high > grids[number].low:
            spec = tensors[number]
            key = (role(spec.name), spec.nbytes, calls[number])
            alike.setdefault(key, []).append(number)
    found = []
    for (name, nbytes, called), numbers in alike.items():
        numbers.sort(key=lambda number: natural(tensors[number].name))
        is_shared = not shared.isdisjoint(numbers)
        last = max(read_at[number] for number in numbers)
        order = (called, len(numbers) < _FEW, -nbytes, is_shared, -last, name)
        found.append((order, _Group(called / columns.link.copy_bandwidth, numbers, nbytes)))
    return [group for _, group in sorted(found, key=itemgetter(0))]


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
    missing then."""
    chosen = _chosen(group, problem, missing, least, most)
    left = len(chosen)
    for tensor in chosen:
        if missing <= 0:
            break
        spec, grid, before = problem.tensors[tensor], grids[tensor], rounded[tensor]
        share, block = math.ceil(missing / left), spec.row_block
        left -= 1
        if share >= _BLOCKS * block <= group.most:
            block *= _BLOCKS
        allowed = group.most if group.most >= spec.nbytes else group.most // block * block
        wanted = min(before + -(-share // block) * block, before + missing, allowed)
        there = grid.at_least(wanted)
        if there > group.most:  # of a tensor that lives pages are split, not rows
            there = grid.at_most(group.most)
        if there > before:
            rounded[tensor] = there
            missing -= there - before
    return missing


def _chosen(group: _Group, problem: PlanProblem, missing: int, least: int, most: int) -> list[int]:
    """Few bytes go to every second, third, ... tensor, `least` to each, and where it can be no more
    than `most`."""
    number = len(group.tensors)
    if number == 1:
        return group.tensors
    spec = problem.tensors[group.tensors[0]]
    allowed = spec.nbytes
    if group.most < spec.nbytes:  # in whole blocks, or what is left over would go above `most`
        rows = spec.row_block
        rows *= _BLOCKS if _BLOCKS * rows <= group.most else 1
        allowed = group.most // rows * rows or group.most
    fewest = max(-(-missing // most), -(-missing // allowed))
    count = min(number, max(1, missing // least, fewest))
    # the last of each stretch, the longer ones first: the link works ahead of it, and of the first
    # only since the step began
    return [group.tensors[-(-(place + 1) * number // count) - 1] for place in range(count)]

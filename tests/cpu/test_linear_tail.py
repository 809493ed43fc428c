"""The tail of the linear kernel's local line: its rule, and sums that no claim has a part in."""

from __future__ import annotations

import random

import pytest
import torch

from dak_inductor import hardware
from dak_inductor.lowering.linear import tail
from dak_inductor.lowering.linear.configuration import DEPTH, LinearConfiguration, configurations
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.tail import NO_TAIL, TailRule, tail_rule


class Tile:
    """What pieces of a tile do when they are stored (kernels/linear/partial_sums.cuh)."""

    def __init__(self, pieces: int) -> None:
        self.slots: list[float | None] = [None] * pieces
        self.counter = 0

    def store(self, piece: int, value: float) -> None:
        assert self.slots[piece] is None
        self.slots[piece] = value

    def arrives_last(self) -> bool:
        self.counter += 1
        if self.counter < len(self.slots):
            return False
        self.counter = 0
        return True

    def total(self) -> float:
        found = torch.zeros((), dtype=torch.float32)
        for value in self.slots:
            assert value is not None, "all pieces have been stored by then"
            found = found + value
        return float(found)


@pytest.mark.parametrize("seed", range(20))
def test_sums_do_not_depend_on_who_arrives_last(seed: int) -> None:
    chosen = random.Random(seed)
    pieces = 16
    values = torch.randn(pieces, generator=torch.Generator().manual_seed(0)).tolist()
    tile, results = Tile(pieces), []
    # each piece stores, then arrives; both in any order among pieces
    events = [piece for piece in range(pieces) for _ in range(2)]
    chosen.shuffle(events)
    stored: set[int] = set()
    for piece in events:
        if piece not in stored:
            stored.add(piece)
            tile.store(piece, values[piece])
        elif tile.arrives_last():
            results.append(tile.total())
    expected = Tile(pieces)
    for piece, value in enumerate(values):
        expected.store(piece, value)
    assert results == [expected.total()] and tile.counter == 0


def rule_of(configuration: LinearConfiguration, problem: LinearProblem) -> TailRule:
    return tail_rule(problem, configuration, hardware.load("h200"), 132)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 16, 64, 128, 256, 1024])
@pytest.mark.parametrize(("n", "k"), [(28672, 8192), (8192, 28672), (128256, 4096), (520, 584)])
def test_pieces_are_long_enough_and_cost_little_memory(m: int, n: int, k: int, gated: bool) -> None:
    problem = LinearProblem(m, n, k, torch.bfloat16, gated)
    for configuration in configurations(problem):
        rule = rule_of(configuration, problem)
        if (
            configuration.cluster > 1
            or configuration.blocks * configuration.tokens > tail.MOST_SUMS
        ):
            assert rule == NO_TAIL
            continue
        steps = -(-k // DEPTH)
        assert 1 <= rule.pieces <= steps and rule.least >= 1
        if rule.pieces > 1:
            assert steps // rule.pieces * configuration.weight_stage_bytes >= tail.PIECE_BYTES
            assert rule.pieces * configuration.partial_bytes <= tail.ADDED_BYTES
        slots = rule.slots(configuration.tiles(problem))
        assert slots == 0 or slots >= 132 * tail.PIECES_OF_WORKER
        assert slots * configuration.partial_bytes <= max(problem.weight_bytes // 20, 1 << 20)


def test_a_large_weight_has_a_tail_and_a_small_one_has_none() -> None:
    for n, k, expected in ((28672, 8192, True), (4096, 4096, False)):
        problem = LinearProblem(1, n, k, torch.bfloat16)
        configuration = next(configurations(problem))
        assert bool(rule_of(configuration, problem).slots(configuration.tiles(problem))) == expected
    in_out = LinearProblem(1, 28672, 8192, torch.bfloat16, in_out=True)
    assert rule_of(next(configurations(in_out)), in_out) == NO_TAIL

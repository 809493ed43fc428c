"""Steps that are learned, played and derailed, on the simulated tier."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from dak_inductor.lowering import counters
from dak_inductor.lowering.ahead import memory as memory_module
from dak_inductor.lowering.ahead import player, step
from dak_inductor.lowering.ahead.memory import MOST_DERAILMENTS, MOST_STEPS, StepMemory
from dak_inductor.lowering.ahead.place import Place, compiler_graph
from dak_inductor.lowering.ahead.ring_room import Room
from dak_inductor.lowering.linear import open_step

from .ahead_model import BF16, ROOM, Layer, assert_close, shrink, weight_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    shrink(monkeypatch)
    counters.reset()
    yield
    counters.reset()
    assert open_step.current() is None


class Run:
    """A graph of some layers with its memory; `served` says which products the step served."""

    def __init__(self, layers: list[Layer], strategy: str = "staged", room: int = ROOM) -> None:
        self.layers = layers
        self.asked = 0

        def ask() -> Room:
            self.asked += 1
            return Room(room)

        self.memory = StepMemory("graph0", strategy, ask)  # type: ignore[arg-type]

    def __call__(self, order=None, tokens: int = 3, key=(), fail: bool = False) -> list[bool]:
        served = []
        with self.memory.opened(key, CPU):
            for number in range(len(self.layers)) if order is None else order:
                x = torch.randn(tokens, 64, dtype=BF16)
                result = self.layers[number](x)
                served.append(result is not None)
                if result is not None:
                    assert_close(result, self.layers[number].expected(x))
            if fail:
                raise KeyError("of the graph")
        return served

    @property
    def known(self):
        return self.memory._steps[()]


def three(*shares: float) -> list[Layer]:
    return [Layer((weight_of(200, 64, share)[1],)) for share in shares or (0.5, 0.2, 1.0)]


def test_learned_then_played() -> None:
    run = Run(three())
    assert run() == [False] * 3
    assert run() == [True] * 3 and run() == [True] * 3
    assert run.asked == 1, "planned once"
    assert run.memory.ring.grew() and not run.memory.ring.grew()
    assert 0 < run.memory.ring.largest <= ROOM


def test_what_lies_between_products_is_asked_for_once_a_step_is_planned() -> None:
    """Most lengths of prompts are called once."""
    layers, asked = three(), []
    memory = StepMemory("graph0", "staged", lambda: Room(ROOM))
    address = layers[1].weights[0].data_ptr()

    def between() -> dict[int, list[float]]:
        asked.append(address)
        return {address: [2e-3]}

    for calls, expected in ((1, 0), (2, 1), (3, 1)):
        with memory.opened((), CPU, tuple, between):
            for layer in layers:
                layer(torch.randn(3, 64, dtype=BF16))
        assert len(asked) == expected, calls
    (known,) = (step for _, step in memory.steps())
    assert known.sequence is not None and known.plans is not None
    assert [call.before for call in known.sequence.calls] == [0.0, 2e-3, 0.0]
    assert known.plans.captured.direct_seconds > 2e-3 > known.plans.eager.direct_seconds


def test_token_counts_are_told_in_words() -> None:
    told = [memory_module.tokens_text(each) for each in ((), (1,), (5, 300), 1, 7)]
    assert told == ["any tokens", "1 token", "5, 300 tokens", "1 token", "7 tokens"]


def test_direct_is_never_ahead_and_learns_nothing() -> None:
    run = Run(three(), "direct")
    assert run() == run() == [False] * 3
    assert not list(run.memory.steps())


def test_a_product_with_nothing_remote_stays_direct_in_a_played_step() -> None:
    run = Run(three(0.5, 0.0, 1.0))
    run()
    assert run() == [True, False, True]


@pytest.mark.parametrize("order", [[1, 0, 2], [0], [], [0, 2], [0, 1, 1], [0, 1, 2, 0]], ids=str)
def test_a_step_out_of_order_is_derailed_and_learned_again(order: list[int]) -> None:
    run = Run(three())
    run()
    served = run(order)
    right = next((n for n, m in enumerate(order) if n > 2 or m != n), len(order))
    assert served == [True] * right + [False] * (len(order) - right)
    assert run.known.sequence is None and run.known.derailments == 1
    assert run() == [False] * 3 and run() == [True] * 3


def test_another_number_of_tokens_derails() -> None:
    run = Run(three())
    run()
    assert run(tokens=4) == [False] * 3
    assert run(tokens=4) == [False] * 3 and run(tokens=4) == [True] * 3


def test_token_counts_have_steps_of_their_own() -> None:
    run = Run(three())
    for _ in range(2):
        served = [run(tokens=tokens, key=(tokens,)) for tokens in (3, 40)]
    assert served == [[True] * 3] * 2
    for tokens in range(100, 100 + MOST_STEPS):
        run(tokens=3, key=(tokens,))
    assert len(run.memory._steps) == MOST_STEPS


def test_steps_that_always_vary_are_given_up() -> None:
    run = Run(three())
    for _ in range(MOST_DERAILMENTS):
        run()
        run([2, 1, 0])
    assert "vary" in run.known.off
    assert run() == run() == [False] * 3


def test_a_moved_split_is_planned_anew() -> None:
    layers = three()
    run = Run(layers)
    run()
    run()
    before = run.known.plans
    (buffer,) = layers[0].product(torch.zeros(1, 64, dtype=BF16)).buffers
    assert buffer is not None
    buffer.move(0)
    assert run() == [True] * 3
    assert run.known.plans is not before


def test_a_split_that_moves_inside_a_step_derails_it() -> None:
    layers = three()
    run = Run(layers)
    run()
    (buffer,) = layers[1].product(torch.zeros(1, 64, dtype=BF16)).buffers
    x = torch.randn(3, 64, dtype=BF16)
    assert buffer is not None
    with run.memory.opened((), CPU):
        assert layers[0](x) is not None
        buffer.move(0)
        assert layers[1](x) is None and layers[2](x) is None
    assert "moved" in run.known.off or run.known.derailments == 1


def test_an_error_in_the_graph_closes_the_step() -> None:
    run = Run(three())
    run()
    with pytest.raises(KeyError):
        run(fail=True)
    assert run.known.derailments == 0
    assert run() == [False] * 3 and run() == [True] * 3


def test_weights_that_are_gone_are_forgotten() -> None:
    run = Run(three())
    run()
    run.layers = three()
    assert run() == [False] * 3 and run() == [True] * 3


def test_a_graph_inside_another_is_not_staged_nor_seen() -> None:
    outer, inner = Run(three()), Run(three())
    inner()
    for expected in (False, True):
        with outer.memory.opened((), CPU):
            x = torch.randn(3, 64, dtype=BF16)
            assert (outer.layers[0](x) is not None) == expected
            assert inner() == [False] * 3
            assert [layer(x) is not None for layer in outer.layers[1:]] == [expected] * 2
    assert inner() == [True] * 3


def test_other_threads_do_not_see_the_step() -> None:
    import threading

    run = Run(three())
    run()
    seen = []
    with run.memory.opened((), CPU):
        thread = threading.Thread(target=lambda: seen.append(open_step.current()))
        thread.start()
        thread.join()
        assert open_step.current() is not None
        for layer in run.layers:
            layer(torch.randn(3, 64, dtype=BF16))
    assert seen == [None]


def captured(monkeypatch: pytest.MonkeyPatch, place: tuple[int, int]):
    for module in (step, memory_module):
        monkeypatch.setattr(module, "place_of", lambda device: Place(*place))


INSIDE = (5, 0), (5, 7)
"""Streams and captures as of Inductor's graphs: warmed up, then captured."""


def inside(
    run: Run, monkeypatch: pytest.MonkeyPatch, places, graphs=(0, 0, 0), order=(0, 1, 2)
) -> list[bool]:
    """A call whose products are called in these places, as parts of these graphs of Inductor's."""
    served = []
    with run.memory.opened((), CPU):
        for number, place, graph in zip(order, places, graphs, strict=True):
            with monkeypatch.context() as patched:
                captured(patched, place)
                patched.setattr(step, "compiler_graph", lambda device, graph=graph: graph)
                x = torch.randn(3, 64, dtype=BF16)
                served.append(run.layers[number](x))
    return [result is not None for result in served]


def test_products_that_leave_the_place_of_their_step_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place in INSIDE:
        run = Run(three())
        run()
        assert inside(run, monkeypatch, [place] * 3) == [False] * 3
        assert "several" in run.known.off
        assert run() == [False] * 3


@pytest.mark.parametrize(
    ("places", "graphs"),
    [
        ([(5, 0), (5, 0), (6, 0)], (0, 0, 0)),
        ([(5, 7), (5, 7), (5, 8)], (0, 0, 0)),
        ([(5, 0), (5, 0), (5, 0)], (1, 1, 2)),
    ],
    ids=["streams", "captures", "graphs"],
)
def test_steps_in_several_places_are_never_staged(
    monkeypatch: pytest.MonkeyPatch, places: list, graphs: tuple[int, ...]
) -> None:
    """The copies of one graph of Inductor's would be unjoined where its capture ends."""
    run = Run(three())
    inside(run, monkeypatch, places, graphs)
    assert "several" in run.known.off
    assert run() == [False] * 3


def test_each_graph_of_inductors_is_another_also_where_the_one_before_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node of its tree goes with its results, and the next one may lie at the same address."""

    class Node: ...

    card = torch.device("cuda", 0)
    name = "torch._inductor.cudagraph_trees"
    manager = SimpleNamespace(current_node=Node())
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(get_manager=lambda *_, **__: manager))
    seen = weakref.ref(manager.current_node)
    first = compiler_graph(card)
    assert first == compiler_graph(card) is not None and compiler_graph(CPU) is None
    manager.current_node = None
    manager.current_node = Node()
    assert first != compiler_graph(card) and seen() is first, "it is kept to be compared"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    assert compiler_graph(card) != compiler_graph(card), "a torch that has no trees of this kind"

    def another_thread(*_, **__) -> None:
        raise AssertionError

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(get_manager=another_thread))
    assert compiler_graph(card) is None, "torch 2.11 has none there"
    monkeypatch.delitem(sys.modules, name)
    assert compiler_graph(card) == compiler_graph(card)


def test_a_step_inside_graphs_of_inductor_is_played_there(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("begin", "close"):
        real = getattr(player.Player, name)

        def noted(self, real=real, name=name) -> None:
            events.append(f"{name} at {step.place_of(CPU)[1]}")
            real(self)

        monkeypatch.setattr(player.Player, name, noted)
    run = Run(three())
    warm, capture = ([place] * 3 for place in INSIDE)
    assert inside(run, monkeypatch, warm) == [False] * 3
    assert run.known.inside and not run.known.off and not run.memory.in_graphs
    assert inside(run, monkeypatch, capture) == [True] * 3
    assert events[:2] == ["begin at 7", "close at 7"], "joined before the capture ends"
    assert run.asked == 1 and run.memory.ring.grew(), "weights make room for the ring"
    assert run.memory.in_graphs
    for _ in range(2 * MOST_DERAILMENTS):
        assert inside(run, monkeypatch, [], [], []) == [], "a replay calls no product"
    assert inside(run, monkeypatch, [(5, 9)] * 3) == [True] * 3, "another path is captured"
    assert run.known.derailments == 0 and run.asked == 1


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The captures in which players are closed."""
    found: list[int] = []
    real = player.Player.close

    def noted(self: player.Player) -> None:
        found.append(step.place_of(CPU)[1])
        real(self)

    monkeypatch.setattr(player.Player, "close", noted)
    return found


def test_a_step_inside_that_derails_is_joined_there(
    monkeypatch: pytest.MonkeyPatch, closed: list[int]
) -> None:
    run = Run(three())
    inside(run, monkeypatch, [INSIDE[0]] * 3)
    served = inside(run, monkeypatch, [INSIDE[1]] * 3, order=(0, 2, 1))
    assert served == [True, False, False]
    assert closed[0] == 7 and run.known.derailments == 1
    assert run.known.sequence is None
    assert run.memory.in_graphs, "the capture has most of the copies"


def test_a_product_that_fails_inside_a_capture_leaves_nothing_unjoined(
    monkeypatch: pytest.MonkeyPatch, closed: list[int]
) -> None:
    """The capture ends before the step is closed."""
    run = Run(three())
    inside(run, monkeypatch, [INSIDE[0]] * 3)
    real = player.Player.run

    def fails(self: player.Player, number: int, product) -> torch.Tensor:
        if number == 1:
            raise torch.OutOfMemoryError
        return real(self, number, product)

    monkeypatch.setattr(player.Player, "run", fails)
    with pytest.raises(torch.OutOfMemoryError):
        inside(run, monkeypatch, [INSIDE[1]] * 3)
    assert closed[0] == 7 and run.known.sequence is None


def test_other_sizes_with_as_many_tokens_are_captured_without_copies_in_vain(
    monkeypatch: pytest.MonkeyPatch, closed: list[int]
) -> None:
    run, other = Run(three()), (2, 1, 0)
    warm, capture = ([place] * 3 for place in INSIDE)
    inside(run, monkeypatch, warm)
    assert inside(run, monkeypatch, capture, order=other) == [False] * 3
    assert not closed and not run.memory.in_graphs and not run.known.derailments
    assert inside(run, monkeypatch, capture) == [True] * 3


def test_other_sizes_with_as_many_tokens_are_learned_where_inductor_warms_them_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, other = Run(three()), (2, 1, 0)
    warm, capture = ([place] * 3 for place in INSIDE)
    inside(run, monkeypatch, warm)
    assert inside(run, monkeypatch, capture) == [True] * 3
    assert inside(run, monkeypatch, warm, order=other) == [False] * 3
    assert run.known.inside
    assert inside(run, monkeypatch, capture, order=other) == [True] * 3


def test_what_is_known_of_a_capture_stays_through_moves_until_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = three()
    run = Run(layers)
    warm, capture = ([place] * 3 for place in INSIDE)
    inside(run, monkeypatch, warm)
    inside(run, monkeypatch, capture)
    plans = run.known.plans
    assert plans is not None and plans.captured.staged == 3
    (buffer,) = layers[2].product(torch.zeros(1, 64, dtype=BF16)).buffers
    assert buffer is not None
    buffer.move(buffer.nbytes)
    inside(run, monkeypatch, [], [], [])
    assert run.known.plans is plans, "a replay does what was captured"
    assert inside(run, monkeypatch, [(5, 9)] * 3) == [True, True, False]
    assert run.known.plans is not plans


def test_captures_play_what_was_learned_and_learn_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Run(three())
    with monkeypatch.context() as patched:
        captured(patched, (0, 7))
        assert fresh() == fresh() == [False] * 3
    assert fresh() == [False] * 3, "the eager call learns"
    with monkeypatch.context() as patched:
        captured(patched, (0, 7))
        assert fresh() == [False] * 3, "room is not asked for in a capture"
    assert fresh() == [True] * 3
    assert fresh.memory.ring.grew()
    with monkeypatch.context() as patched:
        captured(patched, (0, 8))
        assert fresh() == [True] * 3


def test_what_a_play_prepared_keeps_no_weight_alive() -> None:
    layers = three()
    run = Run(layers)
    for _ in range(3):
        run()
    known = run.known
    assert known.prepared and known.sequence is not None
    run.layers = []
    del layers
    gc.collect()
    assert known.sequence.splits() is None


def test_a_ring_of_an_odd_number_of_bytes() -> None:
    run = Run(three(), room=ROOM - 1)
    run()
    assert run() == [True] * 3


def test_without_memory_for_the_ring_all_runs_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(three())
    run()

    def full(self: player.Player) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(player.Player, "_take", full)
    assert run() == [False] * 3
    assert "memory" in run.known.off


def test_no_trials_in_a_played_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(three(0.5, 0.0))
    run()
    with run.memory.opened((), CPU):
        current = open_step.current()
        assert current is not None and not current.measures
        for layer in run.layers:
            layer(torch.randn(3, 64, dtype=BF16))


def test_weights_stored_in_out_stay_direct_with_a_reason() -> None:
    values = weight_of(64, 200, 0.5)[1]
    run = Run([*three(0.5), Layer((values,), layout="in_out")])
    run()
    assert run()[0]
    assert "[in, out]" in run.known.plans.eager.ops[1].reason

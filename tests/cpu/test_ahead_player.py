"""A played step under any order of its two queues: values, joins, and what a lost wait does."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from dak_inductor import hardware
from dak_inductor.cuda_runtime.tier_buffer import TierBytes
from dak_inductor.lowering import counters, reads
from dak_inductor.lowering.ahead import sequence
from dak_inductor.lowering.ahead.plan_choice import choose
from dak_inductor.lowering.ahead.player import Player
from dak_inductor.lowering.ahead.prepared_plan import PreparedPlan
from dak_inductor.lowering.ahead.sequence import CallSequence, call_of
from dak_inductor.lowering.ahead.step import PlayedStep
from dak_inductor.lowering.ahead.step_costs import link_rates, step_ops
from dak_inductor.lowering.ahead.step_plan import StepPlan
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.queues import Queues

from .ahead_model import BF16, ROOM, Layer, assert_close, shrink, weight_of
from .fake_queues import Scheduler

H200 = hardware.load("h200")
RATES = link_rates(H200, H200.link("cpu"))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FakeLaunch:
    """A launch of the kernel, by torch: rows that were copied are read in the ring alone. It counts
    what it reads."""

    product: Product
    holds = True

    def __call__(self, x, residual, out, copied) -> None:
        product = self.product
        reads.count_dense("linear", *product.weights)
        results = []
        for weight, rows in zip(product.weights, copied, strict=True):
            whole = weight.float()
            if rows is not None:
                assert rows.first % 8 == 0 and rows.first + len(rows.tensor) == len(weight)
                whole = torch.cat([whole[: rows.first], rows.tensor.float()])
            results.append(x.float() @ whole.t())
        result = results[0]
        if product.activation == "silu":
            result = torch.nn.functional.silu(result)
        result = result * results[1] if len(results) == 2 else result
        out.copy_(result if residual is None else result + residual.float())


def fake_launch(self: PreparedPlan, number: int, product: Product):
    return product.facts().problem, FakeLaunch(product)


@pytest.fixture(autouse=True, params=["parts", "launches"])
def _small(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    shrink(monkeypatch)
    if request.param == "launches":
        monkeypatch.setattr(sequence, "kernel_refusal", lambda product: None)
        monkeypatch.setattr(PreparedPlan, "launch", fake_launch)
    counters.reset()
    yield
    counters.reset()


def layers(pick: random.Random) -> list[Layer]:
    shares = [0.0, 0.03, 0.4, 1.0]
    found = []
    for number in range(5):
        n = pick.choice([96, 200, 264])
        gated = pick.random() < 0.5
        weights = tuple(
            weight_of(n, 64, pick.choice(shares), f"{number}.{part}")[1]
            for part in range(1 + gated)
        )
        activation = pick.choice(["none", "silu"])
        found.append(Layer(weights, activation, residual=pick.random() < 0.5))
    return found


def planned(made: list[Layer], inputs: list[torch.Tensor]) -> tuple[StepPlan, list]:
    calls = [call_of(layer.product(x)) for layer, x in zip(made, inputs, strict=True)]
    ops = step_ops(calls, "simulated", None)  # type: ignore[arg-type]
    assert ops is not None
    return choose(ops, RATES, strategy="staged", room=ROOM).captured, calls


class Poisoned(Player):
    """Whose ring holds no numbers before the copies."""

    def _take(self) -> None:
        super()._take()
        assert self._memory is not None
        self._memory.fill_(255)


class Checked:
    """A copy queue whose work comes after what main had queued before."""

    def __init__(self, queue, earlier: list[bool]) -> None:
        self._queue, self._earlier = queue, earlier
        self.record, self.wait = queue.record, queue.wait

    def launch(self, work) -> None:
        def checked(stream: int) -> None:
            assert self._earlier, "a copy overtook earlier work on the main queue"
            work(stream)

        self._queue.launch(checked)


def play(made: list[Layer], inputs, scheduler: Scheduler, *, stop: int, lose: str = ""):
    """The results of the first `stop` products, and whether the copies had ended before what
    follows."""
    plan, calls = planned(made, inputs)
    main, side = scheduler.queue(), scheduler.queue()
    if lose:
        (main if lose == "main" else side).wait = lambda mark: None  # type: ignore[method-assign]
    earlier: list[bool] = []
    main.run(lambda: earlier.append(True))
    queues = Queues(main, side if lose else Checked(side, earlier))  # type: ignore[arg-type]
    player = Poisoned(PreparedPlan(plan, calls), queues, CPU)
    player.begin()
    results = []
    for number, layer in enumerate(made[:stop]):
        op = plan.ops[number]
        if op.strategy == "direct":
            player.pass_by()
            results.append(None)
        else:
            results.append(player.run(number, layer.product(inputs[number])))
    player.close()
    joined: list[bool] = []
    main.run(lambda: joined.append(not side.entries))
    scheduler.drain()
    return plan, results, joined


def inputs_of(made: list[Layer], tokens: int) -> list[torch.Tensor]:
    return [torch.randn(tokens, 64, dtype=BF16) for _ in made]


@pytest.mark.parametrize("seed", range(25))
def test_any_interleaving_gives_the_products_and_ends_joined(seed: int) -> None:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    made = layers(pick)
    inputs = inputs_of(made, pick.choice([1, 7, 200]))  # of the last, local rows are copied too
    stop = pick.choice([0, 1, 2, 3, 4, 5, 5, 5])
    plan, results, joined = play(made, inputs, Scheduler(pick), stop=stop)
    assert joined == [True], "the main queue went on before the copies had ended"
    for number, (op, result) in enumerate(zip(plan.ops, results, strict=False)):
        if op.strategy == "staged":
            assert_close(result, made[number].expected(inputs[number]))
        else:
            assert result is None


@pytest.mark.parametrize("lost", ["main", "side"])
def test_a_lost_wait_is_found(lost: str) -> None:
    """The interleavings above can fail: without the waits of one queue, values are wrong."""
    wrong = 0
    made = [Layer((weight_of(264, 64, 0.9)[1],)) for _ in range(4)]
    inputs = inputs_of(made, 3)
    for seed in range(20):
        _, results, _ = play(made, inputs, Scheduler(random.Random(seed)), stop=4, lose=lost)
        wrong += any(
            not torch.allclose(result.float(), layer.expected(x), rtol=3e-2, atol=3e-2)
            for result, layer, x in zip(results, made, inputs, strict=True)
        )
    assert wrong


def test_each_byte_counts_as_one_read_and_is_copied_once(monkeypatch) -> None:
    from dak_inductor.lowering.ahead import player

    copied: list[int] = []
    real = player.copy_bytes

    def noted(target: int, source: int, nbytes: int, device: torch.device, stream: int) -> None:
        copied.append(nbytes)
        real(target, source, nbytes, device, stream)

    monkeypatch.setattr(player, "copy_bytes", noted)
    pairs = [weight_of(200, 64, share, str(share)) for share in (0.2, 0.5, 1.0)]
    made = [Layer((weight,)) for _, weight in pairs]
    inputs = inputs_of(made, 2)
    play(made, inputs, Scheduler(random.Random(0)), stop=3)
    held = sum((buffer.bytes_by_tier() for buffer, _ in pairs), TierBytes())
    assert counters.total() == held
    cut_rows = 128 * len(pairs)
    assert held.remote - cut_rows <= sum(copied) <= held.remote


@pytest.mark.parametrize("seed", range(8))
def test_plays_of_one_plan_that_are_queued_before_any_of_it_runs(seed: int) -> None:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    made = layers(pick)
    turns = [inputs_of(made, 3) for _ in range(3)]
    plan, calls = planned(made, turns[0])
    prepared = PreparedPlan(plan, calls)
    scheduler = Scheduler(pick)
    queues = Queues(scheduler.queue(), scheduler.queue())
    results = []
    for inputs in turns:
        player = Poisoned(prepared, queues, CPU)
        player.begin()
        for number, layer in enumerate(made):
            if plan.ops[number].strategy == "staged":
                x = inputs[number]
                results.append((player.run(number, layer.product(x)), layer.expected(x)))
        player.close()
    scheduler.drain()
    for result, expected in results:
        assert_close(result, expected)


@pytest.mark.parametrize("at", range(5))
def test_a_derailed_step_is_joined_at_once(at: int) -> None:
    """Also before it is closed: a capture may end there."""
    for seed in range(5):
        scheduler = Scheduler(random.Random(seed))
        made = [Layer((weight_of(264, 64, 0.9)[1],)) for _ in range(5)]
        inputs = inputs_of(made, 3)
        plan, calls = planned(made, inputs)
        main, side = scheduler.queue(), scheduler.queue()
        player = Poisoned(PreparedPlan(plan, calls), Queues(main, side), CPU)
        learned = CallSequence(tuple(calls))
        splits = learned.splits()
        assert splits is not None
        step = PlayedStep(learned, splits, plan, player, CPU)
        results = [step.serve(made[n].product(inputs[n])) for n in range(at)]
        assert step.serve(made[at].product(inputs_of(made, 4)[at])) is None and step.derailed
        joined: list[bool] = []
        main.run(lambda of=side, seen=joined: seen.append(not of.entries))
        assert step.serve(made[at].product(inputs[at])) is None
        step.close(failed=False)
        scheduler.drain()
        assert joined == [True], "the main queue went on before the copies had ended"
        for result, layer, x in zip(results, made, inputs, strict=False):
            assert_close(result, layer.expected(x))

"""The staged path: its order under any interleaving of two queues, values, counts."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dak_inductor import hardware
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.lowering import counters, ops_linear, staging
from dak_inductor.lowering.linear import copy_engine, dispatch, ring, ring_plan
from dak_inductor.lowering.linear.configuration import MAXIMUM_TOKENS
from dak_inductor.lowering.linear.counted_reads import count, counted_reads
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_plan import Residency
from dak_inductor.lowering.queues import InlineQueue, Queues
from dak_inductor.lowering.slots import MOST_SLOTS, allocate, slot_sizes

from .ahead_model import weight_of
from .fake_queues import FakeQueue, Scheduler

H200 = hardware.load("h200")
HOST, PEER = H200.link("cpu"), H200.link("cuda:1")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _no_counts():
    counters.reset()
    yield
    counters.reset()


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rings and parts so small that little weights take many turns."""
    monkeypatch.setattr(ring_plan, "RING_BYTES", 12 * 1024)
    monkeypatch.setattr(ring_plan, "LARGE_RING", 1)
    monkeypatch.setattr(ring_plan, "UNIT", 16)
    ring.plan_of.cache_clear()
    yield
    ring.plan_of.cache_clear()


# --- the order ---


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_any_interleaving_gives_the_products(small_ring, gated: bool, in_out: bool) -> None:
    m, n, k = 33, 400, 64
    problem = LinearProblem(m, n, k, BF16, gated, in_out)
    rows = k if in_out else n
    x = torch.randn(m, k, dtype=BF16)
    shape = (k, n) if in_out else (n, k)
    weights = tuple(torch.randn(shape, dtype=BF16) for _ in range(1 + gated))
    expected = [x @ (weight if in_out else weight.t()) for weight in weights]
    for seed in range(40):
        pick = random.Random(seed)
        residency = tuple(
            Residency(local, min(rows, local + 1))
            for local in (pick.choice([0, rows // 3, rows // 2]) for _ in weights)
        )
        plan = ring_plan.choose(problem, residency, H200, pick.choice([HOST, PEER]))
        assert len(plan.staged) > len(plan.slots) > 0
        plan = replace(plan, copy_bound=pick.choice([False, True]))
        slots = poisoned(plan, k)
        outputs = tuple(torch.full((m, n), float("nan"), dtype=BF16) for _ in weights)
        scheduler = Scheduler(pick)
        main, side = scheduler.queue(), scheduler.queue()
        products = ring.Products(x, weights, (None,) * len(weights), outputs, residency, in_out)
        earlier = torch.zeros(1)
        main.run(lambda seen=earlier: seen.add_(1))
        counted: list[bool] = []
        count = partial(counted.append, True)
        issue(plan, products, slots, main, Checked(side, earlier), count)
        joined: list[bool] = []
        main.run(lambda seen=joined, queue=side: seen.append(not queue.entries))
        scheduler.drain()
        assert joined == [True], "the main queue went on before the copies had ended"
        assert counted == [True]
        for output, exact in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, exact, rtol=2e-2, atol=2e-2)


def poisoned(plan: ring_plan.RingPlan, k: int) -> tuple[torch.Tensor, ...]:
    slots = allocate([features * k for features in plan.slots], torch.empty(0, dtype=BF16))
    for slot in slots:
        slot.fill_(float("nan"))
    return slots


def issue(plan: ring_plan.RingPlan, products: ring.Products, slots, main, side, count) -> None:
    queues = Queues(main, side)
    staging.issue(plan.parts, products, slots, queues, count, copy_bound=plan.copy_bound)


class Checked:
    """A side queue whose copies come after what main had queued before."""

    def __init__(self, queue: FakeQueue, earlier: torch.Tensor) -> None:
        self._queue, self._earlier = queue, earlier
        self.run, self.record, self.wait = queue.run, queue.record, queue.wait

    def launch(self, work) -> None:
        def checked(stream: int) -> None:
            assert self._earlier.item() == 1, "a copy overtook earlier work on the main queue"
            work(stream)

        self._queue.launch(checked)


@pytest.mark.parametrize("local", [0, 128, 400])
def test_copies_in_line_need_no_second_queue(local: int) -> None:
    m, n, k = 33, 400, 64
    residency = (Residency(local, local),)
    x, weight = torch.randn(m, k, dtype=BF16), torch.randn(n, k, dtype=BF16)
    parts = [ring_plan.Part(0, 0, local, False), ring_plan.Part(0, local, n, True)]
    parts = [part for part in parts if part.features]
    slots = tuple(part.features for part in parts if part.staged)
    plan = ring_plan.RingPlan(tuple(parts), slots, 1e-6, copy_bound=True, in_line=True)
    output = torch.full((m, n), float("nan"), dtype=BF16)
    products = ring.Products(x, (weight,), (None,), (output,), residency, False)
    scheduler = Scheduler(random.Random(0))
    main = scheduler.queue()
    counted: list[bool] = []
    issue(plan, products, poisoned(plan, k), main, main, partial(counted.append, True))
    scheduler.drain()
    assert counted == [True]
    torch.testing.assert_close(output, x @ weight.t(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lost", ["main", "side"])
@pytest.mark.parametrize("local", [0, 256])
def test_a_lost_wait_is_found(small_ring, lost: str, local: int) -> None:
    """The interleavings above can fail: without the waits of one queue, values are wrong."""
    m, n, k = 9, 400, 64
    problem = LinearProblem(m, n, k, BF16)
    residency = (Residency(local, local),)
    plan = ring_plan.choose(problem, residency, H200, HOST)
    x, weight = torch.randn(m, k, dtype=BF16), torch.randn(n, k, dtype=BF16)
    wrong = 0
    for seed in range(20):
        scheduler = Scheduler(random.Random(seed))
        main, side = scheduler.queue(), scheduler.queue()
        (main if lost == "main" else side).wait = lambda mark: None  # type: ignore[method-assign]
        output = torch.full((m, n), float("nan"), dtype=BF16)
        products = ring.Products(x, (weight,), (None,), (output,), residency, False)
        issue(plan, products, poisoned(plan, k), main, side, lambda: None)
        results: list[torch.Tensor] = []
        main.run(lambda seen=results, of=output: seen.append(of.clone()))
        scheduler.drain()
        wrong += not torch.allclose(results[0], x @ weight.t(), rtol=2e-2, atol=2e-2)
    assert wrong


def test_the_first_copy_is_queued_first_then_local_work() -> None:
    """The host takes some time for each: the device should have work of both kinds at once."""
    problem = LinearProblem(512, 28672, 8192, BF16)
    plan = ring_plan.choose(problem, ring_plan.residencies(problem, (47 << 20,)), H200, HOST)
    queued: list[tuple[str, object]] = []

    class Work:
        def stage(self, part: ring_plan.Part, slot: object, stream: int) -> None:
            queued.append(("copy", part))

        def compute(self, part: ring_plan.Part, slot: object) -> None:
            queued.append(("product", part))

    slots = [object() for _ in plan.slots]
    queue = InlineQueue()
    queues = Queues(queue, queue)
    staging.issue(plan.parts, Work(), slots, queues, lambda: None, copy_bound=True)
    assert queued[:2] == [("copy", plan.staged[0]), ("product", plan.local[0])]
    assert sorted(kind for kind, _ in queued) == sorted(
        ["copy"] * len(plan.staged) + ["product"] * len(plan.parts)
    )


def test_slots_are_as_many_as_fit() -> None:
    assert slot_sizes([5, 3, 1], 9) == (5, 3, 1)
    assert slot_sizes([5, 3, 1], 8) == (5, 3)
    assert slot_sizes([5, 3, 6], 8) == (6,)
    assert slot_sizes([], 8) == ()
    assert slot_sizes([1] * 40, 100) == (1,) * MOST_SLOTS
    memory = allocate([5, 130, 7], torch.empty(0))
    assert [part.numel() for part in memory] == [5, 130, 7]
    starts = [part.storage_offset() for part in memory]
    assert (
        starts == [0, 128, 384] and len({part.untyped_storage().data_ptr() for part in memory}) == 1
    )


# --- values and counts ---


def tiered(values: torch.Tensor, label: str, split: int):
    buffer = SimulatedTier(page_bytes=256).allocate(values.nbytes, split=split)
    buffer.label = label
    tensor = buffer.tensor(values.dtype, tuple(values.shape))
    tensor.copy_(values)
    return buffer, tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
def test_epilogues_round_where_the_stock_composition_does(
    small_ring, activation: str, layout: str, dtype: torch.dtype
) -> None:
    n, k = 400, 64
    x = torch.randn(3, 11, k, dtype=dtype)
    values = torch.randn((n, k) if layout == "out_in" else (k, n), dtype=dtype) / 8
    bias, residual = torch.randn(n, dtype=dtype), torch.randn(3, 11, n, dtype=dtype)
    for split in (0, 256, values.nbytes // 3, values.nbytes - 256, values.nbytes):
        buffer, weight = tiered(values, "w", split)
        for used_bias, used_residual in ((bias, residual), (None, None)):
            counters.reset()
            result = ring.run(
                x, (weight,), (buffer,), biases=(used_bias,), residual=used_residual,
                activation=activation, layout=layout,
            )  # fmt: skip
            expected = ops_linear._linear_epilogue(
                x, values, used_bias, used_residual, activation, layout
            )
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
            (read,) = counters.snapshot()
            assert read.calls == 1 and read.bytes == buffer.bytes_by_tier()


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_gated_with_two_splits_and_with_one_weight_that_is_not_tiered(
    small_ring, layout: str
) -> None:
    n, k = 400, 64
    x = torch.randn(33, k, dtype=BF16)
    shape = (n, k) if layout == "out_in" else (k, n)
    values = [torch.randn(shape, dtype=BF16) / 8 for _ in range(2)]
    biases = tuple(torch.randn(n, dtype=BF16) for _ in range(2))
    expected = ops_linear._gated_linear(x, *values, *biases, "silu", layout)
    nbytes = values[0].nbytes
    for splits in ((nbytes // 3, nbytes * 2 // 3), (0, nbytes), (nbytes, 0), (0, None), (None, 0)):
        buffers, weights = [], []
        for label, value, split in zip("gu", values, splits, strict=True):
            buffer, weight = (None, value) if split is None else tiered(value, label, split)
            buffers.append(buffer)
            weights.append(weight)
        counters.reset()
        result = ring.run(
            x, tuple(weights), tuple(buffers), biases=biases, residual=None,
            activation="silu", layout=layout,
        )  # fmt: skip
        torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2)
        held = [buffer.bytes_by_tier() for buffer in buffers if buffer is not None]
        assert counters.total() == sum(held, TierBytes())


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_halves_of_a_fused_weight_are_one_read_of_it(small_ring, layout: str) -> None:
    n, k = 208, 64
    x = torch.randn(17, k, dtype=BF16)
    axis = 0 if layout == "out_in" else 1
    values = torch.randn((2 * n, k) if layout == "out_in" else (k, 2 * n), dtype=BF16) / 8
    for split in (0, 256, values.nbytes // 2 + 256, values.nbytes - 256):
        buffer, fused = tiered(values, "gate_up", split)
        counters.reset()
        result = ring.run(
            x, tuple(fused.chunk(2, axis)), (buffer, buffer), biases=(None, None),
            residual=None, activation="gelu", layout=layout,
        )  # fmt: skip
        gate, up = values.chunk(2, axis)
        expected = ops_linear._gated_linear(x, gate, up, None, None, "gelu", layout)
        torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2)
        (read,) = counters.snapshot()
        assert read.calls == 1 and read.bytes == buffer.bytes_by_tier()


def test_the_rows_of_a_view_are_placed_by_its_buffer() -> None:
    buffer, weight = tiered(torch.randn(64, 32, dtype=BF16), "w", 20 * 64 + 256)
    assert ring._residency(weight, buffer) == Residency(24, 24)
    assert ring._residency(weight[10:30], buffer) == Residency(14, 14)
    assert ring._residency(weight[:16], buffer) == Residency(16, 16)
    assert ring._residency(weight[40:], buffer) == Residency(0, 0)
    assert ring._residency(weight, None) == Residency(64, 64)
    buffer.split = 24 * 64 + 32  # in the middle of row 24
    assert ring._residency(weight, buffer) == Residency(24, 25)
    assert ring._residency(weight[:, :16], buffer) == Residency(25, 25)
    assert ring._residency(weight[:, 16:], buffer) == Residency(24, 24)


def test_inputs_of_any_stride_and_weights_that_require_gradients(small_ring) -> None:
    n, k = 96, 64
    values = torch.randn(n, k, dtype=BF16) / 8
    buffer, weight = tiered(values, "w", values.nbytes // 2)
    weight.requires_grad_()
    for x in (
        torch.randn(k, 20, dtype=BF16).t(),
        torch.randn(1, k, dtype=BF16).expand(20, k),
        torch.randn(20, 2 * k, dtype=BF16)[:, ::2],
        torch.randn(2, 5, k, dtype=BF16).transpose(0, 1),
        torch.randn(k, dtype=BF16),
    ):
        result = ring.run(
            x, (weight,), (buffer,), biases=(None,), residual=None,
            activation="none", layout="out_in",
        )  # fmt: skip
        assert result.shape == (*x.shape[:-1], n) and not result.requires_grad
        torch.testing.assert_close(result, F.linear(x, values), rtol=2e-2, atol=2e-2)


def test_more_tokens_than_clusters_hold_go_through_the_ring() -> None:
    m, n, k = MAXIMUM_TOKENS + 1, 16, 8
    values = torch.randn(n, k, dtype=BF16)
    buffer, weight = tiered(values, "w", 0)
    options = {"biases": (None,), "residual": None, "activation": "none", "layout": "out_in"}
    x = torch.randn(m, k, dtype=BF16)
    result = dispatch.run(x, (weight,), **options)
    torch.testing.assert_close(result, F.linear(x, values), rtol=2e-2, atol=2e-2)
    assert counters.total() == buffer.bytes_by_tier()
    assert dispatch.run(x.float(), (weight,), **options) is None


def test_refusals_have_reasons() -> None:
    x, weight = torch.randn(5, 32, dtype=BF16), torch.randn(16, 32, dtype=BF16)
    taken = {"biases": (None,), "residual": None, "layout": "out_in"}
    assert ring.refusal(x, (weight,), **taken) is None
    assert ring.refusal(x, (weight.t().contiguous(),), **{**taken, "layout": "in_out"}) is None
    refused = {
        "float32": ring.refusal(x.float(), (weight.float(),), **taken),
        "not all": ring.refusal(x, (weight.half(),), **taken),
        "no tokens": ring.refusal(x[:0], (weight,), **taken),
        "one shape": ring.refusal(x, (weight, weight[:8]), **{**taken, "biases": (None, None)}),
        "not contiguous": ring.refusal(x, (weight.t().contiguous().t(),), **taken),
        "columns": ring.refusal(x[:, :16], (weight,), **taken),
        "no vector": ring.refusal(x, (weight,), **{**taken, "biases": (x[0],)}),
        "residual": ring.refusal(x, (weight,), **{**taken, "residual": x}),
    }
    for words, reason in refused.items():
        assert reason is not None and words in reason, (words, reason)


def test_the_record_of_a_strided_copy_is_laid_out_as_in_cuda_h() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs the package cuda-bindings")
    theirs = driver.CUDA_MEMCPY2D()
    theirs.srcMemoryType = theirs.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
    theirs.srcDevice, theirs.srcPitch = driver.CUdeviceptr(1 << 40), 4096
    theirs.dstDevice, theirs.dstPitch = driver.CUdeviceptr(1 << 41), 512
    theirs.WidthInBytes, theirs.Height = 500, 77
    ours = copy_engine._Copy2D(
        source_type=copy_engine._UNIFIED, source=1 << 40, source_pitch=4096,
        target_type=copy_engine._UNIFIED, target=1 << 41, target_pitch=512, width=500, height=77,
    )  # fmt: skip
    assert bytes(ours) == ctypes.string_at(theirs.getPtr(), ctypes.sizeof(ours))


def test_what_was_added_up_for_a_split_holds_for_that_alone() -> None:
    buffer, weight = weight_of(64, 64, 0.5)
    counted = counted_reads((weight,))
    for share in (0.5, 0.25, 1.0):
        buffer.move(round((1 - share) * buffer.nbytes))
        counters.reset()
        count(counted, (weight,))
        assert counters.total() == buffer.bytes_by_tier()

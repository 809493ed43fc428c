"""Times of work, queues and copies on a pretended card; stock forwards; tiers that are there."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor.cuda_runtime import tiers
from dak_inductor.errors import DriverError, MoveError, TierError
from dak_inductor.lowering import queues
from dak_inductor.lowering.attention import stock_forward
from dak_inductor.lowering.linear import copy_engine, stopwatch
from dak_inductor.lowering.queues import CurrentQueue, InlineQueue, StreamQueue

from .fake_cuda import FakeCard

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch, card: FakeCard) -> None:
    """Reading it takes 1 ms; that of the CPU's memory is what stands for it."""
    properties = SimpleNamespace(L2_cache_size=1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    scratch: Any = SimpleNamespace(sum=card.work(1e-3))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: scratch)


@pytest.mark.usefixtures("small_cache")
def test_runs_are_timed_less_what_an_idle_round_takes(card: FakeCard) -> None:
    short, long = stopwatch.seconds_of([card.work(1e-4), card.work(3e-2)], CARD)
    assert (short, long) == (pytest.approx(1e-4), pytest.approx(3e-2))
    calls = {int(call.split()[1]) // stopwatch.HEAD_START_CYCLES for call in card.calls
             if call.startswith("sleep")}  # fmt: skip
    assert calls == {1}, "long work is called once between two events"


@pytest.mark.usefixtures("small_cache")
def test_short_runs_are_called_a_few_times(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "SHORT_SECONDS", 1.0)
    (short,) = stopwatch.seconds_of([card.work(1e-4)], CARD)
    assert short == pytest.approx(1e-4)
    assert f"sleep {stopwatch.CALLS * stopwatch.HEAD_START_CYCLES}" in card.calls


@pytest.mark.usefixtures("small_cache")
def test_a_busy_card_subtracts_nothing(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an idle round took as long as one with work, others used the card meanwhile."""
    of_run, idle = [2e-3, 3e-3, 4e-3, 5e-3], [6e-3] * stopwatch.ROUNDS
    busy = iter([7e-3, *of_run, *idle])
    monkeypatch.setattr(stopwatch, "_elapsed", lambda events: next(busy))
    assert stopwatch.seconds_of([card.work(1e-4)], CARD) == (2e-3,)


@pytest.mark.usefixtures("small_cache")
def test_in_a_graph_runs_are_timed_between_small_kernels_whose_time_is_not_theirs(
    card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    launches: list[dict[str, Any]] = []

    def launch(**how: Any) -> None:
        launches.append(how)
        ran.append("small")
        card.work(2e-6)()

    def run() -> None:
        ran.append("run")
        card.work(1e-4)()

    monkeypatch.setattr(stopwatch, "load", lambda kernel, _: SimpleNamespace(launch=launch))
    (alone,) = stopwatch.seconds_of([run], CARD)
    assert not launches and set(ran) == {"run"}
    (between,) = stopwatch.seconds_of([run], CARD, in_graph=True)
    assert alone == pytest.approx(1e-4) and between == pytest.approx(1e-4)
    timed = " ".join(ran[ran.index("small") :])
    assert "small run small" in timed and "run run" not in timed
    assert all(how["overlap"] for how in launches), "they start early, as Inductor's do"


def test_work_of_a_stream_and_of_the_current_one(card: FakeCard) -> None:
    queues._side.cache_clear()
    found = queues.queues_of(CARD)
    main, copies = found.main, found.copies
    assert isinstance(main, CurrentQueue) and type(copies) is StreamQueue
    assert queues.queues_of(CARD).copies._stream is copies._stream, "one beside each main stream"
    ran: list[object] = []
    copies.run(lambda: ran.append("copy"))
    main.run(lambda: ran.append("product"))
    copies.launch(ran.append)
    main.launch(ran.append)
    assert ran == ["copy", "product", 8, 7]
    mark = copies.record()
    main.wait(mark)
    assert copies.record(mark) is mark
    assert card.calls == [
        "enter side", "record on side", "current waits for an event", "record on side",
    ]  # fmt: skip
    queues._side.cache_clear()


def test_on_the_cpu_work_is_done_when_it_is_queued() -> None:
    found = queues.queues_of(CPU)
    assert isinstance(found.main, InlineQueue) and isinstance(found.copies, InlineQueue)
    ran: list[object] = []
    found.copies.run(lambda: ran.append("copy"))
    found.main.wait(found.copies.record())
    found.main.launch(ran.append)
    assert ran == ["copy", 0]


class FarMatrix:
    """A matrix on a card, for what only asks where it lies."""

    device = CARD

    def __init__(self, rows: int, columns: int, pitch: int, address: int) -> None:
        self.shape, self.pitch, self.address = (rows, columns), pitch, address
        self.nbytes = rows * columns * 2

    def data_ptr(self) -> int:
        return self.address

    def element_size(self) -> int:
        return 2

    def stride(self, axis: int) -> int:
        return self.pitch if axis == 0 else 1

    def is_contiguous(self) -> bool:
        return self.pitch == self.shape[1]


def test_matrices_are_copied_by_a_copy_engine(
    card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ones as bytes, others by rows; the driver's refusal is an error with its numbers."""
    straight: list[dict[str, int]] = []
    by_rows: list[tuple[int, ...]] = []
    status = 0

    def copy_2d(parameters: Any, stream: ctypes.c_void_p) -> int:
        copy = parameters._obj
        by_rows.append((copy.target, copy.source, copy.target_pitch, copy.source_pitch,
                        copy.width, copy.height, stream.value or 0))  # fmt: skip
        return status

    driver = SimpleNamespace(cuMemcpy2DAsync_v2=copy_2d)
    extension = SimpleNamespace(copy_async=lambda **asked: straight.append(asked))
    monkeypatch.setattr(copy_engine, "_driver", lambda: driver)
    monkeypatch.setattr(copy_engine, "extension", lambda: extension)
    ring: Any = FarMatrix(8, 64, 64, 4096)
    copy_engine.copy(ring, FarMatrix(8, 64, 64, 1 << 20), 7)  # type: ignore[arg-type]
    assert straight == [
        {"destination": 4096, "source": 1 << 20, "nbytes": 1024, "stream": 7, "device": 0}
    ]
    copy_engine.copy_bytes(1, 2, 3, CARD, stream=9)
    assert straight[1]["stream"] == 9
    part: Any = FarMatrix(8, 64, 512, 1 << 20)
    copy_engine.copy(ring, part, 7)
    assert by_rows == [(4096, 1 << 20, 128, 1024, 128, 8, 7)]
    status = 700
    with pytest.raises(DriverError, match=r"cuMemcpy2DAsync of \(8, 64\), rows 1024 .*700"):
        copy_engine.copy(ring, part, 7)


def test_on_the_cpu_copies_are_copies() -> None:
    target, source = torch.zeros(4, 8), torch.randn(4, 16)[:, :8]
    copy_engine.copy(target, source, 0)
    assert torch.equal(target, source)
    other = torch.zeros(4, 8)
    copy_engine.copy_bytes(other.data_ptr(), target.data_ptr(), target.nbytes, CPU, 0)
    assert torch.equal(other, target)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the machine has; both forwards are there at first."""
    has: dict[str, Any] = {"capability": (9, 0), "cudnn": True}
    monkeypatch.setattr(stock_forward, "_refused", set())
    monkeypatch.setattr(stock_forward, "_cudnn", lambda: has["cudnn"])
    monkeypatch.setattr(stock_forward, "capability", lambda index: has["capability"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return has


def far_query(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(shape=(1, 8, 64, head_dim), is_cuda=True, dtype=dtype, device=CARD)


def test_forwards_are_those_that_the_call_and_the_card_allow(forwards: dict[str, Any]) -> None:
    available = stock_forward.available
    assert available(far_query(), 128) == ("cudnn", "flash")
    assert available(far_query(256), 256) == ("flash",), "cuDNN's widest head is 128"
    assert available(far_query(128), 64) == ("cudnn",), "flash takes one width"
    assert available(far_query(100), 128) == () == available(far_query(dtype=torch.float32), 128)
    assert available(torch.zeros(1, 8, 64, 128), 128) == ()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        assert available(far_query(), 128) == ("cudnn",), "the user's switches count"
    forwards["capability"] = (8, 6)
    assert available(far_query(), 128) == ("flash",)
    forwards["capability"] = (7, 5)
    assert available(far_query(), 128) == ()


def test_flash_serves_what_cudnn_has_no_plan_for(
    forwards: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, narrow = torch.randn(1, 4, 6, 16), torch.randn(1, 4, 6, 8)
    asked: list[str] = []

    def cudnn(query: Any, key: Any, value: Any, *_: Any, scale: float) -> Any:
        asked.append("cudnn")
        if error is not None:
            raise error
        return torch.ones(1, 4, 6, value.shape[-1]), torch.zeros(1, 4, 6, 1), None

    def flash(query: Any, key: Any, value: Any, *_: Any, scale: float) -> Any:
        asked.append("flash")
        return torch.full((1, 4, 6, 16), 2.0), torch.zeros(1, 4, 6), None

    monkeypatch.setattr(torch.ops.aten._scaled_dot_product_cudnn_attention, "default", cudnn)
    monkeypatch.setattr(torch.ops.aten._scaled_dot_product_flash_attention, "default", flash)

    def attend(value: torch.Tensor) -> float:
        out, sums = stock_forward.attend("cudnn", query, query, value, causal=True, scale=0.25)
        assert out.shape == (1, 6, 4, value.shape[-1]) and out.is_contiguous()
        assert sums.shape == (1, 4, 6)
        return float(out[0, 0, 0, 0])

    error: Exception | None = None
    assert attend(query) == 1.0
    error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        attend(query)
    error = RuntimeError("no execution plans")
    with pytest.raises(RuntimeError, match="plans"):
        attend(narrow)  # flash takes one width alone
    assert attend(query) == 2.0
    asked.clear()
    assert attend(query) == 2.0 and asked == ["flash"], "it is not asked again"
    assert "cudnn" not in stock_forward.available(far_query(16, torch.float32), 16)


def test_a_tier_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("disk", "cuda", "cuda:x", 3):
        with pytest.raises(TierError, match="names no tier"):
            tiers.check_remote(name)  # type: ignore[arg-type]
    with pytest.raises(TierError, match=r'needs an NVIDIA GPU.*remote="simulated"'):
        tiers.check_remote("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    tiers.check_remote("cpu")
    tiers.check_remote("cuda:0")
    with pytest.raises(TierError, match=r"has 2 GPU\(s\), cuda:0 to cuda:1"):
        tiers.check_remote("cuda:2")
    with pytest.raises(TierError, match="is the GPU the model runs on"):
        tiers.check_remote("cuda:1", torch.device("cuda"))
    tiers.check_remote("cuda:1", torch.device("cuda", 0))
    assert tiers.local_device(None) == torch.device("cuda", 1)
    assert tiers.local_device(CPU) == CPU


def test_a_tier_of_the_machine_is_opened_for_the_current_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dak_inductor.cuda_runtime import vmm

    opened: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        vmm, "open_device_tier",
        lambda remote, *, device, host_memory: opened.append((remote, device, host_memory)),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    tiers.open_tier("cpu", host_memory=5)
    assert opened == [("cpu", torch.device("cuda", 3), 5)]


def test_memory_that_cannot_grow_is_whole_from_the_start() -> None:
    """What a tier that has no pages to spare says to those who would make them ahead."""
    from dak_inductor.cuda_runtime.simulated import SimulatedTier
    from dak_inductor.cuda_runtime.tier import Tier
    from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
    from dak_inductor.cuda_runtime.tier_bytes import TierBytes

    buffer: Any = SimulatedTier(page_bytes=256).allocate(1024, split=512)
    assert TieredBuffer.growth(buffer, 1024) == TierBytes()
    assert TieredBuffer.next_ahead(buffer, 1024) == TieredBuffer.make_ahead(buffer, 1024) == 0
    TieredBuffer.drop_ahead(buffer)
    TieredBuffer.cancel_move(buffer)
    assert TieredBuffer.ahead.__get__(buffer) == 1024 and TieredBuffer.ahead_bytes(buffer) == 0
    assert TieredBuffer.write_file(buffer, SimpleNamespace()) is False  # type: ignore[arg-type]
    with pytest.raises(MoveError, match="stays where it was put"):
        TieredBuffer._move(buffer, 0)
    with pytest.raises(MoveError, match="committed from the start"):
        TieredBuffer._grow(buffer, 2048)
    tier: Any = SimulatedTier(page_bytes=256)
    grown = Tier.allocate_growing(tier, 1024, split=0)
    assert grown.committed == 1024 and not grown.tensor(torch.uint8, (1024,)).any()
    Tier.check_growth(tier, TierBytes(1, 1), "a cache")
    assert Tier.has_room(tier, TierBytes(1, 1)) and not Tier.capture_is_open(tier)


def test_kernels_wait_for_readers_before_they_are_overwritten(card: FakeCard) -> None:
    from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer

    waited: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.cuda, "current_stream", lambda _: stream)
        for device in (CPU, CARD):
            TieredBuffer._wait_for_readers(SimpleNamespace(device=device))  # type: ignore[arg-type]
    assert waited == ["stream"]

"""Times, ceilings and copies as a card's clock would give them, and memory as its driver counts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor.benchmarks.harness import ceilings, memory, stream_kernel
from dak_inductor.benchmarks.harness.copy_stream import CopyStream, remote_copy
from dak_inductor.benchmarks.harness.timing import TimingRule, capture, time_calls, time_in_turn

from .fake_cuda import FakeCard

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
RULE = TimingRule(target_seconds=0.3, repeats=3, warmup=1)


def test_a_step_is_timed_by_the_clock_of_the_card(card: FakeCard) -> None:
    timing = time_calls([card.work(0.01), card.work(0.03)], device=CARD, rule=RULE, method="calls")
    assert timing.seconds == pytest.approx(0.02) and timing.replays == 4
    fast, slow = time_in_turn([card.work(1 / 1024), card.work(0.5)], device=CARD, rule=RULE)
    assert (fast.seconds, slow.seconds) == (pytest.approx(1 / 1024), pytest.approx(0.5))
    assert (fast.replays, slow.replays) == (102, 1)


def test_a_captured_step_runs_when_it_is_replayed(card: FakeCard) -> None:
    step = capture(card.work(2.0), warmup=3)
    assert card.now == 6.0, "the warm-up alone has run"
    assert step() == "after 2.0 s" and card.now == 8.0
    assert card.calls[0] == "side waits for current" and "current waits for side" in card.calls


def test_the_best_method_is_the_ceiling_and_each_is_named() -> None:
    methods: dict[str, str] = {}

    def missing() -> float:
        raise RuntimeError("no such kernel")

    found = ceilings._best(
        {"slow": lambda: 1e9, "none": missing, "fast": lambda: 3e9}, "hbm", methods
    )
    assert found == 3e9
    assert methods["hbm"] == (
        "slow: 1.0 GB/s; none: not measured (RuntimeError: no such kernel); fast: 3.0 GB/s"
    )
    with pytest.raises(RuntimeError, match=r"no method could measure link.*no such kernel"):
        ceilings._best({"none": missing}, "link", methods)


def test_a_ceiling_is_that_of_the_method_that_works(
    card: FakeCard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies and products take the time that the clock says; kernels of a card cannot run here."""
    nbytes = 1 << 16
    for name in ("STREAM_BYTES", "LINK_BYTES"):
        monkeypatch.setattr(ceilings, name, nbytes)
    monkeypatch.setattr(ceilings, "GEMM", (8, 16, 32))
    tensors = SimpleNamespace(device=CPU)

    def time_one(steps: Any, **_: Any) -> Any:
        steps[0]()
        return SimpleNamespace(seconds=1e-6)

    monkeypatch.setattr(ceilings, "time_calls", time_one)
    for name in ("_hbm_methods", "_copy_bandwidths", "_matmul_flops", "_direct_methods"):
        whole = getattr(ceilings, name)
        monkeypatch.setattr(
            ceilings, name, lambda _, *rest, whole=whole: whole(tensors.device, *rest)
        )
    streamed: list[int] = []
    monkeypatch.setattr(stream_kernel, "check_read", lambda words, partial: None)
    monkeypatch.setattr(
        stream_kernel, "stream_read", lambda words, partial: streamed.append(partial.numel())
    )
    properties = SimpleNamespace(multi_processor_count=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(
        ceilings, "open_tier", lambda remote, **_: ceilings_tier(remote), raising=True
    )
    found = ceilings.measure(CARD, "cpu", RULE)
    assert found.hbm_stream == pytest.approx(nbytes / 1e-6)  # read and written: half of it twice
    assert found.link_direct == found.link_copy == pytest.approx(nbytes / 1e-6)
    assert found.matmul_flops == pytest.approx(2 * 8 * 16 * 32 / 1e-6)
    told = dict(found.methods)
    assert streamed == [5 * ceilings.PROGRAMS_PER_SM, ceilings.LINK_PROGRAMS]
    assert "bulk copies into shared memory: not measured" in told["hbm_stream"]
    assert "16-byte loads: 65.5 GB/s" in told["link_direct"]
    assert told["matmul_flops"].endswith("(8, 16, 32)")


def ceilings_tier(remote: str) -> Any:
    """All of it remote, on the simulated tier."""
    from dak_inductor.cuda_runtime.tiers import open_tier

    assert remote == "cpu"
    return open_tier("simulated", device=None)


def test_without_a_card_figures_are_those_of_its_memory() -> None:
    found = ceilings.measure(CPU, "simulated", TimingRule(0.002, 1, 1))
    assert found.hbm_stream == found.link_direct == found.link_copy > 0
    assert "no GPU here" in dict(found.methods)["link_copy"]


def test_copies_of_a_peer_wait_on_both_streams(
    card: FakeCard,
) -> None:
    copies = CopyStream(CARD, "cuda:1")
    target, source = torch.zeros(4), torch.arange(4.0)
    copies.fork()
    copies.copy(target, source)
    copies.wait(copies.copied())
    copies.hold(copies.used())
    copies.join()
    assert torch.equal(target, source)
    assert card.calls == [
        "side waits for current", "enter side", "enter side",
        "record on side", "current waits for an event",
        "record on current", "side waits for an event", "current waits for side",
    ]  # fmt: skip


def test_copies_without_a_card_are_done_at_once() -> None:
    copies = CopyStream(CPU, "cpu")
    target, source = torch.zeros(4), torch.arange(4.0)
    copies.fork()
    copies.copy(target, source)
    assert torch.equal(target, source)
    assert copies.copied() is None and copies.used() is None
    copies.wait(None)
    copies.hold(None)
    copies.join()
    kept = remote_copy(source, "cpu")
    assert torch.equal(kept, source) and kept.data_ptr() != source.data_ptr()


def fake_nvml(asked: list[str], *, versions: bool) -> Any:
    """NVML of some cards. `versions`: whether its binding knows the second form of the figures."""

    def handle(what: str) -> Any:
        return lambda found: asked.append(f"{what} {found}")

    def memory_of(_: object, version: int = 0) -> Any:
        if version and not versions:
            raise TypeError("unexpected keyword argument 'version'")
        return SimpleNamespace(used=7000 if version else 9000)

    return SimpleNamespace(
        nvmlMemory_v2=2, nvmlInit=lambda: None, nvmlDeviceGetMemoryInfo=memory_of,
        nvmlDeviceGetHandleByIndex=handle("index"), nvmlDeviceGetHandleByUUID=handle("card"),
    )  # fmt: skip


@pytest.mark.parametrize(("versions", "used"), [(True, 7000), (False, 9000)])
def test_memory_of_a_card_is_counted_by_its_driver(
    versions: bool, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(asked, versions=versions))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert memory.device_bytes_used(1) == used and asked == ["index 1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # CUDA counts otherwise than NVML then
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"abc-{index}")
    )
    assert memory.device_bytes_used(0) == used and asked[-1] == "card GPU-abc-0"


def test_without_the_drivers_library_cuda_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no GPU"):
        memory.device_bytes_used()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (30, 100 + index))
    assert memory.device_bytes_used(2) == 72

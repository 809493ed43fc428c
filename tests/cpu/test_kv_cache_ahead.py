"""Pages of a KV cache made before the context needs them: accounts, bounds, failures, no GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor import kv_cache_ahead
from dak_inductor.cuda_runtime.page_maker import PAGE_MAKER, Progress
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.simulated_buffer import SimulatedBuffer
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import HostMemoryError
from dak_inductor.kv_cache_geometry import CacheGeometry, LayerShape
from dak_inductor.kv_cache_storage import CacheStorage
from dak_inductor.kv_cache_tensors import tensor_plans

PAGE = 1024
ROW = 2 * 2 * 8 * 4  # bytes of a token of keys: batch 2, 2 heads, 8 elements of 4 bytes
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert PAGE_MAKER.wait() and PAGE_MAKER._thread is None


def make_cache(
    tier: SimulatedTier, *, max_len: int = 2000, split: int = 4 * PAGE, window: int = 0
) -> CacheStorage:
    shapes = (LayerShape(2, 8, 8), LayerShape(2, 8, 16), LayerShape(2, 8, 8, window))
    geometry = CacheGeometry(shapes, 2, max_len, torch.float32)
    plans = tensor_plans(geometry, label="cache", prefill_chunk=16)
    splits = {plan.name: min(split, plan.nbytes) for plan in plans}
    return CacheStorage(geometry, tier, CPU, plans, splits, fixed=True, expected=1)


def step_to(cache: CacheStorage, length: int) -> None:
    tokens = length - cache.tokens
    cache.prepare(length, tokens)
    for layer in cache.layers:
        layer.advance(tokens)


def pages_made(cache: CacheStorage) -> TierBytes:
    return sum((tensor.buffer.physical_bytes() for tensor in cache.tensors), TierBytes())


STEPS = st.lists(
    st.tuples(st.sampled_from(["step", "step", "settle", "reset", "commit", "give back", "fail"]),
              st.integers(1, 400)),
    max_size=25,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS,
    host_pages=st.none() | st.integers(30, 500),
    bound=st.integers(1, 200),
    window=st.sampled_from([0, 20]),
)
def test_accounts_budgets_and_bounds_hold(
    steps: list[tuple[str, int]], host_pages: int | None, bound: int, window: int
) -> None:
    limit = None if host_pages is None else host_pages * PAGE
    tier = SimulatedTier(page_bytes=PAGE, host_memory=limit)
    cache = make_cache(tier, window=window)
    ahead = cache._ahead
    ahead.bound = bound * PAGE
    for name, number in steps:
        before = cache.tokens
        length = min(cache.geometry.max_len, before + number)
        try:
            if name == "step":
                step_to(cache, length)
            elif name == "commit":
                cache.commit(length)
            elif name == "reset":
                cache.reset()
            elif name == "give back":
                cache.give_back()
            elif name == "fail":
                tier.inject_failure("ahead", after=number % 5)
            else:
                assert PAGE_MAKER.wait()
        except HostMemoryError as error:
            assert limit is not None and "the KV cache at" in str(error)
            assert cache.tokens == before
        if name in ("reset", "give back"):
            assert PAGE_MAKER.wait() and ahead.held_bytes() == 0
        assert ahead.held_bytes() <= ahead.bound
        for layer in cache.layers:
            assert layer.committed >= layer.slots
            for buffer in layer.buffers:
                assert buffer.committed <= buffer.ahead <= buffer.nbytes
                assert buffer.physical_bytes().total <= buffer.page_count * PAGE
    assert PAGE_MAKER.wait()
    assert tier.counters.held == pages_made(cache)
    if limit is not None:
        assert tier.counters.peak_remote_bytes <= limit
    cache = ahead = layer = buffer = None
    gc.collect()
    assert tier.counters.held == TierBytes()


def test_steps_find_their_pages_made(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = SimulatedTier(page_bytes=PAGE)
    cache = make_cache(tier)
    made: list[int] = []  # remote bytes that steps made themselves
    grow = TieredBuffer.grow
    monkeypatch.setattr(
        TieredBuffer,
        "grow",
        lambda self, size: made.append(self.growth(size).remote) or grow(self, size),
    )
    step_to(cache, 100)
    assert sum(made) > 0  # a prompt is ahead of everything
    for length in range(101, 2001):
        made.clear()
        step_to(cache, length)
        assert not any(made)
        assert PAGE_MAKER.wait()
    assert cache._ahead.held_bytes() == 0 and PAGE_MAKER._thread is None


def test_nothing_is_made_before_it_is_near() -> None:
    cache = make_cache(SimulatedTier(page_bytes=PAGE))
    step_to(cache, 10)
    cache.commit(1500)
    assert PAGE_MAKER.wait()
    cache.give_back()
    edge = min(layer.committed for layer in cache.layers)
    step_to(cache, edge - kv_cache_ahead.LEAD_TOKENS)
    assert PAGE_MAKER._thread is None and cache._ahead.held_bytes() == 0
    step_to(cache, edge - kv_cache_ahead.LEAD_TOKENS + 1)
    assert PAGE_MAKER.wait() and cache._ahead.held_bytes() > 0
    cache.reset()
    assert cache._ahead.held_bytes() == 0


def test_a_capture_is_waited_for() -> None:
    tier = SimulatedTier(page_bytes=PAGE)
    cache = make_cache(tier)
    tier.capturing = True
    step_to(cache, 100)
    assert not PAGE_MAKER.wait(0.02) and cache._ahead.held_bytes() == 0
    tier.capturing = False
    assert PAGE_MAKER.wait() and cache._ahead.held_bytes() > 0


def test_pages_ahead_give_way_to_another_tensor() -> None:
    tier = SimulatedTier(page_bytes=PAGE, host_memory=400 * PAGE)
    cache = make_cache(tier)
    step_to(cache, 100)
    assert PAGE_MAKER.wait()
    committed = tier.counters.held.remote - cache._ahead.held_bytes()
    assert cache._ahead.held_bytes() > 0
    other = tier.allocate(400 * PAGE - committed, split=0)
    assert cache._ahead.held_bytes() == 0 and tier.counters.held.remote == 400 * PAGE
    with pytest.raises(HostMemoryError, match="the KV cache at"):
        step_to(cache, 2000)
    del other


def test_a_failure_that_is_no_matter_of_memory_is_raised_by_the_next_growth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = make_cache(SimulatedTier(page_bytes=PAGE))

    def broken(self: TieredBuffer, committed: int) -> int:
        raise ZeroDivisionError("in the background")

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedBuffer, "make_ahead", broken)
        step_to(cache, 100)
        assert PAGE_MAKER.wait()
    with pytest.raises(ZeroDivisionError, match="in the background"):
        step_to(cache, 1000)
    assert cache.tokens == 100
    step_to(cache, 1000)


def test_the_maker_serves_many_from_many_threads() -> None:
    class Work:
        left = 20

        def make_one(self) -> Progress:
            self.left -= 1
            return Progress.MADE if self.left > 0 else Progress.DONE

        def give_back(self) -> bool:
            return False

    works = [Work() for _ in range(8)]
    threads = [threading.Thread(target=PAGE_MAKER.ask, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    PAGE_MAKER.ask(Work())  # dies at once
    for thread in threads:
        thread.join()
    assert PAGE_MAKER.wait() and all(work.left == 0 for work in works)
    assert not PAGE_MAKER.give_back()


def test_a_system_without_threads_makes_pages_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    cache = make_cache(SimulatedTier(page_bytes=PAGE))
    for length in (100, 500, 2000):
        step_to(cache, length)
    assert cache.tokens == 2000


@pytest.mark.parametrize("pages", range(40, 200, 8))
def test_a_cache_gets_as_far_as_its_budget_and_no_further(pages: int) -> None:
    tier = SimulatedTier(page_bytes=PAGE, host_memory=pages * PAGE)
    cache = make_cache(tier, split=0)
    with pytest.raises(HostMemoryError, match="the KV cache at"):
        for length in range(10, 2000, 7):
            step_to(cache, length)
            if length % 3 == 0:
                assert PAGE_MAKER.wait()
    assert tier.counters.peak_remote_bytes <= pages * PAGE
    assert tier.counters.held == cache.bytes_by_tier()
    assert tier.counters.held.remote > (pages - 14) * PAGE  # not one page more for each buffer

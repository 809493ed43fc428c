"""Pages made ahead of a growing cache on a card: the pause of a step, captures, the budget."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.page_maker import PAGE_MAKER, PageMaker
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import HostMemoryError
from dak_inductor.kv_cache_geometry import CacheGeometry, LayerShape
from dak_inductor.kv_cache_storage import CacheStorage
from dak_inductor.kv_cache_tensors import tensor_plans

PAGE = 2 << 20
BATCH, HEADS, DIM = 16, 8, 128
ROW = BATCH * HEADS * DIM * 2  # bytes of a token of keys: 64 tokens fill a page
STEP_SECONDS = 0.005


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert PAGE_MAKER.wait() and vmm.drain(60)


def make_cache(
    device: torch.device, *, layers: int = 32, max_len: int = 2048, host_memory: int | None = None
) -> CacheStorage:
    tier = open_tier("cpu", device=device, host_memory=host_memory)
    if not isinstance(tier, VmmTier):
        pytest.skip("this system refuses host pages (HOST_NUMA)")
    shape = LayerShape(HEADS, DIM, DIM)
    geometry = CacheGeometry((shape,) * layers, BATCH, max_len, torch.bfloat16)
    plans = tensor_plans(geometry, label="cache", prefill_chunk=64)
    splits = dict.fromkeys((plan.name for plan in plans), 2 * PAGE)
    return CacheStorage(geometry, tier, device, plans, splits, fixed=True, expected=1)


def step_to(cache: CacheStorage, length: int) -> float:
    """A decode step as far as the cache is concerned; seconds that it took to be prepared for."""
    tokens = length - cache.tokens
    torch.cuda.synchronize(cache.device)
    start = time.perf_counter()
    cache.prepare(length, tokens)
    pause = time.perf_counter() - start
    for layer in cache.layers:
        layer.keys[:, :, length - tokens : length] = 1
        layer.values[:, :, length - tokens : length] = 2
        layer.advance(tokens)
    return pause


def decode(cache: CacheStorage, until: int) -> list[float]:
    """Pauses of the steps in which pages were mapped."""
    pauses = []
    while cache.tokens < until:
        committed, start = cache.layers[0].committed, time.perf_counter()
        pause = step_to(cache, cache.tokens + 1)
        if cache.layers[0].committed > committed:
            pauses.append(pause)
        while time.perf_counter() - start < STEP_SECONDS:  # a step takes as long as this
            torch.cuda._sleep(100_000)
            torch.cuda.synchronize(cache.device)
    return pauses


@pytest.mark.alone
@pytest.mark.host
def test_the_longest_pause_of_a_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = {}
    for name in ("made in the step", "made ahead"):
        with monkeypatch.context() as patch:
            if name == "made in the step":
                patch.setattr(PageMaker, "ask", lambda self, growing: None)
            cache = make_cache(device)
            step_to(cache, 512)
            assert PAGE_MAKER.wait()
            pauses = decode(cache, 1100)
            assert len(pauses) >= 2
            longest[name] = max(pauses)
            print(
                f"\n{len(cache.tensors)} buffers, pages {name}: longest pause "
                f"{1e3 * max(pauses):.2f} ms, median {1e3 * statistics.median(pauses):.2f} ms "
                f"of {len(pauses)} steps at page boundaries"
            )
            for layer in cache.layers:
                assert bool((layer.keys[:, :, : cache.tokens] == 1).all())
                assert not layer.keys[:, :, cache.tokens :].any()
        del cache, layer
        gc.collect()
        assert PAGE_MAKER.wait() and vmm.drain(60)
    assert longest["made ahead"] < 0.5 * longest["made in the step"]


@pytest.mark.alone
def test_steps_while_pages_are_made_are_hardly_slower(device: torch.device) -> None:
    """Launches go through the driver, which the page maker's thread calls too."""
    cache = make_cache(device)
    square = torch.randn(256, 256, device=device)

    def launch() -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(300):
            torch.mm(square, square)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    launch()
    alone = [launch() for _ in range(30)]
    step_to(cache, 512)
    beside = []
    while PAGE_MAKER._thread is not None:
        beside.append(launch())
    assert beside
    print(
        f"\n300 launches: {1e3 * statistics.median(alone):.2f} ms, longest {1e3 * max(alone):.2f}; "
        f"while pages are made: {1e3 * statistics.median(beside):.2f}, "
        f"longest {1e3 * max(beside):.2f} ({len(beside)} times)"
    )


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_captures_stand_while_pages_are_made(device: torch.device, mode: str) -> None:
    cache = make_cache(device)
    values = torch.zeros(1 << 16, device=device)
    values.add_(1)  # its kernel is loaded
    step_to(cache, 512)
    assert PAGE_MAKER.wait()
    cache.give_back()
    buffers = [tensor.buffer for tensor in cache.tensors]
    failures: list[BaseException] = []

    def make_pages() -> None:
        """What the page maker does where a capture opens just after it has looked for one."""
        try:
            for buffer in buffers[:16]:
                buffer.make_ahead(buffer.committed + PAGE)
                buffer.drop_ahead()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=make_pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        thread.start()
        for _ in range(50):
            values.add_(1)
            time.sleep(0.001)
        thread.join()
        cache._ahead.watch(cache.tokens)
        assert not PAGE_MAKER.wait(0.05) and cache._ahead.held_bytes() == 0  # it waits
    assert not failures
    values.zero_()
    graph.replay()
    torch.cuda.synchronize(device)
    assert bool((values == 50).all())
    assert PAGE_MAKER.wait() and cache._ahead.held_bytes() > 0
    step_to(cache, cache.layers[0].committed + 1)


@pytest.mark.alone
def test_pages_ahead_stay_within_the_budget(device: torch.device) -> None:
    already = vmm.memory_in_use().get("cpu", 0)
    limit = already + 300 * PAGE
    cache = make_cache(device, layers=8, host_memory=limit)
    free = torch.cuda.mem_get_info(device)[0]
    most, length = 0, 64
    with pytest.raises(HostMemoryError, match="the KV cache at"):
        while True:
            step_to(cache, length)
            length += 16
            most = max(most, vmm.memory_in_use().get("cpu", 0))
            time.sleep(0.001)
    assert most <= limit and cache._ahead.held_bytes() == 0
    held = cache.bytes_by_tier()
    assert held.remote > 0.8 * 300 * PAGE - 16 * PAGE  # it got as far as memory went
    used = free - torch.cuda.mem_get_info(device)[0]
    assert used <= held.local + (256 << 20)  # none of it is GPU memory

"""Pages made before a buffer grows into them, on the stand-in driver."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.page_maker import PAGE_MAKER
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import DakError, HostMemoryError
from dak_inductor.kv_cache_geometry import CacheGeometry, LayerShape
from dak_inductor.kv_cache_storage import CacheStorage
from dak_inductor.kv_cache_tensors import tensor_plans

PAGE = 2 << 20
HOST = -1
GPU = torch.device("cuda", 0)
ROW = 2 * 4 * 128 * 2  # bytes of a token of keys: batch 2, 4 heads, 128 elements of 2 bytes
TOKENS_IN_PAGE = PAGE // ROW


def contents(buffer: Any) -> torch.Tensor:
    return buffer.tensor(torch.uint8, (buffer.nbytes,))


def make_all(buffer: Any, committed: int) -> int:
    made = 0
    while step := buffer.next_ahead(committed):
        assert buffer.make_ahead(committed) == step
        made += step
    return made


def make_cache(host_memory: int | None = None, *, layers: int = 3, pages: int = 40) -> CacheStorage:
    geometry = CacheGeometry(
        (LayerShape(4, 128, 128),) * layers, 2, pages * TOKENS_IN_PAGE, torch.bfloat16
    )
    plans = tensor_plans(geometry, label="cache", prefill_chunk=64)
    tier = VmmTier("cpu", GPU, host_memory)
    splits = dict.fromkeys((plan.name for plan in plans), 2 * PAGE)
    return CacheStorage(geometry, tier, torch.device("cpu"), plans, splits, fixed=True, expected=1)


def step_to(cache: CacheStorage, length: int) -> None:
    """What a model's step does with the cache, contents aside."""
    tokens = length - cache.tokens
    cache.prepare(length, tokens)
    for layer in cache.layers:
        layer.advance(tokens)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["make", "make one", "grow", "drop", "move"]), st.integers(1, 90)),
    max_size=12,
)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pages=st.sampled_from([3, 90, 150]), split=st.integers(0, 60), operations=OPERATIONS)
def test_contents_and_accounts_hold_whatever_is_made_ahead(
    fake: Any, pages: int, split: int, operations: list[tuple[str, int]]
) -> None:
    tier = VmmTier("cpu", GPU, None)
    gc.collect()
    assert vmm.drain()
    others = fake.used(HOST)
    nbytes = pages * PAGE - 4096
    buffer = tier.allocate_growing(nbytes, split=min(split * PAGE, nbytes))
    everything = contents(buffer)
    data = torch.zeros(nbytes // 4096 + 1, dtype=torch.uint8)  # what is written, every 4096 bytes
    for step, (name, page) in enumerate(operations):
        wanted, held = min(nbytes, page * PAGE), buffer.physical_bytes()
        if name == "make":
            remote = buffer.growth(wanted).remote
            assert make_all(buffer, wanted) == remote and buffer.growth(wanted).remote == 0
            assert buffer.physical_bytes() == held + TierBytes(remote=remote)
        elif name == "make one":
            buffer.make_ahead(wanted)
        elif name == "grow":
            before, more = buffer.committed, buffer.growth(wanted)
            buffer.grow(wanted)
            assert buffer.physical_bytes() == held + more
            fresh = everything[before : buffer.committed]
            assert not fresh.any()
            fresh.fill_(step + 1)
            data[-(-before // 4096) : -(-buffer.committed // 4096)] = step + 1
        elif name == "drop":
            buffer.drop_ahead()
            assert buffer.ahead_bytes() == 0 and buffer.ahead == buffer.committed
        else:
            buffer.move(wanted)
            assert buffer.ahead_bytes() == 0
        assert torch.equal(everything[::4096], data[: len(everything[::4096])])
        assert buffer.ahead >= buffer.committed
        assert vmm.drain() and fake.used(HOST) - others == buffer.physical_bytes().remote
    assert not vmm.memory_in_use().get("imported")


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"])
def test_a_failure_ahead_or_behind_leaves_nothing_behind(fake: Any, call: str) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffer = tier.allocate_growing(100 * PAGE, split=2 * PAGE)
    buffer.grow(4 * PAGE)
    fake.fail(call, status=2 if call == "cuMemCreate" else 1)
    held = buffer.physical_bytes()
    with pytest.raises(DakError):
        buffer.make_ahead(10 * PAGE)
    assert not fake.pending() and buffer.physical_bytes() == held and fake.used(HOST) == 2 * PAGE
    make_all(buffer, 10 * PAGE)
    held, ahead = buffer.physical_bytes(), buffer.ahead_bytes()
    assert ahead == 6 * PAGE
    fake.fail("cuMemMap", after=2, status=1)
    with pytest.raises(DakError):
        buffer.grow(10 * PAGE)
    assert buffer.physical_bytes() == held and buffer.ahead_bytes() == ahead
    creations = fake.calls("cuMemCreate")
    buffer.grow(10 * PAGE)
    assert fake.calls("cuMemCreate") == creations and buffer.ahead_bytes() == 0
    assert not contents(buffer)[: 10 * PAGE].any()


def test_pages_are_cleared_when_they_are_made_and_not_in_the_step(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffer = tier.allocate_growing(8 * PAGE, split=2 * PAGE)
    clears = fake.calls("cuMemsetD8Async")
    make_all(buffer, 8 * PAGE)
    assert fake.calls("cuMemsetD8Async") == clears + 6
    buffer.grow(8 * PAGE)
    assert fake.calls("cuMemsetD8Async") == clears + 7  # the local pages


def test_threads_that_make_grow_and_drop(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffer = tier.allocate_growing(300 * PAGE, split=3 * PAGE)
    done, failures = threading.Event(), []

    def work(what: Any) -> None:
        try:
            while not done.is_set():
                what()
        except BaseException as error:
            failures.append(error)

    tasks = [
        lambda: buffer.make_ahead(min(buffer.nbytes, buffer.committed + 20 * PAGE)),
        lambda: buffer.make_ahead(min(buffer.nbytes, buffer.committed + 9 * PAGE)),
        lambda: (buffer.growth(buffer.committed), buffer.physical_bytes()),
        lambda: (done.wait(0.002), buffer.drop_ahead()),
    ]
    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        for pages in range(1, 301, 7):
            before = buffer.committed
            buffer.grow(pages * PAGE)
            fresh = contents(buffer)[before : buffer.committed : 4096]
            assert not fresh.any()
            fresh.fill_(1)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
    buffer.grow(buffer.nbytes)
    assert bool(contents(buffer)[:before:4096].all())
    assert vmm.drain() and fake.used(HOST) == buffer.physical_bytes().remote == 297 * PAGE


def test_a_cache_in_steady_decode_makes_no_host_page_in_a_step(fake: Any) -> None:
    cache = make_cache()
    step_to(cache, 5 * TOKENS_IN_PAGE)
    assert PAGE_MAKER.wait()
    boundaries = 0
    while cache.tokens < cache.geometry.max_len:
        length = min(cache.geometry.max_len, cache.tokens + 64)
        buffers = [b for layer in cache.layers for b in layer.buffers if b.committed < length * ROW]
        assert not any(buffer.growth(length * ROW).remote for buffer in buffers)
        boundaries += bool(buffers)
        step_to(cache, length)
        assert cache._ahead.held_bytes() <= cache._ahead.bound
        assert PAGE_MAKER.wait()
    assert boundaries > 3 and cache._ahead.held_bytes() == 0
    assert fake.used(HOST) == cache.bytes_by_tier().remote
    assert PAGE_MAKER._thread is None  # nothing grows any more


def test_nothing_is_made_during_a_capture_and_none_is_disturbed(fake: Any) -> None:
    cache = make_cache()
    extension().watch_streams([16])
    try:
        fake.capturing(True)
        forbidden = fake.forbidden()
        cache._ahead.watch(0)
        assert not PAGE_MAKER.wait(0.05)
        assert cache._ahead.held_bytes() == 0 and fake.used(HOST) == 0
        fake.capturing(False)
        assert PAGE_MAKER.wait()
        fake.capturing(True)  # one that opens while a page is in the making
        for layer in cache.layers:
            for buffer in layer.buffers:
                buffer.make_ahead(buffer.nbytes)
        cache.give_back()
        assert vmm.drain()
        assert fake.forbidden() == forbidden
    finally:
        fake.capturing(False)
        extension().watch_streams([])


def test_pages_ahead_give_way_and_count(fake: Any) -> None:
    cache = make_cache(host_memory=30 * PAGE)
    step_to(cache, 4 * TOKENS_IN_PAGE)
    step_to(cache, cache.layers[0].committed - 10)
    assert PAGE_MAKER.wait()
    held, ahead = fake.used(HOST), cache._ahead.held_bytes()
    assert ahead > 0 and held <= 30 * PAGE
    tier = cache.tier
    with pytest.raises(HostMemoryError):
        tier.allocate(31 * PAGE - held + ahead, split=0)
    step_to(cache, cache.layers[0].committed)
    cache._ahead.watch(cache.tokens)
    assert PAGE_MAKER.wait()
    committed = cache.bytes_by_tier().remote
    other = tier.allocate(30 * PAGE - committed, split=0)  # all that is left, pages ahead included
    assert cache._ahead.held_bytes() == 0 and fake.used(HOST) == 30 * PAGE
    with pytest.raises(HostMemoryError, match="the KV cache at"):
        step_to(cache, cache.layers[0].committed + 1)
    del other
    gc.collect()
    step_to(cache, cache.layers[0].committed + 1)


def test_a_failure_in_the_background_is_met_by_the_step_that_needs_the_page(fake: Any) -> None:
    cache = make_cache()
    step_to(cache, 4 * TOKENS_IN_PAGE)
    assert PAGE_MAKER.wait()
    cache.give_back()
    assert vmm.drain()
    committed = cache.layers[0].committed
    fake.capacity(HOST, fake.used(HOST))
    cache._ahead.watch(committed)
    assert PAGE_MAKER.wait() and cache._ahead.held_bytes() == 0
    with pytest.raises(HostMemoryError):
        step_to(cache, committed + 1)
    assert cache.layers[0].committed == committed
    fake.capacity(HOST, 0)
    step_to(cache, committed + 1)


SCRIPT = textwrap.dedent("""
    import os, sys, time
    sys.path.insert(0, {tests!r})
    from cpu.vmm.test_vmm_ahead import *

    def busy():
        cache = make_cache(layers=8, pages=400)
        cache._ahead.watch(0)
        while not cache._ahead.held_bytes():
            time.sleep(0.001)
        return cache

    cache = busy()
    child = os.fork()
    if not child:
        assert PAGE_MAKER._thread is None
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    del cache
    gc.collect()
    assert PAGE_MAKER.wait() and vmm.drain()
    assert "cpu" not in vmm.memory_in_use()
    cache = busy()
    print("end", PAGE_MAKER._thread is not None)
""")


def test_a_process_may_fork_and_end_while_pages_are_made(fake_library: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]))
    environment = {**os.environ, "DAK_LIBCUDA": str(fake_library)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "end True\n", done.stderr
    assert not done.stderr

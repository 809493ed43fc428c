"""Buffers that grow, on the stand-in driver: zeros in front of memory, blocks, failures."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import DakError, DeviceMemoryError, HostMemoryError, TierError

PAGE = 2 << 20
HOST = -1
GPU = torch.device("cuda", 0)
OUT_OF_MEMORY = 2


def contents(buffer: Any) -> torch.Tensor:
    return buffer.tensor(torch.uint8, (buffer.nbytes,))


@pytest.mark.parametrize("remote", ["cpu", "cuda:1"])
@pytest.mark.parametrize("pages", [1, 3, 70, 201, 1030])
def test_pages_come_in_order_and_by_tier(fake: Any, pages: int, remote: str) -> None:
    tier = VmmTier(remote, GPU, None)
    far = HOST if remote == "cpu" else 1
    nbytes = pages * PAGE - 4096
    split = nbytes // 3 // 256 * 256
    buffer = tier.allocate_growing(nbytes, split=split)
    zeros = fake.used(0)
    assert buffer.committed == 0 and buffer.physical_bytes() == TierBytes()
    assert zeros <= (16 + 1) * PAGE and fake.used(far) == 0
    assert int(contents(buffer)[::4096].sum()) == 0  # readable all over
    seen = 0
    for share in (0.01, 0.2, 0.3, 0.5, 0.51, 1.0):
        wanted = int(nbytes * share)
        more = buffer.growth(wanted)
        held = buffer.physical_bytes()
        assert buffer.grow(wanted) == buffer.committed >= max(wanted, seen)
        assert buffer.physical_bytes() == held + more
        assert buffer.committed <= wanted + 17 * PAGE
        fresh = contents(buffer)[seen : buffer.committed]
        assert not fresh.any()
        fresh.fill_(7)
        assert bool((contents(buffer)[: buffer.committed : 997] == 7).all())
        assert int(contents(buffer)[buffer.committed :: 4096].sum()) == 0
        seen = buffer.committed
        held = buffer.bytes_by_tier()
        assert held == TierBytes(min(split, seen), max(0, seen - split))
        assert fake.used(far) == buffer.physical_bytes().remote
        assert fake.used(0) <= buffer.physical_bytes().local + zeros
    assert buffer.committed == nbytes and buffer.physical_bytes() == buffer.claimed_bytes()
    assert vmm.drain() and fake.used(0) == buffer.physical_bytes().local


def test_a_fresh_page_is_zero_even_where_memory_was_used_before(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    first = tier.allocate_growing(8 * PAGE, split=4 * PAGE)
    first.grow(8 * PAGE)
    contents(first).fill_(255)
    del first
    gc.collect()
    assert vmm.drain()
    second = tier.allocate_growing(8 * PAGE, split=4 * PAGE)
    second.grow(8 * PAGE)
    assert not contents(second).any()


def test_moves_of_what_is_committed(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffer = tier.allocate_growing(100 * PAGE, split=60 * PAGE)
    buffer.grow(40 * PAGE)
    data = torch.randint(0, 256, (buffer.committed,), dtype=torch.uint8)
    buffer.write(data)
    committed = buffer.committed
    for split in (20, 90, 0, 100, 30):
        assert buffer.move(split * PAGE) == split * PAGE
        local = min(split * PAGE, committed)
        assert buffer.physical_bytes() == TierBytes(local, committed - local)
        assert torch.equal(contents(buffer)[:committed], data)
        assert int(contents(buffer)[committed::4096].sum()) == 0
    buffer.grow(100 * PAGE)
    assert buffer.physical_bytes() == TierBytes(30 * PAGE, 70 * PAGE)
    assert torch.equal(contents(buffer)[:committed], data)
    view = buffer.remote_view().tensor()
    assert torch.equal(view[: committed - 30 * PAGE], data[30 * PAGE :])


def test_memory_that_is_not_there_is_refused_and_nothing_changes(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, 10 * PAGE)
    buffer = tier.allocate_growing(64 * PAGE, split=8 * PAGE)
    buffer.grow(12 * PAGE)
    held = buffer.physical_bytes()
    with pytest.raises(HostMemoryError, match="the cache needs"):
        tier.check_growth(buffer.growth(20 * PAGE), "the cache")
    tier.check_growth(buffer.growth(18 * PAGE), "the cache")
    assert buffer.physical_bytes() == held
    fake.capacity(HOST, fake.used(HOST) + PAGE)
    with pytest.raises(HostMemoryError):
        buffer.grow(16 * PAGE)
    assert buffer.committed == 12 * PAGE and buffer.physical_bytes() == held
    fake.capacity(0, fake.used(0))
    other = tier.allocate_growing(64 * PAGE, split=64 * PAGE)
    with pytest.raises(DeviceMemoryError):
        other.grow(4 * PAGE)
    assert other.committed == 0 and not contents(other)[::4096].any()


@pytest.mark.parametrize(
    "call", ["cuMemCreate", "cuMemUnmap", "cuMemMap", "cuMemsetD8Async", "cuStreamSynchronize"]
)
def test_a_failure_leaves_the_old_state(fake: Any, call: str) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffer = tier.allocate_growing(40 * PAGE, split=10 * PAGE)
    buffer.grow(6 * PAGE)
    data = torch.randint(0, 256, (buffer.committed,), dtype=torch.uint8)
    buffer.write(data)
    held, committed = buffer.physical_bytes(), buffer.committed
    failed = 0
    for after in range(20):
        fake.fail(call, after=after, status=1)
        try:
            buffer.grow(20 * PAGE)
        except DakError:
            failed += 1
            assert not fake.pending()
            assert buffer.committed == committed and buffer.physical_bytes() == held
            assert torch.equal(contents(buffer)[:committed], data)
            assert int(contents(buffer)[committed::4096].sum()) == 0
        else:
            break
    fake.heal()
    assert failed >= 1 and buffer.committed == 20 * PAGE
    assert torch.equal(contents(buffer)[:committed], data)
    assert not contents(buffer)[committed::4096].any()


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemsetD8Async"])
def test_making_one_may_fail_too(fake: Any, call: str) -> None:
    tier = VmmTier("cpu", GPU, None)
    fake.fail(call, status=1)
    with pytest.raises(DakError):
        tier.allocate_growing(40 * PAGE, split=10 * PAGE)
    assert not fake.pending() and fake.used(0) == 0
    tier.allocate_growing(40 * PAGE, split=10 * PAGE).grow(3 * PAGE)


def test_what_is_not_committed_cannot_be_written(fake: Any, fake_library: Path) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffer = tier.allocate_growing(40 * PAGE, split=10 * PAGE)
    buffer.grow(2 * PAGE)
    with pytest.raises(TierError, match="not all committed"):
        buffer.write(torch.zeros(PAGE, dtype=torch.uint8), 2 * PAGE)
    with pytest.raises(TierError, match="cannot be committed"):
        buffer.grow(41 * PAGE)
    script = textwrap.dedent("""
        import torch
        from dak_inductor.cuda_runtime.vmm import VmmTier
        tier = VmmTier("cpu", torch.device("cuda", 0), None)
        buffer = tier.allocate_growing(20 << 20, split=0)
        everything = buffer.tensor(torch.uint8, (20 << 20,))
        print(int(everything.sum()), flush=True)
        everything[-1] = 1
        print("written", flush=True)
    """)
    environment = {**os.environ, "DAK_LIBCUDA": str(fake_library)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "0\n" and done.returncode < 0  # a fault, as on a GPU


def test_where_reading_alone_cannot_be_granted(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    calls = fake.calls("cuMemSetAccess")
    fake.fail("cuMemSetAccess", after=2, status=1)  # two blocks of zeros are cleared before
    buffer = tier.allocate_growing(100 * PAGE, split=0)
    assert fake.calls("cuMemSetAccess") == calls + 4 and not fake.pending()
    assert not contents(buffer)[::4096].any()


def test_zeros_are_shared(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffers = [tier.allocate_growing(200 * PAGE, split=0) for _ in range(20)]
    assert fake.used(0) == 5 * PAGE and fake.used(HOST) == 0  # one block of 4 pages, one of 1
    del buffers
    gc.collect()
    assert vmm.drain() and fake.used(0) == 0


def test_out_of_host_memory_in_the_middle(fake: Any) -> None:
    tier = VmmTier("cpu", GPU, None)
    buffer = tier.allocate_growing(600 * PAGE, split=0)
    fake.fail("cuMemCreate", after=3, status=OUT_OF_MEMORY, lasting=True)
    with pytest.raises(HostMemoryError):
        buffer.grow(300 * PAGE)
    fake.heal()
    assert vmm.drain() and fake.used(HOST) == 0 and buffer.committed == 0

"""The simulated tier: residency by page, moves as transactions, capacity, lifetime."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier import creation_split
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.errors import (
    DeviceMemoryError,
    HostMemoryError,
    MoveError,
    OptionError,
    StaleViewError,
    TierError,
)


def filled(tier, nbytes, split):
    buffer = tier.allocate(nbytes, split=split)
    contents = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    buffer.write(contents)
    return buffer, contents


@pytest.mark.parametrize("page", [256, 4096, 65536])
def test_a_split_lands_on_a_page_boundary_whatever_it_is(page):
    buffer = open_tier("simulated", page_bytes=page).allocate(300_000, split=123_904)
    assert buffer.split == 123_904
    assert (buffer.address + buffer.split) % page == 0
    assert buffer.bytes_by_tier() == TierBytes(123_904, 176_096)


def test_splits_round_down_to_256_bytes_at_creation():
    tier = SimulatedTier()
    assert tier.allocate(10_000, split=5_000).split == 4_864
    assert tier.allocate(10_000, split=10_000).split == 10_000
    assert tier.allocate(10_000, split=9_999).split == 9_984


@settings(max_examples=200, deadline=None)
@given(
    nbytes=st.integers(1, 40_000),
    first=st.integers(0, 40_000),
    second=st.integers(-10, 50_000),
    page=st.sampled_from([256, 1024, 4096]),
)
def test_moves_keep_contents_address_and_arithmetic(nbytes, first, second, page):
    tier = SimulatedTier(page_bytes=page)
    buffer, contents = filled(tier, nbytes, min(first, nbytes))
    assert buffer.split == creation_split(min(first, nbytes), nbytes)
    assert buffer.physical_bytes() == tier.held_bytes(nbytes, min(first, nbytes))
    address, nearest = buffer.address, buffer.nearest_split(second)
    assert buffer.move(second) == nearest == buffer.split
    assert nearest <= max(second, 0)
    assert min(max(0, second), nbytes) - nearest < page
    assert buffer.address == address
    assert torch.equal(buffer.tensor(torch.uint8, (nbytes,)), contents)
    held, pages = buffer.bytes_by_tier(), buffer.physical_bytes()
    assert held == TierBytes(nearest, nbytes - nearest)
    assert held.local <= pages.local and held.remote <= pages.remote
    assert pages.total - nbytes < 2 * page
    assert tier.counters.held == pages


def test_nearest_split_is_what_a_move_gives_and_loses_less_than_a_page():
    buffer = SimulatedTier(page_bytes=1024).allocate(20_000, split=5_120 + 256)
    for asked in range(0, 20_001, 97):
        assert asked - buffer.nearest_split(asked) < 1024


def test_bytes_in_a_range():
    buffer = SimulatedTier().allocate(10_240, split=4_096)
    assert buffer.bytes_in(0, 10_240) == TierBytes(4_096, 6_144)
    assert buffer.bytes_in(4_000, 4_200) == TierBytes(96, 104)
    assert buffer.bytes_in(5_000, 20_000) == TierBytes(0, 5_240)
    assert buffer.bytes_in(7, 7) == TierBytes(0, 0)


def test_a_failing_move_leaves_the_old_state():
    tier = SimulatedTier()
    buffer, contents = filled(tier, 40_960, 20_480)
    before = (buffer.split, buffer.generation, buffer.physical_bytes(), tier.counters.held)
    tier.inject_failure("page", after=2)
    with pytest.raises(MoveError, match="stays at 20480 of 40960"):
        buffer.move(40_960)
    assert (buffer.split, buffer.generation, buffer.physical_bytes(), tier.counters.held) == before
    assert torch.equal(buffer.tensor(torch.uint8, (40_960,)), contents)
    assert buffer.move(40_960) == 40_960


def test_moves_count_bytes_and_generations():
    tier = SimulatedTier()
    buffer = tier.allocate(40_960, split=40_960)
    buffer.move(20_480)
    assert tier.counters.bytes_moved == 20_480 and buffer.generation == 1
    buffer.move(20_480)
    assert tier.counters.bytes_moved == 20_480 and buffer.generation == 1


def test_a_view_of_remote_bytes_notices_a_move():
    buffer, contents = filled(SimulatedTier(), 40_960, 20_480)
    view = buffer.remote_view()
    assert torch.equal(view.tensor(), contents[20_480:])
    view.tensor()[0] = 7
    assert buffer.tensor(torch.uint8, (40_960,))[20_480] == 7
    buffer.move(0)
    with pytest.raises(StaleViewError, match="remote_view"):
        view.tensor()
    assert buffer.remote_view().tensor().numel() == 40_960


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_tensors_share_memory_in_any_dtype_and_stride(dtype):
    buffer = SimulatedTier().allocate(64 * 32 * dtype.itemsize, split=1024)
    tensor = buffer.tensor(dtype, (64, 32))
    turned = buffer.tensor(dtype, (32, 64), (1, 32))
    tensor.copy_(torch.randn(64, 32).to(dtype))
    assert torch.equal(turned.float(), tensor.float().t())
    assert tensor.data_ptr() == buffer.address
    part = buffer.tensor(dtype, (32,), offset_bytes=32 * dtype.itemsize)
    assert torch.equal(part.float(), tensor[1].float())


def test_tensors_outside_the_buffer_are_refused():
    buffer = SimulatedTier().allocate(1024, split=0)
    with pytest.raises(TierError, match="ends at byte 1028"):
        buffer.tensor(torch.float32, (257,))
    with pytest.raises(TierError, match="not a multiple"):
        buffer.tensor(torch.float32, (1,), offset_bytes=2)
    with pytest.raises(TierError, match="do not fit"):
        buffer.write(torch.zeros(1025, dtype=torch.uint8))


def test_memory_lives_until_the_last_tensor_and_the_buffer_are_gone():
    tier = SimulatedTier()
    buffer = tier.allocate(8_192, split=4_096)
    tensor = buffer.tensor(torch.uint8, (8_192,))[5_000:]
    address = tensor.data_ptr()
    del buffer
    gc.collect()
    assert address_table.lookup(address) is not None
    assert tier.counters.held == TierBytes(4_096, 4_096)
    del tensor
    gc.collect()
    assert address_table.lookup(address) is None
    assert tier.counters.held == TierBytes(0, 0)


def test_capacity_is_checked_before_anything_is_taken():
    tier = SimulatedTier(host_memory=16_384, local_capacity=8_192)
    first = tier.allocate(16_384, split=8_192)
    with pytest.raises(DeviceMemoryError, match="8192 of 8192"):
        tier.allocate(4_096, split=4_096)
    with pytest.raises(HostMemoryError, match="8192 of them being taken"):
        tier.allocate(12_288, split=0)
    with pytest.raises(HostMemoryError):
        tier.reserve(12_288)
    with pytest.raises(MoveError):
        first.move(16_384)
    assert tier.counters.held == TierBytes(8_192, 8_192)
    assert tier.counters.peak_local_bytes == 8_192
    assert first.move(0) == 0


def test_tiers_are_named():
    with pytest.raises(TierError, match='"simulated"'):
        open_tier("disk")
    with pytest.raises(OptionError, match="power of two"):
        SimulatedTier(page_bytes=1000)
    if not torch.cuda.is_available():
        for remote in ("cpu", "cuda:1"):
            with pytest.raises(TierError, match='remote="simulated"'):
                open_tier(remote)

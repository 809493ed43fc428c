"""Addresses to buffers: interior addresses, lifetime, threads, forks."""

import gc
import os
import threading

import pytest
import torch

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.errors import TieredTensorError


def test_every_address_inside_finds_the_buffer_and_none_outside():
    tier = SimulatedTier()
    buffers = [tier.allocate(size, split=0) for size in (1, 5_000, 70_000)]
    for buffer in buffers:
        for offset in (0, buffer.nbytes // 2, buffer.nbytes - 1):
            assert address_table.lookup(buffer.address + offset) is buffer
        assert address_table.lookup(buffer.address - 1) is not buffer
        assert address_table.lookup(buffer.address + buffer.nbytes) is not buffer
    assert address_table.lookup(0) is None


def test_entries_are_weak_and_can_be_forgotten():
    tier = SimulatedTier()
    kept, gone = tier.allocate(4_096, split=0), tier.allocate(4_096, split=0)
    address = gone.address
    del gone
    gc.collect()
    assert address_table.lookup(address) is None
    assert kept in address_table.live_buffers()
    address_table.forget(kept)
    address_table.forget(kept)
    assert address_table.lookup(kept.address) is None


def test_a_plain_tensor_is_not_found():
    assert address_table.lookup(torch.zeros(10_000).data_ptr()) is None


def test_threads_register_and_look_up_at_once():
    tier = SimulatedTier()
    wrong = []

    def work():
        for size in range(1, 200):
            buffer = tier.allocate(size * 64, split=0)
            if address_table.lookup(buffer.address + size) is not buffer:
                wrong.append(size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_cannot_use_cuda_buffers():
    tier = SimulatedTier()
    on_cpu, on_cuda = tier.allocate(4_096, split=0), tier.allocate(4_096, split=0)
    on_cuda.device = torch.device("cuda", 0)  # as a buffer of a real tier says
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            address_table.lookup(on_cuda.address)
            verdict = "no error"
        except TieredTensorError as error:
            verdict = str(error)
        if address_table.lookup(on_cpu.address) is not on_cpu:
            verdict = "the CPU buffer was lost"
        os.write(write, verdict.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    assert "fork" in message and "spawn" in message
    assert address_table.lookup(on_cuda.address) is on_cuda


def test_a_child_of_fork_can_register():
    tier = SimulatedTier()
    child = os.fork()
    if child == 0:
        buffer = tier.allocate(4_096, split=0)
        os._exit(0 if address_table.lookup(buffer.address) is buffer else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("count", [1000])
def test_many_buffers_of_one_tier(count):
    tier = SimulatedTier(page_bytes=256)
    buffers = [tier.allocate(300, split=0) for _ in range(count)]
    assert all(address_table.lookup(b.address + 299) is b for b in buffers)

"""Who keeps tiered memory alive, and when it is given back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch

from dak_inductor.cuda_runtime import address_table, vmm
from dak_inductor.cuda_runtime.host_pages import export_host_pages, import_host_pages
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import StaleViewError, TieredTensorError, TierError

PAGE = 2 << 20
NBYTES = 3 * PAGE
HOST = -1


def tier(remote: str = "cpu") -> VmmTier:
    return VmmTier(remote, torch.device("cuda", 0), None)


def test_memory_goes_with_the_last_tensor_and_the_buffer(fake: Any) -> None:
    buffer = tier().allocate(NBYTES, split=PAGE)
    address = buffer.address
    tensor = buffer.tensor(torch.bfloat16, (4, 8))
    parameter = torch.nn.Parameter(tensor[1:], requires_grad=False)
    del buffer
    gc.collect()
    vmm.drain()
    assert fake.used(0) == PAGE and address_table.lookup(address) is not None
    del tensor
    gc.collect()
    vmm.drain()
    assert fake.used(0) == PAGE
    del parameter
    gc.collect()
    assert vmm.drain()
    assert fake.used(0) == fake.used(HOST) == 0
    assert address_table.lookup(address) is None


@pytest.mark.parametrize("after", range(4))
def test_memory_goes_where_its_context_cannot_be_made_current(fake: Any, after: int) -> None:
    """Pages that are released and not unmapped would stay held, and count as free."""
    buffer = tier().allocate(NBYTES, split=PAGE)
    fake.fail("cuCtxPushCurrent", after)
    del buffer
    gc.collect()
    assert vmm.drain()
    fake.heal()
    assert fake.used(0) == fake.used(HOST) == vmm.live_handles() == 0


def test_tensors_may_die_on_any_thread(fake: Any) -> None:
    own = tier()
    tensors = [own.allocate(PAGE, split=0).tensor(torch.uint8, (PAGE,)) for _ in range(16)]

    def drop(share: list[torch.Tensor]) -> None:
        while share:
            share.pop()

    threads = [threading.Thread(target=drop, args=(tensors[i::4],)) for i in range(4)]
    tensors.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del threads
    gc.collect()
    assert vmm.drain()
    assert vmm.live_handles() == 0


def test_nothing_is_freed_while_a_graph_is_being_captured(fake: Any) -> None:
    from dak_inductor.cuda_runtime.nvrtc import extension

    extension().watch_streams([16])
    buffer = tier().allocate(NBYTES, split=PAGE)
    synchronised = fake.calls("cuCtxSynchronize")
    fake.capturing(True)
    del buffer
    gc.collect()
    assert not vmm.drain(0.2)
    assert fake.used(0) == PAGE
    assert fake.calls("cuCtxSynchronize") == synchronised  # it would break the capture
    fake.capturing(False)
    assert vmm.drain()
    assert fake.used(0) == 0
    extension().watch_streams([])


def test_the_device_is_waited_for_before_memory_is_unmapped(fake: Any) -> None:
    buffer = tier("cuda:1").allocate(NBYTES, split=PAGE)
    before = fake.calls("cuCtxSynchronize")
    del buffer
    gc.collect()
    vmm.drain()
    assert fake.calls("cuCtxSynchronize") >= before + 2  # both devices


def test_a_view_of_remote_bytes_notices_a_move(fake: Any) -> None:
    buffer = tier().allocate(NBYTES, split=PAGE)
    buffer.write(torch.zeros(NBYTES, dtype=torch.uint8))
    view = buffer.remote_view()
    view.tensor()[0] = 5
    assert buffer.tensor(torch.uint8, (1,), offset_bytes=PAGE).item() == 5
    assert view.tensor().numel() == NBYTES - PAGE
    buffer.move(2 * PAGE)
    with pytest.raises(StaleViewError):
        view.tensor()
    assert buffer.remote_view().tensor().numel() == PAGE
    buffer.move(NBYTES)
    assert buffer.remote_view().tensor().numel() == 0


def test_the_range_that_kernels_use_is_never_open_to_the_cpu(fake: Any) -> None:
    buffer = tier().allocate(NBYTES, split=PAGE)
    buffer.write(torch.ones(NBYTES, dtype=torch.uint8))
    vmm.drain()
    assert fake.open_to_cpu() == 0
    held = buffer.remote_view().tensor()
    assert fake.open_to_cpu() == 2 and held.data_ptr() != buffer.address + PAGE
    buffer.move(NBYTES)
    vmm.drain()
    assert int(held.sum()) == 2 * PAGE  # a copy from before the move, and no crash
    del held
    gc.collect()
    vmm.drain()
    assert fake.open_to_cpu() == 0


DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bool,
          torch.complex64, torch.int8, torch.uint16, torch.float64]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_any_dtype_shape_and_offset(fake: Any, dtype: torch.dtype) -> None:
    buffer = tier().allocate(NBYTES, split=PAGE)
    count = NBYTES // dtype.itemsize
    source = torch.randint(0, 2, (count,)).to(dtype)
    buffer.write(source)
    whole = buffer.tensor(dtype, (count // 8, 8))
    assert torch.equal(whole.view(torch.uint8), source.view(count // 8, 8).view(torch.uint8))
    assert whole._base is None and whole.is_contiguous()
    offset = PAGE - 64
    part = buffer.tensor(dtype, (3, 2, 5), (1, 30, 3), offset)
    assert part.data_ptr() == buffer.address + offset
    expected = torch.as_strided(source, (3, 2, 5), (1, 30, 3), offset // dtype.itemsize)
    assert torch.equal(part.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    with pytest.raises(TierError):
        buffer.tensor(dtype, (count + 1,))
    with pytest.raises(TierError):
        buffer.tensor(dtype, (1,), offset_bytes=-dtype.itemsize)


def test_writes_that_do_not_fit_are_refused(fake: Any) -> None:
    buffer = tier().allocate(1000, split=256)
    with pytest.raises(TierError):
        buffer.write(torch.zeros(1001, dtype=torch.uint8))
    with pytest.raises(TierError):
        buffer.write(torch.zeros(8, dtype=torch.uint8), 999)
    with pytest.raises(TierError):
        buffer.write(torch.zeros(4, 4).t())
    empty = tier().allocate(0, split=0)
    assert empty.tensor(torch.uint8, (0,)).numel() == 0
    assert empty.physical_bytes().total == 0


def test_large_writes_go_through_the_pinned_ring(fake: Any) -> None:
    nbytes = 25 * PAGE + 77  # more blocks than the ring has
    buffer = tier().allocate(nbytes, split=nbytes - PAGE - 1)
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
    buffer.write(source)
    assert torch.equal(buffer.tensor(torch.uint8, (nbytes,)), source)
    assert fake.calls("cuMemcpyHtoDAsync") >= 6


def test_host_pages_are_shared_between_processes(fake: Any) -> None:
    own = tier()
    buffer = own.allocate(40 * PAGE, split=PAGE + 512)
    source = torch.randint(0, 255, (buffer.nbytes,), dtype=torch.uint8)
    buffer.write(source)
    files = export_host_pages(buffer)
    assert sum(file.bytes for file in files) == buffer.physical_bytes().remote
    assert files[0].offset == buffer.split
    program = """
        import sys, torch
        from dak_inductor.cuda_runtime.host_pages import HostPageFile, import_host_pages
        from dak_inductor.cuda_runtime.vmm import VmmTier
        files = [HostPageFile(*map(int, f.split(","))) for f in sys.argv[1].split(";")]
        pages = import_host_pages(files, VmmTier("cpu", torch.device("cuda", 0), None))
        tensor = pages.tensor()
        print(int(tensor.sum(dtype=torch.int64)))
        tensor[7] = 99
    """
    argument = ";".join(f"{f.fd},{f.bytes},{f.offset}" for f in files)
    fds = [file.fd for file in files]
    for fd in fds:
        os.set_inheritable(fd, True)
    command = [sys.executable, "-c", textwrap.dedent(program), argument]
    done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held = buffer.remote_view().tensor()
    assert int(done.stdout) == int(source[buffer.split :].sum(dtype=torch.int64))
    assert held[7] == 99

    pages = import_host_pages(files, own)
    assert (pages.start, pages.stop) == (buffer.split, files[-1].offset + files[-1].bytes)
    assert torch.equal(pages.tensor()[: held.numel()], held)
    with pytest.raises(TierError, match="follow"):
        import_host_pages(files[::-1], own)
    for file in files:
        file.close()
    with pytest.raises(TierError):
        export_host_pages(open_tier("simulated").allocate(100, split=0))


def test_a_forked_child_is_refused(fake: Any) -> None:
    own = tier()
    buffer = own.allocate(NBYTES, split=PAGE)
    tensor = buffer.tensor(torch.uint8, (NBYTES,))
    calls = fake.calls()
    child = os.fork()
    if child == 0:
        refused = 0
        attempts = [
            lambda: own.allocate(PAGE, split=0),
            lambda: own.reserve(PAGE),
            lambda: buffer.move(0),
            lambda: buffer.prepare_move(0),
            lambda: buffer.write(torch.zeros(4)),
            lambda: buffer.physical_bytes(),
            lambda: export_host_pages(buffer),
        ]
        for attempt in attempts:
            try:
                attempt()
            except TieredTensorError:
                refused += 1
        del tensor, attempts, buffer
        gc.collect()
        os._exit(0 if refused == 7 and fake.calls() == calls else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(tensor, buffer.tensor(torch.uint8, (NBYTES,)))


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "del buffer, tensor"])
def test_a_process_ends_cleanly_with_tensors_alive(fake: Any, ending: str) -> None:
    program = f"""
        import threading, torch
        from dak_inductor.cuda_runtime.vmm import VmmTier
        tier = VmmTier("cpu", torch.device("cuda", 0), None)
        tier.reserve(1 << 28)
        buffer = tier.allocate(5 << 20, split=2 << 20)
        tensor = buffer.tensor(torch.uint8, (5 << 20,))
        cycle = [tensor]; cycle.append(cycle)
        buffer.prepare_move(0)
        torch.kept_for_ever = buffer.tensor(torch.uint8, (1,))
        {ending}
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

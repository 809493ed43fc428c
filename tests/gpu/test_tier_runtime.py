"""Tiers on a real GPU: torch's own operators, captured graphs and the driver's counts."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest
import torch

from dak_inductor.errors import (
    DeviceMemoryError,
    HostMemoryError,
    StaleViewError,
    TieredTensorError,
    TierError,
)

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from dak_inductor.benchmarks.bench_load import PAGES_AT_ONCE, page_rate
from dak_inductor.cuda_runtime import address_table, vmm
from dak_inductor.cuda_runtime.host_pages import export_host_pages, import_host_pages
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.registered import RegisteredTier
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.cuda_runtime.vmm_buffer import VmmBuffer

PAGE = 2 << 20
GIB = 1 << 30
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.synchronize()
    for tier in vmm._native_tiers.values():
        tier.reserve(0)
    assert vmm.drain(60)
    assert vmm.live_handles() == 0


@pytest.fixture(params=["cpu", pytest.param("cuda:1", marks=pytest.mark.gpus(2))])
def tier(request: pytest.FixtureRequest) -> VmmTier:
    return vmm_tier(request.param)


def vmm_tier(remote: str = "cpu") -> VmmTier:
    opened = open_tier(remote, device=DEVICE)
    if not isinstance(opened, VmmTier):
        pytest.skip("this system refuses host pages (HOST_NUMA)")
    return opened


def random_weight(
    tier: Tier, rows: int, columns: int, local: float
) -> tuple[VmmBuffer, torch.Tensor]:
    """A bf16 weight with a share `local` of its bytes in HBM, and a copy of it."""
    nbytes = rows * columns * 2
    buffer = tier.allocate(nbytes, split=int(nbytes * local))
    assert isinstance(buffer, VmmBuffer)
    expected = torch.randn(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    buffer.write(expected.cpu())
    return buffer, expected


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_every_kind_of_operator_reads_both_tiers(tier: VmmTier) -> None:
    buffer, expected = random_weight(tier, 4096, 2048, 0.37)
    weight = buffer.tensor(torch.bfloat16, (4096, 2048))
    assert weight.device == DEVICE and weight.data_ptr() == buffer.address
    held = buffer.bytes_by_tier()
    assert held.remote > 0 and held.local == int(weight.nbytes * 0.37) // 256 * 256
    x = torch.randn(16, 2048, dtype=torch.bfloat16, device=DEVICE)
    linear = torch.nn.functional.linear
    assert torch.equal(linear(x, weight), linear(x, expected))
    assert same(weight, expected) and same(weight.cpu().to(DEVICE), expected)
    assert torch.equal(weight.float().sum(1), expected.float().sum(1))
    rows = torch.randint(0, 4096, (100,), device=DEVICE)
    assert same(weight[rows], expected[rows])
    weight.add_(1)
    assert same(weight, expected + 1)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    assert parameter.data_ptr() == buffer.address


@pytest.mark.parametrize("local", [0.0, 0.013, 0.5, 1.0])
def test_moves_keep_contents_address_and_accounting(tier: VmmTier, local: float) -> None:
    buffer, expected = random_weight(tier, 28672, 4096, local)  # 235 MB: large handles too
    weight = buffer.tensor(torch.bfloat16, (28672, 4096))
    address = buffer.address
    for share in (0.5, 0.49, 0.0, 1.0, 0.99, 0.3, 0.31, 1.0, local):
        split = buffer.nearest_split(int(buffer.nbytes * share))
        torch.cuda.synchronize()
        assert buffer.move(split) == split
        assert buffer.bytes_by_tier().local == split
        assert weight.data_ptr() == buffer.address == address
        assert same(weight, expected)
        vmm.drain()
        pages = buffer.physical_bytes()
        in_use = vmm.memory_in_use()
        assert in_use.get("cuda:0", 0) == pages.local
        assert in_use.get(tier.name, 0) == pages.remote


def test_a_captured_graph_stays_right_after_moves(tier: VmmTier) -> None:
    buffer, _ = random_weight(tier, 8192, 8192, 0.8)
    weight = buffer.tensor(torch.bfloat16, (8192, 8192))
    x = torch.randn(8, 8192, dtype=torch.bfloat16, device=DEVICE)
    torch.nn.functional.linear(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch.nn.functional.linear(x, weight)
    graph.replay()
    torch.cuda.synchronize()
    expected = output.clone()
    for share in (0.1, 0.9, 0.0, 1.0, 0.5):
        buffer.move(int(buffer.nbytes * share))
        output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)
    weight.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(output, expected)


@pytest.mark.alone
@pytest.mark.host
def test_moving_one_gibibyte_is_short_when_prepared() -> None:
    tier = vmm_tier()
    buffer = tier.allocate(2 * GIB, split=2 * GIB)
    tensor = buffer.tensor(torch.int64, (2 * GIB // 8,))
    torch.arange(tensor.numel(), out=tensor)
    pauses = []
    for split in (GIB, 2 * GIB, GIB, 2 * GIB, GIB, 2 * GIB):
        buffer.prepare_move(split).wait()
        torch.cuda.synchronize()
        vmm.drain()
        start = time.perf_counter()
        buffer.move(split)
        pauses.append(time.perf_counter() - start)
        times = buffer.last_move
        print(
            f"pause {pauses[-1] * 1e3:.1f} ms: prepare {times.prepare_seconds * 1e3:.1f}, "
            f"copy {times.copy_seconds * 1e3:.1f}, remap {times.remap_seconds * 1e3:.1f}, "
            f"release {times.release_seconds * 1e3:.1f}, {times.bytes_copied / GIB:.3f} GiB"
        )
        assert times.prepared_ahead
        assert bool((tensor[1:] - tensor[:-1] == 1).all()) and int(tensor[0]) == 0
    assert sorted(pauses)[len(pauses) // 2] < 0.080


def test_host_memory_taken_is_what_was_asked() -> None:
    tier = vmm_tier()
    sizes = [PAGE - 256, 5 * PAGE + 512, 100 * PAGE, 300 * PAGE + 1024]
    buffers = [tier.allocate(size, split=size // 3) for size in sizes]
    remote = sum(buffer.bytes_by_tier().remote for buffer in buffers)
    taken = vmm.memory_in_use()["cpu"]
    assert remote <= taken <= remote + PAGE * len(buffers)


@pytest.mark.alone
def test_the_driver_counts_memory_as_free_after_the_last_tensor() -> None:
    tier = vmm_tier()
    tier.allocate(PAGE, split=PAGE)
    vmm.drain()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    buffer = tier.allocate(512 * PAGE, split=256 * PAGE)
    tensor = buffer.tensor(torch.uint8, (512 * PAGE,))
    del buffer
    during, _ = torch.cuda.mem_get_info()
    assert before - during >= 256 * PAGE
    tensor.fill_(3)
    del tensor  # with the kernel still queued
    gc.collect()
    assert vmm.drain(60)
    after, _ = torch.cuda.mem_get_info()
    assert abs(after - before) <= 8 * PAGE
    torch.cuda.synchronize()


def test_memory_given_up_during_a_capture_is_freed_after_it() -> None:
    tier = vmm_tier()
    buffer = tier.allocate(64 * PAGE, split=32 * PAGE)
    x = torch.ones(1000, device=DEVICE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        del buffer
        gc.collect()
        assert not vmm.drain(0.3)
        y = y + 1
    graph.replay()
    torch.cuda.synchronize()
    assert bool((y == 3).all())
    assert vmm.drain(60)
    assert vmm.live_handles() == 0


def test_the_cpu_reads_and_writes_the_remote_part_in_place() -> None:
    tier = vmm_tier()
    buffer, expected = random_weight(tier, 1024, 4096, 0.25)
    view = buffer.remote_view()
    cpu = view.tensor()
    assert cpu.device.type == "cpu" and cpu.numel() == buffer.nbytes - buffer.split
    flat = expected.reshape(-1).view(torch.uint8)
    assert torch.equal(cpu, flat[buffer.split :].cpu())
    cpu[:16] = 7
    on_gpu = buffer.tensor(torch.uint8, (buffer.nbytes,))
    assert bool((on_gpu[buffer.split : buffer.split + 16] == 7).all())
    del cpu
    buffer.move(0)
    with pytest.raises(StaleViewError):
        view.tensor()


def test_writes_of_every_kind(tier: VmmTier) -> None:
    nbytes = 40 * PAGE + 4096
    buffer = tier.allocate(nbytes, split=17 * PAGE + 512)
    whole = buffer.tensor(torch.uint8, (nbytes,))
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
    for sent in (source, source.pin_memory(), source.to(DEVICE)):
        whole.zero_()
        buffer.write(sent)
        assert torch.equal(whole.cpu(), source)
    buffer.write(source[:1000], buffer.split - 500)
    expected = source.clone()
    expected[buffer.split - 500 : buffer.split + 500] = source[:1000]
    assert torch.equal(whole.cpu(), expected)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.complex64, torch.bool):
        part = buffer.tensor(dtype, (3, 5), (7, 1), buffer.split - 32)
        assert part.dtype == dtype and part.data_ptr() == buffer.address + buffer.split - 32


@pytest.mark.alone
@pytest.mark.host
def test_loading_rate_into_host_pages() -> None:
    """Pages are mapped and filled while the driver makes the next: a load takes little longer than
    making its pages and nothing else, at that time. One after the other it takes nearly twice as
    long. 5 GB/s is what `bench_load` holds it to; what a driver reaches depends on the machine."""
    tier = vmm_tier()
    source = torch.randint(0, 255, (PAGES_AT_ONCE,), dtype=torch.uint8)
    total = 8 * GIB
    rates = []
    for _ in range(4):  # the first also makes the machine give the memory
        start = time.perf_counter()
        buffers = []
        for buffer in tier.allocate_each([(source.numel(), 0)] * (total // source.numel())):
            buffer.write(source)
            buffers.append(buffer)
        loaded = total / (time.perf_counter() - start) / 1e9
        assert torch.equal(buffers[-1].tensor(torch.uint8, (source.numel(),)).cpu(), source)
        buffers.clear()
        del buffer
        gc.collect()
        vmm.drain(60)
        rates.append((loaded, page_rate(tier, total) / 1e9))
    print(f"loading into the host tier, and making the pages alone, GB/s: {rates}")
    if (os.cpu_count() or 1) >= 16:
        assert any(loaded >= 0.8 * alone for loaded, alone in rates[1:])


def test_more_than_there_is_is_refused() -> None:
    tier = vmm_tier()
    with pytest.raises(HostMemoryError):
        tier.allocate(1 << 50, split=0)
    with pytest.raises(DeviceMemoryError):
        tier.allocate(1 << 50, split=1 << 50)
    with pytest.raises(TierError):
        open_tier(f"cuda:{torch.cuda.device_count()}", device=DEVICE)
    assert vmm.live_handles() == 0


def test_host_pages_are_shared_with_another_process() -> None:
    tier = vmm_tier()
    buffer = tier.allocate(50 * PAGE, split=10 * PAGE + 256)
    source = torch.randint(0, 255, (buffer.nbytes,), dtype=torch.uint8)
    buffer.write(source)
    files = export_host_pages(buffer)
    program = """
        import sys, torch
        from dak_inductor.cuda_runtime.host_pages import HostPageFile, import_host_pages
        from dak_inductor.cuda_runtime.tiers import open_tier
        files = [HostPageFile(*map(int, f.split(","))) for f in sys.argv[1].split(";")]
        pages = import_host_pages(files, open_tier("cpu"))
        on_gpu = pages.tensor("cuda")
        print(int(pages.tensor().sum(dtype=torch.int64)), int(on_gpu.sum(dtype=torch.int64)))
        on_gpu[7] = 99
        torch.cuda.synchronize()
    """
    for file in files:
        os.set_inheritable(file.fd, True)
    argument = ";".join(f"{f.fd},{f.bytes},{f.offset}" for f in files)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), argument],
        pass_fds=[file.fd for file in files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    remote = buffer.remote_view().tensor()
    expected = int(source[buffer.split :].sum(dtype=torch.int64))
    assert [int(word) for word in done.stdout.split()] == [expected, expected]
    assert remote[7] == 99
    pages = import_host_pages(files, tier)
    assert torch.equal(pages.tensor()[: remote.numel()], remote)
    for file in files:
        file.close()


def test_a_forked_child_is_refused() -> None:
    buffer = vmm_tier().allocate(4 * PAGE, split=PAGE)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            buffer.move(0)
        except TieredTensorError:
            try:
                address_table.lookup(buffer.address)
            except TieredTensorError:
                status = 0
        os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_process_ends_cleanly_with_tensors_alive() -> None:
    program = """
        import torch
        from dak_inductor.cuda_runtime.tiers import open_tier
        tier = open_tier("cpu")
        tier.reserve(1 << 30)
        buffer = tier.allocate(64 << 20, split=32 << 20)
        torch.kept_for_ever = buffer.tensor(torch.uint8, (64 << 20,)).fill_(1)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def test_registered_memory_serves_the_same_operators() -> None:
    tier = RegisteredTier(DEVICE)
    expected = torch.randn(2048, 2048, dtype=torch.bfloat16)
    x = torch.randn(4, 2048, dtype=torch.bfloat16, device=DEVICE)
    for split in (0, expected.nbytes):
        buffer = tier.allocate(expected.nbytes, split=split)
        buffer.write(expected)
        weight = buffer.tensor(torch.bfloat16, (2048, 2048))
        assert weight.device == DEVICE
        result = torch.nn.functional.linear(x, weight)
        assert torch.equal(result, torch.nn.functional.linear(x, expected.to(DEVICE)))
        assert buffer.move(1024) == split
        assert buffer.remote_view().tensor().numel() == expected.nbytes - split
    del buffer, weight
    gc.collect()
    assert vmm.drain(60)
    assert "cpu" not in vmm.memory_in_use()


def test_the_extension_has_no_link_to_cuda_or_torch() -> None:
    path = extension().__file__
    assert path is not None
    needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "libtorch" not in needed and "nvrtc" not in needed

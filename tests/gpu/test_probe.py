"""The probe and its kernels on a Hopper card: every byte is counted, figures are plausible."""

import time

import pytest
import torch

from dak_inductor import hardware
from dak_inductor.cuda_runtime import streaming
from dak_inductor.cuda_runtime.kernel import load
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.streaming import Part
from dak_inductor.errors import DriverError
from dak_inductor.probe import _remote_buffer, probe, render
from dak_inductor.probe_link import Range, copy, copy_rate, graph_of, median_rates

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs compute capability 9.0 (bulk copies)", allow_module_level=True)

pytestmark = pytest.mark.alone

DEVICE = torch.device("cuda", 0)
MIB = 2**20
PIECE = 8192


def random_bytes(nbytes, device):
    words = torch.randint(-(2**62), 2**62, (nbytes // 8,), device=device)
    found = words.view(torch.uint8)
    return found.pin_memory() if device == "cpu" else found


def word_sum(tensor):
    return int(tensor.view(torch.int32).sum(dtype=torch.int64)) % 2**32


def part(tensor, ctas, stages, piece=PIECE):
    return Part(tensor.data_ptr(), tensor.nbytes, ctas, stages, piece)


@pytest.fixture(scope="module")
def host():
    return random_bytes(64 * MIB, "cpu")


@pytest.fixture(scope="module")
def device_memory():
    return random_bytes(256 * MIB, DEVICE)


@pytest.mark.parametrize("stages", [1, 3, 16])
def test_every_word_of_both_parts_arrives(host, device_memory, stages):
    sums = streaming.stream_checksum(
        DEVICE, part(host, 16, stages), part(device_memory, 100, 8, 16384)
    )
    assert sums.remote_bytes == host.nbytes
    assert sums.local_bytes == device_memory.nbytes
    assert sums.checksum == (word_sum(host) + word_sum(device_memory)) % 2**32


def test_one_changed_byte_changes_the_checksum(host):
    before = streaming.stream_checksum(DEVICE, part(host, 16, 4), None).checksum
    host[-1] += 1
    after = streaming.stream_checksum(DEVICE, part(host, 16, 4), None).checksum
    assert after != before
    assert after == word_sum(host)


def test_a_range_that_ctas_do_not_divide(host):
    odd = host[: 37 * PIECE]
    sums = streaming.stream_checksum(DEVICE, part(odd, 16, 4), None)
    assert (sums.remote_bytes, sums.checksum) == (odd.nbytes, word_sum(odd))


def test_rates_follow_the_window(host, device_memory):
    narrow = median_rates(DEVICE, part(host, 1, 1), None).remote
    wide = median_rates(DEVICE, part(host, 16, 8), None).remote
    # one piece at a time is bound by the round trip
    assert narrow < wide / 4
    assert wide > 10e9
    both = median_rates(DEVICE, part(host, 16, 2), part(device_memory, 100, 8, 16384))
    assert both.remote > 10e9 and both.local > 1e12


def test_timed_kernel_runs_as_long_as_asked(device_memory):
    counters = streaming.stream_async(DEVICE, None, part(device_memory, 8, 4), seconds=0.005).cpu()
    lengths = (counters[:, 2] - counters[:, 1]).double() * 1e-9
    assert torch.all((lengths >= 0.005) & (lengths < 0.006))
    assert torch.all(counters[:, 0] > 0)
    assert torch.all(counters[:, 0] % PIECE == 0)


def test_writes_reach_the_range():
    buffer = torch.full((16 * MIB,), 255, dtype=torch.uint8).pin_memory()
    rate = streaming.write_rate(DEVICE, part(buffer, 8, 1), seconds=0.01)
    torch.cuda.synchronize()
    assert rate > 10e9
    assert int(buffer.count_nonzero()) == 0


def test_round_trip_is_longer_to_the_host(host, device_memory):
    there = streaming.round_trip(DEVICE, host.data_ptr(), stride=4224, loads=4096)
    here = streaming.round_trip(DEVICE, device_memory.data_ptr(), stride=4224, loads=4096)
    assert 0.1e-6 < here < there < 20e-6


def test_copies_move_bytes(host):
    target = torch.zeros(host.nbytes, dtype=torch.uint8, device=DEVICE)
    copy(DEVICE, target.data_ptr(), host.data_ptr(), host.nbytes)
    torch.cuda.synchronize()
    assert torch.equal(target.cpu(), host)
    target.zero_()
    piecewise = copy_rate(DEVICE, target.data_ptr(), host.data_ptr(), host.nbytes, piece=4 * MIB)
    torch.cuda.synchronize()
    assert torch.equal(target.cpu(), host)
    assert piecewise > 10e9


def test_kernel_in_a_cuda_graph(host):
    counters = torch.zeros((16, 4), dtype=torch.int64, device=DEVICE)
    kernel = load(streaming.STREAM_CHECKSUM, 0)
    remote = part(host, 16, 4)
    arguments = streaming.pack_read(remote, None, counters.data_ptr(), 0)
    kernel.prepare(shared_bytes=remote.shared_bytes)

    def launch():
        kernel.launch(
            grid=(16, 1, 1),
            block=(streaming.THREADS, 1, 1),
            arguments=[arguments],
            shared_bytes=remote.shared_bytes,
        )

    replay = graph_of(DEVICE, launch)
    assert int(counters.abs().sum()) == 0  # captured, not run
    replay()
    torch.cuda.synchronize()
    assert int(counters[:, 0].sum()) == host.nbytes
    assert int(counters[:, 3].sum()) % 2**32 == word_sum(host)


def test_launches_are_checked(device_memory):
    kernel = load(streaming.STREAM_READ, 0)
    block = (streaming.THREADS, 1, 1)
    if kernel.function.parameter_sizes:
        assert kernel.function.parameter_sizes == [64]
        with pytest.raises(ValueError, match=r"\( 64 \) bytes, got \( 63 \)"):
            kernel.launch(grid=(1, 1, 1), block=block, arguments=[bytes(63)])
    with pytest.raises(ValueError, match="clusters of 2"):
        kernel.launch(grid=(3, 1, 1), block=block, arguments=[bytes(64)], cluster=(2, 1, 1))
    with pytest.raises(DriverError, match="cuFuncSetAttribute"):
        kernel.launch(grid=(1, 1, 1), block=block, arguments=[bytes(64)], shared_bytes=2**20)
    with pytest.raises(ValueError, match="single wave"):
        streaming.stream_rates(DEVICE, None, part(device_memory, 2000, 1), seconds=1e-3)
    assert kernel.function.local_bytes == 0
    assert 0 < kernel.function.registers <= 64


def test_clusters_fit():
    kernel = load(streaming.STREAM_READ, 0)
    block = (streaming.THREADS, 1, 1)
    pairs = kernel.maximum_active_clusters(block=block, shared_bytes=200_000, cluster=(2, 1, 1))
    sixteens = kernel.maximum_active_clusters(block=block, shared_bytes=200_000, cluster=(16, 1, 1))
    assert pairs > sixteens >= 1


def test_tensor_map():
    weight = torch.empty((512, 256), dtype=torch.bfloat16, device=DEVICE)

    def encode(address):
        return extension().encode_tensor_map(
            address=address, data_type=9, shape=[256, 512], strides=[512], box=[64, 128], swizzle=3
        )

    assert len(encode(weight.data_ptr())) == 128 and any(encode(weight.data_ptr()))
    with pytest.raises(DriverError, match="cuTensorMapEncodeTiled"):
        encode(weight.data_ptr() + 2)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DAK_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        start = time.monotonic()
        found = probe(DEVICE)
        seconds = time.monotonic() - start
        assert hardware.current(DEVICE) == found
    assert seconds < 60
    return found


def test_probe_is_plausible(profile):
    cpu = profile.link("cpu")
    assert profile.hbm_bandwidth > 1e12
    assert profile.matmul_flops["bfloat16"] > 1e14
    assert 0.3e-6 < profile.operator_floor < 20e-6
    assert cpu.copy_bandwidth > 10e9
    assert 0.7 * cpu.copy_bandwidth < cpu.direct_bandwidth < 1.2 * cpu.copy_bandwidth
    assert 0.5 * cpu.copy_bandwidth < cpu.piece_copy_bandwidth < 1.1 * cpu.copy_bandwidth
    assert 0.3e-6 < cpu.latency < 20e-6
    assert 0.5 * cpu.direct_bandwidth * cpu.latency < cpu.window_floor < 2e6
    assert cpu.window_floor <= cpu.window_knee < 9e6
    assert cpu.direct_bandwidth < profile.hbm_bandwidth / 2
    assert cpu.copy_interference < 20


def test_probe_of_an_h200(profile):
    if not profile.gpu.startswith("NVIDIA H200") or profile.sm_count != 132:
        pytest.skip(f"needs a whole H200, this is {profile.gpu}")
    shipped = hardware.load("h200")
    assert profile.hbm_bandwidth == pytest.approx(shipped.hbm_bandwidth, rel=0.1)
    assert profile.matmul_flops["bfloat16"] > 600e12
    if profile.link("cpu").copy_bandwidth < 50e9:
        pytest.skip("the PCIe link is not Gen5 x16 or not idle")
    assert profile.link("cpu").direct_bandwidth == pytest.approx(51.4e9, rel=0.1)


def test_profile_is_shown_and_says_where_it_is_from(profile):
    assert profile.gpu in profile.provenance and "driver" in profile.provenance
    assert render(profile).row_count > 10


@pytest.mark.gpus(2)
def test_peers(profile):
    peer = profile.link("cuda:1")
    assert peer.direct_bandwidth > profile.link("cpu").direct_bandwidth
    assert 0.7 * peer.copy_bandwidth < peer.direct_bandwidth


@pytest.mark.gpus(2)
def test_peer_bytes_arrive():
    with _remote_buffer(DEVICE, "cuda:1") as remote:
        assert isinstance(remote, Range)
        whole = Part(remote.address, 64 * MIB, 16, 8, PIECE)
        pattern = random_bytes(64 * MIB, DEVICE)
        copy(DEVICE, remote.address, pattern.data_ptr(), pattern.nbytes)
        sums = streaming.stream_checksum(DEVICE, whole, None)
    assert (sums.remote_bytes, sums.checksum) == (pattern.nbytes, word_sum(pattern))

"""The probe without a GPU: packing, windows, a modelled link, the table, and what it refuses."""

import dataclasses
import io
import math
import struct

import pytest
import torch

from dak_inductor import hardware, probe, probe_link
from dak_inductor.cuda_runtime import streaming
from dak_inductor.cuda_runtime.streaming import Part, StreamRates
from dak_inductor.errors import TierError, UnsupportedDriverError
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.probe_link import Range, WindowRates, window_limits

GIB = 2**30
REMOTE, LOCAL = Range(0x1000, GIB), Range(0x9_0000_0000, 2 * GIB)


def test_arguments_are_packed_as_the_kernels_read_them():
    remote, local = Part(0x1000, 65536, 2, 4, 8192), Part(0x2000, 65536, 3, 8, 16384)
    packed = streaming.pack_read(remote, local, 0x3000, 5)
    # as in the static_assert of stream_read.cu
    assert len(packed) == 64
    assert struct.unpack("<QIIIIQIIIIQQ", packed) == (
        *(0x1000, 8192, 8, 4, 2),
        *(0x2000, 16384, 4, 8, 3),
        *(0x3000, 5),
    )
    assert streaming.pack_read(None, local, 0, 0)[:24] == bytes(24)
    assert streaming._WRITE.size == streaming._ROUND_TRIP.size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 65536, 1, 1, 8192), "multiples of 16"),
        ((0, 65536, 1, 1, 8200), "multiples of 16"),
        ((0, 65536, 1, 1, 0), "multiples of 16"),
        ((0, 65536, 1, 33, 8192), "33 stages: 1 to 32"),
        ((0, 65536, 9, 1, 8192), "9 CTAs for 8 pieces"),
        ((0, 65536, 0, 1, 8192), "0 CTAs"),
    ],
)
def test_parts_that_cannot_run_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Part(*arguments)


def test_rates_from_counters():
    part = Part(0, 65536, 2, 1, 8192)
    epoch = 1_760_000_000_000_000_000  # globaltimer counts from 1970: doubles would round it
    counters = torch.tensor(
        [[1000, epoch, epoch + 100, 0], [2000, epoch, epoch + 100, 0], [8000, epoch, epoch + 50, 0]]
    )
    found = streaming.rates(counters, part, Part(0, 65536, 1, 1, 8192))
    assert found == StreamRates(remote=pytest.approx(30e9), local=pytest.approx(160e9))
    assert streaming.rates(counters[:2], part, None).local == 0


def rows(*figures):
    return [WindowRates(window, remote, local, 100.0) for window, remote, local in figures]


def test_floor_and_knee():
    sweep = rows((1, 30, 100), (2, 49.1, 100), (4, 50, 98.5), (8, 50, 97), (16, 50, 10))
    limits = window_limits(sweep)
    assert (limits.floor, limits.knee, limits.knee_seen) == (2, 4, True)
    assert window_limits(list(reversed(sweep))) == limits


def test_a_lucky_window_past_the_knee_does_not_count():
    limits = window_limits(rows((1, 50, 100), (2, 50, 90), (4, 50, 99)))
    assert (limits.knee, limits.knee_seen) == (1, True)


def test_no_knee_is_said():
    limits = window_limits(rows((1, 50, 100), (2, 50, 99)))
    assert (limits.floor, limits.knee, limits.knee_seen) == (1, 2, False)


class ModelledMachine:
    """A GPU by formula: the link fills by Little's law, HBM starves past a window."""

    link, hbm, latency, knee = 50e9, 4600e9, 2.4e-6, 700_000
    copy, write, lost = 55e9, 52e9, 5.0

    def stream_rates(self, device, remote, local, *, seconds):
        found = self.hbm if local else 0.0
        if remote is None:
            return StreamRates(0.0, found)
        starved = 0.2 if remote.window > self.knee else 1.0
        return StreamRates(min(self.link, remote.window / self.latency), found * starved)


@pytest.fixture
def machine(monkeypatch):
    machine = ModelledMachine()
    monkeypatch.setattr(probe_link, "stream_rates", machine.stream_rates)
    monkeypatch.setattr(probe_link, "round_trip", lambda *_, **__: machine.latency)
    monkeypatch.setattr(probe_link, "write_rate", lambda *_, **__: machine.write)
    monkeypatch.setattr(probe_link, "copy_rate", lambda *_, **__: machine.copy)
    monkeypatch.setattr(probe_link, "interference", lambda *_, **__: machine.lost)
    return machine


def test_a_link_is_measured(machine):
    link = probe_link.measure_link(torch.device("cuda", 0), "cpu", REMOTE, LOCAL, 132, "modelled")
    assert link.direct_bandwidth == machine.link
    assert (link.copy_bandwidth, link.write_bandwidth) == (machine.copy, machine.write)
    assert (link.latency, link.copy_interference) == (machine.latency, machine.lost)
    # 0.12 MB fills the link, and the windows tried step over that and the knee
    product = machine.link * machine.latency
    assert product * 0.98 <= link.window_floor <= 2 * product
    assert machine.knee / 2 <= link.window_knee <= machine.knee
    assert link.provenance == "modelled"


def test_a_link_without_knee_says_so(machine):
    machine.knee = math.inf
    link = probe_link.measure_link(torch.device("cuda", 0), "peer", REMOTE, LOCAL, 132, "modelled")
    assert link.window_knee == 48 * 24 * 8192
    assert "no knee up to 9.4 MB" in link.provenance


@pytest.mark.parametrize("sm_count", [16, 84, 132, 188])
def test_sweep_leaves_half_of_the_gpu_to_hbm(machine, sm_count):
    sweep = probe_link.sweep_windows(torch.device("cuda", 0), REMOTE, LOCAL, sm_count)
    windows = [row.window for row in sweep]
    assert windows == sorted(set(windows))
    assert len(windows) >= 1


def test_slowest_peer_stands_for_all():
    h200 = hardware.load("h200")
    cpu, peer = h200.link("cpu"), h200.link("cuda:1")
    slow = dataclasses.replace(peer, direct_bandwidth=100e9)
    links = [("cpu", cpu), ("cuda:1", peer), ("cuda:2", slow)]
    assert probe.slowest_by_tier(links) == {"cpu": cpu, "peer": slow}
    words = probe.describe_links(links)
    assert "cuda:1 376.0 GB/s" in words and "cuda:2 100.0 GB/s" in words


@pytest.mark.parametrize("name", hardware.shipped())
def test_table_shows_every_link(name):
    from rich.console import Console

    profile = hardware.load(name)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(probe.render(profile))
    text = console.export_text()
    assert profile.gpu in text
    for tier, link in profile.links.items():
        assert f"{tier}: direct reads" in text
        assert f"{link.direct_bandwidth / 1e9:.1f}" in text
    # what is not known is left out, not shown as nought
    assert ("copy engine out" in text) == any(k.copy_out_bandwidth for k in profile.links.values())
    if name == "h200":
        assert "1.1" in text and "7.5" in text  # the balance points


def test_driver_version(tmp_path):
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    assert probe._driver_version(path) == "580.65.06"
    assert probe._driver_version(tmp_path / "none") == "unknown"


def test_without_gpu_the_probe_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedDriverError, match=r"nvidia-smi.*dak plan --hardware h200"):
        probe.probe()


@pytest.fixture
def three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # GPU 2 is in another root complex
    monkeypatch.setattr(
        torch.cuda, "can_device_access_peer", lambda a, b: 2 not in (a.index, b.index)
    )


def test_remotes_are_the_cpu_and_the_peers_in_reach(three_gpus):
    assert probe._remotes(torch.device("cuda", 0), None) == ("cpu", "cuda:1")
    assert probe._remotes(torch.device("cuda", 1), None) == ("cpu", "cuda:0")
    assert probe._remotes(torch.device("cuda", 0), "cpu") == ("cpu",)
    assert probe._remotes(torch.device("cuda", 0), ["cuda:1", "cuda:1"]) == ("cuda:1",)


@pytest.mark.parametrize("name", ["disk", "simulated", "cuda:0", "cuda:2", "cuda:7"])
def test_remotes_that_cannot_be_measured(three_gpus, name):
    with pytest.raises(TierError, match=rf"'{name}' cannot be measured.*cpu, cuda:1"):
        probe.probe("cuda:0", remotes=[name])


def test_devices_that_are_no_gpu(three_gpus):
    with pytest.raises(TierError, match="cpu is none"):
        probe.probe("cpu")
    with pytest.raises(TierError, match=r"no cuda:5.*3 GPUs"):
        probe.probe("cuda:5")


def test_profile_of_a_probe_is_saved_and_used(three_gpus, monkeypatch, tmp_path):
    """The whole of `probe` with the measurements replaced."""
    from types import SimpleNamespace

    properties = SimpleNamespace(
        name="NVIDIA H200", uuid="GPU-1", multi_processor_count=132, total_memory=150_000_000_000
    )
    h200 = hardware.load("h200")
    measured = HardwareProfile(
        name="measured",
        gpu=properties.name,
        sm_count=132,
        memory_bytes=properties.total_memory,
        hbm_bandwidth=4000e9,
        matmul_flops=h200.matmul_flops,
        operator_floor=1e-6,
        links=h200.links,
        provenance="measured",
    )
    monkeypatch.delenv("DAK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(probe, "extension", lambda: None)
    monkeypatch.setattr(probe, "architecture", lambda index: "sm_90a")
    monkeypatch.setattr(probe, "_measure", lambda device, remotes: measured)
    assert hardware.current(0).name == "h200"
    assert probe.probe(0) == measured
    assert hardware.current(0) == measured

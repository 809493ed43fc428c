"""Which profile a GPU gets: what is shipped, what was measured and is kept, guesses."""

import dataclasses
import os
import warnings

import pytest

from dak_inductor import hardware
from dak_inductor.errors import ProfileError
from dak_inductor.hardware_profile import HardwareProfile

H200 = {"sm_count": 132, "memory_bytes": 150_754_820_096}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("DAK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hardware._warn_once.cache_clear()
    return tmp_path / "dak_inductor"


def test_shipped_profiles():
    assert hardware.shipped() == ("gh200", "h200", "rtx-pro-6000")
    for name in hardware.shipped():
        assert hardware.load(name).name == name
    assert set(hardware.load("h200").links) == {"cpu", "peer"}
    for name in ("gh200", "rtx-pro-6000"):
        profile = hardware.load(name)
        assert "published, not measured" in profile.provenance
        assert all("published, not measured" in link.provenance for link in profile.links.values())


def test_h200_is_the_measured_machine():
    profile = hardware.load("h200")
    cpu, peer = profile.link("cpu"), profile.link("cuda:1")
    assert (profile.hbm_bandwidth, profile.sm_count) == (4620e9, 132)
    assert (cpu.direct_bandwidth, cpu.copy_bandwidth, cpu.write_bandwidth) == (
        51.4e9,
        55.6e9,
        52.7e9,
    )
    assert (peer.direct_bandwidth, peer.copy_bandwidth) == (376e9, 397e9)
    # a window must hold the bandwidth-delay product, and stay below the knee
    for link in (cpu, peer):
        assert link.direct_bandwidth * link.latency < link.window_floor < link.window_knee
    # the balance points that the design quotes
    for link, balance in ((cpu, 0.011), (peer, 0.075)):
        rate = link.direct_bandwidth
        assert rate / (rate + profile.hbm_bandwidth) == pytest.approx(balance, abs=1e-3)


def test_unknown_profile_names_the_known_ones(tmp_path):
    with pytest.raises(
        ProfileError, match=r"no hardware profile 'h100'.*gh200, h200, rtx-pro-6000"
    ):
        hardware.load("h100")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="cannot be read"):
        hardware.load(binary)


def test_without_gpu_it_is_h200(cache):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert hardware.current() == hardware.current("cuda:0") == hardware.load("h200")


@pytest.mark.parametrize(
    ("gpu", "sm_count", "name"),
    [
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA GH200 480GB", 132, "gh200"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, "rtx-pro-6000"),
    ],
)
def test_shipped_profile_by_gpu_name(cache, gpu, sm_count, name):
    assert hardware.for_gpu(gpu, "u", sm_count=sm_count, memory_bytes=10**11).name == name


def test_unknown_gpu_gets_a_guess_and_one_warning(cache):
    with pytest.warns(UserWarning, match="no hardware profile for NVIDIA H200 MIG 1g"):
        profile = hardware.for_gpu("NVIDIA H200 MIG 1g.18gb", "u", sm_count=16, memory_bytes=10**10)
    assert (profile.name, profile.sm_count, profile.memory_bytes) == ("generic", 16, 10**10)
    assert HardwareProfile.from_json(profile.to_json()) == profile
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hardware.for_gpu("NVIDIA H200 MIG 1g.18gb", "u", sm_count=16, memory_bytes=10**10)


def test_measured_profile_wins_for_its_own_card(cache):
    measured = dataclasses.replace(hardware.load("h200"), name="measured", hbm_bandwidth=4000e9)
    path = hardware.save(measured, "GPU-1")
    assert path is not None and path.parent == cache / "profiles"
    assert os.stat(path.parent).st_mode & 0o777 == 0o700
    assert "GPU-1" not in path.name  # the UUID identifies a machine; only its hash is kept
    assert hardware.for_gpu("NVIDIA H200", "GPU-1", **H200) == measured
    assert hardware.for_gpu("NVIDIA H200", "GPU-2", **H200).name == "h200"


def test_damaged_measurement_is_ignored_with_a_warning(cache):
    path = hardware.save(hardware.load("h200"), "GPU-1")
    path.write_text(path.read_text()[:100])
    with pytest.warns(UserWarning, match="damaged and ignored"):
        assert hardware.for_gpu("NVIDIA H200", "GPU-1", **H200) == hardware.load("h200")


def test_folder_that_others_can_write_is_not_trusted(cache):
    measured = dataclasses.replace(hardware.load("h200"), name="measured")
    path = hardware.save(measured, "GPU-1")
    os.chmod(path.parent, 0o777)
    assert hardware.for_gpu("NVIDIA H200", "GPU-1", **H200).name == "h200"
    assert hardware.save(measured, "GPU-1") is None


def test_nothing_is_left_beside_a_saved_profile(cache):
    for _ in range(3):
        path = hardware.save(hardware.load("h200"), "GPU-1")
    assert list(path.parent.iterdir()) == [path]

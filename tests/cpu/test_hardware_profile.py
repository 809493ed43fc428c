"""Hardware profiles as records: links by name, JSON there and back, damaged files."""

import dataclasses
import json

import pytest

from dak_inductor import hardware
from dak_inductor.errors import ProfileError
from dak_inductor.hardware_profile import HardwareProfile


def test_links_by_remote_name():
    profile = hardware.load("h200")
    assert profile.link("simulated") is profile.link("cpu")
    assert profile.link("cuda:3") is profile.link("cuda") is profile.link("peer")
    with pytest.raises(ProfileError, match=r"disk.*unknown"):
        profile.link("disk")
    with pytest.raises(ProfileError, match=r"no 'peer' link \(it has: cpu\).*dak probe"):
        hardware.load("gh200").link("cuda:1")


@pytest.mark.parametrize("name", hardware.shipped())
def test_json_round_trip(name, tmp_path):
    profile = hardware.load(name)
    text = profile.to_json()
    assert HardwareProfile.from_json(text) == profile
    path = tmp_path / "copy.json"
    path.write_text(text)
    assert hardware.load(path) == hardware.load(str(path)) == profile


def test_compute_capability_may_be_unknown():
    """Profiles that an earlier `dak probe` measured have none."""
    assert hardware.load("rtx-pro-6000").capability == (12, 0)
    record = json.loads(hardware.load("h200").to_json())
    assert HardwareProfile.from_json(json.dumps(record)).capability == (9, 0)
    del record["compute_capability"]
    assert HardwareProfile.from_json(json.dumps(record)).capability is None


def test_profiles_do_not_change():
    profile = hardware.load("h200")
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.sm_count = 1
    with pytest.raises(TypeError):
        profile.matmul_flops["bfloat16"] = 1.0


def damage(**changes):
    record = json.loads(hardware.load("h200").to_json())
    record["links"]["cpu"].update(changes.pop("link", {}))
    return json.dumps({**record, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "JSON list"),
        (damage()[:-40], "not JSON"),
        (damage(version=2), "version 2.*dak probe"),
        (damage(version="1"), "version '1'"),
        (damage(hbm_bandwidth=0), "hbm_bandwidth is 0"),
        (damage(hbm_bandwidth=float("nan")), "hbm_bandwidth is nan"),
        (damage(hbm_bandwidth=float("inf")), "hbm_bandwidth is inf"),
        (damage(hbm_bandwidth="fast"), "hbm_bandwidth is 'fast'"),
        (damage(sm_count=13.2), "sm_count is 13.2"),
        (damage(sm_count=True), "sm_count is True"),
        (damage(memory_bytes=-1), "memory_bytes is -1"),
        (damage(gpu=""), "gpu is ''"),
        (damage(compute_capability="hopper"), "compute_capability is 'hopper'"),
        (damage(compute_capability=9.0), "compute_capability is 9.0"),
        (damage(matmul_flops={}), "at least one dtype"),
        (damage(matmul_flops=[1]), "at least one dtype"),
        (damage(matmul_flops={"bfloat16": None}), "bfloat16.*None"),
        (damage(links=[]), "links must be an object"),
        (damage(links={"cpu": 1}), "must be an object"),
        (damage(speed=1), "unknown.*speed"),
        (damage(link={"tier": "peer"}), "not a link of tier 'cpu'"),
        (damage(link={"tier": "disk"}), "neither"),
        (damage(link={"latency": -1e-6}), "latency is -1e-06"),
        (damage(link={"window_floor": 0.2}), "window_floor is 0.2"),
        (damage(link={"copy_interference": -1}), "copy_interference is -1"),
        (damage(link={"colour": "red"}), "unknown.*colour"),
    ],
)
def test_damaged_profiles_are_refused(text, message, tmp_path):
    with pytest.raises(ProfileError, match=message):
        HardwareProfile.from_json(text)
    path = tmp_path / "damaged.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=str(path)):
        hardware.load(path)


def test_missing_field_is_named():
    record = json.loads(hardware.load("h200").to_json())
    del record["links"]["peer"]["latency"]
    with pytest.raises(ProfileError, match=r"peer.*latency"):
        HardwareProfile.from_json(json.dumps(record))

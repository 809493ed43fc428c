"""A process killed at any moment: nothing in shared memory, no half-written file, the next starts.

Children are forked, so that they start at once and many moments can be tried.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dak_inductor as dak
from dak_inductor import hardware
from dak_inductor.cuda_runtime.nvrtc import Compiler, Cubin
from dak_inductor.offloaded import record_of
from dak_inductor.placement import LAUNCH_LOCK
from dak_inductor.plan import Plan
from dak_inductor.planner import make_plan
from dak_inductor.replanning import problem_of
from dak_inductor.whole_files import write_whole

from .killing import KILLS, killed_while

WIDTH = 48


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))


@pytest.fixture(autouse=True)
def no_shared_memory_is_left() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    new = set(os.listdir("/dev/shm")) - before
    assert not [name for name in new if "dak" in name or "torch" in name]


@pytest.mark.parametrize("seed", range(KILLS))
def test_in_offload_moves_and_restore(seed: int) -> None:
    def steps(number: int) -> None:
        model = network()
        dak.offload(model, offload_ratio=0.5, remote="simulated")
        record = record_of(model)
        assert record is not None
        with LAUNCH_LOCK:
            for weight in record.weights.values():
                weight.buffer.move(number % 3 * weight.buffer.nbytes // 2)
        dak.restore(model)

    assert killed_while(steps, seed) >= 1


@pytest.mark.parametrize("seed", range(KILLS))
def test_in_a_load_the_checkpoint_stays_readable(tmp_path: Path, seed: int) -> None:
    source, path = network(), tmp_path / "model.safetensors"
    save_file(source.state_dict(), path)
    content = path.read_bytes()

    def load() -> nn.Sequential:
        model = network().to("meta")
        return dak.offload(model, checkpoint=path, offload_ratio=0.5, remote="simulated")

    assert killed_while(lambda _: load() and None, seed) >= 1
    assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]
    x = torch.randn(2, WIDTH)
    assert torch.equal(load()(x), source(x))


@pytest.mark.parametrize("seed", range(KILLS))
def test_in_writing_a_plan(tmp_path: Path, seed: int) -> None:
    model, path = network(), tmp_path / "plan.json"
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    record = record_of(model)
    assert record is not None
    texts = [
        make_plan(problem_of(record, []), hardware.load(name)).to_json()
        for name in ("rtx-pro-6000", "h200")
    ]

    killed_while(lambda number: write_whole(path, texts[number % 2]), seed)
    assert path.read_text() in texts
    assert Plan.from_json(path.read_text()).model == record.fingerprint
    write_whole(path, texts[0])
    assert path.read_text() == texts[0]


@pytest.mark.parametrize("seed", range(KILLS))
def test_in_writing_cubins_and_profiles(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAK_CACHE", str(tmp_path))
    profile = hardware.load("h200")
    cubins = [
        Cubin(f"kernel{n}", f"{n}" * 64, "symbol", "", bytes([n]) * 300_000) for n in range(3)
    ]
    compiler = Compiler(tmp_path / "cubins")

    def steps(number: int) -> None:
        compiler._write(cubins[number % 3])
        assert hardware.save(profile, "GPU-1") is not None

    killed_while(steps, seed)
    fresh = Compiler(tmp_path / "cubins")
    found = [fresh._read(cubin.name, cubin.key) for cubin in cubins]
    assert found[0] == cubins[0]
    assert all(cubin in (None, wanted) for cubin, wanted in zip(found, cubins, strict=True))
    assert hardware.load(hardware.cached_path(profile.gpu, "GPU-1")) == profile
    steps(0)
    hidden = [file for file in (tmp_path / "cubins").iterdir() if file.name.startswith(".")]
    assert len(hidden) <= 1  # what the killed one was writing, removed an hour later

"""Faults of files and processes: a named error or full recovery, and nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dak_inductor as dak
from dak_inductor import private_files
from dak_inductor.checkpoint import Checkpoint
from dak_inductor.errors import CheckpointError
from dak_inductor.offloaded import record_of

X = torch.randn(3, 64)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))


def in_child(work: Callable[[], None]) -> int:
    """The exit code of a forked child that does `work`; minus a signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_truncated_while_it_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Not a bus error, which a map of the file would be."""
    path = tmp_path / "m.safetensors"
    save_file(network().state_dict(), path)

    def work() -> None:
        checkpoint = Checkpoint(path)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="truncated while it was read"):
            for name in checkpoint.names:
                list(checkpoint.pieces(name, dtype))
        checkpoint.close()

    assert in_child(work) == 0


def test_a_truncated_load_leaves_the_model_on_meta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = network()
    path = tmp_path / "m.safetensors"
    save_file(source.state_dict(), path)
    whole = path.read_bytes()
    check = Checkpoint.check

    def cut(self: Checkpoint, inventory: Any) -> None:
        check(self, inventory)
        os.truncate(path, len(whole) - 1000)

    monkeypatch.setattr(Checkpoint, "check", cut)
    model = network().to("meta")
    with pytest.raises(CheckpointError, match="truncated"):
        dak.offload(model, checkpoint=path, offload_ratio=0.5, remote="simulated")
    assert all(p.device.type == "meta" for p in model.parameters()) and record_of(model) is None
    monkeypatch.undo()
    path.write_bytes(whole)
    dak.offload(model, checkpoint=path, offload_ratio=0.5, remote="simulated")
    assert torch.equal(model(X), source(X))


def test_a_full_disk_leaves_neither_entry_nor_rest(tmp_path: Path) -> None:
    """The limit on file sizes stands for the disk: write() fails in the same way."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        assert not private_files.publish(tmp_path / "entry", bytes(100_000))

    assert in_child(work) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        private_files.publish(tmp_path / "entry", b"content")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".entry.a1", ".entry.b2", ".another.c3"))
    for file in (old, new, other):
        file.write_bytes(b"half")
    for file in (old, other):
        os.utime(file, (time.time() - 7200,) * 2)
    assert private_files.publish(tmp_path / "entry", b"content")
    assert {file.name for file in tmp_path.iterdir()} == {"entry", ".entry.b2", ".another.c3"}


@pytest.mark.parametrize("milliseconds", [5, 40, 120])
def test_a_process_killed_at_any_moment_leaves_no_shared_memory_and_a_sound_cache(
    tmp_path: Path, milliseconds: int
) -> None:
    program = """
        import sys, torch
        from pathlib import Path
        from torch import nn
        import dak_inductor as dak
        from dak_inductor.private_files import private_folder, publish
        folder = private_folder(Path(sys.argv[1]) / "cubins")
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))
        print("ready", flush=True)
        for number in range(10_000):
            publish(folder / f"entry{number % 7}", bytes([number % 251]) * 100_000)
            dak.offload(model, offload_ratio=0.5, remote="simulated")
            dak.restore(model)
            print(".", flush=True)
    """
    shared = set(os.listdir("/dev/shm"))
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(milliseconds / 1e3)
    child.kill()
    child.communicate()
    assert set(os.listdir("/dev/shm")) <= shared
    for file in (tmp_path / "cubins").iterdir():
        content = file.read_bytes()
        assert file.name.startswith(".entry") or (len(content), len(set(content))) == (100_000, 1)
    assert private_files.is_private(tmp_path / "cubins")

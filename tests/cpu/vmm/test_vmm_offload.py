"""`offload`, moves and `restore` on the real allocator with the stand-in driver."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dak_inductor import hardware, placement
from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.file_bytes import FileBytes
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.cuda_runtime.vmm_buffer import VmmBuffer
from dak_inductor.errors import CheckpointError, DakError, TierError
from dak_inductor.offload import offload
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import record_of
from dak_inductor.plan import PlanProblem
from dak_inductor.planner import make_plan
from dak_inductor.restore import restore

PAGE = 2 << 20
WIDTH = 1024  # a layer is two pages


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """Layers, and `offload` made to take the CPU for the device that the stand-in plays."""
    monkeypatch.setattr(OffloadRequest, "resolved_device", lambda self: torch.device("cpu"))
    monkeypatch.setattr(
        OffloadRequest,
        "open_tier",
        lambda self, device: VmmTier("cpu", torch.device("cuda", 0), self.host_memory),
    )
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))


def test_a_model_goes_in_moves_and_comes_out(model: nn.Sequential, fake) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, WIDTH)
    expected = model(x)
    total = 3 * WIDTH * WIDTH * 4
    offload(model, gpu_memory=8 << 20)
    record = record_of(model)
    assert record is not None
    assert record.physical_bytes().local <= 8 << 20
    assert record.bytes_by_tier().total == total
    assert torch.equal(model(x), expected)
    specs = record.specs()
    problem = PlanProblem(specs, (), total, "cpu", model=record.fingerprint)
    report = placement.apply(make_plan(problem, hardware.load("h200")), record)
    assert record.bytes_by_tier().local == 0 and report.bytes_to_remote > 0
    assert torch.equal(model(x), expected)
    restore(model)
    assert torch.equal(model(x), expected)
    del record
    gc.collect()
    assert vmm.drain() and vmm.live_handles() == 0


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_failing_driver_call_is_undone(model: nn.Sequential, fake, after: int) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, WIDTH)
    expected = model(x)
    fake.fail("cuMemMap", after=after, status=2)
    with pytest.raises(DakError):
        offload(model, offload_ratio=0.5)
    fake.heal()
    assert record_of(model) is None and torch.equal(model(x), expected)
    gc.collect()
    assert vmm.drain()
    offload(model, offload_ratio=0.5)
    assert torch.equal(model(x), expected)
    restore(model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_read_into_the_pages(
    model: nn.Sequential,
    fake: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
) -> None:
    """Straight from the file where it holds the dtype, else through tensors."""
    state = {name: tensor.detach().to(stored) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    read: list[FileBytes] = []
    write_file = VmmBuffer.write_file

    def noted(self: VmmBuffer, source: FileBytes, offset_bytes: int = 0) -> bool:
        read.append(source)
        return write_file(self, source, offset_bytes)

    monkeypatch.setattr(VmmBuffer, "write_file", noted)
    offload(model.to("meta"), checkpoint=tmp_path, offload_ratio=0.5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].float())
    assert len(read) == (3 if stored == torch.float32 else 0)
    for source in read:
        with pytest.raises(OSError):
            os.fstat(source.descriptor)
    restore(model)


def test_a_file_that_ends_early_is_named(fake: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.bin"
    contents = torch.randint(0, 256, (5 * PAGE + 12345,), dtype=torch.uint8)
    path.write_bytes(contents.numpy().tobytes())
    tier = VmmTier("cpu", torch.device("cuda", 0), None)
    buffer = tier.allocate(30 * PAGE, split=PAGE)
    with path.open("rb") as file:
        source = FileBytes(file.fileno(), 5, contents.numel() - 5, str(path))
        assert buffer.write_file(source, 777)
        written = buffer.tensor(torch.uint8, (source.nbytes,), None, 777)
        assert torch.equal(written, contents[5:])
        with pytest.raises(CheckpointError, match=r"short\.bin: the file ends at byte"):
            buffer.write_file(replace(source, nbytes=source.nbytes + 1), 0)
        with pytest.raises(CheckpointError, match="ends"):
            buffer.write_file(replace(source, nbytes=30 * PAGE), 0)
        with pytest.raises(TierError, match="do not fit"):
            buffer.write_file(source, 26 * PAGE)
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(CheckpointError, match="cannot be read"):
        buffer.write_file(replace(source, descriptor=folder), 0)
    os.close(folder)

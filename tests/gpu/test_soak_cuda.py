"""Long and violent lives on a card: a thousand times in and out, the soak in short, SIGKILL."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import dak_inductor as dak
from dak_inductor.benchmarks import soak
from dak_inductor.cuda_runtime import vmm
from dak_inductor.offloaded import record_of

CYCLES = 1000
WIDTH = 1024  # a layer is one page in bf16


def settled() -> int:
    """Bytes in use on the card when nothing is being freed any more."""
    gc.collect()
    torch.cuda.synchronize()
    assert vmm.drain(30)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.alone
def test_a_thousand_cycles_leave_nothing(device: torch.device, no_grad: None, remote: str) -> None:
    layers = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(3))
    model = nn.Sequential(*layers).to(device)
    x = torch.randn(4, WIDTH, device=device, dtype=torch.bfloat16)
    expected = model(x)

    def cycle(number: int) -> None:
        dak.offload(model, offload_ratio=0.5, remote=remote)
        record = record_of(model)
        assert record is not None
        torch.cuda.synchronize()
        for weight in record.weights.values():
            weight.buffer.move(number % 3 * weight.buffer.nbytes // 2)
        if number % 100 == 0:
            assert torch.equal(model(x), expected)
        dak.restore(model, device=device)

    with contextlib.redirect_stdout(io.StringIO()):
        for number in range(20):
            cycle(number)
        before, held = settled(), vmm.memory_in_use()
        for number in range(CYCLES):
            cycle(number)
    assert settled() - before <= 4 << 20
    assert vmm.memory_in_use() == held
    assert torch.equal(model(x), expected)


@pytest.mark.alone
def test_the_soak_in_short(tmp_path: Path) -> None:
    options = ["--steps", "4000", "--every", "200", "--minutes", "0.3", "--out", str(tmp_path)]
    status = soak.main(options)
    record = json.loads((tmp_path / "soak.json").read_text())
    assert status == 0, record["verdicts"]


@pytest.mark.alone
def test_a_killed_process_gives_the_card_back(device: torch.device) -> None:
    program = f"""
        import torch
        from torch import nn
        import dak_inductor as dak
        from dak_inductor.offloaded import record_of
        model = nn.Sequential(*(nn.Linear(4096, 4096, dtype=torch.bfloat16) for _ in range(8)))
        dak.offload(model, offload_ratio=0.5, remote="cpu", device={device.index})
        print("ready", flush=True)
        number = 0
        while True:
            for weight in record_of(model).weights.values():
                weight.buffer.move(number % 3 * weight.buffer.nbytes // 2)
            number += 1
    """
    before = settled()
    for milliseconds in (0, 15, 60):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        lines = iter(child.stdout.readline, "")
        assert "ready\n" in lines
        time.sleep(milliseconds / 1e3)
        child.kill()
        child.communicate()
        deadline = time.monotonic() + 20
        while settled() > before + (4 << 20) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert settled() <= before + (4 << 20)

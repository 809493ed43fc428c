"""A process killed while it makes, fills and moves memory on the stand-in driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..killing import KILLS

PROGRAM = f"""
import sys, torch
from dak_inductor.cuda_runtime.vmm import VmmTier
from killing import killed_while

def steps(number):
    buffer = VmmTier("cpu", torch.device("cuda", 0), None).allocate(9 << 20, split=1 << 20)
    buffer.write(torch.ones(9 << 20, dtype=torch.uint8))
    buffer.prepare_move(5 << 20)
    buffer.move((number % 4) << 21)
    buffer.move(9 << 20)
    assert int(buffer.tensor(torch.uint8, (9 << 20,)).sum(dtype=torch.int64)) == 9 << 20

torch.set_num_threads(1)  # a pool of threads does not survive the fork
for seed in range({KILLS}):
    assert killed_while(steps, seed) >= 1
steps(1)  # only now does this process open the driver, which the children had to themselves
print("done")
"""


def test_a_process_killed_in_a_move_leaves_nothing_and_the_next_one_works(
    fake_library: Path,
) -> None:
    shared = set(os.listdir("/dev/shm"))
    beside = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "DAK_LIBCUDA": str(fake_library), "PYTHONPATH": str(beside)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
    assert set(os.listdir("/dev/shm")) <= shared
    assert os.listdir(fake_library.parent) == [fake_library.name]

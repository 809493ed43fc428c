"""Compiles every instance of the linear and attention kernels into the user's cache, on all cores.

One compiles in about a second; a first run that meets them one by one waits for each.

    python -m dak_inductor.benchmarks.harness.compile_ahead [PART COUNT]
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

MODULE = "dak_inductor.benchmarks.harness.compile_ahead"


def compile_part(part: int, count: int, *, architecture: str = "sm_90a") -> int:
    """Every `count`-th instance from `part` on; returns how many. Raises CompilationError."""
    from dak_inductor.cuda_runtime.nvrtc import compiler
    from dak_inductor.lowering.attention import instances as attention
    from dak_inductor.lowering.linear import instances as linear

    instances = (*linear.all_instances(), *attention.all_instances())[part::count]
    for kernel in instances:
        compiler().cubin(kernel, architecture=architecture)
    return len(instances)


def compile_ahead(processes: int | None = None) -> None:
    """All instances, by as many processes as there are cores. Raises CalledProcessError."""
    count = processes or os.cpu_count() or 1
    running = [
        subprocess.Popen([sys.executable, "-m", MODULE, str(part), str(count)])
        for part in range(count)
    ]
    for process in running:
        if process.wait() != 0:
            raise subprocess.CalledProcessError(process.returncode, process.args)


def main(arguments: Sequence[str]) -> int:
    if arguments:
        compile_part(int(arguments[0]), int(arguments[1]))
    else:
        compile_ahead()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

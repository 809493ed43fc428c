"""A script of checked calls that starts itself again under compute-sanitizer.

With `--tool` the script runs under that tool, from PATH or from the CUDA toolkit, and returns its
status; 2 where there is no such tool. Only this package's kernels are watched: of cuDNN's and
torch's own attention, which make the references, racecheck reports hazards. It does not see writes
by TMA: what it reports of shared memory that only TMA writes is no race that it could judge.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOLKIT = "/usr/local/cuda/bin"
FOUND_ERRORS = 86
WATCHED = "kernel_substring=tiered"


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every such script has; it adds its own."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--tool", choices=TOOLS, default=None)
    made.add_argument("--remote", default="cpu", help="cpu or cuda:N")
    made.add_argument("--tool-options", default="", help="more options for the tool, in one string")
    return made


def run_under(tool: str, script: Sequence[str], *, tool_options: str = "") -> int:
    """`script`, a Python file and its arguments, under compute-sanitizer; the tool's status."""
    path = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ["PATH"], TOOLKIT)))
    if path is None:
        print(f"compute-sanitizer is neither in PATH nor in {TOOLKIT}", file=sys.stderr)
        return 2
    command = [path, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--print-limit", "20"]
    command += ["--kernel-name", WATCHED]
    # the extension asks for parameters of a kernel until the driver says that there are no more
    command += ["--report-api-errors", "no"]
    command += [*shlex.split(tool_options), sys.executable, *script]
    # torch keeps freed memory, which would hide a read past the end of an allocation
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, env=environment, check=False).returncode


def report(calls: Iterable[str]) -> int:
    """Makes the calls one by one and prints what each was; a wrong one raises."""
    for done in calls:
        print("ok", done, flush=True)
    return 0

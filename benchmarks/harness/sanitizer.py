"""A script of checked calls that starts itself again under compute-sanitizer.

With `--tool` the script runs under that tool and returns its status; 2 where there is no such tool.
It is that of the package nvidia-cuda-sanitizer-api where that is installed, else one from PATH or
from the CUDA toolkit: racecheck of toolkit 13.0 knows neither several mbarriers in a warp nor
warpgroups, and ends in an error of its own. Only this package's kernels are watched: of cuDNN's
and torch's own attention, which make the references, racecheck reports hazards. It does not see
writes by TMA.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOLKIT = "/usr/local/cuda/bin"
PACKAGES = "nvidia"
FOUND_ERRORS = 86
WATCHED = "kernel_substring=tiered"


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every such script has; it adds its own."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--tool", choices=TOOLS, default=None)
    made.add_argument("--remote", default="cpu", help="cpu or cuda:N")
    made.add_argument("--tool-options", default="", help="more options for the tool, in one string")
    return made


def _folders() -> list[str]:
    """Where the tool may lie: that of an installed package first."""
    nvidia = importlib.util.find_spec(PACKAGES)
    packages = nvidia.submodule_search_locations if nvidia else None
    found = [str(path) for root in packages or () for path in sorted(Path(root).glob("cu*/bin"))]
    return [*found, *os.environ["PATH"].split(os.pathsep), TOOLKIT]


def run_under(tool: str, script: Sequence[str], *, tool_options: str = "") -> int:
    """`script`, a Python file and its arguments, under compute-sanitizer; the tool's status."""
    path = shutil.which("compute-sanitizer", path=os.pathsep.join(_folders()))
    if path is None:
        print(
            f"compute-sanitizer is neither in PATH nor in {TOOLKIT}; "
            "pip install nvidia-cuda-sanitizer-api brings it",
            file=sys.stderr,
        )
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

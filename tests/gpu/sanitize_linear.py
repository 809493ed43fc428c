"""A few calls of each linear kernel, to be run under compute-sanitizer.

    python tests/gpu/sanitize_linear.py [--remote cuda:1]            # the calls, each checked
    python tests/gpu/sanitize_linear.py --tool memcheck              # under the tool
    python tests/gpu/sanitize_linear.py --tool racecheck

With `--tool` the script starts itself again under compute-sanitizer, from PATH or from the CUDA
toolkit, and returns its status; 2 where there is no such tool. racecheck does not see writes by
TMA: what it reports of shared memory that only TMA writes is no race that it could judge.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOLKIT = "/usr/local/cuda/bin"
FOUND_ERRORS = 86
N, K = 520, 584  # tails in every direction, and several tiles


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description="Linear kernels for compute-sanitizer")
    made.add_argument("--tool", choices=TOOLS, default=None)
    made.add_argument("--remote", default="cpu", help="cpu or cuda:N")
    made.add_argument("--tool-options", default="", help="more options for the tool, in one string")
    made.add_argument("--m", default="1,17,128,300,2048,4097", help="token counts")
    return made.parse_args()


def run_under(tool: str, arguments: argparse.Namespace) -> int:
    """This script under compute-sanitizer."""
    path = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ["PATH"], TOOLKIT)))
    if path is None:
        print(f"compute-sanitizer is neither in PATH nor in {TOOLKIT}", file=sys.stderr)
        return 2
    command = [path, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--print-limit", "20"]
    # the extension asks for parameters of a kernel until the driver says that there are no more
    command += ["--report-api-errors", "no"]
    command += shlex.split(arguments.tool_options)
    # torch keeps freed memory, which would hide a read past the end of an allocation
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [sys.executable, __file__, "--remote", arguments.remote, "--m", arguments.m]
    print("$", " ".join([*command, *script]), flush=True)
    return subprocess.run([*command, *script], env=environment, check=False).returncode


def calls(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the calls one by one; yields what each was, and raises where one is wrong."""
    import torch

    import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
    from dak_inductor.benchmarks.harness.linear_case import CallSpec, make_case
    from dak_inductor.cuda_runtime.tiers import open_tier

    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    tier = open_tier(arguments.remote, device=device)
    whole = N * K * 2
    problems = []
    for m, layout in itertools.product(map(int, arguments.m.split(",")), ("out_in", "in_out")):
        dtype = torch.bfloat16 if layout == "out_in" else torch.float16
        shared = {"dtype": dtype, "layout": layout, "bias": True}
        problems += [
            CallSpec(
                m, N, K, operator="linear_epilogue", residual=True, activation="silu",
                splits=(whole * 5 // 8,), **shared,
            ),
            CallSpec(
                m, N, K, operator="gated_linear", gating="separate", activation="gelu_tanh",
                splits=(whole // 3, whole // 2 + 256), **shared,
            ),
        ]  # fmt: skip
    problems += [CallSpec(16, N, K, splits=(split,)) for split in (0, whole)]
    for problem in problems:
        verdict = make_case(problem, tier, device).check()
        torch.cuda.synchronize()
        if not verdict.passed:
            raise SystemExit(f"{problem}: {verdict}")
        yield str(problem)


def main() -> int:
    arguments = parse()
    if arguments.tool is not None:
        return run_under(arguments.tool, arguments)
    for done in calls(arguments):
        print("ok", done, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

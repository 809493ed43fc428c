"""A few calls of each attention kernel, to be run under compute-sanitizer.

    python tests/gpu/sanitize_attention.py [--remote cuda:1]            # the calls, each checked
    python tests/gpu/sanitize_attention.py --tool memcheck              # under the tool
    python tests/gpu/sanitize_attention.py --tool racecheck

With `--tool` the script starts itself again under compute-sanitizer, from PATH or from the CUDA
toolkit, and returns its status; 2 where there is no such tool. racecheck does not see writes by
TMA: what it reports of shared memory that only TMA writes is no race that it could judge.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOLKIT = "/usr/local/cuda/bin"
FOUND_ERRORS = 86
TOKENS = 333  # tails, and work for several CTAs


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description="Attention kernels for compute-sanitizer")
    made.add_argument("--tool", choices=TOOLS, default=None)
    made.add_argument("--remote", default="cpu", help="cpu or cuda:N")
    made.add_argument("--tool-options", default="", help="more options for the tool, in one string")
    made.add_argument("--head-dims", default="64,80,96,128,192,256")
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
    script = [sys.executable, __file__, "--remote", arguments.remote]
    script += ["--head-dims", arguments.head_dims]
    print("$", " ".join([*command, *script]), flush=True)
    return subprocess.run([*command, *script], env=environment, check=False).returncode


def calls(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the calls one by one; yields what each was, and raises where one is wrong."""
    from dataclasses import replace

    import torch

    from dak_inductor.benchmarks.harness.attention_case import (
        AttentionSpec,
        make_case,
        split_bytes,
    )
    from dak_inductor.cuda_runtime.tiers import open_tier

    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    tier = open_tier(arguments.remote, device=device)
    bounds = {"lengths": (TOKENS, 0, 77), "starts": (0, 0, 9)}
    for head_dim in map(int, arguments.head_dims.split(",")):
        for spec, names in (
            (AttentionSpec(3, 2, 4, 1, TOKENS, head_dim, **bounds), ("in a token", "tokens")),
            (
                AttentionSpec(3, 1, 8, 16, TOKENS, head_dim, torch.float16, window=90, **bounds),
                ("page", "first bytes"),
            ),
            (
                AttentionSpec(2, 2, 7, 3, TOKENS, head_dim, layout="plain", softcap=20.0),
                ("all remote", "all local"),
            ),
        ):
            splits = (split_bytes(names[0], spec), split_bytes(names[1], spec))
            case = make_case(replace(spec, splits=splits), tier, device)
            verdict = case.check()
            torch.cuda.synchronize()
            if not verdict.passed:
                raise SystemExit(f"{case.spec}: {verdict}")
            yield str(case.spec)


def main() -> int:
    arguments = parse()
    if arguments.tool is not None:
        return run_under(arguments.tool, arguments)
    for done in calls(arguments):
        print("ok", done, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

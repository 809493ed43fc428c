"""A few calls of each linear kernel, to be run under compute-sanitizer.

    python tests/gpu/sanitize_linear.py [--remote cuda:1]            # the calls, each checked
    python tests/gpu/sanitize_linear.py --tool memcheck              # under the tool
    python tests/gpu/sanitize_linear.py --tool racecheck

What `--tool` does, what is returned and what racecheck misses: `harness/sanitizer.py`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

from dak_inductor.benchmarks.harness import sanitizer

N, K = 520, 584  # tails in every direction, and several tiles


def parse() -> argparse.Namespace:
    made = sanitizer.parser("Linear kernels for compute-sanitizer")
    made.add_argument("--m", default="1,17,128,300,2048,4097", help="token counts")
    return made.parse_args()


def calls(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the calls one by one; yields what each was, and raises where one is wrong."""
    import torch

    import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
    from dak_inductor.benchmarks.harness.linear_case import CallSpec, make_case
    from dak_inductor.cuda_runtime.tiers import open_tier
    from dak_inductor.lowering.linear.trials import TRIALS

    TRIALS.switch(False)  # the kernels are what is looked at
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
        script = [__file__, "--remote", arguments.remote, "--m", arguments.m]
        return sanitizer.run_under(arguments.tool, script, tool_options=arguments.tool_options)
    return sanitizer.report(calls(arguments))


if __name__ == "__main__":
    raise SystemExit(main())

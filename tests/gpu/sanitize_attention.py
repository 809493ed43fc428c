"""A few calls of each attention kernel, to be run under compute-sanitizer.

    python tests/gpu/sanitize_attention.py [--remote cuda:1]            # the calls, each checked
    python tests/gpu/sanitize_attention.py --tool memcheck              # under the tool
    python tests/gpu/sanitize_attention.py --tool racecheck

What `--tool` does, what is returned and what racecheck misses: `harness/sanitizer.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from dak_inductor.benchmarks.harness import sanitizer

TOKENS = 333  # tails, and work for several CTAs


def parse() -> argparse.Namespace:
    made = sanitizer.parser("Attention kernels for compute-sanitizer")
    made.add_argument("--head-dims", default="64,80,96,128,192,256")
    return made.parse_args()


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
            # in sweeps; and with results added up in groups
            (AttentionSpec(64, 8, 2, 1, 140, head_dim), ("in a token", "tokens")),
            (AttentionSpec(1, 1, 4, 1, 100 * TOKENS, head_dim), ("in a token", "all local")),
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
        script = [__file__, "--remote", arguments.remote, "--head-dims", arguments.head_dims]
        return sanitizer.run_under(arguments.tool, script, tool_options=arguments.tool_options)
    return sanitizer.report(calls(arguments))


if __name__ == "__main__":
    raise SystemExit(main())

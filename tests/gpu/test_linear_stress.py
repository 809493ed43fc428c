"""Linear kernels on random sizes, splits and token counts, for what a fixed list would miss.

A slot of the ring in shared memory that is read before its bytes have arrived, or overwritten
while it is in use, gives a wrong sum only sometimes: many calls, each with values of its own, back
to back, each output compared.
"""

from __future__ import annotations

import os
import random
import time

import pytest
import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
from dak_inductor.benchmarks.harness.linear_reference import (
    LinearCall,
    make_reference,
    poison_free_memory,
)
from dak_inductor.cuda_runtime.tier import Tier

pytestmark = pytest.mark.usefixtures("compiled_kernels")

SECONDS = 8.0 if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci" else 180.0
BUFFER_BYTES = 24 << 20
CALLS_PER_WEIGHT = 12
TOKEN_LIMITS = (1, 8, 16, 17, 64, 128, 130, 300, 1024, 4100)


def test_random_calls_against_the_reference(tier: Tier, device: torch.device) -> None:
    """Weights of many shapes laid one after the other on buffers with random splits."""
    seed = int(time.time())
    chosen = random.Random(seed)
    end = time.monotonic() + SECONDS
    calls = 0
    while calls < 200 or time.monotonic() < end:
        buffer = tier.allocate(BUFFER_BYTES, split=chosen.randrange(BUFFER_BYTES + 1))
        for _ in range(6):
            n, k = 8 * chosen.randint(1, 400), 8 * chosen.randint(1, 400)
            offset = chosen.randrange((BUFFER_BYTES - n * k * 2) // 16) * 16
            values = torch.randn(n, k, dtype=torch.bfloat16, device=device).div_(k**0.5)
            weight = buffer.tensor(torch.bfloat16, (n, k), None, offset).copy_(values)
            inputs, outputs = [], []
            for _ in range(CALLS_PER_WEIGHT):  # issued back to back, looked at afterwards
                m = chosen.randint(1, chosen.choice(TOKEN_LIMITS))
                x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
                poison_free_memory(m * n * 2, device, blocks=1)
                inputs.append(x)
                outputs.append(torch.ops.dak.linear.default(x, weight, None))
            for x, output in zip(inputs, outputs, strict=True):
                verdict = make_reference(LinearCall(x, (values,), (None,))).judge(output)
                what = f"seed {seed}, call {calls}: M={x.shape[0]}, N={n}, K={k}, offset {offset}"
                assert verdict.passed, f"{what}, split {buffer.split}: {verdict}"
                calls += 1
    print(f"{calls} calls")


def test_one_weight_is_read_right_every_time(tier: Tier, device: torch.device) -> None:
    """Exact sums: small integers, so that one wrong byte changes a result that must be equal.

    The weight changes between calls, in place, so that a slot left over from the last call shows.
    """
    n, k = 2048, 4096
    buffer = tier.allocate(n * k * 2, split=n * k * 2 * 3 // 4)
    weight = buffer.tensor(torch.float16, (n, k))
    end = time.monotonic() + SECONDS / 2
    rounds = 0
    while rounds < 20 or time.monotonic() < end:  # others may use the card
        for tokens in (1, 16, 128, 300):
            values = torch.randint(-2, 3, (n, k), device=device).half()
            x = torch.randint(-1, 2, (tokens, k), device=device).half()
            weight.copy_(values)
            # sums deviate by 74 from 0, and fp16 holds every integer to 2048
            expected = torch.nn.functional.linear(x.float(), values.float()).half()
            for _ in range(8):
                poison_free_memory(tokens * n * 2, device, blocks=1)
                found = torch.ops.dak.linear.default(x, weight, None)
                assert torch.equal(found, expected), f"M={tokens}, round {rounds}"
            rounds += 1
    print(f"{rounds} rounds")

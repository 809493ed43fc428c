"""Measures one linear: the dak operator on tiered weights beside the stock kernel all resident.

The weights of a round outgrow the L2 cache; rounds are captured into one CUDA graph of at least a
millisecond, so that what a graph launch costs is shared by several calls, as in a model's step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter
from dak_inductor.benchmarks.harness.linear_bars import LinearCell
from dak_inductor.benchmarks.harness.linear_grid import LinearShape
from dak_inductor.benchmarks.harness.linear_peers import Round, linear_round
from dak_inductor.benchmarks.harness.linear_reference import (
    LinearCall,
    LinearReference,
    make_reference,
    poison_free_memory,
)
from dak_inductor.benchmarks.harness.linear_weights import TieredWeights
from dak_inductor.benchmarks.harness.timing import (
    CapturedStep,
    Timing,
    TimingRule,
    capture,
    rotation_count,
    time_calls,
)
from dak_inductor.benchmarks.harness.yardstick import Ceilings, Work, direct_bound, over_bound

LEAST_GRAPH_SECONDS = 1e-3
MOST_ROUNDS = 16
COPIES_ON_CPU = 2


@dataclass(frozen=True, slots=True)
class TokenCase:
    """Inputs of one token count: x [M, K], its reference, and C, the stock kernel all resident."""

    tokens: int
    x: Tensor
    reference: LinearReference
    resident: Timing


@dataclass(frozen=True, slots=True)
class RoundTiming:
    """Seconds of one call, and the captured rounds that were timed (`calls` calls each)."""

    timing: Timing
    run: Round | CapturedStep
    calls: int
    output: Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The operator under test."""
    result: Tensor = torch.ops.dak.linear.default(x, weight)
    return result


def copies_needed(nbytes: int, device: torch.device) -> int:
    """Equal weights that a round must use so that none of them is found in the L2 cache."""
    if device.type != "cuda":
        return COPIES_ON_CPU
    return rotation_count(nbytes, torch.cuda.get_device_properties(device).L2_cache_size)


def fresh_values(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random weight [N, K], scaled so that outputs are about one."""
    return torch.randn(shape.n, shape.k, dtype=dtype, device=device).div_(math.sqrt(shape.k))


def time_rounds(
    round_: Round, calls: int, bound: float, *, device: torch.device, rule: TimingRule
) -> RoundTiming:
    """Time rounds of `calls` calls that take at least `bound` seconds each."""
    rounds = max(1, min(MOST_ROUNDS, math.ceil(LEAST_GRAPH_SECONDS / (bound * calls))))
    if device.type != "cuda":
        rounds = 1

    def several() -> Tensor:
        for _ in range(rounds - 1):
            round_()
        return round_()

    run: Round | CapturedStep = several
    method = "eager calls"
    if device.type == "cuda":
        run, method = capture(several, warmup=1), "CUDA graph replays"
    total = time_calls([run], device=device, rule=rule, method=method)
    each = tuple(seconds / (rounds * calls) for seconds in total.repeats)
    timing = Timing(
        total.seconds / (rounds * calls), each, total.replays * rounds * calls, total.method
    )
    output = run()
    assert isinstance(output, Tensor)
    return RoundTiming(timing, run, rounds * calls, output)


def token_case(
    tokens: int, resident: Sequence[Tensor], ceilings: Ceilings, rule: TimingRule
) -> TokenCase:
    """Fresh inputs for resident equal weights [N, K], their reference, and C."""
    first = resident[0]
    x = torch.randn(tokens, first.shape[1], dtype=first.dtype, device=first.device)
    reference = make_reference(LinearCall(x, (first,)))
    bound = direct_bound(_work(tokens, first, first.nbytes, 0), ceilings)
    stock = time_rounds(
        linear_round(x, resident, functional.linear),
        len(resident), bound, device=first.device, rule=rule,
    )  # fmt: skip
    return TokenCase(tokens, x, reference, stock.timing)


def measure_cell(
    case: TokenCase,
    weights: TieredWeights,
    shape: LinearShape,
    fraction: float,
    ceilings: Ceilings,
    rule: TimingRule,
) -> tuple[dict[str, object], LinearCell]:
    """One row of the record, less its bars and peers, and the cell that the bars judge."""
    first, held = weights.tensors[0], weights.bytes_each
    device = first.device
    bound = direct_bound(_work(case.tokens, first, held.local, held.remote), ceilings)
    if device.type == "cuda":
        poison_free_memory(case.tokens * shape.n * first.element_size(), device)
    output = linear(case.x, first)
    verdict = case.reference.judge(output)
    counter = ReadCounter(weights.buffers)
    timed = time_rounds(
        linear_round(case.x, weights.tensors, linear),
        len(weights.tensors), bound, device=device, rule=rule,
    )  # fmt: skip
    _synchronize(device)
    counter.reset()
    timed.run()
    _synchronize(device)
    reads = counter.read()
    counted = reads is not None and reads.calls > 0
    seconds = timed.timing.seconds
    remote_counted = reads.remote_bytes / timed.calls if reads is not None and counted else None
    amplification = (
        None if remote_counted is None or held.remote == 0 else remote_counted / held.remote
    )
    cell = LinearCell(
        tokens=case.tokens,
        fraction=fraction,
        weight_bytes=first.nbytes,
        seconds=seconds,
        direct=bound,
        resident=case.resident.seconds,
        local_seconds=held.local / ceilings.hbm_stream,
        amplification=amplification,
    )
    row: dict[str, object] = {
        "shape": str(shape),
        "N": shape.n,
        "K": shape.k,
        "M": case.tokens,
        "fraction": fraction,
        "realised": held.remote_share,
        "weight_bytes": first.nbytes,
        "remote_bytes": held.remote,
        "microseconds": seconds * 1e6,
        "L_microseconds": bound * 1e6,
        "C_microseconds": case.resident.seconds * 1e6,
        "T/L": over_bound(seconds, bound),
        "T/C": over_bound(seconds, case.resident.seconds),
        "hbm_share": held.local / seconds / ceilings.hbm_stream,
        "link_share": held.remote / seconds / ceilings.link_direct,
        **_served_by(case.x, weights),
        "counted_by": "kernel" if counted else "nothing",
        "counted_local_bytes": reads.local_bytes / timed.calls if reads and counted else None,
        "counted_remote_bytes": remote_counted,
        "amplification": amplification,
        "peak_window": reads.peak_window if reads and counted else None,
        "accurate": verdict.passed,
        "rms_error": verdict.ours.rms,
        "max_error": verdict.ours.max_abs,
        "torch_rms_error": verdict.torch_own.rms,
        "torch_max_error": verdict.torch_own.max_abs,
        "repeatable": torch.equal(output, timed.output),
        "weights_in_rotation": len(weights.tensors),
        "calls": timed.timing.replays,
        "method": timed.timing.method,
        "repeats_microseconds": [value * 1e6 for value in timed.timing.repeats],
    }
    return row, cell


def _served_by(x: Tensor, weights: TieredWeights) -> dict[str, object]:
    """The way that dispatch takes for the first weight, and the times of its trial."""
    if not x.is_cuda:
        return {"served_by": "stock", "trial_microseconds": None}
    from dak_inductor.lowering.linear.dispatch import way_of
    from dak_inductor.lowering.linear.product import Product
    from dak_inductor.lowering.linear.trials import TRIALS

    first = (weights.tensors[0],), (weights.buffers[0],)
    product = Product(x, *first, (None,), None, "none", "out_in")
    trial = TRIALS.result_of(product.facts())
    times = None if trial is None else {name: each * 1e6 for name, each in trial.seconds}
    return {"served_by": way_of(product), "trial_microseconds": times}


def _work(tokens: int, weight: Tensor, local: int, remote: int) -> Work:
    """Weight bytes alone: inputs and outputs are not charged to L."""
    return Work(local, remote, 2.0 * tokens * weight.numel())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

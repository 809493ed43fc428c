"""Measures one linear: the dak operator on tiered weights beside the stock kernel all resident."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dak_inductor.benchmarks.harness.kernel_reads import count_run
from dak_inductor.benchmarks.harness.linear_bars import LinearCell
from dak_inductor.benchmarks.harness.linear_grid import LinearShape
from dak_inductor.benchmarks.harness.linear_peers import linear_round
from dak_inductor.benchmarks.harness.linear_reference import (
    LinearCall,
    LinearReference,
    make_reference,
    poison_free_memory,
)
from dak_inductor.benchmarks.harness.linear_weights import TieredWeights
from dak_inductor.benchmarks.harness.rounds import Rounds, make_rounds, time_rounds
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.yardstick import Ceilings, Work, direct_bound, over_bound

if TYPE_CHECKING:
    from dak_inductor.lowering.linear.call_facts import CallFacts


@dataclass(frozen=True, slots=True)
class TokenCase:
    """Inputs of one token count: x [M, K], its reference, and the stock kernel all resident, whose
    time is C."""

    tokens: int
    x: Tensor
    reference: LinearReference
    resident: Rounds


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The operator under test."""
    result: Tensor = torch.ops.dak.linear.default(x, weight)
    return result


def fresh_values(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random weight [N, K], scaled so that outputs are about one."""
    return torch.randn(shape.n, shape.k, dtype=dtype, device=device).div_(math.sqrt(shape.k))


def token_case(tokens: int, resident: Sequence[Tensor], ceilings: Ceilings) -> TokenCase:
    """Fresh inputs for resident equal weights [N, K], and their reference."""
    first = resident[0]
    x = torch.randn(tokens, first.shape[1], dtype=first.dtype, device=first.device)
    reference = make_reference(LinearCall(x, (first,)))
    bound = direct_bound(_work(tokens, first, first.nbytes, 0), ceilings)
    stock = linear_round(x, resident, functional.linear)
    rounds = make_rounds(stock, len(resident), bound, device=first.device)
    return TokenCase(tokens, x, reference, rounds)


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
    rounds = make_rounds(
        linear_round(case.x, weights.tensors, linear), len(weights.tensors), bound, device=device
    )
    timing, stock = time_rounds([rounds, case.resident], device=device, rule=rule)
    again, reads = count_run(rounds.output, weights.buffers, device)
    counted = reads is not None and reads.calls > 0
    seconds = timing.seconds
    remote_counted = reads.remote_bytes / rounds.calls if reads is not None and counted else None
    amplification = (
        None if remote_counted is None or held.remote == 0 else remote_counted / held.remote
    )
    cell = LinearCell(
        tokens=case.tokens,
        fraction=fraction,
        weight_bytes=first.nbytes,
        seconds=seconds,
        direct=bound,
        resident=stock.seconds,
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
        "C_microseconds": stock.seconds * 1e6,
        "T/L": over_bound(seconds, bound),
        "T/C": over_bound(seconds, stock.seconds),
        "hbm_share": held.local / seconds / ceilings.hbm_stream,
        "link_share": held.remote / seconds / ceilings.link_direct,
        **_served_by(case.x, weights),
        "counted_by": "kernel" if counted else "nothing",
        "counted_local_bytes": reads.local_bytes / rounds.calls if reads and counted else None,
        "counted_remote_bytes": remote_counted,
        "amplification": amplification,
        "peak_window": reads.peak_window if reads and counted else None,
        "accurate": verdict.passed,
        "rms_error": verdict.ours.rms,
        "max_error": verdict.ours.max_abs,
        "torch_rms_error": verdict.torch_own.rms,
        "torch_max_error": verdict.torch_own.max_abs,
        "repeatable": torch.equal(output, again),
        "weights_in_rotation": len(weights.tensors),
        "calls": timing.replays,
        "method": timing.method,
        "repeats_microseconds": [value * 1e6 for value in timing.repeats],
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
    facts, way = product.facts(), way_of(product)
    trial = TRIALS.result_of(facts)
    times = None if trial is None else {name: each * 1e6 for name, each in trial.seconds}
    served: dict[str, object] = {"served_by": way, "trial_microseconds": times}
    return served | _ring(facts) if way == "ring" else served


def _ring(facts: CallFacts) -> dict[str, object]:
    """Features of each product of the ring, in order, and what its plan has for the call."""
    from dak_inductor.lowering.linear.ring import plan_of
    from dak_inductor.lowering.linear.ring_plan import residencies

    residency = residencies(facts.problem, facts.remote_bytes)
    tiers = frozenset({facts.tier})
    plan = plan_of(facts.problem, residency, facts.device_index, tiers, in_graph=True)
    return {
        "ring_parts": [part.features for part in plan.parts],
        "ring_microseconds": plan.seconds * 1e6,
    }


def _work(tokens: int, weight: Tensor, local: int, remote: int) -> Work:
    """Weight bytes alone: inputs and outputs are not charged to L."""
    return Work(local, remote, 2.0 * tokens * weight.numel())

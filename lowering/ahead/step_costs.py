"""What each product of a step takes, direct and staged, from the profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from dak_inductor.cost_model import (
    alone_seconds,
    copy_slowdown,
    local_bandwidth,
    op_floor,
    peak_flops,
)
from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.lowering.ahead.sequence import SplitOf, StepCall, present_split
from dak_inductor.lowering.ahead.step_op import LinkRates, RowSpan, StepOp
from dak_inductor.lowering.copy_cost import piece_overhead
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.gpu_profile import profile_of
from dak_inductor.lowering.host_cost import (
    KERNEL_SECONDS,
    STOCK_SECONDS,
    following_seconds,
    way_seconds,
)
from dak_inductor.lowering.linear import ring_plan
from dak_inductor.lowering.linear.call_facts import CallFacts
from dak_inductor.lowering.linear.configuration import DECODE_TOKENS
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_timing import multiply_seconds
from dak_inductor.lowering.linear.trials import OVERLAP_SECONDS, TRIALS
from dak_inductor.lowering.linear.ways import Way, ways_of
from dak_inductor.lowering.refusals import HOPPER, capability

_PART_FEATURES = 1024  # of a part, for the time of one row of it
_BIAS_SHARE = 0.25
"""Of HBM bandwidth at which columns of a result get a bias of their own: torch writes it there
first, and the product adds to it. 8192 tokens by 2048 columns took 28 us more to write, and 7 to
add to; by 512 columns 9 and 2 (H200). Where the product writes a whole result, cuBLAS adds it."""
_LOCAL_COPY_SHARE = 0.8
"""Of HBM bandwidth at which a kernel copies local rows into the ring. Assumed."""


class _Alone(NamedTuple):
    """A product as it is served without copies ahead: its seconds, how long it keeps the link and,
    outside of CUDA graphs, the host busy, and whether through a ring of its own."""

    seconds: float
    link: float
    host: float
    own_ring: bool = False


def link_rates(profile: HardwareProfile, link: LinkProfile) -> LinkRates:
    """Of copies over `link`."""
    return LinkRates(
        link.copy_bandwidth, piece_overhead(profile, link), copy_slowdown(profile, link)
    )


def tier_of(calls: Sequence[StepCall]) -> str:
    """The remote tier that most calls read: copies ahead go over one link."""
    found = Counter(call.facts.tier for call in calls if call.facts and not call.refusal)
    return found.most_common(1)[0][0] if found else "cpu"


def step_ops(
    calls: Sequence[StepCall],
    tier: str,
    device_index: int,
    *,
    spared: bool = False,
    split_of: SplitOf = present_split,
) -> tuple[StepOp, ...] | None:
    """The products as the planner sees them, with the splits of this moment or those that
    `split_of` gives their buffers; None where the memory of one is gone.

    spared: those without copies ahead run in the way that spares the host.
    """
    found: list[StepOp] = []
    for call in calls:
        if call.facts is None:
            op = StepOp(0.0, 0.0, refusal=call.refusal, host=STOCK_SECONDS, before=call.before)
            found.append(op)
            continue
        spans = tuple(weight.span(split_of) for weight in call.weights)
        present = tuple(span for span in spans if span is not None)
        if len(present) < len(spans):
            return None
        refusal = call.refusal
        if not refusal and call.facts.tier != tier:
            refusal = f"its remote tier is {call.facts.tier}; copies ahead come from {tier}"
        facts = call.facts
        if not refusal:
            facts = replace(facts, remote_bytes=tuple(span.remote_bytes for span in present))
        alone = _alone(facts, device_index, spared=spared)
        op = _step_op(facts, present, refusal, call.by_kernel, device_index, alone)
        found.append(replace(op, before=call.before) if call.before else op)
    return tuple(found)


@lru_cache(maxsize=4096)
def _step_op(
    facts: CallFacts,
    spans: tuple[RowSpan, ...],
    refusal: str,
    by_kernel: bool,
    device_index: int,
    alone: _Alone,
) -> StepOp:
    profile = profile_of(device_index)
    direct, link, host, own_ring = alone
    if refusal:
        return StepOp(direct, link, refusal=refusal, host=host, own_ring=own_ring)
    problem = facts.problem
    one = replace(problem, gated=False)
    piece_row = 0.0
    if facts.bias:
        piece_row = problem.m * ELEMENT_BYTES / (_BIAS_SHARE * profile.hbm_bandwidth)
    if problem.m > DECODE_TOKENS:
        spans = tuple(_whole_or_parted(one, span, piece_row, profile) for span in spans)
    local = sum(
        _product_seconds(one, span.start, profile)
        + (span.start * piece_row if span.start < span.rows else 0.0)
        for span in spans
        if span.start
    )
    once = op_floor("linear", profile)
    row = (_product_seconds(one, _PART_FEATURES, profile) - once) / _PART_FEATURES
    cut = profile.operator_floor * sum(span.remote > span.start for span in spans)
    launch = 0.0
    if by_kernel:
        all_local = replace(facts, remote_bytes=(0,) * len(facts.remote_bytes))
        launch = _few_tokens(all_local, device_index).seconds + cut
    rest = profile.operator_floor + cut  # the count
    passes = (facts.activation != "none") + problem.gated + facts.residual
    results = 3 * problem.m * problem.n * ELEMENT_BYTES / profile.hbm_bandwidth
    rest += passes * (profile.operator_floor + results)
    rest += sum(_local_copy_seconds(span, profile) for span in spans)
    return StepOp(
        direct, link, spans, local, once, row, rest, launch,
        host=host, own_ring=own_ring, piece_row=piece_row, following=following_seconds(facts),
    )  # fmt: skip


def _whole_or_parted(
    problem: LinearProblem, span: RowSpan, piece_row: float, profile: HardwareProfile
) -> RowSpan:
    """With local rows copied into the ring too, if that is the shorter work: one product over all
    rows fills the GPU better than two, and cuBLAS adds its bias."""
    if span.start in (0, span.rows):
        return span
    all_copied = replace(span, start=0)
    parted = [span.start, span.rows - span.start]
    in_two = sum(_product_seconds(problem, rows, profile) for rows in parted)
    in_two += span.rows * piece_row
    in_one = _product_seconds(problem, span.rows, profile)
    return all_copied if in_one + _local_copy_seconds(all_copied, profile) < in_two else span


def _local_copy_seconds(span: RowSpan, profile: HardwareProfile) -> float:
    """Of its rows between `start` and `remote`, besides a launch."""
    copied = max(span.remote - span.start, 0) * span.row_bytes
    return 2 * copied / (_LOCAL_COPY_SHARE * profile.hbm_bandwidth)


def _alone(facts: CallFacts, device_index: int, *, spared: bool) -> _Alone:
    """Not cached as a whole: a trial may have been made since."""
    if facts.problem.m <= DECODE_TOKENS:
        return _few_tokens(facts, device_index)
    if not _has_ways(facts):
        return _by_ring(facts, device_index)
    ways = ways_of(facts)
    way = TRIALS.sparing(facts, ways) if spared else TRIALS.current(facts, ways)
    if way.name == "ring":
        return _by_ring(facts, device_index)
    remote, link = sum(facts.remote_bytes), profile_of(device_index).link(facts.tier)
    seconds = _seconds(way, facts, _by_ring(facts, device_index).seconds)
    return _Alone(seconds, remote / link.direct_bandwidth, way_seconds(way.name, facts))


@lru_cache(maxsize=4096)
def _few_tokens(facts: CallFacts, device_index: int) -> _Alone:
    """By the profile alone. A trial of the kind says nothing better of what a move saves: on
    `linear.json` and `linear_peer.json`, without `alone_seconds`, which is of steps, the difference
    of two splits is missed by 2.3 and 3.8% of the product (median, up to 10% remote), estimates
    scaled by the trial at one of them miss it by 3.0 and 4.0%, and a trial against an estimate by
    2.8 and 7.1%, each trial less what trials of its way take longer than CUDA graphs.
    """
    problem, profile = facts.problem, profile_of(device_index)
    link, remote = profile.link(facts.tier), sum(facts.remote_bytes)
    peak = peak_flops(profile, str(problem.dtype).removeprefix("torch."))
    local = (problem.weight_bytes - remote) / local_bandwidth(profile)
    busy = remote / link.direct_bandwidth
    seconds = max(local, busy, problem.flops / peak) + op_floor("linear", profile)
    seconds += alone_seconds(problem.m, remote / problem.weight_bytes, profile, link)
    return _Alone(seconds, busy, KERNEL_SECONDS)


@lru_cache(maxsize=4096)
def _by_ring(facts: CallFacts, device_index: int) -> _Alone:
    """Through a ring of its own."""
    profile, remote = profile_of(device_index), sum(facts.remote_bytes)
    link = profile.link(facts.tier)
    seconds = ring_plan.estimate(facts.problem, facts.remote_bytes, profile, link)
    host = way_seconds("ring", facts)
    return _Alone(seconds, remote / link.copy_bandwidth, host, remote > 0)


def _seconds(way: Way, facts: CallFacts, ring: float) -> float:
    """Of a product of many tokens: what the ring is estimated to take, as often as the way took the
    ring's time in a trial; without one the way's own estimate.

    `ring` is the unit since copies ahead are stock products and copies too, so that their estimates
    are off as its own is. On `linear_prefill.json` and `linear_peer_prefill.json` the stock
    operator, which has no estimate, is so met within 16 and 11% (median, up to 10% remote), by the
    ring's estimate within 29 and 24%. Where the kernel was chosen, its time over that of the stock
    product with nothing remote is met within 10 and 12%, by its own estimate within 30 and 19%.
    """
    trial = TRIALS.result_of(facts) if TRIALS.enabled else None
    timed = {} if trial is None else dict(trial.seconds)
    if way.name in timed and "ring" in timed:
        own = timed[way.name] + (0.0 if way.name == "direct" else OVERLAP_SECONDS)
        return ring * own / (timed["ring"] + OVERLAP_SECONDS)
    return ring if way.seconds is None else way.seconds


def _has_ways(facts: CallFacts) -> bool:
    """Whether the kernel may be among the ways; they are asked for on the GPU that it runs on."""
    if facts.problem.n % 8 or facts.problem.k % 8 or not torch.cuda.is_available():
        return False
    return capability(facts.device_index) == HOPPER


def _product_seconds(problem: LinearProblem, features: int, profile: HardwareProfile) -> float:
    """The stock product over that many features of one weight."""
    if problem.m > DECODE_TOKENS:
        return multiply_seconds(problem, features, profile)
    stream = features * problem.k * ELEMENT_BYTES / local_bandwidth(profile)
    return op_floor("linear", profile) + stream

"""Measures one attention of a decode step or a prefill, beside torch's on a resident cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.accuracy import AccuracyVerdict, errors, judge
from dak_inductor.benchmarks.harness.attention_bars import AttentionCell
from dak_inductor.benchmarks.harness.attention_grid import AttentionShape
from dak_inductor.benchmarks.harness.attention_peers import (
    Cache,
    StockAttention,
    attention_round,
    stock_variants,
)
from dak_inductor.benchmarks.harness.attention_reference import AttentionCall
from dak_inductor.benchmarks.harness.kernel_reads import count_run
from dak_inductor.benchmarks.harness.linear_reference import poison_free_memory
from dak_inductor.benchmarks.harness.rounds import (
    Rounds,
    copies_needed,
    make_rounds,
    time_rounds,
)
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.yardstick import Ceilings, Work, direct_bound, over_bound
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes

LABEL = "cache"
MOST_JUDGED_QUERIES = 512


@dataclass(frozen=True, slots=True)
class ResidentCase:
    """A query, equal resident caches, and the best of torch's backends on them: its time is C."""

    shape: AttentionShape
    query: Tensor
    caches: tuple[Cache, ...]
    best: StockAttention
    rounds: Rounds
    tried: dict[str, float | str]  # microseconds of each variant, or why it does not run


@dataclass(frozen=True, slots=True)
class TieredCaches:
    """Equal caches on tiered buffers, tokens outermost; they live as long as this record."""

    buffers: tuple[TieredBuffer, ...]
    caches: tuple[Cache, ...]

    @property
    def bytes_each(self) -> TierBytes:
        """Bytes of the keys and values of one of them by tier."""
        return self.buffers[0].bytes_by_tier() + self.buffers[1].bytes_by_tier()


def attention(query: Tensor, cache: Cache) -> Tensor:
    """The operator under test: all tokens are valid, the queries are the last of them."""
    scale = 1 / math.sqrt(query.shape[3])
    result: Tensor = torch.ops.dak.attention.default(
        query, *cache, None, None, None, scale, True, 0, 0.0
    )
    return result


def resident_case(
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    rule: TimingRule,
) -> ResidentCase:
    """Fresh random operands, and C. Raises RuntimeError where no backend runs."""
    copies = copies_needed(shape.cache_bytes(dtype), device)
    stored = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    first = tuple(torch.randn(stored, dtype=dtype, device=device) for _ in range(2))
    caches: list[Cache] = [(first[0], first[1])]
    caches += [(first[0].clone(), first[1].clone()) for _ in range(copies - 1)]
    heads = shape.kv_heads * shape.ratio
    projected = (shape.batch, shape.queries, heads, shape.head_dim)  # as a model has it
    query = torch.randn(projected, dtype=dtype, device=device).transpose(1, 2)
    bound = direct_bound(Work(shape.cache_bytes(dtype), 0, shape.flops), ceilings)
    tried: dict[str, float | str] = {}
    found: list[tuple[float, StockAttention, Rounds]] = []
    for variant in stock_variants(query, shape.kv_heads):
        try:
            rounds = make_rounds(
                attention_round(variant, query, caches), copies, bound, device=device
            )
            (timing,) = time_rounds([rounds], device=device, rule=rule)
        except RuntimeError as error:  # a backend that does not take these operands
            tried[variant.name] = str(error).splitlines()[0]
            continue
        tried[variant.name] = timing.seconds * 1e6
        found.append((timing.seconds, variant, rounds))
    if not found:
        raise RuntimeError(f"no backend of torch's attention runs {shape}: {tried}")
    _, best, rounds = min(found, key=lambda each: each[0])
    return ResidentCase(shape, query, tuple(caches), best, rounds, tried)


def tiered_caches(case: ResidentCase, tier: Tier, fraction: float) -> TieredCaches:
    """The caches of a case, the last `fraction` of the bytes of keys and of values remote."""
    shape, dtype = case.shape, case.query.dtype
    stored = (shape.tokens, shape.batch, shape.kv_heads, shape.head_dim)
    nbytes = shape.cache_bytes(dtype) // 2
    buffers: list[TieredBuffer] = []
    caches: list[Cache] = []
    for cache in case.caches:
        views = []
        for part in cache:
            buffer = tier.allocate(nbytes, split=nbytes - round(fraction * nbytes))
            buffer.label = LABEL
            buffers.append(buffer)
            view = buffer.tensor(dtype, stored).permute(1, 2, 0, 3)
            views.append(view.copy_(part))
        caches.append((views[0], views[1]))
    return TieredCaches(tuple(buffers), tuple(caches))


def measure_cell(
    case: ResidentCase,
    tiered: TieredCaches,
    fraction: float,
    ceilings: Ceilings,
    rule: TimingRule,
) -> tuple[dict[str, object], AttentionCell]:
    """One row of the record, less its bars and peers, and the cell that the bars judge."""
    shape, query, held = case.shape, case.query, tiered.bytes_each
    device, count = query.device, len(tiered.caches)
    bound = direct_bound(Work(held.local, held.remote, shape.flops), ceilings)
    if device.type == "cuda":
        poison_free_memory(query.nbytes, device)
    output = attention(query, tiered.caches[0])
    verdict = judge_sample(case, output)
    rounds = make_rounds(
        attention_round(attention, query, tiered.caches), count, bound, device=device
    )
    timing, stock = time_rounds([rounds, case.rounds], device=device, rule=rule)
    again, reads = count_run(rounds.output, tiered.buffers, device)
    seconds = timing.seconds
    counted = reads is not None and reads.calls == 2 * rounds.calls
    same, served = torch.equal(output, again), served_by(query, tiered.caches[0])
    cell = AttentionCell(
        fraction, held.total, seconds, bound, stock.seconds, prefill=shape.is_prefill
    )
    row: dict[str, object] = {
        "shape": str(shape),
        "fraction": fraction,
        "realised": held.remote_share,
        "cache_bytes": held.total,
        "remote_bytes": held.remote,
        "microseconds": seconds * 1e6,
        "L_microseconds": bound * 1e6,
        "C_microseconds": stock.seconds * 1e6,
        "C_backend": case.best.name,
        "C_tried": case.tried,
        "T/L": over_bound(seconds, bound),
        "T/C": over_bound(seconds, stock.seconds),
        "hbm_share": held.local / seconds / ceilings.hbm_stream,
        "link_share": held.remote / seconds / ceilings.link_direct,
        "counted_local_bytes": reads.local_bytes / rounds.calls if reads else None,
        "counted_remote_bytes": reads.remote_bytes / rounds.calls if reads else None,
        "counted": counted,
        "peak_window": reads.peak_window if reads else None,
        "accurate": verdict.passed,
        "rms_error": verdict.ours.rms,
        "max_error": verdict.ours.max_abs,
        "torch_rms_error": verdict.torch_own.rms,
        "torch_max_error": verdict.torch_own.max_abs,
        "served_by": served,
        "same_bits": same,
        # what torch's own kernel gives twice in different bits is no flaw of who calls it
        "repeatable": same or (served == "stock" and not stock_repeats(query, tiered.caches[0])),
        "caches_in_rotation": count,
        "calls": timing.replays,
        "method": timing.method,
        "repeats_microseconds": [value * 1e6 for value in timing.repeats],
    }
    return row, cell


def served_by(query: Tensor, cache: Cache) -> str | None:
    """ "kernel" or "stock" for a query that the decode kernel may serve, None for others."""
    if not query.is_cuda:
        return None
    from dak_inductor.lowering.attention import trials
    from dak_inductor.lowering.attention.configuration import MAXIMUM_QUERIES
    from dak_inductor.lowering.attention.operands import AttentionOperands

    if query.shape[2] > MAXIMUM_QUERIES:
        return None
    call = AttentionOperands(
        query, *cache, lengths=None, starts=None, mask=None,
        scale=1 / math.sqrt(query.shape[3]), causal=True, window=0, softcap=0.0,
    )  # fmt: skip
    kind = trials.kind_of(call)
    return "kernel" if kind is None else trials.CHOICES.of(kind) or "kernel"


def stock_repeats(query: Tensor, cache: Cache, calls: int = 8) -> bool:
    """Whether torch's operator gives the same bits in every one of some calls."""
    attend = StockAttention()
    first = attend(query, cache)
    return all(torch.equal(first, attend(query, cache)) for _ in range(calls - 1))


def judge_sample(case: ResidentCase, output: Tensor) -> AccuracyVerdict:
    """First and last head of first and last sequence against fp32, of a prefill the last queries: a
    whole cache is too large."""
    shape = case.shape
    last = slice(-min(shape.queries, MOST_JUDGED_QUERIES), None)
    key, value = case.caches[0]
    ours, exact, stock = [], [], []
    for sequence in {0, shape.batch - 1}:
        for head in {0, shape.kv_heads - 1}:
            batch, rows = slice(sequence, sequence + 1), slice(head, head + 1)
            queries = slice(head * shape.ratio, (head + 1) * shape.ratio)
            call = AttentionCall(
                case.query[batch, queries, last], key[batch, rows], value[batch, rows],
                scale=1 / math.sqrt(shape.head_dim),
            )  # fmt: skip
            ours.append(output[batch, queries, last])
            exact.append(call.to(torch.float32).stock())
            stock.append(call.stock())
    reference = torch.cat(exact)
    return judge(errors(torch.cat(ours), reference), errors(torch.cat(stock), reference))

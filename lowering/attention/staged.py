"""Attention of many queries over keys and values of which a part is remote, staged in memory.

Remote tokens cross the link once in a call, by copy engine on a stream of their own, into the slots
of a ring. A stock forward attends to slot after slot and, between them, to the local tokens in
place; `partial_results` merges what the calls give (`staged_plan` says which calls). Where no stock
forward knows the mask (lengths that the host does not know, left padding, a sliding window, a soft
cap), the Triton forward takes the calls, which masks by positions in device memory.

A captured graph keeps the parts of the split, and the number of tokens, at capture. After a move
its results stay right, since copies and forwards read through addresses; only the speed suffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dak_inductor.lowering import staging
from dak_inductor.lowering.attention import staged_plan, stock_forward
from dak_inductor.lowering.attention.host_lengths import length_of
from dak_inductor.lowering.attention.operands import AttentionOperands, refusal
from dak_inductor.lowering.attention.partial_results import PartialResult, PartialResults
from dak_inductor.lowering.attention.staged_parts import Forward, Part, Piece, PrefillProblem
from dak_inductor.lowering.attention.staged_plan import StagedPlan
from dak_inductor.lowering.attention.stored_tokens import StoredTokens, count_reads, stored_tokens
from dak_inductor.lowering.gpu_profile import profile_of
from dak_inductor.lowering.marks import MARKS
from dak_inductor.lowering.op_facts import triton_importable
from dak_inductor.lowering.queues import queues_of
from dak_inductor.lowering.refusals import log_once
from dak_inductor.lowering.slots import allocate
from dak_inductor.lowering.stock_attention import stored

log = logging.getLogger(__name__)
_log_once = partial(log_once, log, "a stock kernel reads tiered keys and values: %s")


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that the host must have read: [first, stop).

    `plain`: each sequence is [0, stop), so that stock forwards know what each row sees.
    """

    first: int
    stop: int
    plain: bool


Slot = tuple[Tensor, Tensor]
"""Flat device memory for keys, and for values."""


@dataclass(frozen=True, slots=True)
class StagedAttention:
    """The work for a part, as `staging.issue` asks for it."""

    query: Tensor
    keys: StoredTokens
    values: StoredTokens
    call: AttentionOperands  # what rows see; `query` is its query, aligned
    partials: PartialResults
    partial_dtype: torch.dtype  # of what the Triton forward gives; stock ones give the query's

    def stage(self, part: Part, slot: Slot, stream: int) -> None:
        """Copy the part's keys and values."""
        with MARKS.of_buffers("copy", (self.keys.buffer, self.values.buffer)):
            self.keys.copy(slot[0], part.start, part.stop, stream)
            self.values.copy(slot[1], part.start, part.stop, stream)

    def compute(self, part: Part, slot: Slot | None) -> None:
        """All calls over the part."""
        if slot is None:
            first, key, value = 0, self.keys.tensor, self.values.tensor
        else:
            first = part.start
            key = self.keys.held(slot[0], part.tokens)
            value = self.values.held(slot[1], part.tokens)
        for piece in part.pieces:
            at = slice(piece.start - first, piece.stop - first)
            rows = self.query[:, :, piece.first_row : piece.last_row]
            seen = (key[:, :, at], value[:, :, at])
            if piece.forward == "triton":
                out, lse = self._masked(rows, *seen, piece)
            else:
                scale = self.call.scale
                out, lse = stock_forward.attend(
                    piece.forward, rows, *seen, causal=piece.causal, scale=scale
                )
            self.partials.add(PartialResult(piece.first_row, out, lse))

    def _masked(
        self, rows: Tensor, key: Tensor, value: Tensor, piece: Piece
    ) -> tuple[Tensor, Tensor]:
        from dak_inductor.lowering.triton_attention import forward

        call = self.call
        return forward.attend(
            rows,
            key,
            value,
            out_dtype=self.partial_dtype,
            first_row=piece.first_row,
            queries=self.query.shape[2],
            first_token=piece.start,
            tokens=self.keys.tokens,
            lengths=call.lengths,
            starts=call.starts,
            scale=call.scale,
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
        )


@torch.no_grad()
def run(call: AttentionOperands) -> Tensor | None:
    """Attention as dak::attention has it, [B, Hq, Q, Dv] stored as [B, Q, Hq, Dv].

    On the current stream, without waiting for the device. None, with the reason logged once, where
    the stock composition has to serve the call; without a word where nothing is tiered.

    Keys and values are token-major, or heads with all their tokens. What `host_lengths` has been
    told of the keys' buffer saves reads past the end, and lets stock forwards serve the call.

    Raises DriverError where a copy cannot be queued.
    """
    query, key, value = call.query, call.key, call.value
    buffers = call.buffers
    if buffers == (None, None):
        return None
    reason = refusal(query, key, value, call.mask)
    if reason is not None:
        _log_once(reason)
        return None
    keys, values = stored_tokens(key, buffers[0]), stored_tokens(value, buffers[1])
    if keys is None or values is None:
        _log_once("keys or values are neither token-major nor heads with all their tokens")
        return None
    span = _span(call, keys)
    forwards = _forwards(query, key, value, span)
    if not forwards:
        _log_once("no stock forward knows its mask, dtype or head size, and triton is missing")
        return None
    problem = _problem(call, keys, values, span)
    local = min(keys.local_tokens(), values.local_tokens())
    same = key.data_ptr() == value.data_ptr()
    count = partial(count_reads, (keys,) if same else (keys, values), span.first, span.stop)
    if local >= span.stop and forwards[0] != "triton" and (not call.causal or problem.past == 0):
        with MARKS.of_buffers("stock", buffers):
            out = _one_call(call, span.stop)
            count()
    else:
        tiers = frozenset(buffer.tier for buffer in buffers if buffer is not None)
        plan = _plan(problem, local, query.device.index, tiers, forwards)
        with MARKS.of_buffers("ring", buffers):
            out = _run(plan, call, keys, values, count)
    return stored(out)


def _run(
    plan: StagedPlan,
    call: AttentionOperands,
    keys: StoredTokens,
    values: StoredTokens,
    count: Callable[[], object],
) -> Tensor:
    query = call.query
    partials = PartialResults(query.shape[2], query.dtype)
    widths = (keys.elements, values.elements)
    memory = allocate([tokens * width for tokens in plan.slots for width in widths], query)
    slots = tuple(zip(memory[::2], memory[1::2], strict=True))
    if not _aligned(query):
        query = query.clone(memory_format=torch.contiguous_format)  # once, not in each call
    dtype = torch.float32 if len(plan.pieces) > 1 else query.dtype
    work = StagedAttention(query, keys, values, call, partials, dtype)
    queues = queues_of(query.device)
    staging.issue(plan.parts, work, slots, queues, count, copy_bound=plan.copy_bound)
    return partials.result()


def _one_call(call: AttentionOperands, stop: int) -> Tensor:
    return F.scaled_dot_product_attention(
        call.query,
        call.key[:, :, :stop],
        call.value[:, :, :stop],
        is_causal=call.causal,
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )


def _span(call: AttentionOperands, keys: StoredTokens) -> Span:
    """What the host may take for granted, at the time of a call or of all replays of a graph."""
    query, buffer = call.query, keys.buffer
    known = None if _capturing(query) else length_of(buffer)
    if known is not None and buffer is not None:
        whole = keys.tensor.data_ptr() == buffer.address  # notes count tokens from there
        if not whole or not query.shape[2] <= known.tokens <= keys.tokens:
            known = None
    stop, exact = keys.tokens, call.lengths is None
    if call.lengths is not None and known is not None:
        stop, exact = known.tokens, known.exact
    unpadded = call.starts is None or (known is not None and known.unpadded(call.starts))
    first = 0
    if call.window and exact:
        first = max(0, stop - query.shape[2] - call.window + 1)
    ends_behind = not call.causal or stop >= query.shape[2]
    plain = exact and unpadded and ends_behind and not call.softcap
    return Span(first, stop, plain and not 0 < call.window < stop)


def _capturing(query: Tensor) -> bool:
    return query.is_cuda and torch.cuda.is_current_stream_capturing()


def _aligned(tensor: Tensor) -> bool:
    """Whether rows start on 16 bytes each, as stock forwards read them."""
    size = tensor.element_size()
    strides = [s for s, n in zip(tensor.stride()[:3], tensor.shape, strict=False) if n > 1]
    rows = all(stride and stride * size % 16 == 0 for stride in strides)
    return rows and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0


def _forwards(query: Tensor, key: Tensor, value: Tensor, span: Span) -> tuple[Forward, ...]:
    """Those that can serve the call, stock ones first."""
    stock: tuple[Forward, ...] = ()
    if span.plain and _aligned(key) and _aligned(value):
        stock = stock_forward.available(query, value.shape[3])
    portable = query.is_cuda and triton_importable()
    return (*stock, "triton") if portable else stock


def _problem(
    call: AttentionOperands, keys: StoredTokens, values: StoredTokens, span: Span
) -> PrefillProblem:
    batch, query_heads, queries, head_dim = call.query.shape
    return PrefillProblem(
        batch=batch,
        query_heads=query_heads,
        key_heads=keys.tensor.shape[1],
        queries=queries,
        tokens=span.stop,
        head_dim=head_dim,
        value_dim=values.tensor.shape[3],
        dtype=str(call.query.dtype).removeprefix("torch."),
        causal=call.causal,
        first=span.first,
    )


@lru_cache(maxsize=4096)
def _plan(
    problem: PrefillProblem,
    local: int,
    device_index: int,
    tiers: frozenset[str],
    forwards: tuple[Forward, ...],
) -> StagedPlan:
    profile = profile_of(device_index)
    links = (profile.link(tier) for tier in tiers)
    slowest = min(links, key=lambda link: link.copy_bandwidth)
    return staged_plan.choose(problem, local, profile, slowest, forwards)

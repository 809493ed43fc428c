"""Attention by the kernel or by the stock operator, whichever is faster where both may serve.

The stock operator reads a whole view. So it is asked only where lengths and starts are those of the
view, no mask, window or soft cap is wanted, and nothing is remote. Then it is faster for some
sizes, which no model predicts: at the first call of a kind both are timed on the call's own
operands, as products are (`lowering/linear/trials.py`). With 1% remote trials chose it where it was
slower: 34.6 us with its count, the kernel's 28 (1x16384x8x4, H200). Its results need not be the
same bits in each call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from dak_inductor.lowering import device_counters, reads, stock_attention
from dak_inductor.lowering.attention import dispatch
from dak_inductor.lowering.attention.configuration import MAXIMUM_QUERIES
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.attention.problem import AttentionProblem
from dak_inductor.lowering.choices import Choices, fastest
from dak_inductor.lowering.linear import stopwatch
from dak_inductor.lowering.linear.call_facts import remote_step
from dak_inductor.lowering.linear.trials import TRIALS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """Calls that take about as long: tokens are rounded up to steps of 1.3.
    `order` is that of the strides of keys: which of sequences, heads and tokens lies outermost."""

    problem: AttentionProblem
    order: tuple[int, ...]
    tier: str
    device_index: int


CHOICES: Choices[Kind, Literal["kernel", "stock"]] = Choices()
"""Those of this process."""


def run(call: AttentionOperands) -> Tensor | None:
    """As `dispatch.run`, to which this is the way; by the stock operator where that is faster."""
    kind = kind_of(call) if _reads_the_view(call) else None
    kernel = partial(dispatch.run, call)
    if kind is None or (call.causal and kind.problem.queries > 1):
        return kernel()

    def stock() -> Tensor:
        reads.count_dense("attention", call.key, call.value)
        return stock_attention.attention(call)

    def measure() -> Sequence[float] | None:
        with device_counters.kept((call.key, call.value)):
            if kernel() is None:
                return None
            return stopwatch.seconds_of([kernel, stock], call.query.device)

    return stock() if prefers_stock(kind, measure) else kernel()


def prefers_stock(kind: Kind, measure: Callable[[], Sequence[float] | None]) -> bool:
    """`measure` gives the seconds of the kernel and of the stock operator, or None where the kernel
    declines. It is called as `Choices.make` says; without it the kernel serves."""
    if not TRIALS.enabled:
        return False

    def trial() -> Literal["kernel", "stock"]:
        seconds = measure()
        if seconds is None:
            return "kernel"
        log.info("%s: kernel %.1f us, stock %.1f us", kind, *(1e6 * each for each in seconds))
        return "stock" if fastest(seconds) == 1 else "kernel"

    return CHOICES.make(kind, "kernel", trial, device_index=kind.device_index) == "stock"


def _reads_the_view(call: AttentionOperands) -> bool:
    """Whether every query sees what its causality leaves of all tokens, without a soft cap."""
    if call.lengths is not None or call.starts is not None or call.mask is not None:
        return False
    return call.softcap == 0 and not 0 < call.window < call.key.shape[2]


def kind_of(call: AttentionOperands) -> Kind | None:
    """None where something is remote, or the operands are none that the decode kernel may take."""
    query, key, value = call.query, call.key, call.value
    if not query.is_cuda or query.dim() != 4 or query.numel() == 0 or key.shape[2] == 0:
        return None
    if query.shape[2] > MAXIMUM_QUERIES or key.shape != value.shape:
        return None
    buffers = call.buffers
    if any(buffer is None or not buffer.device_record for buffer in buffers):
        return None
    # the stock operator's reads are counted from the first byte to the last
    if any(reads.extent(cache) != cache.nbytes for cache in (key, value)):
        return None
    if any(
        buffer is not None and reads.dense_read(buffer, cache).remote
        for buffer, cache in zip(buffers, (key, value), strict=True)
    ):
        return None
    problem = dispatch.problem_of(query, key)
    strides = key.stride()
    order = tuple(sorted(range(3), key=lambda axis: strides[axis], reverse=True))
    return Kind(
        replace(problem, tokens=remote_step(problem.tokens)),
        order,
        next(buffer.tier for buffer in buffers if buffer is not None),
        query.device.index,
    )

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
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.lowering import device_counters, reads, stock_attention
from dak_inductor.lowering.attention import dispatch
from dak_inductor.lowering.attention.configuration import MAXIMUM_QUERIES
from dak_inductor.lowering.attention.problem import AttentionProblem
from dak_inductor.lowering.linear import stopwatch
from dak_inductor.lowering.linear.call_facts import remote_step
from dak_inductor.lowering.linear.trials import MOST_KINDS, TRIALS, fastest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """Calls that take about as long: tokens are rounded up to steps of 1.3.
    `order` is that of the strides of keys: which of sequences, heads and tokens lies outermost."""

    problem: AttentionProblem
    order: tuple[int, ...]
    tier: str
    device_index: int


class Choices:
    """For which kinds the stock operator was faster. Thread-safe; one that is made stays."""

    def __init__(self, *, capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing):
        self._capturing = capturing
        self._lock = threading.Lock()
        self._stock: dict[Kind, bool] = {}
        self._running: set[Kind] = set()

    def prefers_stock(self, kind: Kind, measure: Callable[[], Sequence[float] | None]) -> bool:
        """`measure` gives the seconds of the kernel and of the stock operator, or None where the
        kernel declines. It is called for the first call of a kind, unless a graph is being
        captured; the kernel then serves it, and so it does for other threads meanwhile."""
        if not TRIALS.enabled:
            return False
        with self._lock:
            if kind in self._stock:
                return self._stock[kind]
            if kind in self._running or len(self._stock) >= MOST_KINDS or self._capturing():
                return False
            self._running.add(kind)
        stock = False
        try:
            seconds = measure()
            if seconds is not None:
                stock = fastest(seconds) == 1
                log.info(
                    "%s: kernel %.1f us, stock %.1f us", kind, *(1e6 * each for each in seconds)
                )
        except torch.OutOfMemoryError:
            log.info("%s: not measured for want of memory", kind)
        finally:
            with self._lock:
                self._running.discard(kind)
        with self._lock:
            self._stock[kind] = stock
        return stock


CHOICES = Choices()
"""Those of this process."""


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor | None:
    """As `dispatch.run`, to which this is the way; by the stock operator where that is faster."""
    kernel = partial(
        dispatch.run, query, key, value, lengths=lengths, starts=starts, mask=mask, scale=scale,
        causal=causal, window=window, softcap=softcap,
    )  # fmt: skip
    plain = lengths is None and starts is None and mask is None and softcap == 0
    kind = kind_of(query, key, value) if plain else None
    if kind is None or (causal and kind.problem.queries > 1) or 0 < window < key.shape[2]:
        return kernel()

    def stock() -> Tensor:
        reads.count_dense("attention", key, value)
        return stock_attention.attention(
            query, key, value, None, None, None, scale, causal, window, 0.0
        )

    def measure() -> Sequence[float] | None:
        with device_counters.kept((key, value)):
            if kernel() is None:
                return None
            return stopwatch.seconds_of([kernel, stock], query.device)

    return stock() if CHOICES.prefers_stock(kind, measure) else kernel()


def kind_of(query: Tensor, key: Tensor, value: Tensor) -> Kind | None:
    """None where something is remote, or the operands are none that the decode kernel may take."""
    if not query.is_cuda or query.dim() != 4 or query.numel() == 0 or key.shape[2] == 0:
        return None
    if query.shape[2] > MAXIMUM_QUERIES or key.shape != value.shape:
        return None
    buffers = [address_table.lookup(cache.data_ptr()) for cache in (key, value)]
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

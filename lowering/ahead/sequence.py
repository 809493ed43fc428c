"""The products of a step in the order in which they were called; nothing is kept alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.ahead.step_op import RowSpan
from dak_inductor.lowering.linear.call_facts import CallFacts
from dak_inductor.lowering.linear.configuration import DECODE_TOKENS
from dak_inductor.lowering.linear.dispatch import kernel_refusal
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.linear.ring_plan import LEAST_FEATURES

BufferReference = weakref.ref[TieredBuffer] | None
Splits = tuple[tuple[int | None, ...], ...]
SplitOf = Callable[[TieredBuffer], int]
_NONE: Iterator[float] = iter(())


def present_split(buffer: TieredBuffer) -> int:
    """The split of this moment."""
    return buffer.split


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight, [N, K] without gaps between rows. `buffer` is None where it is all local."""

    address: int
    rows: int
    row_bytes: int
    buffer: BufferReference

    def span(self, split_of: SplitOf = present_split) -> RowSpan | None:
        """Which rows are where with that split of its buffer; None where its memory is gone."""
        if self.buffer is None:
            return RowSpan(self.rows, self.rows, self.rows, self.row_bytes)
        buffer = self.buffer()
        if buffer is None:
            return None
        first = split_of(buffer) - (self.address - buffer.address)
        local = min(max(first, 0), self.rows * self.row_bytes)
        remote = -(-local // self.row_bytes)
        start = local // self.row_bytes // LEAST_FEATURES * LEAST_FEATURES
        start = self.rows if remote == self.rows else start
        return RowSpan(self.rows, start, remote, self.row_bytes)


@dataclass(frozen=True, slots=True)
class StepCall:
    """One call.

    Attributes:
        key: what a later call must equal to be taken for the same.
        facts: None of what no kernel of ours takes.
        refusal: why it cannot be staged; "" where it can.
        by_kernel: whether one launch of the kernel takes it.
        before: seconds of what the step does between the call before and this one; 0 if not known.
    """

    key: Hashable
    facts: CallFacts | None
    weights: tuple[StoredWeight, ...]
    refusal: str
    by_kernel: bool = False
    before: float = 0.0

    def splits(self) -> tuple[int | None, ...]:
        """Of the buffers of its weights, None of one that is gone."""
        buffers = [weight.buffer() for weight in self.weights if weight.buffer is not None]
        return tuple([None if buffer is None else buffer.split for buffer in buffers])


@dataclass(frozen=True, slots=True)
class CallSequence:
    """All calls of a step, in order."""

    calls: tuple[StepCall, ...]

    def splits(self) -> Splits | None:
        """Of each call; None where a buffer is gone. A plan holds for one value."""
        found = tuple([call.splits() for call in self.calls])
        return None if any(None in each for each in found) else found

    @property
    def of_few_tokens(self) -> bool:
        """Whether no product has more than one launch of the kernel takes, as in decode."""
        known = [call.facts for call in self.calls if call.facts is not None]
        return all(facts.problem.m <= DECODE_TOKENS for facts in known)

    def with_work(self, between: Mapping[int, Sequence[float]]) -> CallSequence:
        """With the seconds ahead of each product that reads the weight at an address, in the order
        of those products."""
        left = {address: iter(seconds) for address, seconds in between.items()}

        def before(call: StepCall) -> float:
            return sum(next(left.get(weight.address, _NONE), 0.0) for weight in call.weights)

        return CallSequence(tuple([replace(call, before=before(call)) for call in self.calls]))


def call_of(product: Product, written: Collection[TieredBuffer] = ()) -> StepCall:
    """The facts of a call in a graph that writes to these buffers."""
    unfit = product.ring_refusal()
    if unfit is not None:
        return StepCall(product.key, None, (), unfit)
    stored = tuple(map(_stored, product.weights, product.buffers))
    facts, refusal = product.facts(), _refusal(product, written)
    by_kernel = not refusal and facts.problem.m <= DECODE_TOKENS and kernel_refusal(product) is None
    return StepCall(product.key, facts, stored, refusal, by_kernel)


def _stored(weight: Tensor, buffer: TieredBuffer | None) -> StoredWeight:
    rows, columns = weight.shape
    reference = None if buffer is None else weakref.ref(buffer)
    return StoredWeight(weight.data_ptr(), rows, columns * weight.element_size(), reference)


def _refusal(product: Product, written: Collection[TieredBuffer]) -> str:
    if any(buffer is other for buffer in product.buffers for other in written):
        return "the graph writes to its weight"
    if product.layout != "out_in":
        return "its weight is stored [in, out]: every feature has local and remote bytes"
    if any(each.stride(0) != each.shape[1] and each.shape[0] > 1 for each in product.weights):
        return "there are gaps between the weight's rows"
    held = [buffer for buffer in product.buffers if buffer is not None]
    if len({buffer.tier for buffer in held}) > 1:
        return "gate and up lie in different remote tiers"
    return ""

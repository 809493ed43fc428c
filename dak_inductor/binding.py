"""One compiled graph bound to one set of weights, and the bytes that its calls read.

A graph may serve many weights (equal blocks compiled once, two models of one class). A binding is
found at call time by the addresses of the parameters, and keeps what the planner needs of them:
names, calls, sizes. It keeps no weight alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.lowering import counters
from dak_inductor.lowering.ahead.memory import StepMemory
from dak_inductor.offloaded import changes, offloaded_models
from dak_inductor.op_table import Op, OpTable
from dak_inductor.options import WindowOption
from dak_inductor.plan import OpUse
from dak_inductor.sizes import Evaluator

_MOST_SIZES = 256


@dataclass(eq=False)
class Binding:
    """`names` and `buffers` are by index of graph input.

    `device` is that of the weights, None where there are none or they are on several. `values` are
    the symbols' values of the last call, `largest` the largest of each so far, and `grew` says that
    one of them, or the ring of copies ahead, grew since the last plan. `seen_changes` is the state
    of the registry of models for which the binding is known to hold. `window` is the backend's
    option. `ahead` is what is known of the order of the products, once a call has run on a GPU.
    `title` names the graph and the models that its weights are of. `compiled` is what calls it. On
    the `simulated` tier the rewritten operators count themselves, each when it runs.
    """

    graph: str
    table: OpTable
    names: Mapping[int, str]
    buffers: Mapping[int, weakref.ref[TieredBuffer]]
    values: Mapping[str, int]
    simulated: bool
    seen_changes: int
    window: WindowOption | None = None
    device: torch.device | None = None
    title: str = ""
    ahead: StepMemory | None = None
    compiled: weakref.ref[object] | None = None
    calls: int = 0
    largest: dict[str, int] = field(default_factory=dict)
    grew: bool = False
    _tokens: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    _uncounted: int = 0
    _counted_at: tuple[int, ...] = ()
    _reads: list[tuple[Op, TierBytes]] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """False once any of the weights is gone."""
        return all(reference() is not None for reference in self.buffers.values())

    @property
    def is_compiled(self) -> bool:
        """False once what was compiled is gone; its calls are still a guide to plans."""
        return self.compiled is None or self.compiled() is not None

    def live_buffers(self) -> dict[int, TieredBuffer]:
        """The buffers that are still there, by index of graph input."""
        found = ((index, reference()) for index, reference in self.buffers.items())
        return {index: buffer for index, buffer in found if buffer is not None}

    def reads_any(self, buffer_ids: Container[int]) -> bool:
        """Whether one of the buffers that are still there is among these, by identity."""
        return any(id(buffer) in buffer_ids for buffer in self.live_buffers().values())

    @property
    def rows(self) -> int:
        """Rows of the largest product in the graph: tokens per call."""
        evaluate = Evaluator({**self.table.hints, **self.values})
        return max((evaluate(op.m) for op in self.table.ops if op.operand in self.names), default=0)

    def tokens(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The rows of the products of a call with these values of the symbols, each number once:
        what tells prefill from decode.

        () where the graph has one set of sizes.
        """
        if not values:
            return ()
        key = tuple(values.values())  # the graph's symbols are always in one order
        if key not in self._tokens:
            if len(self._tokens) >= _MOST_SIZES:
                self._tokens.clear()
            evaluate = Evaluator({**self.table.hints, **values})
            rows = {evaluate(op.m) for op in self.table.ops if op.operand in self.names}
            self._tokens[key] = tuple(sorted(rows))
        return self._tokens[key]

    def uses(self, calls: float) -> list[OpUse]:
        """The planner's view of the graph with these weights, weighted by `calls`."""
        return self.table.uses(self.names, graph=self.graph, calls=calls, values=self.values)

    def note_call(self, values: Mapping[str, int]) -> None:
        """Count one call with these values of the symbols. Bytes are added up when someone asks, or
        before pages or sizes change."""
        if values and values != self.values:
            self.flush()
            self.grew = self.grew or any(values[s] > self.largest.get(s, 0) for s in values)
            self.largest = {s: max(value, self.largest.get(s, 0)) for s, value in values.items()}
            self.values = values
            self._counted_at = ()
        self.calls += 1
        self._uncounted += 1

    def flush(self) -> None:
        """Hand the bytes of the calls since the last flush to the counters, less those of operators
        that count themselves."""
        calls, self._uncounted = self._uncounted, 0
        if not calls:
            return
        for op, read in self._reads_per_call():
            if not (op.rewrite if self.simulated else op.counts_itself):
                bytes_read = TierBytes(read.local * calls, read.remote * calls)
                counters.record(op.kind, self.names[op.operand], bytes_read, calls)

    def _reads_per_call(self) -> list[tuple[Op, TierBytes]]:
        buffers = self.live_buffers()
        state = tuple(buffer.generation for buffer in buffers.values())
        if self._reads and state == self._counted_at:
            return self._reads
        evaluate = Evaluator({**self.table.hints, **self.values})
        self._reads = []
        for op in self.table.ops:
            buffer = buffers.get(op.operand)
            if buffer is None:
                continue
            held = buffer.bytes_by_tier()
            touched = min(evaluate(op.touched), held.total)
            remote = round(touched * held.remote_share)
            self._reads.append((op, TierBytes(touched - remote, remote)))
        self._counted_at = state
        return self._reads


def bind(
    graph: str, table: OpTable, arguments: Sequence[object], *, window: WindowOption | None = None
) -> Binding:
    """Look up which operands of a call are tiered."""
    seen_changes = changes()
    known = {
        id(tensor.buffer): (tensor.name, model.label)
        for model in offloaded_models()
        for tensor in model.tensors()
    }
    names: dict[int, str] = {}
    buffers: dict[int, TieredBuffer] = {}
    tiered: list[torch.Tensor] = []
    for index in table.operands():
        argument = arguments[index]
        if not isinstance(argument, torch.Tensor):
            continue
        buffer = address_table.lookup(argument.data_ptr())
        if buffer is not None:
            tiered.append(argument)
            names[index] = known.get(id(buffer), (buffer.label, ""))[0]
            buffers[index] = buffer
    models = dict.fromkeys(known[id(b)][1] for b in buffers.values() if id(b) in known)
    devices = {argument.device for argument in tiered}
    simulated = any(buffer.device.type == "cpu" for buffer in buffers.values())
    return Binding(
        graph=graph,
        table=table,
        names=names,
        buffers={index: weakref.ref(buffer) for index, buffer in buffers.items()},
        values=table.symbol_values(arguments),
        simulated=simulated,
        seen_changes=seen_changes,
        window=window,
        device=devices.pop() if len(devices) == 1 else None,
        title=f"{graph} of {' + '.join(models)}" if models else graph,
    )

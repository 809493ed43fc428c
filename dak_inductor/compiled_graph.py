"""The compiled graph that the backend returns: what happens around each of its runs.

The first call of each (graph, weights) makes a binding, by which the planner knows its operators,
and later plans are weighted by calls. Plans are made at step boundaries, inside our own callable,
and `placement` moves the pages.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from dak_inductor import placement, replanning
from dak_inductor.ahead_room import copies_help, ring_room
from dak_inductor.binding import Binding, bind
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import DeviceMemoryError, NothingOffloadedError, ResidentCopyError
from dak_inductor.kv_cache_steps import CacheStep, StepRunner
from dak_inductor.link_window import set_windows
from dak_inductor.lowering.ahead.memory import StepMemory
from dak_inductor.lowering.gpu_profile import profile_of
from dak_inductor.lowering.linear.trials import TRIALS
from dak_inductor.lowering.marks import MARKS
from dak_inductor.offloaded import changes, offloaded_models
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.op_table import OpTable
from dak_inductor.options import BackendOptions
from dak_inductor.out_of_memory import advice
from dak_inductor.resident_copies import has_memory, reads_nothing_offloaded, resident_copies
from dak_inductor.session import Session
from dak_inductor.tensor_names import few_of
from dak_inductor.work_between import seconds_between
from dak_inductor.written_inputs import buffers_of

log = logging.getLogger(__name__)


class CompiledGraph:
    """What the backend returns: runs the compiled graph, and keeps the session informed.

    `run` is set once, after compilation. The operands' addresses are compared at each call;
    everything else happens only when they are new, or at the calls where a plan is due. `steps` are
    what the graph writes to KV caches, `written` the inputs to which it writes.
    """

    def __init__(
        self,
        table: OpTable,
        settings: BackendOptions,
        session: Session,
        steps: Sequence[CacheStep] = (),
        written: tuple[int, ...] = (),
    ) -> None:
        self.table = table
        self.settings = settings
        self.steps = StepRunner(steps)
        self.written = written
        self.name = session.graph_name()
        self.run: Callable[..., Any] = _not_compiled
        self._session = session
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._plain: list[int] | None = None  # parameters that are tensors with memory of their own

    def __call__(self, *arguments: Any) -> Any:
        with placement.LAUNCH_LOCK:
            binding = self._binding(arguments)
            if binding.calls == 0:
                self._make_room(binding)
            values = self.table.symbol_values(arguments)
            written = self.steps.before(arguments, lambda: {**self.table.hints, **values})
            try:
                with (
                    MARKS.of("graph", binding.title),
                    self._ahead(binding, arguments, values),
                ):
                    result = self.run(*arguments)
            except torch.OutOfMemoryError as error:
                raise DeviceMemoryError(advice(_models_of(binding), error)) from error
            self.steps.after(written)
        binding.note_call(values)
        if binding.ahead is not None and binding.ahead.ring.grew():
            binding.grew = True
        if binding.names and replanning.is_due(binding):
            self._replan(binding)
        return result

    def log_placement(self, example_inputs: Sequence[Any]) -> None:
        """One line per compile: what of this graph's operands lies where."""
        held = TierBytes()
        for index in self.table.operands():
            value = example_inputs[index]
            if has_memory(value):
                buffer = address_table.lookup(value.data_ptr())
                held = held + (buffer.bytes_by_tier() if buffer else TierBytes(value.nbytes, 0))
        log.info(
            "%s: %d operators, %d refused; operands %.3f GB local, %.3f GB remote",
            self.name,
            len(self.table.ops),
            len(self.table.refusals),
            held.local / 1e9,
            held.remote / 1e9,
        )

    def _binding(self, arguments: Sequence[Any]) -> Binding:
        if self._plain is None:
            caches = self.steps.operands
            self._plain = [i for i in self.table.parameters if has_memory(arguments[i])]
            self._plain += [i for i in caches if i not in self._plain]
        key = tuple([arguments[index].data_ptr() for index in self._plain])
        binding = self._bindings.get(key)
        if binding is not None and binding.seen_changes != changes():
            # Models came or went, and memory of one that went may be that of one that came.
            binding.seen_changes = changes()
            if not binding.alive:
                binding = None
        if binding is None:
            binding = bind(self.name, self.table, arguments, window=self.settings.window)
            binding.compiled = weakref.ref(self)
            self._check(binding, arguments)
            if binding.window is not None:
                set_windows(binding.window, binding.live_buffers().values())
            if self.settings.trials is not None:
                TRIALS.switch(self.settings.trials)
            if self.settings.nvtx is not None:
                MARKS.switch(self.settings.nvtx)
            # A server makes a cache for each request: what was bound to those that went goes too.
            self._bindings = {k: bound for k, bound in self._bindings.items() if bound.alive}
            self._bindings[key] = binding
            self._session.add(binding)
        return binding

    def _ahead(
        self, binding: Binding, arguments: Sequence[Any], values: Mapping[str, int]
    ) -> AbstractContextManager[None]:
        """Copies ahead of the products of this call, where the option has them and a GPU reads."""
        device = binding.device
        if device is None or not copies_help(device):
            return nullcontext()
        if binding.ahead is None:
            models = partial(_models_of, binding)
            binding.ahead = StepMemory(
                self.name, self.settings.strategy, lambda: ring_room(device, models())
            )
        return binding.ahead.opened(
            binding.tokens(values),
            device,
            partial(buffers_of, arguments, self.written),
            partial(_between, binding, arguments, values, device),
        )

    def _check(self, binding: Binding, arguments: Sequence[Any]) -> None:
        found = resident_copies(self.table, binding, arguments)
        for model, copies in found.items():
            message = (
                f"{few_of(copies)}: offloaded weights were replaced by tensors that lie whole on "
                "the device (deepcopy, .half(), load_state_dict(assign=True)), or this model is "
                f"like an offloaded {model.label} and was never offloaded. They run, but nothing "
                "of them is offloaded; call dak.offload (after dak.restore, where it was "
                "offloaded)."
            )
            if self.settings.strict:
                raise ResidentCopyError(message)
            self._session.warn_once(model, message)
        if not found and reads_nothing_offloaded(self.table, binding, arguments):
            message = (
                'backend="dak" compiles a model of which nothing is offloaded: call '
                "dak.offload(model, ...) first"
            )
            if self.settings.strict:
                raise NothingOffloadedError(message)
            self._session.warn_once(self._session, message)

    def _make_room(self, binding: Binding) -> None:
        """Before the first run: allocations since the last plan may have used up the budget."""
        for model in _models_of(binding):
            if model.required_remote_bytes() > model.planned_bytes().remote:
                self._replan(binding, measured=False)

    def _replan(self, binding: Binding, *, measured: bool = True) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            if self._session.automatic_moves:
                log.info(
                    "a CUDA graph is being captured by the caller: automatic moves are off "
                    "from here on"
                )
            self._session.automatic_moves = False
            return
        if not self._session.automatic_moves:
            return
        binding.grew = False
        with placement.LAUNCH_LOCK:  # no cache comes between a plan and its moves
            for model in _models_of(binding):
                self._session.flush()
                replanning.replan(
                    model,
                    self._session.bindings(),
                    user_plan=self.settings.plan,
                    measured=measured,
                )


def _models_of(binding: Binding) -> list[OffloadedModel]:
    return [model for model in offloaded_models() if binding.reads_any(model.buffer_ids())]


def _between(
    binding: Binding, arguments: Sequence[Any], values: Mapping[str, int], device: torch.device
) -> dict[int, list[float]]:
    caches = [cache for model in _models_of(binding) for cache in model.caches]
    return seconds_between(binding, arguments, values, caches, profile_of(device.index))


def _not_compiled(*_: Any) -> Any:
    raise RuntimeError("this graph was never compiled")

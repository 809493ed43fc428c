"""What this process has compiled: the bindings by which plans know its graphs."""

from __future__ import annotations

import threading
import warnings
import weakref

from dak_inductor.binding import Binding
from dak_inductor.offloaded import offloaded_models


class Session:
    """Process-wide: the bindings seen so far. Thread-safe.

    `automatic_moves` is False from the first plan that fell due inside the caller's own capture of
    a CUDA graph, whose replays hold pages where they are.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._bindings: list[Binding] = []
        self._graphs = 0
        self._warned: weakref.WeakSet[object] = weakref.WeakSet()
        self.automatic_moves = True

    def graph_name(self) -> str:
        """A fresh name for a compiled graph."""
        with self._lock:
            self._graphs += 1
            return f"graph{self._graphs - 1}"

    def add(self, binding: Binding) -> None:
        """Remember a binding for planning."""
        with self._lock:
            self._forget_dead()
            self._bindings.append(binding)

    def bindings(self) -> list[Binding]:
        """All bindings whose weights are still offloaded."""
        offloaded = {key for model in offloaded_models() for key in model.buffer_ids()}
        with self._lock:
            self._forget_dead()
            self._bindings = [
                binding
                for binding in self._bindings
                if not binding.buffers or binding.reads_any(offloaded)
            ]
            return list(self._bindings)

    def _forget_dead(self) -> None:
        """Of memory that went, such as a request's cache, calls are no guide to a plan any more."""
        dead = [binding for binding in self._bindings if not binding.alive]
        for binding in dead:
            binding.flush()
        if dead:
            self._bindings = [binding for binding in self._bindings if binding.alive]

    def flush(self) -> None:
        """Bring the counters up to date."""
        for binding in self.bindings():
            binding.flush()

    def readers(self) -> dict[int, tuple[str, tuple[str, ...]]]:
        """By id of its buffer: a tensor's name, and the kinds of operators that read it and count
        themselves."""
        kinds: dict[int, tuple[str, set[str]]] = {}
        for binding in self.bindings():
            buffers = binding.live_buffers()
            for op in binding.table.ops:
                if op.counts_itself and (buffer := buffers.get(op.operand)) is not None:
                    name = binding.names[op.operand]
                    kinds.setdefault(id(buffer), (name, set()))[1].add(op.kind)
        return {key: (name, tuple(sorted(found))) for key, (name, found) in kinds.items()}

    def warn_once(self, about: object, message: str) -> None:
        """Warn, once about each thing."""
        with self._lock:
            if about in self._warned:
                return
            self._warned.add(about)
        warnings.warn(message, stacklevel=4)

    def reset(self) -> None:
        """Forget every graph seen. Offloaded models stay as they are."""
        with self._lock:
            self._bindings.clear()
            self._warned.clear()
            self.automatic_moves = True


SESSION = Session()

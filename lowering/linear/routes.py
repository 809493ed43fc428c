"""How calls were served, so that one like an earlier call is served alike without asking again.

What decides on a call are its operands' addresses, shapes and types, the splits of its weights, and
trials that have been made. A route holds as long as all of these are the same. To ask again takes
the host longer than the call itself, outside of a CUDA graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.linear.launch import LinearLaunch
from dak_inductor.lowering.linear.open_step import in_graph
from dak_inductor.lowering.linear.operands import Operands
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.linear.ring import PreparedRing
from dak_inductor.lowering.linear.stock import StockProduct
from dak_inductor.lowering.linear.ways import WayName
from dak_inductor.lowering.marks import MARKS, text_of

MOST_ROUTES = 8192
"""The one found first goes first."""


@dataclass(frozen=True, slots=True)
class Route:
    """How calls with one key are served.

    Attributes:
        launch: the kernel's; None for other ways.
        calls: serves them where it is another way, outside of captures.
        shape: of the result.
        trials: the state of `Trials` that it was chosen in.
        splits: of the buffers of its weights.
        local: addresses of those that are in none.
        mark: its calls on a profiler's timeline.
    """

    way: WayName
    problem: LinearProblem
    launch: LinearLaunch | None
    calls: PreparedRing | StockProduct | None
    shape: torch.Size
    trials: int
    splits: tuple[tuple[weakref.ref[TieredBuffer], int], ...]
    local: tuple[int, ...]
    mark: str

    def holds(self, trials: int) -> bool:
        """Whether calls are still served so. Weights with these addresses are in these buffers, as
        long as they live."""
        if trials != self.trials or (self.launch is not None and not self.launch.holds):
            return False
        for reference, split in self.splits:
            buffer = reference()
            if buffer is None or buffer.split != split or not buffer.usable:
                return False
        return not any(address_table.lookup(address) for address in self.local)

    def at_once(self, call: Operands, *, captured: bool) -> Tensor | None:
        """The result, where it can be had without a look at the operands.

        captured: the call is; in a graph a ring has another plan.
        """
        if self.launch is not None:
            if not self.launch.takes(call.x, call.residual):
                return None
        elif self.calls is None or (captured and self.way == "ring"):
            return None
        if MARKS.on:
            with MARKS.ready(self.mark):
                return self._serve(call)
        return self._serve(call)

    def _serve(self, call: Operands) -> Tensor:
        if self.launch is not None:
            return self.launch.run(call.x, call.residual, self.shape)
        assert self.calls is not None
        return self.calls(call)


class Routes:
    """Those of a process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Hashable, Route] = {}

    def find(self, key: Hashable, trials: int, *, spared: bool) -> Route | None:
        """That of an earlier call with this key, with the host spared or not, inside of a graph as
        this thread is. No lock: most calls of a process do nothing else."""
        place = key, spared, in_graph()
        route = self._found.get(place)
        if route is None or route.holds(trials):
            return route
        with self._lock:
            self._found.pop(place, None)
        return None

    def keep(
        self,
        product: Product,
        way: WayName,
        problem: LinearProblem,
        launch: LinearLaunch | None,
        trials: int,
        *,
        spared: bool,
    ) -> None:
        """Remember how this call was served."""
        held = [
            (weight.data_ptr(), buffer)
            for weight, buffer in zip(product.weights, product.buffers, strict=True)
        ]
        route = Route(
            way,
            problem,
            launch,
            _calls(way, product, problem),
            torch.Size((*product.x.shape[:-1], problem.n)),
            trials,
            tuple([(weakref.ref(each), each.split) for _, each in held if each is not None]),
            tuple([address for address, each in held if each is None]),
            text_of("direct" if launch is not None else way, product.buffers),
        )
        place = product.key, spared, in_graph()
        with self._lock:
            self._found.pop(place, None)
            self._found[place] = route
            while len(self._found) > MOST_ROUTES:
                del self._found[next(iter(self._found))]


def _calls(
    way: WayName, product: Product, problem: LinearProblem
) -> PreparedRing | StockProduct | None:
    if way == "stock":
        return StockProduct(product.weights, product.layout)
    if way == "ring":
        device = product.x.device
        return PreparedRing(problem, product.weights, product.buffers, device, in_graph=False)
    return None


ROUTES = Routes()
"""Those of this process."""

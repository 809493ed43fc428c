"""How calls were served, so that one like an earlier call is served alike without asking again.

What decides on a call are its operands' addresses, shapes and types, the splits of its weights, and
trials that have been made. A route holds as long as all of these are the same. To ask again takes
the host 100 us, of the 150 that a product takes outside of a CUDA graph.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.linear.launch import LinearLaunch
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.linear.ways import WayName

MOST_ROUTES = 8192
"""The one used longest ago goes first."""


@dataclass(frozen=True, slots=True)
class Route:
    """`launch` is the kernel's, None for other ways."""

    way: WayName
    problem: LinearProblem
    launch: LinearLaunch | None
    trials: int  # the state of `Trials` that it was chosen in
    buffers: tuple[weakref.ref[TieredBuffer] | None, ...]
    splits: tuple[int, ...]

    def holds(self, product: Product, trials: int) -> bool:
        """Whether the call is served alike; its key is the same."""
        if trials != self.trials or (self.launch is not None and not self.launch.holds):
            return False
        for buffer, reference, split in zip(
            product.buffers, self.buffers, self.splits, strict=True
        ):
            before = None if reference is None else reference()
            if before is not buffer or (buffer is not None and buffer.split != split):
                return False
        return True


class Routes:
    """Those of a process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, Route] = OrderedDict()

    def find(self, product: Product, trials: int) -> Route | None:
        """That of an earlier call like this one."""
        with self._lock:
            route = self._found.get(product.key)
            if route is None:
                return None
            if route.holds(product, trials):
                self._found.move_to_end(product.key)
                return route
            del self._found[product.key]
            return None

    def keep(
        self,
        product: Product,
        way: WayName,
        problem: LinearProblem,
        launch: LinearLaunch | None,
        trials: int,
    ) -> None:
        """Remember how this call was served."""
        route = Route(
            way,
            problem,
            launch,
            trials,
            tuple([None if each is None else weakref.ref(each) for each in product.buffers]),
            tuple([0 if each is None else each.split for each in product.buffers]),
        )
        with self._lock:
            self._found[product.key] = route
            if len(self._found) > MOST_ROUTES:
                self._found.popitem(last=False)


ROUTES = Routes()
"""Those of this process."""

"""Who is offered the products of a thread before they are served one by one.

`dak_inductor.lowering.ahead` opens a step around each call of a compiled graph.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from dak_inductor.lowering.linear.product import Product


class Step(Protocol):
    """What products of an open step are offered to."""

    @property
    def measures(self) -> bool:
        """Whether trials may run: copies ahead would slow down what they time."""

    def serve(self, product: Product) -> Tensor | None:
        """The product, or None where it is to run as without the step."""


@dataclass(frozen=True, slots=True)
class OutsideStep:
    """Of a graph that is called inside the step of another one."""

    measures: bool

    def serve(self, product: Product) -> Tensor | None:
        """None."""
        return None


class _Open(threading.local):
    """What is open in this thread."""

    step: Step | None = None
    spares_host = False
    in_graph = False


_open = _Open()


def spares_host() -> bool:
    """Whether products of this thread, outside of captures, are served in the way that takes the
    least of GPU and host together. So they are where a step's plan finds the host slower."""
    return _open.spares_host


def spare_host(on: bool) -> bool:
    """Returns what it was before."""
    before, _open.spares_host = _open.spares_host, on
    return before


def in_graph() -> bool:
    """Whether this thread is in a call of a compiled graph, whose products lie between kernels of
    Inductor's."""
    return _open.in_graph


def enter_graph(on: bool) -> bool:
    """Returns what it was before."""
    before, _open.in_graph = _open.in_graph, on
    return before


def current() -> Step | None:
    """The step that is open in this thread."""
    return _open.step


def enter(step: Step | None) -> Step | None:
    """Make `step` the open one of this thread; returns the one before, to `enter` afterwards."""
    before, _open.step = _open.step, step
    return before

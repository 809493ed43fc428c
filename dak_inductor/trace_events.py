"""What a profiler saw of a step, in lanes that tell direct reads, staged ones and compute apart.

The profiler's launches say which work of the GPU comes from which of our marks
(`dak_inductor.lowering.marks`). Work without a launch of its own, in replays of CUDA graphs, has no
mark: it is told apart by the names of kernels, and by nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dak_inductor.lowering.marks import PREFIX

Event = Mapping[str, Any]
Thread = tuple[object, object]  # process and thread

LANES = {
    "direct": "direct: kernels that read both memories in place",
    "copy": "copies",
    "staged": "staged: products and attention behind copies",
    "stock": "stock kernels on divided tensors",
    "trial": "trials: ways being timed",
    "compute": "compute: everything else",
}
_LANE_OF_KIND = {"ring": "staged", "move": "copy"}
_DIRECT = "tiered_"
"""In the name of every kernel that reads a divided weight or cache in place: tiered_linear,
tiered_attention, and Inductor's name of the portable product, triton_tem_fused_..tiered_mm.."""
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True, slots=True)
class Mark:
    """One range of the host, in microseconds. `name` is of what is read, or of the graph."""

    kind: str
    name: str
    start: float
    stop: float
    thread: Thread


@dataclass(frozen=True, slots=True)
class Work:
    """One kernel or copy. `mark` is the innermost one around its launch, None where none is known;
    `graph` is that of the compiled call."""

    lane: str
    kernel: str
    device: int
    start: float
    microseconds: float
    mark: Mark | None
    graph: str
    details: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The module, where it is known."""
        return self.kernel if self.mark is None else self.mark.name


def marks_of(events: Iterable[Event]) -> list[Mark]:
    """Our marks, outer ones before those inside of them."""
    found = []
    for event in events:
        prefix, _, rest = str(event.get("name", "")).partition(" ")
        if event.get("cat") == "user_annotation" and prefix == PREFIX and event.get("ph") == "X":
            kind, _, name = rest.partition(" ")
            start = float(event["ts"])
            stop = start + float(event["dur"])
            found.append(Mark(kind, name, start, stop, (event.get("pid"), event.get("tid"))))
    return sorted(found, key=lambda mark: (mark.start, -mark.stop))


def work_of(events: Sequence[Event], marks: Sequence[Mark]) -> list[Work]:
    """What GPUs did, in order of start."""
    around = _Around(marks)
    launches: dict[object, Event] = {}
    callers: dict[object, Event] = {}
    for event in events:
        told = event.get("args") or {}
        if event.get("cat") in _LAUNCHES and "correlation" in told:
            launches[told["correlation"]] = event
        elif event.get("cat") in ("cpu_op", "user_annotation") and "External id" in told:
            callers[told["External id"]] = event
    found = []
    for event in events:
        if event.get("cat") not in _ON_GPU or event.get("ph") != "X":
            continue
        told = event.get("args") or {}
        # a copy that was queued by the driver's own call has no launch, but an operator around it
        host = launches.get(told.get("correlation")) or callers.get(told.get("External id"))
        inside = [] if host is None else around.moment(host)
        found.append(_work(event, told, inside))
    return sorted(found, key=lambda work: work.start)


def _work(event: Event, told: Mapping[str, Any], inside: Sequence[Mark]) -> Work:
    mark = inside[-1] if inside and inside[-1].kind != "graph" else None
    graph = next((each.name for each in inside if each.kind == "graph"), "")
    kernel = str(event["name"])
    if any(each.kind == "trial" for each in inside):
        lane = "trial"
    elif event["cat"] == "gpu_memcpy":
        lane = "copy"
    elif mark is not None:
        lane = _LANE_OF_KIND.get(mark.kind, mark.kind)
    else:
        lane = "direct" if _DIRECT in kernel else "compute"
    kept = ("stream", "bytes", "memory bandwidth (GB/s)", "grid", "block")
    return Work(
        lane=lane,
        kernel=kernel,
        device=int(told.get("device", 0)),
        start=float(event["ts"]),
        microseconds=float(event["dur"]),
        mark=mark,
        graph=graph,
        details={key: told[key] for key in kept if key in told},
    )


class _Around:
    """Marks by thread, to be asked for those around a moment."""

    def __init__(self, marks: Iterable[Mark]) -> None:
        self._marks: dict[Thread, list[Mark]] = {}
        for mark in marks:
            self._marks.setdefault(mark.thread, []).append(mark)
        self._starts = {t: [mark.start for mark in each] for t, each in self._marks.items()}
        # calls of graphs do not overlap on a thread, so few marks lie before the one that is sought
        self._outer = {t: _enclosing(each) for t, each in self._marks.items()}

    def moment(self, event: Event) -> list[Mark]:
        """The marks around the start of a host's event, the innermost last."""
        thread, at = (event.get("pid"), event.get("tid")), float(event["ts"])
        marks = self._marks.get(thread, [])
        number: int | None = bisect_right(self._starts.get(thread, []), at) - 1
        found: list[Mark] = []
        while number is not None and number >= 0:
            if marks[number].stop >= at:
                found.append(marks[number])
            number = self._outer[thread][number]
        return found[::-1]


def _enclosing(marks: Sequence[Mark]) -> list[int | None]:
    """By mark, the number of the one that it lies in."""
    found: list[int | None] = []
    open_: list[int] = []
    for number, mark in enumerate(marks):
        while open_ and marks[open_[-1]].stop < mark.stop:
            open_.pop()
        found.append(open_[-1] if open_ else None)
        open_.append(number)
    return found

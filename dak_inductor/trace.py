"""`dak.trace(model, path)`: what the GPU did, by strategy and module, for Perfetto."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dak_inductor.errors import ModelError, OptionError
from dak_inductor.lowering.marks import MARKS
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.trace_events import LANES, Event, Mark, Work, marks_of, work_of
from dak_inductor.trace_labels import process_name, thread_name, thread_position

_HOST = 1  # process of the host's marks; those of GPUs come behind it
_ROWS = 16  # threads that a lane may have: work that overlaps lies in one below the other


@contextmanager
def trace(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Write what runs inside of the `with` block to `path`, in Chrome's trace format, which
    ui.perfetto.dev and chrome://tracing open.

    Run a step before, or compilation and trials are what is seen. Times on the GPU are those of the
    work; the host takes longer while it is watched, so a step that waits for the host does too.
    Nothing is written where the block raises.

    Raises:
        ModelError: the model is not offloaded.
        OptionError: the file cannot be written.
    """
    record = record_of(model)
    if record is None:
        raise ModelError(
            f"{type(model).__name__} is not offloaded; call dak.offload(model, ...) first"
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise OptionError(f"{target} cannot be written: {target.parent} is no folder")
    on_gpu = record.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(record.device)
    with (
        torch.profiler.profile(activities=activities) as profiler,
        MARKS.recorded(torch.profiler.record_function),
    ):
        yield
        if on_gpu:
            torch.cuda.synchronize(record.device)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.json"
        profiler.export_chrome_trace(str(whole))
        events = json.loads(whole.read_text(encoding="utf-8"))["traceEvents"]
    try:
        target.write_text(to_trace(events, record), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{target} cannot be written: {error.strerror or error}") from error


def to_trace(events: Sequence[Event], record: OffloadedModel) -> str:
    """The file's text, from the events of torch's profiler."""
    marks = marks_of(events)
    work = work_of(events, marks)
    real = record.device.type == "cuda"
    if real and not work:
        warnings.warn(
            "the profiler saw no work of a GPU: nothing ran inside of dak.trace, or this process "
            "may not use CUPTI",
            stacklevel=4,
        )
    where = "host" if real else "simulated tier: counts are real, times are of no GPU"
    begin = min([*(mark.start for mark in marks), *(each.start for each in work)], default=0.0)
    written = [
        *_processes(where, {each.device for each in work}),
        *_on_host(marks, begin),
        *_on_devices(work, begin),
    ]
    told = {
        "what": f"measured by torch.profiler, torch {torch.__version__}" if real else where,
        "model": record.label,
        "remote": record.remote,
        "microseconds": {
            lane: round(sum(each.microseconds for each in work if each.lane == lane), 3)
            for lane in {each.lane: None for each in work}
        },
        "without a mark": sum(each.mark is None for each in work),
    }
    if real:
        told["device"] = torch.cuda.get_device_name(record.device)
    return (
        json.dumps({"traceEvents": written, "displayTimeUnit": "ms", "otherData": told},
                   allow_nan=False) + "\n"
    )  # fmt: skip


def _processes(where: str, devices: Iterable[int]) -> Iterator[dict[str, Any]]:
    yield process_name(_HOST, where)
    for device in sorted(devices):
        yield process_name(_HOST + 1 + device, f"GPU {device}: measured")


def _on_host(marks: Iterable[Mark], begin: float) -> Iterator[dict[str, Any]]:
    """Calls of graphs, and in them what was queued; a thread for each of the host's."""
    threads: dict[object, int] = {}
    for mark in marks:
        number = threads.setdefault(mark.thread, len(threads) + 1)
        yield {
            "name": f"{mark.kind} {mark.name}",
            "cat": mark.kind,
            "ph": "X",
            "pid": _HOST,
            "tid": number,
            "ts": mark.start - begin,
            "dur": mark.stop - mark.start,
        }
    for number in threads.values():
        yield thread_name(_HOST, number, f"thread {number}")


def _on_devices(work: Iterable[Work], begin: float) -> Iterator[dict[str, Any]]:
    """A lane for each kind of work; a kernel that starts while the one before it runs, as dependent
    launches do, lies in a row of its own."""
    lanes = list(LANES)
    ends: dict[tuple[int, str], list[float]] = {}
    named: set[tuple[int, int]] = set()
    for each in work:
        if each.lane not in lanes:
            lanes.append(each.lane)
        rows = ends.setdefault((each.device, each.lane), [])
        row = next((i for i, end in enumerate(rows) if end <= each.start), len(rows))
        row = min(row, _ROWS - 1)
        rows[row : row + 1] = [each.start + each.microseconds]
        process, thread = _HOST + 1 + each.device, lanes.index(each.lane) * _ROWS + row + 1
        if (process, thread) not in named:
            named.add((process, thread))
            yield thread_name(process, thread, LANES.get(each.lane, each.lane))
            yield thread_position(process, thread)
        told = {"kernel": each.kernel, "graph": each.graph, **each.details}
        yield {
            "name": each.label,
            "cat": each.lane,
            "ph": "X",
            "pid": process,
            "tid": thread,
            "ts": each.start - begin,
            "dur": each.microseconds,
            "args": {key: value for key, value in told.items() if value != ""},
        }

"""Moving pages of live weights and KV caches: the only code that does.

Moves happen under the launch lock, after the device is idle, and never while a CUDA graph is being
captured, because unmapping a page is not ordered with streams.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace

import torch

from dak_inductor.cuda_runtime.memory_lock import MEMORY_LOCK
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.errors import DakError, MoveError
from dak_inductor.lowering.marks import MARKS
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.plan import Plan

log = logging.getLogger(__name__)

LAUNCH_LOCK = threading.RLock()
"""Held by whoever launches work on tiered tensors, and by whoever moves their pages."""


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What was moved, and how long it took, preparations included.

    `pause` is the part of it with the device idle. `skipped_bytes` could not come back to the GPU
    without exceeding the budget by parts of pages.
    """

    bytes_to_remote: int = 0
    bytes_to_local: int = 0
    seconds: float = 0.0
    tensors: int = 0
    skipped_bytes: int = 0
    pause: float = 0.0


def apply(plan: Plan, model: OffloadedModel) -> MoveReport:
    """Move weights and caches of `model` to where `plan` wants them, all or nothing.

    Tensors leave the GPU first and come back afterwards, so that the budget holds in between too.
    Raises PlanError for a plan of another model, MoveError for a plan that the budget does not
    allow, during a capture, and where a move fails; then the old placement stands.
    """
    tensors = model.tensors()
    plan.check_model(model.fingerprint, {t.name: t.buffer.nbytes for t in tensors})
    start = time.perf_counter()
    with LAUNCH_LOCK, MEMORY_LOCK:
        _refuse_capture(model.device)
        wanted = {
            tensor.buffer: tensor.buffer.nearest_split(
                tensor.buffer.nbytes - plan.splits[tensor.name]
            )
            for tensor in tensors
        }
        moves = {b: split for b, split in wanted.items() if split != b.split}
        if not moves:
            return MoveReport(seconds=time.perf_counter() - start)
        room = _room(plan, model)
        demotions = {b: split for b, split in moves.items() if split < b.split}
        _prepare(demotions, room - model.claimed_bytes().local)
        idle_from = time.perf_counter()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        with MARKS.of("move", model.label):
            report = _move_all(moves, room, model.claimed_bytes().local)
    end = time.perf_counter()
    return replace(report, seconds=end - start, pause=end - idle_from)


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise MoveError(
            "pages cannot move while a CUDA graph is being captured: apply the plan before or after"
        )


def _prepare(demotions: dict[TieredBuffer, int], room: int) -> None:
    """Make the remote pages while the device still works; those of promotions may not fit yet.

    Only for as many moves as `room` bytes of local memory allow: each may hold some beside the old.
    """
    pending = []
    try:
        for buffer, split in demotions.items():
            room -= buffer.transient_bytes
            if room < 0:
                break
            pending.append(buffer.prepare_move(split))
        for pages in pending:
            if pages is not None:
                pages.wait()
    except (DakError, RuntimeError, MemoryError) as error:
        for buffer in demotions:
            buffer.cancel_move()
        raise MoveError(f"the old placement stands: {error}") from error


def _room(plan: Plan, model: OffloadedModel) -> int:
    """Bytes of local pages that the model may hold during and after the moves."""
    available = model.budget.weight_bytes_available(model)
    local = plan.total_bytes - plan.remote_bytes
    held = model.planned_bytes().local
    if local > available and local > held:
        raise MoveError(
            f"the plan keeps {local:,} bytes of {model.label} on {model.device}, the budget leaves "
            f"{available:,}: nothing was moved. Raise gpu_memory by {local - available:,} bytes."
        )
    return max(available, model.claimed_bytes().local)


def _move_all(moves: dict[TieredBuffer, int], room: int, held: int) -> MoveReport:
    """Demotions, then promotions as far as `room` allows; undone as a whole on any failure.

    `held` bytes of local pages are the model's, caches at full length, and `room` bytes may be.
    """
    others = held - sum(buffer.claimed_bytes().local for buffer in moves)
    demotions = [b for b, split in moves.items() if split < b.split]
    promotions = [b for b, split in moves.items() if split > b.split]
    done: list[tuple[TieredBuffer, int]] = []
    to_remote = to_local = skipped = 0
    try:
        for buffer in demotions:
            before = buffer.split
            done.append((buffer, before))
            to_remote += before - buffer.move(moves[buffer])
        left = room - others - sum(buffer.claimed_bytes().local for buffer in moves)
        for buffer in promotions:
            before, pages = buffer.split, buffer.claimed_bytes().local
            split = _affordable(buffer, moves[buffer], pages + left)
            skipped += moves[buffer] - split
            if split == before:
                continue
            done.append((buffer, before))
            to_local += buffer.move(split) - before
            left -= buffer.claimed_bytes().local - pages
    except (DakError, RuntimeError, MemoryError) as error:
        for buffer in demotions:
            buffer.cancel_move()
        _take_back(done)
        raise MoveError(f"the old placement stands: {error}") from error
    return MoveReport(
        bytes_to_remote=to_remote,
        bytes_to_local=to_local,
        tensors=len(done),
        skipped_bytes=skipped,
    )


def _affordable(buffer: TieredBuffer, split: int, room: int) -> int:
    """The largest split up to `split` whose local pages fit into `room` bytes; at least today's."""
    if buffer.local_pages(split) * buffer.page_bytes <= room:
        return split
    fitting = buffer.nearest_split(room - buffer.start_offset) if room > 0 else 0
    if fitting >= buffer.nbytes:
        fitting = buffer.nearest_split(buffer.nbytes - buffer.page_bytes)
    return max(buffer.split, min(split, fitting))


def _take_back(done: list[tuple[TieredBuffer, int]]) -> None:
    """Undo moves: those that freed the GPU come back last, when the others have left it."""
    for buffer, before in sorted(done, key=lambda step: step[1] > step[0].split):
        if buffer.split == before:
            continue
        try:
            buffer.move(before)
        except (DakError, RuntimeError, MemoryError) as error:
            log.error(
                "%s could not be moved back: %s; its contents are intact", buffer.label, error
            )

"""`offload`: divide a model's weights between a GPU and a remote tier."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import nn

from dak_inductor.budget import DeviceBudget, asked_budget
from dak_inductor.checkpoint import open_checkpoint
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.first_plan import FirstPlan, make_first_plan, peak_host_bytes
from dak_inductor.inventory import Entry, Inventory, take_inventory
from dak_inductor.make_room import make_room
from dak_inductor.model_checks import check_model
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import register
from dak_inductor.offloaded_model import OffloadedModel, OffloadedWeight
from dak_inductor.placement import LAUNCH_LOCK
from dak_inductor.plan import Plan
from dak_inductor.restore import forget_replaced
from dak_inductor.transfer import Transfer

Model = TypeVar("Model", bound=nn.Module)

_BAR_FROM_BYTES = 6_000_000_000
"""About two seconds of copying; shorter loads show no bar."""
_EMPTY_CACHE_BYTES = 256 << 20


def offload(
    model: Model,
    *,
    gpu_memory: str | int | None = None,
    offload_ratio: float | None = None,
    remote: str = "cpu",
    placement: Mapping[str, str] | None = None,
    host_memory: str | int | None = None,
    device: torch.device | str | int | None = None,
    checkpoint: str | Path | None = None,
    strict: bool = False,
    progress: bool = True,
    plan: Plan | str | Path | None = None,
) -> Model:
    """Move `model` to the GPU with part of its weights in a remote tier; returns the same model.

    Args:
        model: on the CPU, on CUDA, or on meta with a `checkpoint`. Its parameters are frozen.
        gpu_memory: everything that may be in use on the device, by other processes too: "24GB"
            (24e9 bytes), "24GiB", "80%" of the card, or bytes. Weights that do not fit beside the
            rest go remote.
        offload_ratio: instead, the share of the weight bytes that goes remote, 0 to 1.
        remote: "cpu" (host memory), "cuda:1" (another GPU), or "simulated" (no GPU needed).
        placement: names or patterns of tensors or modules to "gpu" or "cpu"; the last match wins.
        host_memory: what to take as available, in bytes or as text, where the machine grows its
            memory on demand.
        device: the GPU the model runs on; default the current one.
        checkpoint: a safetensors file, folder or index for parameters on meta.
        strict: raise where otherwise one warning would say that nothing is offloaded any more.
        progress: show a bar on loads of more than a few seconds.
        plan: a plan, or its JSON file, instead of one made here.

    Raises:
        OptionError, BudgetError, PatternError, TierError, HostMemoryError, CheckpointError,
        ModelError, PlanError: after any of them the model is as it was.
    """
    request = OffloadRequest(
        gpu_memory, offload_ratio, remote, placement, host_memory, device, strict, progress, plan
    )
    with LAUNCH_LOCK, torch.inference_mode(False), torch.no_grad():
        record = offload_now(getattr(model, "_orig_mod", model), request, checkpoint)
    print(record.line())
    return model


def offload_now(
    model: nn.Module, request: OffloadRequest, checkpoint: str | Path | None = None
) -> OffloadedModel:
    """`offload` for a request, without the line. The caller holds the launch lock."""
    check_model(model)
    forget_replaced(model)
    target = request.resolved_device()
    tier = request.open_tier(target)
    inventory = take_inventory(model, minimum_bytes=request.minimum_bytes(tier))
    with (
        asked_budget(target, request.budget_bytes(target)) as budget,
        open_checkpoint(checkpoint, inventory) as source,
    ):
        make_room(inventory, request, budget)
        first = make_first_plan(model, inventory, request, tier, budget)
        transfer = Transfer(tier, target, source)
        try:
            peak = peak_host_bytes(tier, inventory, first)
            tier.reserve(first.held.remote, peak_bytes=peak, prepare=False)
            return _carry(model, inventory, first, request, transfer, budget)
        except BaseException:
            transfer.undo()
            raise
        finally:
            tier.trim()


def _carry(
    model: nn.Module,
    inventory: Inventory,
    first: FirstPlan,
    request: OffloadRequest,
    transfer: Transfer,
    budget: DeviceBudget,
) -> OffloadedModel:
    """Move everything and enter the record."""
    before = transfer.freeze(inventory)
    weights: list[OffloadedWeight] = []
    released = 0
    asked = [(e.nbytes, e.nbytes - first.remote_bytes(e.name)) for e in inventory.entries]
    with (
        progress_bar(inventory.total_bytes, request.progress) as advance,
        closing(transfer.tier.allocate_each(asked)) as buffers,
    ):
        for entry, buffer in zip(inventory.entries, buffers, strict=True):
            was_on_cuda = entry.device.type == "cuda"
            weights.append(transfer.divide(entry, first.specs[entry.name], buffer))
            released += entry.nbytes if was_on_cuda else 0
            if released > _EMPTY_CACHE_BYTES:
                torch.cuda.empty_cache()  # pages that the caching allocator keeps count as used
                released = 0
            advance(entry)
        for entry in inventory.resident:
            transfer.keep_whole(entry)
            advance(entry)
    for wrapper in inventory.wrappers:
        transfer.rewrap(wrapper)
    return enter_record(model, inventory, first, request, transfer.tier, weights, before, budget)


def enter_record(
    model: nn.Module,
    inventory: Inventory,
    first: FirstPlan,
    request: OffloadRequest,
    tier: Tier,
    weights: list[OffloadedWeight],
    required_grad: Mapping[str, bool],
    budget: DeviceBudget,
) -> OffloadedModel:
    """Make and register the record of a model whose tensors have all been moved."""
    record = OffloadedModel(
        reference=weakref.ref(model),
        label=inventory.label,
        device=budget.device,
        remote=request.remote,
        tier=tier,
        weights={weight.name: weight for weight in weights},
        resident_bytes=inventory.resident_bytes,
        total_bytes=inventory.total_bytes,
        tensor_count=inventory.parameter_count
        + sum(len(entry.members) for entry in inventory.entries if not entry.is_parameter),
        budget=budget,
        required_grad=required_grad,
        fingerprint=inventory.fingerprint,
        offload_ratio=request.offload_ratio,
        strict=request.strict,
        plan=first.plan,
        default_uses=first.uses,
        refusals=tuple(inventory.refusals),
    )
    register(model, record)
    if budget.device.type == "cuda":
        torch.cuda.synchronize(budget.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(budget.device)
    return record


class _Advance:
    """Moves the bar by an entry's bytes; without a bar, nothing."""

    def __init__(self, bar: Progress | None, total: int) -> None:
        self.bar = bar
        self.task = bar.add_task("dak: offloading", total=total) if bar is not None else None

    def __call__(self, entry: Entry) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task, entry.nbytes)


@contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[_Advance]:
    """A bar on stderr where the load is long enough to need one."""
    if not wanted or total < _BAR_FROM_BYTES:
        yield _Advance(None, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Advance(bar, total)

"""`restore`: a model as it was before `offload`, in plain tensors."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from dak_inductor.attention_switch import restore_attention_function
from dak_inductor.cuda_runtime.host_memory import check_host_memory
from dak_inductor.errors import DeviceMemoryError, ModelError
from dak_inductor.inventory import take_inventory
from dak_inductor.offloaded import drop, record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.parts import plain_copy
from dak_inductor.placement import LAUNCH_LOCK
from dak_inductor.session import SESSION
from dak_inductor.wrappers import rewrap_all

Model = TypeVar("Model", bound=nn.Module)


def restore(model: Model, device: torch.device | str | int = "cpu") -> Model:
    """Bring an offloaded model back into plain tensors on `device`; returns the same model.

    requires_grad is as it was before, and so is the attention of a model that got a KV cache.
    Tensors that were replaced meanwhile are moved as they are.

    Raises ModelError for a model that is not offloaded, HostMemoryError or DeviceMemoryError before
    anything is moved where the device would not hold it.
    """
    module = getattr(model, "_orig_mod", model)
    record = record_of(module)
    if record is None:
        raise ModelError(
            f"this {type(module).__name__} is not offloaded: there is nothing to restore"
        )
    target = torch.device(device)
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    for cache in record.caches:
        cache.give_back()
    _check_room(record, target)
    SESSION.flush()  # reads are counted by buffers, which are about to go
    with LAUNCH_LOCK, torch.inference_mode(False), torch.no_grad():
        if record.device.type == "cuda":
            torch.cuda.synchronize(record.device)
        inventory = take_inventory(module, minimum_bytes=1)
        for entry in inventory:
            plain_copy(entry, target)
        rewrap_all(inventory, target)
        _forget(module, record)
    restore_attention_function(module)
    return model


def forget_replaced(model: nn.Module) -> None:
    """Drop the records in a model of which nothing lies in a tier any more (`.half()`, `.to()`).

    They would hold its old memory, as that of another model, while the new one is taken. Caches
    live on.
    """
    for module in list(model.modules()):
        record = record_of(module)
        if record is not None:
            _forget(module, record)


def _forget(module: nn.Module, record: OffloadedModel) -> None:
    for name, parameter in module.named_parameters():
        if record.required_grad.get(name, False) and parameter.is_leaf:
            parameter.requires_grad_(True)
    drop(module)


def _check_room(record: OffloadedModel, target: torch.device) -> None:
    """Tensors move one by one; what a tensor gives back while it moves is not counted on."""
    held = record.bytes_by_tier()
    if target.type == "cpu":
        # Of a real model the remote pages become free as the tensors move.
        needed = held.local if record.remote == "cpu" else held.total
        if record.remote == "simulated":
            needed = max((w.buffer.nbytes for w in record.weights.values()), default=0)
        check_host_memory(needed, None, f"restoring {record.label} to the CPU")
        return
    free = torch.cuda.mem_get_info(target)[0]
    needed = held.remote if target == record.device else held.total
    if needed > free:
        raise DeviceMemoryError(
            f"restoring {record.label} to {target} needs {needed / 1e9:.2f} GB more, "
            f"{free / 1e9:.2f} GB are free. Nothing was moved; restore to the CPU instead."
        )

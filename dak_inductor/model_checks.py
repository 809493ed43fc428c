"""Models that cannot be offloaded as they are, each with the way out."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from dak_inductor.cuda_runtime import address_table
from dak_inductor.errors import ModelError
from dak_inductor.inventory import QUANTISED_PARAMETERS, is_wrapper

_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}


def check_model(model: object) -> None:
    """Raise ModelError, before anything is changed, for a model that cannot be offloaded."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a torch.nn.Module is needed, this is a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is compiled by TorchScript, which holds its weights itself: "
            "offload the model that it was made from"
        )
    check_modules(model)
    found = False
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found = True
        _check_tensor(name, tensor)
    if not found:
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to offload")


def check_modules(model: nn.Module) -> None:
    """Raise ModelError if something else moves or shards the weights of a module in `model`."""
    for name, module in model.named_modules():
        _check_module(name or type(model).__name__, module)


def _check_module(name: str, module: nn.Module) -> None:
    if hasattr(module, "_hf_hook"):
        raise ModelError(
            f"{name} was dispatched by accelerate (it has an _hf_hook), which moves weights at "
            "each call. Load without device_map, or undo it first: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    if _SHARDED & {kind.__name__ for kind in type(module).__mro__}:
        raise ModelError(f"{name} is sharded by FSDP; offload the model before it is sharded")


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    kind = type(tensor)
    if isinstance(tensor, UninitializedBuffer | UninitializedParameter):
        raise ModelError(f"{name} is not initialised yet: run the lazy module once, then offload")
    if kind.__module__.startswith("torch.distributed") or _is_distributed(tensor):
        raise ModelError(
            f"{name} is a {kind.__name__}, sharded over processes: offload a plain model"
        )
    if kind.__name__ in QUANTISED_PARAMETERS and not _is_quantised(tensor):
        raise ModelError(
            f"{name} is a bitsandbytes {kind.__name__} that is not quantised yet: move the "
            "model to the GPU once (that quantises it), then offload"
        )
    if _is_tiered(tensor):
        raise ModelError(
            f"{name} is offloaded already. Call dak.restore(model) first, or change the placement "
            "with a new plan"
        )


def _is_distributed(tensor: torch.Tensor) -> bool:
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    return type(data).__module__.startswith("torch.distributed")


def _is_quantised(tensor: torch.Tensor) -> bool:
    if hasattr(tensor, "bnb_quantized"):
        return bool(tensor.bnb_quantized)
    return tensor.dtype in (torch.int8, torch.uint8)


def _is_tiered(tensor: torch.Tensor) -> bool:
    if is_wrapper(tensor):
        attributes, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return any(_is_tiered(getattr(tensor, attribute)) for attribute in attributes)
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return False
    try:
        return address_table.lookup(tensor.data_ptr()) is not None
    except RuntimeError:  # a subclass that computes at each access has no address of its own
        return False

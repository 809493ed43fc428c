"""Tensor subclasses around inner tensors: rebuilding them where the inner tensors have gone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from dak_inductor.inventory import Inventory, Wrapper, is_wrapper


def rewrap_all(inventory: Inventory, device: torch.device) -> None:
    """Rebuild wrapper subclasses around inner tensors that are on `device` now."""
    for wrapper in inventory.wrappers:
        rewrapped(wrapper, device)


def rewrapped(wrapper: Wrapper, device: torch.device) -> Callable[[], None] | None:
    """Rebuild one wrapper if it is elsewhere; returns how to take that back."""
    old = wrapper.tensor
    if old.device == device:
        return None
    data = _rebuilt(old)
    new = nn.Parameter(data, False) if isinstance(old, nn.Parameter) else data

    def put(tensor: torch.Tensor) -> None:
        for place in wrapper.occurrences:
            place.set(tensor)

    put(new)
    return partial(put, old)


def _rebuilt(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    attributes, context = data.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {}
    for attribute in attributes:
        held = getattr(tensor, attribute)
        inner[attribute] = _rebuilt(held) if is_wrapper(held) else held
    return type(data).__tensor_unflatten__(inner, context, data.size(), data.stride())  # type: ignore[attr-defined]

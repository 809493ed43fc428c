"""Finding weights of an offloaded model that were replaced by tensors living whole on the
device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch

from dak_inductor.binding import Binding
from dak_inductor.cuda_runtime import address_table
from dak_inductor.offloaded import offloaded_models
from dak_inductor.offloaded_model import OffloadedModel, find_resident_copies
from dak_inductor.op_table import OpTable


def resident_copies(
    table: OpTable, binding: Binding, arguments: Sequence[object]
) -> dict[OffloadedModel, list[str]]:
    """By model, names of weights that this call reads from a plain tensor although they are
    offloaded.

    `.half()` and `load_state_dict(assign=True)` show in the offloaded module itself; what was
    replaced in a model that this graph does not read is that model's affair. A deep copy is another
    module with the same names and shapes; its weights are known by those.
    """
    models = offloaded_models()
    plain = plain_weights(table, binding, arguments)
    addresses = {value.data_ptr() for value in plain.values()}
    found = {model: find_resident_copies(model, addresses) for model in models}
    known = {name for names in found.values() for name in names}
    for index, value in plain.items():
        path = table.parameters[index]
        if value.dim() < 2 or any(name == path or name.endswith("." + path) for name in known):
            continue
        like = next((model for model in models if _is_copy(model, path, value)), None)
        if like is not None:
            found[like].append(path)
    return {model: list(dict.fromkeys(names)) for model, names in found.items() if names}


def reads_nothing_offloaded(table: OpTable, binding: Binding, arguments: Sequence[object]) -> bool:
    """True for a graph over weights of which none is in a tier or belongs to an offloaded model,
    whose small tensors stay whole."""
    if binding.buffers:
        return False
    plain = plain_weights(table, binding, arguments)
    read = {plain[index].data_ptr() for index in table.operands() if index in plain}
    models = [record.model for record in offloaded_models()]
    if not models:
        return True
    owned = {
        tensor.data_ptr()
        for model in models
        if model is not None
        for tensor in (*model.parameters(), *model.buffers())
        if has_memory(tensor)
    }
    return bool(read) and not read & owned


def plain_weights(
    table: OpTable, binding: Binding, arguments: Sequence[object]
) -> dict[int, torch.Tensor]:
    """By index of graph input, the parameters that lie in no tier.

    The address is asked too: a binding knows only the parameters that operators of its table read.
    """
    return {
        index: value
        for index in table.parameters
        if index not in binding.buffers
        and has_memory(value := arguments[index])
        and address_table.lookup(value.data_ptr()) is None
    }


def has_memory(value: object) -> TypeGuard[torch.Tensor]:
    """True for a tensor whose address says where its bytes are; that of a subclass may not."""
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _is_copy(model: OffloadedModel, path: str, value: torch.Tensor) -> bool:
    """True for the name and shape of a weight of which bytes are remote; a block's names lack
    their prefix."""
    for weight in model.weights.values():
        for part in weight.parts:
            if part.shape != tuple(value.shape):
                continue
            if any(name == path or name.endswith("." + path) for name in part.names):
                return weight.buffer.bytes_by_tier().remote > 0
    return False

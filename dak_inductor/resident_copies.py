"""Finding weights of an offloaded model that were replaced by tensors living whole on the
device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dak_inductor.binding import Binding
from dak_inductor.offloaded import OffloadedModel, find_resident_copies, offloaded_models
from dak_inductor.op_table import OpTable


def resident_copies(table: OpTable, binding: Binding, arguments: Sequence[object]) -> list[str]:
    """Names of weights that this call reads from a plain tensor although they are offloaded.

    `.half()` and `load_state_dict(assign=True)` show in the offloaded module itself. A deep copy is
    another module with the same names and shapes; its weights are known by those.
    """
    models = offloaded_models()
    copies = [name for model in models for name in find_resident_copies(model)]
    for index, path in table.parameters.items():
        value = arguments[index]
        if index in binding.buffers or not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        if any(_is_copy(model, path, value) for model in models):
            copies.append(path)
    return list(dict.fromkeys(copies))


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

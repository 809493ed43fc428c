"""What is handed to a KV cache, against what it was made for."""

from __future__ import annotations

import torch
from torch import Tensor

from dak_inductor.errors import CacheError


def check_states(key_states: Tensor, value_states: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raise CacheError for states that do not fit the cache's `keys` and `values`."""
    pairs = (("keys", key_states, keys), ("values", value_states, values))
    for name, states, own in pairs:
        batch, heads, _, dim = states.shape
        if batch != own.shape[0]:
            raise CacheError(
                f"a batch of {batch} for a KV cache of batch {own.shape[0]} (beams count): "
                f"make one with dak.kv_cache(model, batch={batch}, ...)"
            )
        if heads != own.shape[1] or dim != own.shape[3]:
            raise CacheError(
                f"{name} of {heads} heads x {dim}, and the KV cache was made for a model with "
                f"{own.shape[1]} x {own.shape[3]}: make one with dak.kv_cache(model, ...). If it "
                "was made for this very model, that keeps other keys and values than its config "
                "tells, and dak.kv_cache cannot serve it"
            )
        if states.device != own.device:
            raise CacheError(f"{name} on {states.device} for a KV cache on {own.device}")
    if key_states.dtype != value_states.dtype:
        raise CacheError(
            f"keys of {key_states.dtype} and values of {value_states.dtype} for a KV cache of "
            f"{keys.dtype}; both have one dtype in it. Autocast makes such: convert the model "
            f"instead, with model.to({value_states.dtype})"
        )
    if key_states.dtype != keys.dtype:
        raise CacheError(
            f"keys and values of {key_states.dtype} for a KV cache of {keys.dtype}: make one with "
            f"dak.kv_cache(model, ..., dtype={key_states.dtype})"
        )


def starts_of(attention_mask: Tensor) -> Tensor:
    """The first token of each sequence that is not padding. Raises CacheError."""
    if attention_mask.dim() != 2:
        raise CacheError("attention_mask has two dimensions, [batch, tokens]")
    padding = attention_mask == 0
    if (padding.int().diff(dim=-1) > 0).any():
        raise CacheError("attention_mask has padding behind tokens: pad on the left")
    return padding.sum(-1)


def check_starts(starts: Tensor, *, batch: int, max_len: int) -> None:
    """Raise CacheError for what cannot be the first tokens of `batch` sequences."""
    if tuple(starts.shape) != (batch,):
        raise CacheError(f"starts of shape {tuple(starts.shape)}: one per sequence, {batch}")
    if starts.dtype == torch.bool or starts.is_floating_point() or starts.is_complex():
        raise CacheError(f"starts of {starts.dtype}: whole numbers, the first token of each")
    values = starts.tolist()
    if not all(0 <= start <= max_len for start in values):
        raise CacheError(f"starts {values}: each is from 0 to max_len={max_len}")

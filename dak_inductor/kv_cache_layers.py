"""The KV cache as transformers sees it: a `Cache` whose layers lie in tiered buffers.

Importing this needs transformers; `kv_cache` does so when it is called.

A layer is static: its keys and values are the same two tensors at all times, and where the next
token goes stands on the device. Eager code counts tokens on the host as well, and never asks the
device. What a trace must not read (it would be compiled in, and every step compiled anew) is read
outside of `torch.compiler.is_compiling()` only.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

import dak_inductor.kv_cache_steps
import dak_inductor.lowering.ops_cache  # noqa: F401  (registers torch.ops.dak.write_tokens)
from dak_inductor.attention_function import note_bounds
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import CacheError
from dak_inductor.kv_cache_checks import check_starts, check_states, starts_of
from dak_inductor.kv_cache_layer_storage import LayerStorage
from dak_inductor.kv_cache_storage import CacheStorage, owner_of
from dak_inductor.quantity_text import bytes_text, count_text


class TieredLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Attributes:
        keys, values: [batch, heads, capacity, dim].
        lengths, starts: int32 [batch] on the device: slots in use, and the first that is valid.
        window: tokens that a query sees, itself included; 0 for all.
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = False
    keys: Tensor
    values: Tensor

    def __init__(self, storage: LayerStorage) -> None:
        super().__init__()
        self.storage = storage
        self.keys, self.values = storage.keys, storage.values
        self.lengths, self.starts, self.place = storage.lengths, storage.starts, storage.place
        self.window = storage.shape.window
        self.is_sliding = self.window > 0
        self.max_cache_len = storage.capacity
        self.room = storage.room
        self.slides = storage.slides
        self.max_batch_size = self.batch_size = self.keys.shape[0]
        self.num_heads, self.head_dim = self.keys.shape[1], self.keys.shape[3]
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True
        for tensor in (self.keys, self.values, self.lengths, self.starts, self.place):
            torch._dynamo.mark_static_address(tensor)
        note_bounds(self.keys, lengths=self.lengths, starts=self.starts, window=self.window)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states [batch, heads, tokens, dim] behind those that are there.

        Returns all keys and values, `lengths` of them valid. Raises CacheError for states of
        another model, ContextLengthError past the cache's length, HostMemoryError or
        DeviceMemoryError where it cannot grow; then nothing is written.
        """
        check_states(key_states, value_states, self.keys, self.values)
        tokens = key_states.shape[-2]
        if self.slides and tokens > self.room:
            return self._update_long(key_states, value_states)
        if torch.compiler.is_compiling():
            self._leave_note(tokens, written=True)
        else:
            self._prepare(tokens)
        slots = torch.arange(tokens, device=self.device) + self.lengths[0]
        self.lengths.add_(tokens)
        torch.ops.dak.write_tokens(self.keys, slots, key_states)
        torch.ops.dak.write_tokens(self.values, slots, value_states)
        if not torch.compiler.is_compiling():
            self._advance(tokens)
        return self.keys, self.values

    def _update_long(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk with more tokens than there are slots beside the window: attention reads it as
        it comes, behind the window's earlier tokens, and its newest are kept."""
        tokens = key_states.shape[-2]
        keys, values = key_states, value_states
        if torch.compiler.is_compiling():
            self._leave_note(tokens, written=True)  # and the cache is empty, or the note raises
            start = 0
        else:
            self._prepare(tokens)
            storage = self.storage
            behind, used = storage.behind(tokens), storage.slots
            if behind:
                keys = torch.cat((self.keys[:, :, used - behind : used], keys), dim=-2)
                values = torch.cat((self.values[:, :, used - behind : used], values), dim=-2)
            start = storage.tokens - behind
        held = keys.shape[-2]
        kept = held if held <= self.max_cache_len else self.storage.keep
        self.keys[:, :, :kept].copy_(keys[:, :, held - kept :])
        self.values[:, :, :kept].copy_(values[:, :, held - kept :])
        self.lengths.fill_(kept)
        shift = start + held - kept
        self.starts.add_(self.place[0] - shift).clamp_(min=0)
        self.place[0].fill_(shift)
        if not torch.compiler.is_compiling():
            self._advance(tokens)
        return keys, values

    def _leave_note(self, tokens: int, *, written: bool) -> None:
        torch.ops.dak.kv_step.default(
            self.keys, self.values, self.lengths, self.starts, self.place, tokens, written
        )

    def _prepare(self, tokens: int) -> None:
        storage = self.storage
        owner_of(storage).prepare(storage.tokens + tokens, tokens)

    def _advance(self, tokens: int) -> None:
        storage = self.storage
        storage.advance(tokens)
        storage.note_length(storage.tokens, 0)

    def get_seq_length(self) -> Any:
        """Tokens seen: an int on the host, in a trace a tensor."""
        if torch.compiler.is_compiling():
            return self.lengths[0] + self.place[0] if self.slides else self.lengths[0].clone()
        return self.storage.tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, Any]:
        """Keys that `update` will return for `query_length` more, and the first one's position."""
        if isinstance(query_length, Tensor):  # their positions, in early releases of transformers 5
            query_length = query_length.shape[0]
        if not self.slides:
            return self.max_cache_len, 0
        if torch.compiler.is_compiling():
            self._leave_note(query_length, written=False)
            if query_length > self.room:
                return query_length, 0
            return self.max_cache_len, self.place[0].clone()
        storage = self.storage
        if query_length > self.room:
            behind = storage.behind(query_length)
            return behind + query_length, storage.tokens - behind
        self._prepare(query_length)
        return self.max_cache_len, storage.base

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_max_cache_shape(self) -> int:
        return self.max_cache_len

    def offload(self) -> None:
        """Nothing: remote tokens are read where they are."""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""

    def reset(self) -> None:
        self.storage.reset()

    def crop(self, tokens_to_remove: int) -> None:
        raise CacheError("crop the cache, not a layer of it")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise CacheError("reorder the cache, not a layer of it")


class TieredCache(Cache):
    """A static KV cache in two tiers. Made by `dak.kv_cache`; its memory goes with it."""

    def __init__(self, storage: CacheStorage) -> None:
        super().__init__(layers=[TieredLayer(layer) for layer in storage.layers])
        self.storage = storage
        self._step = (0, 0)  # of the last step begun outside of traces: tokens at its end, and new

    def __reduce__(self) -> NoReturn:
        raise CacheError(
            "a tiered KV cache is not copied (copy.deepcopy, pickle): it is this process's memory. "
            "To go on from a prompt several times, crop(tokens) it back, or make further caches"
        )

    def __repr__(self) -> str:
        geometry, held = self.storage.geometry, self.bytes_by_tier()
        return (
            f"TieredCache({count_text(len(self.layers), 'layer')}, batch {geometry.batch}, "
            f"{self.storage.tokens} of {count_text(geometry.max_len, 'token')}, "
            f"{bytes_text(held.local)} local, {bytes_text(held.remote)} remote)"
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """`TieredLayer.update` of one layer. Raises CacheError as well where an earlier step ended
        half way, so that layers hold different tokens."""
        if layer_idx >= len(self.layers):
            raise CacheError(
                f"layer {layer_idx}, and the KV cache was made for a model with "
                f"{count_text(len(self.layers), 'layer')}: make one with dak.kv_cache(model, ...)"
            )
        layer: Any = self.layers[layer_idx]
        if not torch.compiler.is_compiling():
            self._check_tokens(layer_idx, key_states.shape[-2])
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        return keys, values

    def _check_tokens(self, layer_idx: int, tokens: int) -> None:
        """A step writes the same tokens to each layer, to the first one first."""
        first, own = (self.storage.layers[index].tokens for index in (0, layer_idx))
        if not layer_idx:
            self._step = first + tokens, tokens
        elif own + tokens != first:
            end, given = self._step
            if end == first and tokens != given:
                raise CacheError(
                    f"layer {layer_idx} is given {count_text(tokens, 'token')} in a step of "
                    f"{given}: of cross attention, to an image or an encoder, dak.kv_cache "
                    "holds no keys"
                )
            raise CacheError(
                f"layer {layer_idx} of the KV cache would have "
                f"{count_text(own + tokens, 'token')} and layer 0 has {first}: an earlier "
                "step ended half way; reset() the cache"
            )

    def bytes_by_tier(self) -> TierBytes:
        """Bytes of keys and values that have memory now, by tier."""
        return self.storage.bytes_by_tier()

    def planned_bytes_by_tier(self) -> TierBytes:
        """Bytes of keys and values once the context has its full length, by tier."""
        return self.storage.planned_bytes()

    def commit(self, tokens: int) -> None:
        """Take memory for a context of `tokens` tokens now, not as it grows.

        Needed before replays of a CUDA graph that the caller captured; they grow nothing. Raises
        ContextLengthError, HostMemoryError, DeviceMemoryError.
        """
        self.storage.commit(tokens)

    def set_padding(
        self, attention_mask: Tensor | None = None, *, starts: Tensor | None = None
    ) -> None:
        """Say where each sequence starts, for left-padded batches.

        Either by `attention_mask` [batch, tokens], 0 for padding, or by `starts` [batch].
        `generate` needs none of it: its masks say the same. Raises CacheError.
        """
        if (attention_mask is None) == (starts is None):
            raise CacheError("say one of attention_mask and starts")
        if attention_mask is not None:
            starts = starts_of(attention_mask)
        assert starts is not None
        geometry = self.storage.geometry
        check_starts(starts, batch=geometry.batch, max_len=geometry.max_len)
        self.storage.set_starts(starts)

    def reset(self) -> None:
        """Empty the cache. Pages that were committed stay."""
        self.storage.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -`tokens_to_remove` tokens back; a positive number is the length to keep.

        Raises CacheError where the window of a sliding layer has moved on; nothing is changed then.
        """
        tokens, tokens_to_remove = self.storage.tokens, int(tokens_to_remove)
        left = tokens_to_remove if tokens_to_remove > 0 else tokens + tokens_to_remove
        if left < tokens:
            self.storage.crop(tokens - left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i be what sequence `beam_idx[i]` was. Waits for the device."""
        self.storage.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise CacheError("a tiered KV cache keeps its batch: make one for batch x repeats")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise CacheError("a tiered KV cache keeps its batch: no sequences can be dropped from it")

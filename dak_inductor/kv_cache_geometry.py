"""What a model's keys and values look like, layer by layer, read from its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dak_inductor.errors import CacheError

_FULL = ("full_attention", "chunked_attention")  # a chunk's bounds are the mask's business
_SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of one layer.

    heads:      heads of keys and values; query heads may be a multiple of them.
    key_dim, value_dim: elements of one head.
    window:     tokens that a query sees, itself included; 0 for all.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """All layers of a cache: `batch` sequences of at most `max_len` tokens of `dtype`.

    `group` is the number of query heads that read a head of keys.
    """

    layers: tuple[LayerShape, ...]
    batch: int
    max_len: int
    dtype: torch.dtype
    group: int = 1

    def row_bytes(self, layer: LayerShape) -> tuple[int, int]:
        """Bytes of one token of all sequences: of the keys and of the values."""
        row = self.batch * layer.heads * self.dtype.itemsize
        return row * layer.key_dim, row * layer.value_dim


def keeps_latents(model: torch.nn.Module) -> bool:
    """Whether latent attention hands a cache its latents, expanded behind it, and not keys and
    values: no config tells, it changed between releases of transformers 5."""
    return any(hasattr(module, "expand_kv") for module in model.modules())


def read_geometry(
    config: Any, *, batch: int, max_len: int, dtype: torch.dtype, latents: bool = False
) -> CacheGeometry:
    """The geometry of a cache for a model with this transformers config, see `keeps_latents`.

    Raises CacheError for layers that keep no keys and values, sizes that the config does not say,
    and an empty cache.
    """
    for name, value in (("batch", batch), ("max_len", max_len)):
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise CacheError(f"{name}={value!r}: a whole number above zero")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CacheError(f"dtype={dtype!r}: keys and values are kept in a floating-point dtype")
    if getattr(config, "is_encoder_decoder", False):
        raise CacheError(
            "an encoder-decoder model has two caches, one of them of fixed contents; "
            "dak.kv_cache serves decoder-only models"
        )
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    shape = _latent_shape(text) if latents else _shape(text)
    layers = []
    for number, kind in enumerate(_layer_types(text)):
        if kind == _SLIDING:
            layers.append(LayerShape(*shape, window=_number(text, "sliding_window")))
        elif kind in _FULL:
            layers.append(LayerShape(*shape))
        else:
            raise CacheError(
                f"layer {number} of {type(text).__name__} is of type {kind!r}: only layers of full "
                "or sliding-window attention keep keys and values that can be tiered"
            )
    group = max(1, _number(text, "num_attention_heads") // shape[0])
    return CacheGeometry(tuple(layers), batch, max_len, dtype, group)


def _layer_types(config: Any) -> Sequence[str]:
    """As transformers reads them; layers that share the keys of earlier ones are not among them."""
    count = _number(config, "num_hidden_layers")
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        kinds = [_SLIDING if window is not None else _FULL[0]] * count
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return kinds[: len(kinds) - shared]


def _shape(config: Any) -> tuple[int, int, int]:
    """Heads, and elements of a head of the keys and of the values."""
    queries = _number(config, "num_attention_heads")
    heads = _first(config, "num_key_value_heads", "num_kv_heads") or queries
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        heads = 1
    elif getattr(config, "multi_query", None) is False and not getattr(
        config, "new_decoder_architecture", False
    ):
        heads = queries
    rope, plain = _first(config, "qk_rope_head_dim"), _first(config, "qk_nope_head_dim")
    if rope and plain:  # latent attention keeps the expanded keys and values
        return queries, rope + plain, _number(config, "v_head_dim")
    dim = _first(config, "head_dim") or _number(config, "hidden_size") // queries
    return heads, dim, dim


def _latent_shape(config: Any) -> tuple[int, int, int]:
    """One head: the latents of keys and values, and the rotated part of the keys."""
    return 1, _number(config, "kv_lora_rank"), _number(config, "qk_rope_head_dim")


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _number(config: Any, name: str) -> int:
    value = _first(config, name)
    if not value:
        raise CacheError(f"{type(config).__name__} has no {name}: its cache cannot be laid out")
    return value

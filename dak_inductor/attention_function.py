"""The attention function "dak" of transformers: dak::attention, told which tokens are valid.

A model that is switched to it (`attention_switch`) calls `attend` in every layer. What the
layer's cache knows reaches it on the key tensor that the cache returns from `update`: the cache
calls `note_bounds` on that tensor once, when it makes it. Keys of another cache come with what the
mask function `bounds_mask` makes in place of a dense mask; keys of no static cache go to
transformers' own SDPA function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dak_inductor.lowering.ops  # noqa: F401  (registers torch.ops.dak)
from dak_inductor.attention_bounds import bounds_of, make_bounds
from dak_inductor.errors import ModelError

NAME = "dak"
_ATTRIBUTE = "dak_bounds"


class CacheBounds(NamedTuple):
    """What a cache layer knows of the keys that it returns.

    lengths: int32 [B] on the device, valid tokens of each sequence after the update; updated in
             place by the cache, never replaced.
    starts:  int32 [B], the first valid token.
    window:  a query sees this many tokens up to its own, for keys in the order of their positions;
             0 where it sees every valid token before it.
    """

    lengths: Tensor
    starts: Tensor
    window: int


def note_bounds(keys: Tensor, *, lengths: Tensor, starts: Tensor, window: int = 0) -> None:
    """Tell `attend` what is valid in `keys` [B, Hkv, S, D] and in the values beside it.

    To be called on the very tensor object that the cache's `update` returns; Dynamo reads it off
    that input, and sees one graph input for each of the three tensors.
    """
    setattr(keys, _ATTRIBUTE, CacheBounds(lengths, starts, window))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [B, Hq, Q, D] queries to ([B, Q, Hq, Dv], None).

    `attention_mask` is None, a mask, or the bounds that `bounds_mask` made.

    Raises:
        ModelError: dropout in training, or attention sinks.
    """
    cache: CacheBounds | None = getattr(key, _ATTRIBUTE, None)
    bounds = bounds_of(attention_mask)
    mask = attention_mask if bounds is None else None
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if cache is None and bounds is None and softcap is None:
        rows, tokens = query.shape[2], key.shape[2]
        # torch aligns a causal triangle at the first token, and these queries are the last ones
        if mask is not None or not causal or rows == 1 or rows == tokens:
            return _stock(
                module, query, key, value, mask, scaling=scaling, dropout=dropout,
                is_causal=is_causal, position_bias=position_bias, **kwargs,
            )  # fmt: skip
    if dropout > 0 or kwargs.get("s_aux") is not None:
        raise ModelError(
            f'{type(module).__name__}: the attention function "dak" has no dropout and no '
            "attention sinks; give the model its own attention back with "
            "dak_inductor.attention_switch.restore_attention_function(model)"
        )
    lengths = starts = None
    window = 0
    if cache is not None:
        lengths, starts, window = cache
    if bounds is not None:
        lengths = bounds.lengths if cache is None else lengths
        starts = starts if bounds.starts is None else bounds.starts
        if cache is None and bounds.sliding:
            window = _window(module, kwargs)
    if mask is not None:  # a dense mask says itself who sees what
        causal, window, starts = False, 0, None
    if position_bias is not None:
        mask = position_bias if mask is None else _with_bias(mask, position_bias)
    result = torch.ops.dak.attention.default(
        query,
        key,
        value,
        lengths,
        starts,
        mask,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal,
        window,
        float(softcap or 0.0),
    )
    return result.transpose(1, 2), None


def bounds_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers that makes no dense mask.

    None where a query sees all tokens up to its own, else the bounds of each sequence
    (`attention_bounds`). Masks of another kind, and padding that is not on the left, are made by
    transformers' `sdpa_mask`. Outside of a compiled region it looks whether padding is on the
    left, which waits for the device; inside, where it cannot look, a padding mask gives a dense
    one.
    """
    masking = _transformers().masking
    config = kwargs.get("config")
    if _is_plain(masking, mask_function, local_size, q_length, config, kwargs):
        made = make_bounds(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            padding=attention_mask,
            sliding=local_size is not None,
            device=torch.device(device),
        )
        if made is not NotImplemented:
            return made
    dense: Tensor | None = masking.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function or masking.causal_mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        device=device,
        **{**kwargs, "allow_is_causal_skip": False},
    )
    return dense


def register() -> None:
    """Make "dak" known to transformers; again and again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    _transformers()
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, bounds_mask)


def _is_plain(
    masking: Any,
    mask_function: Any,
    local_size: int | None,
    q_length: int,
    config: Any,
    kwargs: dict[str, Any],
) -> bool:
    """Causal, or causal within a window of the config, without anything on top.

    `allow_is_bidirectional_skip` comes with masks that are not causal, `use_vmap` with functions of
    the user. What is on top of a window, and chunks, cannot be told from the function: a config
    with chunks, and a prefill that may not skip its mask, get a dense one.
    """
    if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs:
        return False
    if local_size is None:
        return mask_function is None or mask_function is masking.causal_mask_function
    if getattr(config, "attention_chunk_size", None) is not None:
        return False
    if getattr(config, "sliding_window", None) != local_size:
        return False
    return q_length == 1 or bool(kwargs.get("allow_is_causal_skip", True))


def _window(module: torch.nn.Module, kwargs: dict[str, Any]) -> int:
    """Of a layer whose mask was made for a window."""
    window = kwargs.get("sliding_window")
    if window is None:
        window = getattr(getattr(module, "config", None), "sliding_window", None)
    return int(window or 0)


def _with_bias(mask: Tensor, bias: Tensor) -> Tensor:
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


def _stock(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    result, _ = _transformers().sdpa(module, *args, **kwargs)
    return result, None


class _Transformers(NamedTuple):
    """What of transformers is called inside of compiled regions."""

    masking: Any  # the module transformers.masking_utils
    sdpa: Callable[..., tuple[Tensor, Any]]


_imported: _Transformers | None = None


def _transformers() -> _Transformers:
    """Imported once, ahead of any trace: Dynamo of torch 2.11 traces no import of a lazy module."""
    global _imported
    if _imported is None:
        from transformers import masking_utils
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        _imported = _Transformers(masking_utils, sdpa_attention_forward)
    return _imported


__all__ = [
    "NAME",
    "CacheBounds",
    "attend",
    "bounds_mask",
    "note_bounds",
    "register",
]

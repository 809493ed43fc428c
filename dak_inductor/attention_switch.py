"""Which models of transformers can take the attention function "dak", and switching them."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from dak_inductor.attention_function import NAME, register

_previous: weakref.WeakKeyDictionary[torch.nn.Module, list[tuple[Any, str | None]]] = (
    weakref.WeakKeyDictionary()
)


def use_attention_function(model: torch.nn.Module) -> str | None:
    """Switch a transformers model to "dak"; None once it is, else the reason why it cannot be.

    A reason is a sentence without a full stop; the model then keeps its attention, which reads a
    cache through its views. Only the text decoder of a composite model is switched.
    """
    if model in _previous:
        return None
    reason = _obstacle(model)
    if reason is not None:
        return reason
    register()
    configs = _text_configs(model)
    _previous[model] = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation_internal = NAME
    return None


def restore_attention_function(model: torch.nn.Module) -> None:
    """Give a model the attention back that it had before `use_attention_function`."""
    for config, implementation in _previous.pop(model, []):
        config._attn_implementation_internal = implementation


def _obstacle(model: torch.nn.Module) -> str | None:
    name = type(model).__name__
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    except ImportError:
        return "transformers has no attention interface, or is not installed"
    del AttentionInterface, AttentionMaskInterface
    if not isinstance(model, PreTrainedModel):
        return f"{name} is no model of transformers"
    can_set: Any = getattr(type(model), "_can_set_attn_implementation", None)
    if can_set is not None and not can_set():
        return f"{name} does not call its attention through transformers' AttentionInterface"
    if not getattr(model, "_supports_sdpa", True):
        return f"the attention of {name} is not scaled dot product attention"
    if any(hasattr(module, "sinks") for module in model.modules()):
        return f"{name} has attention sinks"
    return None


def _text_configs(model: Any) -> list[Any]:
    """The config objects that the decoder's modules look their attention up in."""
    text = model.config.get_text_config()
    found = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(text) and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())

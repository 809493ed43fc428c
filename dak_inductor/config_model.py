"""What a config of transformers describes: the model, and the bytes of its KV cache."""

from __future__ import annotations

from typing import Any

import torch

from dak_inductor.errors import OptionError
from dak_inductor.presets import read_config

_DTYPES = ("bfloat16", "float16", "float32")


def build_model(name_or_path: str) -> torch.nn.Module:
    """The model of a preset or config file on the meta device, in its config's dtype."""
    return build_from(read_config(name_or_path), name_or_path, device="meta")


def build_from(config_values: dict[str, Any], name: str, *, device: Any) -> torch.nn.Module:
    """The model of these values of a config on `device`, with random weights unless that is meta.

    Raises OptionError, with `name` for the model, where transformers cannot build it.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            "dak plan builds models with transformers, which is not installed: "
            "pip install 'dak-inductor[demo]'"
        ) from error

    values = dict(config_values)
    kind = values.pop("model_type")
    dtype_name = str(values.pop("torch_dtype", None) or values.pop("dtype", None))
    values.pop("dtype", None)
    dtype_name = dtype_name.removeprefix("torch.")
    if dtype_name == "None":
        dtype_name = "bfloat16"
    if dtype_name not in _DTYPES:
        raise OptionError(
            f"dtype {dtype_name!r} of {name!r} is none of {', '.join(_DTYPES)}: name one"
        )
    try:
        config = transformers.AutoConfig.for_model(kind, **values)
        family = (
            transformers.AutoModelForCausalLM
            if type(config) in transformers.AutoModelForCausalLM._model_mapping
            and not _is_encoder(config)
            else transformers.AutoModel
        )
        with torch.device(device):
            model: torch.nn.Module = family.from_config(config, dtype=getattr(torch, dtype_name))
    except Exception as error:  # whatever the validation of a config may raise
        raise OptionError(f"transformers cannot build {name!r}: {error}") from error
    return model.eval()


def _is_encoder(config: Any) -> bool:
    """Whether a config of a BERT, which transformers could build as a decoder, asks for none."""
    from transformers import AutoModelForMaskedLM

    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return False
    return type(config) in AutoModelForMaskedLM._model_mapping


def kv_cache_bytes(config: Any, *, batch: int, length: int, itemsize: int) -> int:
    """Bytes of a static cache of `length` positions; 0 for a model without one.

    Layers with a sliding window hold no more than the window.
    """
    get_text_config = getattr(config, "get_text_config", None)
    if get_text_config is None:
        return 0
    text = get_text_config()
    layers, heads = (getattr(text, n, None) for n in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads or getattr(text, "is_encoder_decoder", False):
        return 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    window = getattr(text, "sliding_window", None) or length
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    positions = sum(min(length, window) if "sliding" in kind else length for kind in kinds)
    return 2 * batch * positions * kv_heads * head_dim * itemsize

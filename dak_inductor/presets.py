"""Architectures that `dak plan` knows by name: what their transformers config says, no weights."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dak_inductor.errors import OptionError

_LLAMA_3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
_QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3-8b": {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        "llama-3-70b": {
            **_LLAMA_3,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        "qwen2.5-14b": {
            **_QWEN,
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
        "qwen3-8b": {
            **_QWEN,
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
        "mistral-7b": {
            "model_type": "mistral",
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "dtype": "bfloat16",
        },
        "mixtral-8x7b": {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "dtype": "bfloat16",
        },
        "opt-30b": {
            "model_type": "opt",
            "vocab_size": 50272,
            "hidden_size": 7168,
            "word_embed_proj_dim": 7168,
            "ffn_dim": 28672,
            "num_hidden_layers": 48,
            "num_attention_heads": 56,
            "max_position_embeddings": 2048,
            "dtype": "float16",
        },
        "gpt2": {
            "model_type": "gpt2",
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "dtype": "float32",
        },
        "bert-large": {
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 512,
            "dtype": "bfloat16",
        },
        "vit-huge": {
            "model_type": "vit",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "dtype": "bfloat16",
        },
    }
)


def read_config(name_or_path: str) -> dict[str, Any]:
    """The config of a preset, or of a transformers `config.json` (a file or its folder).

    Raises OptionError for an unknown name, a file that is no config, or a quantised checkpoint.
    """
    if name_or_path.lower() in PRESETS:
        return dict(PRESETS[name_or_path.lower()])
    path = Path(name_or_path)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        close = difflib.get_close_matches(name_or_path.lower(), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise OptionError(
            f"no model {name_or_path!r}: it is neither a config.json nor one of "
            f"{', '.join(PRESETS)}{hint}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"{path} cannot be read as a config.json: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise OptionError(f"{path} is not a transformers config: it has no model_type")
    if config.get("quantization_config"):
        raise OptionError(
            f"{path} describes a quantised checkpoint, and the plan is made from dense weights: "
            "take its quantization_config out to plan the dense model"
        )
    return config

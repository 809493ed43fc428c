"""Small models of transformers for the tests of the KV cache, and prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma2": ("Gemma2", {"sliding_window": 8, "head_dim": 32}),
}


def build(family: str = "llama", **changes: Any) -> Any:
    """A random model of that family; `changes` are of its configuration."""
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def prompt(batch: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, the last sequence padded on the left."""
    tokens = torch.randint(1, SIZES["vocab_size"], (batch, length))
    mask = torch.ones_like(tokens)
    tokens[-1, :padding] = mask[-1, :padding] = 0
    return {"input_ids": tokens, "attention_mask": mask}

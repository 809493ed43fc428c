"""Tiny configurations of further architectures of transformers, beside `test_architectures`."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_BASE: dict[str, Any] = {**SMALL, "bos_token_id": 1, "eos_token_id": None}
_GPT: dict[str, Any] = {
    "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_MIXTURE: dict[str, Any] = {
    **_BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "num_local_experts": 4,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_MIXTURE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_PAIR: dict[str, Any] = {
    "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "vocab_size": 512, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", _BASE),
    "bloom": ("Bloom", {"hidden_size": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512,
                        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}),
    "biogpt": ("BioGpt", _BASE),
    "codegen": ("CodeGen", {**_GPT, "rotary_dim": 16}),
    "cohere": ("Cohere", _BASE),
    "cohere2": ("Cohere2", {**_BASE, "sliding_window": 8}),
    "deepseek_v3": ("DeepseekV3", _LATENT),
    "exaone4": ("Exaone4", {**_BASE, "sliding_window": 8}),
    "gemma": ("Gemma", {**_BASE, "head_dim": 32}),
    "gemma3": ("Gemma3", {**_BASE, "head_dim": 32, "sliding_window": 8}),
    "glm": ("Glm", {**_BASE, "head_dim": 32}),
    "glm4": ("Glm4", {**_BASE, "head_dim": 32}),
    "gpt_bigcode": ("GPTBigCode", _GPT),
    "gpt_neo": ("GPTNeo", {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512,
                           "attention_types": [[["global", "local"], 1]], "window_size": 8,
                           "max_position_embeddings": 128, "pad_token_id": 0,
                           "bos_token_id": 1, "eos_token_id": None}),
    "gpt_oss": ("GptOss", {**_MIXTURE, "head_dim": 32, "sliding_window": 8}),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 16}),
    "granite": ("Granite", _BASE),
    "granitemoe": ("GraniteMoe", _MIXTURE),
    "helium": ("Helium", {**_BASE, "head_dim": 32}),
    "mamba": ("Mamba", {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
                        "state_size": 8, "pad_token_id": 0, "bos_token_id": 1,
                        "eos_token_id": None}),
    "mpt": ("Mpt", {"d_model": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 512,
                    "max_seq_len": 128, "pad_token_id": 0, "bos_token_id": 1,
                    "eos_token_id": None}),
    "nemotron": ("Nemotron", _BASE),
    "olmo": ("Olmo", _BASE),
    "olmo2": ("Olmo2", _BASE),
    "olmoe": ("Olmoe", _MIXTURE),
    "persimmon": ("Persimmon", _BASE),
    "phi": ("Phi", _BASE),
    "phimoe": ("Phimoe", _MIXTURE),
    "qwen2_moe": ("Qwen2Moe", {**_MIXTURE, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", {**_MIXTURE, "head_dim": 32}),
    "smollm3": ("SmolLM3", _BASE),
    "stablelm": ("StableLm", _BASE),
    "starcoder2": ("Starcoder2", _BASE),
    "xglm": ("XGLM", {"d_model": 128, "ffn_dim": 256, "num_layers": 2, "attention_heads": 4,
                      "vocab_size": 512, "max_position_embeddings": 128, "pad_token_id": 0,
                      "bos_token_id": 1, "eos_token_id": None}),
}  # fmt: skip
"""By name, the stem of the classes `<stem>Config` and `<stem>ForCausalLM`, and the sizes."""

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("Albert", {**_BASE, "embedding_size": 64}),
    "distilbert": ("DistilBert", {"dim": 128, "hidden_dim": 256, "n_layers": 2, "n_heads": 4,
                                  "vocab_size": 512}),
    "electra": ("Electra", {**_BASE, "embedding_size": 128}),
    "mpnet": ("MPNet", _BASE),
    "roberta": ("Roberta", _BASE),
}  # fmt: skip
"""The same of `<stem>Model`."""

PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("Bart", _PAIR),
    "mbart": ("MBart", _PAIR),
    "pegasus": ("Pegasus", _PAIR),
}
"""The same of `<stem>ForConditionalGeneration`."""

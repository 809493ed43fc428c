"""Architectures of transformers, tiny and random: eager's outputs, bytes from the remote tier."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import dak_inductor as dak
from dak_inductor.backend import compile_graph
from dak_inductor.offloaded import record_of
from dak_inductor.options import BackendOptions
from dak_inductor.session import SESSION

from .more_architectures import SMALL

transformers = pytest.importorskip("transformers", reason="needs transformers")


def _config(name: str, **sizes: Any) -> tuple[str, dict[str, Any]]:
    return name, sizes


ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SMALL, "head_dim": 32}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SMALL, "sliding_window": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**SMALL, "head_dim": 32}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SMALL),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 128,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 128},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bert": ("BertConfig", "BertModel", SMALL),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 128,
            "d_ff": 256,
            "d_kv": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 512,
            "decoder_start_token_id": 0,
        },
    ),
}


def build(name: str) -> torch.nn.Module:
    """The model with random weights, in evaluation mode."""
    config_class, model_class, sizes = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


def inputs_of(name: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 500, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, 500, (batch, 3))
    return inputs


def output_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_forward_gives_eagers_output_from_the_remote_tier(name):
    SESSION.reset()
    dak.stats(reset=True)
    model = build(name)
    batches = [inputs_of(name, 2, 7), inputs_of(name, 3, 11)]
    expected = [output_of(model, inputs) for inputs in batches]

    dak.offload(model, offload_ratio=0.5, remote="simulated")
    record = record_of(model)
    assert record is not None
    held = record.bytes_by_tier()
    assert held.remote >= 0.45 * held.total

    backend = functools.partial(
        compile_graph, settings=BackendOptions(), executor=lambda graph, _: graph.forward
    )
    compiled = torch.compile(model, backend=backend)
    for inputs, reference in zip(batches, expected, strict=True):
        dak.stats(reset=True)
        result = output_of(compiled, inputs)
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)
        read = dak.stats()
        assert read.total.remote > 0
        assert {count.tensor for count in read.reads} <= set(record.weights)

    plan = dak.explain(model).plan
    for refusal in plan.refusals:
        assert refusal.reason
        assert refusal.target
    # What lies remote is read by operators the plan knows, or the reason why not is listed.
    planned = {op.tensor for op in plan.ops}
    remote = {name for name, nbytes in plan.splits.items() if nbytes}
    assert remote <= planned


GENERATING = sorted(set(ARCHITECTURES) - {"bert"})


@pytest.mark.parametrize("name", GENERATING)
def test_generate_gives_eagers_tokens(name):
    SESSION.reset()
    model = build(name)
    prompts = [inputs_of(name, 2, 6), inputs_of(name, 1, 9)]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for inputs in prompts:
        inputs.pop("decoder_input_ids", None)
    expected = [model.generate(**inputs, **options) for inputs in prompts]

    dak.offload(model, offload_ratio=0.5, remote="simulated")
    backend = functools.partial(
        compile_graph, settings=BackendOptions(), executor=lambda graph, _: graph.forward
    )
    model.compile(backend=backend)
    dak.stats(reset=True)
    for inputs, reference in zip(prompts, expected, strict=True):
        static = {} if name == "t5" else {"cache_implementation": "static"}
        result = model.generate(**inputs, **options, **static)
        torch.testing.assert_close(result, reference)
    assert dak.stats().total.remote > 0


_KINDS = ("linear_epilogue", "gated_linear")
# of two layers: products with an epilogue, and gates
FUSED = {
    "llama": (4, 2),
    "qwen2": (4, 2),
    "qwen3": (4, 2),
    "mistral": (4, 2),
    "phi3": (4, 2),  # gate and up are halves of one weight
    "gemma2": (0, 2),  # a norm stands before each residual
    "opt": (4, 0),
    "gpt2": (6, 0),  # its GELU is written out, its weights are [in, out]
    "gpt_neox": (4, 0),
    "falcon": (4, 0),
    "bert": (6, 0),
}


@pytest.mark.parametrize("name", sorted(FUSED))
def test_epilogues_are_fused_in_bfloat16_without_losing_accuracy(name):
    SESSION.reset()
    model = build(name)
    inputs = inputs_of(name, 2, 7)
    exact = output_of(model.double(), inputs)
    eager = output_of(model.bfloat16(), inputs)
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    graphs = []
    backend = functools.partial(
        compile_graph,
        settings=BackendOptions(),
        executor=lambda graph, _: graphs.append(graph) or graph.forward,
    )
    dak.stats(reset=True)
    result = output_of(torch.compile(model, backend=backend), inputs)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    found = tuple(targets.count(f"dak.{kind}.default") for kind in _KINDS)
    assert found == FUSED[name]
    read = {count.kind: count.bytes for count in dak.stats().reads}
    assert all(read[kind].total > 0 for kind, n in zip(_KINDS, found, strict=True) if n)
    error, eager_error = ((value.double() - exact).norm() for value in (result, eager))
    assert error <= 1.25 * eager_error
    assert eager_error < 0.05 * exact.norm(), "the reference is meaningful"

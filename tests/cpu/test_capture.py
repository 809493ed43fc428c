"""Graphs captured without a GPU and without weights have the bytes and rows of the real steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dak_inductor.capture import capture, capture_generation
from dak_inductor.cost_model import PRODUCTS
from dak_inductor.errors import ModelError
from dak_inductor.op_table import OpTable

transformers = pytest.importorskip("transformers", reason="needs transformers")

BATCH, PROMPT, NEW = 3, 16, 4


def llama(**sizes) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        **sizes,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)


def uses(table: OpTable, kind: str):
    names = dict.fromkeys(table.operands(), "t")
    return [u for u in table.uses(names, graph="g", calls=1) if u.kind == kind]


def products(table: OpTable):
    return [use for kind in PRODUCTS for use in uses(table, kind)]


def test_prefill_and_decode_of_a_llama():
    model = llama()
    (prefill_name, prefill), (decode_name, decode) = capture_generation(
        model, batch=BATCH, prompt=PROMPT, new=NEW
    )
    assert (prefill_name, decode_name) == ("prefill", "decode")
    weights = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n
    )
    for table, rows in ((prefill, BATCH * PROMPT), (decode, BATCH)):
        linears = products(table)
        assert sum(u.touched_bytes for u in linears) == 4 * weights
        assert {u.m for u in linears if u.module != "lm_head"} == {rows}
        assert {u.m for u in linears if u.module == "lm_head"} == {BATCH}  # the last token's logits
        (embedding,) = uses(table, "embedding")
        assert embedding.touched_bytes == rows * 64 * 4
        cache = BATCH * 2 * (PROMPT + NEW) * 16 * 4
        assert [u.touched_bytes for u in uses(table, "attention")] == [cache] * 4
        assert not table.refusals
    assert set(prefill.parameters.values()) >= {
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    }


def test_more_models_than_dynamo_recompiles_by_default():
    for layers in range(1, 6):
        model = llama()
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        tables = capture_generation(model, batch=1, prompt=4 + layers, new=1)
        assert len(tables) == 2


def test_an_encoder_gives_one_forward():
    config = transformers.BertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=512,
    )
    with torch.device("meta"):
        model = transformers.BertModel(config).eval().requires_grad_(False)
    ((name, table),) = capture_generation(model, batch=2, prompt=8, new=1)
    assert name == "forward"
    assert len(products(table)) == 7  # query, key, value, output, two of the MLP, pooler


def test_a_model_that_looks_at_its_data_is_refused_by_name():
    class Branches(nn.Module):
        config = None

        def forward(self, input_ids):
            return input_ids if input_ids.sum().item() > 0 else -input_ids

    with pytest.raises(ModelError, match="Branches"):
        capture_generation(Branches(), batch=1, prompt=2, new=1)


def test_every_graph_of_a_broken_function_is_captured():
    weight = torch.empty(8, 8, device="meta")

    def step(x):
        x = x @ weight
        torch._dynamo.graph_break()
        return x @ weight

    tables = capture(step, torch.empty(2, 8, device="meta"))
    assert [len(table.ops) for table in tables] == [1, 1]

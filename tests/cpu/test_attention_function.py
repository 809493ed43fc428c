"""The attention function of transformers: who sees what without a dense mask, and which bytes are
read for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dak_inductor import attention_function
from dak_inductor.attention_bounds import bounds_of
from dak_inductor.attention_function import (
    bounds_mask,
    note_bounds,
)
from dak_inductor.attention_switch import restore_attention_function, use_attention_function
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.errors import ModelError
from dak_inductor.lowering import counters
from dak_inductor.normalise import normalise
from dak_inductor.op_table import build_op_table
from dak_inductor.rewrite import rewrite

transformers = pytest.importorskip("transformers")
masking = transformers.masking_utils

B, HQ, HKV, S, D, VOCAB = 2, 6, 2, 32, 16, 61
TOKEN_BYTES = HKV * D * 4  # of one sequence


@pytest.fixture(autouse=True)
def _no_counts():
    counters.reset()
    yield
    counters.reset()


def model_of(family: str = "Llama", **changes):
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(
        **{
            "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": HQ, "num_key_value_heads": HKV,
            "head_dim": D, "max_position_embeddings": 128, **changes,
        }
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)


class TieredLayer(transformers.cache_utils.StaticLayer):
    """A static layer that lies token by token in simulated buffers and notes its bounds."""

    def __init__(self, number: int, *, batch: int = B, split_tokens: int = 8):
        super().__init__(max_cache_len=S)
        self.buffers = []
        for name in ("keys", "values"):
            row = batch * TOKEN_BYTES
            buffer = SimulatedTier(page_bytes=256).allocate(S * row, split=split_tokens * row)
            buffer.label = f"{name}{number}"
            shape, strides = (batch, HKV, S, D), (HKV * D, D, batch * HKV * D, 1)
            tensor = buffer.tensor(torch.float32, shape, strides)
            tensor.zero_()
            setattr(self, name, tensor)
            self.buffers.append(buffer)
        self.device = torch.device("cpu")
        self.lengths = torch.zeros(batch, dtype=torch.int32)
        self.starts = torch.zeros(batch, dtype=torch.int32)
        for tensor in (
            self.keys, self.values, self.lengths, self.starts, self.cumulative_length,
        ):  # fmt: skip
            torch._dynamo.mark_static_address(tensor)
        note_bounds(self.keys, lengths=self.lengths, starts=self.starts)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.lengths.add_(key_states.shape[2])
        return super().update(key_states, value_states, *args, **kwargs)


def tiered_cache(layers: int = 2, **options):
    return transformers.Cache(layers=[TieredLayer(i, **options) for i in range(layers)])


class Recorder:
    """A backend that rewrites, keeps the graphs and runs them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, _):
        graph = normalise(graph_module)
        self.table = build_op_table(graph)
        self.graphs.append(rewrite(graph, self.table))
        return self.graphs[-1].forward

    def calls(self, name="dak.attention.default"):
        return [node for node in self.graphs[-1].graph.nodes if str(node.target) == name]


class Spied:
    """Counts the calls of dak::attention and of SDPA in what runs eagerly."""

    def __init__(self, monkeypatch):
        self.masks = []
        real = attention_function.torch.ops.dak.attention.default
        spied = self

        class Op:
            @staticmethod
            def default(*args):
                spied.masks.append(args[5])
                return real(*args)

        monkeypatch.setattr(torch.ops.dak, "attention", Op)


def generate(model, cache, ids, mask=None, tokens=9):
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, do_sample=False,
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, use_cache=True,
            output_logits=True, return_dict_in_generate=True, disable_compile=True,
        )  # fmt: skip


def assert_same(result, expected):
    assert torch.equal(result.sequences, expected.sequences)
    for left, right in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return mask


FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": D},
    "Gemma3": {"sliding_window": 6, "query_pre_attn_scalar": D},
    "Qwen3": {},
}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_static_cache_gives_the_same_without_a_dense_mask(
    name, padding, monkeypatch
):
    model = model_of(name, **FAMILIES[name])
    if name == "Gemma2":  # SDPA has no softcap
        model.set_attn_implementation("eager")
    ids = torch.randint(1, VOCAB, (B, 9))
    mask = padded(ids) if padding else torch.ones_like(ids)

    def cache():
        return transformers.StaticCache(config=model.config, max_cache_len=S)

    expected = generate(model, cache(), ids, mask)
    before = model.config._attn_implementation
    assert use_attention_function(model) is None
    spied = Spied(monkeypatch)
    result = generate(model, cache(), ids, mask)
    assert_same(result, expected)
    assert len(spied.masks) == 2 * 9
    assert all(each is None for each in spied.masks)
    restore_attention_function(model)
    assert model.config._attn_implementation == before
    generate(model, cache(), ids, mask)
    assert len(spied.masks) == 2 * 9


def test_caches_that_grow_go_to_the_plain_function(monkeypatch):
    model = model_of()
    ids = torch.randint(1, VOCAB, (B, 7))
    expected = generate(model, transformers.DynamicCache(config=model.config), ids)
    use_attention_function(model)
    spied = Spied(monkeypatch)
    result = generate(model, transformers.DynamicCache(config=model.config), ids)
    assert_same(result, expected)
    assert not spied.masks
    with torch.no_grad():
        without_cache = model(ids, use_cache=False).logits
    torch.testing.assert_close(without_cache[:, -1], expected.logits[0], rtol=1e-4, atol=1e-5)
    assert not spied.masks
    # padding makes bounds, which only dak::attention reads
    mask = padded(ids)
    result = generate(model, transformers.DynamicCache(config=model.config), ids, mask)
    assert spied.masks
    restore_attention_function(model)
    expected = generate(model, transformers.DynamicCache(config=model.config), ids, mask)
    assert_same(result, expected)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_tokens_behind_earlier_ones_in_a_cache_that_grows(family):
    """torch would align their causal triangle at the first token of the cache."""
    model = model_of(family, sliding_window=4) if family == "Mistral" else model_of(family)
    ids = torch.randint(1, VOCAB, (B, 12))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        use_attention_function(model)
        cache = transformers.DynamicCache(config=model.config)
        steps = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [False, True])
def test_a_tiered_cache_reads_only_the_tokens_that_are_there(padding):
    model = model_of()
    ids = torch.randint(1, VOCAB, (B, 7))
    mask = padded(ids) if padding else torch.ones_like(ids)
    static = transformers.StaticCache(config=model.config, max_cache_len=S)
    expected = generate(model, static, ids, mask)
    use_attention_function(model)
    assert_same(generate(model, tiered_cache(), ids, mask), expected)
    visible = sum(2 * length - (3 if padding else 0) for length in range(7, 16))
    reads = {read.tensor: read for read in counters.snapshot()}
    assert set(reads) == {"keys0", "values0", "keys1", "values1"}
    for read in reads.values():
        assert (read.kind, read.calls) == ("attention", 9)
        assert read.bytes.total == visible * TOKEN_BYTES
        # tokens from the eighth on are remote: of each step, those past it
        assert read.bytes.remote == sum(2 * max(n - 8, 0) for n in range(7, 16)) * TOKEN_BYTES


def test_lengths_and_starts_of_a_compiled_step_are_the_tensors_of_the_cache():
    model = model_of()
    ids = torch.randint(1, VOCAB, (B, 6))
    static = transformers.StaticCache(config=model.config, max_cache_len=S)
    ours = tiered_cache()
    recorder = Recorder()
    with torch.no_grad():
        expected = [model(ids[:, :3], past_key_values=static).logits]
        expected += [model(ids[:, i : i + 1], past_key_values=static).logits for i in (3, 4, 5)]
        use_attention_function(model)
        model(ids[:, :3], past_key_values=ours)
        step = torch.compile(model.forward, backend=recorder, fullgraph=True)
        for i in (3, 4, 5):
            counters.reset()
            result = step(ids[:, i : i + 1], past_key_values=ours).logits
            torch.testing.assert_close(result, expected[i - 2], rtol=1e-4, atol=1e-5)
            for read in counters.snapshot():
                assert read.bytes.total == (i + 1) * B * TOKEN_BYTES
    assert len(recorder.graphs) == 1, "no recompilation as the context grows"
    calls = recorder.calls()
    assert len(calls) == 2
    attention = [op for op in recorder.table.ops if op.kind == "attention"]
    assert {op.node for op in attention} == {call.name for call in calls}
    assert len({op.operand for op in attention}) == 4, "keys and values of both layers"
    for call in calls:
        *_, lengths, starts, mask, _, causal, window, softcap = call.args
        assert (mask, causal, window, softcap) == (None, True, 0, 0.0)
        for bound in (lengths, starts):
            while bound.op != "placeholder":  # lengths are added to in place before
                bound = bound.args[0]
            assert bound.meta["tensor_dict"]["_dynamo_static_input_type"]
    assert not recorder.calls("aten.scaled_dot_product_attention.default")


def test_a_compiled_prefill_through_generate_sees_padding_on_the_left():
    """generate makes the mask before it calls the compiled forward, so that it can look."""
    model = model_of()
    ids = torch.randint(1, VOCAB, (B, 7))
    mask = padded(ids)
    static = transformers.StaticCache(config=model.config, max_cache_len=S)
    expected = generate(model, static, ids, mask, tokens=4)
    use_attention_function(model)
    recorder = Recorder()
    model.compile(backend=recorder, fullgraph=True)
    assert_same(generate(model, tiered_cache(), ids, mask, tokens=4), expected)
    assert len(recorder.graphs) == 2, "prefill and decode"
    for call in recorder.calls():
        assert call.args[5] is None


def test_a_compiled_forward_that_cannot_look_at_its_padding_makes_a_dense_mask():
    model = model_of()
    ids = torch.randint(1, VOCAB, (B, 7))
    for mask in (padded(ids), padded(ids).flip(1)):
        static = transformers.StaticCache(config=model.config, max_cache_len=S)
        restore_attention_function(model)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, past_key_values=static).logits
        use_attention_function(model)
        recorder = Recorder()
        torch._dynamo.reset()
        with torch.no_grad():
            step = torch.compile(model.forward, backend=recorder, fullgraph=True)
            result = step(ids, attention_mask=mask, past_key_values=tiered_cache()).logits
        seen = mask.bool()
        torch.testing.assert_close(result[seen], expected[seen], rtol=1e-4, atol=1e-5)
        assert len(recorder.calls()) == 2
        assert all(call.args[5] is not None for call in recorder.calls())


def mask_of(q_length, kv_length, **options):
    return bounds_mask(
        B, q_length, kv_length, mask_function=masking.causal_mask_function, **options
    )


def test_bounds_are_as_small_as_what_they_say():
    assert mask_of(5, 5) is None
    assert mask_of(2, 7, q_offset=5) is None, "all that is there is seen"
    (static,) = [mask_of(2, S, q_offset=torch.tensor(5))]
    found = bounds_of(static)
    assert static.shape == (1, 1, 1, B)
    assert (found.lengths.tolist(), found.starts, found.sliding) == ([7, 7], None, False)
    assert found.lengths.is_contiguous()
    padding = torch.ones(B, 7, dtype=torch.bool)
    assert mask_of(2, 7, q_offset=5, attention_mask=padding) is None
    padding[1, :4] = False
    left = bounds_of(mask_of(2, S, q_offset=5, attention_mask=padding))
    assert (left.lengths.tolist(), left.starts.tolist()) == ([7, 7], [0, 4])
    assert left.starts.is_contiguous()
    # a layer that sees the last tokens only: both count from the first that it sees
    later = bounds_of(mask_of(1, 4, q_offset=6, kv_offset=3, attention_mask=padding))
    assert (later.lengths.tolist(), later.starts.tolist()) == ([4, 4], [0, 1])


def test_other_masks_are_dense_and_those_of_transformers():
    padding = torch.ones(B, 7, dtype=torch.bool)
    padding[0, 2] = False  # a hole
    options = {"q_offset": 5, "attention_mask": padding}
    dense = mask_of(2, 7, **options)
    assert dense.dtype == torch.bool
    expected = masking.sdpa_mask(B, 2, 7, q_offset=5, attention_mask=padding)
    assert torch.equal(dense, expected)
    assert bounds_of(dense) is None
    chunked = masking.chunked_causal_mask_function(3, torch.zeros(B, dtype=torch.long))
    config = type("Config", (), {"attention_chunk_size": 3, "sliding_window": None})
    dense = bounds_mask(B, 5, 5, mask_function=chunked, local_size=3, config=config)
    assert torch.equal(dense, masking.sdpa_mask(B, 5, 5, mask_function=chunked, local_size=3))
    both_ways = masking.bidirectional_mask_function
    dense = bounds_mask(B, 5, 5, mask_function=both_ways, allow_is_bidirectional_skip=False)
    assert dense.all()
    sliding = masking.sliding_window_causal_mask_function(3)
    config = type("Config", (), {"sliding_window": 3})
    bounds = bounds_mask(B, 5, 5, mask_function=sliding, local_size=3, config=config)
    assert bounds_of(bounds).sliding
    on_top = {"mask_function": sliding, "local_size": 3, "config": config, "use_vmap": True}
    assert bounds_mask(B, 5, 5, **on_top).shape == (B, 1, 5, 5)


def test_a_mask_that_the_user_made_is_added_to_what_the_cache_knows():
    model = model_of()
    ids = torch.randint(1, VOCAB, (B, 5))
    own = torch.rand(B, 1, 5, S) > 0.5
    own |= torch.eye(5, S, dtype=torch.bool)
    own &= torch.ones(5, S).tril().bool()
    static = transformers.StaticCache(config=model.config, max_cache_len=S)
    with torch.no_grad():
        expected = model(ids, attention_mask=own, past_key_values=static).logits
        use_attention_function(model)
        result = model(ids, attention_mask=own, past_key_values=tiered_cache()).logits
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert {read.bytes.total for read in counters.snapshot()} == {5 * B * TOKEN_BYTES}


def test_models_that_cannot_be_switched_say_why_and_stay_as_they_are():
    assert "no model of transformers" in use_attention_function(nn.Linear(2, 2))
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            vocab_size=9,
        )
    )  # fmt: skip
    before = bert.config._attn_implementation
    assert use_attention_function(bert) is None
    restore_attention_function(bert)
    assert bert.config._attn_implementation == before
    sinks = model_of(
        "GptOss", num_local_experts=2, num_experts_per_tok=1, sliding_window=6, num_hidden_layers=1
    )
    before = sinks.config._attn_implementation
    reason = use_attention_function(sinks)
    assert "GptOssForCausalLM" in reason
    assert not reason.endswith(".")
    assert sinks.config._attn_implementation == before
    model = model_of()
    assert use_attention_function(model) is None
    assert use_attention_function(model) is None, "twice is once"
    restore_attention_function(model)
    restore_attention_function(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_it_cannot_compute_is_an_error_by_name():
    layer = TieredLayer(0)
    query = torch.randn(B, HQ, 1, D)
    attend = attention_function.attend
    with pytest.raises(ModelError, match="no dropout and no attention sinks"):
        attend(nn.Module(), query, layer.keys, layer.values, None, dropout=0.1)
    with pytest.raises(ModelError, match="no dropout and no attention sinks"):
        attend(nn.Module(), query, layer.keys, layer.values, None, s_aux=torch.zeros(HQ))
    with pytest.raises(ValueError, match="3 sequences of queries on a cache of 2"):
        attend(nn.Module(), torch.randn(3, HQ, 1, D), layer.keys, layer.values, None)
    result, weights = attend(nn.Module(), query, layer.keys, layer.values, None)
    assert weights is None
    assert torch.equal(result, torch.zeros(B, 1, HQ, D)), "length 0: there is nothing to see"
    assert not counters.total().total


def test_a_position_bias_is_added_to_the_scores():
    layer = TieredLayer(0)
    layer.keys.normal_()
    layer.values.normal_()
    layer.lengths.fill_(9)
    query, bias = torch.randn(B, HQ, 2, D), torch.randn(1, HQ, 2, S)
    result, _ = attention_function.attend(
        nn.Module(), query, layer.keys, layer.values, None, position_bias=bias, is_causal=True
    )
    seen = torch.arange(S) <= torch.tensor([[7], [8]])
    mask = bias.masked_fill(~seen, float("-inf"))
    expected = nn.functional.scaled_dot_product_attention(
        query, layer.keys, layer.values, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(result, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)

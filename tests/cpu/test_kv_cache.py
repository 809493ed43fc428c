"""The tiered KV cache under transformers, eager: the tokens of a plain cache, bytes by tier."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

import dak_inductor as dak
from dak_inductor.cuda_runtime.page_maker import PAGE_MAKER
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import (
    BudgetError,
    CacheError,
    ContextLengthError,
    HostMemoryError,
    ModelError,
    OptionError,
)

from .more_architectures import CAUSAL
from .small_models import FAMILIES, build, prompt

transformers = pytest.importorskip("transformers", reason="needs transformers")


def make(model: Any, *, batch: int = 2, max_len: int = 100, **options: Any) -> Any:
    options = {"offload_ratio": 0.6, "remote": "simulated", "prefill_chunk": 16, **options}
    return dak.kv_cache(model, batch=batch, max_len=max_len, **options)


def generate(model: Any, inputs: dict[str, torch.Tensor], new: int, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)


@torch.no_grad()
def logits_in_steps(model: Any, tokens: torch.Tensor, steps: list[int], cache: Any) -> torch.Tensor:
    """Logits of `tokens`, fed in pieces of these lengths."""
    parts, start = [], 0
    for step in steps:
        piece = tokens[:, start : start + step]
        parts.append(model(piece, past_key_values=cache, use_cache=True).logits)
        start += step
    assert start == tokens.shape[1]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("attention", [True, False], ids=["dak", "stock"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_tokens_of_a_plain_cache(family, padding, attention):
    model, inputs = build(family), prompt(2, 10, padding)
    expected = generate(model, inputs, 80)
    cache = make(model, attention=attention)
    assert torch.equal(generate(model, inputs, 80, past_key_values=cache), expected)
    held = cache.bytes_by_tier()
    assert held.remote > 0.4 * held.total and held.local > 0
    assert cache.get_seq_length() == 89


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_without_a_cache(family, implementation):
    model = build(family, attn_implementation=implementation)
    tokens = prompt(2, 60)["input_ids"]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    for steps in ([1] * 60, [10, 1, 1, 5, 16, 1, 26], [60], [40, 20], [7, 47, 6]):
        cache = make(model, max_len=60, attention=False)
        torch.testing.assert_close(
            logits_in_steps(model, tokens, steps, cache), expected, rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("before", [0, 10])
def test_a_step_that_ended_half_way_is_noticed_by_the_next_one(before, monkeypatch):
    model, tokens = build("llama"), prompt(2, 16)["input_ids"]
    cache = make(model)
    if before:
        model(tokens[:, :before], past_key_values=cache)
    fails = model.model.layers[-1].self_attn
    monkeypatch.setattr(fails, "forward", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model(tokens[:, before : before + 4], past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(CacheError, match=r"ended half way; reset\(\)"):
        model(tokens[:, before : before + 1], past_key_values=cache)
    cache.reset()
    expected = model(tokens, use_cache=False).logits
    got = model(tokens, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_chunked_prefill_is_the_same():
    model, inputs = build("gemma2"), prompt(2, 50, padding=5)
    expected = generate(model, inputs, 20)
    cache = make(model)
    got = generate(model, inputs, 20, past_key_values=cache, prefill_chunk_size=7)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sliding_layers_keep_the_window_only(family):
    model = build(family)
    cache = make(model, max_len=400)
    rows = [layer.keys.shape[2] for layer in cache.layers]
    full = family == "llama"
    assert rows[0] == (400 if full else 8 - 1 + 32 + 16)
    assert rows[1] == (400 if family != "mistral" else rows[0])


def test_memory_is_taken_as_the_context_grows():
    model = build()
    cache = make(model, max_len=4000, offload_ratio=0.5)
    tier = cache.storage.tier
    assert cache.bytes_by_tier() == tier.counters.held == TierBytes()
    planned = cache.planned_bytes_by_tier()
    assert planned.total == 2 * 4 * 4000 * 2 * 2 * 16 * 4 and planned.remote >= planned.total // 2
    seen = []
    inputs = prompt(2, 10)
    for _ in range(4):
        cache.reset()
        generate(model, inputs, 100, past_key_values=cache)
        seen.append(cache.bytes_by_tier())
    assert seen == [seen[0]] * 4  # what is committed serves the next context too
    row = 2 * 2 * 16 * 4
    assert 8 * row * 109 <= seen[0].total <= 8 * (row * 109 * 1.13 + 2 * 4096)
    assert seen[0].total < planned.total / 20
    # the first tokens are local: nothing is remote before the context reaches the split
    assert seen[0].remote == 0 and tier.counters.held.local >= seen[0].total
    cache.commit(3900)
    full = cache.bytes_by_tier()
    assert full.remote > 0 and abs(full.total - 8 * row * 3900) <= 8 * (row * 500 + 4096)


def test_what_is_not_committed_stays_zero():
    model = build()
    cache = make(model, max_len=1000)
    generate(model, prompt(2, 10), 200, past_key_values=cache)
    for tensor in cache.storage.tensors:
        buffer = tensor.buffer
        assert 0 < buffer.committed < buffer.nbytes
        everything = buffer.tensor(torch.uint8, (buffer.nbytes,))
        assert everything[: buffer.committed // 2].any()
        assert not everything[buffer.committed :].any()


def test_memory_goes_with_the_cache():
    model = build()
    cache = make(model)
    tier = cache.storage.tier
    generate(model, prompt(2, 10), 20, past_key_values=cache)
    assert tier.counters.held.total > 0
    del cache
    assert PAGE_MAKER.wait()
    assert tier.counters.held == TierBytes()


def test_host_memory_is_refused_before_it_is_taken():
    model, inputs = build(), prompt(2, 10)
    cache = make(model, max_len=2000, offload_ratio=1.0, host_memory=8 * 12 * 4096)
    with pytest.raises(HostMemoryError, match=r"the KV cache at .* tokens of 2000") as caught:
        generate(model, inputs, 1900, past_key_values=cache)
    assert "host_memory=" in str(caught.value)
    held = cache.bytes_by_tier()
    assert cache.storage.tier.counters.held.remote <= 8 * 12 * 4096
    tokens = cache.get_seq_length()
    assert 0.7 * held.total <= 8 * 256 * tokens <= held.total  # it got as far as memory went
    cache.reset()
    expected = generate(model, inputs, 20)
    assert torch.equal(generate(model, inputs, 20, past_key_values=cache), expected)


def test_beam_search_reorders():
    for family in FAMILIES:
        model, inputs = build(family), prompt(2, 10, padding=3)
        options = {"num_beams": 3, "num_return_sequences": 2}
        expected = generate(model, inputs, 60, **options)
        cache = make(model, batch=6)
        got = generate(model, inputs, 60, past_key_values=cache, **options)
        assert torch.equal(got, expected)


def test_reorder_copies_sequences():
    model, inputs = build(), prompt(3, 20)
    cache = make(model, batch=3)
    generate(model, inputs, 5, past_key_values=cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[[2, 1, 1]])
        assert torch.equal(layer.values, values[[2, 1, 1]])
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    with pytest.raises(CacheError, match=r"an order of 2 sequences"):
        cache.reorder_cache(torch.tensor([0, 1]))
    for order in ([0, 1, 3], [-1, 0, 1]):
        with pytest.raises(CacheError, match=r"each is one of \[0, 1, 2\]"):
            cache.reorder_cache(torch.tensor(order))


@pytest.mark.parametrize("family", FAMILIES)
def test_crop_takes_tokens_back(family):
    model = build(family)
    tokens = prompt(2, 80)["input_ids"]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    cache = make(model)
    wrong = torch.cat((tokens[:, :60], tokens[:, :9]), dim=1)
    logits_in_steps(model, wrong, [10] * 6 + [9], cache)
    cache.crop(-9)
    assert cache.get_seq_length() == 60
    got = logits_in_steps(model, tokens[:, 60:], [3, 1, 16], cache)
    torch.testing.assert_close(got, expected[:, 60:], rtol=1e-4, atol=1e-5)
    cache.crop(70)  # a length
    assert cache.get_seq_length() == 70
    got = logits_in_steps(model, tokens[:, 70:], [10], cache)
    torch.testing.assert_close(got, expected[:, 70:], rtol=1e-4, atol=1e-5)
    cache.crop(0)
    cache.crop(500)
    assert cache.get_seq_length() == 80
    with pytest.raises(CacheError, match=r"crop\(-81\)"):
        cache.crop(-81)


def test_crop_behind_a_window_is_refused_and_changes_nothing():
    model = build("gemma2")  # sliding layers and full ones
    cache = make(model)
    logits_in_steps(model, prompt(2, 90)["input_ids"], [10] * 9, cache)
    with pytest.raises(CacheError, match=r"the last 42 can be taken back"):
        cache.crop(-70)
    assert {layer.storage.tokens for layer in cache.layers} == {90}


def test_assisted_generation_crops():
    model, inputs = build(), prompt(1, 20)
    inputs["input_ids"][0, 10:] = inputs["input_ids"][0, :10]
    expected = generate(model, inputs, 40)
    cache = make(model, batch=1)
    got = generate(model, inputs, 40, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(got, expected)


def test_a_conversation_goes_on_in_the_cache():
    for family in FAMILIES:
        model, inputs = build(family), prompt(2, 10)
        cache = make(model)
        first = generate(model, inputs, 20, past_key_values=cache)
        more = torch.cat((first, prompt(2, 30)["input_ids"]), dim=1)
        both = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        expected = generate(model, both, 20)
        assert torch.equal(generate(model, both, 20, past_key_values=cache), expected)


def test_starts_come_from_a_mask_or_are_given():
    model = build("gemma2")
    cache = make(model)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    cache.set_padding(mask)
    assert [layer.starts.tolist() for layer in cache.layers] == [[3, 0]] * 4
    cache.set_padding(starts=torch.tensor([1, 2]))
    assert cache.layers[0].starts.tolist() == [1, 2]
    logits_in_steps(model, prompt(2, 90)["input_ids"], [10] * 9, cache)
    assert cache.layers[0].starts.tolist() == [0, 0]  # behind the window
    assert cache.layers[1].starts.tolist() == [1, 2]
    assert cache.layers[0].lengths.tolist() == [cache.layers[0].storage.slots] * 2
    assert cache.layers[1].lengths.tolist() == [90, 90]
    with pytest.raises(CacheError, match=r"one per sequence, 2"):
        cache.set_padding(starts=torch.tensor([1, 2, 3]))
    for starts in ([-1, 0], [0, 101]):
        with pytest.raises(CacheError, match=r"each is from 0 to max_len=100"):
            cache.set_padding(starts=torch.tensor(starts))
    with pytest.raises(CacheError, match=r"whole numbers"):
        cache.set_padding(starts=torch.tensor([0.5, 1.0]))
    for wrong in ([1, 1, 1, 1, 0], [0, 1, 0, 1, 1]):
        with pytest.raises(CacheError, match=r"pad on the left"):
            cache.set_padding(torch.tensor([wrong, [1] * 5]))
    cache.reset()
    cache.set_padding(torch.tensor([[0, 0, 0], [0, 1, 1]]))  # nothing but padding
    assert cache.layers[1].starts.tolist() == [3, 1]
    with pytest.raises(CacheError, match=r"say one of"):
        cache.set_padding()


def test_reset_leaves_no_trace():
    model, inputs = build("gemma2"), prompt(2, 10, padding=2)
    expected = generate(model, inputs, 30)
    cache = make(model)
    with torch.no_grad():
        for layer in range(4):
            states = torch.full((2, 2, 60, 32), float("nan"))
            cache.update(states, states, layer)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, inputs, 30, past_key_values=cache), expected)


def test_too_many_tokens_overwrite_nothing():
    for family in FAMILIES:
        model = build(family)
        tokens = prompt(2, 61)["input_ids"]
        cache = make(model, max_len=60)
        logits_in_steps(model, tokens[:, :58], [50, 8], cache)
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(ContextLengthError, match=r"61 tokens, .*=60; it holds 58 tokens"):
            logits_in_steps(model, tokens[:, 58:], [3], cache)
        assert all(
            torch.equal(layer.keys, b) for layer, b in zip(cache.layers, before, strict=True)
        )
        logits_in_steps(model, tokens[:, 58:60], [1, 1], cache)
        with pytest.raises(ContextLengthError):
            logits_in_steps(model, tokens[:, 60:], [1], cache)
        with pytest.raises(ContextLengthError):
            cache.commit(61)


def test_another_model_batch_or_dtype_is_an_error():
    model = build()
    cache = make(model)
    with pytest.raises(CacheError, match=r"a batch of 3 for a KV cache of batch 2"):
        generate(model, prompt(3, 10), 5, past_key_values=cache)
    with pytest.raises(CacheError, match=r"a batch of 1"):
        generate(model, prompt(1, 10), 5, past_key_values=cache)
    with pytest.raises(CacheError, match=r"4 heads x 16, .* 2 x 16"):
        generate(build(num_key_value_heads=4), prompt(2, 10), 5, past_key_values=cache)
    with pytest.raises(CacheError, match=r"dtype=torch\.bfloat16"):
        generate(model.bfloat16(), prompt(2, 10), 5, past_key_values=cache)
    deeper = build(num_hidden_layers=6)
    with pytest.raises(CacheError, match=r"layer 4, .* 4 layers"):
        generate(deeper, prompt(2, 10), 5, past_key_values=cache)
    with pytest.raises(CacheError, match=r"batch_select_indices|keeps its batch"):
        cache.batch_select_indices(torch.tensor([0]))


def test_what_a_cache_of_this_very_model_cannot_hold_says_so():
    model, inputs = build(), prompt(2, 10)
    for dtype in (None, torch.bfloat16):
        cache = make(model, dtype=dtype)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(CacheError, match=r"Autocast .* model\.to\(torch\.bfloat16\)"),
        ):
            generate(model, inputs, 5, past_key_values=cache)
    cache = make(model)
    states = torch.zeros(2, 1, 3, 32), torch.zeros(2, 1, 3, 16)
    with pytest.raises(CacheError, match=r"1 heads x 32, .* other keys .* than its config"):
        cache.update(*states, 0)
    for layer, tokens in ((0, 3), (1, 16)):
        states = (torch.zeros(2, 2, tokens, 16),) * 2
        if layer:
            with pytest.raises(CacheError, match=r"layer 1 .* 16 tokens in a step of 3: of cross"):
                cache.update(*states, layer)
        else:
            cache.update(*states, layer)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_is_not_copied(how):
    with pytest.raises(CacheError, match=r"not copied .* crop"):
        how(make(build()))


def test_a_cache_for_which_there_are_no_addresses_is_refused_by_name():
    model = build()
    with pytest.raises(HostMemoryError, match=r"gives no range of \d+ bytes"):
        make(model, max_len=10**13)
    generate(model, prompt(2, 10), 5, past_key_values=make(model))


def test_what_cannot_be_made_says_why():
    model = build()
    with pytest.raises(OptionError, match=r"not offloaded, .* say offload_ratio"):
        dak.kv_cache(model, batch=1, max_len=10)
    with pytest.raises(BudgetError, match=r"offload_ratio=2"):
        make(model, offload_ratio=2)
    with pytest.raises(CacheError, match=r"batch=0"):
        make(model, batch=0)
    with pytest.raises(CacheError, match=r"max_len='long'"):
        make(model, max_len="long")
    with pytest.raises(CacheError, match=r"dtype=torch\.int8"):
        make(model, dtype=torch.int8)
    with pytest.raises(OptionError, match=r"prefill_chunk=0"):
        make(model, prefill_chunk=0)
    with pytest.raises(ModelError, match=r"Linear has no config"):
        make(torch.nn.Linear(4, 4))
    t5 = transformers.T5Config(d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4)
    with pytest.raises(CacheError, match=r"encoder-decoder"):
        make(transformers.T5ForConditionalGeneration(t5))
    model = dak.offload(model, offload_ratio=0.3, remote="simulated")
    with pytest.raises(OptionError, match=r"remote='cpu'"):
        dak.kv_cache(model, batch=1, max_len=10, remote="cpu")
    with pytest.raises(OptionError, match=r"host_memory"):
        dak.kv_cache(model, batch=1, max_len=10, host_memory=10**9)


def test_bfloat16_and_other_architectures():
    for name, sizes in {
        "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512},
        "Falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        "OPT": {"hidden_size": 64, "ffn_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        "GPTNeoX": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    }.items():
        sizes = {"vocab_size": 512, "pad_token_id": 0, "eos_token_id": None, **sizes}
        config = getattr(transformers, f"{name}Config")(**sizes)
        kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        model = getattr(transformers, name + kind)(config).eval()
        inputs = prompt(2, 10)
        expected = generate(model, inputs, 20)
        cache = make(model)
        assert torch.equal(generate(model, inputs, 20, past_key_values=cache), expected), name
    model = build().bfloat16()
    cache = make(model)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    generate(model, prompt(2, 10), 20, past_key_values=cache)
    assert cache.bytes_by_tier().total > 0
    gc.collect()


@pytest.mark.parametrize("attention", [True, False], ids=["dak", "stock"])
def test_latents_are_kept_as_the_model_hands_them_over(attention):
    stem, sizes = CAUSAL["deepseek_v3"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**sizes)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    inputs = prompt(2, 10, padding=3)
    expected = generate(model, inputs, 6)
    cache = make(model, offload_ratio=0.9, attention=attention)
    assert torch.equal(generate(model, inputs, 6, past_key_values=cache), expected)
    assert cache.bytes_by_tier().remote > 0


def test_restore_gives_the_model_its_own_attention_back():
    model = build()
    before = model.config._attn_implementation
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    make(model, attention=True)
    assert model.config._attn_implementation == "dak"
    dak.restore(model)
    assert model.config._attn_implementation == before
    again = {"use_cache": False, **prompt(2, 7)}
    assert model(**again).logits.isfinite().all()

"""The tiered KV cache in compiled graphs: no graph per step, counted and grown around each call."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch

import dak_inductor as dak
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import CacheError, ContextLengthError, HostMemoryError
from dak_inductor.kv_cache_steps import take_steps
from dak_inductor.lowering import counters
from dak_inductor.offloaded import record_of
from dak_inductor.session import SESSION

from . import small_models

build = partial(small_models.build, num_hidden_layers=2)


def prompt(batch: int = 2, length: int = 10, padding: int = 3) -> dict[str, torch.Tensor]:
    return small_models.prompt(batch, length, padding)


def generate(model: Any, inputs: dict[str, torch.Tensor], new: int, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _counted_anew() -> None:
    torch._dynamo.utils.counters.clear()
    counters.reset()


@pytest.mark.parametrize("attention", [True, False], ids=["dak", "stock"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generate_compiles_prefill_and_decode_once(family, attention):
    model, inputs = build(family), prompt()
    expected = generate(model, inputs, 70)
    dak.offload(model, offload_ratio=0.4, remote="simulated")
    model.compile(backend="dak")
    for _ in range(2):  # another cache is no reason to compile again
        cache = dak.kv_cache(
            model, batch=2, max_len=90, prefill_chunk=16, offload_ratio=0.6, attention=attention
        )
        assert torch.equal(generate(model, inputs, 70, past_key_values=cache), expected)
        assert graphs() == 2 and not torch._dynamo.utils.counters["graph_break"]
        held = cache.bytes_by_tier()
        assert held.remote > 0 and held.local > 0
        assert cache.get_seq_length() == 79
        layer = cache.layers[0]
        assert layer.lengths.tolist() == [layer.storage.slots] * 2
        assert (layer.storage.base > 0) == (family == "mistral")
        assert int(layer.place[0]) == layer.storage.base
    read = {r.tensor: r.bytes for r in dak.stats().reads if r.kind == "attention"}
    assert len(read) == 8  # keys and values of two layers of two caches
    assert sum(count.remote for count in read.values()) > 0


def test_memory_is_committed_between_compiled_steps():
    model, inputs = build(), prompt()
    dak.offload(model, offload_ratio=0.4, remote="simulated")
    cache = dak.kv_cache(model, batch=2, max_len=3000, offload_ratio=0.97)
    model.compile(backend="dak")
    seen = []
    for new in (2, 100, 250):
        cache.reset()
        generate(model, inputs, new, past_key_values=cache)
        seen.append(cache.bytes_by_tier())
    assert seen[0].total < seen[1].total < seen[2].total < cache.planned_bytes_by_tier().total / 5
    assert seen[2].remote > 0
    row = 4 * 2 * 2 * 16 * 4
    assert seen[2].total >= row * 259
    for tensor in cache.storage.tensors:
        buffer = tensor.buffer
        assert not buffer.tensor(torch.uint8, (buffer.nbytes,))[buffer.committed :].any()


@pytest.mark.parametrize("attention", [True, False], ids=["dak", "stock"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_forward_in_one_trace(family, attention):
    model = build(family)
    tokens = prompt(2, 70, 0)["input_ids"]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    cache = dak.kv_cache(
        model, batch=2, max_len=80, prefill_chunk=16, offload_ratio=0.5, remote="simulated",
        attention=attention,
    )  # fmt: skip
    compiled = torch.compile(model, backend="dak", fullgraph=True)
    parts, start = [], 0
    with torch.no_grad():
        for step in [10, 1, 1, 4, *[1] * 54]:
            piece = tokens[:, start : start + step]
            parts.append(compiled(piece, past_key_values=cache, use_cache=True).logits)
            start += step
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    assert graphs() <= 3
    assert cache.get_seq_length() == 70 and (cache.layers[0].storage.base > 0) == (
        family == "mistral"
    )


def test_a_long_prompt_on_a_window():
    model, inputs = build("mistral"), prompt(2, 70)
    expected = generate(model, inputs, 10)
    dak.offload(model, offload_ratio=0.4, remote="simulated")
    cache = dak.kv_cache(model, batch=2, max_len=200, prefill_chunk=16)
    model.compile(backend="dak")
    assert torch.equal(generate(model, inputs, 10, past_key_values=cache), expected)
    assert cache.layers[0].keys.shape[2] == 8 - 1 + 32 + 16
    tokens = cache.get_seq_length()
    with (
        torch.no_grad(),
        pytest.raises(CacheError, match=r"at most 16 then.*prefill_chunk_size=16"),
    ):
        model(inputs["input_ids"], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == tokens


def test_without_the_backend_notes_run_in_the_graph():
    for family in ("llama", "mistral"):
        torch._dynamo.reset()
        model, inputs = build(family), prompt()
        expected = generate(model, inputs, 60)
        cache = dak.kv_cache(
            model, batch=2, max_len=100, prefill_chunk=16, offload_ratio=0.6, remote="simulated"
        )
        model.compile(backend="aot_eager")
        assert torch.equal(generate(model, inputs, 60, past_key_values=cache), expected)
        assert cache.get_seq_length() == 69 and cache.bytes_by_tier().remote > 0


def test_too_many_tokens_overwrite_nothing():
    model = build()
    tokens = prompt(2, 30)["input_ids"]
    dak.offload(model, offload_ratio=0.4, remote="simulated")
    cache = dak.kv_cache(model, batch=2, max_len=30)
    model.compile(backend="dak")
    with torch.no_grad():
        for start, stop in ((0, 28), (28, 29)):
            model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        before = [layer.keys.clone() for layer in cache.layers]
        lengths = [layer.lengths.clone() for layer in cache.layers]
        with pytest.raises(ContextLengthError, match=r"57 tokens, .* max_len=30"):
            model(tokens[:, :28], past_key_values=cache, use_cache=True)
        assert all(
            torch.equal(layer.keys, keys) and torch.equal(layer.lengths, length)
            for layer, keys, length in zip(cache.layers, before, lengths, strict=True)
        )
        model(tokens[:, 29:], past_key_values=cache, use_cache=True)
        with pytest.raises(ContextLengthError, match=r"31 tokens"):
            model(tokens[:, 29:], past_key_values=cache, use_cache=True)


def test_host_memory_is_refused_before_a_step():
    model, inputs = build(), prompt()
    dak.offload(model, offload_ratio=0.4, remote="simulated", host_memory=320_000)
    tier_held = sum(w.buffer.physical_bytes().remote for w in record_of(model).weights.values())
    cache = dak.kv_cache(model, batch=2, max_len=2000, offload_ratio=1.0)
    model.compile(backend="dak")
    with pytest.raises(HostMemoryError, match=r"the KV cache at"):
        generate(model, inputs, 1900, past_key_values=cache)
    assert tier_held + cache.bytes_by_tier().remote <= 320_000


def test_mistakes_in_a_trace_keep_their_names():
    model = build()
    dak.offload(model, offload_ratio=0.4, remote="simulated")
    cache = dak.kv_cache(model, batch=2, max_len=30)
    model.compile(backend="dak")
    with torch.no_grad(), pytest.raises(CacheError, match=r"a batch of 3"):
        model(prompt(3)["input_ids"], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0


def test_memory_goes_with_the_cache_not_with_the_graphs():
    model, inputs = build(), prompt()
    dak.offload(model, offload_ratio=0.4, remote="simulated")
    tier = record_of(model).tier
    before = tier.counters.held
    cache = dak.kv_cache(model, batch=2, max_len=100)
    model.compile(backend="dak")
    generate(model, inputs, 20, past_key_values=cache)
    assert tier.counters.held.total > before.total
    del cache
    gc.collect()
    assert tier.counters.held.total <= before.total
    assert [t for t in record_of(model).tensors() if "kv_cache" in t.name] == []


def test_notes_are_taken_out_of_the_graph():
    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        from dak_inductor.normalise import normalise

        traced = normalise(graph)
        before = sum("kv_step" in str(node.target) for node in traced.graph.nodes)
        steps = take_steps(traced)
        after = sum("kv_step" in str(node.target) for node in traced.graph.nodes)
        found.append((before, steps, after, [type(i) for i in inputs]))
        return graph.forward

    model = build("mistral")
    cache = dak.kv_cache(
        model, batch=2, max_len=100, prefill_chunk=16, offload_ratio=0.6, remote="simulated"
    )
    with torch.no_grad():
        torch.compile(model, backend=backend)(
            prompt()["input_ids"], past_key_values=cache, use_cache=True
        )
    ((before, steps, after, _),) = found
    assert (before, after) == (3, 0)  # one for the mask, one per layer
    assert [(step.tokens, step.written) for step in steps] == [(10, False), (10, True), (10, True)]
    assert len({step.operand for step in steps}) == 2
    assert cache.bytes_by_tier() != TierBytes()
    assert SESSION is not None


def test_plans_made_between_steps_weigh_the_cache():
    model, inputs = build(), prompt()
    expected = generate(model, inputs, 150)
    whole = sum(p.numel() * 4 for p in model.parameters())
    dak.offload(model, gpu_memory=int(1.1 * whole), remote="simulated")
    record = record_of(model)
    assert record is not None
    cache = dak.kv_cache(model, batch=2, max_len=700)
    model.compile(backend="dak")
    assert torch.equal(generate(model, inputs, 150, past_key_values=cache), expected)
    claimed = record.claimed_bytes().local + record.resident_bytes
    assert claimed <= 1.1 * whole and record.tier.counters.peak_local_bytes <= 1.1 * whole
    plan = dak.explain(model).plan
    read = [op for op in plan.ops if op.kind == "attention" and op.tensor.startswith("kv_cache")]
    assert {op.tensor for op in read} == {tensor.name for tensor in cache.storage.tensors}
    touched = {op.local_bytes + op.remote_bytes for op in read if op.m == 1}
    assert max(touched) < 700 * 2 * 2 * 16 * 4  # up to where the context is expected
    cache.reset()
    record.budget.total = int(0.6 * whole)
    assert torch.equal(generate(model, inputs, 150, past_key_values=cache), expected)

"""The tiered KV cache on a card: pages that come while graphs stand, one budget, equal logits."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

import dak_inductor as dak
from dak_inductor.benchmarks.harness.accuracy import errors, judge
from dak_inductor.benchmarks.harness.generation import freeze
from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.errors import CacheError, ContextLengthError, HostMemoryError
from dak_inductor.offloaded import record_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PAGE = 2 << 20
STEPS = (40, 1, 1, 1, 7, 1, 1, 1, 1, 1, 1)
VOCABULARY = 2048


def growing_tier(remote: str, device: torch.device, host_memory: int | None = None) -> VmmTier:
    opened = open_tier(remote, device=device, host_memory=host_memory)
    if not isinstance(opened, VmmTier):
        pytest.skip("this system refuses host pages (HOST_NUMA)")
    return opened


def make_model(family: str = "Llama", layers: int = 4, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Keys and values of 4 heads x 128, so that few tokens fill a page."""
    torch.manual_seed(0)
    own = {"sliding_window": 16} if family == "Mistral" else {}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=200_000,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **own,
    )
    return freeze(getattr(transformers, f"{family}ForCausalLM")(config).to(dtype))


def tokens_of(device: torch.device, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(device)


@torch.no_grad()
def without_cache(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits.float().cpu()


@torch.no_grad()
def in_steps(model: Any, tokens: torch.Tensor, cache: Any, steps: tuple[int, ...]) -> torch.Tensor:
    parts, start = [], 0
    for step in steps:
        piece = tokens[:, start : start + step]
        parts.append(model(piece, past_key_values=cache, use_cache=True).logits.float().cpu())
        start += step
    return torch.cat(parts, dim=1)


@pytest.mark.alone
def test_a_growing_buffer_reads_zeros_and_then_memory(device: torch.device, remote: str) -> None:
    tier = growing_tier(remote, device)
    free = torch.cuda.mem_get_info(device)[0]
    buffer = tier.allocate_growing(600 * PAGE, split=100 * PAGE)
    everything = buffer.tensor(torch.float32, (600 * PAGE // 4,))
    assert buffer.physical_bytes() == TierBytes()
    assert float(everything.amax()) == float(everything.amin()) == 0.0
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info(device)[0] < 200 << 20  # zeros, and the kernels' own
    for pages in (1, 60, 130, 131, 600):
        before = buffer.committed
        buffer.grow(pages * PAGE)
        assert buffer.committed >= pages * PAGE
        assert not everything.view(torch.uint8)[before : buffer.committed].any()
        everything.view(torch.uint8)[before : buffer.committed].fill_(3)
        rest = everything[buffer.committed // 4 :]
        assert rest.numel() == 0 or float(rest.amax()) == float(rest.amin()) == 0.0
        torch.cuda.synchronize()
        local = min(100 * PAGE, buffer.committed)
        assert buffer.physical_bytes() == TierBytes(local, buffer.committed - local)
        assert vmm.memory_in_use().get(tier.name, 0) == buffer.physical_bytes().remote
    written = everything.view(torch.uint8)
    assert int(written.amin()) == int(written.amax()) == 3


def test_a_captured_graph_sees_pages_that_came_later(device: torch.device, remote: str) -> None:
    tier = growing_tier(remote, device)
    buffer = tier.allocate_growing(64 * PAGE, split=20 * PAGE)
    buffer.grow(4 * PAGE)
    rows = buffer.tensor(torch.bfloat16, (64 * PAGE // 2048, 1024))
    sums = rows.float().sum(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = rows.float().sum(1)
    for pages in (4, 5, 30, 64):
        torch.cuda.synchronize()
        buffer.grow(pages * PAGE)
        filled = buffer.committed // 2048
        rows[:filled] = torch.randn(filled, 1024, device=device, dtype=torch.bfloat16)
        sums.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(sums[:filled], rows[:filled].float().sum(1))
        assert not sums[filled:].any()


def test_moving_the_split_of_a_growing_buffer(device: torch.device, remote: str) -> None:
    tier = growing_tier(remote, device)
    buffer = tier.allocate_growing(200 * PAGE, split=100 * PAGE)
    buffer.grow(120 * PAGE)
    data = torch.randint(0, 256, (buffer.committed,), dtype=torch.uint8, device=device)
    view = buffer.tensor(torch.uint8, (200 * PAGE,))
    view[: buffer.committed].copy_(data)
    for split in (10, 150, 0, 200, 60):
        torch.cuda.synchronize()
        buffer.move(split * PAGE)
        assert torch.equal(view[: len(data)], data)
        assert not view[len(data) :].any()
    torch.cuda.synchronize()
    buffer.grow(200 * PAGE)
    assert buffer.physical_bytes() == TierBytes(60 * PAGE, 140 * PAGE)
    assert torch.equal(view[: len(data)], data)


@pytest.mark.parametrize("attention", [True, False], ids=["dak", "stock"])
@pytest.mark.parametrize("compiled", ["eager", "inductor", "reduce-overhead"])
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_logits_are_those_without_a_cache(
    device: torch.device, remote: str, family: str, compiled: str, attention: bool
) -> None:
    model = make_model(family)
    tokens = tokens_of(device, 2, sum(STEPS))
    resident = copy.deepcopy(model).to(device)
    own = without_cache(resident, tokens)
    exact = without_cache(resident.float(), tokens)
    del resident
    dak.offload(model, offload_ratio=0.3, remote=remote)
    cache = dak.kv_cache(
        model, batch=2, max_len=20_000, offload_ratio=1.0, prefill_chunk=64, attention=attention
    )
    if compiled != "eager":
        options = {"mode": compiled} if compiled == "reduce-overhead" else None
        model.compile(backend="dak", options=options)
    ours = in_steps(model, tokens, cache, STEPS)
    verdict = judge(errors(ours, exact), errors(own, exact))
    assert verdict.passed, verdict
    assert cache.get_seq_length() == sum(STEPS)
    assert cache.layers[0].lengths.tolist() == [cache.layers[0].storage.slots] * 2
    assert cache.bytes_by_tier().remote > 0


def test_growth_under_cuda_graphs(device: torch.device, remote: str) -> None:
    """Pages of every layer change several times between replays of one graph."""
    model = make_model(layers=2)
    tokens = tokens_of(device, 8, 1100)
    resident = copy.deepcopy(model).to(device)
    own = without_cache(resident, tokens)[:, -300:]
    exact = without_cache(resident.float(), tokens)[:, -300:]
    del resident
    dak.offload(model, offload_ratio=0.3, remote=remote)
    cache = dak.kv_cache(model, batch=8, max_len=20_000, offload_ratio=0.98)
    model.compile(backend="dak", options={"mode": "reduce-overhead"})
    torch._dynamo.utils.counters.clear()
    ours, committed = in_steps(model, tokens[:, :800], cache, (800,)), set()
    parts = []
    for step in range(300):
        piece = tokens[:, 800 + step : 801 + step]
        parts.append(in_steps(model, piece, cache, (1,)))
        committed.add(cache.bytes_by_tier().total)
    ours = torch.cat(parts, dim=1)
    assert len(committed) >= 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    verdict = judge(errors(ours, exact), errors(own, exact))
    assert verdict.passed, verdict


@pytest.mark.alone
def test_weights_and_cache_stay_within_gpu_memory(device: torch.device) -> None:
    """A context whose cache is larger than the budget: the driver's own count says what is held."""
    gc.collect()
    torch.cuda.empty_cache()
    budget = int(3e9)
    model = make_model(layers=8)
    dak.offload(model, gpu_memory=budget, remote="cpu")
    cache = dak.kv_cache(model, batch=1, max_len=260_000)
    planned = cache.planned_bytes_by_tier()
    assert planned.total == 2 * 8 * 260_000 * 4 * 128 * 2 > budget
    assert planned.remote > planned.total - budget
    tokens = tokens_of(device, 1, 40_000)
    free, card = torch.cuda.mem_get_info(device)
    before = card - free
    lowest = free
    with torch.no_grad():
        for start in range(0, 40_000, 4_000):
            piece = tokens[:, start : start + 4_000]
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            lowest = min(lowest, torch.cuda.mem_get_info(device)[0])
    cache.commit(200_000)
    with torch.no_grad():
        model(tokens[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    lowest = min(lowest, torch.cuda.mem_get_info(device)[0])
    assert card - lowest <= budget, (before, card - lowest)
    held = cache.bytes_by_tier()
    assert held.remote > 0 and held.total >= 200_000 * planned.total // 260_000
    record = record_of(model)
    assert record is not None
    assert vmm.memory_in_use()["cpu"] >= held.remote


def test_no_copy_of_the_cache_is_made(device: torch.device) -> None:
    model = make_model(layers=2)
    dak.offload(model, offload_ratio=0.3, remote="cpu")
    cache = dak.kv_cache(model, batch=4, max_len=60_000, offload_ratio=0.5)
    cache.commit(60_000)
    one = cache.planned_bytes_by_tier().total // 4
    tokens = tokens_of(device, 4, 40)
    model.compile(backend="dak")
    in_steps(model, tokens[:, :20], cache, (16, 1, 1, 1, 1))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    in_steps(model, tokens[:, 20:], cache, (1,) * 20)
    peak = torch.cuda.max_memory_allocated(device) - before
    assert peak < one / 4, (peak, one)


def test_memory_is_refused_before_it_is_taken(device: torch.device) -> None:
    model = make_model(layers=2)
    dak.offload(model, offload_ratio=0.1, remote="cpu", host_memory=300 << 20)
    cache = dak.kv_cache(model, batch=4, max_len=60_000, offload_ratio=1.0)
    with pytest.raises(HostMemoryError, match=r"the KV cache at 50000 tokens of 60000"):
        cache.commit(50_000)
    assert cache.bytes_by_tier() == TierBytes()
    with pytest.raises(ContextLengthError):
        cache.commit(60_001)
    tokens = tokens_of(device, 4, 8)
    in_steps(model, tokens, cache, (8,))
    with pytest.raises(CacheError, match=r"a batch of 3"):
        in_steps(model, tokens[:3], cache, (8,))
    assert cache.get_seq_length() == 8


def test_a_graph_of_the_callers_own_grows_nothing(device: torch.device) -> None:
    model = make_model(layers=2)
    dak.offload(model, offload_ratio=0.1, remote="cpu")
    cache = dak.kv_cache(model, batch=1, max_len=4_000, offload_ratio=0.5)
    token = tokens_of(device, 1, 1)
    in_steps(model, token, cache, (1,))
    cache.commit(2_000)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(token, past_key_values=cache, use_cache=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        held = cache.bytes_by_tier()
        with torch.cuda.graph(graph):
            logits = model(token, past_key_values=cache, use_cache=True).logits
    start = int(cache.layers[0].lengths[0])
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert int(cache.layers[0].lengths[0]) == start + 50
    assert cache.bytes_by_tier() == held and bool(torch.isfinite(logits).all())


def test_memory_goes_with_the_cache(device: torch.device, remote: str) -> None:
    model = make_model(layers=2)
    dak.offload(model, offload_ratio=0.3, remote=remote)
    before = vmm.memory_in_use()
    cache = dak.kv_cache(model, batch=2, max_len=50_000, offload_ratio=0.6)
    cache.commit(50_000)
    assert sum(vmm.memory_in_use().values()) > sum(before.values()) + (300 << 20)
    del cache
    gc.collect()
    torch.cuda.synchronize()
    assert vmm.drain(60)
    assert vmm.memory_in_use() == before

"""dak::attention in compiled graphs on a GPU: no copy of the cache, no wait for the device, and the
bytes that its stock composition reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dak_inductor.attention_function import attend, note_bounds
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.lowering import device_counters

B, HQ, HKV, S, D = 2, 8, 2, 16384, 128


def tiered(remote: str, label: str, *, share: float = 0.5):
    """A cache [B, HKV, S, D] that lies token by token, `share` of it local."""
    nbytes = B * HKV * S * D * 2
    buffer = open_tier(remote, device=torch.device("cuda", 0)).allocate(
        nbytes, split=int(nbytes * share) // 256 * 256
    )
    buffer.label = label
    strides = (HKV * D, D, B * HKV * D, 1)
    tensor = buffer.tensor(torch.bfloat16, (B, HKV, S, D), strides)
    tensor.copy_(torch.randn(B, HKV, S, D, device="cuda", dtype=torch.bfloat16))
    return buffer, tensor


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def exact(query, key, value, seen) -> torch.Tensor:
    scores = query.float() @ key.float().repeat_interleave(HQ // HKV, 1).mT * D**-0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num()
    return weights @ value.float().repeat_interleave(HQ // HKV, 1)


def seen_by(rows: int, lengths: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    token = torch.arange(S, device="cuda")
    row = torch.arange(rows, device="cuda")[:, None]
    last = lengths.view(-1, 1, 1, 1) - rows + row
    return (token <= last) & (token >= starts.view(-1, 1, 1, 1))


@pytest.mark.parametrize("rows", [1, 5])
def test_the_stock_composition_waits_for_nothing_and_counts_what_it_reads(remote, rows):
    (key_buffer, key), (value_buffer, value) = tiered(remote, "keys"), tiered(remote, "values")
    query, lengths, starts = half(B, HQ, rows, D), int32(S, 700), int32(3, 0)
    bias = torch.zeros(B, HQ, rows, S, device="cuda", dtype=torch.bfloat16)  # no kernel takes it
    call = torch.ops.dak.attention.default
    arguments = (query, key, value, lengths, starts, bias, D**-0.5, True, 0, 0.0)
    call(*arguments)
    torch.cuda.synchronize()  # what is in flight at a reset counts after it
    device_counters.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = exact(query, key, value, seen_by(rows, lengths, starts))
    torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=2e-2)
    assert result.stride() == torch.empty(B, rows, HQ, D).transpose(1, 2).stride()
    counted = {buffer.label: count for buffer, count in device_counters.read()}
    for buffer in (key_buffer, value_buffer):
        count = counted[buffer.label]
        assert count.calls == 1
        assert (count.local_bytes, count.remote_bytes) == (
            buffer.bytes_by_tier().local,
            buffer.bytes_by_tier().remote,
        )


@pytest.mark.filterwarnings("ignore:backend=.dak. compiles a model")
@pytest.mark.parametrize("spelling", ["attention function", "sdpa", "manual"])
def test_a_compiled_step_takes_no_memory_of_cache_size(remote, spelling):
    (_, key), (_, value) = tiered(remote, "keys"), tiered(remote, "values")
    lengths, starts = int32(999, 999), int32(0, 40)
    for tensor in (key, value, lengths, starts):
        torch._dynamo.mark_static_address(tensor)
    note_bounds(key, lengths=lengths, starts=starts)
    seen = torch.zeros(B, 1, 1, S, dtype=torch.bool, device="cuda")
    seen[0, ..., :1000] = True
    seen[1, ..., 40:1000] = True
    module = torch.nn.Module()

    def step(query, new, position):
        key.index_copy_(2, position, new)
        value.index_copy_(2, position, new * 2)
        if spelling == "attention function":
            lengths.add_(1)
            return attend(module, query, key, value, None)[0]
        if spelling == "sdpa":
            result = F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
        else:
            spread = [x[:, :, None].expand(B, HKV, HQ // HKV, S, D) for x in (key, value)]
            k, v = (x.reshape(B, HQ, S, D) for x in spread)
            scores = (query @ k.mT * D**-0.5).masked_fill(~seen, float("-inf"))
            result = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ v
        return result.transpose(1, 2)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="dak", fullgraph=True)
    query, new = half(B, HQ, 1, D), half(B, HKV, 1, D)
    position = torch.tensor([999], device="cuda")
    with torch.no_grad():
        compiled(query, new, position)  # compiles
        lengths.fill_(999)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = compiled(query, new, position)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < key.nbytes // 2
    assert torch.equal(key[:, :, 999], new[:, :, 0])
    expected = exact(query, key, value, seen).transpose(1, 2)
    torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_captured_step_follows_lengths_and_moves(remote):
    (buffer, key), (_, value) = tiered(remote, "keys"), tiered(remote, "values")
    query, lengths, starts = half(B, HQ, 1, D), int32(S, S), int32(0, 0)
    arguments = (query, key, value, lengths, starts, None, D**-0.5, True, 0, 0.0)
    call = torch.ops.dak.attention.default
    for _ in range(2):
        call(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*arguments)
    for step, bounds in enumerate(((S, 5), (1, 3000), (0, 700))):
        lengths.copy_(int32(*bounds))
        starts.copy_(int32(0, step))
        if step == 2:
            torch.cuda.synchronize()
            buffer.move(buffer.nbytes // 4)
        graph.replay()
        expected = exact(query, key, value, seen_by(1, lengths, starts))
        torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=2e-2)

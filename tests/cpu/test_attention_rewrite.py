"""Attention over a cache becomes dak::attention: which spellings, what they read, what is refused,
and that the compiled step makes no copy of the cache."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dak_inductor import templates
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.lowering import counters, op_facts
from dak_inductor.normalise import normalise
from dak_inductor.op_table import build_op_table
from dak_inductor.rewrite import rewrite
from dak_inductor.template_report import templates_of
from dak_inductor.templates import with_templates

B, HQ, HKV, S, D = 2, 6, 2, 32, 16
GROUP = HQ // HKV


@pytest.fixture(autouse=True)
def _no_counts():
    counters.reset()
    yield
    counters.reset()


def tiered(label: str, order: str = "tokens", *, share: float = 0.25):
    """A cache [B, HKV, S, D] in a simulated buffer, `share` of it local."""
    nbytes = B * HKV * S * D * 4
    buffer = SimulatedTier(page_bytes=256).allocate(nbytes, split=int(nbytes * share))
    buffer.label = label
    strides = {"tokens": (HKV * D, D, B * HKV * D, 1), "heads": (HKV * S * D, S * D, D, 1)}[order]
    tensor = buffer.tensor(torch.float32, (B, HKV, S, D), strides)
    tensor.copy_(torch.randn(B, HKV, S, D))
    return buffer, tensor


class Recorder:
    """A backend that rewrites and runs the rewritten graph."""

    def __call__(self, graph_module, _):
        graph = normalise(graph_module)
        self.table = build_op_table(graph)
        self.graph = rewrite(graph, self.table)
        return self.graph.forward

    @property
    def targets(self) -> list[str]:
        return [str(node.target) for node in self.graph.graph.nodes if node.op == "call_function"]

    @property
    def reasons(self) -> str:
        return " | ".join(refusal.reason for refusal in self.table.refusals)


def run(function, *args):
    recorder = Recorder()
    torch._dynamo.reset()
    with torch.no_grad():
        return recorder, torch.compile(function, backend=recorder, fullgraph=True)(*args)


def repeated(x, how="expand"):
    if how == "interleave":
        return x.repeat_interleave(GROUP, dim=1)
    batch, heads, tokens, depth = x.shape
    spread = x[:, :, None, :, :].expand(batch, heads, GROUP, tokens, depth)
    return spread.reshape(batch, heads * GROUP, tokens, depth)


def grouped(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def scaled_with_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)


def bool_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask > 0, enable_gqa=True)


def repeated_heads(q, k, v, mask):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)


def interleaved_heads(q, k, v, mask):
    k, v = repeated(k, "interleave").contiguous(), repeated(v, "interleave").to(torch.float32)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def manual(q, k, v, mask):
    weights = q @ repeated(k).transpose(2, 3) * D**-0.5 + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=0.1, training=False) @ repeated(v)


def manual_divided(q, k, v, mask):
    weights = torch.matmul(q, repeated(k).permute(0, 1, 3, 2)) / math.sqrt(D)
    return torch.softmax(weights.float(), -1).type_as(q) @ repeated(v)


def manual_matrix_transpose(q, k, v, mask):
    return torch.softmax(q @ repeated(k).mT * D**-0.5, -1) @ repeated(v)


def manual_filled(q, k, v, mask):
    weights = (q * D**-0.5) @ repeated(k).transpose(-1, -2)
    return F.softmax(weights.masked_fill(mask > 0, float("-inf")), dim=-1) @ repeated(v)


def manual_capped(q, k, v, mask):
    weights = q @ repeated(k).transpose(2, 3) * 0.7
    weights = torch.tanh(weights / 5.0) * 5.0 + mask
    return F.softmax(weights, dim=-1) @ repeated(v)


def manual_capped_by_a_negative_number(q, k, v, mask):
    weights = torch.tanh(q @ repeated(k).transpose(2, 3) / -5.0) * -5.0
    return F.softmax(weights, dim=-1) @ repeated(v)


SPELLINGS = (
    grouped, scaled_with_mask, bool_mask, repeated_heads, interleaved_heads, causal, manual,
    manual_divided, manual_matrix_transpose, manual_filled, manual_capped,
    manual_capped_by_a_negative_number,
)  # fmt: skip


def index_copy(cache, position, new):
    cache.index_copy_(2, position, new)


def index_put(cache, position, new):
    cache[:, :, position] = new


def slice_copy(cache, position, new):
    cache[:, :, 3 : 3 + new.shape[2]] = new


UPDATES = (index_copy, index_put, slice_copy)


def step_of(update, spelling):
    def step(q, k, v, position, new_k, new_v, mask):
        update(k, position, new_k)
        update(v, position, new_v)
        return spelling(q, k, v, mask).transpose(1, 2).reshape(B, -1, HQ * D)

    return step


def operands(rows: int, spelling=None):
    tokens = rows if rows == S else 2
    mask = torch.randn(B, 1, rows, S)
    mask[..., 0] = -1.0  # never hidden, however the mask is used
    if spelling is bool_mask:
        mask = mask.neg()
    q = torch.randn(B, HQ, rows, D)
    return q, torch.arange(3, 5), torch.randn(B, HKV, tokens, D)[:, :, :2], mask


@pytest.mark.parametrize("order", ["tokens", "heads"])
@pytest.mark.parametrize("rows", [1, 5, S])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_is_one_call_that_reads_each_byte_of_the_cache_once(spelling, rows, order):
    q, position, new, mask = operands(rows, spelling)
    (k_buffer, k), (v_buffer, v) = tiered("keys", order), tiered("values", order, share=0.5)
    plain_k, plain_v = k.clone(), v.clone()
    step = step_of(index_copy, spelling)
    expected = step(q, plain_k, plain_v, position, new, new * 2, mask)
    recorder, result = run(step, q, k, v, position, new, new * 2, mask)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, plain_k, rtol=0, atol=0)
    names = recorder.targets
    assert names.count("dak.attention.default") == 1
    leftovers = ("softmax", "matmul", "dropout", "expand", "repeat", "scaled_dot", "tanh")
    assert not [name for name in names if any(word in name for word in leftovers)]
    assert not recorder.table.refusals
    assert {(op.kind, op.rewrite) for op in recorder.table.ops} == {("attention", True)}
    tokens = rows if spelling is causal else S  # later tokens are hidden from all queries
    reads = {read.tensor: read for read in counters.snapshot()}
    for buffer in (k_buffer, v_buffer):
        read = reads[buffer.label]
        assert (read.kind, read.calls) == ("attention", 1)
        assert read.bytes.total == B * HKV * tokens * D * 4
        if tokens == S:
            assert read.bytes == buffer.bytes_by_tier()
    assert sum(op.touched for op in recorder.table.ops) == 2 * B * HKV * tokens * D * 4
    seen = rows * (rows + 1) // 2 if spelling is causal else rows * tokens  # pairs
    assert sum(op.flops for op in recorder.table.ops) == 4 * B * HQ * seen * D


def test_a_registered_buffer_and_a_static_input_are_caches_too():
    class Layer(torch.nn.Module):
        def __init__(self, k, v):
            super().__init__()
            self.register_buffer("k", k)
            self.register_buffer("v", v)

        def forward(self, q):
            return grouped(q, self.k, self.v, None)

    (_, k), (_, v) = tiered("keys"), tiered("values")
    q = torch.randn(B, HQ, 1, D)
    recorder, _ = run(Layer(k, v), q)
    assert "dak.attention.default" in recorder.targets
    torch._dynamo.mark_static_address(k)
    torch._dynamo.mark_static_address(v)
    recorder, _ = run(lambda q, k, v: grouped(q, k, v, None), q, k, v)
    assert "dak.attention.default" in recorder.targets


def test_a_view_of_the_result_survives_its_other_strides():
    (_, k), (_, v) = tiered("keys"), tiered("values")

    def step(q, k, v, position, new):
        k.index_copy_(2, position, new)
        v.index_copy_(2, position, new)
        return grouped(q, k, v, None).view(B * HQ, 5, D)[1:].view(-1)

    q, position, new, _ = operands(5)
    expected = step(q, k.clone(), v.clone(), position, new)
    recorder, result = run(step, q, k, v, position, new)
    assert "dak.attention.default" in recorder.targets
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def dropped(q, k, v, mask):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), dropout_p=0.5)


def converted(q, k, v, mask):
    return F.scaled_dot_product_attention(q.double(), repeated(k).double(), repeated(v).double())


def weights_used(q, k, v, mask):
    weights = F.softmax(q @ repeated(k).transpose(2, 3), dim=-1)
    return weights @ repeated(v) + weights.sum()


def written_between(q, k, v, mask):
    weights = F.softmax(q @ repeated(k).transpose(2, 3), dim=-1)
    k.mul_(2.0)
    return weights @ repeated(v)


def written_after_repeats(q, k, v, mask):
    keys, values = repeated(k), repeated(v)
    v.mul_(2.0)
    return F.scaled_dot_product_attention(q, keys, values)


def written_after_a_copy(q, k, v, mask):
    keys = k.contiguous()
    k.mul_(2.0)
    return F.scaled_dot_product_attention(q, keys, v, enable_gqa=True)


def written_before_the_products(q, k, v, mask):
    keys = repeated(k)
    k.mul_(2.0)
    return F.softmax(q @ keys.transpose(2, 3), dim=-1) @ repeated(v)


def filled_with_a_score(q, k, v, mask):
    weights = q @ repeated(k).transpose(2, 3)
    return F.softmax(weights.masked_fill(mask > 0, -3.0), dim=-1) @ repeated(v)


def rows_filled_with_a_low_score(q, k, v, mask):
    weights = q @ repeated(k).transpose(2, 3)
    return F.softmax(weights.masked_fill(mask > -99, -1e4), dim=-1) @ repeated(v)


def result_written_through_a_view(q, k, v, mask):
    result = grouped(q, k, v, mask)
    result.view(B, -1).mul_(2.0)
    return result + 1


def masked_before_the_scale(q, k, v, mask):
    weights = (q @ repeated(k).transpose(2, 3) + mask) * 0.5
    return F.softmax(weights, dim=-1) @ repeated(v)


def other_cap(q, k, v, mask):
    weights = torch.tanh(q @ repeated(k).transpose(2, 3) * 0.5) * 5.0
    return F.softmax(weights, dim=-1) @ repeated(v)


def computed_values(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v * 2, enable_gqa=True)


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (dropped, "attention with dropout of 0.5"),
        (converted, "keys are copied or converted before attention"),
        (weights_used, "the attention weights are used elsewhere"),
        (written_between, "keys or values are written between the two products"),
        (written_after_repeats, "written after they were copied for attention"),
        (written_after_a_copy, "written after they were copied for attention"),
        (written_before_the_products, "written after they were copied for attention"),
        (filled_with_a_score, "scores are replaced by -3.0"),
        (rows_filled_with_a_low_score, "scores are replaced by -10000.0"),
        (result_written_through_a_view, "the result is written in place, and has views"),
        (masked_before_the_scale, "between the attention scores and their softmax is not known"),
        (other_cap, "a tanh of the attention scores that is no softcap"),
        (computed_values, "the other is computed in the graph"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_rewritten_says_why_reads_the_cache_and_gives_the_same(spelling, reason):
    q, position, new, mask = operands(3)
    (_, k), (_, v) = tiered("keys"), tiered("values")
    plain_k, plain_v = k.clone(), v.clone()
    step = step_of(index_copy, spelling)
    torch.manual_seed(1)
    expected = step(q, plain_k, plain_v, position, new, new, mask)
    torch.manual_seed(1)
    recorder, result = run(step, q, k, v, position, new, new, mask)
    if spelling is not dropped:  # its random numbers are drawn in another order when compiled
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert "dak.attention.default" not in recorder.targets
    assert reason in recorder.reasons
    cached = [op for op in recorder.table.ops if op.kind == "attention"]
    assert cached
    assert not any(op.rewrite for op in cached)
    assert sum(op.touched for op in cached) >= B * HKV * S * D * 4


def test_activations_are_no_cache():
    q, k, v = (torch.randn(B, h, S, D) for h in (HQ, HKV, HKV))
    recorder, _ = run(lambda q, k, v: grouped(q, k, v, None), q, k, v)
    assert "dak.attention.default" not in recorder.targets
    assert "neither updates nor knows as static" in recorder.reasons
    recorder, _ = run(lambda q, k, v: grouped(q, k * 2, v * 2, None), q, k, v)
    assert "there is no cache to tier" in recorder.reasons
    router = torch.randn(B, 8, 4)
    recorder, _ = run(lambda x, w: F.softmax(x @ w, -1) @ w.mT, torch.randn(B, 3, 8), router)
    assert not any("attention" in refusal.reason for refusal in recorder.table.refusals)


@pytest.mark.filterwarnings("ignore:backend=.dak. compiles a model")
@pytest.mark.parametrize("order", ["tokens", "heads"])
@pytest.mark.parametrize("update", UPDATES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spelling", [repeated_heads, manual], ids=lambda f: f.__name__)
def test_the_compiled_step_reads_the_cache_in_place_and_copies_none_of_it(spelling, update, order):
    q, position, new, mask = operands(1)
    (k_buffer, k), (v_buffer, v) = tiered("keys", order), tiered("values", order)
    plain_k, plain_v = k.clone(), v.clone()
    step = step_of(update, spelling)
    expected = step(q, plain_k, plain_v, position, new, new * 2, mask)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="dak", fullgraph=True)
    with torch.no_grad():
        result, (code,) = run_and_get_code(compiled, q, k, v, position, new, new * 2, mask)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, plain_k, rtol=0, atol=0)
    torch.testing.assert_close(v, plain_v, rtol=0, atol=0)
    (called,) = re.findall(r"= torch\.ops\.dak\.attention\.default\((\w+), (\w+), (\w+),", code)
    assert all(re.fullmatch(r"arg\d+_1", name) for name in called[1:]), "the inputs themselves"
    sizes = [
        math.prod(int(size) for size in found.split(",") if size.strip())
        for found in re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code)
    ]
    assert max(sizes, default=0) < k.numel()
    # what Inductor generates is benchmarked on what it writes to, and would copy all of the cache
    own = order == "tokens" and update is not slice_copy
    written = re.findall(r"torch\.ops\.dak\.write_tokens\.default\((\w+),", code)
    assert sorted(written) == (sorted(called[1:]) if own else [])
    reads = {read.tensor: read.bytes for read in counters.snapshot() if read.kind == "attention"}
    assert reads == {b.label: b.bytes_by_tier() for b in (k_buffer, v_buffer)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_models_of_transformers_read_a_static_cache_in_two_tiers(family, implementation):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HQ, num_key_value_heads=HKV, head_dim=D, max_position_embeddings=S,
        sliding_window=S,
    )  # fmt: skip
    config.layer_types = ["full_attention"] * 2
    config._attn_implementation = implementation
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    caches = []
    for _ in range(2):
        cache = transformers.StaticCache(config=config, max_cache_len=S)
        cache.early_initialization(
            batch_size=B, num_heads=HKV, head_dim=D, dtype=torch.float32, device="cpu"
        )
        caches.append(cache)
    buffers = {}
    for number, layer in enumerate(caches[1].layers):
        for name in ("keys", "values"):
            buffers[f"{name}{number}"], tensor = tiered(f"{name}{number}")
            tensor.zero_()
            torch._dynamo.mark_static_address(tensor)
            setattr(layer, name, tensor)
    ids = torch.randint(61, (B, 6))
    recorder = Recorder()
    compiled = torch.compile(model.forward, backend=recorder, fullgraph=True)
    with torch.no_grad():
        for tokens in (ids[:, :5], ids[:, 5:]):
            counters.reset()
            expected = model(tokens, past_key_values=caches[0]).logits
            result = compiled(tokens, past_key_values=caches[1]).logits
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
            assert recorder.targets.count("dak.attention.default") == 2
            assert not any("softmax" in n or "scaled_dot" in n for n in recorder.targets)
            assert not any("index_copy_" in n for n in recorder.targets), "each would be a copy"
            reads = {read.tensor: read.bytes for read in counters.snapshot()}
            assert reads == {name: buffer.bytes_by_tier() for name, buffer in buffers.items()}
    for expected, result in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(result.keys, expected.keys, rtol=1e-4, atol=1e-5)


@pytest.fixture
def gpu(monkeypatch):
    """Sets what the machine has; its GPU holds every tensor."""

    def install(capability, *, extension=True, triton=True):
        monkeypatch.setattr(templates, "on_cuda", lambda value: True)
        monkeypatch.setattr(op_facts, "visible_capability", lambda device: capability)
        monkeypatch.setattr(op_facts, "extension_importable", lambda: extension)
        monkeypatch.setattr(op_facts, "triton_importable", lambda: triton)

    return install


def choice_of(spelling, *, rows=1, dtype=torch.bfloat16, depth=128, order="tokens"):
    def step(q, k, v, new, position, mask):
        k.index_copy_(2, position, new)
        v.index_copy_(2, position, new)
        return spelling(q, k, v, mask)

    with FakeTensorMode():
        q = torch.empty(B, HQ, rows, depth, dtype=dtype)
        k, v = (torch.empty(S, B, HKV, depth, dtype=dtype).permute(1, 2, 0, 3) for _ in range(2))
        if order == "spread":
            k, v = (torch.empty(S, 2 * B, HKV, depth, dtype=dtype)[:, :B] for _ in range(2))
            k, v = (x.permute(1, 2, 0, 3) for x in (k, v))
        if order == "columns":
            k, v = (torch.empty(B, HKV, depth, S, dtype=dtype).mT for _ in range(2))
        new = torch.empty(B, HKV, 1, depth, dtype=dtype)
        mask = torch.empty(B, 1, rows, S, dtype=dtype)
        graph = make_fx(step, pre_dispatch=True)(
            q, k, v, new, torch.empty(1, dtype=torch.long), mask
        )
    table = build_op_table(graph)
    table = with_templates(rewrite(graph, table), table)
    (report,) = templates_of("g", table)
    assert report.kind == "attention"
    assert all(op.counts_itself == (op.template != "stock") for op in table.ops)
    return report


@pytest.mark.parametrize(
    ("capability", "installed", "options", "template", "reasons"),
    [
        ((9, 0), {}, {}, "cuda", ""),
        ((9, 0), {}, {"rows": 32, "dtype": torch.float16}, "cuda", ""),
        ((8, 0), {}, {}, "triton", "not cuda: it is written for Hopper .* this GPU has 8.0"),
        ((9, 0), {"extension": False}, {}, "triton", "extension of dak_inductor cannot be loaded"),
        ((9, 0), {}, {"dtype": torch.float32}, "triton", "keys are float32"),
        ((9, 0), {}, {"depth": 48}, "triton", "64, 80, 96, 128, 192, 256; this is 48"),
        ((9, 0), {}, {"depth": 512}, "stock", "not triton: .* at most 256; this is 512"),
        ((9, 0), {}, {"order": "columns"}, "stock", "elements of a head .* are not adjacent"),
        ((9, 0), {}, {"order": "spread"}, "cuda", ""),
        ((8, 0), {}, {"order": "spread"}, "stock", "neither token by token nor head by head"),
        ((9, 0), {}, {"order": "spread", "rows": 17}, "stock", "more than 16 queries are staged"),
        ((7, 5), {}, {}, "stock", "not triton: it needs compute capability 8.0"),
        ((8, 0), {"triton": False}, {}, "stock", "not triton: triton is not installed"),
    ],
)
def test_what_serves_attention_is_shown_with_the_reasons(
    gpu, capability, installed, options, template, reasons
):
    gpu(capability, **installed)
    report = choice_of(grouped, **options)
    assert report.template == template
    assert re.search(reasons, report.reasons, re.DOTALL)
    assert bool(report.passed_over) == (template != "cuda")


def test_a_dense_mask_goes_to_the_stock_kernels(gpu):
    gpu((9, 0))
    report = choice_of(scaled_with_mask)
    assert report.template == "stock"
    assert report.reasons.count("a float mask besides lengths") == 2

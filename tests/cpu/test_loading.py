"""`loading` around transformers' own from_pretrained (local folders) and around plain torch."""

import gc

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.errors import BudgetError, CheckpointError, HostMemoryError, ModelError
from dak_inductor.loading import loading
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import offloaded_models, record_of
from dak_inductor.offloaded_model import find_resident_copies
from dak_inductor.restore import restore

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = (LlamaForCausalLM, LlamaConfig(**SMALL))
GPT2 = (
    GPT2LMHeadModel,
    GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        vocab_size=500,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
)
MIXTRAL = (MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=4))


def saved(folder, kind, config, **how):
    model = kind(config).eval()
    model.save_pretrained(folder, **how)
    ids = torch.randint(0, 500, (2, 7))
    return ids, model(ids).logits.detach()


def weights_named(model, name):
    """Those that have the name among theirs."""
    return [weight for weight in record_of(model).weights.values() if name in weight.names]


@pytest.mark.parametrize(
    ("kind", "config"), [LLAMA, GPT2, MIXTRAL], ids=["llama", "gpt2-tied", "mixtral-converted"]
)
def test_from_pretrained_streams_into_the_tiers(tmp_path, kind, config, capsys):
    ids, expected = saved(tmp_path, kind, config)
    capsys.readouterr()
    with loading(offload_ratio=0.5, remote="simulated"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    record = record_of(model)
    held = record.bytes_by_tier()
    assert abs(held.remote - held.total // 2) <= 256
    assert record.physical_bytes() == record.tier.counters.held
    assert find_resident_copies(record) == []
    assert record.label == kind.__name__
    assert f"dak: {kind.__name__}" in capsys.readouterr().out
    assert torch.equal(model(ids).logits, expected)
    assert not any(p.requires_grad for p in model.parameters())
    assert record.plan.sizes == {w.name: w.buffer.nbytes for w in record.weights.values()}
    restore(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, expected)


def test_ties_survive(tmp_path):
    saved(tmp_path, *GPT2)
    with loading(offload_ratio=0.5, remote="simulated"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    (weight,) = weights_named(model, "lm_head.weight")
    assert weights_named(model, "transformer.wte.weight") == [weight]
    assert weight.buffer.bytes_by_tier().total == 500 * 64 * 4


def test_each_tensor_is_tiered_as_it_arrives(tmp_path, monkeypatch):
    saved(tmp_path, *LLAMA)
    tier = SimulatedTier()
    monkeypatch.setattr(OffloadRequest, "open_tier", lambda self, device: tier)
    with loading(offload_ratio=0.5, remote="simulated"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        held = tier.counters.held.total
        assert address_table.lookup(model.model.layers[0].mlp.up_proj.weight.data_ptr())
        assert record_of(model) is None
    assert record_of(model).physical_bytes().total == held


def test_another_dtype_and_sharded_files(tmp_path):
    ids, _ = saved(tmp_path, *LLAMA, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with loading(offload_ratio=0.4, remote="simulated"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and record_of(model).bytes_by_tier().remote > 0
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_budget_holds_at_every_moment(tmp_path):
    saved(tmp_path, *LLAMA)
    with loading(gpu_memory=200_000, remote="simulated"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    record = record_of(model)
    assert record.tier.counters.peak_local_bytes + record.resident_bytes <= 200_000
    assert record.bytes_by_tier().remote > 300_000


def test_a_missing_weight_is_initialised_by_transformers_and_then_tiered(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tmp_path, *LLAMA)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with loading(offload_ratio=0.5, remote="simulated"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    weight = model.lm_head.weight
    assert weights_named(model, "lm_head.weight")
    assert 0 < weight.std() < 1 and weight.isfinite().all()


def test_several_models_are_each_handled(tmp_path):
    saved(tmp_path / "one", *LLAMA)
    saved(tmp_path / "two", *GPT2)
    with loading(gpu_memory=500_000, remote="simulated"):
        one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
        two = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
        built = nn.Linear(64, 64)
    records = [record_of(model) for model in (one, two, built)]
    assert all(record is not None for record in records)
    pages = sum(record.physical_bytes().local + record.resident_bytes for record in records)
    assert pages <= 500_000
    assert len({id(record.budget) for record in records}) == 1
    shares = [record.bytes_by_tier().remote_share for record in records[:2]]
    assert all(0.3 < share < 0.9 for share in shares)


def test_plain_torch_on_meta_with_assign():
    source = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with loading(offload_ratio=0.5, remote="simulated"):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), source(x))
    assert record_of(model).bytes_by_tier().remote == 16_384


def test_nothing_loaded_is_an_error():
    existing = nn.Linear(64, 64)
    with (
        pytest.raises(ModelError, match="no model was loaded"),
        loading(offload_ratio=0.5, remote="simulated"),
    ):
        existing.eval()


def test_a_load_that_stays_incomplete_is_undone():
    with (
        pytest.raises(CheckpointError, match="still on meta"),
        loading(offload_ratio=0.5, remote="simulated"),
    ):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model.load_state_dict({"0.weight": torch.zeros(64, 64)}, assign=True, strict=False)
    assert model[0].weight.device.type == "meta" and record_of(model) is None


@pytest.mark.parametrize("after", [0, 5])
def test_a_failure_on_the_way_is_undone(tmp_path, monkeypatch, after):
    saved(tmp_path, *LLAMA)
    tier = SimulatedTier()
    tier.inject_failure("allocate", after=after)
    monkeypatch.setattr(OffloadRequest, "open_tier", lambda self, device: tier)
    hooks = dict(nn.modules.module._global_parameter_registration_hooks)
    with (
        pytest.raises(HostMemoryError, match="injected") as caught,
        loading(offload_ratio=0.5, remote="simulated"),
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dict(nn.modules.module._global_parameter_registration_hooks) == hooks
    del caught
    gc.collect()
    assert tier.counters.held.total == 0 and offloaded_models() == []


def test_an_error_of_the_users_own_passes_through(tmp_path):
    saved(tmp_path, *LLAMA)
    with pytest.raises(ZeroDivisionError), loading(offload_ratio=0.5, remote="simulated"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        1 / 0  # noqa: B018
    assert model.lm_head.weight.device.type == "meta" and offloaded_models() == []


def test_a_budget_too_small_is_said_before_anything_is_read(tmp_path):
    saved(tmp_path, *LLAMA)
    before = set(map(id, address_table.live_buffers()))  # of other tests
    with (
        pytest.raises(BudgetError, match="too small"),
        loading(gpu_memory=50_000, remote="simulated", placement={"lm_head": "gpu"}),
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(map(id, address_table.live_buffers())) <= before

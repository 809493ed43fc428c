"""`dak plan` without the command line: presets, memory arithmetic, graphs to plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor import hardware, plan_command
from dak_inductor.config_model import build_model, kv_cache_bytes
from dak_inductor.cost_model import PRODUCTS
from dak_inductor.errors import BudgetError, DakError, OptionError
from dak_inductor.plan import OpUse
from dak_inductor.plan_command import MemoryNeeds, PlanRequest, plan_model
from dak_inductor.presets import PRESETS, read_config

H200 = hardware.load("h200")
REQUEST = PlanRequest("toy", "h200", "cpu", None, batch=2, prompt=16, new=4)


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(1024, 4096, bias=True)  # 16 MiB
        self.down = torch.nn.Linear(4096, 1024, bias=False)
        self.tied = torch.nn.Linear(4096, 1024, bias=False)
        self.tied.weight = self.down.weight


@pytest.fixture
def toy() -> torch.nn.Module:
    with torch.device("meta"):
        return Toy()


def uses(names: dict[str, str]) -> list[OpUse]:
    size = 4096 * 1024 * 4
    return [
        OpUse("up", graph, names["up.weight"], "linear", size, 1e6, 1e6, 1.0, "float32")
        for graph in ("prefill", "decode")
    ]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8.03e9),
        ("llama-3-70b", 70.6e9),
        ("qwen2.5-14b", 14.8e9),
        ("qwen3-8b", 8.19e9),
        ("mistral-7b", 7.25e9),
        ("mixtral-8x7b", 46.7e9),
        ("opt-30b", 29.97e9),
        ("gpt2", 124e6),
        ("bert-large", 335e6),
        ("vit-huge", 632e6),
    ],
)
def test_presets_have_as_many_parameters_as_the_models(name: str, parameters: float) -> None:
    model = build_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(parameters, rel=0.01)
    dtype = getattr(torch, PRESETS[name]["dtype"])
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.is_meta for p in model.parameters())


def test_an_unknown_model_is_refused_with_a_suggestion() -> None:
    with pytest.raises(OptionError, match="did you mean 'llama-3-8b'"):
        read_config("llama-3-8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"model_type": 3}',
        '{"model_type": "llama", "quantization_config": {"a": 1}}',
    ],
)
def test_files_that_are_no_plain_config_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OptionError, match=r"config\.json"):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"model_type": "no_such_model"}, {"dtype": "int3"}, {"num_attention_heads": "many"}],
)
def test_configs_that_cannot_be_built_are_named_errors(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, **change}))
    with pytest.raises(DakError):
        build_model(str(path))


def test_memory_arithmetic() -> None:
    memory = MemoryNeeds(budget=1000, planned=900, kept_whole=50, kv_cache=100, activations=60,
                         context=40)  # fmt: skip
    assert memory.remote_bytes == 900 - (1000 - 250)
    assert MemoryNeeds(2000, 900, 50, 100, 60, 40).remote_bytes == 0
    with pytest.raises(BudgetError, match=r"by 50 bytes"):
        _ = MemoryNeeds(200, 900, 50, 100, 60, 40).remote_bytes


def test_tied_weights_are_one_tensor_of_the_plan(toy: torch.nn.Module) -> None:
    names = plan_command.entry_names(toy)
    assert names["down.weight"] == names["tied.weight"] == "down.weight"
    assert "up.bias" not in names  # too small to divide


def test_what_does_not_fit_is_planned_remote(toy: torch.nn.Module) -> None:
    planned, bias = 2 * 4096 * 1024 * 4, 4096 * 4
    names = plan_command.entry_names(toy)
    budget = plan_command.CONTEXT_BYTES + 20_000_000
    answer = plan_model(REQUEST, toy, uses(names), [], budget, H200)
    assert answer.memory.planned == planned
    assert answer.memory.kept_whole == bias
    assert answer.memory.activations == 2_000_000
    expected = planned - (20_000_000 - bias - 2_000_000)
    assert answer.plan.asked_bytes == expected
    assert expected <= answer.plan.remote_bytes < expected + 1024
    assert answer.plan.splits["down.weight"] > 15_000_000  # no graph reads it
    assert answer.ttft == answer.plan.step_times["prefill"]
    assert answer.tpot == answer.plan.step_times["decode"]
    assert answer.remote_memory >= answer.plan.remote_bytes
    record = json.loads(answer.to_json())
    assert record["memory"]["remote"] == answer.plan.remote_bytes
    assert record["request"]["batch"] == 2


def test_all_resident_says_so(toy: torch.nn.Module) -> None:
    names = plan_command.entry_names(toy)
    answer = plan_model(REQUEST, toy, uses(names), [], H200.memory_bytes, H200)
    assert answer.plan.remote_bytes == 0
    assert "nothing has to be offloaded" in answer.closing()


def test_too_small_a_budget_is_refused(toy: torch.nn.Module) -> None:
    with pytest.raises(BudgetError, match="context"):
        plan_model(REQUEST, toy, [], [], 1_000_000, H200)


def config(**values: Any) -> SimpleNamespace:
    text = SimpleNamespace(
        **{"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64, **values}
    )
    return SimpleNamespace(get_text_config=lambda: text)


def test_kv_cache_bytes() -> None:
    sizes = {"batch": 3, "length": 10, "itemsize": 2}
    assert kv_cache_bytes(config(), **sizes) == 2 * 4 * 3 * 10 * 64 * 2
    assert kv_cache_bytes(config(num_key_value_heads=2), **sizes) == 2 * 4 * 3 * 10 * 16 * 2
    assert kv_cache_bytes(config(head_dim=32), **sizes) == 2 * 4 * 3 * 10 * 8 * 32 * 2
    kinds = ["sliding_attention", "full_attention"] * 2
    sliding = config(layer_types=kinds, sliding_window=4)
    assert kv_cache_bytes(sliding, **sizes) == 2 * 3 * (2 * 4 + 2 * 10) * 64 * 2
    assert kv_cache_bytes(None, **sizes) == 0


def test_graphs_of_a_small_llama_are_captured_and_planned(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 512,
                "intermediate_size": 4096,
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "vocab_size": 4096,
                "dtype": "bfloat16",
            }
        )
    )
    heard: list[str] = []
    request = PlanRequest(str(path), "h200", "cpu", "612MB", batch=2, prompt=16, new=4)
    answer = plan_command.answer(request, heard.append)
    assert len(heard) == 3
    plan = answer.plan
    assert set(plan.step_times) == {"prefill", "decode"}
    products = [op for op in plan.ops if op.graph == "decode" and op.kind in PRODUCTS]
    assert len(products) == 2 * 7 + 1
    assert {op.calls for op in plan.ops if op.graph == "decode"} == {3.0}
    attention = [op for op in plan.ops if op.kind == "attention"]
    assert attention and all(op.tensor == "" and op.local_bytes > 0 for op in attention)
    held = answer.memory.kept_whole + answer.memory.kv_cache + answer.memory.activations
    local = plan.total_bytes - plan.remote_bytes
    assert held + local + answer.memory.context <= 612_000_000
    assert plan.remote_bytes > 0


def layers_of_bf16() -> tuple[torch.nn.Module, list[OpUse]]:
    """24 products of a prefill of few tokens, whose rows may be copied ahead."""
    with torch.device("meta"):
        linears = [torch.nn.Linear(4096, 4096, bias=False) for _ in range(24)]
        model = torch.nn.Sequential(*linears).bfloat16()
    size = 4096 * 4096 * 2
    return model, [
        OpUse(f"op{i}", graph, f"{i}.weight", "linear", size, 1e5, 1e8, 1.0, "bfloat16", m=1)
        for graph in ("prefill", "decode")
        for i in range(24)
    ]


@pytest.mark.parametrize(
    ("capability", "copies"), [("9.0", True), ("", True), ("12.0", False), ("8.0", False)]
)
def test_copies_ahead_are_counted_on_where_the_gpu_has_them(capability: str, copies: bool) -> None:
    """As `dak.offload` places a model on that GPU: no other than Hopper has products for them."""
    model, uses = layers_of_bf16()
    profile = replace(H200, compute_capability=capability)
    answer = plan_model(REQUEST, model, uses, [], 1_100_000_000, profile)
    assert answer.plan.remote_bytes > 0
    assert any(op.strategy == "staged" for op in answer.plan.ops) == copies


def test_a_prediction_for_the_rtx_pro_6000_is_of_direct_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither copies nor a placement for them: the plan is that of a model without a ring."""
    rtx = hardware.load("rtx-pro-6000")
    model, uses = layers_of_bf16()
    found = plan_model(REQUEST, model, uses, [], 1_100_000_000, rtx).plan
    assert found.remote_bytes > 0 and {op.strategy for op in found.ops} == {"direct"}
    hopper = plan_model(
        REQUEST, model, uses, [], 1_100_000_000, replace(rtx, compute_capability="9.0")
    ).plan
    assert any(op.strategy == "staged" for op in hopper.ops)
    monkeypatch.setenv("DAK_STRATEGY", "direct")
    direct = plan_model(
        REQUEST, model, uses, [], 1_100_000_000, replace(rtx, compute_capability="9.0")
    ).plan
    assert direct.splits == found.splits and direct.step_times == found.step_times

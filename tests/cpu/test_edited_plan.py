"""A plan goes out as JSON, is edited, and comes back: of `dak plan`, and of `dak.explain`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import dak_inductor as dak
from dak_inductor.backend import compile_graph
from dak_inductor.cli import app
from dak_inductor.errors import PlanError
from dak_inductor.offloaded import record_of
from dak_inductor.options import BackendOptions
from dak_inductor.plan import Plan

UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
CONFIG = LlamaConfig(
    hidden_size=512, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=2, vocab_size=4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def remote_of(model: nn.Module) -> dict[str, int]:
    """Remote bytes of the tensors that have any."""
    record = record_of(model)
    assert record is not None
    buffers = {name: weight.buffer for name, weight in record.weights.items()}
    return {n: b.nbytes - b.split for n, b in buffers.items() if b.split < b.nbytes}


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_plan_of_the_command_line_is_edited_and_loaded(tmp_path: Path) -> None:
    """Planned for pages of 2 MiB; the simulated tier divides smaller tensors as well."""
    CONFIG.save_pretrained(tmp_path)
    path = tmp_path / "plan.json"
    arguments = ["--model", str(tmp_path), "--gpu-memory", "615MB", "--prompt", "16"]
    asked = CliRunner().invoke(app, ["plan", *arguments, "--out", str(path)])
    assert asked.exit_code == 0, asked.output

    def only_up(record: dict[str, Any]) -> None:
        assert record["asked_bytes"] > 0 and UP in record["splits"]
        assert "model.layers.0.self_attn.k_proj.weight" not in record["sizes"], "below a page"
        record["splits"] = dict.fromkeys(record["splits"], 0)
        record["splits"][UP] = record["sizes"][UP]
        record["asked_bytes"] = 0

    edited(path, only_up)
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()
    dak.offload(model, plan=path, remote="simulated")
    assert list(remote_of(model)) == [UP]


def test_fewer_bytes_than_are_needed_say_what_to_change(tmp_path: Path) -> None:
    model = dak.offload(nn.Linear(256, 256), offload_ratio=0.5, remote="simulated")
    path = tmp_path / "plan.json"
    path.write_text(dak.explain(model).plan.to_json())
    edited(path, lambda record: record["splits"].update(weight=0))
    with pytest.raises(PlanError, match="lower asked_bytes"):
        dak.offload(nn.Linear(256, 256), plan=path, remote="simulated")


@torch.no_grad()
def test_what_explain_gives_is_edited_and_held_by_the_backend(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    path = tmp_path / "plan.json"
    plan = dak.explain(model).plan
    path.write_text(plan.to_json())
    settings = BackendOptions(plan=str(path))
    x = torch.randn(2, 256)
    expected = model(x)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph, inputs, settings, lambda rewritten, _: rewritten.forward)

    run = torch.compile(model, backend=backend)
    for name, calls in (("0.weight", 1), ("1.weight", 15)):  # plans are due at calls 1 and 16
        splits = {each: plan.sizes[each] if each == name else 0 for each in plan.splits}
        path.write_text(replace(plan, asked_bytes=0, splits=splits).to_json())
        for _ in range(calls):
            torch.testing.assert_close(run(x), expected)
        assert remote_of(model) == {name: plan.sizes[name]}


def test_a_plan_is_fitted_to_the_tensors_of_another_tier() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    plan = dak.explain(model).plan
    fewer = {"0.weight": plan.sizes["0.weight"]}
    with pytest.raises(PlanError, match="not in the model"):
        replace(plan, splits={**plan.splits, "1.weight": 8}).fitted(plan.model, fewer)
    local = replace(plan, splits={**plan.splits, "1.weight": 0}, asked_bytes=0)
    fitted = local.fitted(plan.model, fewer)
    assert dict(fitted.sizes) == fewer
    assert Plan.from_json(fitted.to_json()) == fitted, "no operator reads what is not there"
    assert local.fitted(plan.model, plan.sizes) == local
    more = fitted.fitted(plan.model, plan.sizes)
    assert more.splits["1.weight"] == 0 and more.sizes == plan.sizes
    with pytest.raises(PlanError, match="of model"):
        fitted.fitted("Other-1", plan.sizes)

"""Measured timelines: work of the GPU by strategy and module, and what the simulated tier has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dak_inductor as dak
from dak_inductor.errors import ModelError, OptionError
from dak_inductor.lowering.marks import MARKS
from dak_inductor.trace import to_trace
from dak_inductor.trace_events import LANES, marks_of, work_of

HOST = {"pid": 70, "tid": 71}


def span(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    """An event as torch's profiler exports it."""
    place = {"pid": 0, "tid": 7} if cat in ("kernel", "gpu_memcpy", "gpu_memset") else HOST
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, **place, "args": args}


def launch(ts: float, correlation: int, cat: str = "cuda_driver") -> dict[str, Any]:
    return span(cat, "cuLaunchKernelEx", ts, 2.0, correlation=correlation)


def kernel(name: str, ts: float, dur: float, correlation: int, **more: Any) -> dict[str, Any]:
    told = {"device": 0, "stream": 7, "correlation": correlation, **more}
    return span("kernel", name, ts, dur, **told)


STEP = [
    span("user_annotation", "dak graph graph1 of Llama", 100.0, 100.0, **{"External id": 1}),
    span("user_annotation", "dak direct layers.0.q_proj", 110.0, 10.0, **{"External id": 2}),
    launch(112.0, 11),
    span("user_annotation", "dak staged layers.0.up_proj", 125.0, 50.0, **{"External id": 3}),
    span("user_annotation", "dak copy layers.1.up_proj", 130.0, 5.0, **{"External id": 4}),
    launch(140.0, 12, "cuda_runtime"),
    launch(180.0, 13, "cuda_runtime"),
    span("user_annotation", "ProfilerStep#1", 90.0, 500.0, **{"External id": 9}),
    span("user_annotation", "dak stock embed_tokens", 182.0, 10.0, **{"External id": 5}),
    span("cpu_op", "aten::embedding", 183.0, 8.0, **{"External id": 6}),
    kernel("_ZN3dak13tiered_linearILi16EEEvv", 200.0, 30.0, 11),
    kernel("nvjet_hsh_64x8", 228.0, 20.0, 12),
    kernel("triton_poi_fused_add_0", 250.0, 5.0, 13),
    kernel("indexSelectLargeIndex", 256.0, 4.0, 99, **{"External id": 6}),
    span("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 205.0, 40.0, device=0, stream=20,
         correlation=98, bytes=4096, **{"External id": 4}),
    # a replay of a graph: one launch, many kernels, no mark
    span("cuda_runtime", "cudaGraphLaunch", 400.0, 9.0, correlation=50),
    kernel("tiered_attention_decode", 420.0, 10.0, 50),
    kernel("triton_tem_fused_tiered_mm_3", 431.0, 10.0, 50),
    kernel("elementwise", 442.0, 3.0, 50),
    {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 11, "pid": 0, "tid": 7, "ts": 200.0},
]  # fmt: skip


def test_work_goes_to_the_lane_of_the_mark_around_its_launch() -> None:
    marks = marks_of(STEP)
    assert [(m.kind, m.name) for m in marks][:2] == [("graph", "graph1 of Llama"),
                                                     ("direct", "layers.0.q_proj")]  # fmt: skip
    found = [(w.lane, w.label, w.graph) for w in work_of(STEP, marks)]
    graph = "graph1 of Llama"
    assert found == [
        ("direct", "layers.0.q_proj", graph),
        ("copy", "layers.1.up_proj", graph),
        ("staged", "layers.0.up_proj", graph),
        ("compute", "triton_poi_fused_add_0", graph),
        ("stock", "embed_tokens", graph),
        ("direct", "tiered_attention_decode", ""),
        ("direct", "triton_tem_fused_tiered_mm_3", ""),
        ("compute", "elementwise", ""),
    ]


def test_marks_of_another_thread_are_not_around() -> None:
    moved = [dict(each, tid=5) if each["name"] == "dak direct layers.0.q_proj" else each
             for each in STEP]  # fmt: skip
    first = work_of(moved, marks_of(moved))[0]
    assert first.mark is None and first.lane == "direct", "by its name alone"


def test_trials_are_in_a_lane_of_their_own() -> None:
    outer = span("user_annotation", "dak trial layers.0.q_proj", 109.0, 12.0)
    step = [outer, *STEP]
    assert work_of(step, marks_of(step))[0].lane == "trial"


def test_the_file_has_a_lane_for_each_kind_and_a_row_for_what_overlaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    record: Any = SimpleNamespace(device=torch.device("cuda", 0), label="Llama", remote="cpu")
    late = kernel("tiered_linear", 225.0, 10.0, 11)  # a dependent launch starts early
    written = json.loads(to_trace([*STEP, late], record))
    events = written["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events
             if e["name"] == "thread_name" and e["pid"] == 2}  # fmt: skip
    spans = [e for e in events if e["ph"] == "X" and e["pid"] == 2]
    assert len(spans) == 9 and min(e["ts"] for e in events if "ts" in e) == 0
    for one in spans:
        others = (e for e in spans if e["tid"] == one["tid"] and e is not one)
        assert all(e["ts"] >= one["ts"] + one["dur"] or e["ts"] < one["ts"] for e in others)
    assert sorted(lanes.values()) == sorted(
        [*(LANES[lane] for lane in ("direct", "copy", "staged", "stock", "compute")),
         LANES["direct"]]
    )  # fmt: skip
    told = written["otherData"]
    assert told["microseconds"]["copy"] == 40.0 and told["device"] == "a card"
    assert "measured" in told["what"] and told["without a mark"] == 4


def test_a_real_tier_without_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    record: Any = SimpleNamespace(device=torch.device("cuda", 0), label="Llama", remote="cpu")
    with pytest.warns(UserWarning, match="no work of a GPU"):
        to_trace([], record)


def test_on_the_simulated_tier_operators_are_seen_and_labelled(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    weight = model[0].weight
    path = tmp_path / "step.json"
    with torch.no_grad(), dak.trace(model, path):
        torch.ops.dak.linear.default(torch.randn(2, 256), weight)
    written = json.loads(path.read_text())
    (operator,) = (e for e in written["traceEvents"] if e["ph"] == "X")
    assert operator["name"] == "simulated 0" and operator["dur"] > 0
    assert "times are of no GPU" in written["otherData"]["what"]
    assert not MARKS._recorders, "marks are made for nobody afterwards"


def test_what_cannot_be_traced_is_a_named_error(tmp_path: Path) -> None:
    model = torch.nn.Linear(256, 256)
    with pytest.raises(ModelError, match="not offloaded"), dak.trace(model, tmp_path / "t.json"):
        pass
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    with (
        pytest.raises(OptionError, match="no folder"),
        dak.trace(model, tmp_path / "no" / "t.json"),
    ):
        pass
    with pytest.raises(KeyError), dak.trace(model, tmp_path / "t.json"):
        raise KeyError
    assert not (tmp_path / "t.json").exists() and not MARKS._recorders

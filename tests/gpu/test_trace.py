"""Measured timelines and NVTX ranges on a card: what the profiler links to our names, and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dak_inductor as dak
from dak_inductor.benchmarks.harness.timing import capture
from dak_inductor.lowering.marks import MARKS
from dak_inductor.trace_events import LANES

from .ahead_blocks import DEPTH, offloaded

pytestmark = pytest.mark.usefixtures("no_grad")


def work_of(path: Path) -> list[dict[str, Any]]:
    """Spans of the GPU's process."""
    written = json.loads(path.read_text())
    assert "measured" in written["otherData"]["what"]
    return [e for e in written["traceEvents"] if e["ph"] == "X" and e["pid"] != 1]


def modules(work: list[dict[str, Any]], *lanes: str) -> set[str]:
    return {each["name"] for each in work if each["cat"] in lanes}


def test_products_in_place_have_their_modules(device: torch.device, tmp_path: Path) -> None:
    model, expected = offloaded(device, "direct")
    x = expected.inputs(1)
    for _ in range(3):
        model(x)
    with dak.trace(model, tmp_path / "t.json"):
        model(x)
    work = work_of(tmp_path / "t.json")
    served = modules(work, "direct", "stock")
    for layer in range(DEPTH):
        assert any(f"blocks.{layer}.down" in name for name in served), served
    assert {each["cat"] for each in work} <= LANES.keys()
    graphs = {each["args"].get("graph") for each in work if each["cat"] == "direct"}
    assert all(graph and graph.endswith(" of Blocks") for graph in graphs)


def test_products_behind_copies_have_their_modules(device: torch.device, tmp_path: Path) -> None:
    model, expected = offloaded(device, "staged")
    x = expected.inputs(1)
    for _ in range(3):
        model(x)
    with dak.trace(model, tmp_path / "t.json"):
        model(x)
    work = work_of(tmp_path / "t.json")
    staged = modules(work, "staged")
    for layer in range(DEPTH):
        assert any(f"blocks.{layer}.down" in name for name in staged), staged
    # the profiler of torch 2.11 does not say which call of the driver queued a copy
    copies = [each for each in work if each["cat"] == "copy"]
    assert len(copies) >= DEPTH


def test_replays_are_told_apart_by_kernels(device: torch.device, tmp_path: Path) -> None:
    model, expected = offloaded(device, "direct")
    x = expected.inputs(1)
    for _ in range(3):
        model(x)
    step = capture(lambda: model(x))
    with dak.trace(model, tmp_path / "t.json"):
        step()
    work = work_of(tmp_path / "t.json")
    assert work and not any(each["name"].startswith("blocks.") for each in work)


def test_ranges_change_no_result(device: torch.device) -> None:
    model, expected = offloaded(device, "staged")
    x = expected.inputs(5)
    before = MARKS.nvtx
    try:
        for on in (True, False, True):
            MARKS.switch(on)
            for number in range(3):
                expected.check(model(x), x, f"ranges {on}, call {number}")
        MARKS.switch(True)
        step = capture(lambda: model(x))
        expected.check(step(), x, "a graph captured with ranges")
    finally:
        MARKS.switch(before)

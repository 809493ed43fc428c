"""Recorded steps, predicted as `dak plan` predicts: from the model's graphs, without a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dak_inductor.benchmarks.harness.model_case import MEASURED, Case
from dak_inductor.benchmarks.harness.model_measure import build
from dak_inductor.benchmarks.harness.model_prediction import plan_of
from dak_inductor.benchmarks.harness.models import SHAPES, Workload
from dak_inductor.benchmarks.harness.timing import REPLAYS
from dak_inductor.benchmarks.harness.whole_model import DECODE
from dak_inductor.capture import capture
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.inventory import Inventory, take_inventory
from dak_inductor.op_table import OpTable
from dak_inductor.plan import OpUse, Plan
from dak_inductor.plan_command import REMOTE_PAGE, entry_names

OURS = "dak"
_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class PredictedStep:
    """A step of ours that was measured in a CUDA graph. Times in seconds."""

    phase: str
    cell: str
    share: float
    predicted: float
    measured: float


def predicted_steps(record: Mapping[str, Any], profile: HardwareProfile) -> Iterator[PredictedStep]:
    """Those of a record of `bench_step` or `dak bench`."""
    if "shape" in record["arguments"]:
        yield from _decoder_blocks(record, profile)
    else:
        yield from _whole_models(record, profile)


class _Graphs:
    """The graphs of a model on the meta device, by phase, and the plans of them."""

    def __init__(self, model: nn.Module, tables: Mapping[str, list[OpTable]]) -> None:
        self._model, self._tables = model, tables

    @cached_property
    def _inventory(self) -> Inventory:
        return take_inventory(self._model, minimum_bytes=REMOTE_PAGE)

    @cached_property
    def _names(self) -> dict[str, str]:
        return entry_names(self._model)

    def plan(
        self, row: Mapping[str, Any], profile: HardwareProfile, kept: Collection[str] = ()
    ) -> Plan:
        """With the bytes remote that a row had; parameters `kept` stay on the device."""
        names = self._names
        uses: list[OpUse] = []
        for phase, tables in self._tables.items():
            calls = float(row["new"] - 1) if phase == DECODE and "new" in row else 1.0
            for table in tables:
                bound = {
                    index: names[name] for index, name in table.parameters.items() if name in names
                }
                uses += table.uses(bound, graph=phase, calls=calls)
        return plan_of(
            self._inventory, uses, remote_bytes=row["remote_bytes"], remote=row["remote"],
            profile=profile, kept=kept,
        )  # fmt: skip


def _decoder_blocks(record: Mapping[str, Any], profile: HardwareProfile) -> Iterator[PredictedStep]:
    arguments = record["arguments"]
    phase = "prefill" if arguments["prefill"] else DECODE
    workload = Workload(
        shape=SHAPES[arguments["shape"]],
        batch=arguments["batch"],
        context=arguments["context"],
        prefill=arguments["prefill"],
    ).with_layers(arguments["layers"])
    model = workload.build(_META)
    graphs = _Graphs(model, {phase: capture(model.forward, *workload.inputs(_META).arguments())})
    for row in record["cells"]:
        if row["provider"] == OURS and row["status"] == "ok" and row["method"] == REPLAYS:
            seconds = graphs.plan(row, profile).step_times[phase]
            cell = f"{record['benchmark']} {row['fraction']}"
            yield PredictedStep(phase, cell, row["fraction"], seconds, row["milliseconds"] / 1e3)


def _whole_models(record: Mapping[str, Any], profile: HardwareProfile) -> Iterator[PredictedStep]:
    known: dict[tuple[str, int], tuple[_Graphs, dict[str, str]]] = {}
    for row in record["cells"]:
        if (row["provider"], row["figure"], row["status"]) != (OURS, MEASURED, "ok"):
            continue
        key = row["model"], row["batch"]
        if key not in known:
            known = {key: _whole_model(Case(**{f.name: row[f.name] for f in fields(Case)}))}
        graphs, kept = known[key]
        plan = graphs.plan(row, profile, kept=kept)
        for phase, seconds in plan.step_times.items():
            name = "tpot" if phase == DECODE else "ttft"
            if row.get(f"{name}_method") == REPLAYS:
                cell = f"{row['model']} batch {row['batch']} {row['share']}"
                measured = row[f"{name}_ms"] / 1e3
                yield PredictedStep(phase, cell, row["share"], seconds, measured)


def _whole_model(case: Case) -> tuple[_Graphs, dict[str, str]]:
    """The graphs, and what stays on the device."""
    model = build(case, _META)
    inputs = model.phase_inputs(batch=case.batch, prompt=case.prompt, seed=0)
    tables = {}
    for phase in inputs.tensors:
        inputs.phase = phase
        tables[phase] = capture(model.forward, *inputs.arguments())
    return _Graphs(model, tables), model.kept_on_device()

"""Rows of `dak bench` from the planner: the graphs of the real model, captured without a GPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from dak_inductor import hardware
from dak_inductor.ahead_room import expected_ring_by_profile
from dak_inductor.benchmarks.harness.model_case import Case
from dak_inductor.config_model import build_model
from dak_inductor.copied_rows import row_block
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.inventory import Inventory, take_inventory
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.plan_command import REMOTE_PAGE, graphs_for
from dak_inductor.planner import make_plan
from dak_inductor.refusal import Refusal

_AMPLE_BUDGET = 1 << 40
"""A case has a share of the weights and no budget that could be short of a ring."""


def sequence_length(model: Any, prompt: int) -> int:
    """Tokens that a sequence has in the first step: the prompt's, or those made of an image."""
    if getattr(model, "main_input_name", "") != "pixel_values":
        return prompt
    return int((model.config.image_size // model.config.patch_size) ** 2) + 1


class Predictor:
    """Keeps the last model's graphs, as cases of one model and batch follow each other."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._graphs: Any = None
        self._length = 0  # tokens of a sequence, or patches of an image and one more

    def row(self, case: Case) -> dict[str, object]:
        """TTFT and TPOT in milliseconds, bytes of a step by tier, and the bound of the plan.

        `share` is one of all weights that can be divided, embedding and head among them: full
        models are planned, and these are where a planner begins.
        """
        plan = self.plan(case)
        last = "decode" if "decode" in plan.step_times else "forward"
        first = "prefill" if last == "decode" else "forward"
        ops = [op for op in plan.ops if op.graph == last]
        local, remote = sum(o.local_bytes for o in ops), sum(o.remote_bytes for o in ops)
        tokens = case.batch * (1 if last == "decode" else self._length)
        row: dict[str, object] = {
            "status": "ok",
            "kind": "prediction",
            "realised": plan.remote_bytes / plan.total_bytes,
            "remote_bytes": plan.remote_bytes,
            "ttft_ms": plan.step_times[first] * 1e3,
            "L_ttft_ms": plan.bound[first] * 1e3,
            "ttft T/L": plan.step_times[first] / plan.bound[first],
            "local_bytes_per_token": local / tokens,
            "remote_bytes_per_token": remote / tokens,
            "bandwidth": (local + remote) / plan.step_times[last],
            "refused": len(plan.refusals),
        }
        if last == "decode":
            tpot = plan.step_times["decode"]
            total = plan.step_times["prefill"] + tpot * (case.new - 1)
            row |= {
                "tpot_ms": tpot * 1e3,
                "L_tpot_ms": plan.bound["decode"] * 1e3,
                "tpot T/L": tpot / plan.bound["decode"],
                "tokens_per_second": case.batch * case.new / total,
            }
        return row

    def plan(self, case: Case) -> Plan:
        """The plan of the case's share of all bytes that can be divided."""
        key = (case.model, case.batch, case.prompt, case.new)
        if key != self._key:
            model = build_model(case.model)
            graphs = graphs_for(model, batch=case.batch, prompt=case.prompt, new=case.new)
            self._graphs = (take_inventory(model, minimum_bytes=REMOTE_PAGE), graphs)
            self._key, self._length = key, sequence_length(model, case.prompt)
        inventory, (uses, refusals) = self._graphs
        plan = plan_of(
            inventory,
            uses,
            remote_bytes=round(case.share * inventory.tierable_bytes),
            remote=case.remote,
            profile=hardware.load(case.hardware),
            refusals=(*inventory.refusals, *refusals),
            model=inventory.fingerprint,
        )
        return replace(plan, model=case.model)


def plan_of(
    inventory: Inventory,
    uses: Sequence[OpUse],
    *,
    remote_bytes: int,
    remote: str,
    profile: HardwareProfile,
    refusals: Sequence[Refusal] = (),
    model: str = "",
    kept: Collection[str] = (),
) -> Plan:
    """The plan that makes so many bytes of a model remote, with a ring for copies ahead.

    kept: names of parameters that stay on the device.
    """
    tensors = tuple(
        TensorSpec(
            entry.name,
            entry.nbytes,
            max_remote=0 if any(name in kept for name in entry.names) else None,
            row_block=row_block(entry),
        )
        for entry in inventory.entries
    )
    problem = PlanProblem(
        tensors=tensors,
        uses=tuple(uses),
        remote_bytes=remote_bytes,
        remote=remote,
        refusals=tuple(refusals),
        model=model,
        ring_bytes=expected_ring_by_profile(profile, _AMPLE_BUDGET),
    )
    return make_plan(problem, profile)

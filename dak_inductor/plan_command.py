"""`dak plan`: what would happen to a model on a machine, from its config and a hardware profile.

The model is built on the meta device and its prefill and decode graphs are captured, so no weight,
GPU or compiled extension is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dak_inductor import hardware
from dak_inductor.ahead_room import expected_ring_by_profile
from dak_inductor.byte_size import parse_budget
from dak_inductor.capture import capture_generation
from dak_inductor.config_model import build_model, kv_cache_bytes
from dak_inductor.copied_rows import row_block
from dak_inductor.cost_model import FUSED, compute_seconds
from dak_inductor.errors import BudgetError, ModelError
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.inventory import Inventory, take_inventory
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.quantity_text import bytes_text, count_text, seconds_text
from dak_inductor.refusal import Refusal

CONTEXT_BYTES = 600_000_000  # CUDA context, libraries and modules on the device
REMOTE_PAGE = 2 << 20  # a tensor's remote part takes whole pages of the remote tier


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for. `batch` sequences, `prompt` tokens in and `new` tokens out each."""

    model: str
    hardware: str
    remote: str
    gpu_memory: str | None  # None: the whole card
    batch: int
    prompt: int
    new: int


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes on the device. `planned` may go remote, everything else may not."""

    budget: int
    planned: int
    kept_whole: int  # tensors too small to divide, and buffers
    kv_cache: int
    activations: int  # estimate: twice the operands of the largest operator
    context: int = CONTEXT_BYTES

    @property
    def remote_bytes(self) -> int:
        """Bytes of `planned` that have to leave. Raises BudgetError where the rest does not fit."""
        fixed = self.kept_whole + self.kv_cache + self.activations + self.context
        if fixed > self.budget:
            raise BudgetError(
                f"gpu_memory is {self.budget:,} bytes, but {fixed:,} cannot leave the GPU: "
                f"{self.kept_whole:,} of tensors kept whole, {self.kv_cache:,} of KV cache, "
                f"{self.activations:,} of activations, {self.context:,} of CUDA context; raise "
                f"gpu_memory by {fixed - self.budget:,} bytes, or lower batch or lengths"
            )
        return max(0, self.planned - (self.budget - fixed))


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """A plan with what it was made for."""

    request: PlanRequest
    memory: MemoryNeeds
    plan: Plan
    compute: Mapping[str, float] = field(default_factory=dict)  # seconds on the cores, by operator

    @property
    def ttft(self) -> float:
        """Seconds to the first token: the prefill, or the forward pass of an encoder."""
        return sum(t for graph, t in self.plan.step_times.items() if graph != "decode")

    @property
    def tpot(self) -> float | None:
        """Seconds per further token; None for a model that does not generate."""
        return self.plan.step_times.get("decode")

    @property
    def remote_memory(self) -> int:
        """Bytes that the remote tier has to hold, pages included; an upper limit."""
        return sum(n + REMOTE_PAGE for n in self.plan.splits.values() if n)

    def title(self) -> str:
        """The lines above the report."""
        asked, memory = self.request, self.memory
        return (
            f"{asked.model} on {self.plan.hardware}, remote tier {asked.remote}: batch "
            f"{asked.batch}, {count_text(asked.prompt, 'token')} in, {asked.new} out\n"
            f"weights {bytes_text(memory.planned + memory.kept_whole)}, KV cache "
            f"{bytes_text(memory.kv_cache)}, activations about {bytes_text(memory.activations)}, "
            f"context {bytes_text(memory.context)}; budget {bytes_text(memory.budget)}"
        )

    def closing(self) -> str:
        """The lines below the report."""
        needed = bytes_text(self.remote_memory)
        lines = [f"remote memory needed: at most {needed} ({self.request.remote})"]
        if self.tpot is not None:
            total = self.ttft + self.tpot * (self.request.new - 1)
            tokens = self.request.batch * self.request.new
            generated = f"{count_text(tokens, 'token')} in {seconds_text(total)}"
            lines.append(f"{generated}: {tokens / total:.1f} tokens/s")
        if not self.plan.asked_bytes:
            lines.append("everything fits into gpu_memory: nothing has to be offloaded")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Request, memory, predictions (seconds) and the plan as one JSON object."""
        record: dict[str, Any] = {
            "request": asdict(self.request),
            "memory": {**asdict(self.memory), "remote": self.plan.remote_bytes},
            "remote_memory_needed": self.remote_memory,
            "ttft": self.ttft,
            "tpot": self.tpot,
            "gap": self.plan.gap,
            "plan": json.loads(self.plan.to_json()),
        }
        return json.dumps(record, indent=2)


def answer(request: PlanRequest, report: Callable[[str], None] = lambda _: None) -> PlanAnswer:
    """Plan what `request` asks for; `report` hears what is being done.

    Raises OptionError, BudgetError, ProfileError or ModelError with what to change.
    """
    profile = hardware.load(request.hardware)
    profile.link(request.remote)
    budget = (
        profile.memory_bytes
        if request.gpu_memory is None
        else parse_budget(request.gpu_memory, profile.memory_bytes)
    )
    report("building the model on the meta device")
    model = build_model(request.model)
    report("tracing prefill and decode")
    uses, refusals = graphs_for(model, batch=request.batch, prompt=request.prompt, new=request.new)
    report("planning")
    return plan_model(request, model, uses, refusals, budget, profile)


def graphs_for(
    model: torch.nn.Module, *, batch: int, prompt: int, new: int
) -> tuple[list[OpUse], list[Refusal]]:
    """Every operator of one prefill and of `new` - 1 decode steps, and what was refused.

    Operands that are no parameters (the KV cache) are named "": local, and their time counts.
    """
    names = entry_names(model)
    uses: list[OpUse] = []
    refusals: list[Refusal] = []
    for number, (graph, table) in enumerate(
        capture_generation(model, batch=batch, prompt=prompt, new=new)
    ):
        calls = float(new - 1) if graph == "decode" else 1.0
        operands = {i: names.get(table.parameters.get(i, ""), "") for i in table.operands()}
        for use in table.uses(operands, graph=graph, calls=calls):
            uses.append(replace(use, op=f"{number}.{use.op}"))  # names repeat from graph to graph
        refusals += [replace(refusal, graph=graph) for refusal in table.refusals]
    return uses, refusals


def entry_names(model: torch.nn.Module) -> dict[str, str]:
    """The planned tensor that each parameter name stands for; tied weights stand for one."""
    return {name: entry.name for entry in _inventory(model).entries for name in entry.names}


def plan_model(
    request: PlanRequest,
    model: torch.nn.Module,
    uses: list[OpUse],
    refusals: list[Refusal],
    budget: int,
    profile: HardwareProfile,
) -> PlanAnswer:
    """The plan for a model whose graphs are known. Raises BudgetError."""
    inventory = _inventory(model)
    first = [use for use in uses if use.graph != "decode"]
    generates = len(first) < len(uses)
    memory = MemoryNeeds(
        budget=budget,
        planned=inventory.tierable_bytes,
        kept_whole=inventory.resident_bytes,
        kv_cache=kv_cache_bytes(
            getattr(model, "config", None) if generates else None,
            batch=request.batch,
            length=request.prompt + request.new,
            itemsize=next(model.parameters()).itemsize,
        ),
        activations=int(
            2 * max((use.other_bytes for use in first if use.kind != FUSED), default=0)
        ),
    )
    problem = PlanProblem(
        tensors=tuple(
            TensorSpec(entry.name, entry.nbytes, row_block=row_block(entry))
            for entry in inventory.entries
        ),
        uses=tuple(uses),
        remote_bytes=memory.remote_bytes,
        remote=request.remote,
        refusals=(*inventory.refusals, *refusals),
        model=inventory.fingerprint,
        ring_bytes=expected_ring_by_profile(profile, budget),
    )
    compute = {use.op: compute_seconds(use, profile) for use in uses if use.flops}
    return PlanAnswer(request, memory, make_plan(problem, profile), compute)


def _inventory(model: torch.nn.Module) -> Inventory:
    inventory = take_inventory(model, minimum_bytes=REMOTE_PAGE)
    if not inventory.entries and not inventory.resident:
        raise ModelError(f"{type(model).__name__} has no parameters to plan")
    return inventory

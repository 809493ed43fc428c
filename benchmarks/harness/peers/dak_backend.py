"""This package: `dak.offload`, `model.compile(backend="dak")`, then captured like its peers.

Once for each `strategy`: what it chooses itself, and both ways that it chooses from. With a `mode`
of Inductor's that captures, calls are what is measured: they are replays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dak_inductor.ahead_report import StepStrategy
from dak_inductor.benchmarks.harness.models import DecoderBlocks, StepInputs
from dak_inductor.benchmarks.harness.peers.provider import (
    Kind,
    Prepared,
    Provider,
    ProviderUnavailable,
    Setting,
    model_bytes,
)
from dak_inductor.options import Strategy
from dak_inductor.refusal import in_one_line

SETTLING_STEPS = 3
"""Steps before a capture: the first compiles and re-plans, later ones run as they will stay."""


class DakBackend(Provider):
    """The planner's choice of which weights are remote, at the same total as every other peer.

    placement: as of `dak.offload`. mode: as of `torch.compile`.
    """

    def __init__(
        self,
        strategy: Strategy = "auto",
        placement: Mapping[str, str] | None = None,
        mode: str | None = None,
    ) -> None:
        self.strategy, self.placement, self.mode = strategy, placement, mode
        self.kind: Kind = "reference" if mode else "real peer"
        self.name = "dak" if strategy == "auto" else f"dak {strategy}"
        self.name += f" {mode}" if mode else ""

    def prepare(self, model: DecoderBlocks, inputs: StepInputs, setting: Setting) -> Prepared:
        import dak_inductor as dak
        from dak_inductor.offloaded import record_of

        before = model_bytes(model)
        offloaded = dak.offload(
            model,
            offload_ratio=setting.fraction,
            remote=setting.remote,
            host_memory=setting.host_memory,
            placement=self.placement,
        )
        options = {"strategy": self.strategy} | ({"mode": self.mode} if self.mode else {})
        offloaded.compile(backend="dak", dynamic=False, options=options)
        for _ in range(SETTLING_STEPS):
            offloaded(*inputs.arguments())
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
        record = record_of(offloaded)
        if record is None:
            raise ProviderUnavailable("dak.offload left no record of this model")
        buffers = [weight.buffer for weight in record.weights.values()]
        remote = sum(buffer.bytes_by_tier().remote for buffer in buffers)
        tiered = sum(buffer.nbytes for buffer in buffers)
        local = sum(buffer.physical_bytes().local for buffer in buffers)

        def step() -> torch.Tensor:
            if self.mode:  # what the call before returned may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            return offloaded(*inputs.arguments())

        steps = dak.explain(offloaded).strategies
        ring = max((each.ring_bytes for each in steps), default=0)
        return Prepared(
            step,
            remote,
            device_bytes=before - tiered + local + ring,
            graph=self.mode is None,
            note=strategies_text(steps),
        )


def strategies_text(steps: Sequence[StepStrategy]) -> str:
    """How many products had their remote bytes copied ahead, by the plans in force."""
    if not steps:
        return "no product copied ahead"
    return in_one_line(
        [
            each.off or f"{each.staged} of {len(each.ops)} copied ahead {each.where}".rstrip()
            for each in steps
        ]
    )

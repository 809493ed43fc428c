"""All resident: the reference, eager or under Inductor."""

from __future__ import annotations

import torch

from dak_inductor.benchmarks.harness.models import DecoderBlocks, StepInputs
from dak_inductor.benchmarks.harness.peers.provider import (
    Kind,
    Prepared,
    Provider,
    Setting,
    model_bytes,
)


class Resident(Provider):
    """Every weight in HBM. Ignores the fraction."""

    kind: Kind = "reference"

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled
        self.name = "resident inductor" if compiled else "resident eager"

    def prepare(self, model: DecoderBlocks, inputs: StepInputs, setting: Setting) -> Prepared:
        run = torch.compile(model, dynamic=False) if self.compiled else model

        def step() -> torch.Tensor:
            return run(*inputs.arguments())

        return Prepared(step, remote_bytes=0, device_bytes=model_bytes(model))

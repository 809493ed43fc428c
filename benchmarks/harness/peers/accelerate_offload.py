"""accelerate's cpu_offload on as many whole layers as the fraction asks for; eager, as shipped."""

from __future__ import annotations

import math

import torch

from dak_inductor.benchmarks.harness.models import DecoderBlocks, StepInputs
from dak_inductor.benchmarks.harness.peers.provider import (
    Kind,
    Prepared,
    Provider,
    ProviderUnavailable,
    Setting,
    model_bytes,
)


class AccelerateOffload(Provider):
    """Whole layers on the CPU, copied by hooks when they run. Its copies cannot be captured."""

    name = "accelerate cpu_offload"
    kind: Kind = "real peer"

    def prepare(self, model: DecoderBlocks, inputs: StepInputs, setting: Setting) -> Prepared:
        if setting.remote.startswith("cuda:"):
            raise ProviderUnavailable("accelerate offloads to host memory, not to another GPU")
        try:
            from accelerate import cpu_offload
        except ImportError as error:
            raise ProviderUnavailable(f"accelerate is not installed: {error}") from error

        layers = model.shape.layers
        count = math.ceil(setting.fraction * layers - 1e-9)
        chosen = {((index + 1) * layers) // count - 1 for index in range(count)}
        total = model_bytes(model)
        remote = sum(model_bytes(model.layers[index]) for index in chosen)
        for index in sorted(chosen):
            cpu_offload(model.layers[index], execution_device=setting.device)

        def step() -> torch.Tensor:
            return model(*inputs.arguments())

        note = f"eager; {count} of {layers} layers"
        return Prepared(step, remote, device_bytes=total - remote, graph=False, note=note)

"""Per-linear prefetcher: only the missing rows of every linear are copied, one side stream ahead.

Every weight keeps its full size on the device and nobody charges it: an oracle. No slot ever limits
how far it runs ahead, and it copies no byte that is resident.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dak_inductor.benchmarks.harness.copy_stream import CopyStream, remote_copy
from dak_inductor.benchmarks.harness.models import LINEAR_NAMES, DecoderBlocks, StepInputs
from dak_inductor.benchmarks.harness.peers.provider import (
    Kind,
    Prepared,
    Provider,
    Setting,
    model_bytes,
    remote_rows,
)


class LinearPrefetch(Provider):
    """Waits before each linear (eager), or before each block of seven (compiled blocks)."""

    kind: Kind = "oracle"

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled
        self.name = "linear prefetch inductor" if compiled else "linear prefetch eager"

    def prepare(self, model: DecoderBlocks, inputs: StepInputs, setting: Setting) -> Prepared:
        rows_by_linear = [_take_rows(linear, setting) for _, _, linear in model.linears()]
        stream = CopyStream(setting.device, setting.remote)
        marks: list[torch.cuda.Event | None] = [None] * len(rows_by_linear)
        per_block = len(LINEAR_NAMES)
        blocks: list[Callable[..., Tensor]] = list(model.layers)
        if self.compiled:
            blocks = [torch.compile(block, dynamic=False) for block in model.layers]
        else:
            for index, (_, _, linear) in enumerate(model.linears()):
                linear.register_forward_pre_hook(
                    lambda _module, _arguments, index=index: stream.wait(marks[index])
                )

        def step() -> Tensor:
            stream.fork()
            for index, (destination, source) in enumerate(rows_by_linear):
                stream.copy(destination, source)
                marks[index] = stream.copied()
            if not self.compiled:
                output: Tensor = model(*inputs.arguments())
                stream.join()
                return output
            hidden = inputs.hidden
            for index, block in enumerate(blocks):
                stream.wait(marks[(index + 1) * per_block - 1])
                hidden = block(
                    hidden, inputs.cosine, inputs.sine,
                    inputs.keys[index], inputs.values[index], inputs.position,
                )  # fmt: skip
            stream.join()
            return hidden

        remote = sum(source.nbytes for _, source in rows_by_linear)
        note = "full-size weights on the device, not charged"
        return Prepared(step, remote, device_bytes=model_bytes(model) - remote, note=note)


def _take_rows(linear: nn.Linear, setting: Setting) -> tuple[Tensor, Tensor]:
    """(rows on the device, their copy in the remote tier); the former are poisoned until copied."""
    count = remote_rows(linear.out_features, setting.fraction)
    rows = linear.weight.detach()[linear.out_features - count :]
    source = remote_copy(rows, setting.remote)
    rows.fill_(math.nan)
    return rows, source

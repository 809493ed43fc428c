"""Stock kernels on split tensors: the same share of every linear's last rows is remote.

What an offloader does that gives kernels an address in host memory and changes nothing else.
"""

from __future__ import annotations

import torch
from torch import nn

from dak_inductor.benchmarks.harness.models import DecoderBlocks, StepInputs
from dak_inductor.benchmarks.harness.peers.provider import (
    Kind,
    Prepared,
    Provider,
    Setting,
    model_bytes,
    remote_rows,
)
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tiers import open_tier


class StockOnSplit(Provider):
    """Stock operators, eager or under Inductor, on tensors whose last rows are remote."""

    kind: Kind = "real peer"

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled
        self.name = "split inductor" if compiled else "split eager"

    def prepare(self, model: DecoderBlocks, inputs: StepInputs, setting: Setting) -> Prepared:
        buffers = split_linears(model, setting)
        run = torch.compile(model, dynamic=False) if self.compiled else model

        def step() -> torch.Tensor:
            return run(*inputs.arguments())

        remote = sum(buffer.bytes_by_tier().remote for buffer in buffers)
        tiered = sum(buffer.nbytes for buffer in buffers)
        local = sum(buffer.physical_bytes().local for buffer in buffers)
        return Prepared(step, remote, device_bytes=model_bytes(model) - tiered + local)


def split_linears(model: DecoderBlocks, setting: Setting) -> list[TieredBuffer]:
    """Replace every linear's weight by a tensor on a tiered buffer with the same values."""
    tier = open_tier(setting.remote, device=setting.device, host_memory=setting.host_memory)
    linears = [linear for _, _, linear in model.linears()]
    remote = [remote_rows(linear.out_features, setting.fraction) for linear in linears]
    row_bytes = [linear.weight.nbytes // linear.out_features for linear in linears]
    tier.reserve(sum(rows * size for rows, size in zip(remote, row_bytes, strict=True)))
    buffers = []
    for linear, rows, size in zip(linears, remote, row_bytes, strict=True):
        old = linear.weight
        buffer = tier.allocate(old.nbytes, split=(linear.out_features - rows) * size)
        tensor = buffer.tensor(old.dtype, tuple(old.shape))
        tensor.copy_(old)
        linear.weight = nn.Parameter(tensor, requires_grad=False)
        buffers.append(buffer)
    return buffers

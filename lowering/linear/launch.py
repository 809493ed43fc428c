"""Launches of the kernel `tiered_linear`: arguments packed as kernels/linear/arguments.cuh has."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dak_inductor import hardware
from dak_inductor.cuda_runtime.kernel import LoadedKernel, load
from dak_inductor.cuda_runtime.launch_words import words_for
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.window import window_of
from dak_inductor.lowering.linear.configuration import (
    CONSUMER_WARPGROUPS,
    DEPTH,
    FEW_ROWS,
    LATE_SECONDS,
    THREADS,
    WORKER_BYTES,
    LinearConfiguration,
    most_remote_workers,
    piece_seconds,
    reader_bandwidth,
    step_seconds,
)
from dak_inductor.lowering.linear.problem import Activation, LinearProblem
from dak_inductor.lowering.linear.tail import tail_rule
from dak_inductor.lowering.linear.tensor_maps import matrix_map

_WEIGHT = struct.Struct("<4Q")
_REST = struct.Struct("<3Q2Q3Q7I3fI4I4x")
_CLAIM_WORDS = 32  # the word that all CTAs add to has a line of L2 to itself


@dataclass(frozen=True, slots=True)
class Operand:
    """A weight as stored, [N, K] or [K, N], with its bias, and the buffer that holds it."""

    tensor: Tensor
    bias: Tensor | None
    buffer: TieredBuffer

    def packed(self) -> bytes:
        return _WEIGHT.pack(
            self.buffer.device_record,
            self.tensor.data_ptr() - self.buffer.address,
            self.tensor.stride(0) * self.tensor.element_size(),
            0 if self.bias is None else self.bias.data_ptr(),
        )


def launch(
    problem: LinearProblem,
    configuration: LinearConfiguration,
    *,
    x: Tensor,
    operands: tuple[Operand, ...],
    residual: Tensor | None,
    activation: Activation,
    out: Tensor,
    bounded_waits: bool = False,
) -> None:
    """Queue y = f(x W^T) on torch's current stream.

    Args:
        x: [M, K], rows contiguous.
        residual, out: [M, N], rows contiguous.
        bounded_waits: end with an error that names the barrier where one never completes.

    Raises CompilationError, DriverError.
    """
    index = x.device.index
    kernel = load(configuration.kernel(bounded_waits=bounded_waits), index)
    workers = worker_count(configuration, index)
    buffer = operands[0].buffer
    window = window_of(x.device, buffer.tier)
    profile = profile_of(index)
    most_remote = most_remote_workers(
        configuration, profile, window.link, window=window.nbytes, workers=workers
    )
    step = step_seconds(configuration, profile)
    tail = tail_rule(problem, configuration, profile, workers)
    slots = 2 * most_remote + workers  # a remote run may leave one and keep one
    slots += configuration.tiles(problem) if problem.in_out else 0
    slots += tail.slots(configuration.tiles(problem))
    partials = torch.empty(slots * configuration.partial_bytes, dtype=torch.uint8, device=x.device)
    stream = torch.cuda.current_stream(index).cuda_stream
    flags = slots * configuration.cluster * CONSUMER_WARPGROUPS
    words = words_for(index, _CLAIM_WORDS + flags, stream)
    second = operands[-1]
    cta_tokens = math.ceil(problem.m / configuration.cluster)
    arguments = (
        operands[0].packed()
        + second.packed()
        + _REST.pack(
            window.address,
            out.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.stride(0),
            0 if residual is None else residual.stride(0),
            partials.data_ptr(),
            words + 4 * _CLAIM_WORDS,
            words,
            problem.m,
            cta_tokens,
            problem.n,
            problem.k,
            int(activation),
            most_remote,
            WORKER_BYTES,
            1 / (window.link.direct_bandwidth * step),
            1 / (reader_bandwidth(window.link) * step),
            piece_seconds(configuration) / step,
            configuration.stages + round(LATE_SECONDS / step),
            tail.share,
            tail.pieces,
            tail.least,
            tail.spared,
        )
    )
    kernel.launch(
        grid=(workers * configuration.cluster, 1, 1),
        block=(THREADS, 1, 1),
        arguments=[
            *(_weight_map(operand.tensor, configuration) for operand in (operands[0], second)),
            *(_row_maps(operand.tensor) for operand in (operands[0], second)),
            _map(x, cta_tokens),
            arguments,
        ],
        shared_bytes=configuration.shared_bytes,
        cluster=(configuration.cluster, 1, 1),
        stream=stream,
        overlap=True,
    )


@lru_cache(maxsize=1024)
def worker_count(configuration: LinearConfiguration, device_index: int) -> int:
    """Clusters (or CTAs) of this configuration that the device holds at once; 0: none fits."""
    if configuration.cluster == 1:
        return torch.cuda.get_device_properties(device_index).multi_processor_count
    kernel: LoadedKernel = load(configuration.kernel(), device_index)
    return kernel.maximum_active_clusters(
        block=(THREADS, 1, 1),
        shared_bytes=configuration.shared_bytes,
        cluster=(configuration.cluster, 1, 1),
    )


@lru_cache(maxsize=8)
def profile_of(device_index: int) -> hardware.HardwareProfile:
    """The hardware profile of that GPU, looked up once: launches ask for it."""
    return hardware.current(device_index)


def _weight_map(weight: Tensor, configuration: LinearConfiguration) -> bytes:
    if configuration.in_out:
        return _map(weight, DEPTH)
    alone = configuration.cluster == 1 and not configuration.paired
    return _map(weight, configuration.features, wide=not alone)


def _row_maps(weight: Tensor) -> bytes:
    return b"".join(_map(weight, rows) for rows in FEW_ROWS)


def _map(matrix: Tensor, box_rows: int, *, wide: bool = True) -> bytes:
    rows, columns = matrix.shape
    row_bytes = max(matrix.stride(0), columns) * matrix.element_size()
    row_bytes = math.ceil(row_bytes / 16) * 16  # of a single row any stride does
    return matrix_map(matrix.data_ptr(), matrix.dtype, rows, columns, row_bytes, box_rows, wide)

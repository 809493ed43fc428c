"""Launches of `tiered_attention`: arguments packed as kernels/attention/arguments.cuh has."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.kernel import load
from dak_inductor.cuda_runtime.launch_words import launch_window, words_for
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.window import Window, window_of
from dak_inductor.lowering.attention.configuration import (
    FASTEST_SWEPT,
    MOST_AT_ONCE,
    NO_SWEEP,
    THREADS,
    AttentionConfiguration,
)
from dak_inductor.lowering.attention.problem import AttentionMasking, AttentionProblem
from dak_inductor.lowering.attention.tensor_maps import byte_strides, cache_maps
from dak_inductor.lowering.gpu_profile import profile_of

_CACHE = struct.Struct("<5Q2I")
_REST = struct.Struct("<8Q3Q8I2f2I2f2I4I")
_LOG2_E = math.log2(math.e)
_PIECE_SECONDS = 8e-6
"""In which a worker has a piece of a few remote tokens: 6 us on the H200, most of them latency."""


@dataclass(frozen=True, slots=True)
class CachedTensor:
    """Keys or values [B, Hkv, S, D], and the tiered buffer that holds them; None: all local."""

    tensor: Tensor
    buffer: TieredBuffer | None

    def packed(self) -> bytes:
        heads, batch, tokens = byte_strides(self.tensor)
        record, offset = 0, 0
        if self.buffer is not None:
            record = self.buffer.device_record
            offset = self.tensor.data_ptr() - self.buffer.address
        return _CACHE.pack(record, offset, batch, heads, tokens, *divisor(tokens // 16))


def launch(
    problem: AttentionProblem,
    configuration: AttentionConfiguration,
    *,
    query: Tensor,
    caches: tuple[CachedTensor, CachedTensor],
    lengths: Tensor | None,
    starts: Tensor | None,
    masking: AttentionMasking,
    out: Tensor,
    bounded_waits: bool = False,
) -> None:
    """Queue out = softmax(scale Q K^T) V on torch's current stream.

    Args:
        query: [B, Hkv * ratio, Q, D]; strides and address multiples of 16 bytes, that of D 1.
        caches: keys and values.
        lengths, starts: int32 [B] on the device, or None.
        out: [B, Q, Hkv * ratio, D], contiguous.
        bounded_waits: end with an error that names the barrier where one never completes.

    Raises CompilationError, DriverError.
    """
    index = query.device.index
    kernel = load(configuration.kernel(bounded_waits=bounded_waits), index)
    ctas = _sm_count(index)
    workers = ctas * configuration.teams
    slots = configuration.partial_slots(problem, workers)
    partials = torch.empty(
        slots * configuration.slot_floats(problem), dtype=torch.float32, device=query.device
    )
    stream = torch.cuda.current_stream(index).cuda_stream
    counters = words_for(index, configuration.counters(problem, workers), stream)
    tiers = [cache.buffer.tier for cache in caches if cache.buffer is not None]
    window = window_of(query.device, tiers[0]) if tiers else None
    scale, cap = _score_factors(masking)
    arguments = (
        caches[0].packed()
        + caches[1].packed()
        + _REST.pack(
            _address(lengths),
            _address(starts),
            window.address if window else 0,
            launch_window(counters, window.number) if window and window.automatic else 0,
            query.data_ptr(),
            out.data_ptr(),
            partials.data_ptr(),
            counters,
            query.stride(0),
            query.stride(1),
            query.stride(2),
            problem.batch,
            problem.kv_heads,
            problem.ratio,
            problem.queries,
            problem.tokens,
            configuration.row_blocks(problem),
            int(masking.causal),
            masking.window,
            scale,
            cap,
            configuration.most_chunks(problem),
            configuration.least_chunk(problem),
            *_remote_costs(index, window, configuration),
            *divisor(configuration.row_blocks(problem)),
            _sweep_tokens(problem, configuration, caches, window),
            MOST_AT_ONCE,
            configuration.finest_rows,
            0,
        )
    )
    kernel.launch(
        grid=(ctas, 1, 1),
        block=(THREADS, 1, 1),
        arguments=[b"".join(cache_maps(cache.tensor) for cache in caches), arguments],
        shared_bytes=configuration.shared_bytes,
        stream=stream,
        overlap=True,
    )


def _score_factors(masking: AttentionMasking) -> tuple[float, float]:
    """What scores are multiplied by for powers of 2; and for the exponent of the soft cap, or 0."""
    if masking.softcap == 0:
        return masking.scale * _LOG2_E, 0.0
    return masking.softcap * _LOG2_E, 2 * _LOG2_E * masking.scale / masking.softcap


def divisor(number: int) -> tuple[int, int]:
    """Multiplier and shift for division by `number` (kernels/schedule/divisor.cuh)."""
    shift = (number - 1).bit_length()
    return (((1 << shift) - number) << 32) // number + 1, shift


def _remote_costs(
    device_index: int, window: Window | None, configuration: AttentionConfiguration
) -> tuple[float, float]:
    """Local tiles that all SMs read while the link brings one, and while a worker has a piece."""
    if window is None:
        return 0.0, 0.0
    bandwidth = profile_of(device_index).hbm_bandwidth
    tile_seconds = 2 * configuration.slot_bytes / bandwidth
    return bandwidth / window.link.direct_bandwidth, _PIECE_SECONDS / tile_seconds


def _sweep_tokens(
    problem: AttentionProblem,
    configuration: AttentionConfiguration,
    caches: tuple[CachedTensor, CachedTensor],
    window: Window | None,
) -> int:
    if window is None or window.link.direct_bandwidth > FASTEST_SWEPT:
        return NO_SWEEP
    return configuration.sweep_tokens(problem, *(byte_strides(each.tensor) for each in caches))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=16)
def _sm_count(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count

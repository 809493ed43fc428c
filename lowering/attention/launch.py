"""Launches of `tiered_attention`: arguments packed as kernels/attention/arguments.cuh has."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.kernel import load
from dak_inductor.cuda_runtime.launch_words import words_for
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.window import window_of
from dak_inductor.lowering.attention.configuration import THREADS, AttentionConfiguration
from dak_inductor.lowering.attention.problem import AttentionMasking, AttentionProblem
from dak_inductor.lowering.attention.tensor_maps import byte_strides, cache_maps

_CACHE = struct.Struct("<5Q")
_REST = struct.Struct("<7Q3Q8I2f")
_LOG2_E = math.log2(math.e)


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
        return _CACHE.pack(record, offset, batch, heads, tokens)


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
    units = configuration.units(problem)
    # a slot for each unit and each run of both lines
    slots = 2 * units + ctas * configuration.teams + 2
    partials = torch.empty(
        slots * configuration.slot_floats(problem), dtype=torch.float32, device=query.device
    )
    stream = torch.cuda.current_stream(index).cuda_stream
    counters = words_for(index, units * configuration.warpgroups, stream)
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=16)
def _sm_count(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count

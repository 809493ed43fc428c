"""From a call of a dak:: operator to a launch, or to the reason why there is none."""

from __future__ import annotations

import logging
from functools import lru_cache, partial

import torch
from torch import Tensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import reads
from dak_inductor.lowering.linear import ring, tensor_maps
from dak_inductor.lowering.linear.configuration import (
    DECODE_TOKENS,
    MAXIMUM_TOKENS,
    LinearConfiguration,
    choose,
    direct_seconds,
)
from dak_inductor.lowering.linear.launch import Operand, launch, profile_of, worker_count
from dak_inductor.lowering.linear.problem import DTYPES, Activation, LinearProblem
from dak_inductor.lowering.linear.ring_plan import prefers_ring
from dak_inductor.lowering.refusals import HOPPER, capability, log_once

log = logging.getLogger(__name__)
_log_once = partial(log_once, log, "a stock kernel reads a tiered weight: %s")

_ACTIVATIONS = {
    "none": Activation.NONE,
    "silu": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_tanh": Activation.GELU_TANH,
}


def run(
    x: Tensor,
    weights: tuple[Tensor, ...],
    *,
    biases: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor | None:
    """activation(x W^T + bias) (* (x up^T + bias)) + residual, [..., N]; None where it is refused.

    Args:
        x: [..., K].
        weights: one, or gate and up; [N, K] for layout "out_in", [K, N] for "in_out".
        biases: [N] or None for each weight.
        residual: [..., N] or None.

    A weight with nothing tiered is declined without a word: the stock op serves it. Other reasons
    are logged once each.
    """
    buffers = [address_table.lookup(weight.data_ptr()) for weight in weights]
    if all(buffer is None for buffer in buffers):
        return None
    if x.dim() and x.numel() > MAXIMUM_TOKENS * x.shape[-1]:
        return _staged(x, weights, buffers, biases, residual, activation, layout)
    operands = tuple(
        Operand(weight, None if bias is None else _vectors(bias), buffer)
        for weight, bias, buffer in zip(weights, biases, buffers, strict=True)
        if buffer is not None
    )
    reason = _refusal(x, weights, operands, biases, residual)
    if reason is None:
        rows = x.reshape(-1, x.shape[-1])
        if tensor_maps.refusal(rows) is not None:
            rows = rows.contiguous()
        in_out = layout == "in_out"
        n = weights[0].shape[1 if in_out else 0]
        gated = len(weights) == 2
        problem = LinearProblem(rows.shape[0], n, rows.shape[1], x.dtype, gated, in_out)
        remote = tuple(_remote_bytes(operand) for operand in operands)
        tier = operands[0].buffer.tier
        configuration = configuration_of(problem, remote, tier, x.device.index)
        if configuration is not None:
            out = torch.empty((problem.m, n), dtype=x.dtype, device=x.device)
            added = None if residual is None else _vectors(residual.reshape(-1, n))
            launch(
                problem,
                configuration,
                x=rows,
                operands=operands,
                residual=added,
                activation=_ACTIVATIONS[activation],
                out=out,
            )
            return out.view(*x.shape[:-1], n)
        return _staged(x, weights, buffers, biases, residual, activation, layout)
    _log_once(reason)
    return None


def _staged(
    x: Tensor,
    weights: tuple[Tensor, ...],
    buffers: list[TieredBuffer | None],
    biases: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor | None:
    """`run` through the ring, which takes any number of tokens."""
    reason = ring.refusal(x, weights, biases=biases, residual=residual, layout=layout)
    if reason is not None:
        _log_once(reason)
        return None
    return ring.run(
        x,
        weights,
        tuple(buffers),
        biases=biases,
        residual=residual,
        activation=activation,
        layout=layout,
    )


def _remote_bytes(operand: Operand) -> int:
    return reads.dense_read(operand.buffer, operand.tensor).remote


@lru_cache(maxsize=4096)
def configuration_of(
    problem: LinearProblem, remote_bytes: tuple[int, ...], tier: str, device_index: int
) -> LinearConfiguration | None:
    """What the kernel runs `problem` with; None where staging is faster or nothing fits.

    `remote_bytes` are those of each weight. They decide on speed only: whatever is chosen stays
    right when pages move.
    """
    if problem.m > MAXIMUM_TOKENS:
        return None
    profile = profile_of(device_index)
    configuration = choose(
        problem,
        profile,
        lambda configuration: worker_count(configuration, device_index),
        all_local=not any(remote_bytes),
    )
    if configuration is None or problem.m <= DECODE_TOKENS:
        return configuration
    link = profile.link(tier)
    direct = direct_seconds(
        problem,
        configuration,
        profile,
        link,
        workers=worker_count(configuration, device_index),
        remote_bytes=sum(remote_bytes),
    )
    staged = prefers_ring(problem, remote_bytes, profile, link, direct)
    return None if staged else configuration


def _vectors(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of which the kernel can read 16 bytes at a time."""
    aligned = tensor.data_ptr() % tensor_maps.ALIGNMENT == 0 and tensor.stride(-1) == 1
    if aligned and all(stride % 8 == 0 for stride in tensor.stride()[:-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _refusal(
    x: Tensor,
    weights: tuple[Tensor, ...],
    operands: tuple[Operand, ...],
    biases: tuple[Tensor | None, ...],
    residual: Tensor | None,
) -> str | None:
    """Why the kernel does not take this call."""
    tensors = [x, *weights, *(bias for bias in biases if bias is not None)]
    if residual is not None:
        tensors.append(residual)
    if len(operands) < len(weights):
        return "one of gate and up is offloaded and the other is not"
    if len({operand.buffer.tier for operand in operands}) > 1:
        return "gate and up lie in different remote tiers"
    if any(not operand.buffer.device_record for operand in operands):
        return "the weight's tier has no record in device memory"
    if any(tensor.dtype != x.dtype for tensor in tensors) or x.dtype not in DTYPES:
        return f"its operands are not all bfloat16 or all float16 (x is {x.dtype})"
    if any(tensor.device != x.device for tensor in tensors):
        return "its operands are on different devices"
    if capability(x.device.index) != HOPPER:
        return "the GPU is no Hopper card (compute capability 9.0)"
    if x.numel() == 0:
        return "it has no tokens"
    for weight in weights:
        if weight.dim() != 2 or weight.shape != weights[0].shape:
            return "its weights are not matrices of one shape"
        if any(size == 0 or size % 8 for size in weight.shape):
            return f"the weight is {tuple(weight.shape)}; multiples of 8 are needed"
        reason = tensor_maps.refusal(weight)
        if reason is not None:
            return f"of the weight, {reason}"
    return None

"""The operands of one call of a dak:: product, and how the kernel and the ring compute it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import reads
from dak_inductor.lowering.linear import ring, tensor_maps
from dak_inductor.lowering.linear.call_facts import CallFacts
from dak_inductor.lowering.linear.configuration import DECODE_TOKENS, LinearConfiguration
from dak_inductor.lowering.linear.launch import CopiedRows, LinearLaunch, Operand
from dak_inductor.lowering.linear.open_step import in_graph
from dak_inductor.lowering.linear.operands import Operands
from dak_inductor.lowering.linear.problem import Activation, LinearProblem
from dak_inductor.lowering.marks import MARKS

_ACTIVATIONS = {
    "none": Activation.NONE,
    "silu": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_tanh": Activation.GELU_TANH,
}


@dataclass(eq=False, slots=True)
class Product:
    """activation(x W^T + bias) (* (x up^T + bias)) + residual, [..., N]. Nothing of it changes; to
    say so to Python takes it 2 us for each.

    x: [..., K].
    weights: one, or gate and up; [N, K] for layout "out_in", [K, N] for "in_out".
    buffers: of each weight the buffer that holds it; None: it is all local.
    biases: [N] or None for each weight.
    residual: [..., N] or None.
    key: that of its operands, worked out where it is not given.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    buffers: tuple[TieredBuffer | None, ...]
    biases: tuple[Tensor | None, ...]
    residual: Tensor | None
    activation: str
    layout: str
    key: Hashable = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.key is None:
            of = self.x, self.weights, self.biases, self.residual, self.activation, self.layout
            self.key = Operands(*of).key()

    @property
    def tensors(self) -> list[Tensor]:
        """All operands."""
        optional = (*self.biases, self.residual)
        return [self.x, *self.weights, *(each for each in optional if each is not None)]

    def facts(self) -> CallFacts:
        """What its time depends on. At least one weight is in a buffer."""
        in_out = self.layout == "in_out"
        k = self.x.shape[-1]
        n = self.weights[0].shape[1 if in_out else 0]
        gated = len(self.weights) == 2
        problem = LinearProblem(self.x.numel() // k, n, k, self.x.dtype, gated, in_out)
        held = [buffer for buffer in self.buffers if buffer is not None]
        remote = (
            0 if buffer is None else reads.dense_read(buffer, weight).remote
            for weight, buffer in zip(self.weights, self.buffers, strict=True)
        )
        return CallFacts(
            problem,
            tuple(remote),
            held[0].tier,
            self.x.device.index,
            self.activation,
            any(bias is not None for bias in self.biases),
            self.residual is not None,
            in_graph() and problem.m <= DECODE_TOKENS,
        )

    def launch(self, problem: LinearProblem, configuration: LinearConfiguration) -> LinearLaunch:
        """The kernel, ready for calls with this one's key. All weights are in buffers."""
        biases = [None if bias is None else _vectors(bias) for bias in self.biases]
        operands = tuple(
            Operand(weight, bias, buffer, owns_bias=bias is not given)
            for weight, given, bias, buffer in zip(
                self.weights, self.biases, biases, self.buffers, strict=True
            )
            if buffer is not None
        )
        activation = _ACTIVATIONS[self.activation]
        return LinearLaunch(problem, configuration, operands, activation, self.x.device)

    @property
    def may_launch_again(self) -> bool:
        """Whether a `launch` of this call reads no copies that are made for it."""
        return all(bias is None or _vectors(bias) is bias for bias in self.biases)

    def direct(self, problem: LinearProblem, launch: LinearLaunch) -> Tensor:
        """By the kernel."""
        out = torch.empty((problem.m, problem.n), dtype=problem.dtype, device=self.x.device)
        with MARKS.of_buffers("direct", self.buffers):
            self.launch_into(out, problem, launch)
        return out.view(*self.x.shape[:-1], problem.n)

    def launch_into(
        self,
        out: Tensor,
        problem: LinearProblem,
        launch: LinearLaunch,
        copied: Sequence[CopiedRows | None] = (),
    ) -> None:
        """Into [M, N] with contiguous rows; `copied` as of a `LinearLaunch`."""
        rows = self.x.reshape(-1, problem.k)
        if tensor_maps.refusal(rows) is not None:
            rows = rows.clone(memory_format=torch.contiguous_format)
        added = None if self.residual is None else _vectors(self.residual.reshape(-1, problem.n))
        launch(rows, added, out, copied)

    def staged(self) -> Tensor:
        """Through the ring, which takes any number of tokens."""
        with MARKS.of_buffers("ring", self.buffers):
            return ring.run(
                self.x,
                self.weights,
                self.buffers,
                biases=self.biases,
                residual=self.residual,
                activation=self.activation,
                layout=self.layout,
            )

    def ring_refusal(self) -> str | None:
        """Why the ring does not take it; None where it does."""
        return ring.refusal(
            self.x,
            self.weights,
            biases=self.biases,
            residual=self.residual,
            layout=self.layout,
        )


def _vectors(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of which the kernel can read 16 bytes at a time."""
    aligned = tensor.data_ptr() % tensor_maps.ALIGNMENT == 0 and tensor.stride(-1) == 1
    if aligned and all(stride % 8 == 0 for stride in tensor.stride()[:-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)

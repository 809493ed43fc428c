"""Products of many tokens with weights of which a part is remote, staged in device memory.

Remote bytes cross the link once, by copy engine on a stream of their own, into the slots of a ring;
the stock GEMM multiplies the local part in place and then slot after slot, each into its columns of
the result (`ring_plan` says in which parts, `staging` keeps the order).

A captured graph keeps the parts of the split at capture. After a move its results stay right, since
copies and products read through addresses; only the speed suffers. Each replay counts one read of
each byte, by the split of that moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.current_stream import current_capture
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import staging
from dak_inductor.lowering.element_types import DTYPES
from dak_inductor.lowering.gpu_profile import profile_of
from dak_inductor.lowering.linear import ring_plan
from dak_inductor.lowering.linear.copy_engine import copy
from dak_inductor.lowering.linear.counted_reads import count, counted_reads
from dak_inductor.lowering.linear.epilogue import finish
from dak_inductor.lowering.linear.operands import Operands
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_calls import choose_for_calls
from dak_inductor.lowering.linear.ring_plan import Part, Residency, RingPlan
from dak_inductor.lowering.marks import MARKS
from dak_inductor.lowering.queues import Queues, queues_of
from dak_inductor.lowering.slots import allocate


@dataclass(frozen=True, slots=True)
class Products:
    """out_w [M, N] = x [M, K] times weight w (+ bias w), in parts."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    residency: tuple[Residency, ...]
    in_out: bool

    def stage(self, part: Part, slot: Tensor, stream: int) -> None:
        """Copy the part of its weight: rows that begin in local memory, and remote rows.

        The driver takes a copy for what its first byte is. So a row that the split cuts goes with
        the local ones: it is one of them, and a copy of its own costs 5 to 10 us.
        """
        source, target = self._stored(part), self._held(part, slot)
        first = 0 if self.in_out else part.start
        rows = source.shape[0]
        cut = min(max(self.residency[part.weight].remote - first, 0), rows)
        with MARKS.of_operands("copy", self.weights[part.weight : part.weight + 1]):
            if cut:
                copy(target[:cut], source[:cut], stream)
            if cut < rows:
                copy(target[cut:], source[cut:], stream)

    def compute(self, part: Part, slot: Tensor | None) -> None:
        """The product, from its slot or where it lies.

        Columns of a matrix with contiguous rows are an output that cuBLAS writes directly.
        """
        matrix = self._stored(part) if slot is None else self._held(part, slot)
        factor = matrix if self.in_out else matrix.t()
        out, bias = self.outputs[part.weight], self.biases[part.weight]
        if part.features < out.shape[1]:
            out = out[:, part.start : part.stop]
            bias = None if bias is None else bias[part.start : part.stop]
        if bias is None:
            torch.mm(self.x, factor, out=out)
        else:
            torch.addmm(bias, self.x, factor, out=out)

    def _stored(self, part: Part) -> Tensor:
        weight = self.weights[part.weight]
        if self.in_out:
            return weight[:, part.start : part.stop]
        return weight[part.start : part.stop]

    def _held(self, part: Part, slot: Tensor) -> Tensor:
        k, features = self.x.shape[1], part.features
        shape = (k, features) if self.in_out else (features, k)
        return slot[: k * features].view(shape)


class PreparedRing:
    """Calls of one product with the same weights at the splits of this moment.

    Args:
        problem: one of its calls.
        weights, buffers: as of `run`.
        in_graph: the calls are captured.
    """

    def __init__(
        self,
        problem: LinearProblem,
        weights: tuple[Tensor, ...],
        buffers: tuple[TieredBuffer | None, ...],
        device: torch.device,
        *,
        in_graph: bool,
    ) -> None:
        self._problem = problem
        self._residency = tuple(map(_residency, weights, buffers))
        tiers = frozenset(buffer.tier for buffer in buffers if buffer is not None)
        self._plan = plan_of(problem, self._residency, device.index, tiers, in_graph=in_graph)
        self._slots = [features * problem.k for features in self._plan.slots]
        self._counted = counted_reads(weights)

    def __call__(self, call: Operands) -> Tensor:
        """One call, rounded as the stock composition does. Raises DriverError where a copy cannot
        be queued."""
        if not torch.is_grad_enabled():
            return self._run(call)
        with torch.no_grad():
            return self._run(call)

    def _run(self, call: Operands) -> Tensor:
        problem, plan = self._problem, self._plan
        x, weights = call.x, call.weights
        rows = token_rows(x)
        outputs = tuple([x.new_empty((problem.m, problem.n)) for _ in weights])
        slots = allocate(self._slots, x)
        products = Products(rows, weights, call.biases, outputs, self._residency, problem.in_out)
        queues = queues_of(x.device)
        if plan.in_line:
            queues = Queues(queues.main, queues.main)
        counts = partial(count, self._counted, weights)
        staging.issue(plan.parts, products, slots, queues, counts, copy_bound=plan.copy_bound)
        result = finish(outputs, call.activation, call.residual)
        return result.view(*x.shape[:-1], problem.n)


def run(
    x: Tensor,
    weights: tuple[Tensor, ...],
    buffers: tuple[TieredBuffer | None, ...],
    *,
    biases: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor:
    """activation(x W^T + bias) (* (x up^T + bias)) + residual, [..., N], on the current stream.

    Rounds where the stock composition does. `refusal` must have found none.

    Args:
        x: [..., K].
        weights: one, or gate and up; [N, K] for layout "out_in", [K, N] for "in_out".
        buffers: of each weight the buffer that holds it; None: it is all local.
        biases: [N] or None for each weight.
        residual: [..., N] or None.

    Raises DriverError where a copy cannot be queued.
    """
    in_out, k = layout == "in_out", x.shape[-1]
    n = weights[0].shape[1 if in_out else 0]
    problem = LinearProblem(x.numel() // k, n, k, x.dtype, len(weights) == 2, in_out)
    in_graph = current_capture(x.device) != 0
    prepared = PreparedRing(problem, weights, buffers, x.device, in_graph=in_graph)
    return prepared(Operands(x, weights, biases, residual, activation, layout))


def token_rows(x: Tensor) -> Tensor:
    """The input as [M, K] with contiguous rows, copied once and not in each product."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
        return rows.contiguous()
    return rows


@lru_cache(maxsize=4096)
def plan_of(
    problem: LinearProblem,
    residency: tuple[Residency, ...],
    device_index: int,
    tiers: frozenset[str],
    *,
    in_graph: bool,
) -> RingPlan:
    """By which a call runs; `tiers` are those of its weights, `in_graph`: it is being captured."""
    profile = profile_of(device_index)
    links = (profile.link(tier) for tier in tiers or {"cpu"})
    slowest = min(links, key=lambda link: link.copy_bandwidth)
    choose = ring_plan.choose if in_graph else choose_for_calls
    return choose(problem, residency, profile, slowest)


def _residency(weight: Tensor, buffer: TieredBuffer | None) -> Residency:
    rows, columns = weight.shape
    if buffer is None:
        return Residency(rows, rows)
    size = weight.element_size()
    pitch, width = weight.stride(0) * size, columns * size
    local = buffer.split - (weight.data_ptr() - buffer.address)
    if rows == 1:
        pitch = width
    first_cut = (local - width) // pitch + 1  # the first row that does not end in the local part
    first_remote = -(-local // pitch)  # the first that does not start there
    return Residency(min(max(first_cut, 0), rows), min(max(first_remote, 0), rows))


def refusal(
    x: Tensor,
    weights: tuple[Tensor, ...],
    *,
    biases: tuple[Tensor | None, ...],
    residual: Tensor | None,
    layout: str,
) -> str | None:
    """Why the ring does not take this call; None where it does."""
    tensors = [x, *weights, *(bias for bias in biases if bias is not None)]
    if residual is not None:
        tensors.append(residual)
    if x.dtype not in DTYPES or any(tensor.dtype != x.dtype for tensor in tensors):
        return f"its operands are not all bfloat16 or all float16 (x is {x.dtype})"
    if any(tensor.device != x.device for tensor in tensors):
        return "its operands are on different devices"
    if x.dim() == 0 or x.numel() == 0:
        return "it has no tokens"
    for weight in weights:
        if weight.dim() != 2 or weight.shape != weights[0].shape or weight.numel() == 0:
            return "its weights are not matrices of one shape"
        if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
            return "the weight's rows are not contiguous"
    k_axis = 0 if layout == "in_out" else 1
    n = weights[0].shape[1 - k_axis]
    if weights[0].shape[k_axis] != x.shape[-1]:
        return f"x has {x.shape[-1]} columns, the weight {weights[0].shape[k_axis]}"
    if any(bias is not None and bias.shape != (n,) for bias in biases):
        return f"a bias is no vector of {n}"
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        return f"a residual of shape {tuple(residual.shape)}"
    return None

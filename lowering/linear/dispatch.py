"""From a call of a dak:: operator to the way that serves it, or to the reason why none does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import partial

from torch import Tensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.current_stream import current_capture
from dak_inductor.lowering import device_counters
from dak_inductor.lowering.element_types import DTYPES
from dak_inductor.lowering.linear import stopwatch, tensor_maps
from dak_inductor.lowering.linear.call_facts import CallFacts
from dak_inductor.lowering.linear.configuration import MAXIMUM_TOKENS
from dak_inductor.lowering.linear.launch import LinearLaunch
from dak_inductor.lowering.linear.open_step import current, spares_host
from dak_inductor.lowering.linear.operands import Operands
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.linear.routes import ROUTES
from dak_inductor.lowering.linear.trials import TRIALS
from dak_inductor.lowering.linear.ways import Way, WayName, ways_of
from dak_inductor.lowering.marks import MARKS
from dak_inductor.lowering.refusals import HOPPER, capability, log_once

log = logging.getLogger(__name__)
_log_once = partial(log_once, log, "a stock kernel reads a tiered weight: %s")


def run(
    x: Tensor,
    weights: tuple[Tensor, ...],
    *,
    biases: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str,
    layout: str,
    stock: Callable[[], Tensor] | None = None,
) -> Tensor | None:
    """activation(x W^T + bias) (* (x up^T + bias)) + residual, [..., N]; None where the caller is
    to run its stock operator, because this is refused or because that is faster.

    Args:
        x: [..., K].
        weights: one, or gate and up; [N, K] for layout "out_in", [K, N] for "in_out".
        biases: [N] or None for each weight.
        residual: [..., N] or None.
        stock: the stock operator with its count, for trials; without it they do not include it.

    A weight with nothing tiered is declined without a word: the stock op serves it. Other reasons
    are logged once each.
    """
    step, state = current(), TRIALS.state
    captured = current_capture(x.device) != 0
    spared = spares_host() and not captured
    call = Operands(x, weights, biases, residual, activation, layout)
    key, product = call.key(), None
    if step is not None:
        product = _product(call, key)
        served = None if product is None else step.serve(product)
        if served is not None:
            return served
    route = ROUTES.find(key, state, spared=spared)
    if route is not None:  # what refuses a call is in its key
        served = route.at_once(call, captured=captured)
        if served is not None:
            return served
    product = product or _product(call, key)
    if product is None:
        return None
    if route is not None:
        return _by(route.way, product, route.problem, route.launch)
    if x.dim() and x.numel() > MAXIMUM_TOKENS * x.shape[-1]:
        return _by_ring(product, spared=spared)
    if _is_refused(kernel_refusal(product)):
        return None
    return _fastest(product, stock, measures=step is None or step.measures, spared=spared)


def _product(call: Operands, key: Hashable) -> Product | None:
    """None where nothing of it is tiered."""
    buffers = tuple([address_table.lookup(weight.data_ptr()) for weight in call.weights])
    return Product(call.x, call.weights, buffers, *call[2:], key) if any(buffers) else None


def _by_ring(product: Product, *, spared: bool) -> Tensor | None:
    """Of more tokens than the kernel takes."""
    if _is_refused(product.ring_refusal()):
        return None
    facts = product.facts()
    way = _in_place("ring", facts)
    ROUTES.keep(product, way, facts.problem, None, TRIALS.state, spared=spared)
    return _by(way, product, facts.problem, None)


def _in_place(way: WayName, facts: CallFacts) -> WayName:
    """With nothing remote the ring is the stock operator, which takes the host less."""
    return "stock" if way == "ring" and not any(facts.remote_bytes) else way


def _fastest(
    product: Product, stock: Callable[[], Tensor] | None, *, measures: bool, spared: bool
) -> Tensor | None:
    """By the way that trials and estimates choose; None for the stock operator.

    Args:
        measures: a trial may run.
        spared: the host's time counts.
    """
    facts = product.facts()
    ways = ways_of(facts)
    if any(way.name == "ring" for way in ways) and _is_refused(product.ring_refusal()):
        return None
    runs: dict[WayName, Callable[[], Tensor | None]] = {
        way.name: partial(_compute, product, facts.problem, way)
        for way in ways
        if way.name != "stock"
    }
    if stock is not None:
        runs["stock"] = stock
    ways = tuple(way for way in ways if way.name in runs)

    def measure() -> tuple[float, ...]:
        with MARKS.of_buffers("trial", product.buffers), device_counters.kept(product.weights):
            timed = [runs[way.name] for way in ways]
            return stopwatch.seconds_of(timed, product.x.device, in_graph=facts.in_graph)

    way = TRIALS.choose(facts, ways, measure) if measures else TRIALS.current(facts, ways)
    if spared:
        way = TRIALS.sparing(facts, ways)
    launch = _launch(product, facts.problem, way)
    name = _in_place(way.name, facts)
    if TRIALS.is_settled(facts, ways) and (launch is None or product.may_launch_again):
        ROUTES.keep(product, name, facts.problem, launch, TRIALS.state, spared=spared)
    return _by(name, product, facts.problem, launch)


def way_of(product: Product) -> WayName:
    """What serves such a call as things are: a trial's choice, else the estimates'."""
    facts = product.facts()
    ways = ways_of(facts)
    reason = None if facts.problem.m > MAXIMUM_TOKENS else kernel_refusal(product)
    if reason is None and any(way.name == "ring" for way in ways):
        reason = product.ring_refusal()
    if reason is not None:
        return "stock"
    return _in_place(TRIALS.current(facts, ways).name, facts)


def _compute(product: Product, problem: LinearProblem, way: Way) -> Tensor | None:
    return _by(way.name, product, problem, _launch(product, problem, way))


def _launch(product: Product, problem: LinearProblem, way: Way) -> LinearLaunch | None:
    """The kernel's; None for other ways."""
    return None if way.configuration is None else product.launch(problem, way.configuration)


def _by(
    way: WayName, product: Product, problem: LinearProblem, launch: LinearLaunch | None
) -> Tensor | None:
    if way == "stock":
        return None
    return product.staged() if launch is None else product.direct(problem, launch)


def _is_refused(reason: str | None) -> bool:
    if reason is not None:
        _log_once(reason)
    return reason is not None


def kernel_refusal(product: Product) -> str | None:
    """Why no way but the stock operator takes this call of few enough tokens."""
    x, weights = product.x, product.weights
    buffers = [buffer for buffer in product.buffers if buffer is not None]
    tensors = product.tensors
    if len(buffers) < len(weights):
        return "one of gate and up is offloaded and the other is not"
    if len({buffer.tier for buffer in buffers}) > 1:
        return "gate and up lie in different remote tiers"
    if any(not buffer.device_record for buffer in buffers):
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

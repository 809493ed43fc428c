"""One spelling per operator: a Dynamo graph becomes a graph of ATen ops before dispatch.

`F.linear`, `nn.Linear`, `x @ w.t()` and `torch.addmm` reach the backend spelled in many ways.
Tracing the graph with `make_fx(pre_dispatch=True)` leaves one spelling each, above autograd and
decompositions, so that `aten.linear` is still one op. Products with a parameter in rarer spellings
(einsum) are taken apart on the way where it may be offloaded, see `spellings`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, maybe_get_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dak_inductor.refusal import Refusal
from dak_inductor.spellings import respellings

_GRAPH_ATTRIBUTES = ("_param_name_to_source", "_backend_id")


def normalise(graph_module: GraphModule, *, whole: Collection[int] = ()) -> GraphModule | Refusal:
    """The same graph in ATen ops, or the reason why it cannot be traced again.

    The placeholders keep their order, Dynamo sources and metadata, so that caches, guards and CUDA
    graphs of Inductor work on the result as on the original. The original is not changed.

    Args:
        whole: indices of graph inputs known to lie in no tier. Products with such a parameter stay
            as they are spelled.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if (reason := _obstacle(graph_module, placeholders)) is not None:
        return Refusal(node="graph", target="whole graph", reason=reason)
    fake_mode = _fake_mode(placeholders)
    if fake_mode is None:
        return Refusal(node="graph", target="whole graph", reason="no graph input is a tensor")
    inputs = [node.meta["example_value"] for node in placeholders]
    weights = [
        value
        for index, value in enumerate(inputs)
        if isinstance(value, torch.nn.Parameter) and index not in whole
    ]
    try:
        with fake_mode, torch.fx.traceback.preserve_node_meta():
            traced = make_fx(
                torch.fx.Interpreter(graph_module).run,
                decomposition_table=respellings(weights, autocast=_autocasts(graph_module)),
                pre_dispatch=True,
                tracing_mode="real",
                _allow_non_fake_inputs=True,
            )(*inputs)
    except (
        Exception
    ) as error:  # any operator may refuse tracing; the graph still runs, un-normalised
        reason = f"tracing to ATen failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        return Refusal(node="graph", target="whole graph", reason=reason)
    if (constant := _captured_input(traced)) is not None:
        opener = (
            "a subclass input is opened by its operators"
            if any(map(is_traceable_wrapper_subclass, inputs))
            else "a function transform (vmap, a scan) hides a tensor of the graph"
        )
        reason = f"{opener}: {constant} would become a constant"
        return Refusal(node="graph", target="whole graph", reason=reason)
    _copy_metadata(graph_module, placeholders, traced)
    return traced


def _obstacle(graph_module: GraphModule, placeholders: list[Node]) -> str | None:
    for node in placeholders:
        if "example_value" not in node.meta:
            return f"graph input {node.name} has no example value"
    for node in graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"higher-order operator {node.target.name()} is not traced again"
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.is_nested:
            return f"{node.name} is a nested tensor, for which our operators have no form"
        if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymBool, torch.SymFloat)) and (
            free_unbacked_symbols(value)
        ):
            return f"{node.name} has a size that depends on data"
    return None


def _autocasts(graph_module: GraphModule) -> bool:
    around = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    return around or any(
        "autocast" in getattr(node.target, "__name__", "") for node in graph_module.graph.nodes
    )


def _captured_input(traced: GraphModule) -> str | None:
    """A constant of the traced graph that is no data but part of an input.

    The operators of a wrapper subclass (torchao's) that decompose themselves reach for the tensors
    inside, which the trace has no input for.
    """
    for node in traced.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(traced, node.target, None), FakeTensor):
            return str(node.target)
    return None


def _fake_mode(placeholders: list[Node]) -> FakeTensorMode | None:
    for node in placeholders:
        value = node.meta["example_value"]
        if isinstance(value, torch.Tensor) and (mode := maybe_get_fake_mode(value)) is not None:
            return mode
    return None


def _copy_metadata(source: GraphModule, placeholders: list[Node], traced: GraphModule) -> None:
    new_placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for old, new in zip(placeholders, new_placeholders, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        new.meta.update({key: value for key, value in old.meta.items() if key != "grapharg"})
    copy_graph_attributes(source, traced)


def copy_graph_attributes(source: GraphModule, target: GraphModule) -> None:
    """What Dynamo hangs on a graph module and AOTAutograd looks for, onto a graph made from it.

    Constants that tracing lifted become plain attributes: AOTAutograd wants a Dynamo source for
    each buffer.
    """
    target.meta.update(source.meta)
    for name in _GRAPH_ATTRIBUTES:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    known = getattr(source, "_param_name_to_source", {})
    for name in [name for name in target._buffers if name not in known]:
        target.__dict__[name] = target._buffers.pop(name)


def value_of(node: Any) -> Any:
    """What a node computes, as a fake value: `val` from the trace, or Dynamo's example value."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("val", node.meta.get("example_value"))

"""What the host does before and after a compiled step writes a KV cache.

Pages and slots have to be there before a step runs, and only the host can make them. Eager code
does that in `update`. A trace leaves a note in the graph in its place:

    dak::kv_step(keys!, values!, lengths!, starts!, place!, tokens, written) -> ()
        `tokens` more are coming for the layer with these keys; `written`: count them as written.

The backend takes the notes out of the graph (`take_steps`), and its callable does what they say
around each call (`StepRunner`), where replays of CUDA graphs pass too. Under another backend a
note runs in its place, which is why it claims to write whatever the host may change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dak_inductor.errors import CacheError
from dak_inductor.kv_cache_layer_storage import LayerStorage, storage_numbered, storage_of
from dak_inductor.kv_cache_storage import owner_of
from dak_inductor.normalise import value_of
from dak_inductor.quantity_text import count_text
from dak_inductor.sizes import Evaluator, Size, size_of

_library = torch.library.Library("dak", "FRAGMENT")
_library.define(
    "kv_step(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, Tensor(d!) starts, "
    "Tensor(e!) place, SymInt tokens, bool written) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True, slots=True)
class CacheStep:
    """One note: `tokens` more for the layer whose keys are graph input `operand`."""

    operand: int
    tokens: Size
    written: bool


class StepRunner:
    """Carries out the notes of one compiled graph."""

    def __init__(self, steps: Sequence[CacheStep]) -> None:
        self.steps = tuple(steps)
        self._static = all(isinstance(step.tokens, int) for step in steps)

    @property
    def operands(self) -> tuple[int, ...]:
        """Graph inputs that are keys of a cache."""
        return tuple(dict.fromkeys(step.operand for step in self.steps))

    def before(
        self, arguments: Sequence[Any], values: Callable[[], dict[str, int]]
    ) -> list[tuple[LayerStorage, int]]:
        """Prepare all layers for the call; returns what `after` has to count.

        Raises ContextLengthError, HostMemoryError, DeviceMemoryError, CacheError; the cache is then
        as it was.
        """
        if not self.steps:
            return []
        evaluate = Evaluator({} if self._static else values())
        written: list[tuple[LayerStorage, int]] = []
        for step in self.steps:
            layer = storage_of(arguments[step.operand])
            if layer is None:
                continue  # a copy of a cache, or one that was freed: nothing of ours
            tokens = evaluate(step.tokens)
            announce(layer, tokens)
            if step.written:
                written.append((layer, tokens))
        return written

    @staticmethod
    def after(written: Sequence[tuple[LayerStorage, int]]) -> None:
        """Count what the call has written."""
        for layer, tokens in written:
            layer.advance(tokens)


def announce(layer: LayerStorage, tokens: int) -> None:
    """Prepare the cache of `layer` for a compiled step that adds `tokens`. Raises as `before`."""
    if layer.is_long(tokens) and layer.tokens:
        raise CacheError(
            f"{count_text(tokens, 'token')} at once behind {layer.tokens}: a compiled step on a "
            f"sliding window of {layer.shape.window} takes at most {layer.room} then. Pass "
            f"prefill_chunk_size={layer.room} to generate, or make the cache with "
            f"dak.kv_cache(..., prefill_chunk={tokens})"
        )
    length = layer.tokens + tokens
    owner_of(layer).prepare(length, tokens)
    layer.note_length(length, tokens)


def take_steps(graph_module: GraphModule) -> tuple[CacheStep, ...]:
    """Take the notes out of a normalised graph, in place."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    index = {node: position for position, node in enumerate(placeholders)}
    steps: list[CacheStep] = []
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.ops.dak.kv_step.default:
            continue
        keys, tokens, written = node.args[0], node.args[5], node.args[6]
        operand = _input_behind_writes(keys)
        if operand not in index:
            continue  # keys that are computed in the graph: the note runs where it stands
        count = size_of(value_of(tokens) if isinstance(tokens, Node) else tokens)
        steps.append(CacheStep(index[operand], count, bool(written)))
        graph_module.graph.erase_node(node)
    if steps:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return tuple(steps)


def _input_behind_writes(node: Any) -> Any:
    """The graph input of which `node` is the same tensor after in-place updates."""
    while isinstance(node, Node) and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.name.endswith("_"):
            return node
        node = node.args[0]
    return node


def _step(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    starts: Tensor,
    place: Tensor,
    tokens: int,
    written: bool,
) -> None:
    layer = storage_of(keys)
    if layer is None:  # functionalised graphs may pass copies, and copy them back afterwards
        layer = storage_numbered(place)
    if layer is None:
        return
    announce(layer, tokens)
    if written:
        layer.advance(tokens)
    own = (layer.keys, layer.values, layer.lengths, layer.starts, layer.place)
    for passed, kept in zip((keys, values, lengths, starts, place), own, strict=True):
        if passed.data_ptr() != kept.data_ptr():
            passed.copy_(kept)


def _step_traced(*_: Any) -> None:
    return None


for _device in ("CPU", "CUDA"):
    _library.impl("kv_step", _step, _device)
torch.library.register_fake("dak::kv_step", _step_traced, lib=_library)

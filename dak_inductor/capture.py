"""The graphs of prefill and decode, captured without a GPU and without weights: tensors on the
meta device.

`dak plan` sees through this what the backend would see on the machine that the plan is for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from dak_inductor.errors import ModelError
from dak_inductor.normalise import normalise
from dak_inductor.op_table import OpTable, build_op_table
from dak_inductor.refusal import Refusal


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[OpTable]:
    """The operator tables of every graph that Dynamo makes of one call, in call order.

    The call runs on whatever device its tensors are on; on the meta device it computes nothing.
    """
    tables: list[OpTable] = []

    def record(graph_module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graph = normalise(graph_module)
        if isinstance(graph, Refusal):
            tables.append(OpTable((), (graph,), (), (), {}, {}))
        else:
            tables.append(build_op_table(graph))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(function, backend=record, dynamic=False)(*args, **kwargs)
    return tables


def capture_generation(
    model: torch.nn.Module, *, batch: int, prompt: int, new: int
) -> list[tuple[str, OpTable]]:
    """`("prefill", table)` and `("decode", table)` of a transformers model on the meta device.

    Prefill sees [batch, prompt] tokens, decode [batch, 1], with a static cache of prompt + new
    positions; an
    encoder or a model without a cache gives "forward" entries only.

    Raises:
        ModelError: the model's forward cannot be traced without data.
    """
    tokens = _tokens(batch, prompt)
    cache = _static_cache(model, batch, prompt + new)
    if cache is None:
        return [("forward", table) for table in _capture_step(model, input_ids=tokens)]
    extra = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    steps = (("prefill", tokens, 0), ("decode", _tokens(batch, 1), prompt))
    entries: list[tuple[str, OpTable]] = []
    for name, ids, start in steps:
        positions = torch.arange(start, start + ids.shape[1], device="meta").expand(batch, -1)
        tables = _capture_step(
            model,
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        entries.extend((name, table) for table in tables)
    return entries


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.zeros(batch, length, dtype=torch.long, device="meta")


def _capture_step(model: torch.nn.Module, **inputs: Any) -> list[OpTable]:
    try:
        return capture(model, **inputs)
    except Exception as error:  # whatever a model's own code does on tensors without data
        raise ModelError(
            f"{type(model).__name__} cannot be traced on the meta device "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); plan it where it runs, with "
            "dak.offload and dak.explain"
        ) from error


def _static_cache(model: torch.nn.Module, batch: int, length: int) -> Any | None:
    """The cache that `generate(cache_implementation="static")` would make, on the meta device."""
    config = getattr(model, "config", None)
    if (
        config is None
        or not hasattr(model, "generate")
        or getattr(config, "is_encoder_decoder", False)
    ):
        return None
    from transformers import StaticCache

    text = config.get_text_config()
    cache = StaticCache(config=text, max_cache_len=length)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = next(model.parameters()).dtype
    cache.early_initialization(
        batch_size=batch,
        num_heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("meta"),
    )
    return cache

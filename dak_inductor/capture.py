"""The graphs of prefill and decode, captured without a GPU and without weights: tensors on the
meta device.

`dak plan` sees through this what the backend would see on the machine that the plan is for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch.fx import GraphModule

from dak_inductor.epilogues import fuse_epilogues
from dak_inductor.errors import ModelError
from dak_inductor.normalise import normalise
from dak_inductor.op_table import OpTable, build_op_table, with_local_ops
from dak_inductor.refusal import Refusal
from dak_inductor.rewrite import rewrite

_RECOMPILES = 1 << 16


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
            table = build_op_table(graph)
            graph = rewrite(graph, table)
            tables.append(with_local_ops(graph, fuse_epilogues(graph, table)))
        return graph_module.forward

    # Models of one family share code objects, and each one captured here recompiles them.
    limits = {"recompile_limit": _RECOMPILES, "accumulated_recompile_limit": _RECOMPILES}
    with torch.no_grad(), dynamo_config.patch(limits):
        torch.compile(function, backend=record, dynamic=False)(*args, **kwargs)
    return tables


def capture_generation(
    model: torch.nn.Module, *, batch: int, prompt: int, new: int
) -> list[tuple[str, OpTable]]:
    """`("prefill", table)` and `("decode", table)` of a transformers model on the meta device.

    Prefill sees [batch, prompt] tokens, decode [batch, 1], with a static cache of prompt + new
    positions. A model without such a cache gives "forward" entries only: an encoder over the
    prompt or over an image, or an encoder-decoder over the prompt and one new token.

    Raises:
        ModelError: the model's forward cannot be traced without data.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        decoder = {"decoder_input_ids": _tokens(batch, 1)}
        tables = _capture_step(model, input_ids=_tokens(batch, prompt), **decoder)
        return [("forward", table) for table in tables]
    can_generate: Any = getattr(model, "can_generate", None)
    if config is not None and getattr(model, "main_input_name", "") == "pixel_values":
        tables = _capture_step(model, pixel_values=_pixels(model, batch))
        return [("forward", table) for table in tables]
    if config is None or can_generate is None or not can_generate():
        tables = _capture_step(model, input_ids=_tokens(batch, prompt))
        return [("forward", table) for table in tables]
    try:
        return _capture_steps(model, _static_cache(model, batch, prompt + new), batch, prompt)
    except ModelError:
        # Keys and values of another shape than the config tells: let the cache find out itself.
        return _capture_steps(model, _empty_cache(model, prompt + new), batch, prompt)


def _capture_steps(
    model: torch.nn.Module, cache: Any, batch: int, prompt: int
) -> list[tuple[str, OpTable]]:
    accepted = inspect.signature(model.forward).parameters
    entries: list[tuple[str, OpTable]] = []
    for name, start, length in (("prefill", 0, prompt), ("decode", prompt, 1)):
        stop = start + length
        inputs: dict[str, Any] = {
            "input_ids": _tokens(batch, length),
            "attention_mask": torch.ones(batch, stop, dtype=torch.long, device="meta"),
            "position_ids": torch.arange(start, stop, device="meta").expand(batch, -1),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        known = {key: value for key, value in inputs.items() if key in accepted}
        entries.extend((name, table) for table in _capture_step(model, **known))
    return entries


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.zeros(batch, length, dtype=torch.long, device="meta")


def _pixels(model: Any, batch: int) -> torch.Tensor:
    config = model.config
    side = config.image_size
    dtype = next(model.parameters()).dtype
    return torch.zeros(batch, config.num_channels, side, side, dtype=dtype, device="meta")


def _capture_step(model: torch.nn.Module, **inputs: Any) -> list[OpTable]:
    try:
        return capture(model, **inputs)
    except Exception as error:  # whatever a model's own code does on tensors without data
        raise ModelError(
            f"{type(model).__name__} cannot be traced on the meta device "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); plan it where it runs, with "
            "dak.offload and dak.explain"
        ) from error


def _empty_cache(model: Any, length: int) -> Any:
    """The cache that `generate(cache_implementation="static")` makes; tensors come with a step."""
    from transformers import StaticCache

    return StaticCache(config=model.config.get_text_config(), max_cache_len=length)


def _static_cache(model: Any, batch: int, length: int) -> Any:
    """The same with its tensors on the meta device, so that prefill too reads it as an input."""
    text = model.config.get_text_config()
    cache = _empty_cache(model, length)
    cache.early_initialization(
        batch_size=batch,
        num_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        dtype=next(model.parameters()).dtype,
        device=torch.device("meta"),
    )
    return cache

"""What a decode step is taken to read, before any graph was seen.

One token per step: linear layers read their weight once, an embedding one row, an expert table the
experts that a token is routed to. Everything else is taken to be read whole.
"""

from __future__ import annotations

import re

from torch import nn

from dak_inductor.inventory import Entry, Inventory, Member
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.plan import OpUse

GRAPH = "decode"
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_NAME = re.compile(r"(^|\.)experts?(\.|$)")


def uses_of(inventory: Inventory, model: nn.Module) -> tuple[OpUse, ...]:
    """One use per divided weight and module that reads it."""
    share = expert_share(getattr(model, "config", None))
    return tuple(
        use
        for entry in inventory.entries
        for member in entry.members
        for use in _uses(entry, member, share)
    )


def default_uses(model: OffloadedModel) -> tuple[OpUse, ...]:
    """The uses assumed when `model` was offloaded."""
    return model.default_uses


def expert_share(config: object) -> float:
    """Share of a layer's experts that one token is routed to; 1 where the config does not say."""
    for source in (config, getattr(config, "text_config", None)):
        routed = _first_number(source, _EXPERTS_PER_TOKEN)
        experts = _first_number(source, _EXPERTS)
        if routed and experts:
            return min(1.0, routed / experts)
    return 1.0


def _first_number(source: object, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(source, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _uses(entry: Entry, member: Member, share: float) -> list[OpUse]:
    """By kind of the modules that hold it: a tied embedding is read by a look-up and a linear."""
    tensor = member.tensor
    nbytes = tensor.numel() * tensor.itemsize
    uses: dict[str, OpUse] = {}
    for module, name in member.readers:
        kind, touched = _kind(module, member, name, nbytes, share)
        width = tensor.shape[-1] if tensor.dim() else 1
        uses.setdefault(
            kind,
            OpUse(
                op=f"{name}:{kind}",
                graph=GRAPH,
                tensor=entry.name,
                kind=kind,
                touched_bytes=touched,
                other_bytes=float(2 * width * tensor.itemsize),
                flops=0.0 if kind == "embedding" else 2 * touched / tensor.itemsize,
                calls=1.0,
                dtype=str(tensor.dtype).removeprefix("torch."),
                module=name.rpartition(".")[0],
                m=1,
            ),
        )
    return list(uses.values())


def _kind(
    module: nn.Module, member: Member, name: str, nbytes: int, share: float
) -> tuple[str, float]:
    """Kind of operator, and the bytes of the tensor that one token makes it read."""
    tensor = member.tensor
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", nbytes / max(tensor.shape[0], 1)
    if _EXPERT_NAME.search(name) and "shared_expert" not in name:
        return ("grouped_mm" if tensor.dim() == 3 else "linear"), nbytes * share
    if isinstance(module, nn.Linear) or tensor.dim() == 2:
        return "linear", float(nbytes)
    return "other", float(nbytes)

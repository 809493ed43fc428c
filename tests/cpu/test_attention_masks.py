"""Masks that are all True are dropped, broadcast ones laid out; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import dak_inductor as dak
from dak_inductor.backend import compile_graph
from dak_inductor.options import BackendOptions

SDPA = torch.ops.aten.scaled_dot_product_attention.default
TOKENS = 24


def spread(mask: Tensor, tokens: int) -> Tensor:
    return mask.expand(2, 1, tokens, tokens)


def column(tokens: int) -> Tensor:
    return torch.arange(tokens)[None, None, :, None]


def written(x: Tensor) -> Tensor:
    mask = torch.ones(2, 1, x.shape[1], x.shape[1], dtype=torch.bool)
    mask[:, :, :, -1].fill_(False)
    return mask


def written_before(x: Tensor) -> Tensor:
    row = torch.arange(x.shape[1])
    mask = spread((row >= 0)[None, None, :, None], x.shape[1])
    row.sub_(1)
    return mask


def written_through(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def mask(x: Tensor) -> Tensor:
        made = torch.ones(2, 1, x.shape[1], x.shape[1], dtype=torch.bool)
        view(made)[..., :1].fill_(False)
        return made

    return mask


ALL_TRUE: dict[str, Callable[[Tensor], Tensor]] = {
    "as transformers makes it": lambda x: spread(column(x.shape[1]) >= 0, x.shape[1]),
    "shifted": lambda x: spread(column(x.shape[1]) + 3 > 2, x.shape[1]),
    "ones": lambda x: torch.ones(2, 1, x.shape[1], x.shape[1], dtype=torch.bool),
    "both": lambda x: spread(
        (column(x.shape[1]) >= 0) & column(x.shape[1]).new_ones((), dtype=torch.bool), x.shape[1]
    ),
    "either": lambda x: spread((column(x.shape[1]) >= 5) | (column(x.shape[1]) > -1), x.shape[1]),
    "converted": lambda x: spread((column(x.shape[1]) + 1).to(torch.bool), x.shape[1]),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "not the first row": lambda x: spread(column(x.shape[1]) >= 1, x.shape[1]),
    "causal": lambda x: torch.arange(x.shape[1])[None, :] <= torch.arange(x.shape[1])[:, None],
    "of the input": lambda x: spread((x[:, None, :, :1] < 9), x.shape[1]),
    "every key but one": lambda x: (torch.arange(x.shape[1]) > 0).expand(2, 1, x.shape[1], -1),
    "numbers, that are added": lambda x: torch.ones(x.shape[1], 1).expand(2, 1, x.shape[1], -1),
    "written to": written,
    "of values in the graph": lambda x: torch.tensor([[True], [False]] * (TOKENS // 2)).expand(
        2, 1, TOKENS, TOKENS
    ),
    "of values in the graph, converted and combined": lambda x: (
        torch.tensor([[1], [0]] * (TOKENS // 2)).to(torch.bool) & (torch.arange(TOKENS) >= 0)
    ),
    "of a row that is written to": written_before,
    "written to without a gradient": written_through(lambda made: made.detach()),
    "a piece of it written to": written_through(lambda made: made.chunk(2)[1]),
    "its strides given": written_through(lambda made: made.as_strided((4, 1), (1, 1))),
    "wraps around": lambda x: spread(
        column(x.shape[1]).to(torch.int8) + 120 >= 100, x.shape[1]
    ),
    "negative step": lambda x: spread(
        torch.arange(x.shape[1] - 1, -1, -1)[None, None, :, None] >= 1, x.shape[1]
    ),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, x.shape[1], 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))


def compiled(
    model: nn.Module, x: Tensor, *, dynamic: bool = False
) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the masks that attention has in the graph."""
    masks: list[Tensor | None] = []

    def executor(graph: GraphModule, _: object) -> Callable[..., object]:
        for node in graph.graph.find_nodes(op="call_function", target=SDPA):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            masks.append(None if mask is None else mask.meta["val"])
        return graph.forward

    def backend(graph: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        return compile_graph(graph, example, BackendOptions(), executor)

    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        dak.offload(model, offload_ratio=0.5, remote="simulated")
        result = torch.compile(model, backend=backend, dynamic=dynamic)(x)
    torch.testing.assert_close(result, expected)
    return result, masks


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ALL_TRUE)
def test_a_mask_of_all_true_is_dropped(name: str, dynamic: bool) -> None:
    x = torch.randn(2, TOKENS, 64)
    assert bool(ALL_TRUE[name](x).all())
    _, masks = compiled(Block(ALL_TRUE[name]), x, dynamic=dynamic)
    assert masks == [None]
    assert dak.stats().total.remote > 0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_another_stays_and_is_no_broadcast(name: str, dynamic: bool) -> None:
    _, masks = compiled(Block(OTHERS[name]), torch.randn(2, TOKENS, 64), dynamic=dynamic)
    (mask,) = masks
    assert mask is not None and mask.stride(-1) == 1


def test_encoders_of_transformers_need_no_mask() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=128, vocab_size=99)
    tokens = torch.randint(0, 99, (2, TOKENS))

    class Plain(nn.Module):
        def __init__(self, padded: bool) -> None:
            super().__init__()
            self.model, self.padded = transformers.BertModel(config).eval(), padded

        def forward(self, tokens: Tensor) -> Tensor:
            mask = tokens > 10 if self.padded else None
            found: Tensor = self.model(tokens, attention_mask=mask).last_hidden_state
            return found

    assert compiled(Plain(False), tokens)[1] == [None, None]
    masks = compiled(Plain(True), tokens)[1]
    assert all(mask is not None for mask in masks) and len(masks) == 2

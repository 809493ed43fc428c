"""NVTX ranges and what else is marked: names by how operators run, and nothing while off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import dak_inductor as dak
from dak_inductor import compiled_graph, placement
from dak_inductor.backend import compile_graph
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.errors import OptionError
from dak_inductor.lowering import marks, ops
from dak_inductor.lowering.ahead import player
from dak_inductor.lowering.ahead.memory import StepMemory
from dak_inductor.lowering.ahead.ring_room import Room
from dak_inductor.lowering.linear import product, ring, routes
from dak_inductor.lowering.linear.configuration import MAXIMUM_TOKENS
from dak_inductor.lowering.marks import Marks
from dak_inductor.offloaded import record_of
from dak_inductor.options import BackendOptions

from .ahead_model import BF16, ROOM, Layer, assert_close, shrink, weight_of

CPU = torch.device("cpu")


class Nvtx:
    """Ranges as a tool sees them: "+ name" where one begins, "-" where it ends."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def range_push(self, text: str) -> None:
        self.seen.append(f"+ {text}")

    def range_pop(self) -> None:
        self.seen.append("-")

    @property
    def names(self) -> list[str]:
        return [each[2:] for each in self.seen if each.startswith("+ dak ")]


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvtx]:
    found = Nvtx()
    marks.nvtx_range.cache_clear()
    monkeypatch.setattr(torch._C, "_nvtx", None, raising=False)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", found.range_push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", found.range_pop)
    yield found
    marks.nvtx_range.cache_clear()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Marks:
    """Fresh switches wherever they are asked."""
    monkeypatch.delenv("DAK_NVTX", raising=False)
    found = Marks()
    for module in (marks, ops, player, product, ring, routes, compiled_graph, placement):
        monkeypatch.setattr(module, "MARKS", found)
    return found


def no_executor(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
    return graph.forward


def test_off_nothing_is_made_and_no_name_is_asked_for(own: Marks, nvtx: Nvtx) -> None:
    class Asked:
        @property
        def label(self) -> str:
            raise AssertionError("a name costs time")

    with own.of_buffers("direct", (Asked(),)), own.of("graph", "g"):  # type: ignore[arg-type]
        pass
    with own.of_operands("stock", (object(),)):
        pass
    assert not own.nvtx and not nvtx.seen


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False)])
def test_the_variable_is_the_first_state_and_the_option_wins(
    own: Marks, nvtx: Nvtx, monkeypatch: pytest.MonkeyPatch, value: str, on: bool
) -> None:
    monkeypatch.setenv("DAK_NVTX", value)
    assert own.nvtx is on
    own.switch(not on)
    assert own.nvtx is not on


def test_a_torch_without_nvtx_says_so(own: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", missing)
    with pytest.raises(OptionError, match=r"without NVTX.*dak\.trace"):
        own.switch(True)
    assert not own.nvtx


def test_names_are_modules_each_once(own: Marks, nvtx: Nvtx) -> None:
    own.switch(True)
    gate, up = (weight_of(64, 64, 0.5, f"mlp.{name}.weight")[0] for name in ("gate", "up"))
    with own.of_buffers("direct", (gate, None, up, gate)):
        nvtx.seen.append("launch")
    assert nvtx.seen[-3:] == ["+ dak direct mlp.gate + mlp.up", "launch", "-"]


def test_a_range_ends_where_the_work_fails(own: Marks, nvtx: Nvtx) -> None:
    own.switch(True)
    nvtx.seen.clear()
    with pytest.raises(KeyError), own.of("graph", "g"):
        raise KeyError
    assert nvtx.seen == ["+ dak graph g", "-"]


def test_a_recorder_gets_every_mark_beside_nvtx(own: Marks, nvtx: Nvtx) -> None:
    recorded = []

    @contextmanager
    def maker(text: str) -> Iterator[None]:
        recorded.append(text)
        yield

    with own.recorded(maker), own.of("graph", "first"):
        own.switch(True)
        with own.of("graph", "second"):
            pass
    with own.of("graph", "third"):
        pass
    assert recorded == ["dak graph first", "dak graph second"]
    assert nvtx.names == ["dak graph second", "dak graph third"]


@torch.no_grad()
def test_a_compiled_call_names_graph_model_and_operators(own: Marks, nvtx: Nvtx) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    dak.offload(model, offload_ratio=0.5, remote="simulated")

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        return compile_graph(graph, inputs, BackendOptions(nvtx=True), no_executor)

    torch.compile(model, backend=backend)(torch.randn(3, 256))
    graph, *operators = [name for name in nvtx.names if " move " not in name]
    assert graph.startswith("dak graph graph") and graph.endswith(" of Sequential")
    assert operators == ["dak simulated 0", "dak simulated 1"]
    depth = 0
    for each in nvtx.seen:
        depth += 1 if each.startswith("+") else -1
        assert depth >= 0
    assert depth == 0


@torch.no_grad()
def test_copies_ahead_and_the_products_behind_them(
    own: Marks, nvtx: Nvtx, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    layers = [Layer((weight_of(64, 64, 0.5, f"layers.{i}.weight")[1],)) for i in range(2)]
    memory = StepMemory("graph0", "staged", lambda: Room(ROOM))
    x = torch.randn(3, 64, dtype=BF16)
    for _ in range(2):
        own.switch(True)
        nvtx.seen.clear()
        with memory.opened((), CPU):
            for layer in layers:
                layer(x)
    names = nvtx.names
    assert [n for n in names if "staged" in n] == ["dak staged layers.0", "dak staged layers.1"]
    assert {n for n in names if "copy" in n} == {"dak copy layers.0", "dak copy layers.1"}
    assert names.index("dak copy layers.1") < names.index("dak staged layers.1")


@torch.no_grad()
def test_the_ring_of_a_prefill_and_its_copies(own: Marks, nvtx: Nvtx) -> None:
    own.switch(True)
    layer = Layer((weight_of(64, 64, 0.5, "up.weight")[1],))
    layer.product(torch.randn(3, 64, dtype=BF16)).staged()
    first, *copies = nvtx.names
    assert first == "dak ring up" and set(copies) == {"dak copy up"}


@torch.no_grad()
def test_stock_operators_on_a_device_are_named_where_something_is_tiered(
    own: Marks, nvtx: Nvtx
) -> None:
    own.switch(True)
    (embedding,) = (op for op in ops.OPERATORS if op.name == "embedding")
    run = ops._on_device(embedding, embedding.stock)
    buffer = SimulatedTier(page_bytes=256).allocate(64 * 32 * 4, split=4096)
    buffer.label = "model.embed_tokens.weight"
    table = buffer.tensor(torch.float32, (64, 32)).zero_()
    run(table, torch.tensor([1, 2]))
    run(torch.zeros(64, 32), torch.tensor([1, 2]))
    assert nvtx.names == ["dak stock model.embed_tokens"]


@torch.no_grad()
def test_calls_by_their_route_are_named_as_the_first_is(
    own: Marks, nvtx: Nvtx, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at anew at each call they would cost the host ten times what a range does."""
    own.switch(True)
    layer = Layer((weight_of(64, 64, 0.5, "up.weight")[1],))
    x = torch.randn(MAXIMUM_TOKENS + 1, 64, dtype=BF16)
    layer(x)
    first = set(nvtx.names)
    nvtx.seen.clear()
    monkeypatch.setattr(routes.Product, "facts", None)
    assert_close(layer(x), layer.expected(x))
    assert set(nvtx.names) == first == {"dak ring up", "dak copy up"}


def test_moves_of_pages_are_named(own: Marks, nvtx: Nvtx) -> None:
    own.switch(True)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    record, plan = record_of(model), dak.explain(model).plan
    assert record is not None
    placement.apply(replace(plan, splits=plan.sizes), record)
    assert nvtx.names == ["dak move Sequential"]

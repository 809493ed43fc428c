"""Which template serves an op, and the reason of each refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dak_inductor.lowering import op_facts, registry
from dak_inductor.lowering.op_facts import OpFacts, facts_of

HOPPER = OpFacts(
    dtype=torch.bfloat16,
    m=16,
    n=4096,
    k=1024,
    layout="out_in",
    pitches=(1024,),
    biases=(None,),
    capability=(9, 0),
    extension=True,
    triton=True,
)


@pytest.fixture(autouse=True)
def _no_choices_left() -> Iterator[None]:
    registry.forget()
    yield
    registry.forget()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("op_name", registry.LINEAR_OPS)
def test_every_linear_op_goes_to_the_cuda_template_on_hopper(op_name: str) -> None:
    for facts in (HOPPER, replace(HOPPER, layout="in_out"), replace(HOPPER, m=None)):
        assert registry.select(op_name, facts) == registry.Choice("cuda")


@pytest.mark.parametrize(
    ("change", "template", "reason"),
    [
        ({"capability": (8, 0)}, "triton", "Hopper .* this GPU has 8.0"),
        ({"capability": (10, 0)}, "triton", "Hopper .* this GPU has 10.0"),
        ({"extension": False}, "triton", "extension"),
        ({"dtype": torch.float32}, "triton", "the weight is float32"),
        ({"n": 1001}, "triton", "multiples of 8; the weight has N = 1001, K = 1024"),
        ({"k": 1020, "pitches": (1020,)}, "triton", "K = 1020"),
        ({"pitches": (1025,)}, "triton", "they start every 1025"),
        ({"capability": (7, 5)}, "stock", "8.0 or newer; this GPU has 7.5"),
        ({"capability": None}, "stock", "there is no such GPU here"),
        ({"triton": False, "capability": (8, 9)}, "stock", "triton is not installed"),
        ({"dtype": torch.int8}, "stock", "float32, the weight is int8"),
        ({"layout": None}, "stock", "not a plain 2-D matrix"),
        ({"k": None}, "stock", "dynamic shape"),
        ({"uniform": False}, "stock", "differ in dtype"),
        ({"scaled": True}, "stock", "alpha or beta"),
        ({"biases": ((16, 4096),)}, "stock", r"bias of shape \(16, 4096\) instead of \(4096,\)"),
        ({"biases": ((None, 4096),)}, "stock", r"bias of shape \(\?, 4096\)"),
        ({"m": 0, "capability": (8, 0)}, "stock", "the product is empty"),
    ],
)
def test_each_refusal_says_why(change: dict[str, Any], template: str, reason: str) -> None:
    choice = registry.select("linear", replace(HOPPER, **change))
    assert choice.template == template
    skipped = ["cuda"] if template == "triton" else ["cuda", "triton"]
    assert [refusal.template for refusal in choice.refusals] == skipped
    assert not any(refusal.reason.endswith(".") for refusal in choice.refusals)
    assert re.search(reason, choice.refusals[-1].reason)


def test_other_operators_have_no_template() -> None:
    choice = registry.select("embedding", HOPPER)
    assert choice.template == "stock"
    assert {refusal.reason for refusal in choice.refusals} == {"there is no template for embedding"}


def test_layouts_come_from_memory_not_from_the_operator() -> None:
    x, weight = meta(3, 64), meta(128, 64)
    calls: list[tuple[str, tuple[Any, ...], str]] = [
        ("linear", (x, weight), "out_in"),
        ("linear", (x, meta(64, 128).t()), "in_out"),
        ("matmul", (x, weight.t()), "out_in"),
        ("matmul", (x, meta(64, 128)), "in_out"),
        ("addmm", (meta(128), x, meta(64, 128)), "in_out"),
        ("linear_epilogue", (x, weight, None, None, "silu", "out_in"), "out_in"),
        ("linear_epilogue", (x, meta(64, 128), meta(128), None, "none", "in_out"), "in_out"),
        ("gated_linear", (x, weight, meta(128, 64), None, None, "silu", "out_in"), "out_in"),
    ]
    for name, arguments, layout in calls:
        facts = facts_of(name, arguments, {})
        assert (facts.layout, facts.m, facts.n, facts.k) == (layout, 3, 128, 64), name
        assert facts.pitches[0] == (64 if layout == "out_in" else 128)
        assert facts.uniform and not facts.scaled


def test_what_facts_are_read_from_a_call() -> None:
    x, weight = meta(2, 5, 64), meta(256, 64)
    assert facts_of("linear", (x, weight), {}).m == 10
    assert facts_of("linear", (x, weight[8:136]), {}).n == 128
    assert facts_of("linear", (x, meta(128, 128)[:, ::2]), {}).layout is None
    assert facts_of("linear", (x, meta(1, 64).expand(128, 64)), {}).layout is None
    assert not facts_of("linear", (x, meta(128, 64, dtype=torch.float16)), {}).uniform
    assert facts_of("addmm", (meta(128), meta(3, 64), meta(64, 128)), {"alpha": 2}).scaled
    assert facts_of("addmm", (meta(3, 128), meta(3, 64), meta(64, 128)), {}).biases == ((3, 128),)
    assert facts_of("matmul", (x, meta(2, 64, 128)), {}).layout is None
    gated = facts_of("gated_linear", (x, weight, meta(8, 64), None, None, "silu", "out_in"), {})
    assert not gated.uniform
    residual = (x, weight, None, meta(2, 5, 256), "none", "out_in")
    assert facts_of("linear_epilogue", residual, {}).residual == (2, 5, 256)
    assert facts_of("gather", (weight, meta(3, dtype=torch.int64)), {}).layout is None


def test_symbolic_sizes_are_unknown_and_stay_unguarded() -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    x = mode.from_tensor(torch.empty(7, 64), static_shapes=False)
    with mode:
        weight = torch.empty(128, 64)
    facts = facts_of("linear", (x, weight), {})
    assert facts.m is None and facts.n == 128
    assert not environment.guards


def test_choices_are_kept_until_forgotten() -> None:
    x, weight = meta(3, 64), meta(128, 64)
    choice = registry.choose("linear", x, weight)
    registry.choose("linear", x, weight)
    assert [(name, kept) for name, _, kept in registry.choices()] == [("linear", choice)]
    registry.forget()
    assert registry.choices() == ()


def test_only_forces_a_template_and_changes_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_facts, "visible_capability", lambda _: (9, 0))
    monkeypatch.setattr(op_facts, "extension_importable", lambda: True)
    monkeypatch.setattr(op_facts, "triton_importable", lambda: True)
    x, weight = meta(3, 64), meta(128, 64)
    tag = torch.compiler.config.cache_key_tag
    assert registry.choose("linear", x, weight).template == "cuda"
    for template in ("cuda", "triton", "stock"):
        with registry.only(template):
            assert registry.choose("linear", x, weight).template == template
            assert torch.compiler.config.cache_key_tag != tag
            # its own rules still apply
            assert registry.choose("linear", x, meta(0, 64)).template == "stock"
    assert torch.compiler.config.cache_key_tag == tag
    assert registry.choose("linear", x, weight).template == "cuda"

"""Which template serves an op of the compiled graph: CUDA, else Triton, else the stock op.

Decided while the graph is traced, from shapes, dtypes and the device alone. Where the weight lives
plays no part: that is looked up by address when the op runs. Rules are data, each with the reason
that a user reads when it does not hold.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dak_inductor.lowering import attention_rules
from dak_inductor.lowering.attention_facts import attention_facts
from dak_inductor.lowering.element_types import DTYPES, PORTABLE_DTYPES
from dak_inductor.lowering.op_facts import OpFacts, facts_of
from dak_inductor.lowering.template_rule import (
    CUDA_INSTALLED,
    TRITON_INSTALLED,
    Rule,
    dtype_text,
    first_reason,
)

Template = Literal["cuda", "triton", "stock"]

LINEAR_OPS = ("linear", "addmm", "matmul", "linear_epilogue", "gated_linear")
"""Operators of dak:: that multiply by one or two 2-D weights."""


@dataclass(frozen=True, slots=True)
class TemplateRefusal:
    """A template passed over. `reason` is a sentence without a full stop, in the user's words."""

    template: Template
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Who serves an op, and why each template before it in the order cuda, triton does not."""

    template: Template
    refusals: tuple[TemplateRefusal, ...] = ()


_COMMON: tuple[Rule[OpFacts], ...] = (
    Rule(
        lambda f: f.layout is not None,
        lambda f: "the weight is not a plain 2-D matrix, or not contiguous along either dimension",
    ),
    Rule(
        lambda f: f.k is not None and f.n is not None,
        lambda f: "the weight has a dynamic shape",
    ),
    Rule(
        lambda f: f.uniform,
        lambda f: "the operands differ in dtype or device, or gate and up in shape or layout",
    ),
    Rule(
        lambda f: not f.scaled,
        lambda f: "alpha or beta of addmm is not 1",
    ),
    Rule(
        lambda f: all(bias is None or bias == (f.n,) for bias in f.biases),
        lambda f: f"a bias of shape {_first_odd_bias(f)} instead of ({f.n},)",
    ),
)

_CUDA: tuple[Rule[OpFacts], ...] = (
    *CUDA_INSTALLED,
    Rule(
        lambda f: f.dtype in DTYPES,
        lambda f: f"it takes bfloat16 and float16, the weight is {dtype_text(f.dtype)}",
    ),
    *_COMMON,
    Rule(
        lambda f: _multiple(f.k, 8) and _multiple(f.n, 8),
        lambda f: f"N and K must be multiples of 8; the weight has N = {f.n}, K = {f.k}",
    ),
    Rule(
        lambda f: all(_multiple(pitch, 8) for pitch in f.pitches),
        lambda f: f"rows must start every multiple of 8 elements; they start every {f.pitches[0]}",
    ),
)

_TRITON: tuple[Rule[OpFacts], ...] = (
    *TRITON_INSTALLED,
    Rule(
        lambda f: f.dtype in PORTABLE_DTYPES,
        lambda f: f"it takes bfloat16, float16 and float32, the weight is {dtype_text(f.dtype)}",
    ),
    *_COMMON,
    Rule(
        lambda f: f.k != 0 and f.n != 0 and f.m != 0,
        lambda f: "the product is empty",
    ),
)

_Rules = tuple[tuple[Template, tuple[Rule[Any], ...]], ...]
_LINEAR: _Rules = (("cuda", _CUDA), ("triton", _TRITON))
_ATTENTION: _Rules = (("cuda", attention_rules.CUDA), ("triton", attention_rules.TRITON))
_NONE: _Rules = (("cuda", ()), ("triton", ()))

_lock = threading.Lock()
_choices: dict[tuple[str, OpFacts], Choice] = {}
_forced: Template | None = None


def select(op_name: str, facts: OpFacts) -> Choice:
    """The first template whose rules all hold, "stock" where there is none. Pure.

    `op_name` is the operator's name without its namespace: "linear".
    """
    refusals: list[TemplateRefusal] = []
    for template, rules in _rules_of(op_name):
        reason = _refusal(op_name, facts, rules)
        if reason is None:
            return Choice(template, tuple(refusals))
        refusals.append(TemplateRefusal(template, reason))
    return Choice("stock", tuple(refusals))


def choose(op_name: str, *args: Any, **kwargs: Any) -> Choice:
    """The choice for a call with these (fake) arguments on a CUDA device, kept for `choices()`."""
    facts = (
        attention_facts(args, kwargs) if op_name == "attention" else facts_of(op_name, args, kwargs)
    )
    choice = _within(_forced, op_name, facts)
    with _lock:
        _choices[op_name, facts] = choice
    return choice


def choices() -> tuple[tuple[str, OpFacts, Choice], ...]:
    """Every choice made in this process since `forget()`, in order of first appearance.

    A graph that Inductor takes from its cache is not traced, so it makes no choice here; apply
    `choose` to the ops of the rewritten graph to know them always.
    """
    with _lock:
        return tuple((name, facts, choice) for (name, facts), choice in _choices.items())


def forget() -> None:
    """Drop the choices kept."""
    with _lock:
        _choices.clear()


@contextlib.contextmanager
def only(template: Template) -> Iterator[None]:
    """For tests and benchmarks: inside, no other template than this one is chosen at trace time.

    Its own rules still apply; an op that they refuse goes to "stock". Process-wide, and part of
    Inductor's cache key, since it changes what is compiled.
    """
    global _forced
    config: Any = torch.compiler.config
    previous, _forced = _forced, template
    try:
        with config.patch(cache_key_tag=f"{config.cache_key_tag}dak.only={template};"):
            yield
    finally:
        _forced = previous


def _within(forced: Template | None, op_name: str, facts: OpFacts) -> Choice:
    if forced is None:
        return select(op_name, facts)
    refusals: list[TemplateRefusal] = []
    for template, rules in _rules_of(op_name):
        reason = f"only {forced!r} is allowed here"
        if template == forced:
            own = _refusal(op_name, facts, rules)
            if own is None:
                return Choice(template, tuple(refusals))
            reason = own
        refusals.append(TemplateRefusal(template, reason))
    return Choice("stock", tuple(refusals))


def _rules_of(op_name: str) -> _Rules:
    if op_name == "attention":
        return _ATTENTION
    return _LINEAR if op_name in LINEAR_OPS else _NONE


def _refusal(op_name: str, facts: OpFacts, rules: tuple[Rule[Any], ...]) -> str | None:
    return first_reason(facts, rules) if rules else f"there is no template for {op_name}"


def _multiple(value: int | None, of: int) -> bool:
    return value is not None and value > 0 and value % of == 0


def _first_odd_bias(facts: OpFacts) -> str:
    odd = next(bias for bias in facts.biases if bias is not None and bias != (facts.n,))
    return "(" + ", ".join("?" if size is None else str(size) for size in odd) + ")"

"""What each template asks of a call of dak::attention.

Few queries and many, a window and a softcap are served by one template or another kernel behind it;
what that declines at the call runs as the stock composition.
"""

from __future__ import annotations

from dak_inductor.lowering.attention.configuration import HEAD_DIMS, MAXIMUM_QUERIES
from dak_inductor.lowering.attention_facts import AttentionFacts
from dak_inductor.lowering.element_types import DTYPES, PORTABLE_DTYPES
from dak_inductor.lowering.template_rule import CUDA_INSTALLED, TRITON_INSTALLED, Rule, dtype_text

MOST_HEAD = 256

_COMMON: tuple[Rule[AttentionFacts], ...] = (
    Rule(
        lambda f: f.uniform,
        lambda f: "queries, keys and values differ in dtype or device",
    ),
    Rule(
        lambda f: f.ratio is not None,
        lambda f: "the number of heads is dynamic",
    ),
    Rule(
        lambda f: not f.masked,
        lambda f: f"it has a {f.masked} mask besides lengths, starts, causality and window",
    ),
    Rule(
        lambda f: f.order is not None,
        lambda f: "the elements of a head of keys or values are not adjacent",
    ),
)

_ORDERED: Rule[AttentionFacts] = Rule(
    lambda f: f.order != "strided",
    lambda f: "keys and values lie neither token by token nor head by head",
)

CUDA: tuple[Rule[AttentionFacts], ...] = (
    *CUDA_INSTALLED,
    Rule(
        lambda f: f.dtype in DTYPES,
        lambda f: f"it takes bfloat16 and float16, keys are {dtype_text(f.dtype)}",
    ),
    *_COMMON,
    Rule(
        lambda f: f.head_dim in HEAD_DIMS,
        lambda f: f"it takes a head_dim of {', '.join(map(str, HEAD_DIMS))}; this is {f.head_dim}",
    ),
    Rule(
        lambda f: f.head_dim == f.value_dim,
        lambda f: (
            f"keys and values must have one head_dim; they have {f.head_dim} and {f.value_dim}"
        ),
    ),
    Rule(
        lambda f: _ORDERED.holds(f) or (f.rows is not None and f.rows <= MAXIMUM_QUERIES),
        lambda f: f"more than {MAXIMUM_QUERIES} queries are staged, and {_ORDERED.reason(f)}",
    ),
)

TRITON: tuple[Rule[AttentionFacts], ...] = (
    *TRITON_INSTALLED,
    Rule(
        lambda f: f.dtype in PORTABLE_DTYPES,
        lambda f: f"it takes bfloat16, float16 and float32, keys are {dtype_text(f.dtype)}",
    ),
    *_COMMON,
    _ORDERED,
    Rule(
        lambda f: max(f.head_dim or 0, f.value_dim or 0) in range(1, MOST_HEAD + 1),
        lambda f: f"it takes a head_dim of at most {MOST_HEAD}; this is {f.head_dim}",
    ),
)

"""The plan's record and its JSON: what comes back is equal, what is damaged is refused."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dak_inductor.errors import PlanError
from dak_inductor.hardware import load
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.refusal import Refusal


def example() -> Plan:
    tensors = (TensorSpec("model.up.weight", 1 << 24), TensorSpec("model.down.weight", 1 << 24))
    uses = tuple(
        OpUse(f"linear_{i}", graph, spec.name, "linear", spec.nbytes, 4096.0, 1e9, calls, m=8,
              module=spec.name.removesuffix(".weight"), source="model.py:12")
        for i, spec in enumerate(tensors)
        for graph, calls in (("prefill", 1.0), ("decode", 31.0))
    )  # fmt: skip
    refusal = Refusal("conv", "aten.convolution", 'no "template"', "model.conv", "model.py:3", "g")
    problem = PlanProblem(tensors, uses, 10_000_000, "cpu", (refusal,), "Model-0123")
    return make_plan(problem, load("h200"))


PLAN = example()


def record() -> dict[str, Any]:
    return json.loads(PLAN.to_json())


def test_json_goes_out_and_comes_back_equal() -> None:
    text = PLAN.to_json()
    assert Plan.from_json(text) == PLAN
    assert text.startswith('{\n  "version": 1')
    assert sum('"linear_0"' in line for line in text.splitlines()) == 2  # one operator a line


def test_copies_and_pickles_are_equal() -> None:
    assert copy.deepcopy(PLAN) == PLAN
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PLAN.splits["model.up.weight"] = 0  # type: ignore[index]
    with pytest.raises(AttributeError):
        PLAN.objective = 0.0  # type: ignore[misc]


def test_sums() -> None:
    assert PLAN.total_bytes == 2 << 24
    assert PLAN.remote_bytes == sum(PLAN.splits.values()) >= PLAN.asked_bytes == 10_000_000
    assert PLAN.gap == PLAN.objective / PLAN.objective_bound - 1


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_another_version_is_refused(version: object) -> None:
    with pytest.raises(PlanError, match="version"):
        Plan.from_json(json.dumps({**record(), "version": version}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"plan"', "[" * 100_000, "\x00"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize("name", [n for n in record() if n != "version"])
@pytest.mark.parametrize("value", [None, True, -1, "x", [1], {"a": "b"}, float("nan")])
def test_a_field_of_another_kind_is_refused(name: str, value: object) -> None:
    if isinstance(record()[name], str) and isinstance(value, str):
        value = 7  # a text is what belongs there
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps({**record(), name: value}))


@pytest.mark.parametrize("name", list(record()))
def test_a_missing_field_is_refused(name: str) -> None:
    damaged = record()
    del damaged[name]
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(damaged))


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="surprise"):
        Plan.from_json(json.dumps({**record(), "surprise": 1}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("remote_share", 1.5),
        ("remote_share", "half"),
        ("time", -1.0),
        ("strategy", "teleport"),
        ("tensor", "absent"),
        ("m", 0.5),
        ("op", 7),
    ],
)
def test_a_damaged_operator_is_refused(field: str, value: object) -> None:
    damaged = record()
    damaged["ops"][1][field] = value
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(damaged))


def test_splits_that_contradict_the_sizes_are_refused() -> None:
    damaged = record()
    damaged["splits"]["model.up.weight"] = (1 << 24) + 1
    with pytest.raises(PlanError, match=r"model\.up\.weight"):
        Plan.from_json(json.dumps(damaged))
    damaged = record()
    damaged["splits"] = dict.fromkeys(damaged["splits"], 0)
    with pytest.raises(PlanError, match="needed"):
        Plan.from_json(json.dumps(damaged))
    damaged = record()
    del damaged["sizes"]["model.up.weight"]
    with pytest.raises(PlanError, match="not both"):
        Plan.from_json(json.dumps(damaged))


@given(st.integers(0, len(PLAN.to_json()) - 3))
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(PLAN.to_json()[:length])


def test_a_plan_is_checked_against_the_model() -> None:
    PLAN.check_model("Model-0123", dict(PLAN.sizes))
    with pytest.raises(PlanError, match="Other-4567"):
        PLAN.check_model("Other-4567", dict(PLAN.sizes))
    with pytest.raises(PlanError, match="new not in the plan"):
        PLAN.check_model("Model-0123", {**PLAN.sizes, "new": 4})
    with pytest.raises(PlanError, match=r"model\.up\.weight of another size"):
        PLAN.check_model("Model-0123", {**PLAN.sizes, "model.up.weight": 4})

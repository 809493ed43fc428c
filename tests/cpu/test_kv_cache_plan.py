"""Where a KV cache lies: weighed against weights under one budget, or by ratio; what plans say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dak_inductor as dak
from dak_inductor import hardware, placement, replanning
from dak_inductor.cost_model import OpCost
from dak_inductor.errors import BudgetError, MoveError
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.session import SESSION

from . import small_models

ROW = 2 * 2 * 32 * 4  # bytes of a token in one tensor, batch 2


def build() -> Any:
    """The same random model each time."""
    torch.manual_seed(0)
    return small_models.build(hidden_size=128, intermediate_size=256, max_position_embeddings=4096)


def offloaded(budget: int) -> tuple[Any, OffloadedModel]:
    model = dak.offload(build(), gpu_memory=budget, remote="simulated")
    record = record_of(model)
    assert record is not None
    return model, record


def generate(model: Any, new: int, **options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randint(1, 512, (2, 10))
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False,
        **options,
    )  # fmt: skip


def weights_bytes() -> int:
    return sum(p.numel() * 4 for p in build().parameters())


@pytest.mark.parametrize("share", [0.35, 0.6, 0.9, 1.5])
def test_weights_and_cache_stay_within_one_budget(share):
    whole = weights_bytes()
    budget = int(whole * share)
    expected = generate(build(), 300)
    model, record = offloaded(budget)
    assert record.bytes_by_tier().remote == pytest.approx(max(0, whole - budget), abs=300_000)
    cache = dak.kv_cache(model, batch=2, max_len=1000)
    total = 8 * ROW * 1000
    tier = record.tier
    held = tier.counters.held.local + record.resident_bytes
    assert held <= budget
    claimed = record.claimed_bytes().local + record.resident_bytes
    assert claimed <= budget
    if whole + total > budget:  # all of it is used
        assert claimed >= 0.9 * budget
        assert record.planned_bytes().remote >= whole + total - budget
    else:
        assert cache.planned_bytes_by_tier().remote <= 0.02 * total
    got = generate(model, 300, past_key_values=cache)
    assert torch.equal(got, expected)
    cache.commit(1000)
    assert tier.counters.peak_local_bytes + record.resident_bytes <= budget


def test_a_cache_pushes_weights_out_and_gives_the_room_back():
    budget = int(weights_bytes() * 1.2)
    model, record = offloaded(budget)
    assert record.bytes_by_tier().remote <= 0.02 * weights_bytes()
    cache = dak.kv_cache(model, batch=2, max_len=1000, expected_len=1000)
    pushed = record.bytes_by_tier().remote
    assert pushed + cache.planned_bytes_by_tier().remote >= weights_bytes() * 0.4
    assert len(record.tensors()) == len(record.weights) + 8
    del cache
    assert len(record.tensors()) == len(record.weights)
    assert record.required_remote_bytes() == 0


def test_the_end_of_a_long_context_goes_first():
    """What no step reads costs nothing where it is, so weights stay."""
    budget = int(weights_bytes() * 1.3)
    model, record = offloaded(budget)
    before = record.bytes_by_tier().remote
    cache = dak.kv_cache(model, batch=2, max_len=3000, expected_len=100)
    planned = cache.planned_bytes_by_tier()
    assert record.bytes_by_tier().remote <= before + 0.05 * weights_bytes()
    assert planned.local >= 8 * ROW * 100 and planned.remote > planned.local
    for tensor in cache.storage.tensors:
        assert tensor.buffer.split >= 95 * ROW
        assert tensor.buffer.split % ROW == 0


def test_a_plan_weighs_the_cache_by_how_far_it_is_read():
    budget = int(weights_bytes() * 1.2)
    model, record = offloaded(budget)
    cache = dak.kv_cache(model, batch=2, max_len=2000, expected_len=50)
    uses = replanning.problem_of(record, SESSION.bindings()).uses
    own = {use.tensor: use for use in uses if use.kind == "attention"}
    assert len(own) == 8
    assert {use.touched_bytes for use in own.values()} == {50.0 * ROW}
    assert {round(use.untouched_share, 6) for use in own.values()} == {0.975}
    generate(model, 190, past_key_values=cache)
    uses = replanning.problem_of(record, SESSION.bindings()).uses
    assert {u.touched_bytes for u in uses if u.kind == "attention"} == {199.0 * ROW}


def test_a_budget_that_cannot_hold_it_says_so_and_nothing_changes(monkeypatch):
    model, record = offloaded(int(weights_bytes() * 0.5))
    before = {name: w.buffer.split for name, w in record.weights.items()}
    expected = generate(model, 20)

    def fails(*_: Any) -> None:
        raise MoveError("the old placement stands")

    with monkeypatch.context() as patch, pytest.raises(MoveError):
        patch.setattr(placement, "apply", fails)
        dak.kv_cache(model, batch=2, max_len=2000)
    assert {name: w.buffer.split for name, w in record.weights.items()} == before
    assert not record.caches and torch.equal(generate(model, 20), expected)
    dak.restore(model)
    dak.offload(
        model,
        gpu_memory=10 * weights_bytes(),
        remote="simulated",
        placement={"model.layers": "gpu"},
    )
    record = record_of(model)
    assert record is not None
    record.budget.total = record.resident_bytes + 1000
    with pytest.raises(BudgetError, match=r"a KV cache of .* bytes under gpu_memory="):
        dak.kv_cache(model, batch=2, max_len=2000)
    assert not record.caches


def test_replanning_moves_the_cache_with_the_weights():
    budget = int(weights_bytes() * 1.2)
    model, record = offloaded(budget)
    cache = dak.kv_cache(model, batch=2, max_len=1000)
    expected = generate(build(), 200)
    got = generate(model, 200, past_key_values=cache)
    record.budget.total = int(weights_bytes() * 0.5)
    held = [layer.keys.clone() for layer in cache.layers]
    report = replanning.replan(record, [])
    assert report is not None and report.bytes_to_remote > 0
    assert record.claimed_bytes().local + record.resident_bytes <= record.budget.total
    for layer, keys in zip(cache.layers, held, strict=True):
        assert torch.equal(layer.keys, keys)
    assert torch.equal(got, expected)
    cache.reset()
    assert torch.equal(generate(model, 200, past_key_values=cache), expected)
    record.budget.total = int(weights_bytes() * 3)
    replanning.replan(record, [])
    assert cache.planned_bytes_by_tier().remote <= 0.02 * 8 * ROW * 1000


def test_the_report_shows_the_cache():
    model, record = offloaded(int(weights_bytes() * 0.8))
    cache = dak.kv_cache(model, batch=2, max_len=1000)
    text = str(dak.explain(model))
    assert "KV cache at full length" in text
    assert "kv_cache.layers.*" in text and "attention" in text
    plan = dak.explain(model).plan
    names = [name for name in plan.sizes if name.startswith("kv_cache")]
    assert len(names) == 8
    assert sum(plan.splits[n] for n in names) == cache.planned_bytes_by_tier().remote
    assert Plan.from_json(plan.to_json()) == plan
    assert record.plan is not None


def test_a_plan_from_before_the_cache_still_serves():
    model, record = offloaded(int(weights_bytes() * 0.9))
    old = record.plan
    assert old is not None
    cache = dak.kv_cache(model, batch=2, max_len=400)
    kept = cache.planned_bytes_by_tier()
    plan = replanning.users_plan(old, record)
    assert set(plan.sizes) == {tensor.name for tensor in record.tensors()}
    placement_of = {t.name: t.buffer.nbytes - t.buffer.split for t in cache.storage.tensors}
    assert {name: plan.splits[name] for name in placement_of} == placement_of
    assert cache.planned_bytes_by_tier() == kept


def test_by_ratio_the_split_is_as_asked_and_stays():
    model = dak.offload(build(), offload_ratio=0.3, remote="simulated")
    record = record_of(model)
    assert record is not None
    for ratio in (0.0, 0.25, 1.0, None):
        cache = dak.kv_cache(model, batch=2, max_len=500, offload_ratio=ratio)
        planned = cache.planned_bytes_by_tier()
        wanted = 0.3 if ratio is None else ratio
        assert abs(planned.remote - wanted * planned.total) <= 8 * ROW
        before = [tensor.buffer.split for tensor in cache.storage.tensors]
        plan = make_plan(replanning.problem_of(record, []), hardware.current(record.device))
        placement.apply(plan, record)
        assert [tensor.buffer.split for tensor in cache.storage.tensors] == before
        assert record.bytes_by_tier().remote == pytest.approx(
            0.3 * record.bytes_by_tier().total, rel=0.05
        )
        del cache


def test_two_caches_and_two_models_share_the_budget():
    budget = int(weights_bytes() * 1.6)
    model, record = offloaded(budget)
    first = dak.kv_cache(model, batch=2, max_len=500)
    second = dak.kv_cache(model, batch=4, max_len=300)
    names = [tensor.name for tensor in record.tensors()]
    assert len(set(names)) == len(names) == len(record.weights) + 16
    claimed = record.claimed_bytes().local + record.resident_bytes
    assert claimed <= budget
    loose = dak.kv_cache(build(), batch=1, max_len=500, offload_ratio=0.5, remote="simulated")
    local = sum(t.buffer.claimed_bytes().local for t in loose.storage.tensors)
    assert record.budget.terms(record).other_models == local
    assert first.planned_bytes_by_tier().total and second.planned_bytes_by_tier().total


def test_the_untouched_end_is_free_and_costs_stay_convex():
    cost = OpCost(1.0, 0.1, 60.0, 0.0, 0.6)
    assert cost.time(0.0) == cost.time(0.6) == 1.1
    assert cost.touched(0.6) == 0 and cost.touched(1.0) == 1
    assert cost.time(1.0) == 60.0
    start, kinks = cost.slopes()
    assert start == 0.0
    ((share, jump),) = kinks
    for at in (0.1, 0.6, share, 0.8, 0.9, 1.0):
        assert cost.time(at) == pytest.approx(1.1 + max(0.0, at - share) * jump)

    def use(tensor: str, untouched: float) -> OpUse:
        return OpUse(
            "op:" + tensor, "g", tensor, "attention", 1e8 * (1 - untouched), 0.0, 0.0, 1.0,
            untouched_share=untouched,
        )  # fmt: skip

    tensors = (TensorSpec("cache", 10**8), TensorSpec("weight", 10**8))
    problem = PlanProblem(tensors, (use("cache", 0.7), use("weight", 0.0)), 7 * 10**7, "cpu")
    plan = make_plan(problem, hardware.load("h200"))
    assert plan.splits["cache"] > 0.9 * 7 * 10**7
    assert plan.gap < 0.01

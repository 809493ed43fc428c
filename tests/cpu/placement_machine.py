"""Offloading, moving, writing, restoring and deleting in any order, with failures at any step.

Whatever happens, every model holds what it should hold, a tier holds exactly the pages of the live
buffers, and no budget is exceeded.
"""

from __future__ import annotations

import copy
import gc
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn

from dak_inductor import budget, hardware, placement
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import DakError, MoveError
from dak_inductor.offload import offload
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.plan import PlanProblem
from dak_inductor.planner import make_plan
from dak_inductor.restore import restore

PLACES = st.lists(st.sampled_from((0.0, 0.3, 0.5, 0.77, 1.0)), min_size=6, max_size=6)
AFTER = st.one_of(st.none(), st.integers(0, 80))
"""Steps of a tier that succeed before one fails; None: none fails."""


class Net(nn.Module):
    """Tied weights, a weight stored [in, out], one too small to be divided."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.turned = nn.Parameter(torch.randn(2 * width, width).t())
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.embedding.weight


@dataclass
class Held:
    """A model, what it should hold, and the tier that its weights are in."""

    model: Net
    contents: dict[str, Tensor]
    tier: Tier | None = None


class PlacementMachine(RuleBasedStateMachine):
    """Subclasses say which tier there is, how it fails, and what it holds."""

    width = 64

    def __init__(self) -> None:
        super().__init__()
        self.models: list[Held] = []
        self.kept: list[Tensor] = []

    # --- of the tier

    def make_tier(self) -> Tier:
        raise NotImplementedError

    def fail(self, tier: Tier, after: int) -> None:
        raise NotImplementedError

    def heal(self, tier: Tier) -> None:
        raise NotImplementedError

    def check_tiers(self, expected: TierBytes) -> None:
        raise NotImplementedError

    # --- steps

    def record(self, held: Held) -> OffloadedModel:
        record = record_of(held.model)
        assert record is not None
        return record

    def choose(self, number: int, *, offloaded: bool) -> Held | None:
        found = [held for held in self.models if (held.tier is not None) == offloaded]
        return found[number % len(found)] if found else None

    @initialize(seed=st.integers(0, 99), ratio=st.sampled_from((0.0, 0.4, 1.0)))
    def begin(self, seed: int, ratio: float) -> None:
        """With a model that can be moved."""
        self.build(seed=seed)
        self.offload(number=0, ratio=ratio, after=None)

    @precondition(lambda self: len(self.models) < 2)
    @rule(seed=st.integers(0, 99))
    def build(self, seed: int) -> None:
        torch.manual_seed(seed)
        model = Net(self.width)
        self.models.append(Held(model, copy.deepcopy(model.state_dict())))

    @rule(number=st.integers(0, 3), ratio=st.sampled_from((0.0, 0.4, 1.0)), after=AFTER)
    def offload(self, number: int, ratio: float, after: int | None) -> None:
        held = self.choose(number, offloaded=False)
        if held is None:
            return
        tier = self.make_tier()
        if after is not None:
            self.fail(tier, after)
        flags = {name: p.requires_grad for name, p in held.model.named_parameters()}
        with (
            patch.object(OffloadRequest, "open_tier", lambda *_: tier),
            patch.object(OffloadRequest, "resolved_device", lambda _: torch.device("cpu")),
            redirect_stdout(StringIO()),
        ):
            try:
                offload(held.model, offload_ratio=ratio, remote="simulated")
                held.tier = tier
            except DakError:
                assert after is not None and record_of(held.model) is None
                assert flags == {n: p.requires_grad for n, p in held.model.named_parameters()}
        self.heal(tier)

    @rule(number=st.integers(0, 3), places=PLACES, after=AFTER)
    def move(self, number: int, places: list[float], after: int | None) -> None:
        held = self.choose(number, offloaded=True)
        if held is None or held.tier is None:
            return
        record = self.record(held)
        specs = [
            replace(spec, min_remote=wanted, max_remote=wanted, page=None)
            for spec, share in zip(record.specs(), places, strict=False)
            for wanted in [int(share * spec.nbytes) // 256 * 256]
        ]
        asked = sum(spec.min_remote for spec in specs)
        problem = PlanProblem(tuple(specs), (), asked, "cpu", model=record.fingerprint)
        plan = make_plan(problem, hardware.load("h200"))
        before = {w.name: w.buffer.split for w in record.weights.values()}
        if after is not None:
            self.fail(held.tier, after)
        try:
            placement.apply(plan, record)
        except MoveError:
            assert after is not None
            assert before == {w.name: w.buffer.split for w in record.weights.values()}
        else:
            for weight in record.weights.values():
                wanted = weight.buffer.nbytes - plan.splits[weight.name]
                assert 0 <= wanted - weight.buffer.split < weight.buffer.page_bytes
        self.heal(held.tier)

    @rule(number=st.integers(0, 3), seed=st.integers(0, 99))
    def write(self, number: int, seed: int) -> None:
        """In place, as a LoRA merge does."""
        if not self.models:
            return
        held = self.models[number % len(self.models)]
        torch.manual_seed(seed)
        names = sorted(held.contents)
        name = names[seed % len(names)]
        with torch.no_grad():
            held.model.state_dict()[name].mul_(2).add_(torch.randn(1))
        held.contents = {n: t.clone() for n, t in held.model.state_dict().items()}

    @rule(number=st.integers(0, 3))
    def export(self, number: int) -> None:
        """A tensor of a weight that outlives its model."""
        held = self.choose(number, offloaded=True)
        if held is not None and len(self.kept) < 3:
            self.kept.append(held.model.layers[number % 2].weight.detach())

    @rule(number=st.integers(0, 3))
    def restore(self, number: int) -> None:
        held = self.choose(number, offloaded=True)
        if held is not None:
            restore(held.model)
            held.tier = None
            assert record_of(held.model) is None

    @rule(number=st.integers(0, 3))
    def delete(self, number: int) -> None:
        if self.models:
            del self.models[number % len(self.models)]

    # --- always

    @invariant()
    def contents_are_right(self) -> None:
        for held in self.models:
            assert held.model.head.weight is held.model.embedding.weight
            for name, tensor in held.model.state_dict().items():
                assert torch.equal(tensor, held.contents[name]), name

    @invariant()
    def accounting_is_right(self) -> None:
        gc.collect()
        expected = TierBytes()
        for held in self.models:
            if held.tier is None:
                assert record_of(held.model) is None
                continue
            record = self.record(held)
            for weight in record.weights.values():
                pages = weight.buffer.physical_bytes()
                assert weight.buffer.bytes_by_tier().total == weight.buffer.nbytes <= pages.total
                local = weight.buffer.local_pages(weight.buffer.split)
                assert pages.local == local * weight.buffer.page_bytes
                expected = expected + pages
        self.check_tiers(expected)

    def kept_pages(self) -> TierBytes:
        """Pages of buffers that only an exported tensor keeps alive."""
        known = {
            id(w.buffer)
            for held in self.models
            if held.tier is not None
            for w in self.record(held).weights.values()
        }
        buffers = {id(b): b for t in self.kept if (b := address_table.lookup(t.data_ptr()))}
        loose = [b for key, b in buffers.items() if key not in known]
        return sum((b.physical_bytes() for b in loose), TierBytes())

    def teardown(self) -> None:
        self.models.clear()
        self.kept.clear()
        gc.collect()
        self.check_tiers(TierBytes())
        budget._budgets.clear()

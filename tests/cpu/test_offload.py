"""`offload` and `restore` on the simulated tier: bytes by tier, identity, ties, undoing."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import (
    BudgetError,
    CheckpointError,
    HostMemoryError,
    ModelError,
    OptionError,
    PatternError,
    PlanError,
    TierError,
)
from dak_inductor.inventory import take_inventory
from dak_inductor.offload import offload
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import offloaded_models, record_of
from dak_inductor.offloaded_model import find_resident_copies
from dak_inductor.restore import restore
from dak_inductor.wrappers import rewrapped


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("scale", torch.full((width,), 2.0), persistent=False)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x)))) * self.scale


class Network(nn.Module):
    def __init__(self, width=64, rows=500):
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, rows, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model():
    return Network().eval()


@pytest.fixture
def ids():
    return torch.randint(0, 500, (2, 7))


def on_simulated(model, **arguments):
    arguments.setdefault("offload_ratio", 0.5)
    return offload(model, remote="simulated", **arguments)


def test_outputs_are_equal_and_the_bytes_are_where_the_ratio_says(model, ids, capsys):
    expected = model(ids)
    weight = model.blocks[0].up.weight
    assert on_simulated(model, offload_ratio=0.4) is model
    record = record_of(model)
    held = record.bytes_by_tier()
    assert held.total == 2 * 500 * 64 * 4 + 4 * 64 * 256 * 4
    assert held.remote == -(-round(0.4 * held.total) // 256) * 256
    assert model.blocks[0].up.weight is weight
    assert torch.equal(model(ids), expected)
    assert address_table.lookup(weight.data_ptr()) is record.weights["blocks.0.up.weight"].buffer
    assert not any(p.requires_grad for p in model.parameters())
    line = capsys.readouterr().out.strip()
    assert line.startswith("dak: Network 521.7 kB: ") and "6 of 12 tensors tiered" in line
    assert "(39." in line or "(40." in line


def test_embeddings_go_first(model):
    on_simulated(model, offload_ratio=0.2)
    record = record_of(model)
    away = {name for name, w in record.weights.items() if w.buffer.bytes_by_tier().remote > 0}
    assert "embedding.weight" in away
    remote = {name: w.buffer.bytes_by_tier().remote for name, w in record.weights.items()}
    # the others up to where link and HBM end together
    assert remote["embedding.weight"] > 0.9 * sum(remote.values())


@pytest.mark.parametrize("budget", [20_000, 150_000, 400_000, 10**9])
def test_pages_held_stay_within_the_budget(model, ids, budget):
    expected = model(ids)
    on_simulated(model, offload_ratio=None, gpu_memory=budget)
    record = record_of(model)
    assert record.physical_bytes().local + record.resident_bytes <= budget
    assert record.tier.counters.peak_local_bytes + record.resident_bytes <= budget
    assert (record.bytes_by_tier().remote == 0) == (budget == 10**9)
    wasted = record.physical_bytes().remote - record.bytes_by_tier().remote
    assert wasted <= len(record.weights) * record.tier.page_bytes
    assert torch.equal(model(ids), expected)


def test_placement_patterns(model):
    on_simulated(model, placement={"blocks.*": "cpu", "blocks.1": "gpu", "head": "gpu"})
    weights = record_of(model).weights
    by_name = {name: w.buffer.bytes_by_tier() for name, w in weights.items()}
    assert by_name["blocks.0.up.weight"].local == by_name["blocks.0.down.weight"].local == 0
    assert by_name["blocks.1.up.weight"].remote == by_name["head.weight"].remote == 0
    assert by_name["embedding.weight"].remote > 0


@pytest.mark.parametrize(
    ("placement", "hint"),
    [
        ({"lm_haed": "gpu"}, "matches no tensor"),
        ({"haed": "gpu"}, "head"),
        ({"head": "disk"}, "unknown place"),
        ({"*norm*": "cpu"}, "stay whole"),
        ({"head": 3}, "names to places"),
    ],
)
def test_bad_patterns(model, placement, hint):
    with pytest.raises(PatternError, match=hint):
        on_simulated(model, placement=placement)
    assert record_of(model) is None


def test_tied_weights_move_once_and_stay_tied(model, ids):
    model.head.weight = model.embedding.weight
    expected = model(ids)
    on_simulated(model)
    record = record_of(model)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" in record.weights["embedding.weight"].names
    kinds = {use.kind for use in record.default_uses if use.tensor == "embedding.weight"}
    assert kinds == {"embedding", "linear"}
    assert torch.equal(model(ids), expected)


def test_overlapping_views_still_alias(ids):
    flat = torch.randn(128, 64)
    model = nn.Module()
    model.whole, model.tail = nn.Parameter(flat), nn.Parameter(flat[64:])
    model.turned = nn.Parameter(torch.randn(96, 64).t())
    before = model.turned.detach().clone()
    on_simulated(model)
    record = record_of(model)
    assert len(record.weights) == 2 and len(record.weights["whole"].parts) == 2
    with torch.no_grad():
        model.tail.fill_(3.0)
    assert (model.whole[64:] == 3).all() and not (model.whole[:64] == 3).any()
    assert model.turned.stride() == (1, 64) and torch.equal(model.turned, before)
    restore(model)
    assert model.tail.data_ptr() == model.whole[64:].data_ptr()


def test_a_tensor_with_gaps_becomes_contiguous_and_goes_back_as_it_was_on_failure(monkeypatch):
    wide = torch.randn(64, 128)
    model = nn.Module()
    model.gaps, model.last = nn.Parameter(wide[:, :64]), nn.Parameter(torch.randn(64, 64))
    tier = SimulatedTier()
    monkeypatch.setattr(OffloadRequest, "open_tier", lambda self, device: tier)
    tier.inject_failure("write", after=1)
    with pytest.raises(HostMemoryError):
        on_simulated(model)
    assert model.gaps.stride() == (128, 1) and torch.equal(model.gaps, wide[:, :64])
    on_simulated(model)
    assert model.gaps.is_contiguous() and torch.equal(model.gaps, wide[:, :64])


@pytest.mark.parametrize("operation", ["allocate", "write"])
@pytest.mark.parametrize("after", range(6))
def test_after_a_failure_at_any_tensor_everything_is_back(
    model, ids, monkeypatch, operation, after
):
    model.head.weight = model.embedding.weight if after == 1 else model.head.weight
    expected = model(ids)
    identities = {name: id(p) for name, p in model.named_parameters()}
    tier = SimulatedTier()
    monkeypatch.setattr(OffloadRequest, "open_tier", lambda self, device: tier)
    tier.inject_failure(operation, after=min(after, 4))
    with pytest.raises(HostMemoryError, match="injected"):
        on_simulated(model)
    gc.collect()
    assert record_of(model) is None and tier.counters.held == TierBytes()
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert all(p.requires_grad for p in model.parameters())
    assert all(address_table.lookup(p.data_ptr()) is None for p in model.parameters())
    assert torch.equal(model(ids), expected)
    on_simulated(model)
    assert torch.equal(model(ids), expected)


def test_host_memory_is_refused_before_anything_moves(model):
    with pytest.raises(HostMemoryError, match="host_memory=100000"):
        on_simulated(model, offload_ratio=0.9, host_memory=100_000)
    assert all(p.requires_grad for p in model.parameters())
    on_simulated(model, offload_ratio=0.1, host_memory=100_000)


def test_restore_gives_back_plain_tensors_with_their_grad_flags(model, ids):
    model.head.weight.requires_grad_(False)
    expected, tier = model(ids), None
    on_simulated(model)
    tier = record_of(model).tier
    weight = model.head.weight
    assert restore(model) is model
    assert record_of(model) is None
    flags = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert flags == {"head.weight"} and model.head.weight is weight
    assert torch.equal(model(ids), expected)
    gc.collect()
    assert tier.counters.held == TierBytes()
    with pytest.raises(ModelError, match="not offloaded"):
        restore(model)


def test_offloading_twice_names_restore(model):
    on_simulated(model)
    for target in (model, model.blocks[0], nn.Sequential(model.head)):
        with pytest.raises(ModelError, match=r"dak\.restore"):
            on_simulated(target)


def test_a_wrapper_is_not_offloaded_twice():
    model = nn.Linear(64, 64)
    model.weight = nn.Parameter(TwoTensor(torch.randn(64, 64), torch.randn(64, 64)))
    on_simulated(model)
    with pytest.raises(ModelError, match=r"weight is offloaded already.*dak\.restore"):
        on_simulated(model)


@pytest.mark.parametrize("around", [False, True])
def test_a_model_whose_weights_were_replaced_is_offloaded_as_a_new_one(model, around):
    """The record that it had holds no budget, refuses no export and loses no grad flags."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    flags["head.weight"] = model.head.weight.requires_grad_(False).requires_grad
    offload(model, gpu_memory=100_000, remote="simulated")
    model.half()
    asked = nn.Sequential(model) if around else model
    everything = 20_000 + sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    offload(asked, gpu_memory=everything, remote="simulated")
    record = record_of(asked)
    assert record.bytes_by_tier().remote == 0 and offloaded_models() == [record]
    restore(asked)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not model._forward_pre_hooks and offloaded_models() == []


def test_a_dead_model_in_a_cycle_of_references_takes_no_share(model):
    dead = Network()
    dead.compile(backend="eager")  # it holds itself from here on
    everything = 20_000 + sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gc.collect()
    gc.disable()
    try:
        offload(dead, gpu_memory=everything, remote="simulated")
        del dead
        offload(model, gpu_memory=everything, remote="simulated")
    finally:
        gc.enable()
    assert record_of(model).bytes_by_tier().remote == 0


def test_state_dict_and_in_place_updates_keep_the_tiers(model, ids):
    on_simulated(model)
    record = record_of(model)
    held = record.bytes_by_tier()
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        model.head.weight.add_(torch.ones(500, 1) @ torch.ones(1, 64))
    assert torch.equal(model.head.weight, state["head.weight"] + 1)
    assert find_resident_copies(record) == [] and record.bytes_by_tier() == held
    remote = record.weights["embedding.weight"].buffer.remote_view().tensor().view(torch.float32)
    assert torch.equal(remote, state["embedding.weight"].flatten()[-remote.numel() :])


def test_resident_copies_are_found_by_name(model):
    on_simulated(model)
    record = record_of(model)
    assert find_resident_copies(record) == []
    model.blocks[0].up.weight = nn.Parameter(torch.zeros(256, 64))
    assert find_resident_copies(record) == ["blocks.0.up.weight"]
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert set(find_resident_copies(record)) == set(record.weights)
    restore(model)


def test_half_and_deepcopy_give_resident_tensors(model):
    on_simulated(model)
    record = record_of(model)
    twin = copy.deepcopy(model)
    assert record_of(twin) is None and find_resident_copies(record) == []
    assert address_table.lookup(twin.head.weight.data_ptr()) is None
    model.half()
    assert set(find_resident_copies(record)) == set(record.weights)


def test_inner_tensors_of_a_wrapper_are_divided():
    inner = TwoTensor(torch.randn(64, 64), torch.randn(64, 64))
    model = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(inner)
    x = torch.randn(3, 64)
    expected = model(x)
    on_simulated(model)
    record = record_of(model)
    assert set(record.weights) == {"weight.a", "weight.b"}
    assert record.bytes_by_tier().remote == 16_384
    assert "stock path" in record.refusals[0].reason
    actual = model(x)
    assert torch.equal(actual.a, expected.a) and torch.equal(actual.b, expected.b)
    restore(model)
    assert torch.equal(model(x).a, expected.a)


def test_recurrent_modules_keep_their_second_list():
    model = nn.LSTM(64, 64).eval()
    x = torch.randn(5, 2, 64)
    expected = model(x)[0]
    on_simulated(model)
    assert record_of(model).bytes_by_tier().remote > 0
    assert torch.equal(model(x)[0], expected)


def test_a_model_that_dies_frees_its_memory():
    model = Network()
    on_simulated(model)
    record = record_of(model)
    tier, gone = record.tier, weakref.ref(record)
    assert record in offloaded_models()
    del model, record
    gc.collect()
    assert gone() is None and tier.counters.held == TierBytes()


def test_originals_are_released_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    layers = list(model)
    pointers = [layer.weight.untyped_storage()._cdata for layer in layers]
    seen = []

    class Watching(SimulatedTier):
        def allocate(self, nbytes, *, split):
            tensors = [layer.weight.untyped_storage()._cdata for layer in layers]
            seen.append(sum(a == b for a, b in zip(tensors, pointers, strict=True)))
            return super().allocate(nbytes, split=split)

    monkeypatch.setattr(OffloadRequest, "open_tier", lambda self, device: Watching())
    on_simulated(model)
    assert seen == [4, 3, 2, 1]
    layers.clear()  # the tier's class holds them


def test_a_plan_can_be_given_and_is_checked(model, tmp_path):
    on_simulated(model, offload_ratio=0.3)
    plan = record_of(model).plan
    restore(model)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    on_simulated(model, offload_ratio=None, plan=path)
    assert record_of(model).bytes_by_tier().remote == plan.remote_bytes
    restore(model)
    with pytest.raises(PlanError):
        on_simulated(Network(width=32), offload_ratio=None, plan=plan)
    with pytest.raises(PlanError, match="cannot be read"):
        on_simulated(model, offload_ratio=None, plan=tmp_path / "none.json")
    with pytest.raises(BudgetError, match="the plan keeps"):
        on_simulated(model, offload_ratio=None, gpu_memory=50_000, plan=plan)
    with pytest.raises(OptionError, match="leave offload_ratio out"):
        on_simulated(model, plan=plan)


def test_places_that_do_not_exist(model):
    with pytest.raises(TierError, match="names no tier"):
        offload(model, offload_ratio=0.5, remote="disk")
    with pytest.raises(TierError, match="on the CPU"):
        on_simulated(model, device="meta")
    with pytest.raises(TierError, match="no device"):
        on_simulated(model, device="gpu7")
    if not torch.cuda.is_available():
        with pytest.raises(TierError, match="simulated"):
            offload(model, gpu_memory="1GB")


def test_meta_needs_a_checkpoint_and_a_checkpoint_needs_meta(model, tmp_path):
    with pytest.raises(CheckpointError, match="no tensor of Network is on meta"):
        on_simulated(model, checkpoint=tmp_path)
    with torch.device("meta"):
        empty = Network()
    with pytest.raises(CheckpointError, match="checkpoint=<path>"):
        on_simulated(empty)


def test_a_compiled_wrapper_is_seen_through(model, ids):
    compiled = torch.compile(model, backend="eager")
    assert on_simulated(compiled) is compiled
    assert record_of(compiled) is record_of(model)
    restore(compiled)
    assert record_of(model) is None


def test_bitsandbytes_parameters_keep_their_state():
    class State:
        device = None

        def to(self, device):
            self.device = device

    class Params4bit(nn.Parameter):
        pass

    model = nn.Linear(64, 64, bias=False)
    packed = torch.randint(0, 256, (8192,), dtype=torch.uint8)
    model.weight = torch.Tensor._make_subclass(Params4bit, packed.clone(), False)
    model.weight.bnb_quantized, model.weight.quant_state = True, State()
    model.weight.CB = model.weight.data
    weight = model.weight
    on_simulated(model)
    record = record_of(model)
    assert model.weight is weight and record.bytes_by_tier() == TierBytes(4096, 4096)
    assert torch.equal(weight.data, packed) and weight.quant_state.device == torch.device("cpu")
    assert weight.CB.data_ptr() == weight.data_ptr()
    assert "stock path" in record.refusals[0].reason
    restore(model)
    assert torch.equal(weight.data, packed)


def test_nothing_to_divide_is_not_silent():
    with pytest.raises(ModelError, match="its largest parameter has 64 bytes"):
        on_simulated(nn.Linear(4, 4))
    offload(nn.Linear(4, 4), gpu_memory="1GB", remote="simulated")


def test_inference_mode_and_default_devices_do_not_leak_in(model, ids):
    expected = model(ids)
    with torch.inference_mode(), torch.device("meta"):
        on_simulated(model)
    assert not model.head.weight.is_inference()
    assert torch.equal(model(ids), expected)
    restore(model)
    model(ids).sum().backward()
    assert model.head.weight.grad is not None


def test_a_long_load_shows_a_bar_and_a_short_one_none(model, monkeypatch, capsys):
    on_simulated(model)
    assert capsys.readouterr().err == ""
    restore(model)
    # the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["dak_inductor.offload"], "_BAR_FROM_BYTES", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    on_simulated(model)
    assert "offloading" in capsys.readouterr().err


def test_a_wrapper_is_rebuilt_around_its_inner_tensors():
    model = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(TwoTensor(torch.randn(64, 64), torch.randn(64, 64)))
    old = model.weight
    (wrapper,) = take_inventory(model, minimum_bytes=1).wrappers
    back = rewrapped(wrapper, torch.device("meta"))  # as if the inner tensors had gone elsewhere
    assert model.weight is not old and type(model.weight.data) is TwoTensor
    assert model.weight.a.data_ptr() == old.a.data_ptr()
    back()
    assert model.weight is old


def test_sparse_tensors_come_along_whole():
    model = nn.Linear(64, 64)
    model.mask = nn.Parameter(torch.eye(64).to_sparse())
    on_simulated(model)
    assert "layout" in record_of(model).refusals[0].reason
    restore(model)
    assert torch.equal(model.mask.to_dense(), torch.eye(64))

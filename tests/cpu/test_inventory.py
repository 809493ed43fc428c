"""What an inventory sees: ties, views, gaps, small tensors, buffers, wrappers, refusals."""

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dak_inductor.errors import ModelError
from dak_inductor.inventory import LARGE_BUFFER_BYTES, take_inventory
from dak_inductor.model_checks import check_model


def names(entries):
    return [entry.names for entry in entries]


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor)


def test_tied_weights_are_one_entry_with_all_names():
    shared = parameter(64, 64)
    model = nn.Sequential(Holder(a=shared), Holder(b=shared, c=parameter(64, 64)))
    inventory = take_inventory(model, minimum_bytes=4096)
    assert names(inventory.entries) == [("0.a", "1.b"), ("1.c",)]
    assert inventory.tierable_bytes == 2 * 64 * 64 * 4
    assert inventory.parameter_count == 2


def test_a_shared_module_gives_all_its_names():
    layer = nn.Linear(64, 64, bias=False)
    model = nn.ModuleDict({"x": layer, "y": layer})
    assert names(take_inventory(model, minimum_bytes=1).entries) == [("x.weight", "y.weight")]


def test_overlapping_views_move_together_and_disjoint_ones_do_not():
    flat = torch.randn(4, 1024)
    model = Holder(
        whole=nn.Parameter(flat[:2]),
        second=nn.Parameter(flat[1]),
        apart=nn.Parameter(flat[3]),
    )
    inventory = take_inventory(model, minimum_bytes=1024)
    assert names(inventory.entries) == [("whole", "second"), ("apart",)]
    group = inventory.entries[0]
    assert group.nbytes == 8192
    assert torch.equal(group.bytes().view(torch.float32), flat[:2].flatten())


def test_strides_and_gaps():
    dense, gaps = torch.randn(64, 32).t(), torch.randn(64, 64)[:, :32]
    model = Holder(dense=nn.Parameter(dense), gaps=nn.Parameter(gaps))
    first, second = take_inventory(model, minimum_bytes=1).entries
    assert not first.compact and first.nbytes == 64 * 32 * 4
    assert second.compact and second.nbytes == 64 * 32 * 4
    assert torch.equal(second.bytes().view(torch.float32), gaps.flatten())


def test_small_tensors_and_buffers_stay_whole_and_large_buffers_do_not():
    model = Holder(
        small=parameter(10),
        weight=parameter(64, 64),
        mask=torch.zeros(100_000),
        table=torch.zeros(LARGE_BUFFER_BYTES, dtype=torch.uint8),
        empty=nn.Parameter(torch.zeros(0, 5)),
    )
    inventory = take_inventory(model, minimum_bytes=4096)
    assert names(inventory.entries) == [("weight",), ("table",)]
    assert sorted(names(inventory.resident)) == [("empty",), ("mask",), ("small",)]
    assert inventory.refusals == []
    assert inventory.total_bytes == 40 + 16_384 + 400_000 + LARGE_BUFFER_BYTES


def test_meta_tensors_are_told_apart():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    inventory = take_inventory(model, minimum_bytes=4096)
    assert names(inventory.entries) == [("0.weight",), ("1.weight",)]


def test_inner_tensors_of_wrappers_are_the_entries_and_it_is_said():
    inner = TwoTensor(torch.randn(64, 64), torch.randn(64, 64))
    model = Holder(weight=nn.Parameter(inner))
    inventory = take_inventory(model, minimum_bytes=1)
    assert names(inventory.entries) == [("weight.a",), ("weight.b",)]
    assert "stock path" in inventory.refusals[0].reason
    assert inventory.refusals[0].node == "weight"


def test_sparse_tensors_are_refused_with_the_reason():
    model = Holder(sparse=nn.Parameter(torch.eye(100).to_sparse()), weight=parameter(64, 64))
    inventory = take_inventory(model, minimum_bytes=1)
    assert names(inventory.entries) == [("weight",)]
    assert "layout" in inventory.refusals[0].reason


def test_the_fingerprint_knows_names_and_shapes_not_values():
    one, two = nn.Linear(64, 64), nn.Linear(64, 64)
    prints = {
        take_inventory(m, minimum_bytes=1).fingerprint for m in (one, two, one.to(torch.float32))
    }
    assert len(prints) == 1
    assert take_inventory(nn.Linear(64, 32), minimum_bytes=1).fingerprint not in prints
    assert take_inventory(one.half(), minimum_bytes=1).fingerprint not in prints


def test_the_fingerprint_does_not_know_what_a_tier_leaves_whole():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64), nn.Linear(16, 16))
    prints = {take_inventory(model, minimum_bytes=n).fingerprint for n in (1, 600, 10**6)}
    assert len(prints) == 1


def test_models_that_cannot_be_offloaded_say_why():
    with pytest.raises(ModelError, match=r"nn\.Module"):
        check_model({"weight": 1})
    with pytest.raises(ModelError, match="no parameters"):
        check_model(nn.ReLU())
    with pytest.raises(ModelError, match="lazy"):
        check_model(nn.LazyLinear(4))
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0]._hf_hook = object()
    with pytest.raises(ModelError, match="remove_hook_from_module"):
        check_model(hooked)
    sharded = type("FullyShardedDataParallel", (nn.Linear,), {})(4, 4)
    with pytest.raises(ModelError, match="FSDP"):
        check_model(nn.Sequential(sharded))
    unquantised = type("Params4bit", (nn.Parameter,), {"bnb_quantized": False})
    with pytest.raises(ModelError, match="not quantised yet"):
        check_model(Holder(weight=torch.Tensor._make_subclass(unquantised, torch.zeros(4))))


def test_accelerate_dispatch_is_recognised():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="_hf_hook"):
        check_model(model)

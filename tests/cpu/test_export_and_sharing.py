"""Leaving the process: export and inter-process sharing of offloaded models are refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.errors import TieredTensorError
from dak_inductor.offload import offload
from dak_inductor.restore import restore

X = torch.randn(2, 64)


@pytest.fixture
def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return offload(made, offload_ratio=0.5, remote="simulated")


def send(value: object) -> object:
    """Through the pickler that queues and pipes use, and back in this process."""
    return pickle.loads(ForkingPickler.dumps(value))


def test_export_is_refused_until_the_model_is_restored(model: nn.Module) -> None:
    with pytest.raises(TieredTensorError, match=r"dak\.restore"):
        torch.export.export(model, (X,))
    restore(model)
    exported = torch.export.export(model, (X,))
    assert torch.equal(exported.module()(X), model(X))


def test_a_strict_export_names_the_reason(model: nn.Module) -> None:
    """Dynamo wraps what the model raises, and quotes it."""
    with pytest.raises(RuntimeError, match="an offloaded model cannot be exported"):
        torch.export.export(model, (X,), strict=True)


def test_a_model_around_an_offloaded_one_is_refused_too(model: nn.Module) -> None:
    with pytest.raises(TieredTensorError):
        torch.export.export(nn.Sequential(model, nn.ReLU()), (X,))


@pytest.mark.parametrize("strict", [False, True])
def test_a_copy_may_be_exported(model: nn.Module, strict: bool) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for plain in (copy.deepcopy(model), loaded):
        exported = torch.export.export(plain, (X,), strict=strict)
        assert torch.equal(exported.module()(X), model(X))


def test_compiling_is_not_disturbed(model: nn.Module) -> None:
    expected = model(X)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.equal(compiled(X), expected) and torch.equal(compiled(X), expected)
    assert (counter.frame_count, counter.op_count) == (1, 3)


def test_tiered_tensors_are_not_sent(model: nn.Module) -> None:
    weight = model[0].weight  # type: ignore[index]
    address = weight.data_ptr()
    for tensor in (weight, weight.detach(), weight[3:5]):
        with pytest.raises(TieredTensorError, match=r"0\.weight .*clone"):
            send(tensor)
    with pytest.raises(TieredTensorError):
        send({"state": model.state_dict()})
    assert weight.data_ptr() == address and address_table.lookup(address) is not None


def test_other_tensors_are_sent_as_before(model: nn.Module) -> None:
    weight = model[0].weight  # type: ignore[index]
    for tensor in (weight.detach().clone(), X, torch.empty(0), X.to_sparse(), nn.Parameter(X)):
        assert torch.equal(send(tensor).to_dense(), tensor.to_dense())  # type: ignore[attr-defined]


def test_a_buffer_without_a_model_is_named_by_its_size() -> None:
    from dak_inductor.sharing_refusal import reduce_untiered

    tensor = SimulatedTier().allocate(8192, split=4096).tensor(torch.uint8, (8192,))
    with pytest.raises(TieredTensorError, match="a tensor of 8192 bytes"):
        reduce_untiered(tensor)

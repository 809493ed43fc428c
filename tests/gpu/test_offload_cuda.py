"""`dak.offload` on a card: bytes in both memories, one address, everything torch does still works.

Stock kernels run on the same values at the same address, so outputs must equal the resident model's
bit for bit; every test also asserts that bytes are remote, or equal outputs would prove nothing.
"""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dak_inductor as dak
from dak_inductor.budget import CONTEXT_GROWTH, MINIMUM_RESERVE
from dak_inductor.cuda_runtime import address_table, vmm
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.placement import LAUNCH_LOCK

FEATURES = 4096
PAGE = 2 << 20


class Stack(nn.Module):
    """Linears of 32 MiB each, with biases that are too small to divide."""

    def __init__(self, depth: int = 4, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(FEATURES, FEATURES, device=device, dtype=torch.bfloat16) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return x


def settle() -> None:
    """Wait for the work queued and for the memory that was given up."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        assert vmm.drain(30)


def record(model: nn.Module) -> OffloadedModel:
    found = record_of(model)
    assert found is not None
    return found


def move_all(model: nn.Module, remote_share: float) -> int:
    """Move every split of a model to about `remote_share`; returns the bytes that changed
    memory."""
    moved = 0
    with LAUNCH_LOCK:
        settle()
        for weight in record(model).weights.values():
            before = weight.buffer.split
            weight.buffer.move(round((1 - remote_share) * weight.buffer.nbytes))
            moved += abs(weight.buffer.split - before)
    return moved


@pytest.fixture
def inputs(device: torch.device) -> torch.Tensor:
    return torch.randn(16, FEATURES, device=device, dtype=torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("start", ["on the CPU", "on the GPU"])
def test_outputs_are_the_residents_bit_for_bit(
    device: torch.device, remote: str, inputs: torch.Tensor, start: str
) -> None:
    model = Stack(device=device)
    expected = model(inputs)
    if start == "on the CPU":
        model.to("cpu")
    assert dak.offload(model, offload_ratio=0.4, remote=remote) is model
    held = record(model).bytes_by_tier()
    assert held.remote == pytest.approx(0.4 * held.total, rel=1e-3)
    assert record(model).weights["layers.0.weight"].buffer.tier == remote
    assert all(p.device == device for p in model.parameters())
    assert torch.equal(model(inputs), expected)


@torch.no_grad()
def test_addresses_are_those_of_the_buffers(device: torch.device, remote: str) -> None:
    model = dak.offload(Stack(), offload_ratio=0.5, remote=remote)
    for name, weight in record(model).weights.items():
        parameter = model.get_parameter(name)
        assert parameter.data_ptr() == weight.buffer.address
        assert address_table.lookup(parameter.data_ptr() + parameter.nbytes - 1) is weight.buffer
        assert not parameter.requires_grad


@torch.no_grad()
def test_moves_keep_address_contents_and_captured_graphs(
    device: torch.device, remote: str, inputs: torch.Tensor
) -> None:
    model = dak.offload(Stack(), offload_ratio=0.25, remote=remote)
    model(inputs)
    settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(inputs)
    graph.replay()
    expected = output.clone()
    addresses = [p.data_ptr() for p in model.parameters()]
    for share in (1.0, 0.5, 0.0, 0.75):
        assert move_all(model, share) > 0
        held = record(model).bytes_by_tier()
        # whole pages, and never more local than asked
        assert share * held.total <= held.remote <= share * held.total + 4 * PAGE
        output.fill_(torch.nan)
        graph.replay()
        assert torch.equal(output, expected)
        assert [p.data_ptr() for p in model.parameters()] == addresses


@torch.no_grad()
def test_checkpoint_into_a_meta_model(device: torch.device, remote: str, tmp_path: Path) -> None:
    source = Stack()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = dak.offload(
        Stack(device="meta"),
        checkpoint=tmp_path / "model.safetensors",
        offload_ratio=0.6,
        remote=remote,
    )
    assert record(model).bytes_by_tier().remote > 0
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor)


@torch.no_grad()
def test_in_place_updates_reach_both_memories(device: torch.device, inputs: torch.Tensor) -> None:
    model, resident = Stack(), Stack()
    resident.load_state_dict(model.state_dict())
    resident.to(device)
    dak.offload(model, offload_ratio=0.5)
    before = record(model).bytes_by_tier()
    left = torch.randn(FEATURES, 8, device=device, dtype=torch.bfloat16)
    right = torch.randn(8, FEATURES, device=device, dtype=torch.bfloat16)
    for one, other in zip(model.layers, resident.layers, strict=True):
        one.weight.add_(left @ right, alpha=0.01)
        other.weight.add_(left @ right, alpha=0.01)
    assert torch.equal(model(inputs), resident(inputs))
    assert record(model).bytes_by_tier() == before


@torch.no_grad()
def test_state_dict_goes_out_and_comes_in(device: torch.device, inputs: torch.Tensor) -> None:
    model, other = dak.offload(Stack(), offload_ratio=0.5), Stack(device=device)
    held = record(model).bytes_by_tier()
    model.load_state_dict(other.state_dict())
    assert record(model).bytes_by_tier() == held
    assert torch.equal(model(inputs), other(inputs))
    copies = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(copies[n], t.cpu()) for n, t in other.state_dict().items())


@torch.no_grad()
def test_tied_weights_share_one_buffer(device: torch.device, inputs: torch.Tensor) -> None:
    model = Stack(depth=3)
    model.layers[2].weight = model.layers[0].weight
    dak.offload(model, offload_ratio=0.5)
    assert model.layers[2].weight is model.layers[0].weight
    names = [weight.names for weight in record(model).weights.values()]
    assert ("layers.0.weight", "layers.2.weight") in names


@torch.no_grad()
def test_deepcopy_is_resident_and_equal(device: torch.device, inputs: torch.Tensor) -> None:
    model = dak.offload(Stack(), offload_ratio=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = copy.deepcopy(model)
    assert all(address_table.lookup(p.data_ptr()) is None for p in other.parameters())
    assert torch.equal(model(inputs), other(inputs))


@torch.no_grad()
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_restore_gives_plain_tensors_back(
    device: torch.device, inputs: torch.Tensor, target: str
) -> None:
    model = Stack()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dak.offload(model, offload_ratio=0.5)
    assert record(model).bytes_by_tier().remote > 0
    dak.restore(model, device=target)
    assert record_of(model) is None
    for name, parameter in model.named_parameters():
        assert parameter.device.type == target
        assert parameter.requires_grad
        assert address_table.lookup(parameter.data_ptr()) is None
        assert torch.equal(parameter.cpu(), before[name])


@pytest.mark.alone
def test_memory_goes_back_with_the_model(device: torch.device) -> None:
    dak.offload(Stack(depth=1), offload_ratio=0.5)  # pays for the context and libraries
    gc.collect()
    settle()
    buffers, free = len(address_table.live_buffers()), torch.cuda.mem_get_info(device)[0]
    model = dak.offload(Stack(depth=16), offload_ratio=0.25)
    held = record(model).physical_bytes()
    taken = free - torch.cuda.mem_get_info(device)[0]
    assert taken >= held.local - 16 * PAGE
    del model
    gc.collect()
    settle()
    torch.cuda.empty_cache()
    assert len(address_table.live_buffers()) == buffers
    assert free - torch.cuda.mem_get_info(device)[0] < 0.1 * held.local


@pytest.mark.alone
def test_the_card_stays_within_the_budget(device: torch.device, inputs: torch.Tensor) -> None:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    budget = total - free + MINIMUM_RESERVE + CONTEXT_GROWTH + (256 << 20)
    model = dak.offload(Stack(depth=24), gpu_memory=budget)  # 805 MB of weights
    held = record(model).bytes_by_tier()
    assert held.remote > 0.5 * held.total
    assert held.local > 0.1 * held.total
    with torch.no_grad():
        model(inputs)
    settle()
    free, total = torch.cuda.mem_get_info(device)
    assert total - free <= budget


def test_too_little_host_memory_is_said_before_anything_moves(device: torch.device) -> None:
    model = Stack(depth=2)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(dak.errors.HostMemoryError):
        dak.offload(model, offload_ratio=0.9, host_memory=1 << 20)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert record_of(model) is None


def test_a_tier_that_is_not_there_is_named(device: torch.device) -> None:
    for remote in (f"cuda:{torch.cuda.device_count()}", f"cuda:{device.index}", "disk"):
        with pytest.raises(dak.errors.TierError):
            dak.offload(Stack(depth=1), offload_ratio=0.5, remote=remote)

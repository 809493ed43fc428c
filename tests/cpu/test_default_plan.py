"""What a decode step is taken to read before any graph was seen."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dak_inductor.default_plan import expert_share, uses_of
from dak_inductor.inventory import take_inventory


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (None, 1.0),
        (SimpleNamespace(num_experts_per_tok=2, num_local_experts=8), 0.25),
        (SimpleNamespace(num_experts_per_tok=8, n_routed_experts=256), 8 / 256),
        (SimpleNamespace(text_config=SimpleNamespace(num_experts_per_tok=1, num_experts=4)), 0.25),
        (SimpleNamespace(num_experts_per_tok=None, num_local_experts=8), 1.0),
    ],
)
def test_the_share_of_experts_is_the_configs(config, share):
    assert expert_share(config) == share


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(8, 32, 32))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_experts_per_tok=2, num_local_experts=8)
        self.embed = nn.Embedding(100, 32)
        self.layer = nn.Linear(32, 32, bias=False)
        self.experts = Experts()
        self.listed = nn.ModuleDict(
            {"experts": nn.ModuleList([nn.Linear(32, 32, bias=False)]),
             "shared_expert": nn.Linear(32, 32, bias=False)}
        )  # fmt: skip
        self.conv = nn.Conv2d(16, 16, 3, bias=False)
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.embed.weight


def test_each_kind_of_weight_is_read_as_a_decode_step_reads_it():
    model = Model()
    uses = uses_of(take_inventory(model, minimum_bytes=1024), model)
    read = {use.op: use.touched_bytes for use in uses}
    assert read == {
        "embed.weight:embedding": 32 * 4,
        "head.weight:linear": 100 * 32 * 4,
        "layer.weight:linear": 32 * 32 * 4,
        "experts.gate_up_proj:grouped_mm": 8 * 32 * 32 * 4 / 4,
        "listed.experts.0.weight:linear": 32 * 32 * 4 / 4,
        "listed.shared_expert.weight:linear": 32 * 32 * 4,
        "conv.weight:other": 16 * 16 * 9 * 4,
    }
    tied = [use for use in uses if use.tensor == "embed.weight"]
    assert {use.kind for use in tied} == {"embedding", "linear"}
    assert all(use.m == 1 and use.dtype == "float32" for use in uses)

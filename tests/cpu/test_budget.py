"""Reading budgets, and sharing one between models."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dak_inductor.budget import CONTEXT_GROWTH, MINIMUM_RESERVE, DeviceBudget, asked_budget
from dak_inductor.byte_size import parse_budget, parse_host_memory
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import BudgetError, OptionError
from dak_inductor.first_plan import make_first_plan
from dak_inductor.inventory import take_inventory
from dak_inductor.offload import offload
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import offloaded_models, record_of
from dak_inductor.restore import restore

CARD = 80 * 10**9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        (".05TB", 50 * 10**9),
        ("80%", 64 * 10**9),
        (123_456_789, 123_456_789),
        ("123456789B", 123_456_789),
    ],
)
def test_budgets_are_read(text, expected):
    assert parse_budget(text, CARD) == expected


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("lots", "for example"),
        ("24", "unit"),
        ("24 parsecs", "parsecs"),
        ("-1GB", "cannot be read"),
        ("120%", "all of the card"),
        (0.8, '"80%"'),
        (24.0, '"24GB"'),
        (24, '"24GB"'),
        (True, "not a size"),
        (0, "above zero"),
        (-5, "above zero"),
        ("0GB", "above zero"),
        ("81GB", "80.00 GB"),
        (None, "not a size"),
    ],
)
def test_what_cannot_be_read_says_what_can(value, hint):
    with pytest.raises(BudgetError, match=hint):
        parse_budget(value, CARD)


def test_a_share_needs_a_card():
    with pytest.raises(BudgetError, match="simulated GPU has no size"):
        parse_budget("80%", None)


@pytest.mark.parametrize(
    ("value", "expected"), [("24GB", 24 * 10**9), ("50%", CARD // 2), (CARD * 4, CARD * 4)]
)
def test_host_memory_is_read_alike_and_may_be_more_than_there_is(value, expected):
    assert parse_host_memory(value, CARD) == expected


@pytest.mark.parametrize("value", ["much", "24", 24, -5, 0, True, 1.0, "120%", [1]])
def test_host_memory_that_cannot_be_read_is_an_option_error(value):
    with pytest.raises(OptionError, match="host_memory=") as caught:
        parse_host_memory(value, CARD)
    assert "gpu_memory" not in str(caught.value) and "card" not in str(caught.value)


def test_host_memory_as_text_is_what_a_tier_is_given():
    model = linear()
    offload(model, offload_ratio=1.0, remote="simulated", host_memory="1MiB")
    assert record_of(model).tier.host_memory == 2**20
    with pytest.raises(OptionError, match="above zero"):
        offload(linear(), offload_ratio=0.5, remote="simulated", host_memory="0KB")


@given(st.integers(1024, CARD))
def test_bytes_are_bytes(nbytes):
    assert parse_budget(nbytes, CARD) == parse_budget(f"{nbytes}B", CARD) == nbytes


def test_the_reserve_is_replaced_by_a_measurement():
    budget = DeviceBudget(torch.device("cpu"), 10**9)
    assert budget.reserve == 0 and budget.weight_bytes_available() == 10**9
    budget.measured_peak(10**8)
    assert budget.reserve == 10**8 and budget.weight_bytes_available() == 9 * 10**8
    assert budget.measure() == []


@pytest.mark.parametrize(("total", "activations"), [(10**9, MINIMUM_RESERVE), (10**11, 6 * 10**9)])
def test_a_card_keeps_memory_for_activations_and_for_kernels_not_loaded_yet(total, activations):
    assert DeviceBudget(torch.device("cuda", 0), total).reserve == activations + CONTEXT_GROWTH


def test_a_total_is_taken_back_after_an_error():
    with asked_budget(torch.device("cpu"), 1000) as budget:
        assert budget.total == 1000
    with pytest.raises(KeyError), asked_budget(torch.device("cpu"), 2000):
        raise KeyError
    assert budget.total in (1000, None)


def linear():
    return nn.Sequential(nn.Linear(256, 256, bias=False))  # 262,144 bytes


def test_models_on_one_device_share_the_budget():
    gc.collect()
    assert offloaded_models() == []
    first, second = linear(), linear()
    offload(first, gpu_memory=300_000, remote="simulated")
    assert record_of(first).bytes_by_tier().remote == 0
    offload(second, gpu_memory=300_000, remote="simulated")
    held = [record_of(m).physical_bytes().local for m in (first, second)]
    assert sum(held) <= 300_000
    remote = [record_of(m).bytes_by_tier().remote for m in (first, second)]
    assert all(100_000 < nbytes < 130_000 for nbytes in remote)
    assert record_of(first).budget is record_of(second).budget
    restore(first)
    assert record_of(second).budget.weight_bytes_available(record_of(second)) == 300_000
    assert record_of(second).required_remote_bytes() == 0


def test_a_budget_below_what_cannot_move_shows_the_arithmetic():
    model = linear()
    before = model[0].weight
    with pytest.raises(BudgetError) as caught:
        offload(model, gpu_memory=100_000, remote="simulated", placement={"0": "gpu"})
    message = str(caught.value)
    assert "100,000 bytes" in message and "262,144 bytes" in message and "at least" in message
    assert model[0].weight is before and record_of(model) is None


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gpu_memory": "1GB", "offload_ratio": 0.5}, {"gpu_memory": "1GB", "host_memory": -1}],
)
def test_one_of_budget_and_ratio(arguments):
    with pytest.raises(OptionError):
        offload(linear(), remote="simulated", **arguments)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, True, "half"])
def test_ratios_outside_their_range(ratio):
    with pytest.raises(BudgetError, match="0 to 1"):
        offload(linear(), remote="simulated", offload_ratio=ratio)


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(8, 200), min_size=1, max_size=5),
    budget=st.integers(2_000, 400_000),
    page=st.sampled_from([256, 4096, 16_384]),
)
def test_no_budget_is_ever_exceeded(widths, budget, page):
    model = nn.Sequential(*(nn.Linear(width, width) for width in widths))
    tier = SimulatedTier(page_bytes=page, local_capacity=budget)
    inventory = take_inventory(model, minimum_bytes=page)
    request = OffloadRequest(gpu_memory=budget, remote="simulated")
    try:
        first = make_first_plan(
            model, inventory, request, tier, DeviceBudget(torch.device("cpu"), budget)
        )
    except BudgetError:
        assert inventory.resident_bytes > budget
        return
    assert first.held.local + inventory.resident_bytes <= budget
    buffers = [
        tier.allocate(entry.nbytes, split=entry.nbytes - first.remote_bytes(entry.name))
        for entry in inventory.entries
    ]
    assert sum((b.physical_bytes() for b in buffers), TierBytes()) == first.held
    total = sum(b.bytes_by_tier().remote for b in buffers)
    needless = budget - inventory.resident_bytes - inventory.tierable_bytes
    assert total == 0 or needless < len(buffers) * page

"""What makes a product the stock operator's, how one is launched, and the records that it reads."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor.lowering import residency
from dak_inductor.lowering.attention import trials as attention_trials
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.attention.problem import AttentionProblem
from dak_inductor.lowering.linear import dispatch, product
from dak_inductor.lowering.linear.problem import Activation, LinearProblem
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.residency import WORDS

BF16 = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def held(tier: str = "cpu", record: int = 256) -> Any:
    return SimpleNamespace(tier=tier, device_record=record, address=0)


def asked(**changes: Any) -> str | None:
    """The refusal of a product that is served, but for `changes`."""
    call = {
        "x": meta(4, 64),
        "weights": (meta(128, 64),),
        "buffers": (held(),),
        "more": (),
        **changes,
    }
    call["tensors"] = [call["x"], *call["weights"], *call["more"]]
    return dispatch.kernel_refusal(SimpleNamespace(**call))  # type: ignore[arg-type]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    has = [(9, 0)]
    monkeypatch.setattr(dispatch, "capability", lambda index: has[0])
    return has


def test_each_refusal_of_the_kernel_says_why(hopper: list[tuple[int, int]]) -> None:
    assert asked() is None
    two = (meta(128, 64), meta(128, 64))
    assert asked(weights=two, buffers=(held(), held())) is None
    refusals = {
        "one of gate and up is offloaded": {"weights": two, "buffers": (held(), None)},
        "different remote tiers": {"weights": two, "buffers": (held(), held("cuda:1"))},
        "no record in device memory": {"buffers": (held(record=0),)},
        "not all bfloat16 or all float16 (x is torch.float32)": {
            "x": meta(4, 64, dtype=torch.float32), "weights": (meta(128, 64, dtype=torch.float32),),
        },
        "not all bfloat16": {"more": (meta(128, dtype=torch.float16),)},
        "on different devices": {"more": (torch.zeros(128, dtype=BF16),)},
        "it has no tokens": {"x": meta(0, 64)},
        "not matrices of one shape": {
            "weights": (meta(128, 64), meta(256, 64)), "buffers": (held(), held()),
        },
        "the weight is (100, 64); multiples of 8": {"weights": (meta(100, 64),)},
        "of the weight, its rows are not contiguous": {"weights": (meta(64, 128).t(),)},
    }  # fmt: skip
    for reason, changes in refusals.items():
        found = asked(**changes)
        assert found is not None and reason in found, (reason, found)
    hopper[0] = (8, 0)
    assert "no Hopper card" in str(asked())


def test_a_product_is_launched_on_vectors_that_the_kernel_can_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(product, "LinearLaunch", lambda *of: made.append(of) or "launch")
    weight, buffer = torch.randn(32, 64).to(BF16), held()
    odd = torch.randn(33).to(BF16)[1:]
    x = torch.randn(3, 2, 64).to(BF16)
    residual = torch.randn(3, 2, 33).to(BF16)[..., :32]
    call = Product(x, (weight,), (buffer,), (odd,), residual, "gelu", "out_in")
    problem = LinearProblem(6, 32, 64, BF16)
    assert call.launch(problem, "configuration") == "launch"  # type: ignore[arg-type,comparison-overlap]
    ((_, _, (operand,), activation, _),) = made
    assert activation is Activation.GELU and operand.tensor is weight
    assert operand.bias.data_ptr() % 16 == 0 and torch.equal(operand.bias, odd)
    assert operand.owns_bias, "nobody else keeps it"
    assert not call.may_launch_again, "the copy of its bias is this call's alone"
    plain = Product(x, (weight,), (buffer,), (torch.zeros(32, dtype=BF16),), None, "none", "out_in")
    assert plain.may_launch_again

    def launch(rows: torch.Tensor, added: torch.Tensor, out: torch.Tensor, copied: object) -> None:
        assert rows.shape == (6, 64) and torch.equal(added, residual.reshape(6, 32))
        assert all(stride % 8 == 0 for stride in added.stride()[:-1])
        out.copy_(added)

    monkeypatch.setattr(product.MARKS, "of_buffers", lambda *_: contextlib.nullcontext())
    result = call.direct(problem, launch)  # type: ignore[arg-type]
    assert torch.equal(result, residual)


@pytest.mark.parametrize("contiguous", [False, True])
def test_rows_that_the_kernel_cannot_read_are_copied(
    monkeypatch: pytest.MonkeyPatch, contiguous: bool
) -> None:
    x = torch.randn(4, 72).to(BF16)[:, 1:65]
    if contiguous:
        x = torch.randn(4 * 64 + 1).to(BF16)[1:].view(4, 64)
    call = Product(
        x, (torch.zeros(32, 64, dtype=BF16),), (held(),), (None,), None, "none", "out_in"
    )
    rows: list[torch.Tensor] = []
    monkeypatch.setattr(product.MARKS, "of_buffers", lambda *_: contextlib.nullcontext())
    call.direct(LinearProblem(4, 32, 64, BF16), lambda x, *_: rows.append(x))  # type: ignore[arg-type]
    assert rows[0].is_contiguous() and torch.equal(rows[0], x)
    assert product.tensor_maps.refusal(rows[0]) is None


def test_a_record_on_a_card_is_a_view_of_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each buffer, and one for all that lies in none, made before a capture."""
    words = torch.arange(WORDS, dtype=torch.int64)
    viewed: list[int] = []

    def bytes_tensor(owner: object, address: int, nbytes: int, device: object) -> torch.Tensor:
        assert owner is None and nbytes == 8 * WORDS, "records outlive their buffers"
        viewed.append(address)
        return words.view(torch.uint8)

    class Buffer:
        device_record, device = 4096, torch.device("cpu")

    buffers: dict[int, Any] = {}
    weight, other = torch.zeros(8), torch.zeros(8)
    buffers[weight.data_ptr()] = buffer = Buffer()
    monkeypatch.setattr(residency.address_table, "lookup", buffers.get)
    monkeypatch.setattr(residency, "bytes_tensor", bytes_tensor)
    monkeypatch.setattr(residency, "_all_local", {})
    first = residency._residency(weight)
    assert first.tolist() == list(range(WORDS)) and residency._residency(weight) is first
    assert viewed == [buffer.device_record]
    everything = residency._residency(other)
    assert everything[0] == residency.ALL_LOCAL and not everything[1:].any()
    buffer.device_record = 0
    assert residency._residency(weight) is everything


def test_records_are_made_for_cards_in_use_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(residency, "_everything_local", made.append)
    residency.prepare()
    assert not made, "CUDA has not been started here"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch._C, "_cuda_hasPrimaryContext", lambda index: index != 1, raising=False
    )
    residency.prepare()
    assert made == [torch.device("cuda", 0), torch.device("cuda", 2)]


class Far:
    """A tensor of a card, for what only asks for sizes."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def test_calls_of_a_kind_are_of_whole_local_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [held(), held()]
    remote = 0
    monkeypatch.setattr(AttentionOperands, "buffers", property(lambda self: tuple(found)))
    monkeypatch.setattr(
        attention_trials.reads, "dense_read", lambda buffer, cache: SimpleNamespace(remote=remote)
    )
    cache = torch.zeros(2, 2, 100, 64, dtype=BF16)

    def kind(cache: torch.Tensor = cache, queries: int = 1) -> Any:
        query: Any = Far(torch.zeros(2, 8, queries, 64, dtype=BF16))
        return attention_trials.kind_of(
            AttentionOperands(query, cache, cache, lengths=None, starts=None, mask=None, scale=1.0,
                              causal=True, window=0, softcap=0.0)
        )  # fmt: skip

    usual = kind()
    assert (usual.tier, usual.device_index, usual.order) == ("cpu", 0, (0, 1, 2))
    assert usual.problem.tokens >= 100, "rounded up to a step"
    by_tokens = torch.zeros(2, 100, 2, 64, dtype=BF16).transpose(1, 2)
    assert kind(by_tokens).order == (0, 2, 1)
    assert kind(queries=17) is None, "that is prefill"
    assert kind(torch.zeros(2, 2, 200, 64, dtype=BF16)[:, :, ::2]) is None, "with gaps"
    remote = 1
    assert kind() is None
    remote, found[1] = 0, held(record=0)
    assert kind() is None
    found[1] = None
    assert kind() is None


@pytest.mark.parametrize("faster", ["kernel", "stock"])
def test_both_ways_are_timed_on_the_calls_own_operands(
    faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    problem = AttentionProblem(1, 1, 1, 1, 8, 64, BF16)
    kind = attention_trials.Kind(problem, (0, 1, 2), "cpu", 0)

    def seconds_of(runs: Any, device: torch.device) -> list[float]:
        return [1.0 if run() == faster else 2.0 for run in runs]

    def way(name: str) -> Any:
        return lambda *_: ran.append(name) or name

    kept: list[int] = []

    @contextlib.contextmanager
    def keep(tensors: Any) -> Any:
        kept.append(len(ran))
        yield
        kept.append(len(ran))

    choices = attention_trials.Choices[Any, Any](capturing=lambda _: False)
    monkeypatch.setattr(attention_trials, "CHOICES", choices)
    monkeypatch.setattr(attention_trials, "TRIALS", SimpleNamespace(enabled=True))
    monkeypatch.setattr(attention_trials, "kind_of", lambda call: kind)
    monkeypatch.setattr(attention_trials.dispatch, "run", way("kernel"))
    monkeypatch.setattr(attention_trials.stock_attention, "attention", way("stock"))
    monkeypatch.setattr(attention_trials.reads, "count_dense", lambda *_: None)
    monkeypatch.setattr(attention_trials.stopwatch, "seconds_of", seconds_of)
    monkeypatch.setattr(attention_trials.device_counters, "kept", keep)
    cache = torch.zeros(1, 1, 8, 8)
    call = AttentionOperands(cache, cache, cache, lengths=None, starts=None, mask=None, scale=1.0,
                             causal=False, window=0, softcap=0.0)  # fmt: skip
    result: Any = attention_trials.run(call)
    assert result == faster
    assert kept == [0, 3], "counters are as before: the kernel asked once, then each timed"
    assert ran == ["kernel", "kernel", "stock", faster]
    assert attention_trials.run(call) == result and ran[4:] == [faster]

"""The dak:: products with a weight: values, bytes by tier, and what the CUDA kernel is offered."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.lowering import counters, ops, ops_linear, reads

dak = torch.ops.dak
K, N = 32, 48


@pytest.fixture(autouse=True)
def _no_counts():
    counters.reset()
    yield
    counters.reset()


def tiered(values: torch.Tensor, label: str, *, remote: float = 0.5):
    """The same values in a simulated buffer of which a share is remote."""
    split = round(values.nbytes * (1 - remote))
    buffer = SimulatedTier(page_bytes=256).allocate(values.nbytes, split=split)
    buffer.label = label
    tensor = buffer.tensor(values.dtype, tuple(values.shape))
    tensor.copy_(values)
    return buffer, tensor


def activate(name: str, y: torch.Tensor) -> torch.Tensor:
    if name == "none":
        return y
    if name == "silu":
        return F.silu(y)
    return F.gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")


def stored(weight: torch.Tensor, layout: str) -> torch.Tensor:
    return weight if layout == "out_in" else weight.t().contiguous()


def as_out_in(weight: torch.Tensor, layout: str) -> torch.Tensor:
    return weight if layout == "out_in" else weight.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
def test_an_epilogue_rounds_where_eager_does_and_counts_the_weight(activation, layout, dtype):
    x, bias = torch.randn(2, 5, K, dtype=dtype), torch.randn(N, dtype=dtype)
    plain = stored(torch.randn(N, K, dtype=dtype), layout)
    residual = torch.randn(2, 5, N, dtype=dtype)
    buffer, weight = tiered(plain, "w", remote=0.25)
    for used_bias, used_residual in ((bias, residual), (None, None)):
        counters.reset()
        result = dak.linear_epilogue(x, weight, used_bias, used_residual, activation, layout)
        expected = activate(activation, F.linear(x, as_out_in(plain, layout), used_bias))
        if used_residual is not None:
            expected = residual + expected
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        (read,) = counters.snapshot()
        assert (read.kind, read.tensor, read.calls) == ("linear_epilogue", "w", 1)
        assert read.bytes == buffer.bytes_by_tier()
        assert read.bytes.remote > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_gate_and_up_are_counted_each_by_its_own_split(layout, dtype):
    x = torch.randn(3, K, dtype=dtype)
    plain = [stored(torch.randn(N, K, dtype=dtype), layout) for _ in range(2)]
    biases = [torch.randn(N, dtype=dtype) for _ in range(2)]
    (gate_buffer, gate), (up_buffer, up) = (
        tiered(weight, name, remote=share)
        for weight, name, share in zip(plain, ("gate", "up"), (0.25, 0.75), strict=True)
    )
    result = dak.gated_linear(x, gate, up, *biases, "silu", layout)
    one, other = (
        F.linear(x, as_out_in(weight, layout), bias)
        for weight, bias in zip(plain, biases, strict=True)
    )
    expected = F.silu(one) * other
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    read = {count.tensor: count for count in counters.snapshot()}
    assert {count.kind for count in read.values()} == {"gated_linear"}
    assert read["gate"].bytes == gate_buffer.bytes_by_tier()
    assert read["up"].bytes == up_buffer.bytes_by_tier()
    assert read["gate"].bytes.remote < read["up"].bytes.remote


def test_halves_of_one_weight_are_one_call_that_reads_all_of_it():
    buffer, weight = tiered(torch.randn(2 * N, K), "gate_up", remote=0.25)
    result = dak.gated_linear(
        torch.randn(3, K), weight[:N], weight[N:], None, None, "gelu", "out_in"
    )
    assert result.shape == (3, N)
    (read,) = counters.snapshot()
    assert (read.calls, read.bytes) == (1, buffer.bytes_by_tier())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "relu", "out_in"), "activation 'relu' is none of none, silu, gelu, gelu_tanh"),
        ((None, "none", "rows"), "layout 'rows' is none of out_in, in_out"),
        ((torch.randn(N), "none", "out_in"), r"residual of shape \(48,\)"),
    ],
)
def test_what_the_schema_cannot_say_is_refused_by_name(arguments, message):
    residual, activation, layout = arguments
    with pytest.raises(ValueError, match=message):
        dak.linear_epilogue(
            torch.randn(3, K), torch.randn(N, K), None, residual, activation, layout
        )


def test_shape_functions_agree_with_the_operators():
    x, weight, bias = torch.randn(2, 3, K), torch.randn(N, K), torch.randn(N)
    residual = torch.randn(2, 3, N)
    checks = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (dak.linear_epilogue, (x, weight, bias, residual, "silu", "out_in")),
        (dak.linear_epilogue, (x, weight, None, None, "none", "out_in")),
        (dak.gated_linear, (x, weight, weight.clone(), bias, None, "gelu_tanh", "out_in")),
        (dak.gated_linear, (x[0], weight.t(), weight.clone().t(), None, None, "silu", "in_out")),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


def device_implementation(name: str):
    """What runs on CUDA; here with CPU tensors, since only the kernel would need the device."""
    (operator,) = [operator for operator in ops.OPERATORS if operator.name == name]
    return ops._on_device(operator, operator.stock)


class Kernel:
    """Stands for the kernels' entry: keeps what it is offered, and takes it or not."""

    def __init__(self, *, takes: bool) -> None:
        self.takes = takes
        self.offers: list[dict] = []

    def __call__(self, x, weights, **rest):
        self.offers.append({"x": x, "weights": weights, **rest})
        n = weights[0].shape[0 if rest["layout"] == "out_in" else 1]
        return x.new_full((*x.shape[:-1], n), 7.0) if self.takes else None


X, W, B = torch.randn(4, K), torch.randn(N, K), torch.randn(N)
R = torch.randn(4, N)
OFFERED = {
    "linear": ("linear", (X, W, B), "out_in"),
    "linear of a transposed weight": ("linear", (X, W.t().contiguous().t(), B), "in_out"),
    "addmm of a row-major weight": ("addmm", (B, X, W.t().contiguous()), "in_out"),
    "addmm of a transposed weight": ("addmm", (B, X, W.t()), "out_in"),
    "matmul of a row-major weight": ("matmul", (X, W.t().contiguous()), "in_out"),
    "matmul of a transposed weight": ("matmul", (X, W.t()), "out_in"),
    "linear_epilogue": ("linear_epilogue", (X, W, B, R, "silu", "out_in"), "out_in"),
    "linear_epilogue of [in, out]": (
        "linear_epilogue", (X, W.t().contiguous(), None, R, "gelu", "in_out"), "in_out",
    ),
    "gated_linear": ("gated_linear", (X, W, W + 1, B, None, "silu", "out_in"), "out_in"),
}  # fmt: skip


@pytest.mark.parametrize("case", OFFERED)
def test_the_kernel_is_offered_the_weight_as_it_lies(case, monkeypatch):
    name, arguments, layout = OFFERED[case]
    kernel = Kernel(takes=True)
    monkeypatch.setattr(ops_linear, "_runner", lambda: kernel)
    result = device_implementation(name)(*arguments)
    assert result.shape == (4, N) and bool((result == 7.0).all()), "the kernel's result is it"
    (offer,) = kernel.offers
    assert offer["layout"] == layout
    assert len(offer["weights"]) == len(offer["biases"]) == (2 if name == "gated_linear" else 1)
    for weight in offer["weights"]:
        assert weight.shape == ((N, K) if layout == "out_in" else (K, N))
        assert weight.is_contiguous(), "a view that follows memory, whatever the op was given"
    if "epilogue" in name:
        assert offer["residual"] is R and offer["activation"] == arguments[4]


def _moved(argument: object, weight: torch.Tensor) -> object:
    """A weight in the plain arguments, as the same view of the tiered one."""
    if not isinstance(argument, torch.Tensor) or argument.numel() != weight.numel():
        return argument
    if argument.is_contiguous() and argument.shape == weight.shape:
        return weight.copy_(argument) if argument is W else argument
    rows = argument if argument.is_contiguous() else argument.t()
    weight.view(rows.shape).copy_(rows)
    moved = weight.view(rows.shape)
    return moved if argument.is_contiguous() else moved.t()


@pytest.mark.parametrize("case", OFFERED)
def test_what_the_kernel_declines_runs_stock_and_counts(case, monkeypatch):
    name, arguments, _ = OFFERED[case]
    buffer, weight = tiered(W, "w")
    kernel = Kernel(takes=False)
    monkeypatch.setattr(ops_linear, "_runner", lambda: kernel)
    given = [_moved(argument, weight) for argument in arguments]
    result = device_implementation(name)(*given)
    assert len(kernel.offers) == 1
    expected = getattr(dak, name)(*arguments)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    (read,) = counters.snapshot()
    assert (read.kind, read.bytes) == (name, buffer.bytes_by_tier())
    assert read.bytes.remote > 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("addmm", (B, X, W.t(), 0.5, 1)),
        ("addmm", (R, X, W.t())),
        ("matmul", (X, W.t().reshape(1, K, N))),
        ("linear", (X, torch.randn(N, 2 * K)[:, ::2])),
        ("linear", (X, torch.randn(K).expand(N, K))),
    ],
)
def test_calls_outside_the_kernels_contract_are_not_offered(name, arguments, monkeypatch):
    kernel = Kernel(takes=True)
    monkeypatch.setattr(ops_linear, "_runner", lambda: kernel)
    result = device_implementation(name)(*arguments)
    assert not kernel.offers
    torch.testing.assert_close(result, getattr(dak, name)(*arguments), rtol=0, atol=0)


def test_an_installation_without_the_kernel_runs_stock(monkeypatch):
    monkeypatch.setattr(ops_linear, "_runner", lambda: None)
    result = device_implementation("linear")(X, W, B)
    torch.testing.assert_close(result, F.linear(X, W, B), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (0, TierBytes(0, 96)),
        (32, TierBytes(32, 64)),
        (64, TierBytes(48, 48)),
        (1000, TierBytes(96)),
    ],
)
def test_stock_reads_are_added_to_the_record_by_the_split_of_the_moment(split, expected):
    words = torch.zeros(8, dtype=torch.int64)
    words[4] = 5
    read = [(0, 16), (16, 32), (100, 48)]  # two operands of one buffer, and one past them
    words[0] = split
    reads.add_reads(words, read)
    reads.add_reads(words, read)
    assert TierBytes(int(words[1]), int(words[2])) == expected + expected
    assert words[[0, 3, 4]].tolist() == [split, 2, 5], "one call each; split and window stay"


def test_a_buffer_with_a_record_counts_calls_and_replays_there(monkeypatch):
    class Record:
        address = 4096
        calls: ClassVar[list[TierBytes]] = []

        def publish(self, split: int) -> None: ...

        def count_call(self, read: TierBytes) -> None:
            self.calls.append(read)

    buffer, weight = tiered(torch.randn(2 * N, K), "w", remote=0.25)
    buffer.record = Record()
    queued: list[tuple[object, ...]] = []
    monkeypatch.setattr(reads, "queue_count", lambda *asked, **_: queued.append(asked))
    with reads.uncounted():
        with reads.uncounted():
            reads.count_dense("gated_linear", weight[:N], weight[N:])
        reads.count_dense("gated_linear", weight[:N], weight[N:])
    assert not Record.calls
    reads.count_dense("gated_linear", weight[:N], weight[N:])
    assert counters.snapshot() == () and not queued
    assert Record.calls == [buffer.bytes_by_tier()]
    monkeypatch.setattr(reads, "current_capture", lambda device: 3)
    monkeypatch.setattr(reads, "capability", lambda index: reads.HOPPER)
    reads.count_dense("gated_linear", weight[:N], weight[N:])
    half = weight[:N].nbytes
    assert queued == [(4096, ((0, half), (half, half)))], "a replay counts it"
    assert len(Record.calls) == 1

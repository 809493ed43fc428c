"""Models quantised by the real torchao and bitsandbytes, where those are installed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.offload import offload
from dak_inductor.offloaded import record_of
from dak_inductor.restore import restore

WIDTH = 256


def half_remote(model: nn.Module) -> None:
    """Offload, and check that half of every divided weight is remote."""
    offload(model, offload_ratio=0.5, remote="simulated")
    record = record_of(model)
    assert record is not None and record.weights
    held = record.bytes_by_tier()
    assert held.remote == held.local == held.total // 2


@pytest.mark.parametrize("scheme", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_torchao_model_keeps_its_outputs(scheme: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    model = model.to(torch.bfloat16).eval()
    quantization.quantize_(model, getattr(quantization, scheme)())
    x = torch.randn(4, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        half_remote(model)
        assert type(model[0].weight) is not nn.Parameter
        assert address_table.lookup(model[0].weight.qdata.data_ptr()) is not None
        assert torch.equal(model(x), expected)
        compiled = torch.compile(model, backend="dak")
        torch.testing.assert_close(compiled(x), expected, rtol=2e-2, atol=2e-2)
        restore(model)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_a_bitsandbytes_model_keeps_its_outputs(kind: str) -> None:
    layers = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    if kind == "int8":
        layer = layers.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
    else:
        layer = layers.Linear4bit(
            WIDTH, WIDTH, bias=False, compute_dtype=torch.float32, quant_type=kind
        )
    layer.load_state_dict(nn.Linear(WIDTH, WIDTH, bias=False).state_dict())
    model = nn.Sequential(layer, nn.ReLU()).to("cpu").eval()  # quantised on the way to a device
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        expected = model(x)
        half_remote(model)
        assert torch.equal(model(x), expected)
        restore(model)
        assert torch.equal(model(x), expected)


class Opened(TwoTensor):
    """A subclass whose operators reach for the tensors inside, as torchao's do."""

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Opened:
        return Opened(inner["a"], inner["b"])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is nn.functional.linear:
            x, weight, bias = args
            return nn.functional.linear(x, weight.a, bias) + nn.functional.linear(x, weight.b)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_that_opens_itself_stays_on_the_stock_path(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tracing such a graph again would take the tensors inside for constants."""
    model = nn.Linear(WIDTH, WIDTH)
    parts = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)
    model.weight = nn.Parameter(Opened(*parts), requires_grad=False)
    half_remote(model)
    x = torch.randn(4, WIDTH)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        result = torch.compile(model, backend="dak")(x)
    expected = x @ (parts[0] + parts[1]).t() + model.bias
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert "would become a constant" in caplog.text

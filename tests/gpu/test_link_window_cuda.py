"""The option `window` on a card: it reaches the word that kernels read, and the bytes in flight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import dak_inductor as dak
from dak_inductor.cuda_runtime.window import Window, window_of
from dak_inductor.errors import OptionError
from dak_inductor.link_window import shared_memory_bytes

FEATURES = 4096
WINDOW = 128 << 10


@pytest.fixture
def window(device: torch.device) -> Iterator[Window]:
    """The window of the link to the host, put back afterwards."""
    found = window_of(device, "cpu")
    before = found.nbytes
    yield found
    torch.cuda.synchronize()
    found.set(before)


def offloaded(device: torch.device) -> nn.Module:
    model = nn.Linear(FEATURES, FEATURES, bias=False, device=device, dtype=torch.bfloat16)
    return dak.offload(model, offload_ratio=0.5, remote="cpu")


def test_the_option_sets_the_link_and_bounds_what_is_in_flight(
    device: torch.device, window: Window
) -> None:
    model = offloaded(device)
    x = torch.randn(4, FEATURES, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="dak", options={"window": WINDOW})
    dak.stats(reset=True)
    with torch.no_grad():
        compiled(x)
    assert window.nbytes == WINDOW
    shown = dak.explain(model).window
    assert shown is not None and shown.in_use and shown.nbytes == WINDOW
    assert 0 < dak.stats().peak_window <= WINDOW


def test_a_window_above_the_shared_memory_is_refused(device: torch.device, window: Window) -> None:
    model, before = offloaded(device), window.nbytes
    # not model.compile: Dynamo leaves the forward of torch's own modules alone
    options = {"window": shared_memory_bytes(device) + 1}
    compiled = torch.compile(model, backend="dak", options=options)
    with torch.no_grad(), pytest.raises(OptionError, match="shared memory"):
        compiled(torch.randn(4, FEATURES, device=device, dtype=torch.bfloat16))
    assert window.nbytes == before

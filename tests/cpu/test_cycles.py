"""In and out, again and again: nothing of a model, its cache or its compiled code is left."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import threading
from typing import Any

import torch
from torch import nn

import dak_inductor as dak
from dak_inductor.compiled_graph import CompiledGraph
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import offloaded_models, record_of
from dak_inductor.session import SESSION

from . import profiles, small_models
from .test_random_programs import recording

CYCLES = min(1000, 150 * profiles.SCALE)
"""A thousand in the long profile."""
X = torch.randn(2, 32)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_a_model_that_goes_in_moves_and_comes_out(monkeypatch: Any) -> None:
    tier = SimulatedTier(page_bytes=256)
    monkeypatch.setattr(OffloadRequest, "open_tier", lambda *_: tier)
    model = network()
    with torch.no_grad():
        expected = model(X)

    def cycle(number: int) -> None:
        dak.offload(model, offload_ratio=(number % 10) / 10, remote="simulated")
        record = record_of(model)
        assert record is not None
        for weight in record.weights.values():
            weight.buffer.move(number % 3 * weight.buffer.nbytes // 2)
        assert torch.equal(model(X), expected)
        dak.restore(model)

    with torch.no_grad():
        for number in range(20):
            cycle(number)
        before, files = objects(), len(os.listdir("/proc/self/fd"))
        with contextlib.redirect_stdout(io.StringIO()):
            for number in range(CYCLES):
                cycle(number)
    assert objects() - before < 20
    assert len(os.listdir("/proc/self/fd")) == files and threading.active_count() < 20
    assert tier.counters.held.total == 0 and not offloaded_models()
    assert len(address_table._snapshot.starts) <= 4  # the dead go with the next registration
    assert torch.equal(model(X), expected)


def test_models_and_their_compiled_code_come_and_go() -> None:
    """One compiled function for all of them, as for the blocks of a model."""
    made: list[CompiledGraph] = []
    others = len(SESSION.bindings())  # of models of which nothing is offloaded

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x)

    compiled = torch.compile(forward, backend=recording(made))

    def cycle() -> None:
        model = network()
        dak.offload(model, offload_ratio=0.5, remote="simulated")
        with torch.no_grad():
            compiled(model, X)

    for _ in range(5):
        cycle()
    gc.collect()
    for graph in made:
        assert len(graph._bindings) <= 2
    before = objects()
    for _ in range(60):
        cycle()
    assert objects() - before < 200
    assert sum(len(graph._bindings) for graph in made) <= 2 * len(made)
    assert len(SESSION.bindings()) == others


def test_a_cache_for_every_request() -> None:
    made: list[CompiledGraph] = []
    others = len(SESSION.bindings())
    model = small_models.build(num_hidden_layers=1)
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    model.compile(backend=recording(made))
    tokens = torch.randint(1, 500, (1, 3))

    def request() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            cache = dak.kv_cache(model, batch=1, max_len=8, offload_ratio=0.5)
        with torch.no_grad():
            model(tokens, past_key_values=cache, use_cache=True)

    for _ in range(6):
        request()
    before = objects()
    dak.stats(reset=True)
    for _ in range(30):
        request()
    assert objects() - before < 100
    assert all(len(graph._bindings) <= 2 for graph in made)
    assert len(SESSION.bindings()) <= others + 1
    assert len({read.tensor for read in dak.stats().reads if "kv_cache" in read.tensor}) <= 4

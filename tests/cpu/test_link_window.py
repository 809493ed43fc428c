"""The option `window`: whose links it sets, what it refuses, how the simulated tier shows it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dak_inductor as dak
from dak_inductor import link_window
from dak_inductor.backend import cache_key, compile_graph
from dak_inductor.cuda_runtime.window_history import WindowChange, WindowHistory, update_entry
from dak_inductor.errors import OptionError
from dak_inductor.link_window import set_windows, window_in_force
from dak_inductor.lowering import op_facts
from dak_inductor.options import BackendOptions
from dak_inductor.report.window_history import updates_of
from dak_inductor.session import SESSION

SHARED_BYTES = 132 * 233472
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh_session() -> Iterator[None]:
    SESSION.reset()
    yield
    SESSION.reset()


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[torch.device, str], Any]:
    """Windows of links from GPUs that are not there, made when they are asked for."""
    made: dict[tuple[torch.device, str], Any] = {}

    class Window:
        nbytes = 1 << 19
        automatic = False

        def set(self, nbytes: int | str) -> None:
            self.automatic = nbytes == "auto"
            if isinstance(nbytes, int):
                self.nbytes = nbytes

    def window_of(device: torch.device, tier: str) -> Any:
        return made.setdefault((device, tier), Window())

    properties = SimpleNamespace(shared_memory_per_multiprocessor=233472, multi_processor_count=132)
    monkeypatch.setattr(link_window, "window_of", window_of)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return made


def buffer(device: torch.device, tier: str) -> Any:
    return SimpleNamespace(device=device, tier=tier)


def test_each_link_that_the_buffers_are_read_through_is_set(windows: dict[Any, Any]) -> None:
    peer = torch.device("cuda", 1)
    buffers = [buffer(GPU, "cpu"), buffer(GPU, "cpu"), buffer(peer, "cuda:0")]
    set_windows(1 << 20, [*buffers, buffer(torch.device("cpu"), "simulated")])
    assert {key: window.nbytes for key, window in windows.items()} == {
        (GPU, "cpu"): 1 << 20,
        (peer, "cuda:0"): 1 << 20,
    }
    shown = window_in_force(GPU, "cpu", [])
    assert shown is not None and shown.in_use and shown.nbytes == 1 << 20
    assert "effect" not in str(shown)


def test_automatic_windows_say_so(windows: dict[Any, Any]) -> None:
    set_windows("auto", [buffer(GPU, "cpu")])
    shown = window_in_force(GPU, "cpu", [])
    assert shown is not None and shown.automatic and "automatic" in str(shown)


def test_a_link_slower_than_its_profile_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change = WindowChange(3, 0.0, 200_000, 14e-6, 2.4e-6, 350_000, "law")
    history = WindowHistory("cuda:0", "cpu", True, 200_000, 9, (change,))
    window = SimpleNamespace(history=lambda: history, link=SimpleNamespace(direct_bandwidth=51.4e9))
    monkeypatch.setattr(link_window, "windows", lambda: (window,))
    monkeypatch.setattr(link_window, "_said", set())
    with caplog.at_level("WARNING", logger=link_window.__name__):
        assert link_window.histories() == link_window.histories() == (history,)
    (line,) = caplog.records
    assert "25.0 GB/s where 51.4" in line.getMessage() and "200000 bytes" in line.getMessage()
    assert "automatic, 9 updates" in str(history)


def test_what_kernels_made_of_a_window_is_in_the_explanation(
    windows: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    change = WindowChange(3, 1.5, 200_000, 14e-6, 2.4e-6, 350_000, "law")
    unknown = WindowChange(4, 1.6, 250_000, float("nan"), float("nan"), 350_000, "law")
    set_windows("auto", [buffer(GPU, "cpu")])
    history = WindowHistory("cuda:0", "cpu", True, 200_000, 9, (change, unknown))
    windows[GPU, "cpu"].history = lambda: history
    (update,) = updates_of(link_window.window_changes(GPU, "cpu"))
    assert (update.nanoseconds, update.window) == (1.5e9, 200_000)
    assert update.delay_nanoseconds == pytest.approx(14_000)

    model = dak.offload(nn.Linear(256, 256), offload_ratio=0.5, remote="simulated")
    assert dak.explain(model).window_history == ()
    entries = [update_entry(1.0 + i, 200_000 + i, 5e-6) for i in range(3)]
    module = importlib.import_module(dak.explain.__module__)
    monkeypatch.setattr(module, "window_changes", lambda device, tier: entries)
    assert dak.explain(model).window_history == updates_of(entries)
    assert "3 updates: from 200.0 kB" in dak.explain(model).to_html()


def test_more_than_the_sms_take_in_is_refused_and_nothing_is_set(windows: dict[Any, Any]) -> None:
    set_windows(SHARED_BYTES, [buffer(GPU, "cpu")])
    with pytest.raises(OptionError, match=f"{SHARED_BYTES} bytes"):
        set_windows(SHARED_BYTES + 1, [buffer(GPU, "cpu")])
    assert windows[GPU, "cpu"].nbytes == SHARED_BYTES


def test_the_simulated_tier_shows_the_option_and_reads_as_before() -> None:
    model = dak.offload(nn.Linear(256, 256), offload_ratio=0.5, remote="simulated")
    assert dak.explain(model).window is None

    def backend(graph: Any, arguments: Any) -> Any:
        settings = BackendOptions(window=4096)
        return compile_graph(graph, arguments, settings, lambda graph, _: graph.forward)

    x = torch.randn(3, 256)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    shown = dak.explain(model).window
    assert shown is not None and not shown.in_use and shown.nbytes == 4096
    assert "4096 bytes in flight; without effect" in str(dak.explain(model))


def test_the_cache_key_says_what_the_registry_can_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for extension in (False, True):
        for triton in (False, True):
            monkeypatch.setattr(op_facts, "extension_importable", lambda found=extension: found)
            monkeypatch.setattr(op_facts, "triton_importable", lambda found=triton: found)
            keys.add(cache_key())
    assert len(keys) == 4

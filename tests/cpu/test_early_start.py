"""When generated kernels start early, and what is left of it afterwards."""

from __future__ import annotations

import functools
import logging
import threading
from contextvars import ContextVar

import pytest
import torch
from torch._inductor import compile_fx, config
from torch._inductor.codegen.triton import TritonKernel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dak_inductor.backend import _inductor
from dak_inductor.lowering import early_start as module
from dak_inductor.lowering.early_start import ENTRY, MARK, early_start, unavailable


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_ENABLE_PDL", raising=False)
    setattr(config, ENTRY, module._unset())
    yield
    setattr(config, ENTRY, module._unset())


@pytest.fixture
def hopper(monkeypatch):
    """Tensors of CUDA are on an H200, and the installed torch can start kernels early."""
    monkeypatch.setattr(module, "visible_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "unavailable", lambda: None)


def inputs(device: str = "cuda", *, grad: bool = False) -> list[object]:
    with FakeTensorMode():
        return [torch.empty(4, 8, device=device, requires_grad=grad), 3]


def patches(example_inputs: list[object], **given: object) -> dict[str, object]:
    with early_start(
        {name.replace("__", "."): v for name, v in given.items()}, example_inputs
    ) as p:
        return p


ON, OFF = {ENTRY: MARK}, {}


def test_on_for_inference_on_hopper(hopper, monkeypatch):
    assert patches(inputs()) == ON
    for older in ((8, 9), None):
        monkeypatch.setattr(module, "visible_capability", lambda device, it=older: it)
        assert patches(inputs()) == OFF


def test_graphs_that_may_write_to_weights_start_no_kernel_early(hopper, caplog):
    """Kernels let the next one start before they write: it may be a product that reads there."""
    with FakeTensorMode():
        float_of = functools.partial(torch.empty, device="cuda")
        given = [
            float_of(4),
            float_of(4, 8),
            float_of(2, 4, 8),
            float_of(1, 2, 4, 8),
            torch.empty(4, 8, dtype=torch.int64, device="cuda"),
            3,
            float_of(1 << 20),
        ]
    for asked in ({}, {ENTRY: True}):
        kept = {ENTRY: False} if asked else {}
        for number, on in enumerate((True, False, False, True, True, True, False)):
            with early_start(asked, given, [number]) as found:
                assert found == (ON if on else kept), number
    with caplog.at_level(logging.DEBUG, logger=module.__name__), early_start({}, given, (0, 2)):
        assert "the graph writes to input 2, which may be a weight" in caplog.text


def test_every_gpu_must_be_new_enough(hopper, monkeypatch):
    found = {0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(module, "visible_capability", lambda device: found[device.index])
    assert patches([*inputs("cuda:0"), *inputs("cuda:1")]) == OFF
    assert patches(inputs("cuda:0")) == ON


def test_graphs_on_the_cpu_ask_no_gpu(monkeypatch):
    def asked(*_):
        raise AssertionError("a GPU is asked for")

    monkeypatch.setattr(module, "visible_capability", asked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    assert patches(inputs("cpu")) == OFF
    assert patches([]) == OFF


def test_without_a_gpu_there_is_nothing_to_start():
    assert patches(inputs()) == OFF


def test_a_graph_with_gradients_is_inductors_alone(hopper):
    assert patches(inputs(grad=True)) == OFF
    with torch.no_grad():
        assert patches(inputs(grad=True)) == ON


def test_the_options_of_a_compile_decide(hopper):
    assert patches(inputs(), triton__enable_pdl=False) == OFF
    assert patches(inputs(), triton__enable_pdl=True) == ON
    assert patches(inputs("cpu"), triton__enable_pdl=True) == ON
    with config.patch({ENTRY: True}):
        assert patches(inputs(), triton__enable_pdl=False) == OFF


def test_the_configuration_decides(hopper):
    with config.patch({ENTRY: True}):
        assert patches(inputs("cpu")) == ON
    setattr(config, ENTRY, False)
    assert patches(inputs()) == OFF
    assert patches(inputs(), triton__enable_pdl=True) == ON


def test_the_variable_decides(hopper, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_ENABLE_PDL", "0")
    assert patches(inputs()) == OFF
    monkeypatch.setenv("TORCHINDUCTOR_ENABLE_PDL", "1")
    with config.patch({ENTRY: True}):  # what Inductor makes of it when it is imported
        assert patches(inputs()) == ON


def test_what_the_user_left_open_stays_open(hopper):
    """A patch puts back the value that it found as if the user had set it, which would be a no."""
    for _ in range(2):
        with early_start({}, inputs()) as found, config.patch(found):
            assert config.triton.enable_pdl == MARK
            assert patches(inputs()) == ON, "a compile inside a compile"
        assert config.triton.enable_pdl is False
        assert config._is_default(ENTRY)


def test_what_the_user_set_stays_set(hopper):
    setattr(config, ENTRY, True)
    with early_start({}, inputs()) as found, config.patch(found):
        assert config.triton.enable_pdl == MARK
    assert config.triton.enable_pdl is True


def test_an_error_leaves_nothing_behind(hopper):
    with pytest.raises(RuntimeError), early_start({}, inputs()) as found, config.patch(found):
        raise RuntimeError
    assert config._is_default(ENTRY)


def test_another_thread_sees_nothing_of_it(hopper):
    if not isinstance(vars(config)["_config"][ENTRY].user_override, ContextVar):
        pytest.skip("settings of this torch are those of all threads, under Dynamo's lock")
    seen: list[object] = []

    def look():
        seen.append((config.triton.enable_pdl, module._marked()))

    with early_start({}, inputs()) as found, config.patch(found):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert module._marked()
    assert seen == [(False, False)]


def test_the_backend_hands_it_to_inductor(hopper, monkeypatch):
    handed: list[dict[str, object]] = []

    def compile_it(graph, example_inputs, config_patches):
        handed.append(config_patches)
        return graph

    monkeypatch.setattr(compile_fx, "compile_fx", compile_it)
    reads = make_fx(lambda x: x + 1)(torch.randn(4, 8))
    _inductor({})(reads, inputs()[:1])
    _inductor({ENTRY: True})(reads, inputs()[:1])
    _inductor({ENTRY: False})(reads, inputs()[:1])
    _inductor({})(make_fx(lambda x: x.add_(1))(torch.randn(4, 8)), inputs()[:1])
    assert [each.get(ENTRY) for each in handed] == [MARK, MARK, False, None]


def test_the_installed_torch_and_triton_can():
    pytest.importorskip("triton")
    assert unavailable() is None


@pytest.fixture
def uncached():
    module._missing.cache_clear()
    yield
    module._missing.cache_clear()


def test_an_inductor_of_another_form_leaves_it_off(uncached, monkeypatch, caplog):
    """It also overrules who asks for it: Inductor's own waits are not enough."""
    monkeypatch.setattr(TritonKernel, "_filter_pdl", lambda self, code, more: None)
    monkeypatch.setattr(module, "visible_capability", lambda device: (9, 0))
    with caplog.at_level(logging.DEBUG, logger=module.__name__):
        assert patches(inputs()) == OFF
    assert "TritonKernel._filter_pdl is not the method that is known" in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
    assert patches(inputs(), triton__enable_pdl=True) == {ENTRY: False}


def test_a_missing_hook_leaves_it_off(uncached, monkeypatch):
    monkeypatch.setattr(TritonKernel, "codegen_kernel", lambda self, name=None: "")
    assert unavailable() == "TritonKernel does not hand its bodies to _filter_pdl"


def test_generating_in_another_process_leaves_it_off(monkeypatch):
    mode = compile_fx.FxCompileMode
    monkeypatch.setattr(compile_fx, "fx_compile_mode", mode.SUBPROCESS)
    assert unavailable() == "Inductor generates code elsewhere than in this process"


def test_cache_keys_of_inductor_differ():
    """A graph compiled without waits must not be taken for one with them."""
    with config.patch({ENTRY: True}):
        plain = config.get_hash()
    with config.patch({ENTRY: MARK}):
        assert config.get_hash() != plain

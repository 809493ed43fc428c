"""Kernels that Inductor generates start while the kernel before them still runs, and wait for it.

Programmatic dependent launch: a kernel that says `launch_dependents` lets the next one start, and
only `wait` orders that one behind it. Inductor can generate both (`triton.enable_pdl`), but decides
by buffers and by its scheduler's previous node where to wait. A kernel that loads nothing may wait
for nobody and end before the one ahead of it; who waits for it alone, as our kernels do for their
predecessor, then reads what is still being written. Random seeds are loaded without a wait. And it
counts on every kernel to have waited before it says `launch_dependents`, where ours say so as soon
as they run. So in our graphs every generated kernel lets the next one start and then waits, first
of all, whatever it accesses. Completion passes on: no kernel ends before the one ahead of it. And a
product behind such a kernel fetches its first weights while the product ahead of it still runs.

That is why weights must not be written by kernels that let others start. A graph that writes to an
input that might be one has none that do.

What is patched. `triton.enable_pdl` is on with a value of our own, `MARK`. Two methods of
Inductor's `TritonKernel` are wrapped once per process, and differ from Inductor's only under that
value: nothing decides by buffer where waits are, and a complete body gets both instructions as its
first lines, in a combo kernel each body its own. A flag of the thread would be missing where
autograd's thread compiles a backward graph, and a patch around `compile_fx` would reach other
threads. The entry goes wherever Inductor takes its settings and is part of its cache keys. It
belongs to a thread (torch 2.13), or Dynamo's lock is held while it is set (2.11); could it leak all
the same, it would bring the waits along.

What stays as it is. Templates and the user's own kernels have neither instruction nor attribute.
Cooperative reductions wait, but are launched without the attribute: whether it goes together with
theirs is nowhere documented. Sources are generated in this process, waits and all, and only
compiled in others; where Inductor generates them elsewhere too, nothing starts early.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dak_inductor import options
from dak_inductor.lowering.op_facts import triton_importable, visible_capability

log = logging.getLogger(__name__)

ENTRY = "triton.enable_pdl"
MARK = "every kernel waits first"
"""True enough for Inductor, and no value that anyone else would set."""

LONGEST_BIAS = 1 << 18
"""Elements."""

SIGNATURES = {
    "_enable_pdl_codegen": (),
    "_filter_pdl": ("self", "code"),
    "_handle_pdl_before_access": ("self", "wait_buffer", "dependencies", "consider_reads"),
}


@contextmanager
def early_start(
    given: Mapping[str, Any], example_inputs: Sequence[Any], written: Sequence[int] = ()
) -> Iterator[dict[str, Any]]:
    """What to patch into Inductor's configuration beside `given`, to be used inside the block.

    Empty where the user says no, and by default for graphs that are not for inference on GPUs of
    compute capability 9.0 or newer.

    written: the indices of the inputs that the graph writes to.
    """
    from torch._inductor import config

    asked = _asked(given)
    if asked is None and not _profits(example_inputs):
        asked = False
    reason = None
    if asked is not False:
        reason = unavailable() or _writes_weights(example_inputs, written)
    if reason is not None:
        log.debug("generated kernels do not start early: %s", reason)
    if asked is False or reason is not None:
        yield {ENTRY: False} if asked else {}
        return
    _wait_where_marked()
    entry: Any = config
    unset = entry._is_default(ENTRY)
    try:
        yield {ENTRY: MARK}
    finally:
        if unset:  # a patch leaves the value it found as if the user had set it
            setattr(config, ENTRY, _unset())


def unavailable() -> str | None:
    """Why Inductor cannot do this here, None if it can."""
    from torch._inductor import compile_fx

    mode = getattr(compile_fx, "fx_compile_mode", None)
    if mode is None or mode.name != "NORMAL":
        return "Inductor generates code elsewhere than in this process"
    return _missing()


@functools.cache
def _missing() -> str | None:
    """What the installed torch and triton lack, or have in another form than is known."""
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.codegen.triton_combo_kernel import ComboKernel
    from torch.utils import _config_module

    if ENTRY not in vars(config)["_config"]:
        return f"Inductor has no {ENTRY}"
    if not hasattr(config, "_is_default") or not hasattr(_config_module, "_UNSET_SENTINEL"):
        return "Inductor's configuration does not say what is set"
    for name, expected in SIGNATURES.items():
        method = getattr(TritonKernel, name, None)
        if method is None or tuple(inspect.signature(method).parameters) != expected:
            return f"TritonKernel.{name} is not the method that is known"
    for kind in (TritonKernel, ComboKernel):
        if "_filter_pdl" not in kind.codegen_kernel.__code__.co_names:
            return f"{kind.__name__} does not hand its bodies to _filter_pdl"
    if not triton_importable():
        return "triton is not importable"
    from triton.language.extra import cuda

    wait = getattr(TritonKernel, "GDC_WAIT", "")
    if wait != "tl.extra.cuda.gdc_wait()" or not hasattr(cuda, "gdc_wait"):
        return "triton has no gdc_wait"
    return None


def _asked(given: Mapping[str, Any]) -> bool | None:
    """What the user says: in the options of this compile, by variable, or in the configuration."""
    from torch._inductor import config

    if ENTRY in given:
        return bool(given[ENTRY])
    entry: Any = config
    value = getattr(entry.triton, "enable_pdl", None)
    if value is None or value == MARK:  # an Inductor without it, or a compile inside of ours
        return None
    if value:
        return True
    if options.inductor_variable("ENABLE_PDL") is not None or not entry._is_default(ENTRY):
        return False
    return None


def _unset() -> Any:
    """What stands in Inductor's configuration where nobody has set an entry."""
    from torch.utils._config_module import _UNSET_SENTINEL

    return _UNSET_SENTINEL


def _writes_weights(example_inputs: Sequence[Any], written: Sequence[int]) -> str | None:
    for number in written:
        if _may_be_weight(example_inputs[number]):
            return f"the graph writes to input {number}, which may be a weight"
    return None


def _may_be_weight(value: object) -> bool:
    """Whether products may fetch it early: not KV caches, which many graphs write to and which have
    four dimensions, nor biases. A long vector may be viewed as a matrix."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.dim() == 1:
        return isinstance(value.shape[0], int) and value.shape[0] > LONGEST_BIAS
    return value.dim() in (2, 3)


def _profits(example_inputs: Sequence[Any]) -> bool:
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False  # such a graph is Inductor's alone
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    found = [visible_capability(device) or (0, 0) for device in devices]
    return bool(found) and min(found) >= (9, 0)


@functools.cache
def _wait_where_marked() -> None:
    from torch._inductor.codegen.triton import TritonKernel

    kernel: Any = TritonKernel
    kernel._handle_pdl_before_access = _no_wait_by_buffer(kernel._handle_pdl_before_access)
    kernel._filter_pdl = _wait_first(kernel._filter_pdl)


def _no_wait_by_buffer(decide: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(decide)
    def before_access(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _marked():
            decide(self, *args, **kwargs)

    return before_access


def _wait_first(keep_first_wait: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @functools.wraps(keep_first_wait)
    def filter_pdl(self: Any, code: Any) -> None:
        if _marked() and self._enable_pdl_codegen():
            if self.cooperative_reduction:
                self.triton_meta["launch_pdl"] = False
            code._lines[:] = [line for line in code._lines if not _lets_start(self, line)]
            code._lines[:0] = [self.GDC_LAUNCH, self.GDC_WAIT]
        keep_first_wait(self, code)

    return filter_pdl


def _lets_start(kernel: Any, line: object) -> bool:
    return isinstance(line, str) and kernel.GDC_LAUNCH in line


def _marked() -> bool:
    from torch._inductor import config

    triton: Any = config.triton
    return bool(triton.enable_pdl == MARK)

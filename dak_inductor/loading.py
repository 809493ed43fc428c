"""`loading`: models constructed on meta and filled inside the context go straight into the tiers.

torch's registration hooks show every parameter as it is set. While a model is built on meta they
only take note; the first real tensor set over a meta one makes the plan, from what is on meta, and
from then on each tensor that arrives is copied into its tier at once and released. Whatever
converts names and layouts on the way (transformers does) stays in charge of that.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from dak_inductor.budget import DeviceBudget, asked_budget
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.errors import ModelError
from dak_inductor.model_checks import check_model
from dak_inductor.model_load import ModelLoad
from dak_inductor.offload import offload_now
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import drop, record_of
from dak_inductor.placement import LAUNCH_LOCK
from dak_inductor.plan import Plan
from dak_inductor.restore import restore


@contextmanager
def loading(
    *,
    gpu_memory: str | int | None = None,
    offload_ratio: float | None = None,
    remote: str = "cpu",
    placement: Mapping[str, str] | None = None,
    host_memory: str | int | None = None,
    device: torch.device | str | int | None = None,
    strict: bool = False,
    progress: bool = True,
    plan: Plan | str | Path | None = None,
) -> Iterator[None]:
    """Offload every model that is loaded inside, while it is loaded; arguments as of `offload`.

        with dak.loading(gpu_memory="24GB"):
            model = AutoModelForCausalLM.from_pretrained(path)

    A model built on meta is streamed, so that its weights exist once; one built on the CPU is
    offloaded at the end. Raises what `offload` raises, and ModelError if nothing was loaded inside.
    After any error the models made inside are back on meta, or as they were built.
    """
    request = OffloadRequest(
        gpu_memory, offload_ratio, remote, placement, host_memory, device, strict, progress, plan
    )
    target = request.resolved_device()
    tier = request.open_tier(target)
    with asked_budget(target, request.budget_bytes(target)) as budget:
        loader = _Loader(request, tier, budget)
        try:
            with loader.watching(), _sequential_reads():
                yield
            with torch.inference_mode(False), torch.no_grad():
                lines = loader.finish()
        except BaseException:
            loader.undo()
            raise
        finally:
            tier.trim()
    for line in lines:
        print(line)


@contextmanager
def _sequential_reads() -> Iterator[None]:
    """transformers' own switch against reading on threads, which would convert dtypes far ahead.

    Where the dtype stays, its reads are views of the file's map and threads gain nothing.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Loader:
    """What happens inside one `loading` context, on the thread that entered it."""

    def __init__(self, request: OffloadRequest, tier: Tier, budget: DeviceBudget) -> None:
        self._request = request
        self._tier = tier
        self._budget = budget
        self._thread = threading.get_ident()
        self._parent: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]
        self._parent = weakref.WeakKeyDictionary()
        self._seen: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()
        self._loads: weakref.WeakKeyDictionary[nn.Module, ModelLoad] = weakref.WeakKeyDictionary()
        self._built: list[nn.Module] = []  # on the CPU, offloaded at the end

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Registration hooks in place."""
        with ExitStack() as stack:
            on_parameter: Callable[..., Any] = self._on_parameter  # torch's stub says: None
            for handle in (
                module_hooks.register_module_module_registration_hook(self._on_module),
                module_hooks.register_module_parameter_registration_hook(on_parameter),
            ):
                stack.callback(handle.remove)
            yield

    def finish(self) -> list[str]:
        """Move what is left and enter the records; one line per model."""
        lines = []
        for root in self._roots():
            parameters = list(root.parameters())
            load = self._loads.get(root)
            if load is not None:
                with LAUNCH_LOCK:
                    lines.append((record_of(root) or load.finish(root)).line())
            elif parameters and all(p.device.type != "meta" for p in parameters):
                with LAUNCH_LOCK:
                    lines.append(offload_now(root, self._request).line())
                self._built.append(root)
        if not lines:
            raise ModelError(
                "no model was loaded inside dak.loading: load it inside the context, or call "
                "dak.offload(model, ...) on one that exists"
            )
        return lines

    def undo(self) -> None:
        """Put the models loaded inside back on meta, and the others where they were built."""
        for root, load in list(self._loads.items()):
            drop(root)
            load.undo()
        self._loads.clear()
        for root in self._built:
            restore(root)
        self._built.clear()

    def _on_module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() != self._thread:
            return
        self._seen[module] = None
        if child is not None:
            self._seen[child] = None
            self._parent[child] = weakref.ref(module)

    def _on_parameter(
        self, module: nn.Module, name: str, value: nn.Parameter | None
    ) -> nn.Parameter | None:
        if threading.get_ident() != self._thread:
            return None
        self._seen[module] = None
        before = module._parameters.get(name)
        if value is None or before is None or value.device.type == "meta":
            return None
        if before.device.type != "meta":
            return None
        with torch.inference_mode(False), torch.no_grad():
            return self._load_of(self._root(module)).arrive(module, name, value)

    def _root(self, module: nn.Module) -> nn.Module:
        visited = {id(module)}
        while (reference := self._parent.get(module)) is not None:
            parent = reference()
            if parent is None or id(parent) in visited:
                break
            visited.add(id(parent))
            module = parent
        return module

    def _roots(self) -> list[nn.Module]:
        found = {id(root): root for root in map(self._root, list(self._seen))}
        return list(found.values())

    def _settle(self) -> None:
        """Enter the models that are complete, so that their pages can make room for the next."""
        for root, load in list(self._loads.items()):
            if record_of(root) is None and load.is_complete(root):
                load.finish(root)

    def _load_of(self, root: nn.Module) -> ModelLoad:
        load = self._loads.get(root)
        if load is None:
            check_model(root)
            self._settle()
            load = ModelLoad(root, self._request, self._tier, self._budget)
            self._loads[root] = load
        return load

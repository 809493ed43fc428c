"""A TorchInductor backend for models that do not fit in GPU memory.

    model = dak.offload(model, gpu_memory="24GB")
    model.compile(backend="dak")
    print(dak.explain(model))

The names below are loaded when first used: importing the package costs no more than importing
torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dak_inductor import errors

if TYPE_CHECKING:
    from dak_inductor.explain import Explanation, explain
    from dak_inductor.loading import loading
    from dak_inductor.offload import offload
    from dak_inductor.plan import Plan
    from dak_inductor.restore import restore
    from dak_inductor.stats import Stats, stats

try:
    __version__ = version("dak-inductor")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "Explanation": "explain",
    "Plan": "plan",
    "Stats": "stats",
    "explain": "explain",
    "loading": "loading",
    "offload": "offload",
    "restore": "restore",
    "stats": "stats",
}

__all__ = [
    "Explanation",
    "Plan",
    "Stats",
    "errors",
    "explain",
    "loading",
    "offload",
    "restore",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

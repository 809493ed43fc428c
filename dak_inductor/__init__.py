"""A TorchInductor backend for models that do not fit in GPU memory.

    model = dak.offload(model, gpu_memory="24GB")
    model.compile(backend="dak")
    print(dak.explain(model))

No compiled extension is needed to import this, nor to plan.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

# Functions named as their modules: importing a module binds its name here, so the functions are
# bound after all of them, once, and not on demand.
from dak_inductor import errors
from dak_inductor.explain import Explanation, explain
from dak_inductor.kv_cache import kv_cache
from dak_inductor.loading import loading
from dak_inductor.offload import offload
from dak_inductor.plan import Plan
from dak_inductor.restore import restore
from dak_inductor.stats import Stats, stats
from dak_inductor.trace import trace

try:
    __version__ = version("dak-inductor")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Explanation",
    "Plan",
    "Stats",
    "errors",
    "explain",
    "kv_cache",
    "loading",
    "offload",
    "restore",
    "stats",
    "trace",
]


def __dir__() -> list[str]:
    """Public names, for completion: submodules too are bound here once they are imported."""
    return [*__all__, "__version__"]

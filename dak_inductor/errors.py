"""Every error a user can cause, by name. Each message says what was asked, what there is, and what
to do.

Each class also derives from the built-in error that fits, so that callers who do not know this
package
can still catch it.
"""

from __future__ import annotations


class DakError(Exception):
    """Base of all errors raised by this package."""


class OptionError(DakError, ValueError):
    """An option that does not exist, or a value outside its range."""


class BudgetError(DakError, ValueError):
    """A budget that cannot be parsed, or one smaller than what cannot leave the GPU."""


class PatternError(DakError, ValueError):
    """A placement pattern that matches no tensor, or names an unknown place."""


class TierError(DakError, ValueError):
    """A remote tier that does not exist on this machine."""


class HostMemoryError(DakError, MemoryError):
    """Host memory would not hold what was asked; raised before anything is allocated."""


class DeviceMemoryError(DakError, MemoryError):
    """The GPU would not hold what was asked."""


class DriverError(DakError, RuntimeError):
    """A CUDA driver call failed. `call` is its name and `status` the CUresult."""

    def __init__(self, message: str, *, call: str = "", status: int = 0) -> None:
        super().__init__(message)
        self.call = call
        self.status = status


class UnsupportedDriverError(DriverError):
    """The CUDA driver is missing, or too old for virtual memory management."""


class CompilationError(DakError, RuntimeError):
    """A kernel did not compile; the message carries the compiler's log."""


class CheckpointError(DakError, ValueError):
    """A checkpoint that misses a tensor, is truncated, or holds another shape than the model."""


class ModelError(DakError, TypeError):
    """A model that cannot be offloaded as it is: dispatched by accelerate, sharded, offloaded
    already."""


class PlanError(DakError, ValueError):
    """A plan of another model, hardware or version, or a damaged plan file."""


class ProfileError(DakError, ValueError):
    """A hardware profile that is unknown, damaged or of another version."""


class MoveError(DakError, RuntimeError):
    """A split could not be moved; the old placement stands."""


class StaleViewError(DakError, RuntimeError):
    """A view of remote bytes was used after the bytes had moved."""


class TieredTensorError(DakError, RuntimeError):
    """A tiered tensor was used where its memory cannot follow: export, CUDA IPC, or a forked
    child."""


class ResidentCopyError(DakError, RuntimeError):
    """Under `strict`: a weight of an offloaded model was replaced by a tensor that lives whole in
    HBM."""


class NothingOffloadedError(DakError, RuntimeError):
    """Under `strict`: a graph was compiled in which no operand lives in a remote tier."""


class CacheError(DakError, ValueError):
    """A KV cache that cannot be made, or is used with another model, batch or dtype than it was
    made for."""


class ContextLengthError(CacheError):
    """More tokens than the KV cache was made for; nothing of it was overwritten."""

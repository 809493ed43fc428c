"""The interface of a peer: prepare a model once, then run steps.

Kinds: a "reference" holds everything resident; a "real peer" charges every buffer it needs to the
same device budget; an "oracle" needs buffers that nobody charges, so no shipped system reaches
it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from dak_inductor.benchmarks.harness.models import DecoderBlocks, StepInputs, Workload

Kind = Literal["reference", "real peer", "oracle"]


class ProviderUnavailable(RuntimeError):  # noqa: N818 - reported in the table, not a defect
    """A peer that cannot run here or at this fraction; the message is the reason in the table."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What every provider is asked for: the same share of the same weights in the same tier."""

    workload: Workload
    device: torch.device
    fraction: float
    remote: str
    host_memory: int | None = None


@dataclass(slots=True)
class Prepared:
    """A provider ready to run.

    Attributes:
        step: one decode step; returns the hidden states [batch, 1, hidden].
        remote_bytes: bytes of weights that live in the remote tier only.
        device_bytes: device memory charged for weights, slots and page rounding included.
        graph: whether the step can be captured into a CUDA graph.
        note: what a reader of the table must know.
        close: undoes what garbage collection does not.
    """

    step: Callable[[], torch.Tensor]
    remote_bytes: int
    device_bytes: int
    graph: bool = True
    note: str = ""
    close: Callable[[], None] = field(default=lambda: None)


class Provider(abc.ABC):
    """A way to run a model of which a fraction of the weights is remote."""

    name: str
    kind: Kind

    @abc.abstractmethod
    def prepare(self, model: DecoderBlocks, inputs: StepInputs, setting: Setting) -> Prepared:
        """Take over `model` (resident on `setting.device`) and return its step.

        Raises ProviderUnavailable with the reason where this peer cannot run.
        """


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def remote_rows(rows: int, fraction: float) -> int:
    """Rows of a weight that are remote at `fraction`."""
    return min(rows, max(0, round(rows * fraction)))

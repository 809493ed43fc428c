"""Offloaded models are not exported: what `torch.export` writes would hold their weights whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dak_inductor.errors import TieredTensorError


class ExportRefusal:
    """A forward pre-hook of one model. A copy of the model is not offloaded, and may be exported.

    The flag is read itself: Dynamo of torch 2.11 takes `is_exporting()` for True in every compile.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model: Callable[[], nn.Module | None] = (
            weakref.ref(model) if model is not None else _nothing
        )

    def __call__(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        if torch.compiler._is_exporting_flag and self._model() is module:
            raise TieredTensorError(
                "an offloaded model cannot be exported (torch.export, AOTInductor, ONNX): its "
                "weights lie in this process's two memories, and an exported program would hold "
                "them whole. Call dak.restore(model) and export then."
            )

    def __reduce__(self) -> tuple[type[ExportRefusal], tuple[()]]:
        return ExportRefusal, ()


def refuse_export(model: nn.Module) -> RemovableHandle:
    """Have every export that calls `model` raise TieredTensorError until the handle is removed."""
    return model.register_forward_pre_hook(ExportRefusal(model))


def _nothing() -> None:
    return None

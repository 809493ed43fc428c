"""Which models are offloaded in this process: their records, by model."""

from __future__ import annotations

import threading
import weakref

from torch import nn

from dak_inductor.export_refusal import refuse_export
from dak_inductor.offloaded_model import OffloadedModel, expect_tensors
from dak_inductor.sharing_refusal import refuse_sharing

_lock = threading.Lock()
_changes = 0
_records: weakref.WeakKeyDictionary[nn.Module, OffloadedModel] = weakref.WeakKeyDictionary()


def offloaded_models() -> list[OffloadedModel]:
    """The records of all live offloaded models, oldest first."""
    with _lock:
        return list(_records.values())


def changes() -> int:
    """How often a model was entered or dropped: what was looked up before may be out of date."""
    return _changes


def note_change() -> None:
    """Tensors came or went: what was looked up before may be out of date."""
    global _changes
    with _lock:
        _changes += 1


def record_of(model: nn.Module) -> OffloadedModel | None:
    """The record of a model, also through torch.compile's wrapper; None if it is not offloaded."""
    with _lock:
        return _records.get(getattr(model, "_orig_mod", model))


def register(model: nn.Module, record: OffloadedModel) -> None:
    """Enter a model's record."""
    global _changes
    expect_tensors(record)
    refuse_sharing()
    record.export_hook = refuse_export(model)
    with _lock:
        _changes += 1
        _records[model] = record
    record.budget.models.add(record)


def drop(model: nn.Module) -> None:
    """Forget a model's record."""
    global _changes
    with _lock:
        _changes += 1
        record = _records.pop(model, None)
    if record is not None:
        record.budget.models.discard(record)
        record.budget.loose_caches.update(record.caches)
        if record.export_hook is not None:
            record.export_hook.remove()

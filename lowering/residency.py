"""Where a weight lives, as a tensor that kernels read; and the product that reads it so.

dak::residency(weight) -> int64 [8]
    The record of the weight's tiered buffer (`cuda_runtime/device_records.py`), in device memory:
    not a copy, its words change when pages move. Words, 8 bytes each:
        0  split: bytes [0, split) of the buffer are local
        1 .. 4  counters: local bytes, remote bytes, calls, peak window
        5  address of the buffer's first byte; 0 where the weight starts the buffer
        6  address of the 32-bit word that holds the link's window in bytes; 0 for the default
    A weight in no tiered buffer has a record that calls everything local.
dak::tiered_mm(x [..., K], weight, residency, layout) -> [..., N], x of two or three dimensions
    x @ weight^T ("out_in", weight [N, K]) or x @ weight ("in_out", weight [K, N]).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.exported import bytes_tensor
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer

WORDS = 8
ALL_LOCAL = 2**62
"""Split of the record of a weight that is in no tiered buffer."""

_library = torch.library.Library("dak", "FRAGMENT")
_library.define("residency(Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "tiered_mm(Tensor x, Tensor weight, Tensor residency, str layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_records: weakref.WeakKeyDictionary[TieredBuffer, Tensor] = weakref.WeakKeyDictionary()
_all_local: dict[torch.device, Tensor] = {}


def _residency(weight: Tensor) -> Tensor:
    buffer = address_table.lookup(weight.data_ptr())
    if buffer is None or not buffer.device_record:
        return _everything_local(weight.device)
    record = _records.get(buffer)
    if record is None:
        # Nothing owns the view: the record outlives the work of its buffer, and is recycled after.
        raw = bytes_tensor(None, buffer.device_record, WORDS * 8, buffer.device)
        record = _records[buffer] = raw.view(torch.int64)
    return record


def _residency_on_cpu(weight: Tensor) -> Tensor:
    buffer = address_table.lookup(weight.data_ptr())
    split, address = (ALL_LOCAL, 0) if buffer is None else (buffer.split, buffer.address)
    return torch.tensor([split, 0, 0, 0, 0, address, 0, 0])


def prepare() -> None:
    """Make the all-local record of each GPU in use, ahead of any capture.

    Memory taken during a capture, or a warm-up before one, belongs to the graph's pool.
    """
    if not torch.cuda.is_initialized():
        return
    bindings: Any = torch._C
    with unset_fake_temporarily():
        for index in range(torch.cuda.device_count()):
            if bindings._cuda_hasPrimaryContext(index):
                _everything_local(torch.device("cuda", index))


def _everything_local(device: torch.device) -> Tensor:
    if device not in _all_local:
        words = [ALL_LOCAL, *(0,) * (WORDS - 1)]
        _all_local[device] = torch.tensor(words, dtype=torch.int64, device=device)
    return _all_local[device]


def _tiered_mm(x: Tensor, weight: Tensor, residency: Tensor, layout: str) -> Tensor:
    return torch.ops.aten.matmul.default(x, weight.t() if layout == "out_in" else weight)


def _tiered_mm_shape(x: Tensor, weight: Tensor, residency: Tensor, layout: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0 if layout == "out_in" else 1]))


_library.impl("residency", _residency, "CUDA")
_library.impl("residency", _residency_on_cpu, "CPU")
_library.impl("tiered_mm", _tiered_mm, "CUDA")
_library.impl("tiered_mm", _tiered_mm, "CPU")
torch.library.register_fake(
    "dak::residency", lambda weight: weight.new_empty((WORDS,), dtype=torch.int64), lib=_library
)
torch.library.register_fake("dak::tiered_mm", _tiered_mm_shape, lib=_library)

"""dak::write_tokens: new tokens into a KV cache, in place.

    dak::write_tokens(memory [B, H, S, D], index [n], source [B, H, n, D]) -> ()
        memory[:, :, index] = source

An operator of its own: a kernel that Inductor generates is benchmarked on its operands before its
first run, and what it writes to is saved before and restored after. Of a cache that would be all of
it, by way of pinned memory; and what a growing cache has no memory for yet cannot be written.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("dak", "FRAGMENT")
_library.define(
    "write_tokens(Tensor(a!) memory, Tensor index, Tensor source) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _write_tokens(memory: Tensor, index: Tensor, source: Tensor) -> None:
    memory.index_copy_(2, index, source)


def _write_nothing(memory: Tensor, index: Tensor, source: Tensor) -> None:
    return None


for _key in ("CPU", "CUDA"):
    _library.impl("write_tokens", _write_tokens, _key)
torch.library.register_fake("dak::write_tokens", _write_nothing, lib=_library)

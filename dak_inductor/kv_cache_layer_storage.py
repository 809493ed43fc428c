"""The memory of one layer's keys and values, and what the host knows of the tokens in it.

Keys and values each lie in one tiered buffer, token by token: [capacity, batch, heads, dim]. The
buffer's split divides tokens, and the context grows at the end of what is committed.

A layer of full attention has a slot per token. A sliding layer has slots for the window and some
more: tokens are appended as in any other layer, and when the slots are used up, the newest `keep`
tokens go back to the front, once per `room` tokens. So tokens are in the order of their positions
at all times, masks and kernels need not know of the ring, and no step copies the window.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import CacheError
from dak_inductor.kv_cache_geometry import CacheGeometry, LayerShape
from dak_inductor.lowering.attention import host_lengths
from dak_inductor.quantity_text import count_text

CROP_MARGIN = 32
"""Tokens beyond the window that a sliding layer keeps, so that drafts can be taken back."""
_AHEAD_BYTES = 32 << 20
"""Pages are committed up to this far ahead: the device has to be idle each time."""

_storages: weakref.WeakKeyDictionary[TieredBuffer, weakref.ref[LayerStorage]] = (
    weakref.WeakKeyDictionary()
)
_by_number: weakref.WeakValueDictionary[int, LayerStorage] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def capacity_of(shape: LayerShape, max_len: int, prefill_chunk: int) -> int:
    """Tokens that a layer has room for."""
    if not shape.window:
        return max_len
    return min(max_len, shape.window - 1 + CROP_MARGIN + prefill_chunk)


class LayerStorage:
    """Keys and values of one layer.

    Attributes:
        keys, values: [batch, heads, capacity, dim], views of the two buffers; addresses are fixed.
        lengths: int32 [batch] on the device, slots in use, the same for each sequence.
        starts: int32 [batch] on the device, the first slot that is not padding.
        place: int32 [2] on the device, the position of slot 0, and the number of this storage, by
            which it is found from a copy of its tensors.
        tokens: all tokens since the last reset, `base` the position of slot 0, on the host.
        keep: tokens that a full sliding layer takes along; 0 for a layer with a slot per token.
        room: the longest chunk that is always taken beside them.
    """

    def __init__(
        self,
        shape: LayerShape,
        geometry: CacheGeometry,
        buffers: tuple[TieredBuffer, TieredBuffer],
        *,
        capacity: int,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.capacity = capacity
        slides = bool(shape.window) and capacity < geometry.max_len
        self.keep = shape.window - 1 + CROP_MARGIN if slides else 0
        self.room = capacity - self.keep if slides else capacity
        self.buffers = buffers
        self.row_bytes = geometry.row_bytes(shape)
        self._rows = tuple(
            buffer.tensor(geometry.dtype, (capacity, geometry.batch, shape.heads, dim))
            for buffer, dim in zip(buffers, (shape.key_dim, shape.value_dim), strict=True)
        )
        self.keys, self.values = (rows.permute(1, 2, 0, 3) for rows in self._rows)
        self.lengths = torch.zeros(geometry.batch, dtype=torch.int32, device=device)
        self.starts = torch.zeros(geometry.batch, dtype=torch.int32, device=device)
        number = next(_numbers)
        self.place = torch.tensor([0, number], dtype=torch.int32, device=device)
        self.tokens = self.base = 0
        self._written = 0  # slots that may hold something else than zeros
        self.padded = False  # whether `starts` may hold something else than zeros
        _by_number[number] = self
        for buffer in buffers:
            _storages[buffer] = weakref.ref(self)

    @property
    def slides(self) -> bool:
        return self.keep > 0

    @property
    def slots(self) -> int:
        """Slots in use."""
        return self.tokens - self.base

    @property
    def committed(self) -> int:
        """Slots that have memory."""
        return min(
            buffer.committed // row
            for buffer, row in zip(self.buffers, self.row_bytes, strict=True)
        )

    @property
    def ready(self) -> int:
        """The length up to which tokens can be appended without preparation."""
        return self.base + min(self.capacity, self.committed)

    def is_long(self, tokens: int) -> bool:
        """Whether a chunk does not fit beside the window: its keys are used as they come."""
        return self.slides and tokens > self.room

    def behind(self, tokens: int) -> int:
        """Earlier tokens that a long chunk of `tokens` is put behind."""
        return min(self.tokens, self.shape.window - 1) if self.is_long(tokens) else 0

    def slots_after(self, length: int, tokens: int) -> int:
        """Slots in use once `tokens` more have brought the context to `length`."""
        if length <= self.tokens:  # this layer has them already
            return self.slots
        if self.is_long(tokens):
            return self.kept(self.behind(tokens) + tokens)
        if length - self.base <= self.capacity:
            return length - self.base
        return self.keep + length - self.tokens

    def kept(self, tokens: int) -> int:
        """How many of the newest `tokens` a long chunk leaves in the slots."""
        return tokens if tokens <= self.capacity else self.keep

    def growth(self, slots: int) -> TierBytes:
        """Bytes of the pages that `grow(slots)` would take."""
        return sum(
            (
                buffer.growth(slots * row)
                for buffer, row in zip(self.buffers, self.row_bytes, strict=True)
            ),
            TierBytes(),
        )

    def ahead(self, slots: int) -> int:
        """What to commit when `slots` are due: up to where pages are made already, or an eighth
        more than `slots`, within _AHEAD_BYTES."""
        pairs = zip(self.buffers, self.row_bytes, strict=True)
        made = min(self.capacity, *(buffer.ahead // row for buffer, row in pairs))
        if made >= slots:
            return made
        more = min(slots // 8, _AHEAD_BYTES // max(self.row_bytes))
        return min(self.capacity, slots + more)

    def grow(self, slots: int) -> None:
        """Commit memory for the first `slots` slots. The device is idle."""
        for buffer, row in zip(self.buffers, self.row_bytes, strict=True):
            buffer.grow(slots * row)

    def make_slots(self, length: int, tokens: int) -> None:
        """Take the window to the front where `tokens` more have no slots behind it."""
        if length <= self.tokens or self.is_long(tokens):
            return
        if not self.slides or length - self.base <= self.capacity:
            return
        shift = self.slots - self.keep
        for rows in self._rows:
            # source and target overlap where the window is longer than the shift: piece by piece
            for start in range(0, self.keep, shift):
                stop = min(start + shift, self.keep)
                rows[start:stop].copy_(rows[start + shift : stop + shift])
        self.base += shift
        self.lengths.sub_(shift)
        self.place[0].add_(shift)
        self.starts.sub_(shift).clamp_(min=0)

    def note_length(self, length: int, tokens: int) -> None:
        """Tell attention on the host how many slots the coming step will have in use."""
        slots = self.slots_after(length, tokens)
        zeros = 0 if self.padded or self.slides else self.starts.data_ptr()
        for buffer in self.buffers:
            host_lengths.note_length(buffer, slots, exact=True, zero_starts=zeros)

    def advance(self, tokens: int) -> None:
        """`tokens` more have been written."""
        slots = self.slots_after(self.tokens + tokens, tokens)
        self.tokens += tokens
        self.base = self.tokens - slots
        self._written = max(self._written, slots)

    def reset(self) -> None:
        """Empty, and zero what was written: a NaN there would reach results through any mask."""
        self.padded = False
        for rows in self._rows:
            rows[: self._written].zero_()
        for state in (self.lengths, self.starts, self.place[0]):
            state.zero_()
        self.tokens = self.base = self._written = 0
        for buffer in self.buffers:
            host_lengths.forget_length(buffer)

    def check_crop(self, tokens: int) -> None:
        """Raise CacheError where the last `tokens` tokens cannot be taken back."""
        left = self.tokens - tokens
        if self.base and left - (self.shape.window - 1) < self.base:
            most = self.tokens - self.base - (self.shape.window - 1)
            raise CacheError(
                f"crop({-tokens}): a sliding window of "
                f"{count_text(self.shape.window, 'token')} has moved on; of "
                f"{count_text(self.tokens, 'token')} the last {max(0, most)} can be taken back"
            )

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` tokens back; `check_crop` allows it."""
        self.tokens -= tokens
        self.lengths.sub_(tokens)

    def reorder(self, targets: Sequence[int], sources: Sequence[int], slots: int) -> None:
        """Copy sequence `sources[i]` to `targets[i]`, `slots` slots at a time."""
        if not targets:
            return
        device = self.keys.device
        to = torch.tensor(targets, device=device)
        by = torch.tensor(sources, device=device)
        self.starts[to] = self.starts[by]
        for rows in self._rows:
            for start in range(0, self.slots, slots):
                piece = rows[start : min(start + slots, self.slots)]
                piece[:, to] = piece[:, by]


def storage_of(keys: torch.Tensor) -> LayerStorage | None:
    """The layer whose keys or values this tensor is, or None."""
    buffer = address_table.lookup(keys.data_ptr())
    reference = None if buffer is None else _storages.get(buffer)
    return None if reference is None else reference()


def storage_numbered(place: torch.Tensor) -> LayerStorage | None:
    """The layer of a copy of its `place`, or None. Waits for the device."""
    return _by_number.get(int(place[1]))


def aligned_split(split: int, row_bytes: int, tier: Tier, nbytes: int) -> int:
    """`split` rounded down to whole tokens, and to nothing or all on a tier of whole tensors."""
    if split >= nbytes:
        return nbytes
    return 0 if tier.whole_tensors else split // row_bytes * row_bytes

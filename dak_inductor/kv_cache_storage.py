"""The memory of a whole KV cache: committed as the context grows, in all layers at once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch

from dak_inductor.cuda_runtime.memory_lock import MEMORY_LOCK
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import (
    CacheError,
    ContextLengthError,
    DeviceMemoryError,
    DriverError,
    HostMemoryError,
)
from dak_inductor.kv_cache_ahead import PagesAhead
from dak_inductor.kv_cache_geometry import CacheGeometry
from dak_inductor.kv_cache_layer_storage import LayerStorage, aligned_split
from dak_inductor.kv_cache_tensors import CacheTensor, TensorPlan, decode_uses
from dak_inductor.placement import LAUNCH_LOCK
from dak_inductor.plan import OpUse, TensorSpec
from dak_inductor.quantity_text import count_text

_REORDER_BYTES = 64 << 20


class CacheStorage:
    """All layers of one cache. Not thread-safe, as no cache is.

    Args:
        geometry: the layers.
        tier: where their memory comes from.
        device: where they are used.
        plans: the tensors, and `splits` the bytes of each, by name, that are to be local.
        fixed: the splits were asked for and stay.
        expected: tokens to expect in the cache when a plan is made.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        tier: Tier,
        device: torch.device,
        plans: Sequence[TensorPlan],
        splits: dict[str, int],
        *,
        fixed: bool,
        expected: int,
    ) -> None:
        self.geometry = geometry
        self.tier = tier
        self.device = device
        self.expected = expected
        self.tensors: list[CacheTensor] = []
        for plan in plans:
            split = aligned_split(splits[plan.name], plan.row_bytes, tier, plan.nbytes)
            buffer = tier.allocate_growing(plan.nbytes, split=split)
            buffer.label = plan.name
            spec = TensorSpec(plan.name, plan.nbytes)
            self.tensors.append(CacheTensor(plan.name, buffer, spec, fixed or tier.whole_tensors))
        self.layers = [
            LayerStorage(
                shape,
                geometry,
                (self.tensors[2 * i].buffer, self.tensors[2 * i + 1].buffer),
                capacity=plans[2 * i].capacity,
                device=device,
            )
            for i, shape in enumerate(geometry.layers)
        ]
        self._place = {tensor.name: place for place, tensor in enumerate(self.tensors)}
        self._room = min(layer.room for layer in self.layers)
        self._ahead = PagesAhead(tier, self.layers)
        self._quiet = 0  # up to this length there is nothing to prepare
        for layer in self.layers:
            _owners[layer] = weakref.ref(self)

    @property
    def tokens(self) -> int:
        """Tokens in every layer; between the layers of a step, in the last one."""
        return self.layers[-1].tokens

    def bytes_by_tier(self) -> TierBytes:
        """Bytes that have memory now, by tier."""
        return sum((tensor.buffer.bytes_by_tier() for tensor in self.tensors), TierBytes())

    def claimed_bytes(self) -> TierBytes:
        """Bytes of the pages held at full length, by tier."""
        return sum((tensor.buffer.claimed_bytes() for tensor in self.tensors), TierBytes())

    def planned_bytes(self) -> TierBytes:
        """Bytes of keys and values at full length, by tier."""
        local = sum(tensor.buffer.split for tensor in self.tensors)
        return TierBytes(local, sum(tensor.buffer.nbytes for tensor in self.tensors) - local)

    def prepare(self, length: int, tokens: int) -> None:
        """Make every layer ready for `tokens` more that bring the context to `length`.

        Raises ContextLengthError past `max_len`, HostMemoryError or DeviceMemoryError where the
        pages do not fit: before anything is changed.
        """
        if length <= self._quiet and tokens <= self._room:
            return
        self._check_length(length)
        self._grow([layer.slots_after(length, tokens) for layer in self.layers], length)
        for layer in self.layers:
            layer.make_slots(length, tokens)
        ready = min(self.geometry.max_len, *(layer.ready for layer in self.layers))
        due = self._ahead.watch(length)
        self._quiet = ready if due is None else min(ready, due)

    def commit(self, length: int) -> None:
        """Take memory for a context of `length` tokens now. Raises what `prepare` raises."""
        self._check_length(length)
        self._grow([min(length, layer.capacity) for layer in self.layers], length)

    def give_back(self) -> None:
        """Give back pages that were made ahead of need. They are made again when need be."""
        self._ahead.give_back()

    def _check_length(self, length: int) -> None:
        if length > self.geometry.max_len:
            raise ContextLengthError(
                f"a context of {count_text(length, 'token')}, and the KV cache was made for "
                f"max_len={self.geometry.max_len}; it holds {count_text(self.tokens, 'token')} and "
                f"stays as it is. Make it "
                f"with dak.kv_cache(model, max_len={length}) or more, or call reset()"
            )

    def _grow(self, slots: list[int], length: int) -> None:
        short = [
            (layer, wanted)
            for layer, wanted in zip(self.layers, slots, strict=True)
            if wanted > layer.committed
        ]
        if not short:
            return
        what = f"the KV cache at {count_text(length, 'token')} of {self.geometry.max_len}"
        self._ahead.check()
        with LAUNCH_LOCK, MEMORY_LOCK:
            try:
                fitting = self._fitting(short, what)
                self._wait_for_readers()
                for layer, wanted in fitting:
                    layer.grow(wanted)
            except (HostMemoryError, DeviceMemoryError, DriverError):
                self._ahead.give_back()
                raise

    def _fitting(
        self, short: list[tuple[LayerStorage, int]], what: str
    ) -> list[tuple[LayerStorage, int]]:
        """What to commit where `short` is due: more than that if it fits."""
        with self._ahead.kept():  # what is made already is not counted in a growth
            for wanted in ([(layer, layer.ahead(slots)) for layer, slots in short], short):
                try:
                    self.tier.check_growth(_growth(wanted), what)
                except (HostMemoryError, DeviceMemoryError):
                    continue
                return wanted
        self._ahead.give_back()  # some of it may be for later than what is due
        self.tier.check_growth(_growth(short), what)
        return short

    def _wait_for_readers(self) -> None:
        """Pages change under an address that kernels in flight may read through a mask."""
        if self.device.type != "cuda":
            return
        if torch.cuda.is_current_stream_capturing():
            raise CacheError(
                "the KV cache cannot grow while a CUDA graph is being captured: call "
                "cache.commit(tokens) with the most tokens that its replays will reach before"
            )
        torch.cuda.synchronize(self.device)

    def reset(self) -> None:
        """Empty; what is committed stays so."""
        self._quiet = 0
        self.give_back()
        for layer in self.layers:
            layer.reset()

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` tokens back. Raises CacheError; then nothing is changed."""
        if not 0 <= tokens <= self.tokens:
            raise CacheError(f"crop({-tokens}): the cache holds {count_text(self.tokens, 'token')}")
        for layer in self.layers:
            layer.check_crop(tokens)
        for layer in self.layers:
            layer.crop(tokens)

    def set_starts(self, starts: torch.Tensor) -> None:
        """int [batch]: the first token of each sequence that is not padding."""
        for layer in self.layers:
            layer.padded = True
            layer.starts.copy_(starts.to(self.device) - layer.base).clamp_(min=0)

    def reorder(self, order: Sequence[int]) -> None:
        """Let sequence i be what sequence `order[i]` was. Only those that change are copied."""
        if len(order) != self.geometry.batch:
            raise CacheError(
                f"an order of {count_text(len(order), 'sequence')} for a cache of "
                f"{self.geometry.batch}"
            )
        batch = range(self.geometry.batch)
        if any(source not in batch for source in order):  # on a GPU the copy would be an assert
            raise CacheError(f"an order of sequences {list(order)}: each is one of {list(batch)}")
        targets = [i for i, source in enumerate(order) if i != source]
        sources = [order[i] for i in targets]
        for layer in self.layers:
            slots = max(1, _REORDER_BYTES // max(layer.row_bytes))
            layer.reorder(targets, sources, slots)

    def as_expected(self, use: OpUse) -> OpUse:
        """A use as it is to be expected: of this cache's tensors, up to the expected context."""
        place = self._place.get(use.tensor)
        if place is None:
            return use
        expected = self._expected_share(place)
        touched = min(use.touched_bytes, self.tensors[place].buffer.nbytes * expected)
        return replace(use, touched_bytes=touched, untouched_share=1 - expected)

    def default_uses(self) -> list[OpUse]:
        """What a decode step is taken to read before it is seen."""
        return [
            self.as_expected(use)
            for use in decode_uses(self.geometry, [(t.name, t.buffer.nbytes) for t in self.tensors])
        ]

    def _expected_share(self, place: int) -> float:
        """Share of a tensor that the context is expected to reach, in tokens now or to come."""
        capacity = self.layers[place // 2].capacity
        return min(capacity, max(self.expected, self.tokens, 1)) / capacity


_owners: weakref.WeakKeyDictionary[LayerStorage, weakref.ref[CacheStorage]] = (
    weakref.WeakKeyDictionary()
)


def owner_of(layer: LayerStorage) -> CacheStorage:
    """The cache of a layer. Raises CacheError once it is gone."""
    reference = _owners.get(layer)
    cache = None if reference is None else reference()
    if cache is None:
        raise CacheError("this layer's KV cache is gone: keep the cache that dak.kv_cache returned")
    return cache


def _growth(wanted: Sequence[tuple[LayerStorage, int]]) -> TierBytes:
    return sum((layer.growth(slots) for layer, slots in wanted), TierBytes())

"""Keys and values of a KV cache as tensors that a plan places beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.kv_cache_geometry import CacheGeometry
from dak_inductor.kv_cache_layer_storage import capacity_of
from dak_inductor.plan import OpUse, TensorSpec

GRAPH = "decode"


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Keys or values of one layer before they have memory: `nbytes` for all `capacity` tokens."""

    name: str
    layer: int
    row_bytes: int
    nbytes: int
    capacity: int


@dataclass(frozen=True, slots=True, eq=False)
class CacheTensor:
    """Keys or values of one layer in their buffer; what a plan moves, as it moves weights."""

    name: str
    buffer: TieredBuffer
    spec: TensorSpec  # as planned at creation
    fixed: bool  # its split was asked for, so that no plan moves it

    @property
    def live_spec(self) -> TensorSpec:
        """The spec with where the tensor is to lie now, and the page grid that its moves follow."""
        buffer = self.buffer
        remote = buffer.nbytes - buffer.split
        return replace(
            self.spec,
            granularity=256 if not self.fixed else 1,
            min_remote=remote if self.fixed else 0,
            max_remote=remote if self.fixed else None,
            current_remote=remote,
            page=None if self.fixed else buffer.page_bytes,
            first_page_split=None if self.fixed else -buffer.start_offset % buffer.page_bytes,
        )


def tensor_plans(
    geometry: CacheGeometry, *, label: str, prefill_chunk: int
) -> tuple[TensorPlan, ...]:
    """What a cache is made of, keys and values of each layer in turn."""
    plans = []
    for number, shape in enumerate(geometry.layers):
        capacity = capacity_of(shape, geometry.max_len, prefill_chunk)
        for kind, row in zip(("keys", "values"), geometry.row_bytes(shape), strict=True):
            name = f"{label}.layers.{number}.{kind}"
            plans.append(TensorPlan(name, number, row, capacity * row, capacity))
    return tuple(plans)


def decode_uses(geometry: CacheGeometry, tensors: Sequence[tuple[str, int]]) -> list[OpUse]:
    """One use per tensor (name, bytes): a decode step that reads all of it once."""
    return [
        OpUse(
            op=f"{name.rpartition('.')[0]}:attention",
            graph=GRAPH,
            tensor=name,
            kind="attention",
            touched_bytes=float(nbytes),
            other_bytes=0.0,
            flops=2.0 * nbytes / geometry.dtype.itemsize * geometry.group,
            calls=1.0,
            dtype=str(geometry.dtype).removeprefix("torch."),
            module=name.rpartition(".")[0],
            m=1,
        )
        for name, nbytes in tensors
    ]

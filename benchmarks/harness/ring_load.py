"""What goes through a ring of copies ahead: parts of a remote range, and their places."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from dak_inductor.lowering.ahead.ring_places import Place, places


@dataclass(frozen=True, slots=True)
class RingLoad:
    """Equal parts of `source`, which lies in a remote tier, in their order. Both are bytes.

    A part may come once `places[part].after` has been read; -1: at once.
    """

    source: Tensor
    ring: Tensor
    part_bytes: int
    places: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        return len(self.places) * self.part_bytes

    def source_address(self, part: int) -> int:
        return self.source.data_ptr() + part * self.part_bytes

    def target_address(self, part: int) -> int:
        return self.ring.data_ptr() + self.places[part].offset

    def held(self, part: int) -> Tensor:
        """The bytes of a part, in the ring."""
        start = self.places[part].offset
        return self.ring[start : start + self.part_bytes]

    def unread(self) -> RingLoad:
        """The same parts where nobody reads them: none waits for its place."""
        return replace(self, places=tuple([replace(place, after=-1) for place in self.places]))


def ring_load(source: Tensor, ring: Tensor, part_bytes: int) -> RingLoad:
    """All whole parts of `source`."""
    count = source.numel() // part_bytes
    found = places([[part_bytes]] * count, ring.numel())
    return RingLoad(source, ring, part_bytes, tuple(found))

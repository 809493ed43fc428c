"""How many bytes a streamer of a ring has in flight, and what that takes of its SMs."""

from __future__ import annotations

from dataclasses import dataclass

MOST_STAGES = 32
HEADER_BYTES = 1024
STORES = 4
"""Pieces of a CTA on their way from shared memory to the ring: a store of one takes about a
microsecond, in which a CTA alone on the link loads as many of 8 KiB as this, or twice that."""
PIECES = (16 * 1024, 8 * 1024)
"""Bytes of a piece to choose from: large ones take a thread fewer turns, small ones divide a small
share of the window better."""
_LEAST_LOADS = 8
_SHARED_BYTES = 227 * 1024  # of an SM of compute capability 9.0, for one CTA


@dataclass(frozen=True, slots=True)
class StreamerShape:
    """`ctas` with `loads` pieces in flight each, and `stages` of shared memory to hold them."""

    ctas: int
    loads: int
    piece_bytes: int

    @property
    def stages(self) -> int:
        """Room for the loads, for the stores, and for the piece between them."""
        return self.loads + STORES + 1

    @property
    def in_flight(self) -> int:
        """Bytes asked for and not arrived, at most, of all CTAs together."""
        return self.ctas * self.loads * self.piece_bytes

    @property
    def shared_bytes(self) -> int:
        """Of each CTA."""
        return HEADER_BYTES + self.stages * self.piece_bytes


def shape_for(ctas: int, window: int) -> StreamerShape:
    """So many CTAs with `window` bytes in flight together, or what their shared memory holds."""
    share = window // ctas
    fitting = [piece for piece in PIECES if share >= _LEAST_LOADS * piece]
    piece = fitting[0] if fitting else PIECES[-1]
    most = min(MOST_STAGES, (_SHARED_BYTES - HEADER_BYTES) // piece) - STORES - 1
    return StreamerShape(ctas, max(1, min(round(share / piece), most)), piece)

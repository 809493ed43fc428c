"""A product of a step as the planner sees it: bytes and seconds, no streams and no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The rows of one weight; each is one output feature.

    Rows [0, start) are multiplied in place, the rest in the ring. Rows [remote, rows) are all
    remote and come by the link. Those between are local but for one that the split may cut, and are
    copied into the ring too. They are few where `start` is what the split gives: a multiple of 8,
    since columns of the result begin on a 16-byte boundary. Or they are all of them, `start` is 0:
    then one product reads the whole weight there. Where nothing is remote, `start` is `rows`.
    """

    rows: int
    start: int
    remote: int
    row_bytes: int

    @property
    def remote_bytes(self) -> int:
        """What the link has to copy."""
        return (self.rows - self.remote) * self.row_bytes


@dataclass(frozen=True, slots=True)
class StepOp:
    """One product, in seconds.

    Attributes:
        direct: as it is served without copies ahead.
        link: of that, the link is busy.
        weights: () where it cannot be staged; `refusal` then says why.
        local: of the products in place, where the rest is staged.
        part: of one product in the ring besides its rows.
        row: of one row of it.
        rest: what staging takes besides: activation, gate, residual, count.
        launch: of one launch of the kernel that reads rows in the ring; 0 where it does not take
            the product.
        host: what the host takes for it without copies ahead, outside of CUDA graphs.
        own_ring: without copies ahead it has its remote rows copied by itself. Beside copies ahead
            of others these wait for them: 24 products of BERT-large with 8192 tokens took 3.4 ms
            where four did so, and 2.5 ms with all copied ahead (H200).
        following: what the host takes for that `rest`, outside of CUDA graphs, where stock products
            are staged.
        piece_row: of one row more, in the ring or in place, where a weight is not multiplied whole.
        before: of all other work since the product before it.
    """

    direct: float
    link: float
    weights: tuple[RowSpan, ...] = ()
    local: float = 0.0
    part: float = 0.0
    row: float = 0.0
    rest: float = 0.0
    launch: float = 0.0
    refusal: str = ""
    host: float = 0.0
    own_ring: bool = False
    piece_row: float = 0.0
    following: float = 0.0
    before: float = 0.0

    @property
    def remote_bytes(self) -> int:
        """What the link would have to copy."""
        return sum(span.remote_bytes for span in self.weights)


@dataclass(frozen=True, slots=True)
class LinkRates:
    """What the step's link does.

    Attributes:
        copy: bytes/s by copy engine.
        overhead: seconds of a copy besides its bytes.
        slowdown: how much longer work takes that reads HBM while copies run.
    """

    copy: float
    overhead: float
    slowdown: float

    def copy_seconds(self, nbytes: int) -> float:
        """Of one copy; 0 for none."""
        return self.overhead + nbytes / self.copy if nbytes else 0.0

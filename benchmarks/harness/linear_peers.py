"""Other ways to run one linear whose last rows are remote: stock kernels, and a prefetcher.

Both run a round: one call on each of several equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from dak_inductor.benchmarks.harness.copy_stream import CopyStream, remote_copy
from dak_inductor.benchmarks.harness.linear_grid import DECODE_TOKENS
from dak_inductor.benchmarks.harness.peers.provider import remote_rows
from dak_inductor.benchmarks.harness.rounds import Round

Linear = Callable[[Tensor, Tensor], Tensor]
CHOICES = ("none", "fast", "all")
STOCK = "stock on split"
PREFETCH = "prefetch"


def chosen(peers: str, tokens: int, fraction: float) -> tuple[str, ...]:
    """Peers of a cell. "fast" leaves out what takes long: stock kernels in prefill, copies."""
    if peers == "none" or fraction == 0:
        return ()
    if peers == "fast":
        return (STOCK,) if tokens <= DECODE_TOKENS[-1] else ()
    return (STOCK, PREFETCH)


def linear_round(x: Tensor, weights: Sequence[Tensor], linear: Linear = functional.linear) -> Round:
    """`linear` on each weight in turn; returns the last output. Stock kernels on tiered weights
    read the remote rows by their address."""

    def run() -> Tensor:
        output = x
        for weight in weights:
            output = linear(x, weight)
        return output

    return run


class PrefetchedRows:
    """Full-size weights whose last rows a copy engine brings in before each use.

    An oracle: nobody charges the full size, and copies run ahead as far as they can. Within a graph
    of several rounds they may overwrite rows in use, with the same values.
    """

    def __init__(self, weights: Sequence[Tensor], fraction: float, remote: str) -> None:
        self.weights = tuple(weights)
        first = weights[0]
        count = max(1, remote_rows(first.shape[0], fraction))
        self._rows = [weight[first.shape[0] - count :] for weight in self.weights]
        self._sources = [remote_copy(rows, remote) for rows in self._rows]
        self._stream = CopyStream(first.device, remote)

    def round(self, x: Tensor) -> Round:
        def run() -> Tensor:
            self._stream.fork()
            marks = []
            for rows, source in zip(self._rows, self._sources, strict=True):
                self._stream.copy(rows, source)
                marks.append(self._stream.copied())
            output = x
            for weight, mark in zip(self.weights, marks, strict=True):
                self._stream.wait(mark)
                output = functional.linear(x, weight)
            self._stream.join()
            return output

        return run

"""`dak.stats()`: what the operators read, by tier."""

from __future__ import annotations

from dataclasses import dataclass

from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.window_history import WindowHistory
from dak_inductor.link_window import histories
from dak_inductor.lowering import counters, device_counters
from dak_inductor.lowering.counters import ReadCount
from dak_inductor.session import SESSION


@dataclass(frozen=True, slots=True)
class Stats:
    """Bytes read from tiered tensors since the last reset.

    Each operator is counted in one place. On the simulated tier every op counts what it touches. On
    CUDA:

    - Products with a weight that the CUDA or the Triton template serves are counted on the device,
      by their kernels. Where one of them runs its stock composition after all, the host counts it
      as it is queued, and in a CUDA graph a small kernel does. So replays count, and the tier is
      that of the moment. A record belongs to a tensor: where operators of several kinds read one,
      `kind` names them all, joined by "+". Counts of a tensor go when it is freed.
    - All others cannot count. Their figures are the bytes of the compiled graphs' operators times
      the calls of these graphs, by the placement at each call. Work outside compiled graphs, and
      replays of graphs that the caller captured, are not seen there.

    `windows` has the window of each link that was read through, and its last changes where kernels
    change it. These are never reset.
    """

    reads: tuple[ReadCount, ...]
    windows: tuple[WindowHistory, ...] = ()

    @property
    def total(self) -> TierBytes:
        """Bytes by tier, all tensors."""
        return sum((read.bytes for read in self.reads), TierBytes())

    @property
    def peak_window(self) -> int:
        """The most remote bytes that one kernel had in flight; 0 where none measured it."""
        return max((read.peak_window for read in self.reads), default=0)

    def __str__(self) -> str:
        total = self.total
        lines = [f"read {total.local / 1e9:.3f} GB local, {total.remote / 1e9:.3f} GB remote"]
        lines += [_line(read) for read in self.reads]
        lines += [f"  {window}" for window in self.windows if window.automatic]
        return "\n".join(lines)


def _line(read: ReadCount) -> str:
    line = (
        f"  {read.kind:<15} {read.tensor:<60} {read.calls:>6} calls "
        f"{read.bytes.local / 1e6:>10.3f} MB local {read.bytes.remote / 1e6:>10.3f} MB remote"
    )
    if not read.peak_window:
        return line
    return f"{line} {read.peak_window / 1e6:>8.3f} MB peak window"


def stats(*, reset: bool = False) -> Stats:
    """Bytes read by tier and tensor since the last reset; `reset=True` starts anew afterwards.

    Waits for the work in flight on the devices that hold tiered weights.
    """
    SESSION.flush()
    result = Stats((*counters.snapshot(), *_counted_on_devices()), histories())
    if reset:
        counters.reset()
        device_counters.reset()
    return result


def _counted_on_devices() -> list[ReadCount]:
    counted = device_counters.read()
    if not counted:
        return []
    readers = SESSION.readers()
    reads = []
    for buffer, total in counted:
        name, kinds = readers.get(id(buffer), (buffer.label, ()))
        reads.append(
            ReadCount(
                kind="+".join(kinds) or "linear",
                tensor=name,
                calls=total.calls,
                bytes=TierBytes(total.local_bytes, total.remote_bytes),
                peak_window=total.peak_window,
            )
        )
    return reads

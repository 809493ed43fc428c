"""A ring filled by a streamer: a kernel of a few CTAs that runs beside the products.

It cannot deadlock. The streamer waits for products to have read a place, and a product for its
part to have arrived, both by words in device memory. What waits on the products' side is a gate, a
kernel of one thread without shared memory; products start behind it and wait for nothing
themselves. So whatever holds an SM, other than one gate and the streamer, ends by itself, and then
the streamer has room: it is the first kernel of a stream of higher priority, recorded ahead of all
gates, and has at most one CTA for an SM. Each of its CTAs goes on alone, whether or not the others
run, and what a gate waits for never waits for that gate. Should the driver queue the streamer
behind a gate all the same, or the card be taken by others: every wait ends after
`PATIENCE_SECONDS` and leaves a word that ends all other waits at once, in later replays too;
`given_up` says so. What came through the ring is void then, and who replays takes copies instead.

Such words cannot be waited for by graph edges, which know ends of kernels: a streamer launched anew
for each group of parts would have the gaps that it is to avoid.
"""

from __future__ import annotations

import struct

import torch

from dak_inductor.benchmarks.harness.device_code import loaded
from dak_inductor.benchmarks.harness.ring_load import RingLoad
from dak_inductor.benchmarks.harness.ring_words import RingWords
from dak_inductor.benchmarks.harness.streamer_shape import STORES, StreamerShape
from dak_inductor.cuda_runtime.nvrtc import KernelInstance, instance
from dak_inductor.lowering.queues import Queues, queues_of

RING_STREAMER = instance("ring_streamer", stores=STORES)
RING_GATE = instance("ring_gate")
KERNELS: tuple[KernelInstance, ...] = (RING_STREAMER, RING_GATE)
PATIENCE_SECONDS = 0.1
"""Of one wait; a part takes 0.3 ms, and no step here is longer than some 20 ms."""
_THREADS = 64
_PART = struct.Struct("<QQII")
_STREAMER = struct.Struct("<QQIIIIQ")
_GATE = struct.Struct("<QIIQ")


class StreamFiller:
    """Its memory outlives the graphs that were captured with it as long as it does."""

    def __init__(self, load: RingLoad, shape: StreamerShape, device: torch.device) -> None:
        if load.part_bytes % shape.piece_bytes:
            raise ValueError(
                f"parts of {load.part_bytes} bytes are no whole pieces of {shape.piece_bytes}"
            )
        self.load, self.shape, self._device = load, shape, device
        self._queues: Queues | None = None
        self._words = RingWords(len(load), device)
        packed = bytearray(pack_parts(load, shape))
        self._parts = torch.frombuffer(packed, dtype=torch.uint8).to(device)
        index = device.index or 0
        self._streamer, self._gate = (loaded(kernel, index) for kernel in KERNELS)
        self._streamer.prepare(shared_bytes=shape.shared_bytes)  # not in a capture

    @property
    def name(self) -> str:
        return f"streamer, {self.shape.ctas} CTAs"

    def begin(self) -> None:
        self._words.reset()
        self._queues = queues = queues_of(self._device)
        queues.copies.wait(queues.main.record())
        queues.copies.launch(self._launch)

    def arrived(self, part: int) -> None:
        """Also says that the parts before it have been read."""
        self._gate.launch(
            grid=(1, 1, 1),
            block=(1, 1, 1),
            arguments=[pack_gate(self._words.address, part, self.shape)],
        )

    def read(self, part: int) -> None:
        """The gate of the next part says it; nobody waits for the last one."""

    def join(self) -> None:
        assert self._queues is not None, "begin comes first"
        self._queues.main.wait(self._queues.copies.record())

    def given_up(self) -> str:
        return self._words.given_up()

    def _launch(self, stream: int) -> None:
        arguments = pack_streamer(
            self._parts.data_ptr(), self._words.address, len(self.load), self.shape
        )
        self._streamer.launch(
            grid=(self.shape.ctas, 1, 1),
            block=(_THREADS, 1, 1),
            arguments=[arguments],
            shared_bytes=self.shape.shared_bytes,
            stream=stream,
        )


def pack_parts(load: RingLoad, shape: StreamerShape) -> bytes:
    """As an array of `RingPart`."""
    pieces = load.part_bytes // shape.piece_bytes
    return b"".join(
        _PART.pack(load.source_address(part), load.target_address(part), pieces, place.after + 1)
        for part, place in enumerate(load.places)
    )


def pack_streamer(parts: int, words: int, count: int, shape: StreamerShape) -> bytes:
    """As `RingStreamerArguments`."""
    return _STREAMER.pack(
        parts, words, count, shape.piece_bytes, shape.loads, shape.stages, _patience()
    )


def pack_gate(words: int, part: int, shape: StreamerShape) -> bytes:
    """As `RingGateArguments`."""
    return _GATE.pack(words, part, shape.ctas, _patience())


def _patience() -> int:
    return round(PATIENCE_SECONDS * 1e9)

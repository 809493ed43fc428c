"""A ring filled by copy engines, as the backend does it: a copy for each part, on a side stream."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dak_inductor.benchmarks.harness.ring_load import RingLoad
from dak_inductor.lowering.linear.copy_engine import copy_bytes
from dak_inductor.lowering.queues import Queues, queues_of


class CopyFiller:
    """In the order of `lowering/ahead/player`: a copy is queued once the read that it waits for
    is."""

    name = "copies"

    def __init__(self, load: RingLoad, device: torch.device) -> None:
        self.load, self._device = load, device
        self._queues: Queues | None = None
        self._copied: list[Any] = []
        self._read: list[Any] = []
        self._waited = -1

    def begin(self) -> None:
        self._copied, self._read, self._waited = [], [], -1
        self._queues = queues = queues_of(self._device)
        queues.copies.wait(queues.main.record())
        self._fetch(queues)

    def arrived(self, part: int) -> None:
        queues = self._open()
        self._fetch(queues)
        queues.main.wait(self._copied[part])

    def read(self, part: int) -> None:
        assert part == len(self._read), "parts are read in their order"
        self._read.append(self._open().main.record())

    def join(self) -> None:
        queues = self._open()
        queues.main.wait(queues.copies.record())

    def given_up(self) -> str:
        """ "": streams wait by the driver's own means."""
        return ""

    def _open(self) -> Queues:
        assert self._queues is not None, "begin comes first"
        return self._queues

    def _fetch(self, queues: Queues) -> None:
        """Queue all copies whose place is free behind what was queued."""
        load, copies = self.load, queues.copies
        for part in range(len(self._copied), len(load)):
            after = load.places[part].after
            if after >= len(self._read):
                return
            if after > self._waited:
                self._waited = after
                copies.wait(self._read[after])
            copies.launch(partial(self._copy, part))
            self._copied.append(copies.record())

    def _copy(self, part: int, stream: int) -> None:
        load = self.load
        source, target = load.source_address(part), load.target_address(part)
        copy_bytes(target, source, load.part_bytes, self._device, stream)

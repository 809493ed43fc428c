"""Copies from the remote tier on a side stream, in a form that a CUDA graph can record.

On a machine without a GPU the same calls copy at once and in order, so that a prefetcher's logic
can be tested; its timing there means nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class CopyStream:
    """One side stream of `device`; copies are issued in order and waited for by mark.

    A peer tier's copies run through a stream of the peer as well: its legacy default stream would
    break a capture.
    """

    def __init__(self, device: torch.device, remote: str) -> None:
        self.on_gpu = device.type == "cuda"
        self.peer: torch.cuda.Stream | None = None
        if self.on_gpu:
            self.side = torch.cuda.Stream(device)
            if remote.startswith("cuda:"):
                self.peer = torch.cuda.Stream(torch.device(remote))

    def fork(self) -> None:
        """Let the side stream begin where the current stream is now."""
        if self.on_gpu:
            self.side.wait_stream(torch.cuda.current_stream(self.side.device))

    def join(self) -> None:
        """Let the current stream wait for every copy (a capture must end joined)."""
        if self.on_gpu:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        with self._issuing():
            destination.copy_(source, non_blocking=True)

    def copied(self) -> torch.cuda.Event | None:
        """A mark after all copies issued so far, for `wait`."""
        return self._mark(self.side) if self.on_gpu else None

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let the current stream wait for a mark from `copied`."""
        if mark is not None:
            torch.cuda.current_stream(self.side.device).wait_event(mark)

    def used(self) -> torch.cuda.Event | None:
        """A mark after all work on the current stream so far, for `hold`."""
        return self._mark(torch.cuda.current_stream(self.side.device)) if self.on_gpu else None

    def hold(self, mark: torch.cuda.Event | None) -> None:
        """Let later copies wait for a mark from `used` (their destination is free then)."""
        if mark is not None:
            self.side.wait_event(mark)

    @contextlib.contextmanager
    def _issuing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.peer is not None:
                stack.enter_context(torch.cuda.stream(self.peer))
            if self.on_gpu:
                stack.enter_context(torch.cuda.stream(self.side))
            yield

    @staticmethod
    def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event


def remote_copy(tensor: Tensor, remote: str) -> Tensor:
    """A copy of `tensor` where a prefetcher keeps it: pinned host memory, or the peer's memory."""
    if remote.startswith("cuda:"):
        return tensor.to(torch.device(remote), copy=True)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor)

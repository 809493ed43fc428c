"""A CPU view of the remote part of a tiered buffer, which notices a move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dak_inductor.errors import StaleViewError

if TYPE_CHECKING:
    from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer


class RemoteView:
    """A CPU view of the remote bytes [split, nbytes) of a buffer, valid until the next move."""

    def __init__(self, buffer: TieredBuffer) -> None:
        self.buffer = buffer
        self.generation = buffer.generation
        self.start = buffer.split

    def tensor(self) -> torch.Tensor:
        """uint8 CPU tensor over bytes [split, nbytes) of the buffer. Raises StaleViewError."""
        if self.buffer.generation != self.generation:
            raise StaleViewError(
                f"this view of remote bytes was made at generation {self.generation}, the "
                f"buffer is at {self.buffer.generation}: pages moved. Take a new remote_view()."
            )
        return self.buffer._remote_bytes()

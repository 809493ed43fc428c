"""How many tokens a cache holds, known on the host without asking the device.

Lengths of sequences are tensors on the device; reading one there would wait for all queued work.
Whoever writes the cache knows the number anyway and may note it here, by buffer, before attention
reads the cache. Only eager calls use a note: a captured graph is replayed when it is long stale.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer


@dataclass(frozen=True, slots=True)
class HostLength:
    """What the host knows of the sequences in one buffer, fresh tokens included.

    Attributes:
        tokens: no sequence has more.
        exact: every sequence has just as many.
        zero_starts: address of a `starts` tensor that holds zeros alone; 0 where there is none.
    """

    tokens: int
    exact: bool = False
    zero_starts: int = 0

    def unpadded(self, starts: Tensor) -> bool:
        """Whether `starts` is known to be zeros: every sequence starts at token 0."""
        return self.zero_starts != 0 and starts.data_ptr() == self.zero_starts


_lengths: weakref.WeakKeyDictionary[TieredBuffer, HostLength] = weakref.WeakKeyDictionary()


def note_length(
    buffer: TieredBuffer, tokens: int, *, exact: bool = False, zero_starts: int = 0
) -> None:
    """Note what the next attention calls over `buffer` will find, until the next note.

    Call it after the fresh tokens are written and before attention is called, on the same thread.
    Too small a number loses tokens: note an upper bound, or nothing.
    """
    _lengths[buffer] = HostLength(tokens, exact, zero_starts)


def forget_length(buffer: TieredBuffer) -> None:
    """Drop the note of `buffer`, if there is one."""
    _lengths.pop(buffer, None)


def length_of(buffer: TieredBuffer | None) -> HostLength | None:
    """What was noted last; None where nothing is known."""
    return None if buffer is None else _lengths.get(buffer)

"""The words by which a streamer and the gates of one ring tell each other where they are."""

from __future__ import annotations

import torch

# kernels/ring_words.cuh has the same
GIVEN_UP, PARTS_READ, ARRIVALS = 0, 32, 64
_BY_STREAMER = 1 << 31


class RingWords:
    """Of one ring of `parts` parts, in device memory; captured graphs hold its address."""

    def __init__(self, parts: int, device: torch.device) -> None:
        self._words = torch.zeros(ARRIVALS + parts, dtype=torch.int32, device=device)
        self._counts = self._words[PARTS_READ:]
        self.reset()  # torch's kernel is loaded here, and not in a capture

    @property
    def address(self) -> int:
        return self._words.data_ptr()

    def reset(self) -> None:
        """Queue the counts' return to zero. By a kernel: `zero_` is a memset, and what engine does
        that is the driver's choice."""
        self._counts.fill_(0)

    def given_up(self) -> str:
        """Who stopped waiting since the words were made; "" for nobody. Waits for the device."""
        return who_gave_up(int(self._words[GIVEN_UP].item()))


def who_gave_up(word: int) -> str:
    """`word` as the kernels leave it, read as a signed number."""
    word %= 1 << 32
    if not word:
        return ""
    number = word % _BY_STREAMER - 1
    if word & _BY_STREAMER:
        return f"the streamer waited in vain for the place of part {number}"
    return f"the product of part {number} waited in vain"

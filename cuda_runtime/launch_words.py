"""Words of device memory by which the CTAs of a launch tell each other that sums are there.

A launch finds them at zero and leaves them at zero. Two launches that may run at once must not
share them. Launches on one stream run one after the other, and so do the launches that one stream
has captured into one graph; so words belong to a stream and to the capture that is open on it.

In front of them each such stream has the windows that its launches read
(kernels/window/reading.cuh), a pair of words for each link of the GPU. These stay.
"""

from __future__ import annotations

import threading

from dak_inductor.cuda_runtime.kept_memory import KeptMemory
from dak_inductor.cuda_runtime.nvrtc import extension

_CHUNK_BYTES = 1 << 19
_LEAST_WORDS = 4096
MOST_LINKS = 32
_WINDOW_WORDS = 2
_FRONT_WORDS = MOST_LINKS * _WINDOW_WORDS

_lock = threading.Lock()
_words: dict[tuple[int, int, int], tuple[int, int]] = {}  # device, capture, stream: address, count
_memory: dict[int, KeptMemory] = {}  # by device


def words_for(device: int, count: int, stream: int) -> int:
    """The device address of `count` zero words for a launch on `stream` (a CUstream) of a GPU.

    Raises DeviceMemoryError.
    """
    key = (device, extension().capture_id(stream), stream)
    with _lock:
        address, there = _words.get(key, (0, 0))
        if there < count:
            # what was given out before is still in use by launches in flight: it is left alone
            there = max(count, _LEAST_WORDS)
            address = _take(device, _FRONT_WORDS + there) + 4 * _FRONT_WORDS
            _words[key] = (address, there)
        return address


def launch_window(words: int, link: int) -> int:
    """The device address of the window that launches with these words read, of a link by number."""
    return words - 4 * (_FRONT_WORDS - _WINDOW_WORDS * link)


def _take(device: int, words: int) -> int:
    if device not in _memory:
        _memory[device] = KeptMemory(device, _CHUNK_BYTES)
    chunk, offset = _memory[device].take(4 * words)
    return int(chunk.address) + offset

"""Children that are killed while they work. Imports nothing of the package or of torch."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import time
from collections.abc import Callable

KILLS = 8
"""Moments to try."""


def killed_while(steps: Callable[[int], None], seed: int) -> int:
    """Fork a child that repeats `steps`, kill it at some moment; how many it had finished."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for number in itertools.count():
                steps(number)
                os.write(writing, b".")
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert select.select([reading], [], [], 60)[0], "no step was finished"
        time.sleep(random.Random(seed).random() * 0.03)
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    finished = len(os.read(reading, 1 << 16))
    os.close(reading)
    return finished

"""The lock of whoever takes memory: one at a time, from the check that it fits until it is taken.

Pages that are made in the background would else slip in between a check and what it was for, and
the two together exceed a budget. It is taken after the launch lock and never before it, and nobody
who holds it waits for another thread that wants it.
"""

from __future__ import annotations

import os
import threading

MEMORY_LOCK = threading.RLock()

# A child that is forked while another thread holds it would wait for ever.
os.register_at_fork(
    before=MEMORY_LOCK.acquire,
    after_in_parent=MEMORY_LOCK.release,
    after_in_child=MEMORY_LOCK.release,
)

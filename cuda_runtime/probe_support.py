"""Whether this system gives the driver host pages (HOST_NUMA), found out in a child process.

Containers, WSL and some drivers refuse them, a few by crashing. The child makes two pages, writes
and reads both from CPU and GPU and moves one, and its exit is the answer.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass

from dak_inductor.cuda_runtime.nvrtc import extension

_TIMEOUT_SECONDS = 120

# Loads the extension alone: importing torch for this would take longer than the check.
_CHILD = """
import ctypes, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_driver", sys.argv[1])
driver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)
by_node = sys.argv[3] == "node"
tier = driver.Tier(int(sys.argv[2]), -1, by_node)
page = tier.page_bytes
content = bytes(range(256)) * (2 * page // 256)
source = ctypes.create_string_buffer(content, 2 * page)
memory = tier.allocate(2 * page, page)
memory.write(ctypes.addressof(source), 2 * page, 0)
assert memory.read(2 * page, 0) == content, "the GPU reads other bytes than were written"
window, address = memory.open_for_cpu(page, 2 * page)
assert ctypes.string_at(address, page) == content[page:], "the CPU reads other bytes"
del window
for target in (bytes([0, 0]), bytes([1, 1]), bytes([0, 1])):
    memory.move(target)
    assert memory.read(2 * page, 0) == content, "a move changed the bytes"
print(json.dumps({"by_node": by_node}))
del memory
driver.drain(10.0)
"""


@dataclass(frozen=True, slots=True)
class HostPageSupport:
    """The answer. `by_node`: CPU access is granted by location HOST_NUMA, else by HOST."""

    usable: bool
    by_node: bool = True
    reason: str = ""


@functools.cache
def host_page_support(device: int) -> HostPageSupport:
    """Whether `device` (ordinal) can map host pages; asked once per process."""
    reasons = []
    for access in ("node", "host"):
        reason = _try(device, access)
        if reason is None:
            return HostPageSupport(True, access == "node")
        reasons.append(reason)
    return HostPageSupport(False, reason=reasons[0])


def _try(device: int, access: str) -> str | None:
    """None if the child succeeds, else why not."""
    path = extension().__file__
    assert path is not None
    command = [sys.executable, "-c", _CHILD, path, str(device), access]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, env=_environment()
        )
    except subprocess.TimeoutExpired:
        return f"the check did not end within {_TIMEOUT_SECONDS} s"
    if done.returncode == 0 and done.stdout.strip():
        json.loads(done.stdout.splitlines()[-1])
        return None
    lines = done.stderr.strip().splitlines()
    if done.returncode < 0:
        return f"the driver crashed (signal {-done.returncode})"
    return lines[-1] if lines else f"the check exited with status {done.returncode}"


def _environment() -> dict[str, str]:
    """This process's environment; the child finds the error types of this package in it."""
    own = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": own}

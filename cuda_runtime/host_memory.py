"""How much host memory can be taken, and the refusal before taking more.

The smaller of MemAvailable and, for every control group above this process, its limit less its use.
File cache that the kernel would give back counts as free, as it does in MemAvailable.
"""

from __future__ import annotations

from pathlib import Path

from dak_inductor.errors import HostMemoryError

_UNLIMITED = 1 << 62
"""Version 1 control groups write a number near 2**63 for "no limit"."""


def available_host_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken now. `root` replaces the file system's root in tests."""
    candidates = [_memory_available(root), *_control_group_room(root)]
    known = [room for room in candidates if room is not None]
    return max(0, min(known)) if known else 0


def check_host_memory(needed: int, override: int | None, what: str, *, taken: int = 0) -> None:
    """Raise HostMemoryError, with the arithmetic, if `needed` bytes more would not fit.

    `override` (the user's `host_memory=`) replaces what the machine says is available; `taken`
    bytes of it are spent already. `what` names the purpose, for the message.
    """
    available = available_host_memory() if override is None else override - taken
    if needed <= available:
        return
    if override is None:
        source = "available now (MemAvailable, or the memory cgroup's limit less its use)"
    elif taken:
        source = f"left of host_memory={override} bytes, {taken} of them being taken already"
    else:
        source = f"given as host_memory={override} bytes"
    raise HostMemoryError(
        f"{what} needs {needed / 1e9:.2f} GB of host memory ({needed} bytes); "
        f"{available / 1e9:.2f} GB are {source}; {(needed - available) / 1e9:.2f} GB are missing. "
        "Nothing was allocated. Raise gpu_memory, free host memory, or, where the machine grows "
        "its memory on demand, pass host_memory=<bytes>."
    )


def _memory_available(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group_room(root: Path) -> list[int | None]:
    """Limit less use of each memory control group from this process's up to the top."""
    rooms: list[int | None] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _folders(root / "sys/fs/cgroup", path):
                rooms.append(_room(folder, "memory.max", "memory.current", ""))
        elif "memory" in controllers.split(","):
            for folder in _folders(root / "sys/fs/cgroup/memory", path):
                rooms.append(
                    _room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
                )
    return rooms


def _folders(mount: Path, path: str) -> list[Path]:
    """The group's folder and its parents up to the mount point (in containers often that alone)."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _room(folder: Path, limit_file: str, usage_file: str, prefix: str) -> int | None:
    limit_text = _read(folder / limit_file).strip()
    usage_text = _read(folder / usage_file).strip()
    if not limit_text.isdigit() or not usage_text.isdigit() or int(limit_text) >= _UNLIMITED:
        return None
    reclaimable = 0
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
            reclaimable += int(value)
    return int(limit_text) - max(0, int(usage_text) - reclaimable)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

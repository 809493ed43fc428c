"""The compiled extension on a stand-in for libcuda, built here: real C++, real aliasing, no GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "fake_driver" / "fake_cuda.cpp"
HOST = -1
OUT_OF_MEMORY = 2
LEFTOVERS = ("allocations", "reservations", "mappings", "events")


class FakeDriver:
    """The controls that the stand-in exports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name in ("used", "open_to_cpu", *LEFTOVERS):
            getattr(self._library, f"dak_fake_{name}").restype = ctypes.c_size_t
        self._library.dak_fake_calls.restype = ctypes.c_long
        self._library.dak_fake_forbidden.restype = ctypes.c_long

    def fail(self, name: str, after: int = 0, status: int = 1, *, lasting: bool = False) -> None:
        """Fail a call of `name` ("*": any), `after` more having succeeded."""
        self._library.dak_fake_fail(name.encode(), ctypes.c_long(after), status, int(lasting))

    def heal(self) -> None:
        self._library.dak_fake_fail(b"", ctypes.c_long(0), 0, 0)

    def pending(self) -> bool:
        """Whether an injected failure has not happened yet."""
        return bool(self._library.dak_fake_pending())

    def calls(self, name: str = "*") -> int:
        return int(self._library.dak_fake_calls(name.encode()))

    def forbidden(self) -> int:
        """Calls that would have broken another thread's capture, since the library was opened."""
        return int(self._library.dak_fake_forbidden())

    def capturing(self, on: bool) -> None:
        self._library.dak_fake_capturing(int(on))

    def attribute(self, attribute: int, value: int) -> None:
        self._library.dak_fake_attribute(attribute, value)

    def capacity(self, device: int, nbytes: int) -> None:
        """Bytes that a device (or HOST) has; 0: plenty."""
        self._library.dak_fake_capacity(device, ctypes.c_size_t(nbytes))

    def used(self, device: int) -> int:
        """Bytes of physical memory held on a device or on HOST."""
        return int(self._library.dak_fake_used(device))

    def open_to_cpu(self) -> int:
        """Mappings that the CPU may read and write."""
        return int(self._library.dak_fake_open_to_cpu())

    def leftovers(self) -> dict[str, int]:
        return {name: int(getattr(self._library, f"dak_fake_{name}")()) for name in LEFTOVERS}


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler to build the stand-in driver with")
    library = tmp_path_factory.mktemp("fake_driver") / "libfake_cuda.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="module")
def _fake_driver(fake_library: Path) -> Iterator[FakeDriver]:
    from dak_inductor.cuda_runtime import vmm
    from dak_inductor.cuda_runtime.nvrtc import extension
    from dak_inductor.cuda_runtime.probe_support import host_page_support

    before = os.environ.get("DAK_LIBCUDA")
    os.environ["DAK_LIBCUDA"] = str(fake_library)
    host_page_support.cache_clear()
    assert extension().is_fake()
    yield FakeDriver(fake_library)
    gc.collect()
    vmm._native_tiers.clear()
    gc.collect()
    assert vmm.drain()
    extension().release_staging()
    extension().close()
    host_page_support.cache_clear()
    if before is None:
        del os.environ["DAK_LIBCUDA"]
    else:
        os.environ["DAK_LIBCUDA"] = before


@pytest.fixture
def fake(_fake_driver: FakeDriver) -> Iterator[FakeDriver]:
    """The stand-in driver; a test that leaves memory, addresses or mappings behind fails."""
    from dak_inductor.cuda_runtime import vmm

    yield _fake_driver
    _fake_driver.heal()
    _fake_driver.capturing(False)
    for device in (HOST, 0, 1):
        _fake_driver.capacity(device, 0)
    gc.collect()
    for tier in vmm._native_tiers.values():
        tier.reserve(0)
    assert vmm.drain()
    assert vmm.live_handles() == 0
    assert _fake_driver.leftovers() == dict.fromkeys(LEFTOVERS, 0)


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**62), 2**62, (-(-nbytes // 8),), generator=generator)
    return words.view(torch.uint8)[:nbytes]

"""Kernels ready to launch: compiled for a device, loaded on it, once per process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

from dak_inductor.cuda_runtime.current_stream import current_stream
from dak_inductor.cuda_runtime.nvrtc import Cubin, KernelInstance, compiler, extension
from dak_inductor.errors import UnsupportedDriverError

Extent = tuple[int, int, int]
_WITHOUT_OPT_IN = 48 * 1024  # dynamic shared memory that needs no attribute


class LoadedKernel:
    """A kernel on one device. Stays loaded, since captured CUDA graphs may hold it."""

    def __init__(self, cubin: Cubin, device_index: int) -> None:
        self.name = cubin.name
        self.device_index = device_index
        self.function = extension().Kernel(
            image=cubin.image, symbol=cubin.symbol, device=device_index
        )
        self._shared_bytes = _WITHOUT_OPT_IN
        self._non_portable = False

    def launch(
        self,
        *,
        grid: Extent,
        block: Extent,
        arguments: Sequence[bytes],
        shared_bytes: int = 0,
        cluster: Extent = (1, 1, 1),
        stream: int | None = None,
        overlap: bool = False,
    ) -> None:
        """Launch on `stream` (a CUstream), by default torch's current stream of the device.

        `arguments` are the kernel's parameters as bytes, as `struct.pack` gives them. With
        `overlap` the kernel may start before the one ahead of it has ended, and waits for it
        itself. Raises ValueError where their sizes are not the kernel's, or clusters do not fill
        the grid, and DriverError where the driver refuses.
        """
        self.prepare(shared_bytes=shared_bytes, cluster=cluster)
        self.function.launch(
            grid=grid,
            block=block,
            arguments=arguments,
            shared_bytes=shared_bytes,
            stream=current_stream(self.device_index) if stream is None else stream,
            cluster=cluster,
            overlap=overlap,
        )

    def prepared(
        self,
        *,
        grid: Extent,
        block: Extent,
        arguments: Sequence[bytes],
        patches: Sequence[tuple[int, int, int]],
        shared_bytes: int = 0,
        cluster: Extent = (1, 1, 1),
        overlap: bool = False,
    ) -> Any:
        """The same launch again and again: `.launch(stream, values)` of what is returned queues it,
        with the bytes of all patches in order.

        patches: (argument, offset, size) of what each launch brings. Raises ValueError as `launch`
        does, and where a patch is not all of its argument.
        """
        self.prepare(shared_bytes=shared_bytes, cluster=cluster)
        return self.function.prepare(
            grid=grid,
            block=block,
            arguments=arguments,
            patches=patches,
            shared_bytes=shared_bytes,
            cluster=cluster,
            overlap=overlap,
        )

    def prepare(self, *, shared_bytes: int = 0, cluster: Extent = (1, 1, 1)) -> None:
        """Permit launches with that much dynamic shared memory and that cluster size."""
        if shared_bytes > self._shared_bytes:
            self.function.allow(dynamic_shared_bytes=shared_bytes)
            self._shared_bytes = shared_bytes
        if cluster[0] * cluster[1] * cluster[2] > 8 and not self._non_portable:
            self.function.allow(non_portable_cluster=True)
            self._non_portable = True

    def maximum_active_clusters(
        self, *, block: Extent, shared_bytes: int = 0, cluster: Extent = (1, 1, 1)
    ) -> int:
        """How many such clusters the device holds at once: 0 where one does not fit."""
        self.prepare(shared_bytes=shared_bytes, cluster=cluster)
        return self.function.maximum_active_clusters(
            block=block, shared_bytes=shared_bytes, cluster=cluster
        )


_loaded: dict[tuple[KernelInstance, int], LoadedKernel] = {}
_lock = threading.Lock()


def load(kernel: KernelInstance, device_index: int) -> LoadedKernel:
    """`kernel` on that device, compiled and loaded at the first call. Thread-safe.

    Raises CompilationError, DriverError, and UnsupportedDriverError where the GPU is too old.
    """
    found = _loaded.get((kernel, device_index))
    if found is not None:
        return found
    with _lock:
        if (kernel, device_index) not in _loaded:
            cubin = compiler().cubin(kernel, architecture=architecture(device_index))
            _loaded[kernel, device_index] = LoadedKernel(cubin, device_index)
        return _loaded[kernel, device_index]


@functools.cache
def architecture(device_index: int) -> str:
    """What to compile for: "sm_90a" on Hopper. Raises UnsupportedDriverError below that."""
    import torch

    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 9:
        raise UnsupportedDriverError(
            f"these kernels use bulk copies, which need compute capability 9.0 or newer; GPU "
            f"{device_index} ({torch.cuda.get_device_name(device_index)}) has {major}.{minor}"
        )
    return f"sm_{major}{minor}a"

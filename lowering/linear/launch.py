"""Launches of the kernel `tiered_linear`: arguments packed as kernels/linear/arguments.cuh has."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.current_stream import current_stream
from dak_inductor.cuda_runtime.kernel import LoadedKernel, load
from dak_inductor.cuda_runtime.launch_words import launch_window, words_for
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.window import window_of
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.gpu_profile import profile_of
from dak_inductor.lowering.linear.configuration import (
    CONSUMER_WARPGROUPS,
    DEPTH,
    FEW_ROWS,
    FEW_ROWS_SECONDS,
    LATE_SECONDS,
    THREADS,
    LinearConfiguration,
    most_remote_workers,
    piece_seconds,
    reader_bandwidth,
    step_seconds,
    worker_bytes,
)
from dak_inductor.lowering.linear.problem import Activation, LinearProblem
from dak_inductor.lowering.linear.tail import tail_rule
from dak_inductor.lowering.linear.tensor_maps import ALIGNMENT, matrix_map

_WEIGHT = struct.Struct("<4Q")
_ADDRESSES = struct.Struct("<4Q2q3Q")
_REST = struct.Struct("<7I4fI4I2I")
_MAP_BYTES = 128
_BLOCK = (THREADS, 1, 1)
_CLAIM_WORDS = 32  # the word that all CTAs add to has a line of L2 to itself


@dataclass(frozen=True, slots=True)
class Operand:
    """A weight as stored, [N, K] or [K, N], with its bias, and the buffer that holds it.

    owns_bias: it is a copy that nobody else keeps.
    """

    tensor: Tensor
    bias: Tensor | None
    buffer: TieredBuffer
    owns_bias: bool = False

    def packed(self) -> bytes:
        return _WEIGHT.pack(
            self.buffer.device_record,
            self.tensor.data_ptr() - self.buffer.address,
            self.tensor.stride(0) * self.tensor.element_size(),
            0 if self.bias is None else self.bias.data_ptr(),
        )


@dataclass(frozen=True, slots=True)
class CopiedRows:
    """Rows [first, N) of a weight, copied ahead: `tensor` is [N - first, K], contiguous, in device
    memory. `first` is a multiple of 8, the same for gate and up where both have such rows."""

    first: int
    tensor: Tensor


class LinearLaunch:
    """Launches of one product with the same weights: all that does not change is packed once.

    Args:
        operands: one, or gate and up; their tensors and buffers must outlive the launches, but for
            a bias that is the operand's own.
        bounded_waits: end with an error that names the barrier where one never completes.

    Raises CompilationError, DriverError.
    """

    def __init__(
        self,
        problem: LinearProblem,
        configuration: LinearConfiguration,
        operands: tuple[Operand, ...],
        activation: Activation,
        device: torch.device,
        *,
        bounded_waits: bool = False,
    ) -> None:
        self._device, self._index = device, device.index
        self._kernel = load(configuration.kernel(bounded_waits=bounded_waits), self._index)
        workers = worker_count(configuration, self._index)
        self._window = window = window_of(device, operands[0].buffer.tier)
        self._most_in_flight = window.most
        # two CTAs to an SM let the next launch start before they could agree on a window
        self._agrees = not configuration.paired
        profile = profile_of(self._index)
        most_remote = most_remote_workers(
            configuration, profile, window.link, window=window.most, workers=workers
        )
        step = step_seconds(configuration, profile)
        tail = tail_rule(problem, configuration, profile, workers)
        slots = 2 * most_remote + workers  # a remote run may leave one and keep one
        slots += configuration.tiles(problem) if problem.in_out else 0
        slots += tail.slots(configuration.tiles(problem))
        self._partial_bytes = slots * configuration.partial_bytes
        self._words = _CLAIM_WORDS + slots * configuration.cluster * CONSUMER_WARPGROUPS
        second = operands[-1]
        # else a launch's own partial sums could lie where they are
        self._copies = [operand.bias for operand in operands if operand.owns_bias]
        self._weights = operands[0].packed() + second.packed()
        self._cta_tokens = math.ceil(problem.m / configuration.cluster)
        self._constants = (
            problem.m,
            self._cta_tokens,
            problem.n,
            problem.k,
            int(activation),
            most_remote,
            worker_bytes(window.link),
            1 / (window.link.direct_bandwidth * step),
            1 / (reader_bandwidth(window.link) * step),
            piece_seconds(configuration) / step,
            FEW_ROWS_SECONDS / (configuration.cluster * step),
            configuration.stages + round(LATE_SECONDS / step),
            tail.share,
            tail.pieces,
            tail.least,
            tail.spared,
        )
        self._configuration, self._n = configuration, problem.n
        self._maps = tuple(
            _weight_maps(operand.tensor, configuration) for operand in (operands[0], second)
        )
        self._grid = (workers * configuration.cluster, 1, 1)
        self._cluster = (configuration.cluster, 1, 1)
        self._shared_bytes = configuration.shared_bytes
        self._dtype = problem.dtype
        # of the tokens' map: rows, columns, bytes from row to row, rows of a box
        self._rows = problem.m, problem.k, problem.k * ELEMENT_BYTES, self._cta_tokens
        own = self._maps[0][:_MAP_BYTES]
        constants = _REST.pack(*self._constants, self._n, self._n)
        maps = (*self._maps, own, own, bytes(_MAP_BYTES))
        self._prepared = self._kernel.prepared(
            grid=self._grid,
            block=_BLOCK,
            arguments=(*maps, self._weights + bytes(_ADDRESSES.size) + constants),
            patches=[
                (len(maps) - 1, 0, _MAP_BYTES),
                (len(maps), len(self._weights), _ADDRESSES.size),
            ],
            shared_bytes=self._shared_bytes,
            cluster=self._cluster,
            overlap=True,
        )

    @property
    def holds(self) -> bool:
        """False once the link's window may be another than it was: workers are counted by it.

        That kernels change it within its limits makes no difference.
        """
        return self._window.most == self._most_in_flight

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        out: Tensor,
        copied: Sequence[CopiedRows | None] = (),
    ) -> None:
        """Queue y = f(x W^T) on torch's current stream.

        Args:
            x: [M, K], rows contiguous.
            residual, out: [M, N], rows contiguous.
            copied: of each weight, [N, K], the rows that are read there. All of the weights is then
                taken for local: their other rows should be.

        Raises DriverError.
        """
        partials, stream = self._partials(), current_stream(self._index)
        tokens = _map(x, self._cta_tokens)
        added = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
        addresses = self._addresses(stream, partials, added, (out.data_ptr(), out.stride(0)))
        if not copied:
            self._prepared.launch(stream, tokens + addresses)
            return
        in_ring = (*copied, None, None)[:2]
        firsts = [self._n if rows is None else rows.first for rows in in_ring]
        ring_maps = [
            self._maps[0][:_MAP_BYTES]
            if rows is None
            else _tile_map(rows.tensor, self._configuration)
            for rows in in_ring
        ]
        arguments = self._weights + addresses + _REST.pack(*self._constants, *firsts)
        self._kernel.launch(
            grid=self._grid,
            block=_BLOCK,
            arguments=(*self._maps, *ring_maps, tokens, arguments),
            shared_bytes=self._shared_bytes,
            cluster=self._cluster,
            stream=stream,
            # the kernel asks for weights before it waits for the work ahead of it, which for copied
            # rows is the copy
            overlap=False,
        )

    def takes(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether `run` does: they lie row after row from a multiple of 16 bytes on."""
        return _plain(x) and (residual is None or _plain(residual))

    def run(self, x: Tensor, residual: Tensor | None, shape: torch.Size) -> Tensor:
        """The same without looks at the operands, for a call like one that was looked at, of
        operands that it `takes`.

        Args:
            x: [..., K].
            residual: [..., N] or None.
            shape: [..., N] of the result.
        """
        out = torch.empty(shape, dtype=self._dtype, device=self._device)
        partials, stream = self._partials(), current_stream(self._index)
        tokens = matrix_map(x.data_ptr(), self._dtype, *self._rows, True)
        # not their strides: those of dimensions of one element are anything
        added = (0, 0) if residual is None else (residual.data_ptr(), self._n)
        addresses = self._addresses(stream, partials, added, (out.data_ptr(), self._n))
        self._prepared.launch(stream, tokens + addresses)
        return out

    def _partials(self) -> Tensor:
        """Room for sums, to be held until the launch that fills it is queued."""
        return torch.empty(self._partial_bytes, dtype=torch.uint8, device=self._device)

    def _addresses(
        self, stream: int, partials: Tensor, residual: tuple[int, int], out: tuple[int, int]
    ) -> bytes:
        """What each launch brings. `residual` and `out`: address, and elements from row to row."""
        words = words_for(self._index, self._words, stream)
        window = self._window
        return _ADDRESSES.pack(
            window.address,
            launch_window(words, window.number) if window.automatic and self._agrees else 0,
            out[0],
            residual[0],
            out[1],
            residual[1],
            partials.data_ptr(),
            words + 4 * _CLAIM_WORDS,
            words,
        )


def _plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


@lru_cache(maxsize=1024)
def worker_count(configuration: LinearConfiguration, device_index: int) -> int:
    """Clusters (or CTAs) of this configuration that the device holds at once; 0: none fits."""
    if configuration.cluster == 1:
        return torch.cuda.get_device_properties(device_index).multi_processor_count
    kernel: LoadedKernel = load(configuration.kernel(), device_index)
    return kernel.maximum_active_clusters(
        block=_BLOCK,
        shared_bytes=configuration.shared_bytes,
        cluster=(configuration.cluster, 1, 1),
    )


def _weight_maps(weight: Tensor, configuration: LinearConfiguration) -> bytes:
    """RowMaps of kernels/linear/producer.cuh."""
    tile = _tile_map(weight, configuration)
    return b"".join([tile, *(_map(weight, rows) for rows in FEW_ROWS)])


def _tile_map(weight: Tensor, configuration: LinearConfiguration) -> bytes:
    if configuration.in_out:
        return _map(weight, DEPTH)
    alone = configuration.cluster == 1 and not configuration.paired
    return _map(weight, configuration.features, wide=not alone)


def _map(matrix: Tensor, box_rows: int, *, wide: bool = True) -> bytes:
    rows, columns = matrix.shape
    row_bytes = max(matrix.stride(0), columns) * matrix.element_size()
    row_bytes = math.ceil(row_bytes / 16) * 16  # of a single row any stride does
    return matrix_map(matrix.data_ptr(), matrix.dtype, rows, columns, row_bytes, box_rows, wide)

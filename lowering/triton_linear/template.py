"""The Triton template: a persistent grid around the device functions, and the hook for epilogues.

Kept apart from `device.py` because it is text with holes that Inductor fills: sizes, strides, and
`store_output`, where the fused pointwise ops go.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

_KERNEL = r"""
{{def_kernel("X", "W", "RESIDENCY")}}
    M = {{size("X", 0)}}
    K = {{size("X", 1)}}
    N = {{size("W", 0) if OUT_IN else size("W", 1)}}
    x_pitch = {{stride("X", 0)}}
    x_step = {{stride("X", 1)}}
    pitch = {{stride("W", 0)}}
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    grid_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles = grid_m * ((N + BLOCK_N - 1) // BLOCK_N)
    {% if OUT_IN %}
    local = local_rows(W, RESIDENCY, pitch, N)
    width = K
    rows = N
    # A tile with the split in it counts as remote.
    first_remote = tl.where(local == N, tiles, local // BLOCK_N * grid_m)
    readers = reading_programs(RESIDENCY, BYTES_IN_FLIGHT, DEFAULT_WINDOW)
    start, stop, step = tile_range(program, programs, readers, first_remote, tiles)
    in_flight = tl.minimum(readers, tiles - first_remote) * BYTES_IN_FLIGHT
    {% else %}
    local = local_rows(W, RESIDENCY, pitch, K)
    width = N
    rows = K
    # Whole steps of the local loop; what is local beyond them is read with the remote rows.
    local_k = tl.where(local == K, K, local // BLOCK_K * BLOCK_K)
    start = program
    stop = tiles
    step = programs
    in_flight = programs * REMOTE_K * BLOCK_N * ITEMSIZE
    {% endif %}
    local_bytes = local.to(tl.int64) * width * ITEMSIZE
    # Each row of tiles asks the link for the remote rows again.
    remote_bytes = (rows - local).to(tl.int64) * width * ITEMSIZE * grid_m
    count(RESIDENCY, program, local_bytes, remote_bytes, in_flight)

    for tile in range(start, stop, step):
        tile_m = tile % grid_m
        tile_n = tile // grid_m
        {% if OUT_IN %}
        acc = product_out_in(
            X, W, tile_m, tile_n, M, N, K, x_pitch, x_step, pitch,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )
        {% else %}
        acc = product_in_out(
            X, W, tile_m, tile_n, M, N, K, local_k, program % 2 == 0, x_pitch, x_step, pitch,
            BLOCK_M, BLOCK_N, BLOCK_K, REMOTE_K, EVEN_N, PRECISION,
        )
        {% endif %}
        idx_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE))[:, None]
        idx_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE))[None, :]
        mask = (idx_m < M) & (idx_n < N)
        {% if RANK == 3 %}
        idx_batch = idx_m // {{size(None, 1)}}
        idx_row = idx_m % {{size(None, 1)}}
        {{store_output(("idx_batch", "idx_row", "idx_n"), "acc", "mask", indent_width=8,
                       val_shape=("BLOCK_M", "BLOCK_N"))}}
        {% else %}
        {{store_output(("idx_m", "idx_n"), "acc", "mask", indent_width=8,
                       val_shape=("BLOCK_M", "BLOCK_N"))}}
        {% endif %}
"""


def kernel_source() -> str:
    """The template's text: the kernel, then the device functions that it calls."""
    device = Path(__file__).with_name("device.py").read_text(encoding="utf-8")
    functions = device[device.index("@triton.jit") :]
    return f"{_KERNEL}\n\n{functions}"


@lru_cache(maxsize=1)
def template() -> Any:
    """The TritonTemplate; its name may be registered once per process."""
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    def grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any, min: Any) -> tuple[Any, int, int]:
        tiles = cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"])
        return (min(meta["PROGRAMS"], tiles), 1, 1)

    return TritonTemplate(name="dak_linear", grid=SymbolicGridFn(grid), source=kernel_source())

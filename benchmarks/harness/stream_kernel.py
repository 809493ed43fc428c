"""A plain streaming read with 16-byte loads: one of the ways to measure a ceiling."""

import torch
import triton
import triton.language as tl

BLOCK_ELEMENTS = 4096


@triton.jit
def stream_read_kernel(source, partial, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in tl.range(program, blocks, programs, loop_unroll_factor=2):
        total += tl.load(source + block.to(tl.int64) * BLOCK + lanes)
    tl.store(partial + program, tl.sum(total, axis=0))


def stream_read(source: torch.Tensor, partial: torch.Tensor) -> None:
    """Read int32 `source` once by `partial.numel()` programs; each stores the sum of its part."""
    if source.numel() % BLOCK_ELEMENTS:
        raise ValueError(f"{source.numel()} elements are no multiple of {BLOCK_ELEMENTS}")
    stream_read_kernel[(partial.numel(),)](
        source, partial, source.numel() // BLOCK_ELEMENTS, BLOCK=BLOCK_ELEMENTS, num_warps=8
    )


def check_read(source: torch.Tensor, partial: torch.Tensor) -> None:
    """Raise unless the partial sums add up to that of `source` mod 2**32: all of it was read."""
    partial.fill_(-1)
    stream_read(source, partial)
    expected = int(source.view(-1, BLOCK_ELEMENTS).sum(dtype=torch.int64))
    found = int(partial.sum(dtype=torch.int64))
    if (expected - found) % 2**32:
        raise RuntimeError(f"the stream kernel read {found % 2**32}, expected {expected % 2**32}")

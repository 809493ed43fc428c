"""The kernel that merges partial results of attention, up to eight in one pass over memory."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

MOST = 8
_BLOCK = 16  # rows of one head that a program merges


@triton.jit
def _include(
    top, total, sums, out, lse, rows, shift, batch, head, row, column, inside, HEADS, WIDTH
):
    """Take a partial result [B, rows, HEADS, WIDTH] into running sums of a block of rows."""
    at = row + shift
    score = tl.load(lse + (batch * HEADS + head) * rows + at, mask=inside, other=-float("inf"))
    seen = (score > -float("inf")) & (score < float("inf"))
    score = tl.where(seen, score, -float("inf"))
    higher = tl.maximum(top, score)
    base = tl.where(higher == -float("inf"), 0.0, higher)
    kept, share = tl.exp(top - base), tl.exp(score - base)
    place = ((batch * rows + at) * HEADS + head) * WIDTH
    mask = seen[:, None] & inside[:, None] & (column < WIDTH)[None, :]
    part = tl.load(out + place[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    sums = sums * kept[:, None] + part * share[:, None]
    return higher, total * kept + share, sums


# Numbers of rows are many: a kernel compiled for each that happens to be divisible would be, too.
_PLAIN = [f"{name}{index}" for index in range(MOST) for name in ("rows", "shift")]


@triton.jit(do_not_specialize=[*_PLAIN, "out_rows", "start", "rows"])
def merge_kernel(
    out0, lse0, rows0, shift0, out1, lse1, rows1, shift1, out2, lse2, rows2, shift2,
    out3, lse3, rows3, shift3, out4, lse4, rows4, shift4, out5, lse5, rows5, shift5,
    out6, lse6, rows6, shift6, out7, lse7, rows7, shift7,
    OUT, LSE, out_rows, start, rows, HEADS, WIDTH,
    COUNT: tl.constexpr, WITH_LSE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + rows) of OUT [B, out_rows, HEADS, WIDTH] and LSE [B, HEADS, out_rows].

    Row r of them is row r + shift of each of the COUNT partial results, which they are none of.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    sums = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    top, total, sums = _include(
        top, total, sums, out0, lse0, rows0, shift0, batch, head, row, column, inside, HEADS, WIDTH
    )
    if COUNT > 1:
        top, total, sums = _include(
            top, total, sums, out1, lse1, rows1, shift1,
            batch, head, row, column, inside, HEADS, WIDTH,
        )  # fmt: skip
    if COUNT > 2:
        top, total, sums = _include(
            top, total, sums, out2, lse2, rows2, shift2,
            batch, head, row, column, inside, HEADS, WIDTH,
        )  # fmt: skip
    if COUNT > 3:
        top, total, sums = _include(
            top, total, sums, out3, lse3, rows3, shift3,
            batch, head, row, column, inside, HEADS, WIDTH,
        )  # fmt: skip
    if COUNT > 4:
        top, total, sums = _include(
            top, total, sums, out4, lse4, rows4, shift4,
            batch, head, row, column, inside, HEADS, WIDTH,
        )  # fmt: skip
    if COUNT > 5:
        top, total, sums = _include(
            top, total, sums, out5, lse5, rows5, shift5,
            batch, head, row, column, inside, HEADS, WIDTH,
        )  # fmt: skip
    if COUNT > 6:
        top, total, sums = _include(
            top, total, sums, out6, lse6, rows6, shift6,
            batch, head, row, column, inside, HEADS, WIDTH,
        )  # fmt: skip
    if COUNT > 7:
        top, total, sums = _include(
            top, total, sums, out7, lse7, rows7, shift7,
            batch, head, row, column, inside, HEADS, WIDTH,
        )  # fmt: skip
    seen = total > 0
    result = tl.where(seen[:, None], sums / tl.where(seen, total, 1.0)[:, None], 0.0)
    place = ((batch * out_rows + start + row) * HEADS + head) * WIDTH
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(OUT + place[:, None] + column[None, :], result.to(OUT.dtype.element_ty), mask=mask)
    if WITH_LSE:
        merged = tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), -float("inf"))
        tl.store(LSE + (batch * HEADS + head) * out_rows + start + row, merged, mask=inside)


def launch(
    inputs: Sequence[tuple[Tensor, Tensor, int]],
    *,
    start: int,
    rows: int,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Merge into rows [start, start + rows) of `out` and `lse`, on the current stream.

    Args:
        inputs: at most eight of (out [B, rows_i, Hq, Dv], lse [B, Hq, rows_i], the row of them that
            is row `start`), contiguous.
        out: [B, R, Hq, Dv], contiguous.
        lse: [B, Hq, R], contiguous, or None.
    """
    batch, out_rows, heads, width = out.shape
    filled = [*inputs, *[inputs[0]] * (MOST - len(inputs))]
    arguments: list[object] = []
    for partial, scores, first in filled:
        arguments += [partial, scores, partial.shape[1], first]
    merge_kernel[(triton.cdiv(rows, _BLOCK), batch * heads)](
        *arguments,
        out,
        inputs[0][1] if lse is None else lse,
        out_rows,
        start,
        rows,
        heads,
        width,
        COUNT=len(inputs),
        WITH_LSE=lse is not None,
        BLOCK=_BLOCK,
        COLUMNS=triton.next_power_of_2(width),
    )

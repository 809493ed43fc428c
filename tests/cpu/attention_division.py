"""The attention kernel's division of work (kernels/attention) as a function of this machine."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from dak_inductor.lowering.attention.configuration import NO_SWEEP
from dak_inductor.lowering.attention.launch import divisor

from .host_library import compile_for_host

TILE, ROW_BYTES = 64, 256
MOST_PIECES = 1 << 16

SOURCE = Path(__file__).with_suffix(".cpp")


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in (
            "batch", "heads", "row_blocks", "queries", "tokens", "visible", "workers", "slots",
            "window", "most_chunks", "least_chunk", "sweep", "finest_rows",
        )),
        ("remote_tile", ctypes.c_float),
        ("remote_piece", ctypes.c_float),
        ("blocks", ctypes.c_uint * 2),
        ("grains", ctypes.c_uint * 2),
        ("splits", ctypes.c_uint64 * 2),
        ("offsets", ctypes.c_uint64 * 2),
        ("batch_bytes", ctypes.c_uint64),
        ("head_bytes", ctypes.c_uint64),
        ("token_bytes", ctypes.c_uint64),
    )  # fmt: skip


class Found(ctypes.Structure):
    """One tile."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in (
            "worker", "remote", "sequence", "head", "slot", "slots", "first_slot", "last_slot",
        )),
        ("begin", ctypes.c_int),
        ("end", ctypes.c_int),
        *((name, ctypes.c_uint) for name in (
            "rows_begin", "rows_end", "opens_piece", "resumes", "complete",
        )),
        ("local_bytes", ctypes.c_uint64 * 2),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Sizes of a call, and where its caches are cut (bytes)."""

    batch: int
    heads: int
    row_blocks: int
    queries: int
    tokens: int
    visible: int
    workers: int
    slots: int
    window: int
    most_chunks: int
    least_chunk: int
    sweep: int
    finest_rows: int
    remote_tile: float
    remote_piece: float
    token_major: bool
    offsets: tuple[int, int]
    splits: tuple[int, int]
    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    def strides(self) -> tuple[int, int, int]:
        """Bytes from one sequence, head and token to the next."""
        if self.token_major:
            return self.heads * ROW_BYTES, ROW_BYTES, self.batch * self.heads * ROW_BYTES
        return self.heads * self.tokens * ROW_BYTES, self.tokens * ROW_BYTES, ROW_BYTES

    def local_bytes(self, side: int, sequence: int, head: int, token: int) -> int:
        """Local bytes of one token of one head."""
        batch, heads, tokens = self.strides()
        start = self.offsets[side] + sequence * batch + head * heads + token * tokens
        return min(max(self.splits[side] - start, 0), ROW_BYTES)

    def seen(self, sequence: int) -> range:
        length = max(0, min(self.lengths[sequence], self.tokens))
        first = max(self.starts[sequence], 0)
        if self.visible:
            first = max(first, length - self.queries + 1 - self.visible)
        return range(min(first, length), length)


@dataclass(frozen=True)
class Division:
    tiles: list[Found]
    remote_workers: int
    quota: int
    local_tiles: int
    remote_tiles: int
    local_parts: int
    remote_parts: int


def division_library(folder: Path) -> ctypes.CDLL:
    """The headers as a library for this machine."""
    sizes = (f"-DTILE={TILE}", f"-DROW_BYTES={ROW_BYTES}")
    return compile_for_host(SOURCE.read_text(), folder, *sizes)


def divide(library: ctypes.CDLL, case: Case) -> Division:
    batch_bytes, head_bytes, token_bytes = case.strides()
    sizes = Sizes(
        case.batch, case.heads, case.row_blocks, case.queries, case.tokens, case.visible,
        case.workers, case.slots, case.window, case.most_chunks, case.least_chunk,
        case.sweep, case.finest_rows,
        case.remote_tile, case.remote_piece,
        (ctypes.c_uint * 2)(*divisor(case.row_blocks)),
        (ctypes.c_uint * 2)(*divisor(token_bytes // 16)),
        (ctypes.c_uint64 * 2)(*case.splits), (ctypes.c_uint64 * 2)(*case.offsets),
        batch_bytes, head_bytes, token_bytes,
    )  # fmt: skip
    found = (Found * MOST_PIECES)()
    totals = (ctypes.c_uint * 6)()
    lengths = (ctypes.c_int * case.batch)(*case.lengths)
    starts = (ctypes.c_int * case.batch)(*case.starts)
    count = library.divide_work(ctypes.byref(sizes), lengths, starts, found, MOST_PIECES, totals)
    assert count <= MOST_PIECES, {
        1: "too many tiles",
        2: "a slot that the last to arrive would not read",
        3: "a worker that never claims",
    }.get(count - MOST_PIECES, "a task that is not its piece")
    return Division(list(found[:count]), *totals)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    tokens = draw(st.integers(1, 700))
    whole = batch * heads * tokens * ROW_BYTES
    row = batch * heads * ROW_BYTES
    offsets = tuple(16 * draw(st.integers(0, 40)) for _ in range(2))

    def split(offset: int) -> int:
        kind = draw(st.sampled_from(("all", "none", "row", "any", "unlimited")))
        if kind == "row":
            return offset + draw(st.integers(0, tokens)) * row
        if kind == "any":
            return offset + 16 * draw(st.integers(0, whole // 16))
        return {"all": offset + whole, "none": 0, "unlimited": 2**64 - 1}[kind]

    lengths = draw(st.lists(st.integers(-1, tokens + 3), min_size=batch, max_size=batch))
    starts = draw(
        st.lists(st.one_of(st.just(0), st.integers(-2, tokens + 2)), min_size=batch, max_size=batch)
    )
    return Case(
        batch=batch, heads=heads, row_blocks=draw(st.sampled_from((1, 1, 2))),
        queries=draw(st.integers(1, 16)), tokens=tokens,
        visible=draw(st.one_of(st.just(0), st.integers(1, tokens + 5), st.just(2**31 - 1))),
        workers=draw(st.one_of(st.integers(2, 12), st.integers(2, 80))),
        slots=draw(st.integers(2, 8)), window=draw(st.integers(1, 600_000)),
        most_chunks=draw(st.integers(0, 4)), least_chunk=draw(st.integers(2, 5)),
        sweep=draw(st.sampled_from((NO_SWEEP, TILE, TILE, 2 * TILE, 3 * TILE))),
        finest_rows=draw(st.sampled_from((1, 2, 8))),
        remote_tile=draw(st.sampled_from((0.0, 10.0, 90.0))),
        remote_piece=draw(st.sampled_from((0.0, 20.0, 800.0))),
        token_major=draw(st.booleans()), offsets=(offsets[0], offsets[1]),
        splits=(split(offsets[0]), split(offsets[1])),
        lengths=tuple(lengths), starts=tuple(starts),
    )  # fmt: skip

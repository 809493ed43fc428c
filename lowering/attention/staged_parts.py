"""What staged attention is made of: a problem, its tokens in parts, and the calls over each part.

Row i of the query is token `tokens - queries + i` of its sequence. Stock forwards align a causal
triangle at its last row and last token (flash), or take it only where it is square (cuDNN, which
aligns at the first ones), so pieces are cut where the alignment would differ. They also round what
they give: rows that must not be merged from it are left to the Triton forward, which gives fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

Forward = Literal["cudnn", "flash", "triton"]
ROWS = 128
"""Query rows of one thread block of the stock forwards."""


@dataclass(frozen=True, slots=True)
class PrefillProblem:
    """Query [batch, query_heads, queries, head_dim] over tokens [first, tokens) of a cache."""

    batch: int
    query_heads: int
    key_heads: int
    queries: int
    tokens: int
    head_dim: int
    value_dim: int
    dtype: str
    causal: bool
    first: int = 0

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token of all sequences."""
        size = 4 if self.dtype == "float32" else 2
        return self.batch * self.key_heads * (self.head_dim + self.value_dim) * size

    @property
    def past(self) -> int:
        """Tokens before the first query's own: all rows see them."""
        return self.tokens - self.queries


@dataclass(frozen=True, slots=True)
class Piece:
    """One call of a forward: query rows [first_row, last_row) over tokens [start, stop).

    Causal: the last row sees the last token, and each row before it one token less. The Triton
    forward masks by positions, whatever this says.
    """

    first_row: int
    last_row: int
    start: int
    stop: int
    causal: bool
    forward: Forward

    @property
    def rows(self) -> int:
        return self.last_row - self.first_row

    @property
    def pairs(self) -> float:
        """Query rows times the tokens that each sees."""
        hidden = self.rows * (self.rows - 1) / 2 if self.causal else 0.0
        return self.rows * (self.stop - self.start) - hidden


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [start, stop): through a slot of the ring, or in place."""

    start: int
    stop: int
    staged: bool
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def merged_rows(problem: PrefillProblem, first_stop: int, forward: Forward, *, below: int) -> range:
    """Rows that see fewer than `below` tokens, in more than one stock call where the first part
    ends at `first_stop`; in whole thread blocks, so it may be some rows more."""
    queries, past, first = problem.queries, problem.past, problem.first
    if not problem.causal:
        few = first_stop < problem.tokens and problem.tokens - first < below
        return range(queries if few else 0)
    # Of the first part's rows each has one call, unless cuDNN cuts a triangle from older tokens.
    alone = first_stop - past if forward == "flash" or first >= past else 0
    start = alone if alone >= min(ROWS, queries) else 0
    stop = math.ceil((below - 1 - past + first) / ROWS) * ROWS
    if stop > queries - ROWS:
        stop = queries
    return range(start, stop) if start < stop else range(0)


def pieces_of(
    problem: PrefillProblem,
    start: int,
    stop: int,
    forward: Forward,
    unrounded: range = range(0),
) -> tuple[Piece, ...]:
    """The calls that let all query rows see tokens [start, stop), as far as they may: rows
    `unrounded` by the Triton forward, the others by `forward`."""
    bands: tuple[tuple[range, Forward], ...] = (
        (range(unrounded.start), forward),
        (unrounded, "triton"),
        (range(unrounded.stop, problem.queries), forward),
    )
    calls = (_calls(problem, rows, start, stop, by) for rows, by in bands if rows)
    return tuple(chain.from_iterable(calls))


def _calls(
    problem: PrefillProblem, rows: range, start: int, stop: int, forward: Forward
) -> Iterator[Piece]:
    """The same of some rows."""
    past, end = problem.past + rows.start, problem.past + rows.stop
    if problem.causal:
        stop = min(stop, end)
    if start >= stop:
        return
    if forward == "triton":
        # However short a sequence is, its rows see no token later than they would here.
        first_row = max(rows.start, start - problem.past) if problem.causal else rows.start
        yield Piece(min(first_row, rows.stop - 1), rows.stop, start, stop, False, forward)
        return
    if not problem.causal or stop <= past + 1:
        yield Piece(rows.start, rows.stop, start, stop, False, forward)
        return
    square = max(start, past)  # the first token that hides from the rows before its own
    if start < square and forward == "cudnn":
        yield Piece(rows.start, rows.stop, start, square, False, forward)
        start = square
    after = rows.start + stop - past  # the first row that sees all of them and more
    yield Piece(rows.start + square - past, after, start, stop, True, forward)
    if after < rows.stop:
        yield Piece(after, rows.stop, start, stop, False, forward)

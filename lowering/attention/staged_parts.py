"""What staged attention is made of: a problem, its tokens in parts, and the calls over each part.

Row i of the query is token `tokens - queries + i` of its sequence. Stock forwards align a causal
triangle at its last row and last token (flash), or take it only where it is square (cuDNN, which
aligns at the first ones), so pieces are cut where the alignment would differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Forward = Literal["cudnn", "flash", "triton"]


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
    """One forward call: query rows [first_row, last_row) over tokens [start, stop).

    Causal: the last row sees the last token, and each row before it one token less.
    """

    first_row: int
    last_row: int
    start: int
    stop: int
    causal: bool

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


def pieces_of(
    problem: PrefillProblem, start: int, stop: int, forward: Forward
) -> tuple[Piece, ...]:
    """The calls that let all query rows see tokens [start, stop), as far as they may.

    The Triton forward masks by positions, so it takes any tokens in one call.
    """
    queries, past = problem.queries, problem.past
    if forward == "triton":
        # However short a sequence is, its rows see no token later than they would here.
        first_row = max(0, start - past) if problem.causal else 0
        return (Piece(min(first_row, queries - 1), queries, start, stop, False),)
    if not problem.causal or stop <= past + 1:
        return (Piece(0, queries, start, stop, False),)
    found = []
    square = max(start, past)  # the first token that hides from the rows before its own
    if start < square and forward == "cudnn":
        found.append(Piece(0, queries, start, square, False))
        start = square
    found.append(Piece(square - past, stop - past, start, stop, True))
    if stop < problem.tokens:
        found.append(Piece(stop - past, queries, start, stop, False))
    return tuple(found)

"""How quantities are written for people."""

from __future__ import annotations

from dak_inductor.quantity_text import bytes_text, count_text, seconds_text


def test_units_fit_the_quantity() -> None:
    assert [seconds_text(s) for s in (0.0, 2.5e-9, 3.4e-5, 0.00124, 2.0, 5000.0)] == [
        "0 s", "2.5 ns", "34 us", "1.24 ms", "2 s", "5000 s",
    ]  # fmt: skip
    assert [bytes_text(b) for b in (0, 999, 1500, 16.06e9)] == ["0 B", "999 B", "1.5 kB", "16.1 GB"]


def test_one_of_a_thing_is_no_plural() -> None:
    assert [count_text(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    assert [count_text(n, "miss", "misses") for n in (1, 2)] == ["1 miss", "2 misses"]

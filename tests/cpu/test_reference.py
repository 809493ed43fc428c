"""docs/reference.md is what the code has."""

from __future__ import annotations

from pathlib import Path

import dak_inductor as dak
from dak_inductor.options import VARIABLES
from dak_inductor.reference import CALLS, reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


def test_the_page_is_current() -> None:
    advice = "python -m dak_inductor.reference > docs/reference.md"
    assert PAGE.read_text(encoding="utf-8") == reference(), advice


def test_every_call_argument_and_variable_has_a_meaning() -> None:
    calls = {name for name in dak.__all__ if name.islower()} - {"errors"}
    assert {call.__name__ for call in CALLS} == calls
    page = reference()
    assert all(f"`DAK_{name.upper()}`" in page for name in VARIABLES)
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    empty = [row[0] for row in cells if not row[-1].removesuffix("|").strip()]
    assert empty == []


def test_completion_offers_public_names_alone() -> None:
    assert set(dir(dak)) == {*dak.__all__, "__version__"}
    assert all(hasattr(dak, name) for name in dir(dak))

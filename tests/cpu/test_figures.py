"""A figure of the documentation that names a result file is in that file, to the digits printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dak_inductor.benchmarks.measurements import GENERATED
from dak_inductor.report.chart import standalone
from dak_inductor.report.records import load_all
from dak_inductor.report.roofline import pictures
from dak_inductor.report.style import FIGURE_STYLE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURE = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?) ?(x|times|GB/s|TB/s|ms|us|s|%)(?![\w/])")
BARE = re.compile(r"\d\.\d+e\d+")
SCALES = {"ms": 1e3, "us": 1e6, "GB/s": 1e-9, "TB/s": 1e-12, "%": 100.0}


def record(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return loaded


def leaves(value: object) -> Iterator[float]:
    """All numbers of a record, and those in the names of its bars."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from map(float, re.findall(r"\d+(?:\.\d+)?", key))
            yield from leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def summary(name: str) -> list[float]:
    """What a record concludes: its verdicts; of a record without them, all but its rows."""
    loaded = record(name)
    if "verdicts" in loaded:
        return [v[key] for v in loaded["verdicts"] for key in ("measured", "bar") if v[key]]
    return [*leaves(loaded)]


def holds(values: list[float], text: str, unit: str) -> bool:
    """Whether a value, in the unit of the text or in that without a prefix, prints as the text."""
    if "e" in text:
        digits = len(text.split("e")[0].split(".")[1])
        return any(f"{value:.{digits}e}".replace("e+0", "e") == text for value in values)
    digits = len(text.partition(".")[2])
    scales = {1.0, SCALES.get(unit, 1.0)}
    return any(f"{value * scale:.{digits}f}" == text for value in values for scale in scales)


def figures(text: str) -> list[tuple[str, str]]:
    return [*FIGURE.findall(text), *((bare, "") for bare in BARE.findall(text))]


def measured_rows() -> list[tuple[str, str, str]]:
    """(measured, wanted, record) of the table under "Measured"."""
    section = README.split("## Measured")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if ".json` |" in line]
    return [(row[1], row[2], row[3].strip("` ")) for row in rows]


def test_the_measured_table_is_read() -> None:
    assert len(measured_rows()) >= 9


@pytest.mark.parametrize(("measured", "wanted", "name"), measured_rows())
def test_measured_figures_are_in_their_record(measured: str, wanted: str, name: str) -> None:
    found = figures(f"{measured} {wanted}")
    assert len(found) >= 2, f"no figure in {measured!r} or {wanted!r}"
    values = summary(name)
    for text, unit in found:
        assert holds(values, text, unit), f"{text} {unit} is not in {name}"


def linear_ranges(name: str) -> dict[float, str]:
    """T / L of linears with 1 or 16 tokens and at least 117 MB, by fraction, as the README does."""
    found: dict[float, list[float]] = {}
    for cell in record(name)["cells"]:
        if cell["M"] in (1, 16) and cell["weight_bytes"] >= 117e6:
            found.setdefault(cell["fraction"], []).append(cell["T/L"])
    ranges = {f: (f"{min(v):.2f}", f"{max(v):.2f}") for f, v in found.items()}
    return {f: low if low == high else f"{low} to {high}" for f, (low, high) in ranges.items()}


@pytest.mark.parametrize(
    ("row", "name"), [("host memory", "linear.json"), ("another GPU", "linear_peer.json")]
)
def test_table_of_linears_is_that_of_the_record(row: str, name: str) -> None:
    table = README.split("time over the bound L (`linear.json`")[1]
    head = re.search(r"^\| remote \|(.*)\|$", table, re.MULTILINE)
    line = re.search(rf"^\| {row} \|(.*)\|$", table, re.MULTILINE)
    assert head and line
    shares = [float(text.strip(" %")) / 100 for text in head[1].split("|")]
    ranges = linear_ranges(name)
    for share, shown in zip(shares, line[1].split("|"), strict=True):
        if shown.strip() != "-":
            assert shown.strip() == ranges[share], f"{share:.0%} in {name}"


def test_stock_kernels_beside_linears_are_those_of_the_record() -> None:
    decode = [
        c for c in record("linear.json")["cells"] if c["M"] <= 128 and c["peers_microseconds"]
    ]
    ratios = [c["microseconds"] / c["peers_microseconds"]["stock on split"] for c in decode]
    slower = sum(ratio > 1.02 for ratio in ratios)
    words = " ".join(README.split())
    assert f"in {slower} of the {len(ratios)} decode cells" in words
    assert f"worst: {max(ratios):.2f} times" in words


def test_attention_figures_are_those_of_the_record() -> None:
    cells = record("attention.json")["cells"]
    at = {c["fraction"]: f"{c['T/L']:.2f}" for c in cells if c["shape"].startswith("8x32768")}
    low, high = sorted((at[0.1], at[1.0]))
    words = " ".join(README.split())
    assert f"{low} to {high} of the bound for 8 sequences of 32,768 tokens" in words
    assert f"10% and 100% remote, {at[0.01]} at 1%" in words
    large = {(c["shape"], c["fraction"]): c["T/L"] for c in record("attention_large.json")["cells"]}
    assert f"take {large['128x8192x8x4x128', 0.5]:.2f} of it" in words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_decimal_figures_beside_a_result_file_are_in_it(page: Path) -> None:
    """Paragraphs and table rows outside of the README's section and of what is generated from the
    records, which have tests of their own."""
    text = GENERATED.sub("", page.read_text())
    if page.name == "README.md":
        head, rest = text.split("## Measured")
        text = head + rest.partition("\n## ")[2]
    for part in re.split(r"\n\n|\n(?=\|)", text):
        names = [n for n in re.findall(r"([\w]+\.json)`", part) if (RESULTS / n).exists()]
        values = [value for name in names for value in leaves(record(name))]
        for figure, unit in figures(part) if names else ():
            assert holds(values, figure, unit), f"{figure} {unit} is not in {names}: {part[:80]!r}"


def test_a_wrong_figure_is_seen() -> None:
    values = [0.0325, 3.8001e9, 4311285760.0, 1.0024]
    for text, unit in (("32", "ms"), ("3.8", "GB/s"), ("4.31e9", ""), ("1.002", "x")):
        assert holds(values, text, unit)
    for text, unit in (("31", "ms"), ("3.9", "GB/s"), ("4.30e9", ""), ("1.003", "x")):
        assert not holds(values, text, unit)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=str)
def test_pictures_are_those_of_the_records(path: Path) -> None:
    made = {
        picture.name: standalone(picture, FIGURE_STYLE)
        for picture in pictures(load_all([RESULTS / f"{path.stem.split('-')[0]}.json"])[0])
    }
    assert path.read_text() == made[path.stem]
    assert f"docs/figures/{path.name}" in README

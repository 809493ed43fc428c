"""A figure of the documentation that names a result file is in that file, to the digits printed."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dak_inductor.benchmarks.harness.attention_grid import parse_shapes
from dak_inductor.benchmarks.measurements import GENERATED
from dak_inductor.report.chart import standalone
from dak_inductor.report.records import load_all
from dak_inductor.report.roofline import pictures
from dak_inductor.report.style import FIGURE_STYLE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "results.md").read_text()
MEASUREMENTS = " ".join((ROOT / "docs" / "measurements.md").read_text().split())
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
    sizes = map(abs, values)  # "too low by 10%" is -10 in a record
    return any(f"{size * scale:.{digits}f}" == text for size in sizes for scale in scales)


def figures(text: str) -> list[tuple[str, str]]:
    return [*FIGURE.findall(text), *((bare, "") for bare in BARE.findall(text))]


def measured_rows() -> list[tuple[str, str, str]]:
    """(measured, wanted, record) of the table under "Bars"."""
    section = PAGE.split("## Bars")[1].split("\n## ")[0]
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
    """T / L of linears with 1 or 16 tokens and at least 117 MB, by fraction, as the page does."""
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
    table = PAGE.split("time over the bound L (`linear.json`")[1]
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
    words = " ".join(PAGE.split())
    assert f"in {slower} of the {len(ratios)} decode cells" in words
    assert f"worst: {max(ratios):.2f} times" in words
    both = zip(decode, ratios, strict=True)
    stock = sum(ratio > 1.02 and c["served_by"] == "stock" for c, ratio in both)
    assert f"in {stock} of which they serve the call here too" in words


def test_prefill_of_linears_is_that_of_the_record() -> None:
    cells = record("linear_prefill.json")["cells"]
    ratio = {
        id(c): c["microseconds"] / max(c["L_microseconds"], c["C_microseconds"]) for c in cells
    }
    large = [ratio[id(c)] for c in cells if c["weight_bytes"] >= 200e6]
    few = [c for c in cells if 0 < c["fraction"] <= 0.1 and c["weight_bytes"] < 200e6]
    smaller = max(ratio[id(c)] for c in few if c["weight_bytes"] >= 16e6)
    least = max(ratio[id(c)] for c in few if c["shape"] == "1000x4104")
    words = " ".join(PAGE.split())
    assert f"the median cell takes {statistics.median(large):.2f} of the larger" in words
    assert f"and {sum(x > 1.1 for x in large)} of {len(large)} more than 1.10" in words
    assert f"up to {smaller:.2f} times as long, 1000x4104 up to {least:.2f}" in words


def mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def test_means_by_share_are_those_of_the_record() -> None:
    cells = [
        c for c in record("linear.json")["cells"] if c["M"] <= 32 and c["weight_bytes"] >= 200e6
    ]
    at = {
        share: f"{mean(c['T/L'] for c in cells if c['fraction'] == share):.2f}"
        for share in {c["fraction"] for c in cells}
    }
    rest = [at[share] for share in sorted(at) if share >= 0.05]
    few = f"{at[0.005]} and {at[0.01]} at 0.5 and 1%, {at[0.02]} at 2%"
    assert f"{few}, and {min(rest)} to {max(rest)} from 5% on" in MEASUREMENTS
    words = f"{min(rest)} to {max(rest)} of L from 5% remote on, {at[0.005]} to {at[0.01]} at 0.5"
    assert words in " ".join(PAGE.split())


def test_means_of_attention_are_those_of_the_record() -> None:
    cells = [
        (c, parse_shapes(c["shape"])[0].head_dim)
        for c in record("attention.json")["cells"]
        if c["cache_bytes"] >= 256e6 and not parse_shapes(c["shape"])[0].is_prefill
    ]
    at = {
        share: f"{mean(c['T/L'] for c, _ in cells if c['fraction'] == share):.2f}"
        for share in (0.01, 0.1, 0.5, 1.0)
    }
    most = [at[share] for share in (0.1, 0.5, 1.0)]
    whole = mean(c["T/L"] for c, size in cells if c["fraction"] >= 0.1 and size not in (80, 96))
    words = (
        f"{at[0.01]} at 1%, {min(most)} to {max(most)} from 10% on, {whole:.2f} without the heads"
    )
    assert words in MEASUREMENTS


def test_repeats_are_those_of_the_records() -> None:
    spreads = {
        name: [
            100 * (max(c["repeats_microseconds"]) / min(c["repeats_microseconds"]) - 1)
            for c in record(f"{name}.json")["cells"]
            if c["fraction"] >= 0.25 and c["weight_bytes"] >= 16e6
        ]
        for name in ("linear", "linear_peer")
    }
    host, peer = spreads["linear"], spreads["linear_peer"]
    words = f"by a median of {statistics.median(host):.1f}% in `linear`, by up to {max(host):.1f}%"
    assert f"{words}, and by at most {max(peer):.1f}% in `linear_peer`" in MEASUREMENTS


def test_times_of_prefill_attention_are_those_of_the_record() -> None:
    at = {
        (c["shape"], c["fraction"]): f"{c['microseconds']:.0f}"
        for c in record("attention.json")["cells"]
    }
    for shape, remote, before in (
        ("1x8192x8x4x128x8192", 1.0, "from 1162"), ("4x8192x8x8x128x8192", 1.0, "from 9945"),
        ("4x2048x8x8x128x2048", 0.5, "from 681"), ("4x2048x8x8x128x2048", 1.0, "from 909"),
    ):  # fmt: skip
        assert f"{before} to {at[shape, remote]}" in MEASUREMENTS
    counts = [
        sum(c["status"] == "not repeatable" for c in record(name)["cells"])
        for name in ("attention.json", "attention_peer.json")
    ]
    assert counts == [2, 0] and "are two cells of `attention.json`, both" in MEASUREMENTS


def test_the_error_of_predictions_is_that_of_the_record() -> None:
    (median,) = [v for v in record("cost_model.json")["verdicts"] if v["name"] == "median error"]
    words = f"the median error of all cells is {100 * median['measured']:.1f}%"
    assert words in " ".join(PAGE.split()) and words in " ".join(README.split())


def test_attention_figures_are_those_of_the_record() -> None:
    cells = record("attention.json")["cells"]
    at = {c["fraction"]: f"{c['T/L']:.2f}" for c in cells if c["shape"].startswith("8x32768")}
    low, high = sorted((at[0.1], at[1.0]))
    words = " ".join(PAGE.split())
    assert f"{low} to {high} of the bound for 8 sequences of 32,768 tokens" in words
    assert f"10% and 100% remote, {at[0.01]} at 1%" in words
    half = {c["shape"]: c for c in cells if c["fraction"] == 0.5}
    for shape, wanted in (
        ("128x8192x8x4x128", "128 sequences of 8192 tokens, {} GB in host memory, take {} of it"),
        ("64x131072x8x4x128", "64 of 131,072 tokens, {} GB there, {}"),
    ):
        cell = half[shape]
        assert wanted.format(f"{cell['remote_bytes'] / 1e9:.1f}", f"{cell['T/L']:.2f}") in words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_decimal_figures_beside_a_result_file_are_in_it(page: Path) -> None:
    """Paragraphs and table rows, but those of docs/results.md and of what is generated from the
    records that have tests of their own."""
    text = GENERATED.sub("", page.read_text())
    if page.name == "results.md":
        for section in ("## Bars", "## Single linears and attention"):
            head, rest = text.split(section)
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
    assert f"figures/{path.name}" in PAGE

"""`dak report`: one page from records, plans and explanations, that loads nothing and trusts no
text."""

from __future__ import annotations

import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

import dak_inductor as dak
from dak_inductor import hardware
from dak_inductor.benchmarks.harness.attention_grid import parse_shapes
from dak_inductor.cli import ERROR_EXIT_CODE, app
from dak_inductor.plan import OpUse, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.report.chart import COLOURS, Axis, Picture, Series, chart
from dak_inductor.report.document import document
from dak_inductor.report.heat_map import colour
from dak_inductor.report.html import number, tag
from dak_inductor.report.peer_ratios import peer_ratios
from dak_inductor.report.records import load, load_all
from dak_inductor.report.roofline import limit, pictures

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
EVIL = "<script>alert('x')</script>\" onload=\"x"
runner = CliRunner()


class _Balance(HTMLParser):
    """Raises where elements do not nest. A cell ends with its row, its table or the next cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        if tag in ("td", "tr"):
            self._end("td", *(("tr",) if tag == "tr" else ()))
            assert self.open[-1] in (("tr",) if tag == "td" else ("thead", "tbody"))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("thead", "tbody"):
            self._end("td", "tr")
        assert self.open.pop() == tag

    def _end(self, *tags: str) -> None:
        for name in tags:
            if self.open[-1] == name:
                self.open.pop()


def report(*paths: Path) -> str:
    return document(load_all(paths))


def write(folder: Path, name: str, data: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def whole() -> str:
    return report(RESULTS)


def test_all_records_give_one_small_page_that_loads_nothing(whole: str) -> None:
    seen = _Balance(whole).seen
    assert len(whole) < 2_000_000
    assert "script" not in seen and "link" not in seen and "img" not in seen
    assert not re.search(r"(src|href)=\"(?!#)", whole) and "url(" not in whole
    assert seen["svg"] >= 4 and seen["h2"] > len(list(RESULTS.glob("*.json")))


def test_every_verdict_is_in_the_page(whole: str) -> None:
    for path in RESULTS.glob("*.json"):
        for verdict in json.loads(path.read_text()).get("verdicts", ()):
            assert str(tag("i", verdict["name"]))[3:-4] in whole, path.name
    assert whole.count(">MISS<") > 10


def test_grid_has_each_cell_and_frames_what_missed() -> None:
    page = report(RESULTS / "linear.json")
    cells = json.loads((RESULTS / "linear.json").read_text())["cells"]
    assert len(re.findall(r'<td class="h\d', page)) == len(cells)
    assert len(re.findall(r'<td class="h\d miss', page)) == sum(bool(c["over"]) for c in cells)
    assert f"{sum(len(c['over']) for c in cells)} misses" in page


def test_light_and_dark_and_phone_are_in_the_style(whole: str) -> None:
    assert "prefers-color-scheme:dark" in whole and 'name="viewport"' in whole
    assert "@media (max-width" in whole


def test_texts_of_records_are_escaped(tmp_path: Path) -> None:
    def evil(value: Any) -> Any:
        if isinstance(value, dict):
            return {k if k in kept else f"{k}{EVIL}": evil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [evil(item) for item in value]
        return EVIL if isinstance(value, str) else value

    data = json.loads((RESULTS / "decode_step.json").read_text())
    kept = {*data, *data["ceilings"], *data["cells"][0], *data["verdicts"][0]}
    page = report(write(tmp_path, "evil.json", evil(data)))
    _Balance(page)
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_failed_row_shows_its_reason(tmp_path: Path) -> None:
    row = {"figure": "measured", "provider": "dak", "status": "failed", "reason": "no <kernel>"}
    page = report(write(tmp_path, "models.json", {"benchmark": "models", "cells": [row]}))
    assert "no &lt;kernel&gt;" in page and ">failed<" in page


def bench_row(provider: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    return {"figure": "measured", "model": "m", "layers": 2, "model_layers": 4, "batch": 1,
            "prompt": 8, "new": 4, "share": 0.5, "remote": "cpu", "provider": provider,
            "kind": "real peer", "status": "ok", "tpot_ms": milliseconds, "tpot T/L": 1.5,
            "realised": 0.5, **more}  # fmt: skip


def test_rows_of_a_bench_stand_beside_their_peers(tmp_path: Path) -> None:
    rows = [bench_row("dak", 2.5, remote_bytes=10**9), bench_row("split", 3.5),
            bench_row("prefetch", 1.5, kind="oracle"),
            bench_row("dak plan", 2.25, figure="prediction")]  # fmt: skip
    data = {"benchmark": "models", "cells": rows,
            "ceilings": {"hbm_stream": 4e12, "link_direct": 5e10}}  # fmt: skip
    page = report(write(tmp_path, "models.json", data))
    assert '<td class="ok">2.500<' in page and page.count('class="ok">2.500') == 1
    assert "2 of 4 layers" in page and "50% remote (cpu)" in page and "1.0 GB" in page
    assert page.count("<h3>") == 2 and "aggregate bandwidth" in page


def test_the_fastest_real_peer_of_each_setting_counts() -> None:
    rows = [
        bench_row("dak", 2.0), bench_row("split", 4.0), bench_row("slow", 9.0),
        bench_row("prefetch", 1.0, kind="oracle"), bench_row("wrong", 1.0, status="inaccurate"),
        bench_row("resident", 1.0, share=0.0),
        bench_row("dak", 3.0, share=1.0), bench_row("split", 2.0, share=1.0),
        bench_row("dak", 3.0, batch=16), bench_row("split", 2.0, model="other"),
        bench_row("dak", 5.0, remote="cuda:1"), bench_row("split", 4.0, remote="cuda:1"),
    ]  # fmt: skip
    found = peer_ratios(rows, "tpot_ms")
    assert {line: {x: r.ratio for x, r in at.items()} for line, at in found.items()} == {
        "m, batch 1": {0.5: 0.5, 1.0: 1.5}, "m, batch 1, remote tier cuda:1": {0.5: 1.25},
    }  # fmt: skip
    assert found["m, batch 1"][0.5].peer == "split" and not peer_ratios(rows, "ttft_ms")


def test_models_have_a_map_and_pictures_of_their_own(tmp_path: Path) -> None:
    rows = [
        bench_row(provider, times, batch=batch)
        for batch in (1, 16)
        for provider, times in (("dak", 3.0), ("split", 2.0))
    ]
    data = {"benchmark": "models", "cells": rows,
            "ceilings": {"hbm_stream": 4e12, "link_direct": 5e10}}  # fmt: skip
    path = write(tmp_path, "models.json", data)
    page = report(path)
    assert page.count('<td class="n h5 miss"') == 2 and "Decode step: time over" in page
    assert "First token" not in page, "no row has one"
    (record,) = load_all([path])
    names = [picture.name for picture in pictures(record)]
    assert names == [f"models-m-b{b}-{kind}" for b in (1, 16) for kind in ("bandwidth", "over")]


def test_many_verdicts_that_passed_are_folded(tmp_path: Path) -> None:
    verdicts = [
        {"name": f"bar {i}", "measured": 1.0, "bar": 2.0, "unit": "x", "passed": i != 7, "note": ""}
        for i in range(50)
    ]
    page = report(write(tmp_path, "a.json", {"benchmark": "a", "cells": [], "verdicts": verdicts}))
    before, folded = page.split("<details")[:2]
    assert "bar 7<" in before and "bar 8<" not in before
    assert "49 passed" in folded and "bar 8<" in folded and "bar 7<" not in folded


def test_what_planning_was_timed_on_is_shown(tmp_path: Path) -> None:
    data = json.loads((RESULTS / "planner.json").read_text())
    page = report(write(tmp_path, "planner.json", data))
    rows = data["planning"]["rows"]
    assert f"{len(rows)} rows" in page and page.count("<td>random sizes, placed<td>") > 1
    assert "plans against the LP optimum" in page and "after rounding worst" in page


def test_parts_of_one_run_are_not_compared(tmp_path: Path) -> None:
    def part(name: str, model: str) -> Path:
        rows = [bench_row("dak", 2.0, model=model, case=f"{model}: dak")]
        verdicts = [{"name": "rows left out", "measured": 0, "bar": 0, "passed": True}]
        return write(tmp_path, name, {"benchmark": "models", "cells": rows, "verdicts": verdicts})

    first, other, again = part("a.json", "m"), part("b.json", "other"), part("c.json", "m")
    assert "Runs compared" not in report(first, other)
    assert "Runs compared" in report(first, again)


def test_two_runs_are_compared(tmp_path: Path) -> None:
    old = json.loads((RESULTS / "linear.json").read_text())
    new = copy.deepcopy(old)
    new["cells"][3]["T/L"] = old["cells"][3]["T/L"] * 1.5
    new["verdicts"][0]["passed"] = True
    page = report(write(tmp_path, "a.json", old), write(tmp_path, "b.json", new))
    assert "Runs compared" in page and ">1.500<" in page
    count = sum("T/L" in cell for cell in old["cells"])
    assert f"{count} cells in both: 0 faster and 1 slower" in page
    assert "Runs compared" not in report(tmp_path / "a.json")


def test_a_plan_is_shown_with_operators_refusals_and_timeline(tmp_path: Path) -> None:
    uses = (OpUse("u", "decode", "w", "linear", 1e8, 1e4, 1e8, 1.0, module="layers.0.<up>"),)
    problem = PlanProblem((TensorSpec("w", 10**8),), uses, 4 * 10**7, "cpu")
    path = tmp_path / "plan.json"
    path.write_text(make_plan(problem, hardware.load("h200")).to_json())
    page = report(path)
    assert "layers.*.&lt;up&gt;" in page and 'class="lane-remote"' in page
    assert "40.0%" in page


def test_a_trace_is_shown_by_lanes_and_damaged_events_are_left_out(tmp_path: Path) -> None:
    def event(lane: str, start: Any, took: Any, name: str = "up_proj", **more: Any) -> Any:
        return {"name": name, "cat": lane, "ph": "X", "pid": 2, "tid": 1, "ts": start,
                "dur": took, **more}  # fmt: skip

    named = {"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "GPU 0: measured"}}
    good = [event("direct", 0, 250.0), event("copy", 100, 500.0, EVIL), event("compute", 600, 400)]
    bad = [None, 7, {}, event("copy", "soon", 1), event("copy", -1, 1), event("copy", True, 1),
           event("copy", 0, 10**400), event("copy", 0, 1, pid=[])]  # fmt: skip
    trace = {"traceEvents": [named, *good, *bad], "otherData": {"what": "measured <here>"}}
    page = report(write(tmp_path, "step.json", trace), write(tmp_path, "two.json", trace))
    _Balance(page)
    assert page.count("GPU 0: measured") == 2 and "measured &lt;here&gt;" in page
    assert [page.count(f'class="lane-{n}"') for n in ("direct", "copy", "compute")] == [2, 2, 2]
    assert "<script" not in page and "up_proj: 250 us at 0 s" in page
    assert "500 us<td>50.0%" in page and "Runs compared" not in page
    for damaged in ({"traceEvents": []}, {"traceEvents": bad, "otherData": 3}):
        _Balance(report(write(tmp_path, "empty.json", damaged)))


def test_limit_and_colours() -> None:
    assert limit(0.0, 4000.0, 50.0) == 4000 and limit(1.0, 4000.0, 50.0) == 50
    assert limit(50 / 4050, 4000.0, 50.0) == pytest.approx(4050)
    assert (colour(1.0), colour(1.06), colour(9.0)) == ("h0", "h2", "h7")
    assert (number(0.12345), number(None), number(True), number(12)) == ("0.1235", "", "yes", "12")


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not JSON"), ("[1]", "neither"), ('{"a": 1}', "neither")]
)
def test_files_that_are_no_records_are_named_errors(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    result = runner.invoke(app, ["report", str(path), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == ERROR_EXIT_CODE
    assert result.stderr.startswith("dak: OptionError: ") and words in result.stderr
    missing = runner.invoke(app, ["report", str(tmp_path / "none.json")])
    assert missing.exit_code == ERROR_EXIT_CODE and "cannot be read" in missing.stderr


def test_command_writes_the_page(tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    result = runner.invoke(app, ["report", str(RESULTS / "move.json"), "--out", str(out)])
    assert result.exit_code == 0 and "1 record," in result.stdout
    assert out.read_text().startswith("<!doctype html>")


def test_explanation_as_html_names_placement_and_operators() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256))
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    page = dak.explain(model).to_html()
    _Balance(page)
    for word in ("Sequential", "divided weights", "simulated", "What more GPU memory would buy"):
        assert word in page
    assert 'class="share"' in page and "<script" not in page


def test_charts_are_written_as_files_of_their_own(tmp_path: Path) -> None:
    source = json.loads((RESULTS / "decode_step.json").read_text())
    source["cells"][-1]["provider"] = EVIL
    record = write(tmp_path, "decode_step.json", source)
    folder = tmp_path / "new" / "figures"
    arguments = ["report", str(record), "--out", str(tmp_path / "r.html"), "--figures", str(folder)]
    assert runner.invoke(app, arguments).exit_code == 0
    names = {"decode_step-bandwidth.svg", "decode_step-over.svg"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        drawn = ElementTree.fromstring((folder / name).read_text())
        texts = {node.text for node in drawn.iter() if node.tag.endswith("}text")}
        assert {"dak direct", "accelerate cpu_offload", EVIL} <= texts
        kinds = [node.get("class") for node in drawn.iter() if node.tag.endswith("}circle")]
        assert len(kinds) > 30 and not any(node.tag.endswith("}script") for node in drawn.iter())
    record.with_name("taken").write_text("")
    refused = runner.invoke(app, [*arguments[:-1], str(tmp_path / "taken")])
    assert refused.exit_code == ERROR_EXIT_CODE and "no folder" in refused.output


def test_charts_of_bandwidth_leave_out_what_compute_binds() -> None:
    (record,) = load_all([RESULTS / "attention.json"])
    shapes = {str(row["shape"]) for row in record.cells}
    drawn = {one.name for one in pictures(record)[1].series} - {"at the limit"}
    few = {shape for shape in shapes if parse_shapes(shape)[0].queries <= 16}
    assert drawn == few and len(few) < len(shapes)
    assert "8x16384x8x8x128x16" in drawn and "1x8192x8x4x128x8192" in shapes - drawn


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("shape", "1x2x3x4x5xEVIL"), ("shape", "1x2x3x4x5x" + "9" * 5000), ("shape", None),
     ("M", "EVIL")],
)  # fmt: skip
def test_a_cell_of_no_shape_leaves_the_report_whole(
    name: str, wrong: object, tmp_path: Path
) -> None:
    source = json.loads((RESULTS / "attention.json").read_text())
    source["cells"][3][name] = wrong
    assert "attention" in report(write(tmp_path, "attention.json", source))


def test_charts_are_written_as_png_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra `figures`")
    folder = tmp_path / "figures"
    arguments = ["report", str(RESULTS / "decode_step.json"), "--out", str(tmp_path / "r.html")]
    made = runner.invoke(app, [*arguments, "--figures", str(folder), "--png"])
    assert made.exit_code == 0, made.output
    for name in ("decode_step-bandwidth", "decode_step-over"):
        image = (folder / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG") and 10_000 < len(image) < 120_000
        assert (folder / f"{name}.svg").is_file()


def test_png_without_matplotlib_or_a_folder_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["report", str(RESULTS / "decode_step.json"), "--out", str(tmp_path / "r.html")]
    missing = runner.invoke(app, [*arguments, "--figures", str(tmp_path), "--png"])
    assert missing.exit_code == ERROR_EXIT_CODE and "dak-inductor[figures]" in missing.stderr
    nowhere = runner.invoke(app, [*arguments, "--png"])
    assert nowhere.exit_code == ERROR_EXIT_CODE and "--figures FOLDER" in nowhere.stderr


def test_what_is_the_same_in_all_rows_is_named_once(tmp_path: Path) -> None:
    rows = [{"what": f"w{i}", "method": "replays", "status": "ok", "x": i / 3} for i in range(3)]
    page = report(write(tmp_path, "b.json", {"benchmark": "b", "cells": rows}))
    assert "the same in all: method: replays" in page and page.count("replays") == 1
    assert page.count('<td class="ok">ok<') == 3
    alone = report(write(tmp_path, "c.json", {"benchmark": "c", "cells": rows[:1]}))
    assert "the same in all" not in alone and ">replays<" in alone


def test_an_encoder_has_its_fastest_peer_marked_and_no_words_on_tokens(tmp_path: Path) -> None:
    rows = [{**bench_row(name, 0.0), "ttft_ms": time, "ttft_calls_ms": 9.0}
            for name, time in (("dak", 1.25), ("split", 3.5))]  # fmt: skip
    for row in rows:
        del row["tpot_ms"]
    page = report(write(tmp_path, "models.json", {"benchmark": "models", "cells": rows}))
    assert '<td class="ok">1.250<' in page and "TPOT ms" not in page
    assert "in calls" in page and "tokens in" not in page


def test_points_of_the_first_series_are_on_top_and_colours_come_again_hollow() -> None:
    axis = Axis("x", 1, 10)
    series = tuple(Series(f"s{i}", ((2.0, 2.0),)) for i in range(COLOURS + 1))
    drawn = str(chart(Picture("name", "title", axis, axis, series)))
    assert drawn.index("<title>s1:") < drawn.index("<title>s0:")
    assert drawn.count('class="s0"') == 1 and 'class="s0 hollow"' in drawn


def test_steps_bound_by_compute_have_no_picture_of_bandwidth(tmp_path: Path) -> None:
    data = json.loads((RESULTS / "prefill_1.json").read_text())
    assert not pictures(load(RESULTS / "prefill_1.json"))
    data["arguments"]["prefill"] = False
    assert pictures(load(write(tmp_path, "decode.json", data)))


def test_a_miss_by_a_hair_does_not_look_like_its_bar(tmp_path: Path) -> None:
    verdict = {"name": "hair", "measured": 1.04048, "bar": 1.04, "unit": "x", "passed": False}
    data = {"benchmark": "b", "verdicts": [{**verdict, "measured": 1.040048}]}
    page = report(write(tmp_path, "b.json", data))
    assert "<td>1.04005<" in page and "<td>1.040<" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(20.0, "20"), (11.66, "11.66"), (3.7, "3.700"), (1183.4, "1,183"), (1.98e6, "1,980,000"),
     (0.00046, "0.0004600"), (3.2e-6, "3.200e-06"), (12.5e9, "12,500,000,000"),
     (12.34e12 + 0.5, "1.234e+13"), (None, ""), (True, "yes")],
)  # fmt: skip
def test_numbers_have_four_digits_and_one_form(value: object, text: str) -> None:
    assert number(value) == text

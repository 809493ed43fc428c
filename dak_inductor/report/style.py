"""The page's style: light and dark by the reader's preference, usable at the width of a phone."""

from __future__ import annotations

from dak_inductor.report.html import MOST_COLUMNS

_LIGHT = ("#e3f4e1", "#cfecd0", "#e9efb4", "#fbeaa0", "#fcd28b", "#f9b07c", "#ee8a72", "#dd6a6a")
_DARK = ("#12402a", "#1c4d2c", "#414a1a", "#574a12", "#66430f", "#713510", "#7a2a1c", "#86222c")
SERIES = ("#2563c9", "#c2410c", "#15803d", "#9333ea", "#0e7490", "#be123c", "#a16207", "#4b5563",
          "#db2777", "#4d7c0f", "#1e3a8a", "#78350f", "#0d9488", "#a8a29e")  # fmt: skip
_SERIES_DARK = ("#7db0ff", "#ff9d66", "#6ddc91", "#cf9bff", "#62d6ea", "#ff8598", "#e6c25a",
                "#b6bfcc", "#ff9bd0", "#b4e06c", "#c7d2fe", "#d6a77a", "#2dd4bf",
                "#78716c")  # fmt: skip


def _palette(heat: tuple[str, ...], series: tuple[str, ...]) -> str:
    colours = [f"--h{i}:{c}" for i, c in enumerate(heat)]
    return ";".join([*colours, *(f"--s{i}:{c}" for i, c in enumerate(series))])


_CLASSES = "".join(f".h{i}{{background:var(--h{i})}}" for i in range(len(_LIGHT))) + "".join(
    f".s{i}{{--c:var(--s{i})}}" for i in range(len(SERIES))
)
_MARKS = (
    "circle{fill:var(--c);stroke:var(--bg);stroke-width:1}"
    "circle.hollow{fill:var(--bg);stroke:var(--c);stroke-width:2}"
)
_RIGHT = ",".join(f".r{i} td:nth-child({i})" for i in range(1, MOST_COLUMNS + 1))

STYLE = (
    ":root{color-scheme:light dark;--bg:#fff;--fg:#1b2027;--dim:#5a6472;--line:#d9dee5;"
    f"--card:#f5f7f9;--ok:#14713a;--bad:#b3261e;--accent:#2563c9;{_palette(_LIGHT, SERIES)}}}"
    "@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e7eaee;--dim:#a0a9b5;"
    "--line:#333a44;--card:#1d2127;--ok:#6ddc91;--bad:#ff8a80;--accent:#7db0ff;"
    f"{_palette(_DARK, _SERIES_DARK)}}}}}"
    + """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:110rem;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
p,ul,figcaption,pre{max-width:76rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem;border-top:1px solid var(--line);
padding-top:1rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
a{color:var(--accent)}
nav ul,.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.3rem 1rem}
.small,figcaption,.facts{color:var(--dim);font-size:.86rem}
.scroll{overflow-x:auto;margin:.5rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.83rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .5rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
td.note{white-space:pre-line;min-width:12rem}td.note:last-child{min-width:24rem}
.scroll th:first-child,.scroll td:first-child{position:sticky;left:0;background:var(--bg)}
th{color:var(--dim);font-weight:600}.n{text-align:right}
.ok{color:var(--ok);font-weight:600}.bad{color:var(--bad);font-weight:600}.open{color:var(--dim)}
td.miss{outline:2px solid var(--bad);outline-offset:-2px}
.key{display:inline-block;padding:.05rem .45rem;
margin:0 .2rem .2rem 0;font-size:.8rem;color:var(--fg)}
figure{margin:1rem 0}svg text{fill:var(--dim);font:12px system-ui,sans-serif}
.chart{width:100%;min-width:34rem;max-width:46rem;height:auto;display:block}
.mid{text-anchor:middle}.end{text-anchor:end}.grid{stroke:var(--line);stroke-width:1}
.line{fill:none;stroke:var(--fg);stroke-width:2}.dot{display:inline-block;width:.7rem;height:.7rem;
border-radius:50%;margin-right:.35rem;background:var(--c)}.dot.hollow{background:none;
border:2px solid var(--c)}.dot.limit{background:var(--fg);height:.2rem;border-radius:0;
vertical-align:middle}.legend{font-size:.84rem}
.strip{width:100%;min-width:62rem;height:auto;display:block}
.lane-operator{fill:var(--s7)}.lane-local{fill:var(--s0)}.lane-remote{fill:var(--s1)}
.lane-compute{fill:var(--s2)}.lane-copy{fill:var(--s6)}
.lane-graph{fill:var(--s7)}.lane-direct{fill:var(--s1)}.lane-staged{fill:var(--s4)}
.lane-stock{fill:var(--s5)}.lane-trial,.lane-move{fill:var(--s13)}.lane-ring{fill:var(--s4)}
.lane-simulated{fill:var(--s0)}
.share{position:relative;display:block;min-width:5rem}
.share i{position:absolute;left:0;top:0;bottom:0;
background:var(--s1);opacity:.3}
summary{cursor:pointer;color:var(--accent);margin:.4rem 0}
pre{overflow-x:auto;background:var(--card);
padding:.6rem;font-size:.8rem}
@media (max-width:40rem){body{padding:.6rem;font-size:14px}th,td{padding:.2rem .35rem}}
"""
    + f"{_RIGHT}{{text-align:right}}"
    + _CLASSES
    + _MARKS
)

FIGURE_STYLE = (
    f":root{{--bg:#fff;--fg:#1b2027;--dim:#5a6472;--line:#d9dee5;{_palette(_LIGHT, SERIES)}}}"
    "@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e7eaee;--dim:#a0a9b5;"
    f"--line:#333a44;{_palette(_DARK, _SERIES_DARK)}}}}}"
    ".ground{fill:var(--bg)}text{fill:var(--dim);font:12px system-ui,sans-serif}"
    ".heading{fill:var(--fg);font-size:14px}.mid{text-anchor:middle}.end{text-anchor:end}"
    ".grid{stroke:var(--line);stroke-width:1}.line{fill:none;stroke:var(--fg);stroke-width:2}"
    + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(len(SERIES)))
    + _MARKS
)
"""Of a chart in a file of its own."""

"""What a step must reach against its peers, and one of decode its bound, at each fraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dak_inductor.benchmarks.harness.record import Verdict

STOCK = ("split eager", "split inductor")
STRATEGIES = ("dak direct", "dak staged")
OVER_STOCK = 1.03
OVER_STRATEGIES = 1.03
OVER_REAL_PEERS = 1.01
OVER_ORACLES = 1.03
OVER_BOUND = ((0.1, 1.06), (0.02, 1.15))
"""From a fraction on, T / L at most; below the last there is no bar."""

Row = Mapping[str, object]


def verdicts(
    rows: Sequence[Row], fractions: Sequence[float], *, on_gpu: bool, prefill: bool = False
) -> list[Verdict]:
    """`dak` at each fraction over the faster form of stock kernels on split tensors, and over
    whatever else was measured: its own two strategies, real peers, oracles, the bound."""
    made = []
    for fraction in fractions:
        at = {str(r["provider"]): r for r in rows if r["fraction"] == fraction and _ok(r)}
        where = f"{100 * fraction:.3g}%"
        asked = any(r["provider"] in STOCK and r["fraction"] == fraction for r in rows)
        times = {name: _time(at[name]) for name in STOCK if name in at}
        name = f"dak / stock on split, {where} remote"
        if "dak" not in at or (asked and not times):
            missing = "dak" if "dak" not in at else "stock on split"
            made.append(
                Verdict(name, None, OVER_STOCK, "x", False, f"no accurate row of {missing}")
            )
        elif times:
            made.append(_ratio(name, at["dak"], times, OVER_STOCK, on_gpu))
        if "dak" not in at:
            continue
        own = {name: _time(at[name]) for name in STRATEGIES if name in at}
        if len(own) == len(STRATEGIES):
            name = f"dak / its faster strategy, {where} remote"
            made.append(_ratio(name, at["dak"], own, OVER_STRATEGIES, on_gpu))
        for kind, bar in (("real peer", OVER_REAL_PEERS), ("oracle", OVER_ORACLES)):
            others = {
                name: _time(row)
                for name, row in at.items()
                if row.get("kind") == kind and not name.startswith("dak")
            }
            if others:
                name = f"dak / fastest {kind}, {where} remote"
                made.append(_ratio(name, at["dak"], others, bar, on_gpu))
        limit = next((most for least, most in OVER_BOUND if fraction >= least), None)
        over = at["dak"].get("T/L")
        if limit is not None and over is not None and not prefill:
            ratio = float(str(over))
            passed = ratio <= limit if on_gpu else None
            made.append(Verdict(f"dak, T / L, {where} remote", ratio, limit, "x", passed))
    return made


def _ratio(name: str, ours: Row, others: Mapping[str, float], bar: float, on_gpu: bool) -> Verdict:
    """Ours over the fastest of the others, which the note names."""
    time = _time(ours)
    told = sorted(others, key=lambda other: others[other])[:3]
    ratio = time / others[told[0]]
    note = "; ".join(f"{other}: {time / others[other]:.3f}x" for other in told)
    passed = ratio <= bar if on_gpu else None
    return Verdict(name, ratio, bar, "x", passed, note if on_gpu else "no GPU")


def _ok(row: Row) -> bool:
    return row["status"] == "ok"


def _time(row: Row) -> float:
    return float(str(row["milliseconds"]))

"""Cells and verdicts of the window's benchmark, from the times of its launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dak_inductor.benchmarks.harness.record import Verdict
from dak_inductor.benchmarks.harness.window_case import (
    LINK_SECONDS,
    CopySpan,
    Launch,
    Product,
    Setting,
    median_seconds,
)
from dak_inductor.cuda_runtime.window_history import update_entry

CHANGES = ("change", "change beside a copy")
"""Parts of which the cells are changes that kernels recorded."""
COLUMNS = (
    "part", "mode", "start_window", "window", "launch",
    "link_gigabytes_per_second", "hbm_gigabytes_per_second", "seconds",
)  # fmt: skip
TOLERANCE = 0.02
SETTLED_AT = round(1e-3 / LINK_SECONDS)
"""Launches in a millisecond of link time."""
BESIDE_COPY = 0.95
COPY_LOSS = 0.01
RECOVERY_SECONDS = 1e-3
_COMPARED = (
    "link, settled",
    "hbm, settled",
    *(
        f"{part} {when} a copy"
        for part in ("link", "hbm")
        for when in ("before", "during", "after")
    ),
)


def row(
    part: str, setting: Setting, product: Product, seconds: float, **more: object
) -> dict[str, Any]:
    """Rates of both parts of a product that took `seconds`."""
    return {
        "part": part,
        "mode": setting.mode,
        "start_window": setting.start,
        "link_gigabytes_per_second": product.remote_bytes / seconds / 1e9,
        "hbm_gigabytes_per_second": product.local_bytes / seconds / 1e9,
        "seconds": seconds,
        **more,
    }


def window_history(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The changes of the last series under control, as a record has them for charts."""
    changes = [each for each in rows if each["part"] in CHANGES and each["mode"] == "auto"]
    series = [(each["part"], each["start_window"]) for each in changes]
    return [
        update_entry(each["gpu_seconds"], each["window"], each["delay_seconds"])
        for each, own in zip(changes, series, strict=True)
        if own == series[-1]
    ]


def start_verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Every automatic start against the best fixed window, by link and by GPU memory."""
    found = []
    for part, key, what in (
        ("link, settled", "link_gigabytes_per_second", "link"),
        ("hbm, settled", "hbm_gigabytes_per_second", "HBM"),
    ):
        of_part = [each for each in rows if each["part"] == part]
        fixed = [each[key] for each in of_part if each["mode"] == "fixed"]
        for mode in ("auto", "wide"):
            worst = [each[key] for each in of_part if each["mode"] == mode]
            if not fixed or not worst:
                continue
            share = min(worst) / max(fixed)
            found.append(
                Verdict(
                    f"{what}, {mode}: worst start after 1 ms, of the best fixed window",
                    share, 1 - TOLERANCE, "of it", share >= 1 - TOLERANCE,
                )
            )  # fmt: skip
    return found


def copy_rows(
    setting: Setting, product: Product, part: str, launches: Sequence[Launch], copy: CopySpan
) -> list[dict[str, Any]]:
    """Before, during and after a copy; launches across its ends belong to none."""
    during = [each for each in launches if copy.covers(each)]
    before = [each for each in launches if each.begun + each.seconds <= copy.begun]
    after = [each for each in launches if each.begun >= copy.ended + RECOVERY_SECONDS]
    rows = []
    for when, found in (("before", before[SETTLED_AT:]), ("during", during), ("after", after)):
        seconds = median_seconds(found)
        if seconds is None:
            continue
        rows.append(row(f"{part} {when} a copy", setting, product, seconds, launches=len(found)))
    copied = copy.nbytes / (copy.ended - copy.begun)
    for each in rows:
        if each["part"].endswith("during a copy"):
            each["copied_gigabytes_per_second"] = copied / 1e9
    return rows


def copy_verdicts(rows: Sequence[dict[str, Any]], best_link: float) -> list[Verdict]:
    """The bars beside a copy, for the automatic window."""
    rates = {
        each["part"]: each for each in rows if each["mode"] == "auto" and "copy" in each["part"]
    }
    alone = {each["part"]: each for each in rows if each["mode"] == "none"}
    found = []
    during = rates.get("link during a copy")
    if during is not None:
        together = during["link_gigabytes_per_second"] + during["copied_gigabytes_per_second"]
        share = together * 1e9 / best_link
        found.append(
            Verdict("link beside a copy, both together", share, BESIDE_COPY, "of the link",
                    share >= BESIDE_COPY)
        )  # fmt: skip
    loss, copy_loss = _hbm_loss(rates, "hbm"), _hbm_loss(alone, "resident")
    if loss is not None and copy_loss is not None:
        found.append(
            Verdict("HBM's loss beside a copy, less that of the copy alone", loss - copy_loss,
                    COPY_LOSS, "of HBM", loss - copy_loss <= COPY_LOSS)
        )  # fmt: skip
    before, after = rates.get("link before a copy"), rates.get("link after a copy")
    if before is not None and after is not None:
        share = after["link_gigabytes_per_second"] / before["link_gigabytes_per_second"]
        found.append(
            Verdict("link from 1 ms after a copy on, of that before", share, 1 - TOLERANCE,
                    "of it", share >= 1 - TOLERANCE)
        )  # fmt: skip
    return found


def best_fixed_verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Whether the automatic window beats the best fixed one over all parts; informs only."""
    totals: dict[tuple[str, int], dict[str, float]] = {}
    for each in rows:
        if each["mode"] in ("fixed", "auto") and each["part"] in _COMPARED:
            key = (each["mode"], each["start_window"] if each["mode"] == "fixed" else 0)
            totals.setdefault(key, {}).setdefault(each["part"], each["seconds"])
    automatic = totals.pop(("auto", 0), {})
    sums = []
    for parts in totals.values():
        if parts.keys() == automatic.keys():
            sums.append(sum(parts[part] / automatic[part] for part in parts) / len(parts))
    if not sums:
        return []
    return [
        Verdict("the best fixed window's time, mean over all parts", min(sums), 1.0,
                "of the automatic window's", None, "above 1 the automatic window wins")
    ]  # fmt: skip


def _hbm_loss(rates: dict[str, dict[str, Any]], part: str) -> float | None:
    before, during = rates.get(f"{part} before a copy"), rates.get(f"{part} during a copy")
    if before is None or during is None:
        return None
    key = "hbm_gigabytes_per_second"
    return 1 - float(during[key]) / float(before[key])

"""The files that a report is made of: benchmark records, plans and traces, as the JSON has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dak_inductor.errors import OptionError
from dak_inductor.plan import Plan


@dataclass(frozen=True, slots=True)
class LoadedRecord:
    """One record, or one plan or trace (`plan` or `trace` is set then and `data` empty)."""

    path: Path
    data: Mapping[str, Any]
    plan: Plan | None = None
    trace: Mapping[str, Any] | None = None

    @property
    def benchmark(self) -> str:
        return str(self.data.get("benchmark", "plan" if self.trace is None else "timeline"))

    @property
    def is_record(self) -> bool:
        return self.plan is None and self.trace is None

    @property
    def is_prefill(self) -> bool:
        """Whether its steps are of many tokens: bound by compute, as nothing else says."""
        arguments = self.data.get("arguments")
        return isinstance(arguments, dict) and arguments.get("prefill") is True

    @property
    def cells(self) -> list[Mapping[str, Any]]:
        """Those of the record; of the planner's, the problems that planning was timed on."""
        found, planning = self.data.get("cells"), self.data.get("planning")
        if found is None and isinstance(planning, dict):
            found = planning.get("rows")
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []

    @property
    def verdicts(self) -> list[Mapping[str, Any]]:
        """Those of the record; of the planner's, its bars, which are met or not."""
        found = self.data.get("verdicts")
        if isinstance(found, list):
            return [row for row in found if isinstance(row, dict)]
        bars = self.data.get("bars")
        if not isinstance(bars, dict):
            return []
        return [
            {"name": name.replace("_", " "), "measured": float(bool(met)), "bar": 1.0,
             "unit": "met", "passed": bool(met), "note": ""}
            for name, met in bars.items()
        ]  # fmt: skip

    @property
    def ceilings(self) -> Mapping[str, Any]:
        found = self.data.get("ceilings")
        return found if isinstance(found, dict) else {}

    @property
    def environment(self) -> Mapping[str, Any]:
        found = self.data.get("environment")
        return found if isinstance(found, dict) else {}

    @property
    def label(self) -> str:
        """Tells runs of one benchmark apart: commit, date, file."""
        commit = str(self.data.get("parent_commit") or "")[:8] or "no commit"
        return f"{commit}, {str(self.data.get('date') or 'no date')[:16]}, {self.path.name}"


def load_all(paths: Sequence[Path]) -> list[LoadedRecord]:
    """The files in order; of a folder all its *.json. Raises OptionError with what is wrong."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise OptionError(f"{path} holds no JSON file")
        files += inside
    return [load(path) for path in files]


def load(path: Path) -> LoadedRecord:
    """A record with the field `benchmark`, a plan, what `dak plan --json` prints, or a trace."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("benchmark"), str):
        return LoadedRecord(path, data)
    if isinstance(data, dict) and "ops" in data.get("plan", data):
        return LoadedRecord(path, {}, Plan.from_json(json.dumps(data.get("plan", data))))
    if isinstance(data, dict) and isinstance(data.get("traceEvents"), list):
        return LoadedRecord(path, {}, trace=data)
    raise OptionError(f"{path} is neither a benchmark's record nor a plan or a trace")

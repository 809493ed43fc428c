"""One JSON record per run: where it ran, on which sources, the ceilings, cells and verdicts."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

SCHEMA = 1
SOURCE_FOLDERS = ("dak_inductor", "lowering", "cuda_runtime", "benchmarks")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".json"}


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A number beside its bar. `passed` is None where this run cannot decide; `note` says why."""

    name: str
    measured: float | None
    bar: float
    unit: str
    passed: bool | None
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What a benchmark leaves behind: flat `cells`, and the `ceilings` measured in this run.

    `window_history` has what kernels made of a link's window, as dak_inductor/report draws it; a
    record of none is without the entry.
    """

    benchmark: str
    environment: Mapping[str, object]
    command: tuple[str, ...]
    date: str
    parent_commit: str | None
    sources_sha256: str
    arguments: Mapping[str, object]
    ceilings: Mapping[str, object] | None
    cells: tuple[Mapping[str, object], ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    window_history: tuple[Mapping[str, object], ...] = ()
    schema: int = SCHEMA

    def to_json(self) -> str:
        """A line for each cell, so that a long grid stays readable and a diff short."""
        fields = plain(self)
        assert isinstance(fields, dict)
        if not self.window_history:
            del fields["window_history"]
        cells = [json.dumps(cell, allow_nan=False) for cell in fields["cells"]]
        fields["cells"] = []
        text = json.dumps(fields, indent=1, allow_nan=False) + "\n"
        lines = ",\n  ".join(cells)
        if not cells:
            return text
        return text.replace('\n "cells": []', f'\n "cells": [\n  {lines}\n ]', 1)

    def write(self, folder: Path) -> Path:
        """Write `folder/<benchmark>.json`, by rename so that a reader never sees half a record."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)
        return path

    @property
    def passed(self) -> bool:
        """False when any verdict failed; an undecided one does not count."""
        return all(verdict.passed is not False for verdict in self.verdicts)


def make_record(
    benchmark: str,
    *,
    arguments: Mapping[str, object],
    cells: Iterable[Mapping[str, object]],
    verdicts: Iterable[Verdict] = (),
    ceilings: Mapping[str, object] | None = None,
    notes: Iterable[str] = (),
    window_history: Iterable[Mapping[str, object]] = (),
    commit: str | None = None,
) -> Record:
    """A record of this machine and these sources. `commit` where the checkout has no git."""
    root = project_root()
    return Record(
        benchmark=benchmark,
        environment=environment(),
        command=(Path(sys.argv[0]).name, *without_folder(sys.argv[1:])),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        parent_commit=commit or parent_commit(root),
        sources_sha256=sources_sha256(root),
        arguments=dict(arguments),
        ceilings=ceilings,
        cells=tuple(dict(cell) for cell in cells),
        verdicts=tuple(verdicts),
        notes=tuple(notes),
        window_history=tuple(dict(update) for update in window_history),
    )


def without_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments less `--out FOLDER`: where a record was written is no part of it."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--out":
            skip = True
        elif not argument.startswith("--out="):
            kept.append(argument)
    return kept


def project_root() -> Path:
    """The folder that holds the source folders; the folder of the package in an installed wheel."""
    parent = Path(__file__).resolve().parents[2]
    return parent.parent if parent.name == "dak_inductor" else parent


def sources_sha256(root: Path) -> str:
    """SHA-256 over the names and contents of the project's sources, in sorted order."""
    digest = hashlib.sha256()
    for path in source_files(root):
        content = path.read_bytes()
        header = f"{path.relative_to(root).as_posix()}\0{len(content)}\0"
        digest.update(header.encode() + content)
    return digest.hexdigest()


def source_files(root: Path) -> list[Path]:
    """Sources under the project's folders, following none of the package's inner links."""
    found: list[Path] = []
    for folder in SOURCE_FOLDERS:
        for parent, folders, names in os.walk(root / folder):
            folders[:] = sorted(f for f in folders if f not in {"__pycache__", "results"})
            files = (Path(parent) / name for name in names)
            found += [f for f in files if f.suffix in SOURCE_SUFFIXES and not f.is_symlink()]
    found += [f for f in (root / "pyproject.toml", root / "CMakeLists.txt") if f.is_file()]
    return sorted(found)


def parent_commit(root: Path) -> str | None:
    """The commit checked out at `root`, None outside a git checkout."""
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def environment() -> dict[str, object]:
    """GPU, driver and versions; entries are None for what this machine lacks."""
    found: dict[str, object] = {
        "gpu": None,
        "gpu_count": torch.cuda.device_count(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "accelerate": _version("accelerate"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["sm_count"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["gpu_memory_bytes"] = properties.total_memory
    return found


def driver_version() -> str | None:
    """The NVIDIA driver's version as NVML gives it, else as the kernel module reports itself."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version
    except (ImportError, OSError) as error:
        reason = str(error)
    except Exception as error:  # NVML's own error class cannot be named where the module is missing
        reason = str(error)
    module = Path("/proc/driver/nvidia/version")
    if module.is_file():
        return module.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    return f"unknown ({reason})" if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def plain(value: object) -> object:
    """Records, mappings, paths, dtypes and non-finite numbers as JSON can hold them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)

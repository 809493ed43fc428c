"""Whole models through `torch.compile(..., backend="dak")` against their peers: `dak bench`.

On a card each row is measured, with ceilings of the same run. Without one the real graphs are
planned (predictions), and tiny models run on the simulated tier (simulations). The record is
written after each row, so that a run can be resumed.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dak_inductor.benchmarks.harness.model_cards import (
    SIDE_BY_SIDE,
    card_groups,
    run_together,
    shared_out,
)
from dak_inductor.benchmarks.harness.model_case import (
    BY_NAME_ALONE,
    DECODERS,
    ENCODERS,
    MODELS,
    SIMULATION,
    Case,
    measured_cases,
    predicted_cases,
    whole_model_providers,
)
from dak_inductor.benchmarks.harness.model_run import FAILED, Limits, Listener, ModelRun
from dak_inductor.benchmarks.harness.model_verdicts import verdicts
from dak_inductor.benchmarks.harness.record import Record, make_record
from dak_inductor.errors import OptionError
from dak_inductor.report.model_table import LEFT_OUT

NAME = "models"
QUICK_LIMITS = {True: Limits(130.0, 175.0, 120.0), False: Limits(225.0, 290.0, 150.0)}
"""With a card and without one: a quick run ends within 180 and 300 s."""
QUICK_FIRST = 5
"""Providers of a decoder that run before the encoders; all resident, dak and three peers."""
QUICK_ENCODER_PROVIDERS = ("resident inductor", "dak")
QUICK_PLANNED = ("llama-3-8b", "opt-30b", *ENCODERS)
"""Full models that a quick run plans. Tracing a decoder takes 20 s and more on two cores, and the
other two are built as Llama is: their decode steps too are within 0.1% of the bound."""
QUICK_SIMULATED = ("dak", "split eager", "layer prefetch charged eager", "accelerate cpu_offload")
SIMULATED_PROMPT, SIMULATED_NEW, SIMULATED_LAYERS = 32, 8, 4
NOTES = (
    "share: of the bytes of the linears of the layers; embedding and head stay on the card, in "
    "measured and simulated rows. A prediction's share is one of all weights of the full model",
    "a first token and an encoder's step: of each provider the faster of CUDA graph replays and "
    "calls; calls alone stand beside it",
    "L: the bytes asked for at the ceilings of this run, the same for every peer of a setting",
    "weights are random; a simulation has bytes, accuracy and compile time, and no step times",
)

RESUMED = "resumed: each row has the L of its own run; the ceilings are those of the last one"


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What the user asked for; None and () stand for what fits the machine and `quick`."""

    out: Path
    quick: bool = False
    resume: bool = False
    models: tuple[str, ...] = ()
    layers: int | None = None
    batches: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    providers: tuple[str, ...] = ()
    prompt: int = 512
    new: int = 32
    remote: str | None = None
    hardware: str = "h200"
    host_memory: int | None = None
    seconds_per_phase: float | None = None
    limit_seconds: float | None = None
    cards: int | None = None
    commit: str | None = None


def check(request: BenchRequest) -> None:
    """Raises OptionError for what no case can be made of."""
    for what, given, known in (
        ("models", request.models, MODELS),
        ("providers", request.providers, tuple(whole_model_providers())),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise OptionError(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    if any(not 0 < share <= 1 for share in request.shares):
        raise OptionError(f"shares {request.shares}: each is above 0 and at most 1")
    if any(batch < 1 for batch in request.batches):
        raise OptionError(f"batches {request.batches}: each is at least 1")
    seconds = request.seconds_per_phase
    if seconds is not None and not 0 < seconds < float("inf"):
        raise OptionError(f"--seconds-per-phase {seconds}: a time above 0")


def cases_of(request: BenchRequest, *, on_gpu: bool) -> list[Case]:
    """What to run, the most telling first: a quick run may have to leave the last ones out."""
    batches = request.batches or ((1,) if request.quick else (1, 16))
    everyone = request.providers or tuple(
        name for name in whole_model_providers() if name not in BY_NAME_ALONE
    )
    common: dict[str, Any] = {"batches": batches}
    if on_gpu:
        shares = request.shares or ((0.3,) if request.quick else (0.05, 0.1, 0.3, 0.5, 1.0))
        remote = request.remote or "cpu"
        layers = request.layers if request.layers is not None else 4 if request.quick else 8
        common |= {"layers": layers or None, "shares": shares, "remote": remote,
                   "prompt": request.prompt, "new": request.new}  # fmt: skip
        if not request.quick or request.models:
            return measured_cases(request.models or MODELS, providers=everyone, **common)
        some = request.providers or QUICK_ENCODER_PROVIDERS
        first, later = everyone[:QUICK_FIRST], everyone[QUICK_FIRST:]
        return [
            *measured_cases(("llama-3-8b",), providers=first, **common),
            *measured_cases(ENCODERS, providers=some, **common),
            *measured_cases(("llama-3-8b",), providers=later, **common),
        ]
    shares = request.shares or ((0.1, 0.5) if request.quick else (0.05, 0.1, 0.3, 0.5, 1.0))
    models = request.models or (QUICK_PLANNED if request.quick else MODELS)
    tier = "cpu" if request.remote in (None, "simulated") else str(request.remote)
    predicted = predicted_cases(
        models, shares=shares, prompt=request.prompt, new=request.new,
        hardware=request.hardware, remote=tier, **common,
    )  # fmt: skip
    common |= {"layers": SIMULATED_LAYERS, "shares": request.shares or (0.3,),
               "remote": "simulated", "prompt": SIMULATED_PROMPT, "new": SIMULATED_NEW,
               "figure": SIMULATION}  # fmt: skip
    if not request.quick:
        return measured_cases(models, providers=everyone, **common) + predicted
    decoder = [model for model in models if model in DECODERS][:1]
    encoders = [model for model in models if model in ENCODERS]
    chosen = request.providers or QUICK_SIMULATED
    return [
        *measured_cases(decoder, providers=chosen, **common),
        *predicted,
        *measured_cases(encoders, providers=[n for n in chosen if n == "dak"], **common),
    ]


def run(
    request: BenchRequest,
    *,
    on_gpu: bool,
    progress: Callable[[int, int, str], None] = lambda done, all_, text: None,
) -> Record:
    """Run what has no row yet and return the record, which lies in `out` as `models.json`.

    `progress` hears (rows so far, all rows, what runs). Raises OptionError.
    """
    check(request)
    groups = _groups(request, on_gpu=on_gpu)
    cases = cases_of(request, on_gpu=on_gpu)
    begun = time.perf_counter()
    base = make_record(
        NAME, arguments=_arguments(request), cells=(), notes=NOTES, commit=request.commit
    )
    rows, found = earlier(request, base, cases) if request.resume else ({}, None)
    if rows:
        base = dataclasses.replace(base, notes=(*base.notes, RESUMED))
    if len(groups) > 1:
        used = sum(len(group["CUDA_VISIBLE_DEVICES"].split(",")) for group in groups)
        base = dataclasses.replace(base, notes=(*base.notes, SIDE_BY_SIDE.format(used)))
    state: dict[str, Any] = {"ceilings": found}
    lock = threading.Lock()

    def written(*, finished: bool = False) -> Record:
        ordered = tuple(rows[case.key] for case in cases if case.key in rows)
        seconds = time.perf_counter() - begun if finished and not request.resume else None
        made = dataclasses.replace(
            base, cells=ordered, ceilings=state["ceilings"],
            verdicts=tuple(verdicts(ordered, wanted=len(cases), on_gpu=on_gpu,
                                    quick_seconds=seconds if request.quick else None)),
        )  # fmt: skip
        made.write(request.out)
        return made

    def take(row: dict[str, Any]) -> None:
        with lock:
            rows[row["case"]] = row
            written()
            progress(len(rows), len(cases), f"{row['case']}: {row['status']}")

    def ceilings(measured: dict[str, Any]) -> None:
        state["ceilings"] = measured

    listener = Listener(lambda key: progress(len(rows), len(cases), key), take, ceilings)
    job = {"quick": request.quick, "remote": request.remote or "cpu", "ceilings": None,
           "host_memory": request.host_memory,
           "seconds_per_phase": request.seconds_per_phase}  # fmt: skip
    waiting = [case for case in cases if case.key not in rows]
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        with (request.out / f"{NAME}.log").open("a", encoding="utf-8") as log:
            each = limits(request, on_gpu=on_gpu)
            run_together(
                [
                    ModelRun(own, job, each, listener, log, environment=environment)
                    for own, environment in zip(
                        shared_out(waiting, len(groups)), groups, strict=True
                    )
                ]
            )
    except OSError as error:
        raise OptionError(f"{request.out} cannot be written: {error}") from error
    return written(finished=True)


def _groups(request: BenchRequest, *, on_gpu: bool) -> list[dict[str, str]]:
    """What is added to the environment of each worker; those run at the same time."""
    if request.cards is None:
        return [{}]
    present = torch.cuda.device_count() if on_gpu else 0
    return card_groups(request.cards, request.remote or "cpu", present=present)


def limits(request: BenchRequest, *, on_gpu: bool) -> Limits:
    if request.limit_seconds is not None:
        return Limits(request.limit_seconds)
    return QUICK_LIMITS[on_gpu] if request.quick else Limits()


def earlier(
    request: BenchRequest, base: Record, cases: Sequence[Case]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Rows and ceilings of the record to resume; failed and left-out cases are tried again.

    Raises OptionError where the record is of other sources or another machine: their rows do not
    belong into one table.
    """
    path = request.out / f"{NAME}.json"
    if not path.is_file():
        return {}, None
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        cells, found = list(old["cells"]), old["ceilings"]
        same = old["sources_sha256"] == base.sources_sha256
        where = (old["environment"]["gpu"], old["environment"]["torch"])
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path} is no record to resume: {error!r}") from error
    here = (base.environment["gpu"], base.environment["torch"])
    if not same or where != here:
        what = "other sources" if not same else f"another machine or torch {where}, here {here}"
        raise OptionError(f"{path} is of {what}; run without --resume, or into another folder")
    wanted = {case.key for case in cases}
    kept = {
        row["case"]: row
        for row in cells
        if row["case"] in wanted and row["status"] not in (FAILED, LEFT_OUT)
    }
    return kept, found


def _arguments(request: BenchRequest) -> Mapping[str, object]:
    fields = dataclasses.asdict(request)
    return {name: value for name, value in fields.items() if name not in ("out", "resume")}

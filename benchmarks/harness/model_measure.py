"""One case of `dak bench` run: a whole model by one provider, its accuracy, times and bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from dak_inductor.benchmarks.harness.accuracy import Errors, errors, judge, poison
from dak_inductor.benchmarks.harness.comparison import complete, release
from dak_inductor.benchmarks.harness.compile_caches import CompileCaches
from dak_inductor.benchmarks.harness.memory import PeakMemory, device_bytes_used, host_bytes_used
from dak_inductor.benchmarks.harness.model_case import (
    SIMULATION,
    Case,
    config_values,
    whole_model_providers,
)
from dak_inductor.benchmarks.harness.model_prediction import sequence_length
from dak_inductor.benchmarks.harness.peers.dak_backend import DakBackend, strategies_text
from dak_inductor.benchmarks.harness.peers.provider import (
    Prepared,
    Provider,
    Setting,
    model_bytes,
)
from dak_inductor.benchmarks.harness.timing import (
    REPLAYS,
    Timing,
    TimingRule,
    capture,
    synchronize,
    time_calls,
)
from dak_inductor.benchmarks.harness.whole_model import DECODE, PREFILL, PhaseInputs, WholeModel
from dak_inductor.benchmarks.harness.yardstick import Ceilings, over_bound, step_bound
from dak_inductor.config_model import build_from

CHECK_SEED, SETTLING_STEPS = 101, 2
_RECOMPILES = 1 << 10


@dataclass(slots=True)
class Machine:
    """What all cases of a run share. `ceilings` is None where no time is a result."""

    device: torch.device
    ceilings: Ceilings | None
    rule: TimingRule
    host_memory: int | None = None
    caches: CompileCaches | None = None
    """What a case's compilation begins with; None: whatever torch's caches hold."""
    spoiled: bool = False
    """A capture has failed in this process: torch's generator stays in it, and the next random
    number raises."""
    references: dict[tuple[object, ...], Any] = field(default_factory=dict)


def run_case(case: Case, machine: Machine) -> dict[str, object]:
    """The case's row. What a provider cannot do is its row's `reason`; nothing raises."""
    row: dict[str, object] = {}
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILES):
        complete(row, lambda: _measured(case, machine), machine.device)
    return row


def build(case: Case, device: torch.device) -> WholeModel:
    """The model with random weights, the same for one case on one kind of device."""
    torch.manual_seed(0)
    values = config_values(case.model, case.layers, tiny=case.figure == SIMULATION)
    model = build_from(values, case.model, device=device).requires_grad_(False)
    return WholeModel(model, length=case.prompt + case.new, batch=case.batch).eval()


def _measured(case: Case, machine: Machine) -> dict[str, object]:
    provider = whole_model_providers()[case.provider]
    reference = _reference(case, machine)
    on_gpu = machine.device.type == "cuda"
    with (
        _caches(case, machine) as cold,
        PeakMemory(device_bytes_used if on_gpu else lambda: 0, interval=0.25) as card,
        PeakMemory(host_bytes_used, interval=0.25) as host,
    ):
        row = _run(case, machine, provider, reference)
    row |= {
        "compile_cold": cold,
        "card_peak_bytes": card.peak - card.start if on_gpu else None,
        "host_peak_bytes": host.peak - host.start,
    }
    return row


def _caches(case: Case, machine: Machine) -> contextlib.AbstractContextManager[bool]:
    """Empty for a provider's first share of a model and batch; the others differ in splits alone,
    and compiling each anew would take most of a run."""
    if machine.caches is None:
        return contextlib.nullcontext(False)
    return machine.caches.of((case.figure, case.model, case.layers, case.batch), case.provider)


def _reference(case: Case, machine: Machine) -> dict[str, tuple[torch.Tensor, Errors]]:
    """By phase, the fp32 output on the CPU and the error of torch's own dtype; once per model."""
    key = (case.model, case.layers, case.batch, case.prompt, case.new)
    if key in machine.references:
        return cast(dict[str, tuple[torch.Tensor, Errors]], machine.references[key])
    outputs = {}
    for exact in (False, True):
        model = build(case, machine.device)
        if exact:
            model.model.float()
            model = WholeModel(model.model, length=case.prompt + case.new, batch=case.batch)
        inputs = model.phase_inputs(batch=case.batch, prompt=case.prompt, seed=CHECK_SEED)
        for phase in inputs.tensors:
            inputs.phase = phase
            outputs[phase, exact] = model(*inputs.arguments()).float().cpu()
        del model, inputs
        release(machine.device)
    phases = [phase for phase, exact in outputs if exact]
    machine.references.clear()  # cases of one model follow each other
    machine.references[key] = {
        phase: (outputs[phase, True], errors(outputs[phase, False], outputs[phase, True]))
        for phase in phases
    }
    return cast(dict[str, tuple[torch.Tensor, Errors]], machine.references[key])


def _run(
    case: Case,
    machine: Machine,
    provider: Provider,
    reference: dict[str, tuple[torch.Tensor, Errors]],
) -> dict[str, object]:
    model = build(case, machine.device)
    eligible, total = model.linear_bytes, model_bytes(model)
    wanted = round(case.share * eligible)
    fraction = case.share
    if isinstance(provider, DakBackend):  # its ratio is one of all weights
        provider = DakBackend(placement=model.kept_on_device(), mode=provider.mode)
        fraction = wanted / total
    inputs = model.phase_inputs(batch=case.batch, prompt=case.prompt, seed=CHECK_SEED)
    setting = Setting(cast(Any, model), machine.device, fraction, case.remote, machine.host_memory)
    torch._dynamo.utils.compilation_time_metrics.clear()
    begun = time.perf_counter()
    prepared = provider.prepare(cast(Any, model), cast(Any, inputs), setting)
    try:
        for phase in (*inputs.tensors, *inputs.tensors):  # again: the first calls may plan anew
            inputs.phase = phase
            for _ in range(SETTLING_STEPS):
                prepared.step()
        synchronize(machine.device)
        row: dict[str, object] = {
            "kind": provider.kind,
            "remote_bytes": prepared.remote_bytes,
            "realised": prepared.remote_bytes / eligible,
            "eligible_bytes": eligible,
            "weight_bytes": total,
            "device_bytes": prepared.device_bytes,
            "prepare_seconds": time.perf_counter() - begun,
            "compile_seconds": _compile_seconds(),
            "note": prepared.note,
        }
        row |= _judged(prepared, inputs, reference)
        for phase in inputs.tensors:
            inputs.phase = phase
            row |= _phase_row(case, machine, model, prepared, phase, remote_bytes=wanted)
        return row | _whole(case, model, row, inputs)
    finally:
        prepared.close()


def _judged(
    prepared: Prepared, inputs: PhaseInputs, reference: dict[str, tuple[torch.Tensor, Errors]]
) -> dict[str, object]:
    """Errors of every phase in order (a decode reads what a prefill wrote); the worst counts."""
    worst: tuple[float, Errors, Errors] | None = None
    accurate = True
    for phase, (exact, own) in reference.items():
        inputs.phase = phase
        poison(prepared.step())
        verdict = judge(errors(prepared.step().float().cpu(), exact), own)
        accurate = accurate and verdict.passed
        ratio = verdict.ours.rms / max(own.rms, 1e-30)
        if worst is None or ratio > worst[0]:
            worst = ratio, verdict.ours, own
    assert worst is not None
    _, ours, own = worst
    return {
        "accurate": accurate,
        "rms_error": ours.rms,
        "max_error": ours.max_abs,
        "torch_rms_error": own.rms,
        "torch_max_error": own.max_abs,
    }


def _phase_row(
    case: Case,
    machine: Machine,
    model: WholeModel,
    prepared: Prepared,
    phase: str,
    *,
    remote_bytes: int,
) -> dict[str, object]:
    """Time of a step and what it moves; L is that of the share asked for, whatever is realised.

    A decode step's is that of replays. Of a first token or an encoder the faster of replays and
    calls counts, and the row has that of calls too: prompts vary, and not every server captures.
    """
    name = "tpot" if phase == DECODE else "ttft"
    row: dict[str, object] = {}
    if case.provider == "dak":  # others read as they like, and nothing counts it
        local, remote = _counted(prepared, machine.device)
        row = {f"{name}_counted_local": local, f"{name}_counted_remote": remote}
    tokens = case.prompt + 1 if phase == DECODE else sequence_length(model.model, case.prompt)
    work = model.work(phase, batch=case.batch, tokens=tokens, remote_bytes=remote_bytes)
    read = case.batch if phase in (DECODE, PREFILL) else case.batch * tokens
    if phase != PREFILL:  # what a token costs where tokens are made one by one, or all at once
        row |= {
            "local_bytes_per_token": (work.total_bytes - prepared.remote_bytes) / read,
            "remote_bytes_per_token": prepared.remote_bytes / read,
        }
    if machine.ceilings is None:  # the time of a simulation on a CPU says nothing
        return row
    timings = _timings(prepared, machine, calls=phase != DECODE)
    timing = min(timings, key=lambda each: each.seconds)
    bound = step_bound([work], machine.ceilings)
    if phase != DECODE:
        row["ttft_calls_ms"] = timings[-1].seconds * 1e3
    row |= {
        f"{name}_ms": timing.seconds * 1e3,
        f"{name}_method": timing.method,
        f"{name}_repeats_ms": [seconds * 1e3 for seconds in timing.repeats],
        f"L_{name}_ms": bound * 1e3,
        f"{name} T/L": over_bound(timing.seconds, bound),
    }
    if phase != PREFILL:
        row["bandwidth"] = work.total_bytes / timing.seconds
    return row


def _whole(
    case: Case, model: WholeModel, row: dict[str, object], inputs: PhaseInputs
) -> dict[str, object]:
    """Tokens per second as `dak plan` reckons them, and what the planner had predicted."""
    made: dict[str, object] = {}
    if "ttft_ms" not in row:
        return _as_planned(case, model)
    first, later = cast(float, row["ttft_ms"]), cast(float, row.get("tpot_ms", 0.0))
    if DECODE in inputs.tensors:
        seconds = (first + later * (case.new - 1)) / 1e3
        made["tokens_per_second"] = case.batch * case.new / seconds
    elif not model.pixels:
        made["tokens_per_second"] = case.batch * case.prompt / first * 1e3
    return made | _as_planned(case, model)


def _as_planned(case: Case, model: WholeModel) -> dict[str, object]:
    """Predictions for the graphs that the backend saw, of which the one with most rows is the first
    step, and how it serves each of them."""
    if case.provider != "dak":
        return {}
    import dak_inductor as dak

    explained = dak.explain(model)
    plan = explained.plan
    rows = {
        graph: max((op.m for op in plan.ops if op.graph == graph), default=0)
        for graph in plan.step_times
    }
    order = sorted(rows, key=lambda graph: -rows[graph])
    names = ("predicted_ttft_ms", *(("predicted_tpot_ms",) if model.generates else ()))
    made: dict[str, object] = {
        name: plan.step_times[g] * 1e3 for name, g in zip(names, order, strict=False)
    }
    by_graph = [(rows.get(each.graph), strategies_text([each])) for each in explained.strategies]
    told = "; ".join(f"{count} rows: {text}" for count, text in by_graph if count)
    return made | ({"note": told} if told else {})


def _timings(prepared: Prepared, machine: Machine, *, calls: bool) -> list[Timing]:
    """Of replays, where the step can be captured; then of calls, where asked for or where not."""
    step, method = _captured(prepared, machine)
    steps = [(step, method)]
    if calls and step is not prepared.step:
        steps.append((prepared.step, "calls"))
    return [
        time_calls([each], device=machine.device, rule=machine.rule, method=how)
        for each, how in steps
    ]


def _captured(prepared: Prepared, machine: Machine) -> tuple[Callable[[], object], str]:
    """A CUDA graph where the step can be captured; otherwise calls, with the reason."""
    if machine.device.type != "cuda" or not prepared.graph:
        return prepared.step, "calls"
    here = torch.cuda.current_stream(machine.device)
    try:
        return capture(prepared.step), REPLAYS
    except Exception as error:  # a model's own code may do what no capture allows
        machine.spoiled = True
        torch.cuda.set_stream(here)  # torch leaves that of the capture in place
        torch.cuda.synchronize(machine.device)
        return prepared.step, f"calls: no capture ({type(error).__name__}: {str(error)[:200]})"


def _counted(prepared: Prepared, device: torch.device) -> tuple[int, int]:
    """Bytes of tiered tensors that one step read, by tier, as this package counts them."""
    import dak_inductor as dak

    dak.stats(reset=True)
    prepared.step()
    synchronize(device)
    total = dak.stats(reset=True).total
    return total.local, total.remote


def _compile_seconds() -> float:
    """Dynamo's and the backend's seconds since the metrics were cleared."""
    spent = torch._dynamo.utils.compilation_time_metrics
    return sum(sum(spent[name]) for name in spent if name.endswith("_compile.compile_inner"))

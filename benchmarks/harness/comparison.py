"""Runs every provider on one setting: accuracy first, then time; failures are rows with reasons."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dak_inductor.benchmarks.harness.accuracy import Errors, errors, judge, poison
from dak_inductor.benchmarks.harness.peers.provider import (
    Prepared,
    Provider,
    ProviderUnavailable,
    Setting,
)
from dak_inductor.benchmarks.harness.timing import REPLAYS, Timing, TimingRule, capture, time_calls
from dak_inductor.benchmarks.harness.yardstick import Ceilings, over_bound, step_bound

CHECK_SEED, TIMING_SEED = 101, 202


@dataclass(frozen=True, slots=True)
class Reference:
    """fp32 output of a step on the check inputs, and the error torch's own dtype makes on it."""

    output: torch.Tensor
    torch_own: Errors


def make_reference(setting: Setting) -> Reference:
    """Run the step in fp32 and, all resident and eager, in the workload's own dtype."""
    with torch.no_grad():
        model = setting.workload.build(setting.device)
        inputs = setting.workload.inputs(setting.device, CHECK_SEED)
        exact_inputs = inputs.to(torch.float32)
        own = model(*inputs.arguments()).float()
        output = model.float()(*exact_inputs.arguments())
    reference = Reference(output, errors(own, output))
    del model, inputs, exact_inputs
    release(setting.device)
    return reference


def compare(
    provider: Provider,
    setting: Setting,
    reference: Reference,
    ceilings: Ceilings,
    rule: TimingRule,
) -> dict[str, object]:
    """One row of the table. Never raises: what a provider cannot do is its row's `reason`."""
    row: dict[str, object] = {
        "provider": provider.name,
        "kind": provider.kind,
        "fraction": setting.fraction,
        "remote": setting.remote,
    }
    complete(row, lambda: _measure(provider, setting, reference, ceilings, rule), setting.device)
    return row


def complete(
    row: dict[str, object], measure: Callable[[], Mapping[str, object]], device: torch.device
) -> None:
    """Enter what `measure` returns, its status and its seconds, then release its memory.

    Never raises: what a provider cannot do is the row's `reason`. Without gradients.
    """
    row["status"] = "failed"
    begun = time.perf_counter()
    try:
        with torch.no_grad():
            row.update(measure())
        row["status"] = "ok" if row["accurate"] else "inaccurate"
    except ProviderUnavailable as unavailable:
        row.update(status="unavailable", reason=str(unavailable))
    except Exception as error:  # every failure of a peer becomes a row, with its type and place
        row["reason"] = f"{type(error).__name__}: {error}"
        row["traceback"] = traceback.format_exc(limit=-6)
    row["total_seconds"] = time.perf_counter() - begun
    release(device)


def _measure(
    provider: Provider,
    setting: Setting,
    reference: Reference,
    ceilings: Ceilings,
    rule: TimingRule,
) -> dict[str, object]:
    workload, device = setting.workload, setting.device
    model = workload.build(device)
    inputs = workload.inputs(device, TIMING_SEED)
    begun = time.perf_counter()
    prepared = provider.prepare(model, inputs, setting)
    try:
        call, method = _callable(prepared, device)
        prepared_seconds = time.perf_counter() - begun
        # fresh inputs in the same storage, a poisoned output: a step that writes nothing must show
        fresh = workload.inputs(device, CHECK_SEED)
        inputs.hidden.copy_(fresh.hidden)
        for old, new in zip(inputs.keys + inputs.values, fresh.keys + fresh.values, strict=True):
            old.copy_(new)
        del fresh
        poison(call())
        verdict = judge(errors(_tensor(call()), reference.output), reference.torch_own)
        timing = time_calls([call], device=device, rule=rule, method=method)
        return _row(
            prepared, setting, verdict.passed, verdict.ours, reference, ceilings, timing
        ) | {"prepare_seconds": prepared_seconds}
    finally:
        prepared.close()


def _callable(prepared: Prepared, device: torch.device) -> tuple[Callable[[], object], str]:
    if device.type == "cuda" and prepared.graph:
        return capture(prepared.step), REPLAYS
    return prepared.step, "eager calls"


def _row(
    prepared: Prepared,
    setting: Setting,
    accurate: bool,
    ours: Errors,
    reference: Reference,
    ceilings: Ceilings,
    timing: Timing,
) -> dict[str, object]:
    """L is that of the fraction asked for, the same for every peer, whatever it realises."""
    workload = setting.workload
    nominal = 0 if prepared.remote_bytes == 0 else round(setting.fraction * workload.linear_bytes)
    bound = step_bound([workload.work(nominal)], ceilings)
    return {
        "realised": prepared.remote_bytes / workload.linear_bytes,
        "remote_bytes": prepared.remote_bytes,
        "device_bytes": prepared.device_bytes,
        "milliseconds": timing.seconds * 1e3,
        "L_milliseconds": bound * 1e3,
        "T/L": over_bound(timing.seconds, bound),
        "method": timing.method,
        "replays": timing.replays,
        "repeats_milliseconds": [seconds * 1e3 for seconds in timing.repeats],
        "accurate": accurate,
        "rms_error": ours.rms,
        "max_error": ours.max_abs,
        "torch_rms_error": reference.torch_own.rms,
        "torch_max_error": reference.torch_own.max_abs,
        "note": prepared.note,
    }


def _tensor(output: object) -> torch.Tensor:
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"a step returns a tensor, not {type(output).__name__}")
    return output


def release(device: torch.device) -> None:
    """Forget compiled code and give memory back before the next provider is built."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_host_cache is not None:  # pinned memory too, which torch keeps otherwise
            empty_host_cache()

"""`dak demo`: a Llama-architecture model, partly in a remote tier, checked against eager."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dak_inductor.errors import OptionError, TierError
from dak_inductor.offload_request import default_remote
from dak_inductor.output_check import (
    ERROR_RATIO,
    Comparison,
    Trace,
    compare,
    generate,
    reference_logits,
)
from dak_inductor.quantity_text import count_text
from dak_inductor.whole_files import write_whole

# Llama-3-8B, and a model of the same make that two CPU cores compile and run in seconds.
_LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


def run(
    *,
    layers: int | None = None,
    ratio: float = 0.4,
    remote: str | None = None,
    batch: int = 2,
    prompt: int = 32,
    new: int = 16,
    json_out: Path | str | None = None,
) -> int:
    """Build, run eager, offload, compile, run again, compare, and print.

    Args:
        layers: decoder layers; 8 by default on a GPU (at Llama-3-8B shapes), 2 without one.
        ratio: share of the weight bytes that goes remote.
        remote: remote tier; "cpu" by default, "simulated" on a machine without a GPU.
        batch, prompt, new: sequences, prompt tokens and generated tokens.
        json_out: file that receives the numbers that were printed.

    Returns:
        The exit code: 0, or 1 when the comparison fails or nothing was read remotely.

    Raises:
        OptionError: transformers is missing, or a count is too small.
        TierError: a tier of a GPU on a machine without one.
        DakError: whatever `offload` raises for this machine and ratio.
    """
    _check_counts(layers=(layers, 1), batch=(batch, 1), prompt=(prompt, 2), new=(new, 2))
    import dak_inductor as dak

    console = Console()
    if not console.is_terminal:  # wide enough for every column
        console = Console(width=120)
    remote = _remote_or_default(remote)
    device = torch.device("cpu" if remote == "simulated" else "cuda")
    layers = layers or (8 if device.type == "cuda" else 2)
    if remote == "simulated":
        console.print(
            "Simulated tier: all bytes lie in CPU memory and reads are counted by tier. No time is "
            "measured; the plan's times are predictions for an H200.",
            highlight=False,
        )
    torch.manual_seed(0)
    model = build_model(layers, device)
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=device)

    eager = generate(model, ids, new)
    reference = reference_logits(model, ids, eager.tokens)
    resident_seconds = _resident_step(model, ids, new) if device.type == "cuda" else None

    dak.offload(model, offload_ratio=ratio, remote=remote)
    model.compile(backend="dak")
    forced = generate(model, ids, new, force=eager.tokens)  # compiles, and plans anew
    free = generate(model, ids, new)
    comparison = compare(eager, forced, free, reference)

    console.print(dak.explain(model))
    console.print(_bytes_table(free))
    _print_comparison(console, comparison, eager.logits.shape)
    if resident_seconds is not None:
        _print_seconds(console, free, resident_seconds)
    read_remotely = sum(free.remote_bytes) > 0
    if not read_remotely:
        console.print("FAILED: nothing was read from the remote tier.", style="bold red")
    passed = comparison.passed and read_remotely
    if json_out is not None:
        record = _record(comparison, free, resident_seconds, passed)
        record |= {"layers": layers, "ratio": ratio, "remote": remote, "torch": torch.__version__}
        write_whole(Path(json_out), json.dumps(record, indent=2) + "\n")
    return 0 if passed else 1


def _check_counts(**counts: tuple[int | None, int]) -> None:
    """Each with the least that it may be."""
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise OptionError(f"{name}={value}: must be at least {least}")


def _remote_or_default(remote: str | None) -> str:
    remote = remote or default_remote()
    if remote != "simulated" and not torch.cuda.is_available():
        raise TierError(f"remote={remote!r} needs a GPU, and there is none; use 'simulated'")
    return remote


def build_model(layers: int, device: torch.device) -> Any:
    """A Llama model of random bfloat16 weights; Llama-3-8B's shapes on a GPU, else small ones."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        advice = "the demo needs transformers: pip install 'dak-inductor[demo]'"
        raise OptionError(advice) from error
    shape = _LARGE if device.type == "cuda" else _SMALL
    config = LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype="bfloat16",
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def _resident_step(model: Any, ids: torch.Tensor, new: int) -> float:
    """Median seconds of a decode step with every weight on the GPU, compiled by plain Inductor."""
    model.compile()
    generate(model, ids, new)
    seconds = statistics.median(generate(model, ids, new).seconds[1:])
    model._compiled_call_impl = None
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return seconds


def _bytes_table(trace: Trace) -> Table:
    table = Table(title="weight bytes read per step")
    for heading in ("step", "local MB", "remote MB", "remote share"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    local_decode = statistics.mean(trace.local_bytes[1:])
    remote_decode = statistics.mean(trace.remote_bytes[1:])
    for name, local, remote in (
        ("prefill", trace.local_bytes[0], trace.remote_bytes[0]),
        ("decode, mean", local_decode, remote_decode),
    ):
        share = remote / (local + remote) if local + remote else 0.0
        table.add_row(name, f"{local / 1e6:.3f}", f"{remote / 1e6:.3f}", f"{share:.1%}")
    return table


def _print_comparison(console: Console, comparison: Comparison, shape: torch.Size) -> None:
    console.print(
        f"logits of {count_text(shape[0], 'step')} x {count_text(shape[1], 'sequence')}, error "
        f"against fp32 on the same tokens: "
        f"RMS {comparison.rms:.3g} (eager {comparison.eager_rms:.3g}), "
        f"max {comparison.max:.3g} (eager {comparison.eager_max:.3g}); "
        f"allowed: {ERROR_RATIO:g} times eager's",
        highlight=False,
    )
    console.print(
        f"greedy tokens: {comparison.equal_tokens} of {comparison.tokens} equal to eager's before "
        f"a sequence parts from it; parted at a near-tie: {comparison.near_ties}, "
        f"otherwise: {comparison.mismatches}",
        highlight=False,
    )
    if comparison.passed:
        console.print("Same output as eager.", style="bold green")
    else:
        console.print("FAILED: output differs from eager.", style="bold red")


def _print_seconds(console: Console, trace: Trace, resident_seconds: float) -> None:
    step = statistics.median(trace.seconds[1:])
    console.print(
        f"decode step, median: {step * 1e3:.2f} ms; all resident, compiled by Inductor: "
        f"{resident_seconds * 1e3:.2f} ms",
        highlight=False,
    )


def _record(
    comparison: Comparison, trace: Trace, resident_seconds: float | None, passed: bool
) -> dict[str, Any]:
    record: dict[str, Any] = {"passed": passed, "comparison": dataclasses.asdict(comparison)}
    record["local_bytes"] = list(trace.local_bytes)
    record["remote_bytes"] = list(trace.remote_bytes)
    if resident_seconds is not None:
        record["decode_seconds"] = statistics.median(trace.seconds[1:])
        record["resident_decode_seconds"] = resident_seconds
    return record

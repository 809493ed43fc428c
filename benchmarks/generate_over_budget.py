"""A model whose weights exceed `gpu_memory` generates what it does all resident, within the budget.

Three processes: `reference` draws the weights, writes them to a file and records the resident run
(bf16 and fp32); `offloaded` loads the file, offloads, compiles and generates while the driver's
count of the card's memory is sampled; the parent compares.

    python benchmarks/generate_over_budget.py --out DIR [--layers 12] [--gpu-memory 5GB]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dak_inductor.benchmarks.bench_load import choose_folder
from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.accuracy import errors, judge, token_agreement
from dak_inductor.benchmarks.harness.generation import (
    Generation,
    free_running,
    generate,
    load_on_cpu,
    new_model,
    teacher_forced,
)
from dak_inductor.benchmarks.harness.memory import PeakMemory, device_bytes_used
from dak_inductor.benchmarks.harness.record import Verdict, make_record

MODULE = "dak_inductor.benchmarks.generate_over_budget"
COLUMNS = ("gpu_memory", "weight_bytes", "remote_bytes", "card_before", "card_peak",
           "generate_seconds", "identical", "partings")  # fmt: skip
WEIGHTS, REFERENCE, OFFLOADED = "weights.safetensors", "reference.pt", "offloaded.pt"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser("Generation by a model larger than its memory budget")
    made.add_argument(
        "--shape", choices=("llama3-8b", "tiny"), default=command_line.default_shape()
    )
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--prompt", type=int, default=64)
    made.add_argument("--new", type=int, default=32)
    made.add_argument(
        "--gpu-memory", type=command_line.memory_bytes, default=None, help="default: 0.6 x weights"
    )
    made.add_argument("--mode", default=None, help="a torch.compile mode, such as reduce-overhead")
    made.add_argument("--folder", type=Path, default=None, help="where the weights' file goes")
    made.add_argument("--stage", choices=("reference", "offloaded"), help=argparse.SUPPRESS)
    return made.parse_args(argv)


def generation(arguments: argparse.Namespace) -> Generation:
    return Generation(
        shape=arguments.shape,
        layers=arguments.layers,
        batch=arguments.batch,
        prompt=arguments.prompt,
        new=arguments.new,
    )


def run_reference(what: Generation, folder: Path) -> None:
    """Weights to the file; tokens and logits of the resident model, bf16 and fp32."""
    from safetensors.torch import save_file

    device = command_line.default_device()
    model = new_model(what, device)
    save_file({name: t.cpu().contiguous() for name, t in model.state_dict().items()},
              folder / WEIGHTS)  # fmt: skip
    model.generation_config.disable_compile = True
    tokens = generate(model, what, device)
    own = teacher_forced(model, what, tokens, device)
    exact = teacher_forced(model.float(), what, tokens, device)
    torch.save({"tokens": tokens, "own": own, "exact": exact}, folder / REFERENCE)


def run_offloaded(what: Generation, folder: Path, arguments: argparse.Namespace) -> None:
    """The offloaded, compiled run under the sampler, in a process that did nothing else on the
    card."""
    on_gpu = torch.cuda.is_available()
    with PeakMemory(device_bytes_used if on_gpu else lambda: 0) as card:
        found = offloaded_run(what, folder, arguments)
    torch.save({**found, "card_before": card.start, "card_peak": card.peak}, folder / OFFLOADED)


def offloaded_run(
    what: Generation, folder: Path, arguments: argparse.Namespace
) -> dict[str, object]:
    """Offload, compile, generate, then the teacher-forced logits along the resident's tokens."""
    import dak_inductor as dak
    from dak_inductor.offloaded import record_of

    model = load_on_cpu(what, folder / WEIGHTS)
    begun = time.perf_counter()
    dak.offload(
        model,
        gpu_memory=arguments.gpu_memory,
        remote=arguments.remote,
        host_memory=arguments.host_memory,
    )
    offload_seconds = time.perf_counter() - begun
    options = {"mode": arguments.mode} if arguments.mode else {}
    model.compile(backend="dak", options=options or None)
    device = next(model.parameters()).device
    first = generate(model, what, device)  # compiles, and re-plans from what it measured
    begun = time.perf_counter()
    tokens = generate(model, what, device)
    generate_seconds = time.perf_counter() - begun
    resident_tokens = torch.load(folder / REFERENCE, mmap=True)["tokens"]
    logits = teacher_forced(model, what, resident_tokens, device)
    record = record_of(model)
    weights = list(record.weights.values()) if record else []
    return {
        "tokens": tokens,
        "first_tokens": first,
        "logits": logits,
        "remote_bytes": sum(weight.buffer.bytes_by_tier().remote for weight in weights),
        "offload_seconds": offload_seconds,
        "generate_seconds": generate_seconds,
        "explain": str(dak.explain(model)),
    }


def run_stage(stage: str, folder: Path, argv: Sequence[str]) -> None:
    """One stage in a process of its own; raises with its last lines if it fails."""
    command = [sys.executable, "-m", MODULE, *argv, "--stage", stage, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr[-4000:])
    if done.returncode:
        raise SystemExit(f"stage {stage} failed with status {done.returncode}")


def compare(
    folder: Path, gpu_memory: int, weight_bytes: int
) -> tuple[dict[str, object], list[Verdict]]:
    """The table's row and the verdicts."""
    reference, ours = torch.load(folder / REFERENCE), torch.load(folder / OFFLOADED)
    exact = reference["exact"]
    own = errors(reference["own"], exact)
    accuracy = judge(errors(ours["logits"], exact), own)
    agreement = token_agreement(
        ours["logits"].flatten(0, 1),
        reference["own"].flatten(0, 1),
        exact.flatten(0, 1),
        own.max_abs,
    )
    free = free_running(ours["tokens"], reference["tokens"], exact, own.max_abs)
    first = free_running(ours["first_tokens"], reference["tokens"], exact, own.max_abs)
    card = ours["card_peak"] - ours["card_before"]
    on_gpu = torch.cuda.is_available()
    row = {
        "gpu_memory": gpu_memory,
        "weight_bytes": weight_bytes,
        "remote_bytes": ours["remote_bytes"],
        "card_before": ours["card_before"],
        "card_peak": ours["card_peak"],
        "offload_seconds": ours["offload_seconds"],
        "generate_seconds": ours["generate_seconds"],
        "identical": f"{free.identical}/{free.sequences}",
        "partings": list(free.first_partings),
        "rms_error": accuracy.ours.rms,
        "torch_rms_error": own.rms,
        "max_error": accuracy.ours.max_abs,
        "torch_max_error": own.max_abs,
        "decided_positions": f"{agreement.agreeing}/{agreement.decided} of {agreement.positions}",
        "explain": ours["explain"],
    }
    verdicts = [
        Verdict("weights over gpu_memory", weight_bytes / gpu_memory, 1.0, "x",
                weight_bytes > gpu_memory),
        Verdict("remote bytes", ours["remote_bytes"], 1, "B", ours["remote_bytes"] > 0),
        Verdict("logits' RMS error over torch's own", accuracy.ours.rms / own.rms, 2.0, "x",
                accuracy.passed),
        Verdict("logits' max error over torch's own", accuracy.ours.max_abs / own.max_abs, 2.0, "x",
                accuracy.passed),
        Verdict("decided greedy tokens agree", float(agreement.agreeing), float(agreement.decided),
                "tokens", agreement.passed),
        Verdict("free-running tokens agree to a near-tie", float(free.identical),
                float(free.sequences), "sequences", free.excused and first.excused),
        Verdict("card memory, driver's count", float(card), float(gpu_memory), "B",
                card <= gpu_memory if on_gpu else None, "" if on_gpu else "no GPU"),
    ]  # fmt: skip
    return row, verdicts


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    what = generation(arguments)
    if arguments.stage == "reference":
        run_reference(what, arguments.folder)
        return 0
    if arguments.stage == "offloaded":
        run_offloaded(what, arguments.folder, arguments)
        return 0
    if arguments.quick:
        arguments.layers, arguments.batch, arguments.new = min(arguments.layers, 12), 2, 8
        what = generation(arguments)
    with torch.device("meta"):
        weight_bytes = sum(
            p.numel() * 2 for p in new_model(what, torch.device("meta")).parameters()
        )
    gpu_memory = arguments.gpu_memory or round(0.6 * weight_bytes)
    passed_on = [
        f"--shape={what.shape}", f"--layers={what.layers}", f"--batch={what.batch}",
        f"--prompt={what.prompt}", f"--new={what.new}", f"--gpu-memory={gpu_memory}",
        f"--remote={arguments.remote}",
    ]  # fmt: skip
    passed_on += [f"--host-memory={arguments.host_memory}"] if arguments.host_memory else []
    passed_on += [f"--mode={arguments.mode}"] if arguments.mode else []
    parent = choose_folder(arguments.folder, weight_bytes)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        run_stage("reference", Path(folder), passed_on)
        run_stage("offloaded", Path(folder), passed_on)
        row, verdicts = compare(Path(folder), gpu_memory, weight_bytes)
    record = make_record(
        "over_budget",
        arguments=command_line.arguments_dict(arguments),
        cells=[row],
        verdicts=verdicts,
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())

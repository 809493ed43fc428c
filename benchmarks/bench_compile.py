"""Compile time of a Llama graph under `dak` against plain Inductor, all caches off.

Bar, on a GPU: at most 1.10 times plain Inductor, median of 5 interleaved runs. Every run is a
fresh process with fresh cache folders; imports, CUDA start and Inductor's own start are paid
before the clock starts. The time is the first call less a later one, so `dak` pays for planning
and placement too.

    python benchmarks/bench_compile.py --out DIR [--layers 4] [--hidden 2048] [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.record import Verdict, make_record

BAR = 1.10
BACKENDS = ("inductor", "dak")
MODULE = "dak_inductor.benchmarks.bench_compile"
COLUMNS = ("run", "backend", "compile_seconds", "dynamo_seconds", "remote_bytes", "status")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser("Compile time against plain Inductor")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--hidden", type=int, default=2048)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--runs", type=int, default=5)
    made.add_argument("--ratio", type=float, default=0.4, help="share of the weights offloaded")
    made.add_argument("--cpu", action="store_true", help="compile for the CPU even where a GPU is")
    made.add_argument("--child", choices=BACKENDS, help=argparse.SUPPRESS)
    return made.parse_args(argv)


def make_llama(arguments: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = arguments.hidden
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=32000,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model.to(device, dtype).eval().requires_grad_(False)


def child(arguments: argparse.Namespace) -> dict[str, object]:
    """Compile once in this process and say how long it took."""
    device = torch.device("cpu") if arguments.cpu else command_line.default_device()
    model = make_llama(arguments, device)
    remote_bytes = 0
    if arguments.child == "dak":
        import dak_inductor as dak
        from dak_inductor.offloaded import record_of

        remote = "simulated" if device.type == "cpu" else arguments.remote
        dak.offload(model, offload_ratio=arguments.ratio, remote=remote)
        record = record_of(model)
        weights = record.weights.values() if record else ()
        remote_bytes = sum(weight.buffer.bytes_by_tier().remote for weight in weights)
    tokens = torch.randint(0, 32000, (1, arguments.tokens), device=device)

    with torch.no_grad():
        warm = torch.compile(lambda x: (x * 2 + 1).sum())
        warm(torch.randn(1000, device=device))
        torch._dynamo.utils.compilation_time_metrics.clear()
        model.compile(backend=arguments.child)
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            model(input_ids=tokens, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    spent = torch._dynamo.utils.compilation_time_metrics
    dynamo = [sum(spent[name]) for name in spent if name.endswith("_compile.compile_inner")]
    return {
        "compile_seconds": times[0] - min(times[1:]),
        "dynamo_seconds": sum(dynamo) if dynamo else None,
        "later_call_seconds": min(times[1:]),
        "remote_bytes": remote_bytes,
    }


def run_child(arguments: argparse.Namespace, backend: str, run: int) -> dict[str, object]:
    """One fresh process with fresh, disabled caches; a failure is a row with its last lines."""
    command = [sys.executable, "-m", MODULE, "--child", backend]
    for name in ("layers", "hidden", "tokens", "ratio", "remote"):
        command += [f"--{name}", str(getattr(arguments, name))]
    if arguments.cpu:
        command.append("--cpu")
    row: dict[str, object] = {"run": run, "backend": backend}
    with tempfile.TemporaryDirectory() as cache:
        fresh = {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "DAK_CACHE": f"{cache}/dak",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        done = subprocess.run(
            command, env={**os.environ, **fresh}, capture_output=True, text=True, timeout=900
        )
    if done.returncode:
        return {**row, "status": "failed", "reason": done.stderr[-2000:]}
    return {**row, "status": "ok", **json.loads(done.stdout.splitlines()[-1])}


def verdict(rows: Sequence[dict[str, object]], *, decides: bool) -> Verdict:
    """Median over median."""

    def median(backend: str) -> float | None:
        times = [
            float(str(row["compile_seconds"]))
            for row in rows
            if row["backend"] == backend and row["status"] == "ok"
        ]
        return statistics.median(times) if times else None

    ours, plain = median("dak"), median("inductor")
    name = "compile time, dak / inductor"
    if ours is None or plain is None or any(row["status"] != "ok" for row in rows):
        return Verdict(name, None, BAR, "x", False, "a run failed; its reason is in the record")
    note = f"medians {ours:.2f} s and {plain:.2f} s"
    ratio = ours / plain
    return Verdict(name, ratio, BAR, "x", ratio <= BAR if decides else None, note)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.child:
        print(json.dumps(child(arguments)))
        return 0
    if arguments.quick:
        arguments.hidden, arguments.runs = min(arguments.hidden, 256), min(arguments.runs, 2)
    rows = []
    for run in range(arguments.runs):
        for backend in BACKENDS if run % 2 == 0 else reversed(BACKENDS):
            row = run_child(arguments, backend, run)
            rows.append(row)
            print(
                f"run {run} {backend}: {row.get('compile_seconds', row.get('reason'))}",
                file=sys.stderr,
                flush=True,
            )
    on_gpu = torch.cuda.is_available() and not arguments.cpu
    record = make_record(
        "compile_cpu" if arguments.cpu else "compile",
        arguments=command_line.arguments_dict(arguments),
        cells=rows,
        verdicts=[verdict(rows, decides=on_gpu and not arguments.quick)],
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())

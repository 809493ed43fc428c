"""A context that fits no card: prefill in chunks, then decode steps over a cache mostly remote.

A model of Llama-3-8B shape with random weights under `gpu_memory`, batch 1. Part of the prompt is
prefilled in chunks; the rest of the context is random and written to the cache as it is. Bars: a
decode step at T / L_direct <= 1.10, the card's memory within `gpu_memory`, attention within twice
the error of torch's own.

    python benchmarks/bench_long_context.py --out DIR [--tokens 700000] [--prefill 64000]
        [--gpu-memory 24GiB] [--host-memory 100GB]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dak_inductor as dak
from dak_inductor.benchmarks.harness import ceilings, command_line
from dak_inductor.benchmarks.harness.accuracy import AccuracyVerdict, errors, judge
from dak_inductor.benchmarks.harness.attention_reference import AttentionCall
from dak_inductor.benchmarks.harness.generation import VOCABULARY, Generation, new_model
from dak_inductor.benchmarks.harness.memory import PeakMemory
from dak_inductor.benchmarks.harness.record import Verdict, make_record
from dak_inductor.benchmarks.harness.timing import QUICK, synchronize
from dak_inductor.benchmarks.harness.yardstick import Work, direct_bound, over_bound
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import ModelError
from dak_inductor.offloaded import record_of

BAR_STEP = 1.10
TINY_TOKENS, TINY_PREFILL = 300, 64
COLUMNS = ("tokens", "step_ms", "L_ms", "T/L", "cache_local", "cache_remote", "prefill_tokens",
           "prefill_tokens_per_second", "card_peak", "fill_seconds")  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    made = command_line.parser("A context larger than the card's memory")
    made.add_argument(
        "--shape", choices=("llama3-8b", "tiny"), default=command_line.default_shape()
    )
    made.add_argument("--layers", type=int, default=32 if on_gpu else 2)
    made.add_argument("--tokens", type=int, default=700_000 if on_gpu else TINY_TOKENS)
    made.add_argument("--prefill", type=int, default=64_000 if on_gpu else TINY_PREFILL)
    made.add_argument("--chunk", type=int, default=4_000, help="tokens prefilled at once")
    made.add_argument("--steps", type=int, default=3, help="decode steps that are timed")
    made.add_argument(
        "--gpu-memory", type=command_line.memory_bytes, default=24 << 30 if on_gpu else 330_000
    )
    arguments = made.parse_args(argv)
    if arguments.quick:
        arguments.tokens, arguments.prefill = arguments.tokens // 10, arguments.prefill // 10
    return arguments


def random_tokens(count: int, arguments: argparse.Namespace, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    high = VOCABULARY[arguments.shape]
    return torch.randint(1, high, (1, count), generator=generator).to(device)


@torch.no_grad()
def prefill(model: Any, cache: Any, tokens: Tensor, chunk: int) -> float:
    """Seconds of a prompt in chunks; only the last token's logits are made."""
    synchronize(tokens.device)
    begun = time.perf_counter()
    for piece in tokens.split(chunk, dim=1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronize(tokens.device)
    return time.perf_counter() - begun


@torch.no_grad()
def fill(cache: Any, tokens: int, chunk: int) -> float:
    """Seconds in which random keys and values bring the context to `tokens`, pages included."""
    first = cache.layers[0]
    synchronize(first.keys.device)
    begun = time.perf_counter()
    cache.commit(tokens)
    while (missing := tokens - cache.get_seq_length()) > 0:
        shape = list(first.keys.shape)
        shape[2] = min(chunk, missing)
        states = [
            torch.randn(shape, dtype=first.keys.dtype, device=first.keys.device) for _ in range(2)
        ]
        for layer in cache.layers:
            layer.update(*states)
    synchronize(first.keys.device)
    return time.perf_counter() - begun


@torch.no_grad()
def decode(model: Any, cache: Any, token: Tensor, steps: int) -> tuple[list[float], bool]:
    """Seconds of each step after a first one, and whether all logits are finite."""
    seconds, finite = [], True
    for step in range(steps + 1):
        synchronize(token.device)
        begun = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True).logits
        synchronize(token.device)
        if step:
            seconds.append(time.perf_counter() - begun)
        finite = finite and bool(torch.isfinite(logits).all())
    return seconds, finite


@torch.no_grad()
def check_attention(cache: Any, ratio: int) -> AccuracyVerdict:
    """One head of keys of the last layer against fp32, over the whole context."""
    layer = cache.layers[-1]
    length, depth = cache.get_seq_length(), layer.keys.shape[3]
    query = torch.randn(1, ratio * layer.keys.shape[1], 1, depth).to(layer.keys)
    ours = torch.ops.dak.attention.default(
        query, layer.keys, layer.values, layer.lengths, None, None, depth**-0.5, True, 0, 0.0
    )
    head = layer.keys.shape[1] - 1
    key, value = (part[:, head:, :length].clone() for part in (layer.keys, layer.values))
    call = AttentionCall(query[:, head * ratio :], key, value, scale=depth**-0.5)
    exact = call.to(torch.float32).stock()
    return judge(errors(ours[:, head * ratio :], exact), errors(call.stock(), exact))


def weight_bytes(model: Any) -> TierBytes:
    """Bytes of the weights that a step reads, by tier: all but the embedding, of which it reads a
    row."""
    record = record_of(model)
    if record is None:
        raise ModelError("dak.offload left no record of the model")
    tiered = sum(
        (weight.buffer.bytes_by_tier() for name, weight in record.weights.items()
         if "embed_tokens" not in name),
        TierBytes(),
    )  # fmt: skip
    in_buffers = set(record.weights)
    resident = sum(
        parameter.nbytes for name, parameter in model.named_parameters() if name not in in_buffers
    )
    return TierBytes(tiered.local + resident, tiered.remote)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = command_line.default_device()
    on_gpu = device.type == "cuda"
    found = ceilings.measure(device, arguments.remote, QUICK, host_memory=arguments.host_memory)
    what = Generation(shape=arguments.shape, layers=arguments.layers, batch=1)
    model = new_model(what, device)
    dak.offload(
        model,
        gpu_memory=arguments.gpu_memory,
        remote=arguments.remote,
        host_memory=arguments.host_memory,
    )
    room = arguments.tokens + arguments.steps + 2
    cache = dak.kv_cache(model, batch=1, max_len=room, expected_len=arguments.tokens)
    if on_gpu:
        torch.cuda.empty_cache()
    with PeakMemory(_card_bytes if on_gpu else lambda: 0, interval=0.05) as card:
        prompt = random_tokens(arguments.prefill, arguments, device)
        prefill_seconds = prefill(model, cache, prompt, arguments.chunk)
        fill_seconds = fill(cache, arguments.tokens, arguments.chunk)
        seconds, finite = decode(model, cache, prompt[:, :1], arguments.steps)
    config = what.config()  # the check takes GBs of its own
    accuracy = check_attention(cache, config.num_attention_heads // config.num_key_value_heads)
    held, weights = cache.bytes_by_tier(), weight_bytes(model)
    length = cache.get_seq_length()
    read = length / (length + _slack(cache))  # of what has memory, the tokens that are there
    local, remote = weights.local + held.local, weights.remote + int(held.remote * read)
    bound = direct_bound(Work(local, remote, 0.0), found)
    step = statistics.median(seconds)
    row: dict[str, object] = {
        "tokens": length,
        "step_ms": step * 1e3,
        "L_ms": bound * 1e3,
        "T/L": over_bound(step, bound),
        "cache_local": held.local,
        "cache_remote": held.remote,
        "weights_local": weights.local,
        "weights_remote": weights.remote,
        "prefill_tokens": arguments.prefill,
        "prefill_tokens_per_second": arguments.prefill / prefill_seconds,
        "fill_seconds": fill_seconds,
        "steps_ms": [each * 1e3 for each in seconds],
        "card_peak": card.peak,
        "rms_error": accuracy.ours.rms,
        "torch_rms_error": accuracy.torch_own.rms,
        "max_error": accuracy.ours.max_abs,
        "torch_max_error": accuracy.torch_own.max_abs,
    }
    record = make_record(
        "long_context",
        arguments=command_line.arguments_dict(arguments),
        cells=[row],
        verdicts=verdicts(row, arguments, accuracy, finite=finite, on_gpu=on_gpu),
        ceilings=found.as_dict(),
        notes=["eager; keys and values past the prefill are random; the step reads all of them"],
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


def verdicts(
    row: dict[str, Any],
    arguments: argparse.Namespace,
    accuracy: AccuracyVerdict,
    *,
    finite: bool,
    on_gpu: bool,
) -> list[Verdict]:
    note = "" if on_gpu else "no GPU"
    over = row["T/L"] <= BAR_STEP and math.isfinite(row["T/L"])
    card = row["card_peak"] <= arguments.gpu_memory
    return [
        Verdict("context", row["tokens"], arguments.tokens, "tokens",
                row["tokens"] >= arguments.tokens),
        Verdict("decode step: T / L", row["T/L"], BAR_STEP, "x", over if on_gpu else None, note),
        Verdict("remote bytes of the cache", row["cache_remote"], 1, "B", row["cache_remote"] > 0),
        Verdict("card memory, driver's count", row["card_peak"], arguments.gpu_memory, "B",
                card if on_gpu else None, note),
        Verdict("attention's RMS error over torch's own",
                row["rms_error"] / max(row["torch_rms_error"], 1e-30), 2.0, "x", accuracy.passed),
        Verdict("logits are finite", float(finite), 1.0, "", finite),
    ]  # fmt: skip


def _slack(cache: Any) -> int:
    """Slots of a layer that have memory and hold no token yet."""
    layer = cache.layers[0]
    return max(0, int(layer.storage.committed) - int(cache.get_seq_length()))


def _card_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    raise SystemExit(main())

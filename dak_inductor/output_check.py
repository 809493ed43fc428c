"""Whether a model generates what it generated before: errors of logits, and greedy tokens.

Random weights give near-ties, so tokens alone decide nothing. Logits are compared on equal tokens
(teacher forcing) with an fp32 copy of the model; free-running tokens may part at a near-tie only.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch

from dak_inductor.stats import stats

ERROR_RATIO = 2.0
"""Largest allowed error against fp32, as a multiple of eager's own in the same dtype."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One `generate` call.

    tokens [batch, new] as generated, logits [new, batch, vocabulary] in float32 before any
    processing, seconds and bytes read by tier of each step; step 0 is the prefill.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    seconds: tuple[float, ...]
    local_bytes: tuple[int, ...]
    remote_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Errors against fp32 of eager and of the offloaded model on the same tokens; tokens.

    `equal_tokens` counts the tokens of each sequence before the first difference. A sequence may
    part from eager's only where the two models' logits differ by enough to swap eager's two best
    (`near_ties`); anything else is a mismatch.
    """

    eager_rms: float
    eager_max: float
    rms: float
    max: float
    tokens: int
    equal_tokens: int
    near_ties: int
    mismatches: int

    @property
    def passed(self) -> bool:
        """Whether both errors and the tokens are within the rule."""
        rms_within = self.rms <= ERROR_RATIO * self.eager_rms
        max_within = self.max <= ERROR_RATIO * self.eager_max
        return rms_within and max_within and self.mismatches == 0


@torch.no_grad()
def generate(
    model: Any, ids: torch.Tensor, new: int, *, force: torch.Tensor | None = None
) -> Trace:
    """Greedy `generate` with a static cache, initialised before anything is compiled.

    Args:
        ids: prompt, [batch, prompt].
        new: tokens to generate.
        force: [batch, new]; continue with these tokens whatever the logits say (teacher forcing).
            The graphs that run are the same as without.
    """
    from transformers import LogitsProcessorList, StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=ids.shape[1] + new)
    cache.early_initialization(
        batch_size=ids.shape[0],
        num_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        dtype=torch.bfloat16,
        device=ids.device,
    )
    recorder = _StepRecorder(ids.shape[1], force)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        disable_compile=True,  # on a GPU generate would compile decode itself, with Inductor
        logits_processor=LogitsProcessorList([recorder]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Trace(
        tokens=output.sequences[:, ids.shape[1] :],
        logits=torch.stack(output.logits).float(),
        seconds=tuple(recorder.seconds),
        local_bytes=tuple(recorder.local_bytes),
        remote_bytes=tuple(recorder.remote_bytes),
    )


class _StepRecorder:
    """A logits processor that notes time and bytes read of each step, and may dictate tokens."""

    def __init__(self, prompt: int, force: torch.Tensor | None) -> None:
        self._prompt = prompt
        self._force = force
        self.seconds: list[float] = []
        self.local_bytes: list[int] = []
        self.remote_bytes: list[int] = []
        self._read = stats().total
        self._start = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type == "cuda":
            torch.cuda.synchronize(scores.device)
        self.seconds.append(time.perf_counter() - self._start)
        read = stats().total
        self.local_bytes.append(read.local - self._read.local)
        self.remote_bytes.append(read.remote - self._read.remote)
        self._read, self._start = read, time.perf_counter()
        if self._force is None:
            return scores
        dictated = torch.full_like(scores, float("-inf"))
        return dictated.scatter(1, self._force[:, input_ids.shape[1] - self._prompt, None], 0.0)


@torch.no_grad()
def reference_logits(model: Any, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [new, batch, vocabulary] of an fp32 copy of `model` for `tokens` after `ids`."""
    exact = copy.deepcopy(model).float()
    logits = exact(torch.cat([ids, tokens[:, :-1]], dim=1)).logits
    return logits[:, ids.shape[1] - 1 :].transpose(0, 1).float()


def compare(eager: Trace, forced: Trace, free: Trace, reference: torch.Tensor) -> Comparison:
    """Judge `forced` (eager's tokens) by its logits and `free` (its own tokens) by its tokens."""
    eager_error, error = eager.logits - reference, forced.logits - reference
    swap = 2 * (forced.logits - eager.logits).abs().max().item()  # both of two logits may move
    best = eager.logits.topk(2, dim=-1).values
    margin = (best[..., 0] - best[..., 1]).transpose(0, 1)  # [batch, new]
    batch, new = eager.tokens.shape
    equal = near_ties = mismatches = 0
    for row in range(batch):
        differs = (eager.tokens[row] != free.tokens[row]).nonzero()
        first = int(differs[0]) if len(differs) else new
        equal += first
        if first < new:
            tie = margin[row, first].item() <= swap
            near_ties, mismatches = near_ties + tie, mismatches + (not tie)
    return Comparison(
        eager_rms=eager_error.square().mean().sqrt().item(),
        eager_max=eager_error.abs().max().item(),
        rms=error.square().mean().sqrt().item(),
        max=error.abs().max().item(),
        tokens=batch * new,
        equal_tokens=equal,
        near_ties=near_ties,
        mismatches=mismatches,
    )

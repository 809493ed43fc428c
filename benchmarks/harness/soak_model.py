"""A small Llama that is offloaded, and the greedy tokens of the same model while it was resident.

Along the resident's tokens every step's best token is compared where the fp32 margin is more than
rounding can overturn: a split decides where sums are cut, so near-ties may fall otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dak_inductor as dak
from dak_inductor import replanning
from dak_inductor.benchmarks.harness.accuracy import errors
from dak_inductor.benchmarks.harness.generation import freeze, margins
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.placement import LAUNCH_LOCK
from dak_inductor.session import SESSION

ROUNDING = 1e-5
"""Margins below it are near-ties even where the resident itself is computed in fp32."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of the model and of what it generates: `batch` sequences of `prompt` + `new` tokens."""

    hidden: int
    layers: int
    vocabulary: int
    batch: int
    prompt: int
    new: int
    dtype: torch.dtype


ON_GPU = Size(1024, 2, 2048, 4, 24, 760, torch.bfloat16)
"""Weights of one to three pages each, and caches that grow by several."""
ON_CPU = Size(64, 2, 512, 2, 6, 26, torch.float32)


def build(size: Size, seed: int) -> Any:
    """A model of random weights on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(2, size.hidden // 128),
        num_key_value_heads=max(1, size.hidden // 256),
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return freeze(model.to(size.dtype))


@dataclass(frozen=True, slots=True)
class Script:
    """Tokens [batch, prompt + new] of the resident, and which of the new ones were near-ties."""

    tokens: Tensor
    near_tie: Tensor

    def misses(self, taken: Tensor) -> int:
        """Of the first new tokens, taken [batch, count] along the script, those that differ where
        no rounding explains it."""
        count = taken.shape[1]
        start = self.tokens.shape[1] - self.near_tie.shape[1]
        wanted = self.tokens[:, start : start + count]
        return int(((taken != wanted) & ~self.near_tie[:, :count]).sum())


@torch.no_grad()
def script(model: nn.Module, exact: nn.Module, size: Size, prompt: Tensor) -> Script:
    """What the resident `model` generates; `exact` is the same model in fp32."""
    generate: Any = model.generate
    tokens = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=size.new,
        min_new_tokens=size.new,
        do_sample=False,
    )
    own, reference = (each(tokens, use_cache=False).logits.float() for each in (model, exact))
    bound = 2 * errors(own, reference).max_abs + ROUNDING
    near_tie = margins(reference)[:, size.prompt - 1 : -1] <= bound
    return Script(tokens, near_tie)


class SoakModel:
    """An offloaded, compiled model with scripts to follow."""

    def __init__(
        self,
        size: Size,
        *,
        seed: int,
        ratio: float,
        remote: str,
        device: torch.device,
        scripts: int,
        compiler: Callable[[Any], None],
    ) -> None:
        self.size, self.device = size, device
        self.model = build(size, seed)
        resident = copy.deepcopy(self.model).to(device)
        exact = copy.deepcopy(resident).float()
        generator = torch.Generator().manual_seed(seed)
        shape = (scripts * size.batch, size.prompt)
        prompts = torch.randint(1, size.vocabulary, shape, generator=generator).to(device)
        found = script(resident, exact, size, prompts)  # all at once: it is one long loop
        pairs = zip(found.tokens.chunk(scripts), found.near_tie.chunk(scripts), strict=True)
        self.scripts = [Script(*pair) for pair in pairs]
        del resident, exact
        dak.offload(self.model, offload_ratio=ratio, remote=remote)
        compiler(self.model)

    @property
    def record(self) -> OffloadedModel:
        """What `offload` knows of the model."""
        found = record_of(self.model)
        assert found is not None
        return found

    def cache(self, ratio: float) -> Any:
        """A cache with room for a script."""
        length = self.size.prompt + self.size.new + 1
        return dak.kv_cache(self.model, batch=self.size.batch, max_len=length, offload_ratio=ratio)

    def step(self, cache: Any, tokens: Tensor) -> Tensor:
        """The best next token [batch] after `tokens` [batch, count], which go into the cache."""
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = self.model(tokens, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1)

    def move(self, share: float, cache: Any = None) -> int:
        """Move every split, of the weights and of a cache, to about `share` remote; bytes that
        changed memory."""
        buffers = [weight.buffer for weight in self.record.weights.values()]
        if cache is not None:
            buffers += [tensor.buffer for tensor in cache.storage.tensors]
        moved = 0
        with LAUNCH_LOCK:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            for buffer in buffers:
                before = buffer.split
                buffer.move(round((1 - share) * buffer.nbytes))
                moved += abs(buffer.split - before)
        return moved

    def replan(self) -> int:
        """Plan again as at a step boundary; bytes that this moved."""
        with LAUNCH_LOCK:
            SESSION.flush()
            report = replanning.replan(self.record, SESSION.bindings())
        return report.bytes_to_remote + report.bytes_to_local if report is not None else 0

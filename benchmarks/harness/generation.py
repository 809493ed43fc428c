"""Generation with a static cache, and the rule by which two runs of it count as the same.

Same tokens: teacher-forced logits within twice torch's own error against fp32, and equal greedy
tokens wherever the fp32 margin exceeds what both errors can overturn (random weights give
near-ties).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.models import LLAMA3_8B, TINY, Shape

VOCABULARY = {"llama3-8b": 128_256, "tiny": 512}
SHAPES = {"llama3-8b": LLAMA3_8B, "tiny": TINY}

Model = Any
"""A transformers causal language model; transformers is imported late and types it loosely."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What to generate: `batch` random prompts of `prompt` tokens, `new` tokens each."""

    shape: str = "llama3-8b"
    layers: int = 16
    batch: int = 4
    prompt: int = 64
    new: int = 32
    seed: int = 0

    def config(self) -> Any:
        """A transformers LlamaConfig of this shape with untied embeddings."""
        from transformers import LlamaConfig

        shape: Shape = SHAPES[self.shape]
        return LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=VOCABULARY[self.shape],
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        )

    def prompts(self, device: torch.device) -> Tensor:
        """[batch, prompt] token ids, the same on every device."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        high = VOCABULARY[self.shape]
        return torch.randint(1, high, (self.batch, self.prompt), generator=generator).to(device)


def new_model(what: Generation, device: torch.device) -> Model:
    """A bf16 model with random weights, drawn on `device`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(what.seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(what.config())
    finally:
        torch.set_default_dtype(default)
    return freeze(model)


def load_on_cpu(what: Generation, weights: Path) -> Model:
    """The same model with the weights of a safetensors file, mapped into CPU memory."""
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    config = what.config()
    with torch.device("meta"):
        model: Model = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.load_state_dict(load_file(weights), assign=True)
    # its frequencies are a buffer that no checkpoint holds
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return freeze(model)


def freeze(model: Model) -> Model:
    """No gradients, no end of sequence: every generation has its full length."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


@torch.no_grad()
def generate(
    model: Model, what: Generation, device: torch.device, processors: Sequence[Any] = ()
) -> Tensor:
    """Greedy tokens [batch, new] through `generate` with a static cache."""
    prompts = what.prompts(device)
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=what.new,
        min_new_tokens=what.new,
        do_sample=False,
        cache_implementation="static",
        logits_processor=list(processors),
    )
    return output[:, what.prompt :].cpu()


class Forced:
    """A logits processor that keeps what it is given and lets only the wanted tokens [batch, new]
    win."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.tokens[:, len(self.logits)].to(scores.device)
        self.logits.append(scores.float().cpu())
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, wanted[:, None], 0.0)


def teacher_forced(model: Model, what: Generation, tokens: Tensor, device: torch.device) -> Tensor:
    """fp32 logits [batch, new, vocabulary] on the CPU along `tokens` [batch, new].

    They come out of `generate` itself, so prefill, cache and compiled code are those of generation.
    """
    forced = Forced(tokens)
    taken = generate(model, what, device, [forced])
    if not torch.equal(taken, tokens):
        raise RuntimeError("generate did not follow the tokens it was forced to")
    return torch.stack(forced.logits, dim=1)


def margins(reference: Tensor) -> Tensor:
    """Difference between the two best logits, over the last dimension."""
    best = reference.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


@dataclass(frozen=True, slots=True)
class FreeRunning:
    """How far free-running generations agree, and whether every parting was a near-tie."""

    sequences: int
    identical: int
    first_partings: tuple[int, ...]
    excused: bool


def free_running(ours: Tensor, resident: Tensor, reference: Tensor, error: float) -> FreeRunning:
    """Compare tokens [batch, new]; `reference` are fp32 logits along `resident`'s own tokens.

    Up to its first different token a sequence has the resident's history, so the reference margin
    there is the one that counts. It is excused where that margin is at most 2 * `error`.
    """
    near_tie = margins(reference) <= 2 * error
    partings, excused = [], True
    for row in range(ours.shape[0]):
        different = (ours[row] != resident[row]).nonzero()
        if len(different):
            first = int(different[0])
            partings.append(first)
            excused = excused and bool(near_tie[row, first])
    identical = ours.shape[0] - len(partings)
    return FreeRunning(ours.shape[0], identical, tuple(partings), excused)

"""A whole transformers model behind the interface of the peers: its layers, their linears, a step.

The weights that are divided are the linears of the layers, for every peer alike. Embedding and
head stay on the device: in a model cut to a few layers they are a far larger share than in the
full one, and a planner would find room there that the full model has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dak_inductor.benchmarks.harness.yardstick import Work

PREFILL, DECODE, FORWARD = "prefill", "decode", "forward"
MASK_WANTED = ("opt",)
"""Model types that, given no mask, make one as long as the cache says it is: a read of device
memory, which no capture allows."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of equal layers; what the peers ask of `models.Shape`."""

    layers: int
    sizes: tuple[tuple[str, tuple[int, int]], ...]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each linear of a layer, in the order in which they are declared."""
        return dict(self.sizes)

    @property
    def layer_elements(self) -> int:
        return sum(rows * columns for _, (rows, columns) in self.sizes)


@dataclass(slots=True)
class PhaseInputs:
    """Arguments of a step. `phase` says of which: the one object serves prefill and decode.

    tensors: by phase, token ids [batch, tokens] or pixels [batch, channels, height, width].
    """

    tensors: dict[str, Tensor]
    phase: str
    start: dict[str, int] = field(default_factory=dict)

    def arguments(self) -> tuple[object, ...]:
        """In the order of `WholeModel.forward`."""
        return self.tensors[self.phase], self.start.get(self.phase, 0)


class WholeModel(nn.Module):
    """A model with a static KV cache (decoders) or without one (encoders).

    `forward(tensor, start)` returns the logits of the last token [batch, vocabulary], or an
    encoder's hidden states. A step at `start` writes the cache's entries from there on, so it may
    be run again and again: the layers' positions are set first.
    """

    def __init__(self, model: Any, *, length: int, batch: int) -> None:
        super().__init__()
        self.model = model
        self.layers = decoder_layers(model)
        self.pixels = getattr(model, "main_input_name", "") == "pixel_values"
        self.generates = bool(getattr(model, "can_generate", lambda: False)())
        self.wants_mask = model.config.model_type in MASK_WANTED
        self.cache: Any = _static_cache(model, batch, length) if self.generates else None

    def forward(self, tensor: Tensor, start: int) -> Tensor:
        if self.pixels:
            hidden: Tensor = self.model(pixel_values=tensor).last_hidden_state
            return hidden
        if self.cache is None:
            hidden = self.model(input_ids=tensor).last_hidden_state
            return hidden
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(start)
        batch, length = tensor.shape[0], start + tensor.shape[1]
        positions = torch.arange(start, length, device=tensor.device)
        mask = torch.ones(batch, length, device=tensor.device) if self.wants_mask else None
        logits: Tensor = self.model(
            input_ids=tensor,
            attention_mask=mask,
            position_ids=positions.expand(batch, -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def linears(self) -> Iterator[tuple[int, str, nn.Linear]]:
        """(layer, name, module) of every linear of the layers."""
        for index, layer in enumerate(self.layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    yield index, name, module

    @property
    def shape(self) -> LayerShape:
        """Raises ValueError where the layers differ."""
        found = {
            index: tuple(
                (name, (linear.out_features, linear.in_features))
                for at, name, linear in self.linears()
                if at == index
            )
            for index in range(len(self.layers))
        }
        if len(set(found.values())) != 1:
            raise ValueError(f"the {len(found)} layers differ in their linears")
        return LayerShape(len(found), found[0])

    @property
    def linear_bytes(self) -> int:
        """Bytes of all weights that may be remote."""
        return sum(linear.weight.nbytes for _, _, linear in self.linears())

    def kept_on_device(self) -> dict[str, str]:
        """A placement that leaves to the planner what the peers may divide, and nothing else."""
        ours = {id(linear.weight) for _, _, linear in self.linears()}
        return {name: "gpu" for name, weight in self.named_parameters() if id(weight) not in ours}

    def phase_inputs(self, *, batch: int, prompt: int, seed: int) -> PhaseInputs:
        """Random tokens or pixels on the model's device, the same for one seed."""
        weight = next(self.model.parameters())
        generator = torch.Generator().manual_seed(seed)
        config = self.model.config
        if self.pixels:
            sizes = (batch, config.num_channels, config.image_size, config.image_size)
            pixels = torch.randn(sizes, generator=generator).to(weight.device, weight.dtype)
            return PhaseInputs({FORWARD: pixels}, FORWARD)
        ids = torch.randint(1, config.vocab_size, (batch, prompt + 1), generator=generator)
        ids = ids.to(weight.device)
        if self.cache is None:
            return PhaseInputs({FORWARD: ids[:, :prompt].contiguous()}, FORWARD)
        tensors = {PREFILL: ids[:, :prompt].contiguous(), DECODE: ids[:, prompt:].contiguous()}
        return PhaseInputs(tensors, PREFILL, {PREFILL: 0, DECODE: prompt})

    def work(self, phase: str, *, batch: int, tokens: int, remote_bytes: float) -> Work:
        """What one step must move and compute; `tokens` is the length of a sequence after it.

        A decode step reads the head, one embedding row per sequence, and all keys and values; a
        prefill writes them and applies the head to one token of each sequence.
        """
        linear = self.linear_bytes
        itemsize = next(self.model.parameters()).itemsize
        head = self._head_bytes()
        new = 1 if phase == DECODE else tokens
        attended = tokens if phase == DECODE else tokens / 2 if self.generates else tokens
        width = self.model.config.hidden_size
        flops = 2 * batch * new * linear / itemsize + 2 * batch * head / itemsize
        flops += 4.0 * len(self.layers) * batch * new * attended * width
        return Work(
            local_bytes=linear - remote_bytes + head + self._cache_bytes(batch, tokens),
            remote_bytes=remote_bytes,
            flops=flops,
        )

    def _head_bytes(self) -> int:
        head = self.model.get_output_embeddings() if self.generates else None
        return 0 if head is None else int(head.weight.nbytes)

    def _cache_bytes(self, batch: int, tokens: int) -> int:
        if self.cache is None:
            return 0
        return sum(
            2 * batch * layer.keys.shape[1] * tokens * layer.keys.shape[3] * layer.keys.itemsize
            for layer in self.cache.layers
        )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of modules that holds most parameters: the decoder's, or the encoder's, layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _static_cache(model: Any, batch: int, length: int) -> Any:
    """With its tensors in place: a step that is captured or compiled must not make them."""
    from transformers import StaticCache

    text = model.config.get_text_config()
    weight = next(model.parameters())
    cache = StaticCache(config=text, max_cache_len=length)
    cache.early_initialization(
        batch_size=batch,
        num_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        dtype=weight.dtype,
        device=weight.device,
    )
    return cache

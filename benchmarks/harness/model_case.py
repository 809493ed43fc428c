"""Cases of `dak bench`: a model, how many of its layers, a batch, a share, and who runs it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dak_inductor.benchmarks.harness.peers.accelerate_offload import AccelerateOffload
from dak_inductor.benchmarks.harness.peers.dak_backend import DakBackend
from dak_inductor.benchmarks.harness.peers.layer_prefetch import LayerPrefetch
from dak_inductor.benchmarks.harness.peers.linear_prefetch import LinearPrefetch
from dak_inductor.benchmarks.harness.peers.provider import Provider
from dak_inductor.benchmarks.harness.peers.resident import Resident
from dak_inductor.benchmarks.harness.peers.split import StockOnSplit
from dak_inductor.presets import read_config

MEASURED, SIMULATION, PREDICTION = "measured", "simulation", "prediction"
"""What a figure is: a time on a card; a run on the simulated tier; the cost model's word."""

DECODERS = ("llama-3-8b", "qwen2.5-14b", "mistral-7b", "opt-30b")
ENCODERS = ("bert-large", "vit-huge")
MODELS = (*DECODERS, *ENCODERS)
BY_NAME_ALONE = ("dak reduce-overhead",)
"""Providers of whole models that run only where they are asked for: this backend in another way."""
PLANNER = "dak plan"
"""The provider of predictions."""

_TINY: Mapping[str, Any] = {
    "hidden_size": 64, "word_embed_proj_dim": 64, "intermediate_size": 128, "ffn_dim": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "image_size": 32,
    "patch_size": 8, "num_hidden_layers": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One row to be. `layers` of the model's are built; `share` of their linears is remote.

    prompt: tokens of each sequence; an encoder over images has its own number.
    new:    tokens generated for each prompt, from which tokens/s is reckoned.
    """

    figure: str
    model: str
    provider: str
    layers: int
    batch: int
    prompt: int
    new: int
    share: float
    hardware: str = "h200"
    remote: str = "cpu"

    @property
    def key(self) -> str:
        """Names the case in a record; `--resume` goes by it."""
        where = f" {self.hardware}" if self.figure == PREDICTION else ""
        return (
            f"{self.figure}{where} {self.model} x{self.layers} b{self.batch} p{self.prompt} "
            f"n{self.new} {self.share:g} {self.remote}: {self.provider}"
        )

    def fields(self) -> dict[str, object]:
        """What a row begins with."""
        return {"case": self.key, **asdict(self), "model_layers": full_layers(self.model)}


def whole_model_providers() -> dict[str, Provider]:
    """The peers that run any model, by name; `dak` second, so that a short run has it.

    Prefetchers that compile block by block know the blocks of `models.py` alone.
    """
    made: tuple[Provider, ...] = (
        Resident(compiled=True),
        DakBackend(),
        StockOnSplit(compiled=True),
        LayerPrefetch(compiled=False, charged=True),
        LinearPrefetch(compiled=False),
        StockOnSplit(compiled=False),
        LayerPrefetch(compiled=False, charged=False),
        AccelerateOffload(),
        Resident(compiled=False),
        DakBackend(mode="reduce-overhead"),
    )
    return {provider.name: provider for provider in made}


def config_values(model: str, layers: int, *, tiny: bool) -> dict[str, Any]:
    """The preset's config with `layers` layers, and with small sizes for `tiny`."""
    values = read_config(model)
    if tiny:
        values |= {name: size for name, size in _TINY.items() if name in values}
        values.pop("head_dim", None)
        values["dtype"] = "bfloat16"
    return values | {"num_hidden_layers": layers}


def full_layers(model: str) -> int:
    return int(read_config(model)["num_hidden_layers"])


def measured_cases(
    models: Sequence[str],
    *,
    layers: int | None,
    batches: Sequence[int],
    shares: Sequence[float],
    providers: Sequence[str],
    prompt: int,
    new: int,
    remote: str,
    figure: str = MEASURED,
) -> list[Case]:
    """Grouped by model and setting, so that peers of one comparison run one after the other.

    All resident knows no share: it is measured once for each model and batch. `layers` is cut to
    what a model has; None: all.
    """
    found = []
    for model, batch, share in itertools.product(models, batches, shares):
        count = min(layers or full_layers(model), full_layers(model))
        length = min(prompt, 512) if model == "bert-large" else prompt
        for provider in providers:
            resident = provider.startswith("resident")
            if resident and share != shares[0]:
                continue
            asked = 0.0 if resident else share
            found.append(Case(figure, model, provider, count, batch, length, new, asked,
                              remote=remote))  # fmt: skip
    return found


def predicted_cases(
    models: Sequence[str],
    *,
    batches: Sequence[int],
    shares: Sequence[float],
    prompt: int,
    new: int,
    hardware: str,
    remote: str,
) -> list[Case]:
    """Full models; those that differ in the share alone follow each other and are traced once."""
    return [
        Case(PREDICTION, model, PLANNER, full_layers(model), batch,
             min(prompt, 512) if model == "bert-large" else prompt, new, share, hardware, remote)
        for model, batch, share in itertools.product(models, batches, shares)
    ]  # fmt: skip

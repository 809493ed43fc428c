"""`kv_cache`: a KV cache in GPU memory and a remote tier, for models of transformers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dak_inductor.attention_switch import use_attention_function
from dak_inductor.budget import device_budget
from dak_inductor.byte_size import asked_host_memory
from dak_inductor.cuda_runtime.host_memory import available_host_memory
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.errors import CacheError, ModelError, OptionError, TierError
from dak_inductor.kv_cache_geometry import CacheGeometry, keeps_latents, read_geometry
from dak_inductor.kv_cache_plan import join, place_with_weights, splits_by_ratio
from dak_inductor.kv_cache_storage import CacheStorage
from dak_inductor.kv_cache_tensors import TensorPlan, tensor_plans
from dak_inductor.offload_request import check_ratio
from dak_inductor.offloaded import note_change, record_of
from dak_inductor.offloaded_model import OffloadedModel, places
from dak_inductor.placement import LAUNCH_LOCK
from dak_inductor.quantity_text import bytes_text, count_text

if TYPE_CHECKING:
    from dak_inductor.kv_cache_layers import TieredCache

PREFILL_CHUNK = 1024
"""Tokens that a sliding layer has room for beside its window."""


def kv_cache(
    model: nn.Module,
    *,
    batch: int,
    max_len: int,
    dtype: torch.dtype | None = None,
    offload_ratio: float | None = None,
    remote: str | None = None,
    host_memory: str | int | None = None,
    expected_len: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    attention: bool = True,
) -> TieredCache:
    """A static KV cache whose tokens lie partly in a remote tier, for `generate` or `model(...)`:

        cache = dak.kv_cache(model, batch=1, max_len=100_000)
        model.generate(prompt, past_key_values=cache, max_new_tokens=500)

    Of each layer the first tokens lie on the GPU and the rest in the remote tier. Memory is taken
    as the context grows, and freed with the cache. Prints one line.

    Args:
        model: a decoder of transformers. Offloaded with `gpu_memory`, weights and cache share that
            budget: the plan weighs them against each other. Not offloaded: say `offload_ratio`.
        batch: sequences, beams counted; every step has that many.
        max_len: tokens of each sequence, prompt and padding included.
        dtype: of keys and values; default the model's.
        offload_ratio: the share of the cache's bytes at full length that is remote, 0 to 1;
            default that of the model.
        remote: the tier, as in `offload`; default the model's, which no other may stand beside.
        host_memory: as in `offload`, for a model that is not offloaded.
        expected_len: tokens to plan for; default half of `max_len`.
        prefill_chunk: tokens that sliding-window layers take at once behind earlier ones.
        attention: switch the model to the attention function "dak", which reads no more than the
            tokens that are there (`dak_inductor.attention_function`); else its own stays.

    Raises:
        CacheError, ModelError, OptionError, BudgetError, TierError, HostMemoryError, MoveError:
        nothing is changed then.
    """
    module = getattr(model, "_orig_mod", model)
    layers = _cache_layers()
    record = record_of(module)
    _check_options(record, offload_ratio, remote, host_memory)
    geometry = read_geometry(
        _config(module),
        batch=batch,
        max_len=max_len,
        dtype=dtype or _dtype(module),
        latents=keeps_latents(module),
    )
    expected = _expected(expected_len, max_len)
    chunk = _positive("prefill_chunk", prefill_chunk)
    with LAUNCH_LOCK, torch.inference_mode(False), torch.no_grad():
        plans = tensor_plans(geometry, label=_label(record), prefill_chunk=chunk)
        if record is not None and record.offload_ratio is None and offload_ratio is None:
            storage = place_with_weights(record, geometry, plans, expected=expected)
        else:
            storage = _place_by_ratio(
                module, record, geometry, plans,
                ratio=offload_ratio, remote=remote, host_memory=host_memory, expected=expected,
            )  # fmt: skip
        cache = layers.TieredCache(storage)
    refused = use_attention_function(module) if attention else None
    print(_line(module, storage, refused))
    return cache


def _place_by_ratio(
    module: nn.Module,
    record: OffloadedModel | None,
    geometry: CacheGeometry,
    plans: tuple[TensorPlan, ...],
    *,
    ratio: float | None,
    remote: str | None,
    host_memory: str | int | None,
    expected: int,
) -> CacheStorage:
    """A cache whose splits stay as they were asked for."""
    if record is not None:
        tier, device = record.tier, record.device
        ratio = record.offload_ratio if ratio is None else ratio
    else:
        tier, device = _open_tier(module, remote or "cpu", host_memory)
    assert ratio is not None
    splits = splits_by_ratio(geometry, plans, ratio, tier=tier, device=device, expected=expected)
    storage = CacheStorage(geometry, tier, device, plans, splits, fixed=True, expected=expected)
    if record is not None:
        join(record, storage)
    else:
        device_budget(device).loose_caches.add(storage)
        note_change()
    return storage


def _check_options(
    record: OffloadedModel | None,
    ratio: float | None,
    remote: str | None,
    host_memory: str | int | None,
) -> None:
    check_ratio(ratio, of="the cache's bytes")
    if record is None:
        if ratio is None:
            raise OptionError(
                "this model is not offloaded, so there is no budget to share: say offload_ratio= "
                '(and remote=, by default "cpu"), or call dak.offload(model, gpu_memory=...) first'
            )
        return
    if remote is not None and remote != record.remote:
        raise OptionError(
            f"remote={remote!r}: the model's remote tier is {record.remote!r}, and its cache lies "
            "there too; leave remote out"
        )
    if host_memory is not None:
        raise OptionError("host_memory was said in dak.offload and holds for the cache too")


def _open_tier(
    module: nn.Module, remote: str, host_memory: str | int | None
) -> tuple[Tier, torch.device]:
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    wanted = "cpu" if remote == "simulated" else "cuda"
    if device.type != wanted:
        raise TierError(
            f"remote={remote!r} is for a model on {wanted}, and this one is on {device}: move the "
            "model, or say another remote"
        )
    return open_tier(remote, device=device, host_memory=asked_host_memory(host_memory)), device


def _cache_layers() -> Any:
    try:
        from dak_inductor import kv_cache_layers
    except ImportError as error:
        raise ModelError(
            f"dak.kv_cache makes a cache for models of transformers 5, which cannot be imported: "
            f"{error}"
        ) from error
    return kv_cache_layers


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    if config is None:
        raise ModelError(
            f"{type(module).__name__} has no config: dak.kv_cache serves models of transformers"
        )
    return config


def _dtype(module: nn.Module) -> torch.dtype:
    """That of the weights, which is what layers hand to a cache."""
    own = getattr(module, "dtype", None)
    if isinstance(own, torch.dtype) and own.is_floating_point:
        return own
    for parameter in module.parameters():
        if parameter.dtype.is_floating_point:
            return parameter.dtype
    raise CacheError(f"{type(module).__name__} has no floating-point parameters: say dtype=")


def _expected(expected_len: int | None, max_len: int) -> int:
    if expected_len is None:
        return max(1, max_len // 2)
    return min(max_len, _positive("expected_len", expected_len))


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise OptionError(f"{name}={value!r}: a whole number above zero")
    return value


def _label(record: OffloadedModel | None) -> str:
    """A name that no cache of the model has. Those of caches that are gone are used again: a
    server makes one for each request, and reads are counted by name."""
    taken = (
        set() if record is None else {tensor.name.partition(".")[0] for tensor in record.tensors()}
    )
    names = (f"kv_cache{number}" if number else "kv_cache" for number in itertools.count())
    return next(name for name in names if name not in taken)


def _line(module: nn.Module, storage: CacheStorage, refused: str | None) -> str:
    """One line for the user: what will lie where."""
    planned, geometry = storage.planned_bytes(), storage.geometry
    place, far = places(storage.device, storage.tier.name)
    share = 100 * planned.remote / max(1, planned.total)
    text = (
        f"dak: KV cache of {type(module).__name__}, {count_text(len(geometry.layers), 'layer')}, "
        f"batch {geometry.batch}, up to {count_text(geometry.max_len, 'token')}, "
        f"{bytes_text(planned.total)}: {bytes_text(planned.local)} {place}, "
        f"{bytes_text(planned.remote)} {far} ({share:.1f}%), taken as the context grows"
    )
    if storage.tier.name == "cpu":
        asked: int | None = getattr(storage.tier, "host_memory", None)
        room = available_host_memory() if asked is None else asked
        if planned.remote > room:
            text += f"; at full length that is more than the {bytes_text(room)} of host memory left"
    return text if refused is None else f"{text}; stock attention: {refused}"

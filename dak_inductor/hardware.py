"""Which profile a machine is planned with: what `dak probe` measured on it, one of those shipped
with the package, or a guess."""

from __future__ import annotations

import functools
import hashlib
import warnings
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dak_inductor.errors import ProfileError
from dak_inductor.hardware_profile import GUESSED, HardwareProfile, LinkProfile
from dak_inductor.options import cache_folder
from dak_inductor.private_files import is_private, private_folder, publish

if TYPE_CHECKING:
    import torch

WITHOUT_GPU = "h200"


@functools.cache
def shipped() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    folder = resources.files("dak_inductor") / "profiles"
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".json")))


@functools.cache
def _load_shipped(name: str) -> HardwareProfile:
    path = resources.files("dak_inductor") / "profiles" / f"{name}.json"
    return HardwareProfile.from_json(path.read_text(encoding="utf-8"))


def load(name_or_path: str | Path) -> HardwareProfile:
    """A shipped profile by name, or the profile in a JSON file. Raises ProfileError."""
    if str(name_or_path) in shipped():
        return _load_shipped(str(name_or_path))
    path = Path(name_or_path)
    if not path.is_file():
        raise ProfileError(
            f"no hardware profile {str(name_or_path)!r}: it is neither a file nor one of "
            f"{', '.join(shipped())}; `dak probe --out FILE` writes that of this machine"
        )
    try:
        return HardwareProfile.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"hardware profile {path} cannot be read: {error}") from error
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error


def cached_path(gpu: str, uuid: str) -> Path:
    """Where the profile measured on the GPU of that name and UUID is kept."""
    word = "".join(c if c.isalnum() else "-" for c in gpu.lower()).strip("-")
    card = hashlib.sha256(uuid.encode()).hexdigest()[:16]
    return cache_folder() / "profiles" / f"{word}-{card}.json"


def save(profile: HardwareProfile, uuid: str) -> Path | None:
    """Keep `profile` for the GPU with this UUID; None where the cache folder cannot be written."""
    path = cached_path(profile.gpu, uuid)
    if private_folder(path.parent) is None:
        return None
    return path if publish(path, profile.to_json().encode()) else None


def current(device: torch.device | int | str | None = None) -> HardwareProfile:
    """The profile of this GPU: what `dak probe` measured, else the shipped one, else a guess.

    A damaged measurement counts as none, with a warning. Without a GPU it is the shipped H200.
    """
    import torch

    if not torch.cuda.is_available():
        return load(WITHOUT_GPU)
    chosen = torch.device(device_name(device))
    if chosen.type != "cuda":
        return load(WITHOUT_GPU)
    properties = torch.cuda.get_device_properties(chosen)
    return for_gpu(
        properties.name,
        gpu_uuid(properties),
        sm_count=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
    )


def device_name(device: torch.device | int | str | None) -> torch.device | str:
    """torch itself takes a bare number for a GPU only where it sees one."""
    if device is None:
        return "cuda"
    return f"cuda:{device}" if isinstance(device, int) else device


def gpu_uuid(properties: Any) -> str:
    """UUID in torch's device properties; the empty text where this torch does not tell it."""
    return str(getattr(properties, "uuid", ""))


def for_gpu(gpu: str, uuid: str, *, sm_count: int, memory_bytes: int) -> HardwareProfile:
    """What `current` answers for a GPU with these properties."""
    path = cached_path(gpu, uuid)
    if is_private(path.parent) and path.is_file():
        try:
            return load(path)
        except ProfileError as error:
            _warn_once(f"the measured hardware profile is damaged and ignored: {error}")
    for name in shipped():
        profile = load(name)
        # the count of SMs keeps a slice of a card (MIG) from planning with the whole card's figures
        if gpu.startswith(profile.gpu) and profile.sm_count == sm_count:
            return profile
    _warn_once(f"no hardware profile for {gpu}: planning with a guess; `dak probe` measures it")
    return generic(gpu, sm_count=sm_count, memory_bytes=memory_bytes)


def generic(gpu: str, *, sm_count: int, memory_bytes: int) -> HardwareProfile:
    """A cautious guess: a card of 1 TB/s and 1 TFLOP/s of bf16 per SM behind PCIe Gen4 x16."""
    guess = "guessed, not measured: run `dak probe`"
    cpu = LinkProfile("cpu", 22e9, 25e9, 22e9, 2.3e-6, 100_000, 300_000, 5.1, guess)
    peer = LinkProfile("peer", 22e9, 25e9, 22e9, 2.3e-6, 100_000, 300_000, 5.1, guess)
    return HardwareProfile(
        name=GUESSED,
        gpu=gpu,
        sm_count=sm_count,
        memory_bytes=memory_bytes,
        hbm_bandwidth=1e12,
        matmul_flops={"bfloat16": sm_count * 1e12, "float16": sm_count * 1e12},
        operator_floor=2e-6,
        links={"cpu": cpu, "peer": peer},
        provenance=guess,
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)

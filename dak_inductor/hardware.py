"""What a machine can do, as measured or as published: the numbers that the planner plans with.

Sizes are bytes, bandwidths bytes per second, times seconds. A profile is a frozen record that goes
to JSON and back; `dak probe` measures one, three are shipped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dak_inductor.errors import ProfileError
from dak_inductor.options import cache_folder
from dak_inductor.private_files import is_private, private_folder, publish

if TYPE_CHECKING:
    import torch

VERSION = 1
WITHOUT_GPU = "h200"
GUESSED = "generic"
_SMALLEST, _LARGEST = 1e-18, 1e24  # of any number: sums and quotients of such are finite


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """One link from the GPU to a remote tier. "Window": bytes requested and not yet arrived."""

    tier: str  # "cpu" or "peer"
    direct_bandwidth: float  # kernels reading remote memory into shared memory
    copy_bandwidth: float  # copy engine, remote to GPU, one large copy
    write_bandwidth: float  # kernels writing remote memory
    latency: float  # one request, round trip
    window_floor: int  # smallest window within 2% of direct_bandwidth
    window_knee: int  # largest window at which HBM streaming loses at most 2%
    copy_interference: float  # HBM bytes/s lost per byte/s that the copy engine brings in
    provenance: str
    copy_out_bandwidth: float = 0.0  # copy engine, GPU to remote; 0: not known
    piece_copy_bandwidth: float = (
        0.0  # as copy_bandwidth, in 4 MiB pieces of a CUDA graph; 0: ditto
    )

    def __post_init__(self) -> None:
        if self.tier not in ("cpu", "peer"):
            raise ProfileError(f'link tier {self.tier!r} is neither "cpu" nor "peer"')
        where = f"link {self.tier!r}"
        for name in ("direct_bandwidth", "copy_bandwidth", "write_bandwidth", "latency"):
            _check_number(where, name, getattr(self, name), above_zero=True)
        for name in ("copy_interference", "copy_out_bandwidth", "piece_copy_bandwidth"):
            _check_number(where, name, getattr(self, name), above_zero=False)
        for name in ("window_floor", "window_knee"):
            _check_integer(where, name, getattr(self, name))
        _check_text(where, "provenance", self.provenance)


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One GPU and its links. `links` has the keys "cpu" and, where there is one, "peer"."""

    name: str
    gpu: str  # as the driver names it
    sm_count: int
    memory_bytes: int
    hbm_bandwidth: float  # bulk reads by all SMs
    matmul_flops: Mapping[str, float]  # by dtype name: "bfloat16", "float16"
    operator_floor: float  # one small kernel inside a CUDA graph
    links: Mapping[str, LinkProfile]
    provenance: str
    version: int = VERSION

    @property
    def is_guess(self) -> bool:
        """Whether nobody measured a machine like this one."""
        return self.name == GUESSED

    def __post_init__(self) -> None:
        if self.version != VERSION or isinstance(self.version, bool):
            raise ProfileError(
                f"hardware profile of version {self.version!r}; this release reads version "
                f"{VERSION}: measure again with `dak probe`"
            )
        where = f"hardware profile {self.name!r}"
        for name in ("name", "gpu", "provenance"):
            _check_text(where, name, getattr(self, name))
        for name in ("sm_count", "memory_bytes"):
            _check_integer(where, name, getattr(self, name))
        for name in ("hbm_bandwidth", "operator_floor"):
            _check_number(where, name, getattr(self, name), above_zero=True)
        if not isinstance(self.matmul_flops, Mapping) or not self.matmul_flops:
            raise ProfileError(f"{where}: matmul_flops must name at least one dtype")
        for dtype, flops in self.matmul_flops.items():
            _check_number(where, f"matmul_flops[{dtype!r}]", flops, above_zero=True)
        if not isinstance(self.links, Mapping):
            raise ProfileError(f"{where}: links must be a mapping from tier to link")
        for tier, link in self.links.items():
            if not isinstance(link, LinkProfile) or link.tier != tier:
                raise ProfileError(f"{where}: links[{tier!r}] is not a link of tier {tier!r}")
        object.__setattr__(self, "matmul_flops", MappingProxyType(dict(self.matmul_flops)))
        object.__setattr__(self, "links", MappingProxyType(dict(self.links)))

    def link(self, remote: str) -> LinkProfile:
        """The link to `remote`: "cpu", "cuda" or "cuda:N", or "simulated" (planned like "cpu").

        Raises ProfileError where the profile has no such link.
        """
        if remote in ("cpu", "simulated"):
            tier = "cpu"
        elif remote == "peer" or remote == "cuda" or remote.startswith("cuda:"):
            tier = "peer"
        else:
            raise ProfileError(
                f'remote tier {remote!r} is unknown; there are "cpu", "cuda:N" and "simulated"'
            )
        if tier not in self.links:
            there = ", ".join(sorted(self.links)) or "none"
            raise ProfileError(
                f"hardware profile {self.name!r} has no {tier!r} link (it has: {there}); measure "
                "this machine with `dak probe`, or name a profile that has one"
            )
        return self.links[tier]

    def to_json(self) -> str:
        """Versioned JSON that `from_json` reads back to an equal record."""
        record: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        record["matmul_flops"] = dict(self.matmul_flops)
        record["links"] = {tier: dataclasses.asdict(link) for tier, link in self.links.items()}
        return json.dumps({"version": record.pop("version"), **record}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> HardwareProfile:
        """The record in `text`. Raises ProfileError where it is damaged or of another version."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"hardware profile is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ProfileError(f"hardware profile is a JSON {type(record).__name__}, not an object")
        if record.get("version") != VERSION:
            raise ProfileError(
                f"hardware profile of version {record.get('version')!r}; this release reads "
                f"version {VERSION}: measure again with `dak probe`"
            )
        _check_keys("hardware profile", cls, record)
        links = record["links"]
        if not isinstance(links, dict):
            raise ProfileError("hardware profile: links must be an object")
        read: dict[str, LinkProfile] = {}
        for tier, link in links.items():
            if not isinstance(link, dict):
                raise ProfileError(f"hardware profile: links[{tier!r}] must be an object")
            _check_keys(f"link {tier!r}", LinkProfile, link)
            read[tier] = LinkProfile(**link)
        return cls(**{**record, "links": read})


def _check_keys(where: str, record_type: type, record: Mapping[str, Any]) -> None:
    known = {f.name for f in fields(record_type)}
    wanted = {f.name for f in fields(record_type) if f.default is dataclasses.MISSING} | {"version"}
    missing, unknown = sorted((wanted & known) - record.keys()), sorted(record.keys() - known)
    if missing or unknown:
        raise ProfileError(f"{where}: missing {missing or 'none'}, unknown {unknown or 'none'}")


def _check_number(where: str, name: str, value: object, *, above_zero: bool) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else -1
    if not (_SMALLEST <= number <= _LARGEST or (number == 0 and not above_zero)):
        sign = "above zero" if above_zero else "of zero or more"
        raise ProfileError(f"{where}: {name} is {value!r}; a finite number {sign} is needed")


def _check_integer(where: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise ProfileError(f"{where}: {name} is {value!r}; a whole number above zero is needed")


def _check_text(where: str, name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ProfileError(f"{where}: {name} is {value!r}; a text is needed")


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

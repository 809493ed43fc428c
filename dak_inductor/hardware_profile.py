"""What a machine can do, as measured or as published: the numbers that the planner plans with.

Sizes are bytes, bandwidths bytes per second, times seconds. A profile is a frozen record that goes
to JSON and back.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from dak_inductor.errors import ProfileError

VERSION = 1
GUESSED = "generic"
_CAPABILITY = re.compile(r"(\d+\.\d+)?")
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
    piece_copy_bandwidth: float = 0.0  # in 4 MiB pieces of a CUDA graph; 0: not known

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
    compute_capability: str = ""  # "9.0"; "": not known

    @property
    def capability(self) -> tuple[int, int] | None:
        """`compute_capability` as major and minor; None where it is not known."""
        major, _, minor = self.compute_capability.partition(".")
        return (int(major), int(minor)) if minor else None

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
        if not isinstance(self.compute_capability, str) or not _CAPABILITY.fullmatch(
            self.compute_capability
        ):
            raise ProfileError(
                f"{where}: compute_capability is {self.compute_capability!r}; a text such as "
                '"9.0" is needed, or "" where it is not known'
            )
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

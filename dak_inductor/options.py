"""Options of the backend, and the only place that reads the environment.

An option may come from `torch.compile(..., backend="dak", options={...})` or from a variable
`DAK_<OPTION>`; the call wins. Keys that are neither ours nor Inductor's raise.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from dak_inductor.errors import OptionError

Strategy = Literal["auto", "direct", "staged"]
WindowOption = int | Literal["auto"]

log = logging.getLogger(__name__)

VARIABLES = ("strategy", "window", "strict", "plan", "trials", "nvtx", "cache")
"""In the environment they are DAK_STRATEGY and so on."""

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}
_OF_OFFLOAD = {"checkpoint", "gpu_memory", "host_memory", "offload_ratio", "placement", "remote"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """What the user may ask of the backend.

    strategy: how remote rows of products reach the SMs: read in place ("direct"), copied ahead of
              the product wherever that can be ("staged"), or what is predicted to be faster
              ("auto").
    window:   bytes in flight per link, or "auto": kernels adapt them to the delays that they see;
              None leaves a link's window as it is.
    strict:   raise instead of warn where nothing is offloaded or a weight became resident.
    plan:     a plan, or the path of a plan file, that is applied instead of the planner's own.
    trials:   whether products are timed to choose their way; None leaves it as it is, at first on.
    nvtx:     whether calls and operators are NVTX ranges; None leaves it as it is, at first off.
    """

    strategy: Strategy = "auto"
    window: WindowOption | None = None
    strict: bool = False
    plan: Any = None
    trials: bool | None = None
    nvtx: bool | None = None


@dataclass(frozen=True, slots=True)
class ParsedOptions:
    """`backend` is ours; `inductor` are the config patches handed to `compile_fx`."""

    backend: BackendOptions
    inductor: dict[str, Any]


def environment(name: str) -> str | None:
    """The value of the variable `DAK_<NAME>`, or None. The package reads the environment only
    here."""
    return os.environ.get(f"DAK_{name.upper()}")


def inductor_variable(name: str) -> str | None:
    """The value of Inductor's variable `TORCHINDUCTOR_<NAME>`, or None: its configuration does not
    tell what a variable says from what is so by default."""
    return os.environ.get(f"TORCHINDUCTOR_{name}")


def cache_folder() -> Path:
    """Where probed profiles and compiled kernels are kept: $DAK_CACHE, else the XDG cache
    folder."""
    own = environment("cache")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dak_inductor"


def parse(mode: str | None, options: Mapping[str, Any] | None) -> ParsedOptions:
    """Split what `torch.compile` hands over into our options and Inductor's.

    `mode` may stand among the options, since torch refuses `mode=` next to `options=`.

    Raises:
        OptionError: a key that neither side knows, a value out of range, or two different modes.
    """
    given = dict(options or {})
    own_mode = given.pop("mode", None)
    if mode is not None and own_mode is not None and mode != own_mode:
        raise OptionError(
            f"mode is given twice: mode={mode!r} and options['mode']={own_mode!r}; leave one out"
        )
    mode = mode if mode is not None else own_mode

    own = {
        field.name: given.pop(field.name) for field in fields(BackendOptions) if field.name in given
    }
    backend = _check(BackendOptions(**{**_from_environment(), **own}))
    return ParsedOptions(backend, {**_mode_patches(mode), **_inductor_patches(given)})


@lru_cache(maxsize=1)
def _warn_of_unknown_variables() -> None:
    """Once per process: a variable that is spelled otherwise has no effect."""
    for name in sorted(os.environ):
        own = name.removeprefix("DAK_").lower()
        if name.startswith("DAK_") and own not in VARIABLES:
            close = difflib.get_close_matches(own, VARIABLES, n=1)
            hint = f"; did you mean DAK_{close[0].upper()}?" if close else ""
            log.warning("%s is no variable of this backend%s", name, hint)


def _from_environment() -> dict[str, Any]:
    _warn_of_unknown_variables()
    found: dict[str, Any] = {}
    for name in ("strategy", "plan"):
        if (value := environment(name)) is not None:
            found[name] = value
    if (value := environment("window")) is not None:
        if value != "auto" and not re.fullmatch("[0-9]{1,10}", value):
            raise OptionError(f"DAK_WINDOW={value!r} is neither a number of bytes nor auto")
        found["window"] = value if value == "auto" else int(value)
    if (value := environment("strict")) is not None:
        found["strict"] = _switch("DAK_STRICT", value)
    if (value := environment("trials")) is not None:
        found["trials"] = _switch("DAK_TRIALS", value)
    if (value := environment("nvtx")) is not None:
        found["nvtx"] = _switch("DAK_NVTX", value)
    return found


def copies_ahead_by_default() -> bool:
    """Whether remote rows may be copied ahead where no graph was compiled with the option
    `strategy`: models are placed for it when they are offloaded, before any graph."""
    return environment("strategy") != "direct"


def trials_by_default() -> bool:
    """Whether products are timed where no graph was compiled with the option `trials`.

    Raises OptionError.
    """
    value = environment("trials")
    return value is None or _switch("DAK_TRIALS", value)


def nvtx_by_default() -> bool:
    """Whether there are NVTX ranges where no graph was compiled with the option `nvtx`.

    Raises OptionError.
    """
    value = environment("nvtx")
    return value is not None and _switch("DAK_NVTX", value)


def _switch(name: str, value: str) -> bool:
    if value.lower() not in _TRUE | _FALSE:
        raise OptionError(f"{name}={value!r}: use 1 or 0")
    return value.lower() in _TRUE


def _check(options: BackendOptions) -> BackendOptions:
    if options.strategy not in get_args(Strategy):
        raise OptionError(f"strategy={options.strategy!r}: use 'auto', 'direct' or 'staged'")
    if options.window is not None:
        _check_window(options.window)
    if not isinstance(options.strict, bool):
        raise OptionError(f"strict={options.strict!r}: use True or False")
    for name in ("trials", "nvtx"):
        value = getattr(options, name)
        if value is not None and not isinstance(value, bool):
            raise OptionError(f"{name}={value!r}: use True or False")
    return options


def _check_window(window: object) -> None:
    if window == "auto" and isinstance(window, str):
        return
    if isinstance(window, bool) or not isinstance(window, int):
        raise OptionError(f"window={window!r}: use a whole number of bytes, or 'auto'")
    if window == 0:
        raise OptionError(
            "window=0 would let no remote byte be read; leave it out for the link's own window"
        )
    if not 0 < window < 2**31:
        asked = f"={window}" if abs(window) < 10**18 else ""  # python prints no longer ones
        raise OptionError(f"window{asked}: from 1 to {2**31 - 1} bytes, or 'auto'")


def _mode_patches(mode: str | None) -> dict[str, Any]:
    import torch._inductor as inductor

    if mode is None or mode == "default":
        return {}
    known = inductor.list_mode_options()
    if not isinstance(mode, str) or mode not in known:
        raise OptionError(f"mode={mode!r} is unknown; Inductor has {', '.join(sorted(known))}")
    return dict(known[mode])


def _inductor_patches(given: Mapping[str, Any]) -> dict[str, Any]:
    if not given:
        return {}
    import torch._inductor.config as inductor_config

    # the public `list_options` copies every value
    known = set(vars(inductor_config)["_config"])
    patches: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in known:
            ours = [field.name for field in fields(BackendOptions)] + ["mode"]
            close = difflib.get_close_matches(name, [*ours, *known], n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else "."
            if name in _OF_OFFLOAD:
                hint = ": it is an argument of dak.offload(model, ...)."
            raise OptionError(
                f"unknown option {key!r}{hint} Options of this backend: {', '.join(ours)}; "
                "any other key must be one of torch._inductor.config"
            )
        patches[name] = value
    return patches

"""Where libnvrtc lies on this machine: torch brings one, a CUDA toolkit another."""

from __future__ import annotations

import ctypes.util
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from dak_inductor.errors import CompilationError

TOOLKITS = (Path("/usr/local/cuda/lib64"), Path("/opt/cuda/lib64"))


def find_nvrtc(library: Path | None = None) -> tuple[str, str]:
    """(libnvrtc, its libnvrtc-builtins or "") as paths, or as a bare name for the dynamic linker.

    The one of the CUDA version that torch was built for, else the newest. Raises CompilationError
    where there is none, or where `library` is given and no file.
    """
    if library is not None:
        if not library.is_file():
            raise CompilationError(f"{library} is no file; it was given as libnvrtc")
        return str(library), _builtins(library)
    found = [path for folder in _folders() for path in folder.glob("libnvrtc.so.*")]
    # libnvrtc.alt is a second build for hosts with another malloc
    candidates = [path for path in found if ".alt." not in path.name and path.suffix[1:].isdigit()]
    if not candidates:
        name = ctypes.util.find_library("nvrtc")
        if name is None:
            raise CompilationError(
                "no libnvrtc was found: install a torch built for CUDA, the package "
                "nvidia-cuda-nvrtc, or a CUDA toolkit of version 12.0 or newer"
            )
        return name, ""
    wanted = _torch_cuda_major()
    best = max(candidates, key=lambda path: (_major(path) == wanted, _major(path)))
    return str(best), _builtins(best)


def _folders() -> Iterator[Path]:
    package = importlib.util.find_spec("nvidia")
    for root in (package.submodule_search_locations or ()) if package is not None else ():
        yield from sorted(folder for folder in Path(root).glob("*/lib") if folder.is_dir())
    yield Path(sys.prefix) / "lib"
    yield from TOOLKITS


def _builtins(library: Path) -> str:
    """libnvrtc looks for its builtins by bare name, which fails outside the linker's folders."""
    found = sorted(library.parent.glob(f"libnvrtc-builtins.so.{_major(library)}*"))
    return str(found[-1]) if found else ""


def _major(library: Path) -> int:
    digits = library.name.partition(".so.")[2].partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _torch_cuda_major() -> int | None:
    import torch

    version = torch.version.cuda
    return int(version.partition(".")[0]) if version else None

"""Kernels of this package: source files in `kernels/`, compiled at run time, kept as cubins.

A kernel has one name everywhere: `kernels/<name>.cu`, the C++ function, the file in the cache and
the row of a profiler. Only its instantiation is generated, with named template arguments:
`stream_read<StreamReadConfiguration{.threads = 128, .checksum = false}>`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dak_inductor.cuda_runtime.nvrtc_library import find_nvrtc
from dak_inductor.errors import CompilationError, UnsupportedDriverError
from dak_inductor.options import cache_folder
from dak_inductor.private_files import is_private, private_folder, publish

KERNELS = Path(__file__).resolve().parent / "kernels"
CACHE_FORMAT = "1"  # part of every key: raise it when the layout of an entry changes
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
_LOCK_FILES = 16


@dataclass(frozen=True, slots=True)
class KernelInstance:
    """One instantiation: `configuration` maps the names of the template's argument to values.

    Kernels that are no templates have an empty configuration.
    """

    name: str
    configuration: tuple[tuple[str, int | bool], ...] = ()

    @property
    def expression(self) -> str:
        """The kernel in C++ terms, as the compiler is asked for it."""
        if not self.configuration:
            return f"dak::{self.name}"
        record = "".join(word.capitalize() for word in self.name.split("_")) + "Configuration"
        values = ", ".join(f".{name} = {_literal(value)}" for name, value in self.configuration)
        return f"dak::{self.name}<dak::{record}{{{values}}}>"


def instance(name: str, **configuration: int | bool) -> KernelInstance:
    """`kernels/<name>.cu` with these template arguments, in the order of the C++ record."""
    return KernelInstance(name, tuple(configuration.items()))


def _literal(value: int | bool) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(int(value))


@dataclass(frozen=True, slots=True)
class KernelSource:
    """Text of a kernel and of every header it includes, by include name, in a fixed order."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel. `symbol` is its name inside `image`; `key` names all that went into it."""

    name: str
    key: str
    symbol: str
    log: str
    image: bytes


def assemble(name: str, folder: Path = KERNELS) -> KernelSource:
    """Read `folder/<name>.cu` and the headers it includes, each by its path inside `folder`, or
    inside `KERNELS` where `folder` has none of that path.

    Raises CompilationError where a file is missing or lies outside both: what is not read here
    would not be part of the cache key.
    """
    headers: dict[str, str] = {}

    def read(path: str, includer: str) -> str:
        for root in dict.fromkeys((folder.resolve(), KERNELS)):
            place = (root / path).resolve()
            if place.is_relative_to(root) and place.is_file():
                break
        else:
            raise CompilationError(f"{includer} needs {path!r}, which is no file in {folder}")
        text = place.read_text(encoding="utf-8")
        for quoted, angled in _INCLUDE.findall(text):
            included = quoted or angled
            if included not in headers:
                headers[included] = ""  # breaks cycles
                headers[included] = read(included, path)
        return text

    text = read(f"{name}.cu", "the caller")
    return KernelSource(name, text, tuple(sorted(headers.items())))


def compiler_options(architecture: str) -> tuple[str, ...]:
    """Options of every compilation for `architecture` ("sm_90a")."""
    return (f"--gpu-architecture={architecture}", "--std=c++20", "--extra-device-vectorization")


def cubin_key(
    source: KernelSource, kernel: KernelInstance, options: tuple[str, ...], compiler: str
) -> str:
    """Hash of everything that decides the binary, each part with its length."""
    parts = [CACHE_FORMAT, compiler, kernel.expression, *options, source.name, source.text]
    for name, text in source.headers:
        parts += [name, text]
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode()
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


class Compiler:
    """A libnvrtc with a cache of cubins, in memory and in `folder` (None: in memory only).

    Thread-safe. Several processes may share the folder: a kernel is compiled under a file lock, and
    published by an atomic rename. A folder that is not this user's alone is not used.
    """

    def __init__(
        self, folder: Path | None, *, kernels: Path = KERNELS, library: Path | None = None
    ) -> None:
        self.folder = folder
        self.kernels = kernels
        self.compilations = 0  # by this object, as opposed to found in the cache
        self._library = library
        self._nvrtc: Any = None  # an open _driver.Nvrtc
        self._identity = ""
        self._memory: dict[str, Cubin] = {}
        self._lock = threading.Lock()

    def cubin(self, kernel: KernelInstance, *, architecture: str = "sm_90a") -> Cubin:
        """The cubin of `kernel`, compiled if no cache has it. Raises CompilationError."""
        source = assemble(kernel.name, self.kernels)
        options = compiler_options(architecture)
        with self._lock:
            self._open()
            key = cubin_key(source, kernel, options, self._identity)
            found = self._memory.get(key) or self._read(kernel.name, key)
            if found is None:
                with self._file_lock(key):
                    found = self._read(kernel.name, key)  # another process may have been faster
                    if found is None:
                        found = self._compile(source, kernel, options, key)
                        self._write(found)
            self._memory[key] = found
            return found

    def path(self, name: str, key: str) -> Path | None:
        """Where the cache folder keeps that cubin."""
        return None if self.folder is None else self.folder / f"{name}-{key[:32]}.cubin"

    def _open(self) -> None:
        if self._nvrtc is not None:
            return
        driver = extension()
        library, builtins = find_nvrtc(self._library)
        self._nvrtc = driver.Nvrtc(library, builtins=builtins)
        size = Path(library).stat().st_size if Path(library).is_file() else 0
        # builds of one version differ in what they emit: their size tells them apart
        self._identity = f"nvrtc {self._nvrtc.version[0]}.{self._nvrtc.version[1]} {size}"

    def _compile(
        self, source: KernelSource, kernel: KernelInstance, options: tuple[str, ...], key: str
    ) -> Cubin:
        self.compilations += 1
        try:
            image, symbol, log = self._nvrtc.compile(
                source=source.text,
                file=f"{source.name}.cu",
                headers=list(source.headers),
                options=list(options),
                expression=kernel.expression,
            )
        except CompilationError as error:
            raise CompilationError(f"{kernel.expression}: {error}") from error
        return Cubin(kernel.name, key, symbol, log, image)

    def _read(self, name: str, key: str) -> Cubin | None:
        path = self.path(name, key)
        if path is None or not is_private(path.parent):
            return None
        try:
            return decode(path.read_bytes(), name, key)
        except OSError:
            return None

    def _write(self, cubin: Cubin) -> None:
        path = self.path(cubin.name, cubin.key)
        if path is not None and private_folder(path.parent) is not None:
            publish(path, encode(cubin))

    @contextlib.contextmanager
    def _file_lock(self, key: str) -> Iterator[None]:
        folder = None if self.folder is None else private_folder(self.folder)
        with contextlib.ExitStack() as stack:
            if folder is not None:
                # a few files for all kernels: a lock file can never be deleted safely
                path = folder / f"lock-{int(key[:8], 16) % _LOCK_FILES:02}"
                # without a lock the worst is that two processes compile the same kernel
                with contextlib.suppress(OSError):
                    file = stack.enter_context(open(path, "wb"))
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


def encode(cubin: Cubin) -> bytes:
    """SHA-256 of the rest, a line of JSON, the image."""
    record = {"name": cubin.name, "key": cubin.key, "symbol": cubin.symbol, "log": cubin.log}
    body = json.dumps(record).encode() + b"\n" + cubin.image
    return hashlib.sha256(body).digest() + body


def decode(content: bytes, name: str, key: str) -> Cubin | None:
    """What `encode` wrote for that kernel and key; None where the bytes are damaged or foreign."""
    digest, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != digest:
        return None
    line, _, image = body.partition(b"\n")
    try:
        record = json.loads(line)
        texts = record["name"], record["key"], record["symbol"], record["log"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # whole, but nothing that this release wrote
    if texts[:2] != (name, key) or not all(isinstance(text, str) for text in texts):
        return None
    return Cubin(*texts, image)


@functools.cache
def compiler() -> Compiler:
    """The compiler that this process shares, with the user's cache folder."""
    return Compiler(cache_folder() / "cubins")


@functools.cache
def extension() -> ModuleType:
    """The compiled extension. Raises UnsupportedDriverError where this install has none."""
    try:
        return importlib.import_module("dak_inductor.cuda_runtime._driver")
    except ImportError as error:
        raise UnsupportedDriverError(
            f"the extension dak_inductor.cuda_runtime._driver cannot be loaded ({error}); it is "
            "built by `pip install .` with a C++20 compiler"
        ) from error

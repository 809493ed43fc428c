"""CPU tests see no GPU, no network and none of the user's settings, and leave no compiled code."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import profiles  # noqa: F401  (loads the settings of hypothesis)
from .fake_cuda import FakeCard, install

if TYPE_CHECKING:
    from dak_inductor.cuda_runtime.nvrtc import Cubin, KernelInstance

for _name in [name for name in os.environ if name.startswith("DAK_")]:
    del os.environ[_name]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on a machine that has one
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # xdist workers are the parallelism
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Profiles and cubins of this machine must not reach the tests, nor theirs the machine."""
    folder = tmp_path_factory.mktemp("dak_cache")
    os.environ["DAK_CACHE"] = str(folder)
    yield folder
    os.environ.pop("DAK_CACHE", None)


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_imported() -> None:
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401

    import dak_inductor  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_is_no_garbage(_libraries_are_imported: None) -> None:
    """Tests collect garbage very often; what imports and other modules made, millions of objects in
    the end, need not be looked at each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products are estimated for a GPU that is not there."""
    from dak_inductor import hardware
    from dak_inductor.lowering.linear import ways

    profile = hardware.load("h200")
    monkeypatch.setattr(ways, "profile_of", lambda _: profile)
    monkeypatch.setattr(ways, "worker_count", lambda found, _: 132 // found.cluster)
    ways.ways_of.cache_clear()
    yield
    ways.ways_of.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """A fixed seed before; no compiled code after, which would keep offloaded models alive."""
    import torch

    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    gc.collect()
    from dak_inductor import budget

    budget._budgets.clear()  # a model that a failed test's traceback holds is no one else's burden


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    """A pretended card's streams, events and graphs."""
    return install(monkeypatch)


class Disassembler:
    """Kernels compiled for Hopper, and what the binary utilities say of them."""

    architecture = "sm_90a"

    def __init__(self, folder: Path, kernels: Path | None = None) -> None:
        from dak_inductor.cuda_runtime.nvrtc import KERNELS, Compiler

        self._compiler = Compiler(folder, kernels=kernels or KERNELS)
        self._folder = folder
        self._listings: dict[str, str] = {}

    def cubin(self, kernel: KernelInstance) -> Cubin:
        """The compiled kernel; it is compiled once, whichever process of the run asks first."""
        return self._compiler.cubin(kernel, architecture=self.architecture)

    def opcodes(self, kernel: KernelInstance) -> list[str]:
        """The instructions in SASS, in order, with their modifiers."""
        text = self._listing(kernel)
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)

    def usage(self, kernel: KernelInstance) -> dict[str, int]:
        """Resources by name: REG, STACK, SHARED, LOCAL and others."""
        (line,) = re.findall(r"^.*\bREG:\d+.*$", self._listing(kernel), re.MULTILINE)
        return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", line)}

    def _listing(self, kernel: KernelInstance) -> str:
        """SASS and resources, by one run of the utility; skips where it is missing."""
        cubin = self.cubin(kernel)
        if cubin.key not in self._listings:
            file = self._folder / f"{cubin.key}-{os.getpid()}"
            file.write_bytes(cubin.image)
            # cuobjdump calls nvdisasm by name
            beside = str(Path(_tool("nvdisasm")).parent)
            self._listings[cubin.key] = subprocess.run(
                [_tool("cuobjdump"), "-sass", "-res-usage", str(file)],
                env={**os.environ, "PATH": os.pathsep.join([beside, os.environ.get("PATH", "")])},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            file.unlink()
        return self._listings[cubin.key]


def _tool(name: str) -> str:
    """A binary utility from the pip packages of the test extra, or from a toolkit."""
    folder = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [str(path) for path in sorted(folder.glob(f"*/bin/{name}"))]
    path = found[0] if found else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: install the package nvidia-cuda-{name}")
    return path


@pytest.fixture(scope="session")
def disassembler(tmp_path_factory: pytest.TempPathFactory) -> Disassembler:
    """Of all kernels."""
    base = tmp_path_factory.getbasetemp()
    # the processes of one run share what they have compiled
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cubins"
    return Disassembler(folder)

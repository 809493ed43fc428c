"""CPU tests see no GPU, no network and none of the user's settings, and leave no compiled code."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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

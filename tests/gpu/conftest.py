"""GPU tests: skipped, with what the machine lacks, where there is no Hopper card."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from dak_inductor.benchmarks.harness.visible_cards import visible_cards

if TYPE_CHECKING:
    from dak_inductor.cuda_runtime.tier import Tier
    from dak_inductor.cuda_runtime.window import Window

FOLDER = Path(__file__).parent
LONGEST = ("the_soak", "gpu/test_generate.py", "gpu/test_kv_cache.py", "inductor",
           "reduce-overhead")  # fmt: skip
"""The soak, and tests that Inductor compiles models for, take longest: they go first, or one worker
of many is left with them at the end."""


def take_own_card(environment: MutableMapping[str, str]) -> None:
    """Give a worker of pytest-xdist one of the first CARDS cards: workers take them in turn.

    It sees the others as peers, or with PEERS=0 no other. To be called before CUDA is initialised.
    """
    worker = environment.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    count = int(environment.get("CARDS", "1"))
    if worker and count > 1:
        cards = visible_cards(environment, count)[:count]
        own = int(worker) % len(cards)
        mine = [*cards[own:], *cards[:own]]
        alone = environment.get("PEERS") == "0"
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine[:1] if alone else mine)


def pytest_configure(config: pytest.Config) -> None:
    take_own_card(os.environ)
    config.addinivalue_line("markers", "gpus(count): needs that many GPUs of one host")
    config.addinivalue_line("markers", "alone: measures the time or the memory of the whole card")
    config.addinivalue_line("markers", "host: times host pages, which work on other cards slows")


def missing(gpus: int = 1) -> str | None:
    """What this machine lacks for a test that needs `gpus` Hopper cards, None for nothing."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU: torch finds none here"
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        name = torch.cuda.get_device_name()
        return f"needs a Hopper GPU (sm_90): {name} is sm_{major}{minor}"
    count = torch.cuda.device_count()
    if count < gpus:
        return f"needs {gpus} GPUs: this machine has {count}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if FOLDER in item.path.parents]
    first = [item for item in own if any(word in item.nodeid for word in LONGEST)]
    items[:] = list(dict.fromkeys([*first, *items]))
    for item in own:
        marker = item.get_closest_marker("gpus")
        reason = missing(marker.args[0] if marker else 1)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    """The GPU that models run on."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def no_grad() -> Iterator[None]:
    """A test without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda:1", marks=pytest.mark.gpus(2))])
def remote(request: pytest.FixtureRequest) -> str:
    """Both remote tiers; the peer only where there is one."""
    return str(request.param)


@pytest.fixture
def tier(remote: str, device: torch.device) -> Tier:
    """Either remote tier."""
    from dak_inductor.cuda_runtime.tiers import open_tier

    return open_tier(remote, device=device)


@pytest.fixture
def host_tier(device: torch.device) -> Tier:
    """Host memory, where what is tested does not depend on the tier."""
    from dak_inductor.cuda_runtime.tiers import open_tier

    return open_tier("cpu", device=device)


@pytest.fixture
def window(tier: Tier, device: torch.device) -> Iterator[Window]:
    """The window of the link, put back afterwards."""
    from dak_inductor.cuda_runtime.window import window_of

    found = window_of(device, tier.name)
    before = found.nbytes
    yield found
    torch.cuda.synchronize()
    found.set(before)


@pytest.fixture(scope="session")
def compiled_kernels() -> None:
    """All kernels in the cache, compiled on all cores: one by one they take minutes.

    Of several workers each compiles its share and meets the rest one by one.
    """
    if missing() is None:
        from dak_inductor.benchmarks.harness.compile_ahead import compile_ahead, compile_part

        worker = os.environ.get("PYTEST_XDIST_WORKER")
        if worker is None:
            compile_ahead()
        else:
            count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
            compile_part(int(worker.removeprefix("gw")), count)


@pytest.fixture(autouse=True)
def _estimates_choose() -> Iterator[None]:
    """A test of a kernel runs that kernel, also where another way is faster."""
    from dak_inductor.lowering.linear.trials import TRIALS

    before = TRIALS.enabled
    TRIALS.switch(False)
    yield
    TRIALS.switch(before)


@pytest.fixture(autouse=True)
def _clean_gpu() -> Iterator[None]:
    """A fixed seed before; afterwards no compiled code, no garbage and no cached memory."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        from dak_inductor.cuda_runtime import vmm

        assert vmm.drain(30), "memory that was given up is still held"

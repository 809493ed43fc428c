"""Buffers made ahead: order, how far ahead, failures, and what is given back."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from dak_inductor.cuda_runtime.page_pipeline import PagePipeline, PageStages
from dak_inductor.errors import DriverError, HostMemoryError

REQUESTS = [(10 + i, i) for i in range(8)]


class Work:
    """Stages that note what they do; memory is a number of bytes."""

    def __init__(self, room: int = 10**9) -> None:
        self.room = room
        self.held = 0
        self.created: list[int] = []
        self.again: list[int] = []
        self.threads: set[str] = set()
        self.fail_finish: int | None = None
        self.slow_finish = 0.0

    def stages(self) -> PageStages[Block, Block]:
        return PageStages(self._create, self._finish, self._again)

    def _create(self, nbytes: int, split: int) -> Block:
        self.threads.add(threading.current_thread().name)
        if self.held + nbytes > self.room:
            raise HostMemoryError("full")
        self.held += nbytes
        self.created.append(nbytes)
        return Block(self, nbytes, split)

    def _finish(self, pages: Block, split: int) -> Block:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.slow_finish)
        if pages.nbytes == self.fail_finish:
            raise DriverError("map failed", call="cuMemMap", status=1)
        assert pages.split == split
        return pages

    def _again(self, nbytes: int, split: int) -> Block:
        self.again.append(nbytes)
        return self._finish(self._create(nbytes, split), split)


class Block:
    def __init__(self, work: Work, nbytes: int, split: int) -> None:
        self.work, self.nbytes, self.split = work, nbytes, split

    def __del__(self) -> None:
        self.work.held -= self.nbytes


def run(work: Work, requests: Sequence[tuple[int, int]], ahead: int) -> list[tuple[int, int]]:
    """Every buffer is dropped before the next is asked for."""
    seen = []
    for block in PagePipeline(work.stages(), requests, ahead_bytes=ahead).buffers():
        seen.append((block.nbytes, block.split))
        del block
    return seen


@pytest.mark.parametrize("ahead", [0, 25, 10**6])
def test_buffers_come_in_order_from_two_threads(ahead: int) -> None:
    work = Work()
    assert run(work, REQUESTS, ahead) == REQUESTS
    assert work.created == [nbytes for nbytes, _ in REQUESTS] and not work.again
    assert {name.rsplit("_", 1)[0] for name in work.threads} == {"dak-pages", "dak-maps"}
    assert work.held == 0


def test_creation_goes_on_while_mapping_is_slow() -> None:
    work = Work()
    work.slow_finish = 0.2
    buffers = PagePipeline(work.stages(), REQUESTS, ahead_bytes=10**6).buffers()
    first = next(buffers)
    assert len(work.created) == len(REQUESTS)
    buffers.close()
    assert work.held == first.nbytes


@pytest.mark.parametrize(("ahead", "most"), [(0, 2), (30, 4), (10**6, 8)])
def test_no_more_than_allowed_is_made_ahead(ahead: int, most: int) -> None:
    work = Work()
    buffers = PagePipeline(work.stages(), [(10, 0)] * 8, ahead_bytes=ahead).buffers()
    first = next(buffers)
    time.sleep(0.1)
    assert len(work.created) == most
    buffers.close()
    del first
    assert work.held == 0


def test_what_did_not_fit_ahead_is_made_in_its_turn() -> None:
    """Room for two at a time, one of them the caller's: the caller's goes before the next."""
    work = Work(room=36)
    requests = [(20, 0), (16, 0), (20, 0), (10, 0), (20, 0), (30, 0), (5, 0)]
    assert run(work, requests, 10**6) == requests
    assert work.again and work.held == 0


def test_what_never_fits_is_raised_at_its_buffer() -> None:
    work = Work(room=30)
    seen = []
    with pytest.raises(HostMemoryError):
        for block in PagePipeline(
            work.stages(), [(10, 0), (10, 0), (40, 0), (5, 0)], ahead_bytes=100
        ).buffers():
            seen.append(block)
    assert [block.nbytes for block in seen] == [10, 10]
    del block
    assert work.held == 20


def test_another_failure_is_raised_at_its_buffer() -> None:
    work = Work()
    work.fail_finish = 12
    seen = []
    with pytest.raises(DriverError):
        for block in PagePipeline(work.stages(), REQUESTS, ahead_bytes=10**6).buffers():
            seen.append(block.nbytes)
    assert seen == [10, 11]


def test_no_requests() -> None:
    assert run(Work(), [], 100) == []

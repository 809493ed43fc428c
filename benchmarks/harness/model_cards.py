"""Cases of `dak bench` on several GPUs at the same time: who runs which, and all together."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dak_inductor.benchmarks.harness.model_case import Case
from dak_inductor.benchmarks.harness.model_run import ModelRun
from dak_inductor.benchmarks.harness.visible_cards import visible_cards
from dak_inductor.errors import OptionError

SIDE_BY_SIDE = (
    "cases ran on {} GPUs at the same time: those of one model and batch on one of them, each with "
    "the ceilings of its own GPU; the record's are those of one of them"
)


def card_groups(cards: int, remote: str, *, present: int) -> list[dict[str, str]]:
    """The environment of each worker: it sees one GPU, or as many as the remote tier cuda:N needs.

    Args:
        cards: GPUs to use in all.
        present: GPUs that this process sees.

    Raises OptionError where there are not as many, or too few for that tier.
    """
    visible = visible_cards(os.environ, present)
    found = re.fullmatch(r"cuda:(\d+)", remote)
    each = int(found[1]) + 1 if found else 1
    if cards > present:
        raise OptionError(f"--cards {cards}: there are {present}")
    if cards < each:
        raise OptionError(f"--cards {cards}: --remote {remote} takes {each} for each case")
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(visible[at : at + each])}
        for at in range(0, cards - each + 1, each)
    ]


def shared_out(cases: Sequence[Case], groups: int) -> list[list[Case]]:
    """A list for each group; peers of one model and batch are in one list, in their order.

    Turns go up and down: batches come from small to large, and large ones take longer.
    """
    lists: list[list[Case]] = [[] for _ in range(groups)]
    turns = itertools.cycle((*range(groups), *reversed(range(groups))))
    group: dict[tuple[str, int], int] = {}
    for case in cases:
        kind = case.model, case.batch
        if kind not in group:
            group[kind] = next(turns)
        lists[group[kind]].append(case)
    return lists


def run_together(runs: Sequence[ModelRun]) -> None:
    """All at the same time, until each has a row for every case. An error ends all of them."""
    with ThreadPoolExecutor(max(1, len(runs))) as threads:
        try:
            for ended in [threads.submit(run.run) for run in runs]:
                ended.result()
        except BaseException:  # an interrupt too: else their workers would go on
            for run in runs:
                run.stop()
            raise

"""The table of docs/architectures.md: further architectures of transformers, forward and generate.

In the long profile only; `python -m tests.cpu.test_more_architectures` writes the table.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import dak_inductor as dak
from dak_inductor.compiled_graph import CompiledGraph
from dak_inductor.offloaded import record_of
from dak_inductor.refusal import in_one_line
from dak_inductor.session import SESSION

from .more_architectures import CAUSAL, ENCODERS, PAIRS
from .profiles import PROFILE
from .test_random_programs import recording

transformers = pytest.importorskip("transformers", reason="needs transformers")

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
ALL = {**CAUSAL, **ENCODERS, **PAIRS}


def build(name: str) -> Any:
    stem, sizes = ALL[name]
    ending = "ForCausalLM" if name in CAUSAL else "Model"
    ending = "ForConditionalGeneration" if name in PAIRS else ending
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}{'Text' if name == 'gemma3' else ''}Config")(**sizes)
    return getattr(transformers, f"{stem}{ending}")(config).eval()


def inputs_of(name: str, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 500, (2, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in PAIRS:
        inputs["decoder_input_ids"] = torch.randint(3, 500, (2, 3))
    return inputs


def read_by_ours() -> bool:
    """Whether an operator of ours read remote bytes since this was last asked."""
    reads = dak.stats(reset=True).reads
    assert sum(read.bytes.remote for read in reads) > 0
    return any(read.kind != "stock" and read.bytes.remote > 0 for read in reads)


def check(name: str) -> tuple[str, list[str]]:
    """Forward and, where there is such a thing, generate: "pass", or "refused" where no operator of
    ours read anything; and the reasons of what was refused."""
    torch._dynamo.reset()
    SESSION.reset()
    model, given = build(name), inputs_of(name, 7)
    prompt = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = model(**given)[0]
        tokens = None if name in ENCODERS else model.generate(**prompt, **options)
    reference = copy.deepcopy(model.state_dict())
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    record = record_of(model)
    assert record is not None and record.bytes_by_tier().remote > 0
    made: list[CompiledGraph] = []
    model.compile(backend=recording(made))
    dak.stats(reset=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**given)[0], expected, rtol=1e-4, atol=1e-5)
        counted = read_by_ours()
        refusals = [refusal for graph in made for refusal in graph.table.refusals]
        assert counted or any(refusal.target == "whole graph" for refusal in refusals)
        if tokens is not None:
            torch.testing.assert_close(model.generate(**prompt, **options), tokens)
            assert read_by_ours() or not counted
    for key, value in model.state_dict().items():
        assert torch.equal(value, reference[key])
    reasons = (re.sub(r"_tensor_constant\d+", "a tensor", refusal.reason) for refusal in refusals)
    return "pass" if counted else "refused", sorted(set(reasons))


@pytest.mark.slow
@pytest.mark.skipif(PROFILE == "ci", reason="set HYPOTHESIS_PROFILE=long")
@pytest.mark.parametrize("name", sorted(ALL))
def test_an_architecture_does_what_the_table_says(name: str) -> None:
    (row,) = [line for line in TABLE.read_text().splitlines() if line.startswith(f"| {name} |")]
    assert _outcome(name) == row


def _outcome(name: str) -> str:
    steps = "forward" if name in ENCODERS else "forward, generate"
    try:
        verdict, reasons = check(name)
    except Exception as error:  # the table says what fails, whatever it is
        return f"| {name} | {steps} | fails | {type(error).__name__}: {_first_line(error)} |"
    refused = in_one_line(reasons) or "nothing"
    return f"| {name} | {steps} | {verdict} | {refused} |"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "without a message")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for each in sorted(ALL):
        print(_outcome(each), flush=True)

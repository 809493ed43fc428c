"""`dak demo`, and the rule by which it judges outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dak_inductor import demo
from dak_inductor.errors import OptionError, TierError
from dak_inductor.output_check import Comparison, Trace, compare, generate, reference_logits

STEPS, BATCH, VOCABULARY = 6, 2, 16


def trace(logits: torch.Tensor) -> Trace:
    tokens = logits.argmax(-1).transpose(0, 1)
    zeros = (0,) * STEPS
    return Trace(tokens, logits, (0.0,) * STEPS, zeros, zeros)


@pytest.fixture
def exact() -> torch.Tensor:
    """Logits with a margin of 5 everywhere."""
    logits = torch.rand(STEPS, BATCH, VOCABULARY)
    best = torch.randint(VOCABULARY, (STEPS, BATCH, 1))
    return logits.scatter(2, best, 6.0)


def noisy(logits: torch.Tensor, size: float) -> torch.Tensor:
    return logits + size * (2 * torch.rand_like(logits) - 1)


def judge(exact: torch.Tensor, forced: torch.Tensor, free: torch.Tensor) -> Comparison:
    return compare(trace(noisy(exact, 0.01)), trace(forced), trace(free), exact)


def test_equal_errors_pass(exact: torch.Tensor) -> None:
    comparison = judge(exact, noisy(exact, 0.01), noisy(exact, 0.01))
    assert comparison.passed
    assert comparison.equal_tokens == comparison.tokens == STEPS * BATCH
    assert comparison.eager_max <= 0.01


def test_thrice_the_error_fails(exact: torch.Tensor) -> None:
    comparison = judge(exact, noisy(exact, 0.03), noisy(exact, 0.01))
    assert comparison.mismatches == 0
    assert not comparison.passed


def test_one_wild_logit_fails(exact: torch.Tensor) -> None:
    """The RMS alone would not notice it among many."""
    forced = noisy(exact, 0.001)
    forced[2, 1, 3] += 0.1
    assert not judge(exact, forced, noisy(exact, 0.01)).passed


def test_nan_fails(exact: torch.Tensor) -> None:
    forced = noisy(exact, 0.01)
    forced[0, 0, 0] = float("nan")
    assert not judge(exact, forced, noisy(exact, 0.01)).passed


def test_other_token_with_a_margin_fails(exact: torch.Tensor) -> None:
    free = noisy(exact, 0.01)
    free[3, 0] = free[3, 0].roll(1)
    comparison = judge(exact, noisy(exact, 0.01), free)
    assert (comparison.mismatches, comparison.near_ties) == (1, 0)
    assert comparison.equal_tokens == STEPS + 3
    assert not comparison.passed


def test_other_token_at_a_near_tie_passes(exact: torch.Tensor) -> None:
    exact[3, 0] = 0.0
    exact[3, 0, :2] = 6.0
    first, second = exact.clone(), exact.clone()
    first[3, 0, 0] += 0.01
    second[3, 0, 1] += 0.01
    comparison = compare(trace(first), trace(second), trace(second), exact)
    assert (comparison.mismatches, comparison.near_ties) == (0, 1)
    assert comparison.passed


def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    monkeypatch.setattr(demo, "_SMALL", demo._SMALL | shape)


def test_teacher_forcing_dictates_tokens_and_keeps_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    model = demo.build_model(1, torch.device("cpu"))
    ids = torch.randint(256, (2, 5))
    free = generate(model, ids, 4)
    again = generate(model, ids, 4, force=free.tokens)
    assert torch.equal(again.tokens, free.tokens)
    assert torch.equal(again.logits, free.logits)
    other = (free.tokens + 1) % 256
    forced = generate(model, ids, 4, force=other)
    assert torch.equal(forced.tokens, other)
    assert torch.equal(forced.logits[0], free.logits[0])
    assert not torch.equal(forced.logits[1], free.logits[1])
    reference = reference_logits(model, ids, other)
    assert reference.shape == forced.logits.shape
    assert (reference - forced.logits).abs().max() < 0.05


@pytest.mark.parametrize("bad", [{"layers": 0}, {"batch": 0}, {"prompt": 1}, {"new": 1}])
def test_counts_are_checked(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(OptionError, match=name):
        demo.run(**bad)


def test_a_gpu_tier_needs_a_gpu() -> None:
    with pytest.raises(TierError, match="simulated"):
        demo.run(remote="cpu")


@pytest.mark.slow
def test_demo_passes_on_the_simulated_tier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.json"
    assert demo.run(json_out=out) == 0
    printed = capsys.readouterr().out
    assert "Simulated tier" in printed
    assert "Same output as eager." in printed
    assert " ms" not in printed.split("weight bytes read per step")[1], "no time without a GPU"
    record = json.loads(out.read_text())
    assert record["passed"] is True
    assert "decode_seconds" not in record
    weights = demo.build_model(2, torch.device("cpu")).num_parameters() * 2
    for local, remote in zip(record["local_bytes"], record["remote_bytes"], strict=True):
        # 40% of all weight bytes are remote; an embedding is read in rows, so it counts little
        assert 0.1 * weights < remote < 0.5 * weights
        assert local + remote <= weights


def test_demo_fails_when_a_weight_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    import dak_inductor as dak

    def damage(model: Any, **options: Any) -> Any:
        offload(model, **options)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        return model

    offload = dak.offload
    tiny(monkeypatch)
    monkeypatch.setattr(dak, "offload", damage)
    assert demo.run(layers=1, new=3) == 1


def test_demo_fails_when_nothing_is_remote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dak_inductor as dak

    tiny(monkeypatch)
    monkeypatch.setattr(dak, "offload", lambda model, **_: model)
    monkeypatch.setattr(dak, "explain", lambda model: "")
    with pytest.warns(UserWarning, match="nothing is offloaded"):
        assert demo.run(layers=1, new=3) == 1
    assert "nothing was read from the remote tier" in capsys.readouterr().out

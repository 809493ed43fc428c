"""Options: ours, Inductor's, the environment's; unknown ones raise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dak_inductor import options
from dak_inductor.errors import OptionError


def test_defaults():
    parsed = options.parse(None, None)
    assert parsed.backend == options.BackendOptions()
    assert parsed.inductor == {}


def test_keys_are_told_apart():
    parsed = options.parse(None, {"strict": True, "max_autotune": True, "strategy": "direct"})
    assert parsed.backend.strict is True
    assert parsed.backend.strategy == "direct"
    assert parsed.inductor == {"max_autotune": True}


def test_a_mode_may_stand_among_the_options():
    alone = options.parse("reduce-overhead", None).inductor
    among = options.parse(None, {"mode": "reduce-overhead"}).inductor
    assert alone == among
    assert alone["triton.cudagraphs"] is True
    with pytest.raises(OptionError, match="twice"):
        options.parse("default", {"mode": "max-autotune"})
    with pytest.raises(OptionError, match="reduce-overhead"):
        options.parse("reduce_overhed", None)


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"stritc": True}, "did you mean strict"),
        ({"no_such_option_at_all": 1}, "unknown option"),
        ({"offload_ratio": 0.5}, "an argument of dak.offload"),
        ({"strategy": "prefetch"}, "auto"),
        ({"window": 0}, "no remote byte"),
        ({"window": -1}, "from 1 to"),
        ({"window": 2**31}, "from 1 to"),
        ({"window": True}, "whole number of bytes"),
        ({"window": "1MB"}, "whole number of bytes"),
        ({"strict": "yes"}, "True or False"),
    ],
)
def test_bad_options_say_what_to_do(given_options, message):
    with pytest.raises(OptionError, match=message):
        options.parse(None, given_options)


def test_the_environment_mirrors_options_and_the_call_wins(monkeypatch):
    monkeypatch.setenv("DAK_STRICT", "1")
    assert options.parse(None, None).backend.strict is True
    assert options.parse(None, {"strict": False}).backend.strict is False
    monkeypatch.setenv("DAK_STRICT", "maybe")
    with pytest.raises(OptionError, match="DAK_STRICT"):
        options.parse(None, None)


def test_trials_are_on_unless_switched_off(monkeypatch):
    assert options.parse(None, None).backend.trials is None and options.trials_by_default()
    assert options.parse(None, {"trials": False}).backend.trials is False
    monkeypatch.setenv("DAK_TRIALS", "0")
    assert options.parse(None, None).backend.trials is False and not options.trials_by_default()
    assert options.parse(None, {"trials": True}).backend.trials is True
    monkeypatch.setenv("DAK_TRIALS", "some")
    with pytest.raises(OptionError, match="DAK_TRIALS"):
        options.trials_by_default()
    monkeypatch.delenv("DAK_TRIALS")
    with pytest.raises(OptionError, match="True or False"):
        options.parse(None, {"trials": 1})


def test_ranges_are_off_unless_switched_on(monkeypatch):
    assert options.parse(None, None).backend.nvtx is None and not options.nvtx_by_default()
    monkeypatch.setenv("DAK_NVTX", "1")
    assert options.parse(None, None).backend.nvtx is True and options.nvtx_by_default()
    assert options.parse(None, {"nvtx": False}).backend.nvtx is False
    monkeypatch.setenv("DAK_NVTX", "some")
    with pytest.raises(OptionError, match="DAK_NVTX"):
        options.nvtx_by_default()
    monkeypatch.delenv("DAK_NVTX")
    with pytest.raises(OptionError, match="True or False"):
        options.parse(None, {"nvtx": 1})


def test_a_window_is_a_number_of_bytes_or_automatic(monkeypatch):
    assert options.parse(None, None).backend.window is None
    assert options.parse(None, {"window": 4096}).backend.window == 4096
    monkeypatch.setenv("DAK_WINDOW", "8192")
    assert options.parse(None, None).backend.window == 8192
    assert options.parse(None, {"window": 1}).backend.window == 1
    assert options.parse(None, {"window": "auto"}).backend.window == "auto"
    monkeypatch.setenv("DAK_WINDOW", "auto")
    assert options.parse(None, None).backend.window == "auto"
    for value, message in (("0", "no remote byte"), ("1MB", "DAK_WINDOW"), ("-4", "DAK_WINDOW")):
        monkeypatch.setenv("DAK_WINDOW", value)
        with pytest.raises(OptionError, match=message):
            options.parse(None, None)


@given(st.dictionaries(st.text(max_size=12), st.integers(), min_size=1, max_size=3))
def test_no_unknown_key_passes_silently(given_options):
    known = {"strategy", "window", "strict", "plan", "trials", "nvtx", "mode"}
    import torch._inductor.config as inductor_config

    keys = {key.replace("-", "_") for key in given_options}
    if keys & (known | set(vars(inductor_config)["_config"])):
        return
    with pytest.raises(OptionError):
        options.parse(None, given_options)


def test_a_variable_of_another_name_is_warned_of_once(monkeypatch, caplog):
    options._warn_of_unknown_variables.cache_clear()
    monkeypatch.setenv("DAK_STRATEGI", "direct")
    for _ in range(2):
        assert options.parse(None, None).backend.strategy == "auto"
    assert [record.message for record in caplog.records] == [
        "DAK_STRATEGI is no variable of this backend; did you mean DAK_STRATEGY?"
    ]
    options._warn_of_unknown_variables.cache_clear()


def test_every_variable_that_is_read_is_known():
    source = Path(options.__file__).read_text()
    read = set(re.findall(r'environment\("(\w+)"\)', source)) | {"strategy", "plan"}
    assert read == set(options.VARIABLES)

"""A newer torch gives one warning, and every other is taken without a word."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.fx import symbolic_trace

from dak_inductor import torch_versions
from dak_inductor.backend import dak
from dak_inductor.torch_versions import NEWEST, OLDEST, warn_of_newer_torch


@pytest.fixture(autouse=True)
def _said_nothing_yet():
    warn_of_newer_torch.cache_clear()
    yield
    warn_of_newer_torch.cache_clear()


@pytest.mark.parametrize("found", ["2.14.0", "2.14.0a0+git12", "3.0.1+cu140"])
def test_a_newer_torch_is_warned_of_once(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", found)
    with pytest.warns(UserWarning, match=rf"torch {found[:4]}.* newer .*\(2\.11 to 2\.13\)"):
        dak(symbolic_trace(torch.nn.Identity()), [torch.ones(1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_newer_torch()


@pytest.mark.parametrize("found", ["2.11.0+cu130", "2.13.0+cpu", "2.12.1", "unknown"])
def test_others_are_not(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_newer_torch()


def test_the_torch_of_these_tests_is_one_of_them() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert torch_versions.OLDEST == OLDEST <= (major, minor) <= NEWEST

"""Sizes of memory as users write them: `"24GB"`, `"24GiB"`, `"80%"`, or bytes as an int."""

from __future__ import annotations

import re

from dak_inductor.cuda_runtime.host_memory import available_host_memory
from dak_inductor.errors import BudgetError, DakError, OptionError

EXAMPLES = 'for example "24GB" (24e9 bytes), "24GiB" (24 * 2**30), {share}, or bytes as an int'

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_budget(value: str | int, card_bytes: int | None) -> int:
    """`gpu_memory` in bytes. `card_bytes` is the card's memory, None where there is no card.

    Raises BudgetError for what cannot be read, is not positive, or exceeds the card.
    """
    size = _Size("gpu_memory", value, card_bytes, "the card", "the simulated GPU", BudgetError)
    budget = size.nbytes()
    if card_bytes is not None and budget > card_bytes:
        raise BudgetError(
            f"gpu_memory={value!r} is {budget / 1e9:.2f} GB, the card has {card_bytes / 1e9:.2f} GB"
        )
    return budget


def parse_host_memory(value: str | int, available: int) -> int:
    """`host_memory` in bytes; a share is one of what is `available`.

    It may be more, where the machine grows its memory on demand. Raises OptionError for what cannot
    be read or is not positive.
    """
    return _Size(
        "host_memory", value, available, "the host memory available", "", OptionError
    ).nbytes()


def asked_host_memory(value: str | int | None) -> int | None:
    """The same on this machine; None where it was not given."""
    return None if value is None else parse_host_memory(value, available_host_memory())


class _Size:
    """One argument. `whole` are the bytes that a share is of, called `whose`; where there is no
    such number, `nowhere` is what has none."""

    def __init__(
        self,
        name: str,
        value: object,
        whole: int | None,
        whose: str,
        nowhere: str,
        error: type[DakError],
    ) -> None:
        self._name, self._value = name, value
        self._whole, self._whose, self._nowhere, self._error = whole, whose, nowhere, error
        self._examples = EXAMPLES.format(share=f'"80%" of {whose}')

    @property
    def _said(self) -> str:
        return f"{self._name}={self._value!r}"  # python prints no int of 10,000 digits

    def nbytes(self) -> int:
        size = self._read()
        if abs(size) >= 1 << 63:
            raise self._error(f"{self._name} is more than any machine has: {self._examples}")
        if size < 1:
            raise self._error(f"{self._said} is not above zero: {self._examples}")
        return int(size)

    def _read(self) -> float:
        value, error = self._value, self._error
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise error(f"{self._said} is not a size: {self._examples}")
        if isinstance(value, float):
            share = 0 < value <= 1
            hint = f'"{value * 100:g}%" of {self._whose}' if share else f'"{value:g}GB"'
            raise error(f"{self._said}: a float has no unit; did you mean {hint}?")
        if isinstance(value, int):
            if 0 < value < 1024:
                raise error(f'{self._said} is {value} bytes; did you mean "{value}GB"?')
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*|%)\s*", value)
        if match is None:
            raise error(f"{self._said} cannot be read: {self._examples}")
        number, unit = float(match[1]), match[2]
        if unit == "%":
            return self._share(number)
        if unit.upper() not in _UNITS:
            unknown = f"unknown unit {unit}" if unit else "no unit"
            raise error(f"{self._said}: {unknown}; {self._examples}")
        return number * _UNITS[unit.upper()]

    def _share(self, percent: float) -> float:
        if percent > 100:
            raise self._error(f"{self._said}: more than all of {self._whose}")
        if self._whole is None:
            raise self._error(f'{self._said}: {self._nowhere} has no size; say bytes, like "2GB"')
        return self._whole * percent / 100

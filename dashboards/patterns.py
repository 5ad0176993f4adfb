# SPDX-License-Identifier: GPL-2.0-or-later
"""PromQL label matchers, from tables."""

from __future__ import annotations

from collections.abc import Sequence

_DIGITS = "0123456789abcdef"


def label(name: str, values: Sequence[str], *, other: bool = False) -> str:
    """A matcher for a label that is one of the values (plain words) or, if `other`, none of them."""
    exactly, pattern = ("!=", "!~") if other else ("=", "=~")
    return f'{name}{exactly}"{values[0]}"' if len(values) == 1 else f'{name}{pattern}"{"|".join(values)}"'


def msr_pattern(msrs: Sequence[range]) -> str:
    """A regular expression for the label `msr`, `0x` and hexadecimal digits without leading zeros, of these MSRs."""
    parts: list[str] = []
    for numbers in msrs:
        first, last = numbers[0], numbers[-1]
        while len(f"{first:x}") < len(f"{last:x}"):
            top = 16 ** len(f"{first:x}") - 1
            parts += _spans(f"{first:x}", f"{top:x}")
            first = top + 1
        parts += _spans(f"{first:x}", f"{last:x}")
    return f"0x({'|'.join(parts)})"


def _spans(first: str, last: str) -> list[str]:
    """Patterns for the numbers from `first` to `last`, which have equally many digits."""
    if not first:
        return [""]
    if first[0] == last[0]:
        return [first[0] + rest for rest in _spans(first[1:], last[1:])]
    low, high = _DIGITS.index(first[0]), _DIGITS.index(last[0])
    rest = len(first) - 1
    parts = []
    if first[1:] != "0" * rest:
        parts += [first[0] + part for part in _spans(first[1:], "f" * rest)]
        low += 1
    above = []
    if last[1:] != "f" * rest:
        above = [last[0] + part for part in _spans("0" * rest, last[1:])]
        high -= 1
    if low <= high:
        digits = _any_of(_DIGITS[low : high + 1])
        parts.append(digits + _any_of(_DIGITS) * rest)
    return parts + above


def _any_of(digits: str) -> str:
    """A pattern for one of these consecutive digits."""
    if len(digits) == 1:
        return digits
    runs = [run for run in ("".join(filter(str.isdecimal, digits)), "".join(filter(str.isalpha, digits))) if run]
    return "[" + "".join(run if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in runs) + "]"

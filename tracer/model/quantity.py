# SPDX-License-Identifier: GPL-2.0-or-later
"""How counts, rates, shares and times are written, in every view."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction


def number(value: int | None) -> str:
    """A count, or `?` where it is not known."""
    return "?" if value is None else f"{value:,}"


def rate(value: Fraction | float | None) -> str:
    """A count per something: whole where it is, else to two decimals; `?` where it is not known."""
    if value is None:
        return "?"
    return f"{int(value):,}" if value == int(value) else f"{float(value):,.2f}"


def share(part: Fraction | float | None, of: Fraction | float | None) -> str:
    """PART in percent of OF; empty where there is none."""
    return "" if part is None or not of else f"{float(part / of):.1%}"


def duration(seconds: float | None) -> str:
    """A time with its unit, to three digits."""
    if seconds is None:
        return "?"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 999.5 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def listed(words: Iterable[str]) -> str:
    """WORDS as a part of a sentence."""
    *most, last = list(words)
    return f"{', '.join(most)} and {last}" if most else last

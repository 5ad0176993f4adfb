# SPDX-License-Identifier: GPL-2.0-or-later
"""How counts, rates, shares and times are written, in every view."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

#: How many names of hosts or reports a sentence has.
TITLES_SHOWN = 5


def number(value: int | None) -> str:
    """A count, or `?` where it is not known."""
    return "?" if value is None else f"{value:,}"


def rate(value: Fraction | float | None) -> str:
    """A count per something: an integer if it is one, else with two decimals; `?` where it is not known."""
    if value is None:
        return "?"
    return f"{int(value):,}" if value == int(value) else f"{float(value):,.2f}"


def per_second(value: float | None) -> str:
    """A rate: whole numbers if it is high, and never 0 if it is not; `?` where it is not known."""
    if value is None:
        return "?"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.1 or not value else f"{value:.1g}"


def share(part: Fraction | float | None, of: Fraction | float | None) -> str:
    """`part` as a percentage of `of`; empty where either is unknown, or `of` is 0."""
    return "" if part is None or not of else f"{float(part / of):.1%}"


def percent(one: Fraction | None, other: Fraction | None) -> str:
    """The relative change from `one` to `other`, with its sign; empty where it is unknown or `one` is 0."""
    if not one or other is None:
        return ""
    return "0.0%" if one == other else f"{float((other - one) / one):+.1%}"


def duration(seconds: float | None) -> str:
    """A time with its unit, to three significant digits."""
    if seconds is None:
        return "?"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 999.5 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def some(names: Iterable[str]) -> str:
    """The different ones of the names as a list within a sentence, as many as can be shown; empty if there is none."""
    found = list(dict.fromkeys(filter(None, names)))
    more = len(found) - TITLES_SHOWN
    return listed([*found[:TITLES_SHOWN], f"{more:,} more"] if more > 0 else found) if found else ""


def listed(words: Iterable[str]) -> str:
    """The words as a list within a sentence: `a, b and c`."""
    *most, last = list(words)
    return f"{', '.join(most)} and {last}" if most else last

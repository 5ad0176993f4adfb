# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a filter update takes, from several reports: times vary, so they have a median and an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Time:
    """Seconds that a filter update takes: the median of the reports' means, and a confidence interval for the median.

    The interval is from order statistics, so it assumes no distribution. `coverage` is its confidence level: with fewer
    than six reports it spans all of them and is still below 95%. One report gives no interval.
    """

    median: float
    low: float | None
    high: float | None
    coverage: float | None
    reports: int


def timed(means: Sequence[float]) -> Time:
    """The median of the means, of which there is at least one, and its confidence interval."""
    ordered, count = sorted(means), len(means)
    if count == 1:
        return Time(ordered[0], None, None, None, 1)

    # The median lies outside if fewer than `rank` of `count` coin tosses are heads, or fewer than `rank` are tails.
    rank, outside = 1, 1
    while rank < count // 2 and _coverage(outside + comb(count, rank), count) >= _CONFIDENCE:
        outside += comb(count, rank)
        rank += 1
    return Time(median(ordered), ordered[rank - 1], ordered[count - rank], _coverage(outside, count), count)


def _coverage(outside: int, count: int) -> float:
    """The probability that `count` coin tosses have none of `outside` outcomes, nor the mirror image of one."""
    return 1 - outside / (1 << (count - 1))

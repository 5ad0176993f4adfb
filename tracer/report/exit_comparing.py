# SPDX-License-Identifier: GPL-2.0-or-later
"""The exits of two sides of a comparison: exact counts, and how many a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tracer.report.report import Report


@dataclass(frozen=True, order=True)
class ExitAccess:
    """An access to an MSR, by a guest (l1) or by a guest's guest (l2)."""

    msr: int
    access: str
    guest: str


@dataclass(frozen=True)
class SideExits:
    """The exits of all reports of a side, and how long they traced, in seconds."""

    counts: Counter[ExitAccess]
    total: int
    seconds: Fraction

    def per_second(self, count: int) -> Fraction | None:
        """A count as a rate; None if no time has passed."""
        return Fraction(count) / self.seconds if self.seconds else None


@dataclass(frozen=True)
class ExitChange:
    """The exits on an access on either side."""

    of: ExitAccess
    base: int
    new: int


def exits_of(reports: Sequence[Report]) -> SideExits | None:
    """The exits of a side; None unless all of its reports counted them."""
    counts: Counter[ExitAccess] = Counter()
    total = 0
    for report in reports:
        if report.exits is None or report.totals.exits is None:
            return None
        total += report.totals.exits
        for row in report.exits:
            counts[ExitAccess(row.index, row.access, row.guest)] += row.exits
    return SideExits(counts, total, sum((Fraction(report.duration_seconds) for report in reports), Fraction()))


def exit_changes(base: SideExits, new: SideExits) -> list[ExitChange]:
    """The accesses of both sides, those first whose rates differ most."""

    def order(change: ExitChange) -> tuple[Fraction, ExitAccess]:
        rates = [side.per_second(count) or Fraction() for side, count in ((base, change.base), (new, change.new))]
        return -abs(rates[1] - rates[0]), change.of

    found = (ExitChange(of, base.counts[of], new.counts[of]) for of in base.counts | new.counts)
    return sorted(found, key=order)

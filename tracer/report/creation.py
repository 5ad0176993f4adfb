# SPDX-License-Identifier: GPL-2.0-or-later
"""What the creation of a vCPU takes, by the reports of one side of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction

from tracer.model.cause import VCPU_CREATE
from tracer.model.vendors import vendor_named
from tracer.report.report import BitCounts, Host, Report, by_bit


@dataclass(frozen=True)
class PerCreation:
    """Calls (or bits that they name) and recalculations per vCPU created; None: unknown, or the kernel makes none."""

    calls: Fraction | None = None
    redundant: Fraction | None = None
    recalculations: Fraction | None = None


def vcpus_created(reports: Iterable[Report]) -> int | None:
    """vCPUs created; None if that is unknown of any report."""
    return _sum(report.totals.vcpus_created for report in reports)


def per_creation(reports: Sequence[Report], unit: str) -> PerCreation:
    """The figures of all reports together; `unit` is what is counted, `call` or `bit`."""
    vcpus = vcpus_created(reports)
    if not vcpus or any(report.totals.calls is None for report in reports):
        return PerCreation()
    rows = [row for report in reports for row in report.rows(VCPU_CREATE)]
    found = by_bit(rows).values() if unit == "bit" else [BitCounts(row.calls, row.redundant) for row in rows]
    exact = all(report.host.redundancy == "exact" for report in reports)

    def each(count: int | None) -> Fraction | None:
        return None if count is None else Fraction(count, vcpus)

    return PerCreation(
        calls=each(sum(counts.calls for counts in found)),
        redundant=each(_sum(counts.redundant for counts in found)) if exact else None,
        recalculations=each(_sum(report.totals.creation_recalculations for report in reports)),
    )


def recalculates(host: Host) -> bool:
    """Whether the host's kernel may recalculate for other reasons than a filter, as far as can be known."""
    layout = vendor_named(host.vendor).layout(host.layout)
    return layout is None or bool(layout.filter_set)


def spreads(reports: Sequence[Report]) -> dict[str, set[Fraction]]:
    """The figures in which the reports of one side differ, by what they count."""
    figures = zip(*(astuple(per_creation([report], "call")) for report in reports), strict=True)
    found = {what: {*values} - {None} for what, values in zip(PerCreation.__annotations__, figures, strict=True)}
    return {what: values for what, values in found.items() if len(values) > 1}


def _sum(values: Iterable[int | None]) -> int | None:
    found = list(values)
    return None if None in found else sum(value or 0 for value in found)

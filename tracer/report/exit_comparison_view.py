# SPDX-License-Identifier: GPL-2.0-or-later
"""The exits of a comparison, in words and as JSON."""

from __future__ import annotations

from fractions import Fraction

from tracer.model import msr
from tracer.model.exits import L2
from tracer.model.quantity import per_second, percent
from tracer.report.compare import Side
from tracer.report.document import Section, Table
from tracer.report.exit_comparing import ExitChange, SideExits, exit_changes
from tracer.report.report import whole

_ROWS = 40  # guests choose the MSRs


def exit_sections(base: Side, new: Side) -> list[Section]:
    """The section on exits; none where neither side counted them."""
    if base.exits is None and new.exits is None:
        return []
    if base.exits is None or new.exits is None:
        lacking = base if base.exits is None else new
        what = "were not counted" if len(lacking.reports) == 1 else "were not counted in all of its reports"
        return [Section("Exits", (f"{lacking.title}: exits {what} (--exits), so there is nothing to compare",))]
    changes = exit_changes(base.exits, new.exits)
    lines = ["The counts are exact; the rates vary, as times do."]
    if len(changes) > _ROWS:
        lines.append(f"{_ROWS} of {len(changes):,} rows are shown here: --format json has all")
    rows = [_cells(base.exits, new.exits, change) for change in changes[:_ROWS]]
    rows.append(("all exits", "", "", *_figures(base.exits, new.exits, base.exits.total, new.exits.total)))
    headers = ("MSR", "name", "access", base.title, new.title, "change")
    return [Section("Exits (a second)", tuple(lines), Table(headers, tuple(rows), names=3))]


def _cells(base: SideExits, new: SideExits, change: ExitChange) -> tuple[str, ...]:
    number, name = msr.hexadecimal(change.of.msr), msr.name(change.of.msr)
    access = f"{change.of.access}, L2" if change.of.guest == L2 else change.of.access
    return (number, "" if name == number else name, access, *_figures(base, new, change.base, change.new))


def _figures(base: SideExits, new: SideExits, one: int, other: int) -> tuple[str, ...]:
    """The counts with their rates, and how the rate changed."""
    rates = base.per_second(one), new.per_second(other)
    counts = (f"{count:,} ({_rate(rate)})" for count, rate in zip((one, other), rates, strict=True))
    return (*counts, percent(*rates))


def _rate(value: Fraction | None) -> str:
    return per_second(None if value is None else float(value))


def exits_json(base: Side, new: Side) -> list[dict[str, object]] | None:
    """The rows, with exact counts; None unless both sides counted exits."""
    if base.exits is None or new.exits is None:
        return None

    def figures(side: SideExits, count: int) -> dict[str, object]:
        rate = side.per_second(count)
        return {"exits": count, "per_second": None if rate is None else whole(float(rate))}

    return [
        {
            "msr": msr.hexadecimal(change.of.msr),
            "name": msr.name(change.of.msr),
            "access": change.of.access,
            "guest": change.of.guest,
            "base": figures(base.exits, change.base),
            "new": figures(new.exits, change.new),
        }
        for change in exit_changes(base.exits, new.exits)
    ]

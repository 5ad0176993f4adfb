# SPDX-License-Identifier: GPL-2.0-or-later
"""Two groups of reports compared: what a filter update costs on one kernel and on another.

Counts per filter update are exact, so they are compared as fractions, never rounded; repeats must agree. Times vary,
so they have a median and an interval.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from functools import cached_property

from tracer.model.cause import FILTER_CHANGE
from tracer.model.errors import MsrtraceError
from tracer.model.quantity import TITLES_SHOWN, some
from tracer.model.text import printable
from tracer.model.verdict import PATCH, Verdict, headline
from tracer.report.computer import Difference, differing, machines, parameters
from tracer.report.creation import PerCreation, per_creation, spreads
from tracer.report.exit_comparing import SideExits, exits_of
from tracer.report.interval import Time, timed
from tracer.report.report import Bit, BitCounts, CallRow, Host, Report, by_bit
from tracer.report.state_diff import OneSided, one_sided

SCHEMA = "msrtrace-comparison/1"
_COMMAND_SHOWN = 500
_DAY = len("2026-11-22")  # of a time in ISO 8601


class Incomparable(MsrtraceError):
    """The reports cannot be compared."""

    status = 3


@dataclass(frozen=True)
class PerUpdate:
    """Calls that a filter update makes (or bits that it names), and how many of them are redundant; None: unknown."""

    calls: Fraction | None
    redundant: Fraction | None


@dataclass(frozen=True)
class Row:
    """A bit of the bitmap and what a filter update does to it on either side."""

    bit: Bit
    base: PerUpdate
    new: PerUpdate


@dataclass(frozen=True)
class Window:
    """The time from which stored counts are, in UTC."""

    begin: datetime
    end: datetime

    def __str__(self) -> str:
        end = f"{self.end:%H:%M:%S}" if self.begin.date() == self.end.date() else f"{self.end:%Y-%m-%d %H:%M:%S}"
        return f"{self.begin:%Y-%m-%d %H:%M:%S} to {end} UTC"


@dataclass(frozen=True)
class Side:
    """The reports on one side of a comparison, their counts pooled. `window`: where they are from stored counts."""

    title: str
    reports: tuple[Report, ...]
    window: Window | None = None

    @property
    def report(self) -> Report:
        """The first report, which stands for the host."""
        return self.reports[0]

    @cached_property
    def updates(self) -> int:
        """Filter updates counted."""
        return sum(report.totals.filter_updates or 0 for report in self.reports)

    @cached_property
    def rows(self) -> list[CallRow]:
        """The calls made by filter updates."""
        return [row for report in self.reports for row in report.rows(FILTER_CHANGE)]

    @cached_property
    def by_bit(self) -> dict[Bit, BitCounts]:
        """Those calls, by the bits that they name."""
        return by_bit(self.rows)

    @cached_property
    def observable(self) -> bool:
        """Whether calls can be observed, and there were filter updates to divide them by."""
        return bool(self.updates) and all(r.totals.calls is not None for r in self.reports)

    @cached_property
    def exact(self) -> bool:
        """Whether redundancy is known."""
        return all(report.host.redundancy == "exact" for report in self.reports)

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict on the side's kernel: undecided if its reports disagree."""
        by_headline = self._by_headline
        if len(by_headline) == 1:
            return self.report.verdict
        parts = [
            f"{title} in {len(found):,} ({', '.join(sorted({r.title for r in found})[:TITLES_SHOWN])}"
            f"{', ...' if len(found) > TITLES_SHOWN else ''})"
            for title, found in sorted(by_headline.items())
        ]
        return Verdict(patched=None, why=f"its reports disagree: {', '.join(parts)}")

    @property
    def headline(self) -> str:
        """That verdict in a few words."""
        return next(iter(self._by_headline)) if len(self._by_headline) == 1 else PATCH[None]

    @cached_property
    def _by_headline(self) -> dict[str, list[Report]]:
        result: dict[str, list[Report]] = {}
        for report in self.reports:
            result.setdefault(headline(report.verdict.patched, report.host.vendor), []).append(report)
        return result

    @property
    def hosts(self) -> list[str]:
        """The names of the hosts on which its reports were made, where they are known."""
        return list(dict.fromkeys(report.host.name for report in self.reports if report.host.name))

    @property
    def origin(self) -> str:
        """On which hosts and kernels its reports were made, and when (UTC)."""
        names = some(self.hosts) + (" (all: --format json)" if len(self.hosts) > TITLES_SHOWN else "")
        kernels = some(f"Linux {report.host.kernel}" for report in self.reports)
        days = sorted({report.started[:_DAY] for report in self.reports})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        return ", ".join(part for part in (names, kernels, when) if part)

    def calls(self) -> PerUpdate:
        """Calls per filter update."""
        return self._per_update(BitCounts(row.calls, row.redundant) for row in self.rows)

    def bits(self) -> PerUpdate:
        """Bits named per filter update: a call that names two bits counts twice."""
        return self._per_update(self.by_bit.values())

    def of(self, bit: Bit) -> PerUpdate:
        """Calls per filter update that name the bit."""
        found = self.by_bit.get(bit)
        return self._per_update([found] if found else [])

    def _per_update(self, counts: Iterable[BitCounts]) -> PerUpdate:
        found = list(counts)
        if not self.observable:
            return PerUpdate(None, None)
        calls = Fraction(sum(c.calls for c in found), self.updates)
        known = self.exact and all(c.redundant is not None for c in found)
        return PerUpdate(calls, Fraction(sum(c.redundant or 0 for c in found), self.updates) if known else None)

    @cached_property
    def exits(self) -> SideExits | None:
        """The exits of guests' accesses to MSRs; None unless all of its reports counted them."""
        return exits_of(self.reports)

    def time(self) -> Time | None:
        """Seconds per filter update."""
        seconds = [r.filter_update_seconds for r in self.reports]
        means = sorted(s.sum / s.count for s in seconds if s and s.count)
        return timed(means) if means else None


@dataclass(frozen=True)
class Comparison:
    """Two sides. `unit` is what is counted: `call`, or `bit` where the kernels' functions differ.

    `forced` are the reasons not to compare them that `--force` overrode. `intercepted`: what every vCPU that there was
    at the end of a trace intercepted then on one side, and passed through on the other.
    """

    base: Side
    new: Side
    unit: str
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    forced: tuple[str, ...] = ()
    intercepted: tuple[OneSided, ...] = ()

    def per_update(self, side: Side) -> PerUpdate:
        """The sum of one side, in the unit of the comparison."""
        return side.bits() if self.unit == "bit" else side.calls()

    def per_creation(self, side: Side) -> PerCreation:
        """The same of a vCPU's creation."""
        return per_creation(side.reports, self.unit)


def compare(
    base: Sequence[Report],
    new: Sequence[Report],
    *,
    force: bool = False,
    titles: tuple[str, str] | None = None,
    windows: tuple[Window | None, Window | None] = (None, None),
    apart: Sequence[str] = (),
) -> Comparison:
    """Compare the reports of two sides.

    :param force: compare what should not be compared; the result says why
    :param titles: names of the sides; None: those of their first reports
    :param windows: of the stored counts that the reports were made from
    :param apart: what else is known that speaks against comparing them
    :raises Incomparable: with every reason, unless `force`
    """
    titles = titles or _titles(base, new)
    one, other = Side(titles[0], tuple(base), windows[0]), Side(titles[1], tuple(new), windows[1])
    reasons = [*apart, *_reasons(one), *_reasons(other), *_between(one, other)]
    if reasons and not force:
        raise Incomparable("; ".join(reasons) + " (--force compares them anyway)")
    bits = sorted(one.by_bit.keys() | other.by_bit.keys(), key=lambda bit: (bit.msr, bit.direction))
    return Comparison(
        base=one,
        new=other,
        unit="call" if one.report.host.functions == other.report.host.functions else "bit",
        rows=tuple(Row(bit, one.of(bit), other.of(bit)) for bit in bits),
        differences=tuple(_differences(one, other)),
        warnings=(*_spread(one), *_spread(other), *_warnings(one, other)),
        forced=tuple(reasons),
        intercepted=one_sided(*([r.state for r in side.reports if r.state] for side in (one, other))),
    )


def _titles(base: Sequence[Report], new: Sequence[Report]) -> tuple[str, str]:
    one, other = base[0].title, new[0].title
    return (one, other) if one != other else ("base", "new")


def layouts(one: Host, other: Host) -> str:
    """The layouts of two hosts, for people."""
    if one.vendor == other.vendor:
        return f"layouts {one.layout} and {other.layout}"
    return f"layouts {one.layout} of {one.title} and {other.layout} of {other.title}"


def _reasons(side: Side) -> list[str]:
    """Why the reports of a side cannot be compared with any others."""
    found: dict[str, None] = {}
    bounds: dict[str, dict[str, None]] = {}
    for report in side.reports:
        if report.totals.calls is None:
            found[f"{side.title}: calls cannot be observed on that kernel (layout {report.host.layout})"] = None
        elif not report.totals.filter_updates:
            found[f"{side.title}: no filter update was seen, so there is nothing to divide by"] = None
        if report.lower_bound:
            bounds.setdefault(lost(report), {})[report.title] = None
        if report.host.vendor != side.report.host.vendor:
            found[f"{side.title} has reports of hosts that are not the same kind of hardware"] = None
        elif report.host.layout != side.report.host.layout:
            found[f"{side.title} has reports of kernels with different layouts"] = None
        if report.command != side.report.command:
            found[f"{side.title} has reports of different workloads"] = None
    for what, which in bounds.items():
        names = ", ".join(list(which)[:TITLES_SHOWN]) + (", ..." if len(which) > TITLES_SHOWN else "")
        found[f"{side.title if names == side.title else f'{side.title} ({names})'} is a lower bound: {what}"] = None
    return list(found)


def _between(one: Side, other: Side) -> list[str]:
    found = []
    if one.report.command != other.report.command:
        found.append(
            f"the workloads differ: {one.title} ran {format_command(one.report.command)}, "
            f"{other.title} {format_command(other.report.command)}"
        )
    if one.report.host.functions != other.report.host.functions and one.observable and other.observable:
        unknown = [side.title for side in (one, other) if side.bits().redundant is None]
        if unknown:
            found.append(
                f"the kernels' functions differ ({layouts(one.report.host, other.report.host)}), "
                f"so outcomes per bit are needed, and those of {' and '.join(unknown)} are unknown"
            )
    return found


def format_command(command: Sequence[str] | None) -> str:
    """The command quoted for a shell, cut at a length that can be shown."""
    return printable(shlex.join(command), _COMMAND_SHOWN) if command else "no command"


def lost(report: Report) -> str:
    """What the report missed, in words; "nothing" if it missed nothing."""
    loss = report.loss
    parts = loss.words()
    if loss.module_unloads:
        times = "once" if loss.module_unloads == 1 else f"{loss.module_unloads} times"
        parts.append(f"{report.host.module} reloaded {times}")
    parts += [f"{name} not probed" for name in loss.not_probed]
    return ", ".join(parts) or "nothing"


def _spread(side: Side) -> list[str]:
    """Warnings about repeats whose counts per update differ, and about counts per update that are not integers."""
    found = []
    each = [Side(side.title, (report,)) for report in side.reports]
    values = [one.calls() for one in each]
    for what in ("calls", "redundant"):
        numbers = {getattr(value, what) for value in values} - {None}
        if len(numbers) > 1:
            found.append(f"{side.title}: {what} per filter update {_between_them(numbers)}")
        elif any(number.denominator != 1 for number in numbers):
            found.append(
                f"{side.title}: {what} per filter update is not an integer: VMs differ, or updates were in "
                "progress when the trace began or ended"
            )
    if not found and len({_profile(one) for one in each}) > 1:
        found.append(
            f"{side.title}: its reports differ in which MSRs a filter update touches; the table has their mean"
        )
    for what, numbers in spreads(side.reports).items():
        found.append(f"{side.title}: {what} per vCPU created {_between_them(numbers)}")
    return found


def _between_them(numbers: set[Fraction]) -> str:
    """Different figures of the reports of a side, in words."""
    spread = f"{float(min(numbers)):g} to {float(max(numbers)):g}"
    return f"differ between its reports, {spread}; the table has their mean"


def _profile(side: Side) -> frozenset[tuple[Bit, PerUpdate]]:
    """What a filter update does to every bit."""
    return frozenset((bit, side.of(bit)) for bit in side.by_bit)


def _warnings(one: Side, other: Side) -> list[str]:
    found = []
    if one.report.command is None and other.report.command is None:
        found.append("neither report ran a command, so whether the workloads were the same is unknown")
    if one.report.host.vendor != other.report.host.vendor:
        kinds = f"{one.report.host.title} and {other.report.host.title}"
        found.append(f"not the same kind of hardware ({kinds}), so the times cannot be compared")
    elif one.report.host.cpu != other.report.host.cpu:
        found.append("the CPUs differ, so the times cannot be compared")
    for side in (one, other):
        kernels = sorted({report.host.kernel for report in side.reports})
        if len(kernels) > 1:
            found.append(f"{side.title} has reports of {len(kernels)} kernels: {', '.join(kernels)}")
        failed = {r.exit_status for r in side.reports if r.exit_status}
        if failed:
            found.append(f"{side.title}: the command ended with status {', '.join(map(str, sorted(failed)))}")
        if side.observable and not side.exact:
            found.append(f"{side.title}: which calls are redundant is unknown")
    return found


def _differences(base: Side, new: Side) -> list[Difference]:
    one, other = base.report, new.report
    named = len(base.hosts) == len(new.hosts) == 1  # of more, the first does not stand for all
    return differing(
        [
            *machines(one.host, other.host, named=named),
            ("layout", one.host.layout, other.host.layout),
            ("backend", one.host.backend, other.host.backend),
            ("redundancy", one.host.redundancy, other.host.redundancy),
            ("msrtrace", one.msrtrace, other.msrtrace),
            ("vCPUs seen", str(one.host.vcpus_seen), str(other.host.vcpus_seen)),
            ("VMMs seen", str(one.host.vmms_seen), str(other.host.vmms_seen)),
            *parameters(one.host, other.host),
        ]
    )

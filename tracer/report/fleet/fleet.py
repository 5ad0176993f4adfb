# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports on many hosts, from what a Prometheus stored.

Counts are taken from the raw samples. PromQL's increase() extrapolates to the edges of its window, which makes 12.98
calls of 13. targets.py says whose a series is; runs.py and lineage.py which series continue which.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import msgspec

from tracer.model.errors import MsrtraceError
from tracer.model.quantity import some
from tracer.report.fleet.counts import Grown, check_complete, recalculations_known, snapshot, vendor_of
from tracer.report.fleet.lineage import Process, processes
from tracer.report.fleet.pairing import Targets, unpaired
from tracer.report.fleet.prometheus_api import Prometheus, Series, point_in_time, seconds
from tracer.report.fleet.runs import runs
from tracer.report.fleet.targets import (
    INFO,
    MACHINE_LABELS,
    MAYBE_OWN,
    OWN,
    REPLICA_LABELS,
    START,
    Stream,
    Target,
    differing,
    innermost,
    machine,
    selector,
    streams,
)
from tracer.report.making import HostInfo, make
from tracer.report.report import Report

__all__ = ["Fleet", "Prometheus", "before_and_after", "compared", "point_in_time", "reports", "seconds"]

#: A process that started this long before the last scrape of another is not a restart of that.
_OVERLAP_SECONDS = 10.0
#: The most of the server's warnings that are shown: each of its stores may have one for each query.
_REMARKS = 3


@dataclass(frozen=True)
class Fleet:
    """The reports of each side, and warnings about all of them; `apart`: what the hosts of two windows differ in."""

    sides: list[list[Report]]
    warnings: list[str]
    apart: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Host:
    """The processes of a host, oldest first, that traced one kernel with the same layout and redundancy."""

    grown: tuple[Grown, ...]

    @property
    def target(self) -> Target:
        return self.grown[-1].process.newest.target

    @property
    def targets(self) -> Targets:
        return frozenset(run.target for one in self.grown for run in one.process.runs)


@dataclass(frozen=True, eq=False)
class _Window:
    """What was stored in a window: the hosts of each side, the report on each, and warnings about all of them."""

    sides: list[dict[_Host, Report]]
    warnings: list[str]

    def counted(self, side: int) -> dict[_Host, Report]:
        """The hosts of a side that have a report in the comparison: those where a filter changed, unless none did."""
        hosts = self.sides[side]
        return {host: report for host, report in hosts.items() if report.totals.filter_updates} or hosts


def reports(prometheus: Prometheus, selectors: Iterable[str], window: int, end: float) -> list[Report]:
    """A report for each host that any selector matches.

    Hosts on which no filter changed are left out, unless that leaves none. A host whose kernel changed has a report for
    each kernel.

    :param selectors: label matchers of PromQL, with or without the braces: `patch="x"`
    :param window: in seconds
    :param end: of the window, in seconds since 1970
    :raises MsrtraceError: if no host matches, or the stored samples are ambiguous
    """
    return compared(prometheus, [selectors], window, end).sides[0]


def before_and_after(
    prometheus: Prometheus, sides: Sequence[Iterable[str]], window: int, ends: Sequence[float]
) -> Fleet:
    """As `compared`, for two windows that do not overlap, so that a host may be on both sides: one end for each."""
    windows = [_window(prometheus, [side], window, end, past=True) for side, end in zip(sides, ends, strict=True)]
    hosts = [found.counted(0) for found in windows]
    warnings = list(dict.fromkeys(warning for found in windows for warning in found.warnings))
    scraped, counted = _alone([found.sides[0] for found in windows]), _alone(hosts)
    apart = tuple(f"scraped only {when}: {some(names)}" for when, names in scraped.items() if names)
    for when, names in counted.items():
        if less := some(name for name in names if name not in scraped[when]):
            warnings.append(f"counted only {when}, as in the other window no filter changed there: {less}")
    one, other = ({text.strip() for text in side} for side in sides)
    if one != other:  # other hosts may be meant, unless some are the same
        shared = len(windows[0].sides[0]) > len(scraped["before"])
        apart, warnings = (), [*(apart if shared else ()), *warnings]
    return Fleet([list(found.values()) for found in hosts], warnings, apart)


def _alone(windows: Sequence[Mapping[_Host, Report]]) -> dict[str, list[str]]:
    """The names of the hosts that are in the window `before` only, or in the one `after`."""
    alone = unpaired(*([host.targets for host in hosts] for hosts in windows))
    names = [[report.host.name for report in hosts.values()] for hosts in windows]
    return {
        when: [side[place] for place in places]
        for when, side, places in zip(("before", "after"), names, alone, strict=True)
    }


def compared(
    prometheus: Prometheus, sides: Sequence[Iterable[str]], window: int, end: float, *, past: bool = False
) -> Fleet:
    """As `reports`, for the selectors of each side.

    Raises MsrtraceError also if a host that counted something is on two sides.

    :param past: whether `end` is not now, so that errors name it
    """
    found = _window(prometheus, sides, window, end, past=past)
    return Fleet([list(found.counted(side).values()) for side in range(len(found.sides))], found.warnings)


def _window(prometheus: Prometheus, sides: Sequence[Iterable[str]], window: int, end: float, *, past: bool) -> _Window:
    """What `compared` makes reports of."""
    when = f"in the last {window} s" + (
        f" before {datetime.fromtimestamp(end, timezone.utc):%Y-%m-%d %H:%M:%S} UTC" if past else ""
    )
    matched = [_matched(prometheus, selectors, window, end, when) for selectors in sides]
    stored: dict[Target, Stream] = {}
    for side in matched:
        for stream in side.values():
            _add(stored, stream)
    begin = end - window
    found = [
        Grown(process, process.increases())
        for process in processes([run for stream in stored.values() for run in runs(stream, begin)], begin)
    ]
    for one in found:
        check_complete(one)
    hosts = [_hosts(_of_side(found, matched, number)) for number in range(len(matched))]
    titles = _titles([host for side in hosts for host in side])
    missing = [f"Prometheus warned that series may be missing: {text}" for text in prometheus.incomplete]
    remarks = [f"Prometheus remarked: {text}" for text in prometheus.notices[:_REMARKS]]
    made = [{host: _report(titles[host], host, missing[:_REMARKS]) for host in side} for side in hosts]
    return _Window(made, [*_warnings(found), *remarks])


def _matched(
    prometheus: Prometheus, selectors: Iterable[str], window: int, end: float, when: str
) -> dict[Target, Stream]:
    """The streams of msrtrace that any of the selectors matches; `when` has the window in words."""
    result: dict[Target, Stream] = {}
    for text in selectors:
        inside = text.strip().removeprefix("{").removesuffix("}").strip().rstrip(",")
        found = streams(_stored(prometheus, inside, window, end))
        ours = {target: stream for target, stream in found.items() if any(name != START for name, _ in stream.series)}
        if not ours:
            raise MsrtraceError(f"Prometheus has no series of msrtrace for {{{inside}}} {when}{_remarks(prometheus)}")
        if all(name == INFO for stream in ours.values() for name, _ in stream.series):
            labels = ", ".join((*OWN[INFO], *MAYBE_OWN[INFO]))
            raise MsrtraceError(
                f"{{{inside}}} matches {INFO} and no series with counts: select hosts by labels of their targets, "
                f"not by labels of that metric ({labels})"
            )
        for stream in ours.values():
            _add(result, stream)
    return result


def _remarks(prometheus: Prometheus) -> str:
    """What may explain that series are missing."""
    return "".join(f"; it warned: {text}" for text in prometheus.incomplete[:_REMARKS])


def _add(streams: dict[Target, Stream], more: Stream) -> None:
    """Add a stream to the one of the same target, if there is one."""
    stream = streams.setdefault(more.target, Stream(more.target))
    for key, samples in more.series.items():
        stream.add(key, samples)


def _stored(prometheus: Prometheus, inside: str, window: int, end: float) -> dict[str, list[Series]]:
    """The stored series by the name of their metric."""
    return {name: prometheus.series(name, inside, window, end) for name in OWN}


def _of_side(found: Sequence[Grown], matched: Sequence[Mapping[Target, Stream]], number: int) -> list[Grown]:
    """The processes on the side of that number. Raises MsrtraceError if one is on another side, too."""
    result = []
    for one in found:
        targets = {run.target for run in one.process.runs}
        sides = [place for place, side in enumerate(matched) if not targets.isdisjoint(side)]
        if len(sides) > 1 and one.counted:
            labels = sorted({name for target in targets for name in differing(target, min(targets))})
            under = f" under several labels ({', '.join(labels)})" if labels else ""
            raise MsrtraceError(
                f"{' and '.join(map(selector, sorted(targets)))}: one msrtrace{under} is on both sides of the "
                "comparison; select it by a label for one of them"
            )
        if number in sides:
            result.append(one)
    return result


def _hosts(found: Sequence[Grown]) -> list[_Host]:
    """The processes by host, and by kernel where a host had several, in the order of their labels."""
    ordered = sorted(found, key=lambda one: (one.process.first, one.process.newest.target))
    number: list[int] = []  # of its host, for each
    latest: dict[Target, int] = {}  # the newest process with those labels
    for index, one in enumerate(ordered):
        targets = {run.target for run in one.process.runs}
        before = [latest[target] for target in targets if target in latest]
        before = before or _restarted([one.process for one in ordered], index, number)
        same = {number[place] for place in before}
        number = [index if host in same else host for host in number] if same else number
        number.append(index)
        latest |= dict.fromkeys(targets, index)
    hosts: dict[tuple[int, Target], list[Grown]] = defaultdict(list)
    for host, one in zip(number, ordered, strict=True):
        hosts[host, _kind(one)].append(one)
    return sorted((_Host(tuple(grown)) for grown in hosts.values()), key=_order)


def _kind(one: Grown) -> Target:
    """What the counts of one report must have in common: the kernel, its layout, redundancy and the vendor."""
    labels = tuple((name, one.info.get(name, "?")) for name in ("kernel", "layout", "redundancy"))
    return (*labels, ("vendor", vendor_of(one.info).name))


def _order(host: _Host) -> tuple[str, str, Target, float]:
    labels = innermost(host.target)
    return labels.get("job", ""), labels.get("instance", ""), host.target, host.grown[0].process.first


def _restarted(ordered: Sequence[Process], index: int, number: Sequence[int]) -> list[int]:
    """The earlier processes of the host that process `index` may be a restart of, under another label such as its pod.

    `number` has the host of each earlier process. Empty if there is none, or more than one candidate.
    """
    new = ordered[index]

    def follows(old: Process, new: Process) -> bool:
        apart = new.start is None or new.start > old.last - _OVERLAP_SECONDS
        return new.from_zero and old.last < new.first and apart and _same_machine(old.newest.target, new.runs[0].target)

    found = [place for place in range(index) if follows(ordered[place], new)]
    if len({number[place] for place in found}) != 1:
        return []
    overlapping = (one for one in ordered if one is not new and one.first <= new.last and new.first <= one.last)
    return [] if any(follows(ordered[found[-1]], one) for one in overlapping) else found


def _same_machine(one: Target, other: Target) -> bool:
    """Whether two targets have the same job and machine; if a label names the machine, the instance may differ."""
    old, new = innermost(one), innermost(other)
    apart = {name for name in MACHINE_LABELS if old.get(name) != new.get(name)}
    named = any(name in old for name in MACHINE_LABELS - apart - {"instance"})
    return old.get("job") == new.get("job") and (not apart or (apart == {"instance"} and named))


def _titles(hosts: Sequence[_Host]) -> dict[_Host, str]:
    """The titles of hosts: the instance and, where several share it, the labels in which they differ."""
    titles: dict[_Host, str] = {}
    by_instance: dict[str, list[_Host]] = defaultdict(list)
    for host in hosts:
        by_instance[machine(host.target)].append(host)
    for instance, same in by_instance.items():
        labels = [dict(host.target) for host in same]
        if len({host.target for host in same}) < len(same):
            labels = [dict(_kind(host.grown[-1])) | dict(host.target) for host in same]
        names = sorted({name for one in labels for name in one})
        apart = [name for name in names if len({one.get(name) for one in labels}) > 1]
        for host, one in zip(same, labels, strict=True):
            more = ", ".join(f'{name}="{one[name]}"' for name in apart if name in one)
            titles[host] = f"{instance} ({more})" if more else instance
    return titles


def _report(title: str, host: _Host, missing: Sequence[str]) -> Report:
    """The report on a host, a lower bound if anything is `missing`: a phrase each."""
    info = host.grown[-1].info
    first = min(one.process.first for one in host.grown)
    last = max(one.process.last for one in host.grown)
    restarts = len(host.grown) - 1
    notes = [f"{title}: msrtrace was restarted {'once' if restarts == 1 else f'{restarts} times'}"] if restarts else []
    for one in host.grown:
        notes += _copies(title, one.process)
    made = make(
        replace(snapshot(info, host.grown), uncounted=tuple(missing)),
        HostInfo(kernel=info.get("kernel", "?"), version="", cpu="", module_parameters={}, name=title),
        started=datetime.fromtimestamp(first, timezone.utc),
        duration=last - first,
        version=info.get("version", ""),
        label=title,
        notes=notes,
    )
    made = msgspec.structs.replace(made, recalculation_seconds=None)  # their times are not queried
    return made if recalculations_known(host.grown) else _without_recalculations(made)


def _without_recalculations(made: Report) -> Report:
    """The report with its recalculations unknown rather than 0."""
    totals = msgspec.structs.replace(made.totals, recalculations=None, creation_recalculations=None)
    each = made.per_vcpu_creation and msgspec.structs.replace(made.per_vcpu_creation, recalculations=None)
    return msgspec.structs.replace(made, totals=totals, per_vcpu_creation=each)


def _copies(title: str, process: Process) -> list[str]:
    """Notes on a process that was stored under several label sets."""
    targets = sorted({run.target for run in process.runs})
    apart = sorted({name for target in targets for name in differing(target, targets[0])})
    if not apart:
        return []
    if set(apart) <= REPLICA_LABELS:
        return [f"{title}: stored {len(targets)} times ({', '.join(apart)}), counted once"]
    return [f"{title}: one msrtrace under several labels ({', '.join(apart)}), counted once"]


def _warnings(found: Sequence[Grown]) -> list[str]:
    unknown = Counter(machine(one.process.newest.target) for one in found if one.process.start is None and one.counted)
    if not unknown:
        return []
    names = ", ".join(sorted(unknown)[:3]) + (", ..." if len(unknown) > 3 else "")
    return [
        f"{START} is not stored of {names}: counts begin at the first scrape in the window, and a restart of "
        "msrtrace is seen only if a counter is lower at the next scrape than before"
    ]

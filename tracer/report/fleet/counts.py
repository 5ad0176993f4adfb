# SPDX-License-Identifier: GPL-2.0-or-later
"""The counts of processes within the window, as a Snapshot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tracer.model.cause import VCPU_CREATE
from tracer.model.errors import MsrtraceError
from tracer.model.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe, Snapshot
from tracer.model.vendor import Vendor
from tracer.model.vendors import FIRST, vendor_named
from tracer.report.fleet.lineage import Process
from tracer.report.fleet.targets import (
    ATTACHED,
    BUCKETS,
    CALLS,
    INFO,
    RECALCULATIONS,
    REDUNDANT,
    SECONDS,
    UPDATES,
    VCPUS_CREATED,
    Key,
    host_family,
    selector,
)

_ROUNDING = 1e-6  # VictoriaMetrics keeps about 15 digits of a float


@dataclass(frozen=True, eq=False)
class Grown:
    """A process and the increases of its counters."""

    process: Process
    counters: Mapping[Key, float]

    @property
    def info(self) -> Mapping[str, str]:
        """The labels of its msrtrace_build_info."""
        return self.process.newest.info or {}

    @property
    def counted(self) -> bool:
        """Whether any counter grew."""
        return any(self.counters.values())

    def family(self, metric: str) -> list[tuple[dict[str, str], float]]:
        """The increases of a metric by its own labels."""
        return [(dict(own), value) for (name, own), value in self.counters.items() if name == metric]


def check_complete(one: Grown) -> None:
    """Raise MsrtraceError if series are missing without which the other counts of a process mislead."""
    target, info = one.process.newest.target, one.process.newest.info

    def refuse(metric: str, why: str) -> MsrtraceError:
        return MsrtraceError(f"{metric}{selector(target)} is not stored: {why}")

    for run in one.process.runs:
        for metric in run.split:
            raise refuse(host_family(metric), "the series by VM, which are stored, lose the counts of VMs that ended")
    if not one.counted:
        return
    if info is None:
        raise refuse(INFO, "without it the kernel and its layout are unknown")
    calls = sum(value for _, value in one.family(CALLS))
    if calls and info.get("redundancy") == "exact" and not one.family(REDUNDANT):
        raise refuse(REDUNDANT, "without it, which calls changed nothing is unknown")
    made = {key[1]: value for key, value in one.counters.items() if key[0] == CALLS}
    for (metric, own), value in one.counters.items():
        if metric == REDUNDANT and value > made.get(own, value):
            raise MsrtraceError(
                f"{REDUNDANT}{selector((*target, *own))} grew by {value:g}, more than {CALLS} of the same labels "
                f"({made[own]:g}), of which it is a part: these are no counts of one msrtrace"
            )
        if metric != SECONDS and abs(value - round(value)) > _ROUNDING * max(1, value):
            raise MsrtraceError(
                f"{metric}{selector((*target, *own))} grew by {value:g}, and counts whole things: what is stored are "
                "not the samples as they were scraped"
            )
    updates = sum(value for _, value in one.family(UPDATES))
    layout = vendor_of(info).layout(info.get("layout", ""))
    if updates and layout and layout.calls and not one.family(CALLS) and all(_attached([one]).values()):
        raise refuse(CALLS, "filter updates were counted, and each makes calls")


def vendor_of(info: Mapping[str, str]) -> Vendor:
    """The vendor in the labels of a msrtrace_build_info. Versions of msrtrace that knew only one have no such label."""
    return vendor_named(info.get("vendor", FIRST.name))


def _attached(grown: Sequence[Grown]) -> dict[str, bool]:
    """Whether each function was probed at every scrape."""
    result: dict[str, bool] = {}
    for one in grown:
        for run in one.process.runs:
            for (metric, own), samples in run.gauges.items():
                if metric == ATTACHED:
                    function = dict(own).get("function", "")
                    result[function] = result.get(function, True) and all(samples.values)
    return result


def recalculations_known(grown: Sequence[Grown]) -> bool:
    """Whether the recalculations of every process are stored."""
    return all(one.family(RECALCULATIONS) for one in grown)


def snapshot(info: Mapping[str, str], grown: Sequence[Grown]) -> Snapshot:
    """The sum over the processes of a host; `info` has the labels of its msrtrace_build_info."""
    vendor = vendor_of(info)
    layout = vendor.layout(info.get("layout", ""))
    exact = info.get("redundancy") == "exact"

    def family(metric: str) -> list[tuple[dict[str, str], float]]:
        return [pair for one in grown for pair in one.family(metric)]

    redundant: dict[tuple[str, ...], int] = defaultdict(int)
    for labels, value in family(REDUNDANT):
        redundant[_key(labels)] += round(value)
    calls: dict[tuple[str, ...], int] = defaultdict(int)
    for labels, value in family(CALLS):
        calls[_key(labels)] += round(value)
    missed, updates, recalcs = family("msrtrace_probe_missed_total"), family(UPDATES), family(RECALCULATIONS)
    return Snapshot(
        vendor=vendor.name,
        layout=info.get("layout", "?"),
        redundancy="exact" if exact else "unknown",
        backend=info.get("backend", "?"),
        calls={
            _call(key): _outcome(key[1], count, redundant.get(key, 0) if exact else None)
            for key, count in calls.items()
            if count
        },
        updates={0: Durations(_sum(updates), sum(v for _, v in family(SECONDS)), _buckets(family(BUCKETS)))}
        if updates
        else {},
        recalcs={0: Durations(_sum(recalcs))},
        creation_recalcs=_sum(recalcs, "cause", VCPU_CREATE),
        vcpus_created=_sum(family(VCPUS_CREATED)),
        probes=tuple(
            Probe(function, None, attached, "", _sum(missed, "function", function))
            for function, attached in _attached(grown).items()
        ),
        maps=tuple(
            Map(labels.get("map", ""), 0, 0, round(value)) for labels, value in family("msrtrace_dropped_updates_total")
        ),
        unpaired_returns=_sum(family("msrtrace_unpaired_returns_total")),
        unpaired_refusals=_sum(family("msrtrace_unpaired_refusals_total")),
        read_failures=_sum(family("msrtrace_read_failures_total")),
        blind_seconds=sum(value for _, value in family("msrtrace_probes_off_seconds_total")),
        module_unloads=_sum(family("msrtrace_module_unloads_total")),
        calls_observable=bool(layout is None or layout.calls),
        updates_observable=bool(updates),
        creations_observable=all(one.family(VCPUS_CREATED) for one in grown),
    )


def _key(labels: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(labels.get(name, "") for name in ("msr", "access", "action", "cause"))


def _call(key: tuple[str, ...]) -> Call:
    msr, access, action, cause = key
    try:
        return Call(int(msr, 16), access, action, cause, caller="")
    except ValueError:
        raise _foreign("msr", msr) from None


def _foreign(label: str, value: str) -> MsrtraceError:
    return MsrtraceError(f"Prometheus stored a series that is not msrtrace's: {label}={value!r}")


def _outcome(access: str, calls: int, redundant: int | None) -> Outcome:
    """The outcome. Counts per bit, which have no metric, follow unless a call for both bits changed something."""
    if redundant is None:
        return Outcome(calls)
    changed = calls - redundant
    read = changed if access == "read" else 0 if access == "write" or not changed else None
    write = changed if access == "write" else 0 if access == "read" or not changed else None
    return Outcome(calls, redundant, read, write)


def _buckets(grown: Iterable[tuple[Mapping[str, str], float]]) -> tuple[int, ...]:
    """The buckets of Durations, from the increases of the cumulative buckets."""
    cumulative: dict[float, float] = defaultdict(float)
    for labels, value in grown:
        le = labels.get("le", "")
        try:
            cumulative[float(le)] += value
        except ValueError:
            raise _foreign("le", le) from None
    buckets, below = [], 0.0
    for bound in (*DURATION_BOUNDS, float("inf")):
        now = next((v for le, v in cumulative.items() if le == bound or abs(le - bound) < 1e-9 * bound), below)
        buckets.append(max(0, round(now - below)))
        below = max(now, below)
    return tuple(buckets)


def _sum(series: Iterable[tuple[Mapping[str, str], float]], label: str = "", wanted: str = "") -> int:
    return round(sum(value for labels, value in series if not label or labels.get(label) == wanted))

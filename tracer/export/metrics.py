# SPDX-License-Identifier: GPL-2.0-or-later
"""A Snapshot as Prometheus metrics."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from operator import itemgetter

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from tracer.export.exposition import Known, LabelSets
from tracer.model import msr
from tracer.model.snapshot import DURATION_BOUNDS, Durations, Snapshot

_CALL_LABELS = ("msr", "name", "access", "action", "cause")
_VM_LABELS = ("vm", "pid")
_BOUNDS = (*(f"{bound:.9g}" for bound in DURATION_BOUNDS), "+Inf")


class SnapshotCollector(Collector):
    """Gives the metrics of what TAKE returns at each scrape, all of them made anew: nothing goes stale."""

    def __init__(
        self,
        take: Callable[[], Snapshot],
        version: str,
        kernel: str | None = None,
        complain: Callable[[str], None] = lambda _: None,
    ) -> None:
        """TAKE gives the counts; COMPLAIN gets a line for each time that it could not."""
        self._complain = complain
        self._take, self._version, self._kernel = take, version, kernel or os.uname().release
        self._lock = threading.Lock()
        self._last: Snapshot | None = None
        self._known: Known = {}
        self._failures = 0

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registration must not read the kernel."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape. Scrapes at once are each of one snapshot."""
        started = time.perf_counter()
        snapshot, failures = self._newest()
        if snapshot:
            sets = LabelSets(self._known)
            yield from self._info(snapshot)
            for together in (False, True) if snapshot.by_vm else (False,):
                yield from _calls(snapshot, sets, together)
                yield from _updates(snapshot, sets, together)
            yield from _recalculations(snapshot, sets)
            self._known = sets.now
            yield from _health(snapshot)
        yield CounterMetricFamily(
            "msrtrace_scrape_failures", "Scrapes that show older counts: reading failed.", value=failures
        )
        spent = time.perf_counter() - started
        yield GaugeMetricFamily("msrtrace_scrape_duration_seconds", "Time it took to read the counts.", value=spent)

    def _newest(self) -> tuple[Snapshot | None, int]:
        """What is counted now, or, when that cannot be read, what was known; and how often it could not."""
        with self._lock:
            try:
                self._last = self._take()
            except Exception as error:  # must not fail the scrape
                self._failures += 1
                self._complain(f"a scrape shows older counts: {type(error).__name__}: {error}")
            return self._last, self._failures

    def _info(self, snapshot: Snapshot) -> Iterator[Metric]:
        info = InfoMetricFamily("msrtrace_build", "msrtrace, the kernel, and how its MSR intercepts are traced.")
        labels = {
            "version": self._version,
            "kernel": self._kernel,
            "layout": snapshot.layout,
            "backend": snapshot.backend,
            "redundancy": snapshot.redundancy,
        }
        info.add_metric([], labels)
        yield info


def _vms(snapshot: Snapshot, together: bool) -> Mapping[int, tuple[str, ...]]:
    """By pid the values of the VM labels, if any; VMs that are gone have no series."""
    if snapshot.by_vm and not together:
        return {pid: (name, str(pid)) for pid, name in snapshot.vms.items()}
    return dict.fromkeys(snapshot.pids, ())


def _calls(snapshot: Snapshot, sets: LabelSets, together: bool) -> Iterator[Metric]:
    """Calls, by VM if VMs are told apart; TOGETHER: those of all VMs, and of the ones that are gone."""
    if not snapshot.calls_observable:
        return
    vms = _vms(snapshot, together)
    sums: dict[tuple[int, str, str, str], dict[tuple[str, ...], tuple[int, int | None]]] = defaultdict(dict)
    for call, outcome in snapshot.calls.items():
        vm = vms.get(call.pid)
        if vm is not None:
            of_vms, more = sums[call.msr, call.access, call.action, call.cause], outcome.redundant
            made, useless = of_vms.get(vm, (0, 0))
            of_vms[vm] = (made + outcome.calls, None if useless is None or more is None else useless + more)
    of = "host_" if together else ""
    calls = CounterMetricFamily(
        f"msrtrace_{of}intercept_calls",
        "Calls of KVM's functions that enable or disable the interception of an MSR.",
        labels=(),
    )
    redundant = CounterMetricFamily(
        f"msrtrace_{of}intercept_redundant_calls",
        "Calls of those that left every bit they name in the MSR bitmap as it was.",
        labels=(),
    )
    names = _CALL_LABELS if together or not snapshot.by_vm else _CALL_LABELS + _VM_LABELS
    calls_name, redundant_name = f"{calls.name}_total", f"{redundant.name}_total"
    for (index, *kind), of_vms in sorted(sums.items(), key=itemgetter(0)):
        values = (msr.hexadecimal(index), msr.name(index), *kind)
        for vm, (made, useless) in sorted(of_vms.items()):
            labels = sets.of(names, (*values, *vm))
            calls.samples.append(Sample(calls_name, labels, made))
            if useless is not None:
                redundant.samples.append(Sample(redundant_name, labels, useless))
    yield calls
    if snapshot.redundancy == "exact":
        yield redundant


def _updates(snapshot: Snapshot, sets: LabelSets, together: bool) -> Iterator[Metric]:
    """Filter updates and their time, of the same VMs as `_calls`."""
    if not snapshot.updates_observable:
        return
    of = "host_" if together else ""
    total = CounterMetricFamily(
        f"msrtrace_{of}filter_updates", "Times that a vCPU applied a changed MSR filter to its bitmap.", labels=()
    )
    duration = HistogramMetricFamily(
        f"msrtrace_{of}filter_update_duration_seconds",
        "Time that a vCPU took to apply a changed MSR filter, probes included.",
        labels=(),
    )
    if snapshot.by_vm and not together:
        vms = _vms(snapshot, together)
        updates = {vms[pid]: durations for pid, durations in sorted(snapshot.updates.items()) if pid in vms}
    else:
        updates = {(): sum(snapshot.updates.values(), Durations())}
    yield from _timed(total, duration, updates, sets)


def _recalculations(snapshot: Snapshot, sets: LabelSets) -> Iterator[Metric]:
    """Recomputations for another reason than a filter, and their time, of the host; nothing where they do not show."""
    if not snapshot.recalcs_observable:
        return
    total = CounterMetricFamily(
        "msrtrace_recalculations",
        "Times that a vCPU recomputed its bitmap for another reason than a changed MSR filter.",
        labels=(),
    )
    duration = HistogramMetricFamily(
        "msrtrace_recalculation_duration_seconds",
        "Time that a vCPU took to recompute its bitmap for another reason than a changed MSR filter, probes included.",
        labels=(),
    )
    yield from _timed(total, duration, {(): sum(snapshot.recalcs.values(), Durations())}, sets)


def _timed(
    total: Metric, duration: Metric, updates: Mapping[tuple[str, ...], Durations], sets: LabelSets
) -> tuple[Metric, Metric]:
    """The counter TOTAL and the histogram DURATION with the samples of UPDATES, by the values of their VM labels."""
    bucket_name = f"{duration.name}_bucket"
    for vm, durations in updates.items():
        names = _VM_LABELS[: len(vm)]
        labels, bucket_names = sets.of(names, vm), (*names, "le")
        total.samples.append(Sample(f"{total.name}_total", labels, durations.count))
        counts = list(accumulate(durations.buckets))
        for bound, count in zip(_BOUNDS, counts, strict=True):
            duration.samples.append(Sample(bucket_name, sets.of(bucket_names, (*vm, bound)), count))
        duration.samples.append(Sample(f"{duration.name}_count", labels, counts[-1]))
        duration.samples.append(Sample(f"{duration.name}_sum", labels, durations.seconds))
    return total, duration


def _health(snapshot: Snapshot) -> Iterator[Metric]:
    attached = GaugeMetricFamily("msrtrace_probe_attached", "Whether the function is probed.", labels=["function"])
    missed = CounterMetricFamily(
        "msrtrace_probe_missed",
        "Runs of the function that its probes did not see from entry to return.",
        labels=["function"],
    )
    for probe in snapshot.probes:
        attached.add_metric([probe.function], probe.attached)
        missed.add_metric([probe.function], probe.missed)
    yield attached
    yield missed
    entries = GaugeMetricFamily("msrtrace_map_entries", "Entries in use of a BPF map.", labels=["map"])
    capacity = GaugeMetricFamily("msrtrace_map_capacity", "Entries that fit into a BPF map.", labels=["map"])
    dropped = CounterMetricFamily(
        "msrtrace_dropped_updates", "Updates of a BPF map that found it full: counts lost.", labels=["map"]
    )
    for map_ in snapshot.maps:
        entries.add_metric([map_.name], map_.entries)
        capacity.add_metric([map_.name], map_.capacity)
        dropped.add_metric([map_.name], map_.dropped)
    yield entries
    yield capacity
    yield dropped
    yield CounterMetricFamily(
        "msrtrace_unpaired_returns",
        "Returns from a probed function whose entry no probe saw.",
        value=snapshot.unpaired_returns,
    )
    yield CounterMetricFamily(
        "msrtrace_read_failures", "Calls whose MSR bitmap could not be read.", value=snapshot.read_failures
    )
    yield GaugeMetricFamily(
        "msrtrace_open_calls",
        "Calls that are not counted yet: a call is counted when its vCPU is known to have left it.",
        value=snapshot.open_calls,
    )
    yield CounterMetricFamily(
        "msrtrace_module_unloads",
        "Unloads of KVM's module, each of which removed the probes.",
        value=snapshot.module_unloads,
    )

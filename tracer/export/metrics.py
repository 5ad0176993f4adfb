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

from tracer.export.exit_metrics import ExitFamily, exit_losses
from tracer.export.exposition import Known, LabelSets
from tracer.export.state_metrics import state_families
from tracer.model import msr
from tracer.model.cause import RECALC, VCPU_CREATE
from tracer.model.snapshot import DURATION_BOUNDS, Durations, Snapshot
from tracer.model.state import State
from tracer.model.vmm_id import pid_of

_CALL_LABELS = ("msr", "name", "access", "action", "cause")
_VM_LABELS = ("vm", "pid")
_BOUNDS = (*(f"{bound:.9g}" for bound in DURATION_BOUNDS), "+Inf")


class SnapshotCollector(Collector):
    """Collects the metrics of a fresh snapshot at each scrape, so nothing goes stale."""

    def __init__(
        self,
        take: Callable[[], Snapshot],
        version: str,
        kernel: str | None = None,
        on_error: Callable[[str], None] = lambda _: None,
        state: Callable[[], State | None] = lambda: None,
    ) -> None:
        """Collect from `take`, and from `state`; each of their failures is passed to `on_error` as one line."""
        self._on_error = on_error
        self._take, self._version, self._kernel = take, version, kernel or os.uname().release
        self._take_state = state
        self._lock = threading.Lock()
        self._last: Snapshot | None = None
        self._known: Known = {}
        self._exits = {all_vms: ExitFamily("host_" if all_vms else "") for all_vms in (False, True)}
        self._failures = 0

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read the kernel."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape, all from one snapshot, also if scrapes are concurrent."""
        started = time.perf_counter()
        snapshot, state, failures = self._newest()
        if snapshot:
            sets = LabelSets(self._known)
            yield from self._info(snapshot)
            yield from _vm_info(snapshot)
            for all_vms in (False, True) if snapshot.by_vm else (False,):
                yield from _calls(snapshot, sets, all_vms)
                yield from _updates(snapshot, sets, all_vms)
                yield from self._exits[all_vms].collect(snapshot, sets, _vms(snapshot, all_vms))
            yield from _recalculations(snapshot, sets)
            yield from _creations(snapshot)
            if state:
                yield from state_families(state, sets, by_vm=snapshot.by_vm)
            self._known = sets.now
            yield from _health(snapshot)
            yield from exit_losses(snapshot)
        yield CounterMetricFamily(
            "msrtrace_scrape_failures",
            "Failed readings: of counts, of which older ones are shown, or of what vCPUs intercept, which is absent.",
            value=failures,
        )
        spent = time.perf_counter() - started
        yield GaugeMetricFamily("msrtrace_scrape_duration_seconds", "Time that reading the counts took.", value=spent)

    def _newest(self) -> tuple[Snapshot | None, State | None, int]:
        """The newest snapshot, an older one if reading failed; the state, if any; how often reading has failed."""
        with self._lock:
            try:
                self._last = self._take()
            except Exception as error:  # the scrape must not fail
                self._failures += 1
                self._on_error(f"a scrape shows older counts: {type(error).__name__}: {error}")
            state = None
            try:
                state = self._take_state()
            except Exception as error:
                self._failures += 1
                self._on_error(f"a scrape lacks what vCPUs intercept: {type(error).__name__}: {error}")
            return self._last, state, self._failures

    def _info(self, snapshot: Snapshot) -> Iterator[Metric]:
        info = InfoMetricFamily("msrtrace_build", "msrtrace, the kernel, and how its MSR intercepts are traced.")
        labels = {
            "version": self._version,
            "vendor": snapshot.vendor,
            "kernel": self._kernel,
            "layout": snapshot.layout,
            "backend": snapshot.backend,
            "redundancy": snapshot.redundancy,
        }
        info.add_metric([], labels)
        yield info


class UnattachedCollector(Collector):
    """What can be said before there is a snapshot: that these functions are not probed. Nothing else is known."""

    def __init__(self, functions: Iterable[str]) -> None:
        self._functions = tuple(functions)

    def collect(self) -> Iterator[Metric]:
        """The family that says so."""
        yield _attached((function, False) for function in self._functions)


def _vm_info(snapshot: Snapshot) -> Iterator[Metric]:
    """With --by-vm, what VMs are called, to join with what others know of them."""
    if snapshot.by_vm:
        info = InfoMetricFamily("msrtrace_vm", "A VM that runs: its name, its UUID if its VMM was given one, its VMM.")
        for vmm, vm in sorted(snapshot.vms.items(), key=lambda item: pid_of(item[0])):
            info.add_metric([], {"vm": vm.name, "pid": str(pid_of(vmm)), "uuid": vm.uuid, "vmm": vm.vmm})
        yield info


def _vms(snapshot: Snapshot, all_vms: bool) -> Mapping[int, tuple[str, ...]]:
    """The values of the VM labels, if any, by VMM; VMs that are gone have no series."""
    if snapshot.by_vm and not all_vms:
        return {vmm: (vm.name, str(pid_of(vmm))) for vmm, vm in snapshot.vms.items()}
    return dict.fromkeys(snapshot.pids, ())


def _calls(snapshot: Snapshot, sets: LabelSets, all_vms: bool) -> Iterator[Metric]:
    """Calls, with --by-vm by VM; `all_vms`: summed over all VMs, including those that are gone."""
    if not snapshot.calls_observable:
        return
    vms = _vms(snapshot, all_vms)
    sums: dict[tuple[int, str, str, str], dict[tuple[str, ...], tuple[int, int | None]]] = defaultdict(dict)
    for call, outcome in snapshot.calls.items():
        vm = vms.get(call.pid)
        if vm is not None:
            of_vms, more = sums[call.msr, call.access, call.action, call.cause], outcome.redundant
            calls, redundant = of_vms.get(vm, (0, 0))
            of_vms[vm] = (calls + outcome.calls, None if redundant is None or more is None else redundant + more)
    prefix = "host_" if all_vms else ""
    calls_family = CounterMetricFamily(
        f"msrtrace_{prefix}intercept_calls",
        "Calls of KVM's functions that enable or disable the interception of an MSR.",
        labels=(),
    )
    redundant_family = CounterMetricFamily(
        f"msrtrace_{prefix}intercept_redundant_calls",
        "Those calls that changed none of the bits they name in the MSR bitmap.",
        labels=(),
    )
    names = _CALL_LABELS if all_vms or not snapshot.by_vm else _CALL_LABELS + _VM_LABELS
    calls_name, redundant_name = f"{calls_family.name}_total", f"{redundant_family.name}_total"
    for (index, *kind), of_vms in sorted(sums.items(), key=itemgetter(0)):
        values = (msr.hexadecimal(index), msr.name(index), *kind)
        for vm, (calls, redundant) in sorted(of_vms.items()):
            labels = sets.of(names, (*values, *vm))
            calls_family.samples.append(Sample(calls_name, labels, calls))
            if redundant is not None:
                redundant_family.samples.append(Sample(redundant_name, labels, redundant))
    yield calls_family
    if snapshot.redundancy == "exact":
        yield redundant_family


def _updates(snapshot: Snapshot, sets: LabelSets, all_vms: bool) -> Iterator[Metric]:
    """Filter updates and their durations, for the same VMs as in `_calls`."""
    if not snapshot.updates_observable:
        return
    prefix = "host_" if all_vms else ""
    total = CounterMetricFamily(
        f"msrtrace_{prefix}filter_updates", "Changed MSR filters applied by a vCPU to its bitmap.", labels=()
    )
    duration = HistogramMetricFamily(
        f"msrtrace_{prefix}filter_update_duration_seconds",
        "Time that a vCPU took to apply a changed MSR filter, including the probes.",
        labels=(),
    )
    if snapshot.by_vm and not all_vms:
        vms = _vms(snapshot, all_vms)
        updates = {vms[pid]: durations for pid, durations in sorted(snapshot.updates.items()) if pid in vms}
    else:
        updates = {(): sum(snapshot.updates.values(), Durations())}
    _add_times(duration, updates, sets, total)
    yield total
    yield duration


def _recalculations(snapshot: Snapshot, sets: LabelSets) -> Iterator[Metric]:
    """Recalculations for other reasons than a filter, and their durations, of the host; none where not observable.

    Where creations of vCPUs cannot be followed, theirs have the same cause as all others.
    """
    if not snapshot.recalcs_observable:
        return
    total = CounterMetricFamily(
        "msrtrace_recalculations",
        "Recalculations of a vCPU's bitmap for another reason than a changed MSR filter.",
        labels=["cause"],
    )
    whole = sum(snapshot.recalcs.values(), Durations())
    of_creations = snapshot.creation_recalcs if snapshot.creations_observable else 0
    if snapshot.creations_observable:
        total.add_metric([VCPU_CREATE], of_creations)
    total.add_metric([RECALC], whole.count - of_creations)
    yield total
    duration = HistogramMetricFamily(
        "msrtrace_recalculation_duration_seconds",
        "Time that a vCPU took to recalculate its bitmap for another reason than a changed MSR filter, including the "
        "probes.",
        labels=(),
    )
    _add_times(duration, {(): whole}, sets)
    yield duration


def _creations(snapshot: Snapshot) -> Iterator[Metric]:
    """vCPUs created on the host; none where that cannot be followed."""
    if snapshot.creations_observable:
        yield CounterMetricFamily("msrtrace_vcpus_created", "vCPUs created.", value=snapshot.vcpus_created)


def _add_times(
    duration: Metric, updates: Mapping[tuple[str, ...], Durations], sets: LabelSets, total: Metric | None = None
) -> None:
    """Add samples to a histogram, and maybe a counter: the durations of updates by the values of their VM labels."""
    bucket_name = f"{duration.name}_bucket"
    for vm, durations in updates.items():
        names = _VM_LABELS[: len(vm)]
        labels, bucket_names = sets.of(names, vm), (*names, "le")
        if total:
            total.samples.append(Sample(f"{total.name}_total", labels, durations.count))
        counts = list(accumulate(durations.buckets))
        for bound, count in zip(_BOUNDS, counts, strict=True):
            duration.samples.append(Sample(bucket_name, sets.of(bucket_names, (*vm, bound)), count))
        duration.samples.append(Sample(f"{duration.name}_count", labels, counts[-1]))
        duration.samples.append(Sample(f"{duration.name}_sum", labels, durations.seconds))


def _attached(probes: Iterable[tuple[str, bool]]) -> Metric:
    attached = GaugeMetricFamily("msrtrace_probe_attached", "Whether the function is probed.", labels=["function"])
    for function, is_attached in probes:
        attached.add_metric([function], is_attached)
    return attached


def _health(snapshot: Snapshot) -> Iterator[Metric]:
    yield _attached((probe.function, probe.attached) for probe in snapshot.probes)
    missed = CounterMetricFamily(
        "msrtrace_probe_missed",
        "Runs of the function that its probes did not see from entry to return.",
        labels=["function"],
    )
    for probe in snapshot.probes:
        missed.add_metric([probe.function], probe.missed)
    yield missed
    entries = GaugeMetricFamily("msrtrace_map_entries", "Entries in use in a BPF map.", labels=["map"])
    capacity = GaugeMetricFamily("msrtrace_map_capacity", "Maximum number of entries of a BPF map.", labels=["map"])
    dropped = CounterMetricFamily(
        "msrtrace_dropped_updates", "Updates of a BPF map that were lost because it was full.", labels=["map"]
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
        "Returns from a probed function whose entry was not seen.",
        value=snapshot.unpaired_returns,
    )
    yield CounterMetricFamily(
        "msrtrace_read_failures", "Calls whose MSR bitmap could not be read.", value=snapshot.read_failures
    )
    yield CounterMetricFamily(
        "msrtrace_probes_off_seconds",
        "Time in which the kernel's probes were switched off, so that nothing was counted.",
        value=snapshot.blind_seconds,
    )
    yield GaugeMetricFamily(
        "msrtrace_open_calls",
        "Calls in progress, which are counted once their vCPU has left them.",
        value=snapshot.open_calls,
    )
    yield CounterMetricFamily(
        "msrtrace_module_unloads",
        "Unloads of KVM's module, each of which removed the probes.",
        value=snapshot.module_unloads,
    )

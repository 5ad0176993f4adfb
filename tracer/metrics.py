"""A Snapshot as Prometheus metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tracer import msr
from tracer.snapshot import Durations, Outcome, Snapshot

_CALL_LABELS = ("msr", "name", "access", "action", "cause")
_VM_LABELS = ("vm", "pid")


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
        self._last: Snapshot | None = None
        self._failures = 0

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registration must not read the kernel."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape."""
        started = time.perf_counter()
        try:
            self._last = self._take()
        except Exception as error:  # must not fail the scrape: what was known is shown, and the failure counted
            self._failures += 1
            self._complain(f"a scrape shows older counts: {type(error).__name__}: {error}")
        if self._last:
            yield from self._info(self._last)
            yield from _calls(self._last)
            yield from _updates(self._last)
            if self._last.by_vm:
                together = replace(self._last.without_vms(self._last.pids), by_vm=False)
                yield from _calls(together, "host_")
                yield from _updates(together, "host_")
            yield from _health(self._last)
        yield CounterMetricFamily(
            "msrtrace_scrape_failures",
            "Scrapes that show older counts: reading failed.",
            value=self._failures,
        )
        spent = time.perf_counter() - started
        yield GaugeMetricFamily("msrtrace_scrape_duration_seconds", "Time it took to read the counts.", value=spent)

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


def _vm_values(snapshot: Snapshot, pid: int) -> tuple[str, ...] | None:
    """The values of the VM labels; None for the counts of VMs that are gone, which have no series."""
    if not snapshot.by_vm:
        return ()
    return (snapshot.vms[pid], str(pid)) if pid in snapshot.vms else None


def _calls(snapshot: Snapshot, of: str = "") -> Iterator[Metric]:
    """Calls by VM if VMs are told apart; OF is then `host_` for those of all VMs together."""
    if not snapshot.calls_observable:
        return
    labels = (*_CALL_LABELS, *(_VM_LABELS if snapshot.by_vm else ()))
    sums: dict[tuple[str, ...], Outcome] = {}
    for call, outcome in snapshot.calls.items():
        vm = _vm_values(snapshot, call.pid)
        if vm is not None:
            names = (msr.hexadecimal(call.msr), msr.name(call.msr))
            key = (*names, call.access, call.action, call.cause, *vm)
            sums[key] = sums[key] + outcome if key in sums else outcome
    calls = CounterMetricFamily(
        f"msrtrace_{of}intercept_calls",
        "Calls of KVM's functions that enable or disable the interception of an MSR.",
        labels=labels,
    )
    redundant = CounterMetricFamily(
        f"msrtrace_{of}intercept_redundant_calls",
        "Calls of those that left every bit they name in the MSR bitmap as it was.",
        labels=labels,
    )
    for key, outcome in sorted(sums.items()):
        calls.add_metric(key, outcome.calls)
        if outcome.redundant is not None:
            redundant.add_metric(key, outcome.redundant)
    yield calls
    if snapshot.redundancy == "exact":
        yield redundant


def _updates(snapshot: Snapshot, of: str = "") -> Iterator[Metric]:
    if not snapshot.updates_observable:
        return
    labels = _VM_LABELS if snapshot.by_vm else ()
    total = CounterMetricFamily(
        f"msrtrace_{of}filter_updates",
        "Times that a vCPU applied a changed MSR filter to its bitmap.",
        labels=labels,
    )
    duration = HistogramMetricFamily(
        f"msrtrace_{of}filter_update_duration_seconds",
        "Time that a vCPU took to apply a changed MSR filter, probes included.",
        labels=labels,
    )
    updates = dict(snapshot.updates) if snapshot.by_vm else {0: snapshot.updates.get(0, Durations())}
    for pid, durations in sorted(updates.items()):
        vm = _vm_values(snapshot, pid)
        if vm is not None:
            total.add_metric(vm, durations.count)
            buckets = [(_bound(bound), count) for bound, count in durations.cumulative()]
            duration.add_metric(vm, buckets, durations.seconds)
    yield total
    yield duration


def _bound(seconds: float) -> str:
    return "+Inf" if seconds == float("inf") else f"{seconds:.9g}"


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
    yield CounterMetricFamily(
        "msrtrace_reattachments",
        "Times that kvm_intel was unloaded and its probes were lost.",
        value=snapshot.reattached,
    )

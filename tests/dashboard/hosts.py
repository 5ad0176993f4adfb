# SPDX-License-Identifier: GPL-2.0-or-later
"""A fleet with an hour of history, for a Prometheus without hosts: what msrtrace exports for made-up snapshots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

from made import SVM_HOOK, created, outcome, recalc, svm_pass, svm_recalc, toggle
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from tracer.export.exposition import LabelSets
from tracer.export.metrics import SnapshotCollector
from tracer.export.state_metrics import state_families
from tracer.model.exits import FAST, FILTERED, L1, L2, OK, REFLECTED, SLOW, Exit
from tracer.model.msr_filter import READ, WRITE, FilterRange, MsrFilter
from tracer.model.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe, Snapshot, VmInfo
from tracer.model.state import State, Vcpu, Vm
from tracer.model.vendors import vendor_named

END = 1791201585  # an hour before this lies in one of Prometheus' blocks, which hold two
SECONDS = 3600
STEP = 15
BEFORE = 40_000  # how long they all run already
JOB = "msrtrace"


def durations(count: int, median: float) -> Durations:
    """The durations of updates with a log-normal distribution about the median, in seconds."""
    shares = NormalDist(math.log2(median), 0.8)
    cumulative = [math.floor(count * shares.cdf(math.log2(bound)) + 0.5) for bound in DURATION_BOUNDS]
    cumulative.append(count)
    buckets = [b - a for a, b in zip([0, *cumulative], cumulative, strict=False)]
    return Durations(count, count * median * 1.2, tuple(buckets))


def calm(per_second: float, swing: float = 0.4, period: float = 1500) -> Callable[[float], int]:
    """A count over time, at a rate that varies with a period but is never negative."""

    def count(t: float) -> int:
        t += BEFORE
        return math.floor(per_second * (t + swing * period / 6.2832 * (1 - math.cos(t * 6.2832 / period))))

    return count


def bursts(per_second: float, begin: float, end: float) -> Callable[[float], int]:
    """A count over time, at a constant rate between two times only."""
    return lambda t: math.floor(per_second * (min(max(t, begin), end) - begin))


@cache
def vcpus(vendor: str, by_vm: bool, phase: int) -> list[Metric]:
    """What four vCPUs of a VM intercept: the filter denies FS_BASE from phase 1 on, and all apply it in phase 2."""
    kind, applied = vendor_named(vendor), (0, 2, 4)[phase]
    # With it, PRED_CMD, which KVM intercepts, too, and SPEC_CTRL, of which it is not recorded whether it does.
    msrs = (0xC0000100, 0x49, 0x48) if phase else ()
    denies = MsrFilter(ranges=tuple(FilterRange(READ | WRITE, one, 1, bytes(8)) for one in msrs))
    found = []
    for number in range(4):
        passed = [(0xC0000101, READ), (0xC0000101, WRITE)]
        passed += [] if number < applied else [(0xC0000100, READ), (0xC0000100, WRITE)]
        bits = bytearray(b"\xff" * kind.bitmap_geometry.size)
        for at in (kind.bitmap_geometry.place(*access) for access in passed):
            assert at is not None
            bits[at >> 3] &= ~(1 << (at & 7))
        found.append(Vcpu(number, bytes(bits), denies, (0b100, 0b100), ran=True))
    state = State(kind, (0xC0000100, 0xC0000101, 0x49), (Vm(4210, 1, tuple(found), name="web-1"),))
    return list(state_families(state, LabelSets({}), by_vm=by_vm))


@dataclass(frozen=True)
class Host:
    """A scraped target: its labels, its kernel, its counts at a time, and how long it answers."""

    instance: str
    kernel: str
    snapshot: Callable[[float], Snapshot]
    labels: dict[str, str] = field(default_factory=dict)
    until: float = math.inf
    vendorless: bool = False  # as exported by versions of msrtrace that knew only Intel

    def metrics(self, t: float) -> Iterator[Metric]:
        """The families of a scrape after `t` seconds. Values that depend on this machine are replaced."""
        for family in SnapshotCollector(lambda: self.snapshot(t), "0.1.0", self.kernel).collect():
            if family.name == "msrtrace_scrape_duration_seconds":
                family = GaugeMetricFamily(family.name, family.documentation, 0.004 + 0.002 * math.sin(t / 97) ** 2)
            if family.name == "msrtrace_build" and self.vendorless:
                del family.samples[0].labels["vendor"]
            yield family
        yield from vcpus(self.snapshot(t).vendor, self.snapshot(t).by_vm, min(int(t // 1200), 2))
        busy = len(self.instance) + self.snapshot(t).by_vm
        yield GaugeMetricFamily("process_resident_memory_bytes", "Memory.", 36e6 + 1.5e6 * busy + 3e5 * math.sin(t))
        yield CounterMetricFamily("process_cpu_seconds", "CPU.", 0.7 + 0.0011 * busy * t)
        yield GaugeMetricFamily("process_start_time_seconds", "Start.", END - SECONDS - BEFORE)


def _probes(*functions: str, lost: int = 0, unattached: str = "") -> tuple[Probe, ...]:
    functions = (*functions, "vmx_vcpu_create")
    return tuple(Probe(f, f, f != unattached, "", lost if f == functions[0] else 0) for f in functions)


TOGGLE = ("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_msr_filter_changed")
RECALC = ("vmx_set_intercept_for_msr", "vmx_recalc_intercepts", "kvm_vm_ioctl_set_msr_filter")
AMD_PASS = ("set_msr_interception_bitmap", SVM_HOOK)
AMD_RECALC = ("svm_set_intercept_for_msr", "svm_recalc_intercepts", "kvm_vm_ioctl_set_msr_filter")


def _besides(snapshot: Snapshot, t: float, per_second: float, pid: int = 0) -> Snapshot:
    """The same host with guests that write MSRs, and VMs that are started and have their CPUID set."""
    set_ = snapshot.layout == "recalc"
    writes, starts = calm(per_second, 0.7, 700)(t), calm(per_second / 4)(t)
    exact = snapshot.redundancy == "exact"
    more = {
        Call(0x48, "read_write", "disable", "msr_write", "vmx_set_msr", pid): outcome(writes, 0, "read_write", exact),
        Call(0x49, "write", "disable", "cpuid_update", "vmx_vcpu_after_set_cpuid", pid): outcome(
            starts, starts // 3, "write", exact
        ),
        Call(0x808, "read_write", "disable", "x2apic", "vmx_update_msr_bitmap_x2apic", pid): outcome(
            starts, starts, "read_write", exact
        ),
        Call(0x1C4, "read_write", "enable", "recalc" if set_ else "msr_write", "vmx_set_msr", pid): outcome(
            writes // 5, writes // 10, "read_write", exact
        ),
    }
    return replace(snapshot, calls={**snapshot.calls, **more})


def _maps(snapshot: Snapshot, used: int = 0, dropped: int = 0) -> tuple[Map, ...]:
    calls = Map("calls", len(snapshot.calls) + used, 8192, dropped)
    return (calls, Map("vcpus", 2, 16384), Map("updates", len(snapshot.updates), 4096))


def _one(
    updates: Callable[[float], int],
    median: float,
    besides: float = 2,
    *,
    lost: int = 0,
    unattached: str = "",
    pt: bool = False,
    module_unloads: int = 0,
    **made: Any,
) -> Callable[[float], Snapshot]:
    def take(t: float) -> Snapshot:
        count = updates(t)
        snapshot = _besides(toggle(count, vcpus=count // 900 + 4, **made), t, besides)
        if pt:  # exposed to the guest: enabled in each update, with the patch too
            status = Call(0x571, "read_write", "enable", "filter_change", "pt_update_intercept_for_msr")
            snapshot = replace(snapshot, calls={**snapshot.calls, status: outcome(count, 0, "read_write")})
        late = bursts(lost / 600, 2000, 2600)(t)
        return replace(
            snapshot,
            updates={0: durations(count, median)},
            probes=_probes(*TOGGLE, lost=late, unattached=unattached),
            maps=_maps(snapshot, 7000 if lost else 0, late // 3),
            read_failures=late // 5,
            module_unloads=module_unloads,
        )

    return take


def _creating(snapshot: Snapshot, vcpus: int, recalcs: int) -> Snapshot:
    """The same host with vCPUs that are created, in a recalculation each, and so many other recalculations."""
    made = created(vcpus, recalculations=1)
    calls = {call: found for call, found in made.calls.items() if call.cause == "vcpu_create"}
    snapshot = replace(snapshot, calls={**snapshot.calls, **calls}, recalcs={0: durations(vcpus + recalcs, 9e-6)})
    return replace(snapshot, vcpus_created=vcpus, creation_recalcs=vcpus)


def _recalc(t: float) -> Snapshot:
    count = calm(14)(t)
    snapshot = _creating(_besides(recalc(count), t, 3), calm(0.2)(t), calm(0.5)(t))
    return replace(snapshot, updates={0: durations(count, 11e-6)}, probes=_probes(*RECALC), maps=_maps(snapshot))


def _amd(
    made: Callable[[int], Snapshot], updates: Callable[[float], int], median: float, *functions: str
) -> Callable[[float], Snapshot]:
    def take(t: float) -> Snapshot:
        count, writes = updates(t), calm(2, 0.7, 700)(t)
        snapshot = made(count)
        write = Call(0x48, "read_write", "disable", "msr_write", "svm_set_msr")
        calls = {**snapshot.calls, write: outcome(writes, writes // 50, "read_write")}
        probes = tuple(Probe(f, f, True, "") for f in (*functions, "svm_vcpu_create"))
        return replace(
            snapshot, calls=calls, updates={0: durations(count, median)}, probes=probes, maps=_maps(snapshot)
        )

    return take


DENIED = 1200  # when the filter that vcpus() has is set


def _exits(t: float, *vms: tuple[int, float]) -> dict[Exit, int]:
    """Exits of VMs, by their pid and how many times as many as others': 300 a second, 55 more when the filter is set.

    Of these, 40 are of accesses that KVM would pass through, 10 of those that it intercepts, too, and of 5 it is not
    recorded.
    """
    ticks, apic = Exit(0x6E0, "write", FAST, OK, L1), Exit(0x1B, "read", SLOW, OK, L1)
    rates = {
        **{ticks: (200, 0), replace(ticks, path=SLOW, guest=L2): (8, 0), apic: (90, 0)},
        replace(apic, result=REFLECTED, guest=L2): (2, 0),
        Exit(0xC0000100, "write", SLOW, FILTERED, L1): (32, DENIED),
        Exit(0xC0000100, "read", SLOW, FILTERED, L1): (8, DENIED),
        Exit(0x49, "write", SLOW, FILTERED, L1): (10, DENIED),
        Exit(0x48, "write", SLOW, FILTERED, L1): (5, DENIED),
    }
    return {
        replace(kind, pid=pid): bursts(rate * times, begin, math.inf)(t)
        for pid, times in vms
        for kind, (rate, begin) in rates.items()
        if t > begin
    }


def _with_exits(take: Callable[[float], Snapshot], *vms: tuple[int, float]) -> Callable[[float], Snapshot]:
    return lambda t: replace(take(t), exits=_exits(t, *(vms or ((0, 1),))), open_exits=2)


def _filter_only(t: float) -> Snapshot:
    snapshot = Snapshot("filter-only", redundancy="unknown", calls_observable=False)
    snapshot = replace(snapshot, updates={0: durations(calm(6, 0.8)(t), 3e-6)}, probes=_probes(TOGGLE[2]))
    return replace(snapshot, maps=_maps(snapshot))


BUILT = 3000  # when the VM that builds ends


def _by_vm(t: float) -> Snapshot:
    vms = {4210: ("web-1", calm(9), 0), 4377: ("web-2", calm(5, 0.8, 900), 300), 5120: ("build-7", calm(21), 1500)}
    calls: dict[Call, Outcome] = {}
    updates, names = {}, {}
    for pid, (name, count, begin) in vms.items():
        now = min(t, BUILT) if name == "build-7" else t
        age = now - begin - (BEFORE if begin else 0)  # as calm() wants it: it began in this hour, or was there before
        if t >= begin:
            made = _besides(toggle(count(age), pid=pid), age, 1, pid)
            calls.update(made.calls)
            updates[pid] = durations(count(age), 14e-6)
        if t >= begin and now == t:
            names[pid] = VmInfo(name, f"6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f{pid}", "qemu")
    snapshot = Snapshot("toggle", calls=calls, updates=updates, by_vm=True, vms=names, probes=_probes(*TOGGLE))
    return replace(snapshot, maps=_maps(snapshot))


#: Patched, unpatched and newer: one runs --by-vm, one hides its calls, one has no BTF and loses counts, one
#: went down, one was idle since its kvm_intel was reloaded, one shows Intel PT to guests and has an older msrtrace. Two
#: are AMD's, before 6.17 and after. Two count exits, one of them by VM.
FLEET = (
    Host("kvm1:9753", "6.1.0-53-amd64", _with_exits(_one(calm(22), 15e-6)), {"patch": "patched"}),
    Host("kvm2:9753", "5.19.0-2-amd64", _one(calm(17, 0.6), 34e-6, patched=False), {"patch": "unpatched"}),
    Host("kvm3:9753", "7.2.13-amd64", _recalc),
    Host(
        "kvm4:9753",
        "6.12.117+deb13-amd64",
        _with_exits(_by_vm, (4210, 0.5), (4377, 2)),
        {"patch": "patched"},
    ),
    Host("kvm5:9753", "5.10.0-38-amd64", _filter_only),
    Host(
        "kvm6:9753",
        "5.15.0-25-generic",
        _one(calm(4), 30e-6, 1, patched=False, exact=False, lost=40, unattached="vmx_vcpu_create"),
        {"patch": "unpatched"},
    ),
    Host("kvm7:9753", "6.1.0-53-amd64", _one(bursts(8, 0, 9000), 16e-6), {"patch": "patched"}, until=2700),
    Host("kvm8:9753", "6.1.0-53-amd64", _one(bursts(20, 0, 1), 16e-6, 0, patched=False, module_unloads=1)),
    Host("kvm9:9753", "6.6.60-amd64", _one(calm(3), 16e-6, 0.5, pt=True), vendorless=True),
    Host("kvm10:9753", "6.12.117+deb13-amd64", _amd(svm_pass, calm(9), 30e-6, *AMD_PASS)),
    Host("kvm11:9753", "7.2.13-amd64", _amd(svm_recalc, calm(7), 10e-6, *AMD_RECALC)),
)


_NAME = "@instance@"  # in text of which each host has a copy


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _line(name: str, labels: dict[str, str], value: float, when: int) -> str:
    pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in sorted(labels.items()))
    return f"{name}{{{pairs}}} {value!r} {when}\n"


def _at(speed: float, host: Host) -> Host:
    """The host, where everything takes longer: the speed is 1 or less."""
    return replace(host, snapshot=lambda t: host.snapshot(t * speed))


#: Hosts, each with the names of the instances that are exactly like it.
Instances = Iterable[tuple[Host, list[str]]]


def many(count: int, variants: int = 16) -> Instances:
    """So many hosts: those of FLEET, each at several speeds."""
    speeds = (1 - number / (variants + 1) for number in range(variants))
    kinds = [_at(speed, host) for speed in speeds for host in FLEET]
    names = [f"kvm{number}:9753" for number in range(1, count + 1)]
    return ((kind, names[index :: len(kinds)]) for index, kind in enumerate(kinds))


def write(file: Path, hosts: Instances | None = None, step: int = STEP) -> None:
    """The hour before END as OpenMetrics text, family by family, as `promtool tsdb create-blocks-from` reads it.

    `hosts` are scraped every `step` seconds, each under every one of its names; by default FLEET.
    """
    types: dict[str, str] = {"up": "gauge"}
    lines: dict[str, list[tuple[list[str], list[str]]]] = defaultdict(list)
    for host, instances in hosts or ((host, [host.instance]) for host in FLEET):
        target = {"job": JOB, "instance": _NAME, **host.labels}
        found: dict[str, list[str]] = defaultdict(list)
        for t in range(0, SECONDS + 1, step):
            when = END - SECONDS + t
            found["up"].append(_line("up", target, float(t <= host.until), when))
            for family in host.metrics(t) if t <= host.until else ():
                types[family.name] = family.type
                for sample in family.samples:
                    labels = {**sample.labels, **target}
                    found[family.name].append(_line(sample.name, labels, float(sample.value), when))
        for name, of_host in found.items():
            lines[name].append((of_host, instances))
    with file.open("w") as output:
        for name, type_ in types.items():
            output.write(f"# TYPE {name} {type_}\n")
            for of_host, instances in lines[name]:
                text = "".join(of_host)
                output.writelines(text.replace(_NAME, instance) for instance in instances)
        output.write("# EOF\n")

# SPDX-License-Identifier: GPL-2.0-or-later
"""A State as Prometheus metrics: how many vCPUs intercept what, and who wants that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

from tracer.export.exposition import LabelSets
from tracer.model import msr
from tracer.model.msr_filter import DIRECTIONS, X2APIC
from tracer.model.state import BOTH, KVM, PASSED, PENDING_ALLOWED, PENDING_DENIED, UNRECORDED, State, Vcpu, Vm, alike

#: The value of the label `by` for what is said of an access, where that is another word.
_BY = {PENDING_DENIED: "pending", PENDING_ALLOWED: "pending"}
_LABELS, _VM_LABELS = ("msr", "name", "access", "by"), ("vm", "pid")
_Access = tuple[int, int]  # an MSR, and a direction


def state_families(state: State, sets: LabelSets, *, by_vm: bool) -> Iterator[Metric]:
    """The families of a scrape; with `by_vm` each VM has series of its own.

    There are series for every access that on some vCPU not KVM alone intercepts, and for those of which the kernel
    records what KVM wants; not for the x2APIC's MSRs, which no filter can deny.
    """
    vcpus = GaugeMetricFamily("msrtrace_vcpus", "vCPUs that exist now.", labels=())
    unread = GaugeMetricFamily("msrtrace_unreadable_vcpus", "vCPUs whose MSR bitmap cannot be read.", labels=())
    intercepted = GaugeMetricFamily(
        "msrtrace_msr_intercepted_vcpus", "vCPUs that intercept accesses to the MSR now, by who wants that.", labels=()
    )
    known: dict[Vcpu, tuple[dict[_Access, str], set[_Access]]] = {}
    for labels, vms in _parts(state, by_vm):
        counts: dict[_Access, Counter[str]] = {}
        of_note = {(index, direction) for index in state.recorded for direction in DIRECTIONS if not by_vm}
        unreadable = 0
        for group in (group for vm in vms for group in alike(vm)):
            vcpu = group[0].any_id
            if vcpu.bitmap is None:
                unreadable += len(group)
                continue
            if vcpu not in known:
                known[vcpu] = _interceptions(state, vcpu)
            said, noted = known[vcpu]
            of_note |= noted
            for access, what in said.items():
                counts.setdefault(access, Counter())[_BY.get(what, what)] += len(group)
        names = _VM_LABELS[: len(labels)]
        vcpus.samples.append(Sample(vcpus.name, sets.of(names, labels), sum(len(vm.vcpus) for vm in vms)))
        unread.samples.append(Sample(unread.name, sets.of(names, labels), unreadable))
        for index, direction in sorted(of_note & counts.keys()):
            for by, count in sorted(counts[index, direction].items()):
                if by != PASSED:
                    values = (msr.hexadecimal(index), msr.name(index), DIRECTIONS[direction], by, *labels)
                    intercepted.samples.append(Sample(intercepted.name, sets.of((*_LABELS, *names), values), count))
    yield vcpus
    yield unread
    yield intercepted


def _parts(state: State, by_vm: bool) -> Iterable[tuple[tuple[str, ...], list[Vm]]]:
    """The values of the VM labels, if any, and the VMs of each; those of one process are together."""
    if not by_vm:
        return [((), list(state.vms))]
    found: dict[int, list[Vm]] = {}
    for vm in state.vms:
        found.setdefault(vm.pid, []).append(vm)
    return [((vms[0].name, str(pid)), vms) for pid, vms in found.items()]


def _interceptions(state: State, vcpu: Vcpu) -> tuple[dict[_Access, str], set[_Access]]:
    """What is said of each access that KVM may let a guest have, or that this one has; and which KVM may not want."""
    passed = {index for direction in DIRECTIONS for run in state.passed(vcpu, direction) for index in run}
    verdicts = {index: state.verdict(vcpu, index) for index in passed.difference(X2APIC).union(state.candidates)}
    said = {(index, direction): one.of(direction) for index, one in verdicts.items() for direction in DIRECTIONS}
    allowed = vcpu.filter.allows if vcpu.filter else lambda *_: True
    usual = {
        access for access, what in said.items() if what in (KVM, BOTH) or (what == UNRECORDED and allowed(*access))
    }
    return said, said.keys() - usual

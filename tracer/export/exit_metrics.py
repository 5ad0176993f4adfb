# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits of guests' RDMSR and WRMSR as Prometheus metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

from tracer.export.exposition import LabelSets
from tracer.model import msr
from tracer.model.snapshot import Snapshot

#: Of how many MSRs a VM, or the host, has series: a guest chooses the number that it accesses, and there are 2^32.
MSRS = 512
#: The values of `msr` and `name` in the series of all further MSRs.
OTHERS = (msr.hexadecimal(msr.OTHER), msr.name(msr.OTHER))
_LABELS, _VM_LABELS = ("msr", "name", "access", "path", "result", "guest"), ("vm", "pid")
_Vm = tuple[str, ...]  # the values of the VM labels, or ()


class ExitFamily:
    """Makes a family of exits, and remembers which MSRs have series in it, so that no counter goes backwards."""

    def __init__(self, prefix: str = "") -> None:
        """A family whose name has this prefix."""
        self._name = f"msrtrace_{prefix}msr_exits"
        self._with_series: dict[_Vm, set[int]] = {}

    def collect(self, snapshot: Snapshot, sets: LabelSets, vms: Mapping[int, _Vm]) -> Iterator[Metric]:
        """The family, of one scrape; nothing if exits are not counted.

        :param vms: the values of the VM labels, if any, by pid; other VMs have no series
        """
        if snapshot.exits is None:
            return
        family = CounterMetricFamily(self._name, "Exits of guests' RDMSR and WRMSR, each counted once.", labels=())
        counts: dict[_Vm, dict[int, Counter[tuple[str, ...]]]] = {}
        for kind, count in snapshot.exits.items():
            vm = vms.get(kind.pid)
            if vm is not None:
                of_msr = counts.setdefault(vm, {}).setdefault(kind.msr, Counter())
                of_msr[kind.access, kind.path, kind.result, kind.guest] += count
        for vm, of_vm in sorted(counts.items()):
            names = (*_LABELS, *_VM_LABELS[: len(vm)])
            for about, kinds in self._bounded(vm, of_vm):
                for values, count in sorted(kinds.items()):
                    labels = sets.of(names, (*about, *values, *vm))
                    family.samples.append(Sample(f"{self._name}_total", labels, count))
        for gone in self._with_series.keys() - set(vms.values()):
            self._with_series.pop(gone, None)
        yield family

    def _bounded(
        self, vm: _Vm, of_vm: Mapping[int, Counter[tuple[str, ...]]]
    ) -> Iterator[tuple[tuple[str, str], Counter[tuple[str, ...]]]]:
        """The values of `msr` and `name`, and the counts: of MSRs that have series, then of all others.

        An MSR has series from the beginning or never; of those that are new at a scrape, the most accessed come first.
        """
        known = self._with_series.setdefault(vm, set())
        new = of_vm.keys() - known - {msr.OTHER}
        if len(known) + len(new) > MSRS:
            new = set(sorted(new, key=lambda index: (-of_vm[index].total(), index))[: max(MSRS - len(known), 0)])
        known |= new
        others: Counter[tuple[str, ...]] = Counter()
        for index, kinds in sorted(of_vm.items()):
            if index in known:
                yield (msr.hexadecimal(index), msr.name(index)), kinds
            else:
                others += kinds
        if others:
            yield OTHERS, others


def exit_losses(snapshot: Snapshot) -> Iterator[Metric]:
    """What is not counted of exits, or not yet; nothing if they are not counted at all."""
    if snapshot.exits is None:
        return
    yield CounterMetricFamily(
        "msrtrace_unpaired_refusals",
        "Refused accesses to MSRs whose exit was not seen.",
        value=snapshot.unpaired_refusals,
    )
    yield GaugeMetricFamily(
        "msrtrace_open_exits",
        "Exits in progress, which are counted once their vCPU has left them.",
        value=snapshot.open_exits,
    )

# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the report on a trace from its Snapshot."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from tracer.model import msr
from tracer.model.cause import FILTER_CHANGE, VCPU_CREATE
from tracer.model.exit_table import NO_BLAME, ExitTable, OfVm
from tracer.model.exits import EXIT_FUNCTIONS
from tracer.model.loss import loss_of
from tracer.model.snapshot import Call, Durations, Outcome, Snapshot, VmInfo
from tracer.model.state import State
from tracer.model.vendors import vendor_named
from tracer.model.verdict import judge
from tracer.model.vmm_id import pid_of
from tracer.report.computer import NOTES, parameters_field
from tracer.report.exit_rows import exit_rows
from tracer.report.report import (
    ARGUMENTS,
    Bucket,
    CallRow,
    Host,
    PerCreation,
    PerUpdate,
    Report,
    Totals,
    UpdateSeconds,
    Vm,
    redundant_sum,
    whole,
)
from tracer.report.state_file import States


@dataclass(frozen=True)
class HostInfo:
    """What a report says about the host."""

    kernel: str
    version: str
    cpu: str
    module_parameters: dict[str, str]
    name: str = ""

    def fields(self, vendor: str) -> dict[str, Any]:
        """The arguments of Computer; `vendor` is the name of the vendor of KVM's module."""
        return {
            **parameters_field(vendor, self.module_parameters),
            "vendor": vendor,
            "name": self.name,
            "kernel": self.kernel,
            "version": self.version,
            "cpu": self.cpu,
        }

    @classmethod
    def here(cls, module: str, root: Path = Path("/")) -> HostInfo:
        """Of this machine, from uname(2), and from /proc and /sys below `root`; `module` is KVM's module."""
        parameters: dict[str, str] = {}
        for file in sorted((root / "sys/module" / module / "parameters").glob("*")):
            try:
                parameters[file.name] = file.read_text(errors="replace").strip()
            except OSError:
                continue  # some are readable by root only
        try:
            info = (root / "proc/cpuinfo").read_text(errors="replace")
        except OSError:
            info = ""
        models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
        uname = os.uname()
        return cls(uname.release, uname.version, models[0] if models else "", parameters, uname.nodename)


def make(
    counted: Snapshot,
    host: HostInfo,
    *,
    started: datetime,
    duration: float,
    version: str = "",
    label: str = "",
    command: Sequence[str] | None = None,
    exit_status: int | None = None,
    state: States | None = None,
    intercepted: State | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """The report on what a trace counted.

    :param started: when the trace began
    :param duration: of the trace, in seconds
    :param exit_status: of the command, as a shell gives it
    :param state: what the vCPUs intercepted when it ended
    :param intercepted: the same as it was read, and of VMs that ended before: who caused exits; None: unknown
    """
    rows = call_rows(counted.calls.items())
    updates = _host_sum(counted.updates) if counted.updates_observable else None
    recalcs = _host_sum(counted.recalcs) if counted.recalcs_observable else None
    table = None if counted.exits is None else ExitTable(counted.exits, intercepted, counted.by_vm)
    exits, exit_notes = exit_rows(table) if table else (None, [])
    loss = loss_of(counted)
    vendor = vendor_named(counted.vendor)
    counting = vendor.counted_functions(counted.layout)
    if counted.exits is not None:
        counting |= EXIT_FUNCTIONS.all.union(vendor.nested_exit)
    incomplete = counted.lower_bound or bool(counting.intersection(loss.not_probed))
    lower_bound = incomplete or bool(loss.module_unloads or loss.open_calls or loss.open_exits)
    return Report(
        msrtrace=version,
        label=label,
        started=started.astimezone(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        duration_seconds=round(duration, 6),
        host=Host(
            **host.fields(counted.vendor),
            vcpus_seen=counted.vcpus_seen,
            vmms_seen=counted.vmms_seen,
            layout=counted.layout,
            backend=counted.backend,
            redundancy="exact" if counted.redundancy == "exact" else "unknown",
        ),
        command=list(command[:ARGUMENTS]) if command else None,
        exit_status=exit_status,
        totals=Totals(
            calls=sum(row.calls for row in rows) if counted.calls_observable else None,
            redundant=_redundant(counted, rows),
            filter_updates=updates.count if updates else None,
            recalculations=recalcs.count if recalcs else None,
            creation_recalculations=counted.creation_recalcs if recalcs and counted.creations_observable else None,
            vcpus_seen=counted.vcpus_seen,
            vcpus_created=counted.vcpus_created if counted.creations_observable else None,
            exits=table.total if table else None,
            exits_by_filter=table.blame.sure if table else None,
            exits_perhaps_by_filter=table.blame.perhaps if table else None,
        ),
        per_filter_update=_per_update(counted, rows, updates.count if updates else 0),
        per_vcpu_creation=_per_creation(counted, rows),
        calls=rows,
        filter_update_seconds=_seconds(updates) if updates else None,
        recalculation_seconds=_seconds(recalcs) if recalcs else None,
        vms=_vms(counted, table) if counted.by_vm else None,
        exits=exits,
        state=state,
        loss=loss,
        lower_bound=lower_bound,
        verdict=judge(
            vendor=counted.vendor,
            layout=counted.layout,
            calls_observable=counted.calls_observable,
            incomplete=incomplete,
            reloaded=bool(loss.module_unloads),
            updates=updates.count if updates else None,
            rows=rows,
        ),
        notes=[*exit_notes, *notes][:NOTES],
    )


def call_rows(calls: Iterable[tuple[Call, Outcome]]) -> list[CallRow]:
    """The calls as rows of a report, summed over VMs, in the order of MSR, access, action, cause and caller."""
    sums: dict[tuple[int, str, str, str, str], Outcome] = {}
    for call, outcome in calls:
        key = (call.msr, call.access, call.action, call.cause, call.caller)
        sums[key] = sums[key] + outcome if key in sums else outcome
    return [
        CallRow(
            msr=msr.hexadecimal(index),
            name=msr.name(index),
            access=access,  # type: ignore[arg-type]
            action=action,  # type: ignore[arg-type]
            cause=cause,
            caller=caller,
            calls=outcome.calls,
            redundant=outcome.redundant,
            changed_read=outcome.changed_read,
            changed_write=outcome.changed_write,
            refused=outcome.refused,
        )
        for (index, access, action, cause, caller), outcome in sorted(sums.items(), key=lambda pair: pair[0])
    ]


def _host_sum(by_pid: Mapping[int, Durations]) -> Durations:
    return sum(by_pid.values(), Durations())


def _redundant(counted: Snapshot, rows: list[CallRow]) -> int | None:
    return redundant_sum(rows) if counted.calls_observable and counted.redundancy == "exact" else None


def _per_update(counted: Snapshot, rows: list[CallRow], updates: int) -> PerUpdate | None:
    if not (updates and counted.calls_observable):
        return None
    inside = [row for row in rows if row.cause == FILTER_CHANGE]

    def calls(*, disables: bool) -> int:
        return sum(row.calls for row in inside if row.disables == disables)

    def redundant(*, disables: bool) -> int | None:
        if counted.redundancy != "exact":
            return None
        return redundant_sum(row for row in inside if row.disables == disables)

    def each(value: int | None) -> float | None:
        return None if value is None else whole(value / updates)

    enable, disable = calls(disables=False), calls(disables=True)
    enable_redundant, disable_redundant = redundant(disables=False), redundant(disables=True)
    both = None if enable_redundant is None or disable_redundant is None else enable_redundant + disable_redundant
    return PerUpdate(
        calls=whole((enable + disable) / updates),
        redundant=each(both),
        enable=whole(enable / updates),
        enable_redundant=each(enable_redundant),
        disable=whole(disable / updates),
        disable_redundant=each(disable_redundant),
    )


def _per_creation(counted: Snapshot, rows: list[CallRow]) -> PerCreation | None:
    vcpus = counted.vcpus_created
    if not (vcpus and counted.creations_observable and counted.calls_observable):
        return None
    inside = [row for row in rows if row.cause == VCPU_CREATE]
    redundant = _redundant(counted, inside)
    return PerCreation(
        calls=whole(sum(row.calls for row in inside) / vcpus),
        redundant=None if redundant is None else whole(redundant / vcpus),
        recalculations=whole(counted.creation_recalcs / vcpus) if counted.recalcs_observable else None,
    )


def _seconds(updates: Durations) -> UpdateSeconds:
    cumulative = updates.cumulative()
    counts = [cumulative[0][1], *(b - a for (_, a), (_, b) in pairwise(cumulative))]
    return UpdateSeconds(
        buckets=[
            Bucket(le=None if bound == float("inf") else float(f"{bound:.9g}"), count=count)
            for (bound, _), count in zip(cumulative, counts, strict=True)
        ],
        sum=updates.seconds,
        count=updates.timed,
    )


def _vms(counted: Snapshot, table: ExitTable | None) -> list[Vm]:
    exits = table.of_vms() if table else {}
    none = OfVm(0, 0, NO_BLAME) if table else None

    def of(vmm: int) -> Vm:
        outcomes = [outcome for call, outcome in counted.calls.items() if call.pid == vmm]
        exact = counted.calls_observable and counted.redundancy == "exact"
        updates = counted.updates.get(vmm, Durations())
        vm = counted.vms.get(vmm, VmInfo(""))
        its_exits = exits.get(vmm, none)
        return Vm(
            pid=pid_of(vmm),
            name=vm.name,
            uuid=vm.uuid,
            vmm=vm.vmm,
            calls=sum(outcome.calls for outcome in outcomes) if counted.calls_observable else None,
            redundant=sum(outcome.redundant or 0 for outcome in outcomes) if exact else None,
            filter_updates=updates.count if counted.updates_observable else None,
            recalculations=counted.recalcs.get(vmm, Durations()).count if counted.recalcs_observable else None,
            filter_update_seconds_sum=updates.seconds,
            exits=its_exits.exits if its_exits else None,
            exits_by_filter=its_exits.blame.sure if its_exits else None,
            exits_perhaps_by_filter=its_exits.blame.perhaps if its_exits else None,
        )

    return [of(vmm) for vmm in sorted(counted.pids, key=lambda vmm: (pid_of(vmm), vmm))]

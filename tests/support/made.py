# SPDX-License-Identifier: GPL-2.0-or-later
"""Synthetic snapshots and reports: those of the kernel's loops (KERNEL.md 3), and any that can be read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, TypeVar

import msgspec
from any_states import any_states
from hypothesis import strategies as st
from msgspec import UNSET

from tracer.model.loss import Loss
from tracer.model.nested import NESTED_SAID
from tracer.model.snapshot import Call, Durations, Outcome, Snapshot, VmInfo
from tracer.model.state import SAID
from tracer.model.verdict import Verdict
from tracer.report.compare import compare
from tracer.report.exit_rows import ExitRow
from tracer.report.formats import OF_COMPARISONS, OF_REPORTS, write_comparison, write_report
from tracer.report.making import HostInfo, make
from tracer.report.report import Bucket, CallRow, Host, PerCreation, PerUpdate, Report, Totals, UpdateSeconds, Vm

TSC, SPEC_CTRL, XFD_ERR, FS_BASE, RTIT_STATUS = 0x10, 0x48, 0x1C5, 0xC0000100, 0x571
#: vmx_possible_passthrough_msrs[] of 6.1, and which halves KVM passes through on the emulated host.
BOTH_PASSED = (FS_BASE, 0xC0000101, 0xC0000102, 0x174, 0x175, 0x176)
POSSIBLE = (SPEC_CTRL, 0x49, TSC, 0x1C4, XFD_ERR, *BOTH_PASSED, 0x660, 0x3FC, 0x3FD, 0x3FE)
PASSED = {(TSC, "read"), *((index, access) for index in BOTH_PASSED for access in ("read", "write"))}
HOOK = "vmx_msr_filter_changed"
WORKLOAD = ("workload", "--updates", "101")
#: direct_access_msrs[] of SVM, 6.6 to 6.16: the first nine are passed through from the start.
STAR, PRED_CMD = 0xC0000081, 0x49
ALWAYS = (STAR, 0x174, 0xC0000101, FS_BASE, 0xC0000102, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0010130)
DIRECT = (*ALWAYS, 0x175, 0x176, SPEC_CTRL, PRED_CMD, 0x10B, *range(0x1DB, 0x1DF), 0xDA0, 0xC0000080, 0x277, 0xC0000103)
X2APIC = tuple(
    0x800 + number for number in (2, 3, 8, 9, 10, 11, 12, 13, 14, 15, 16, 24, 32, 40, 48, 49, *range(50, 58), 62)
)
SVM_HOOK = "svm_msr_filter_changed"
HOST = HostInfo("6.1.0-53-amd64", "#1 SMP Debian 6.1.192-1", "Intel(R) Core(TM) i7", {"ept": "Y", "nested": "Y"}, "ada")
AMD_HOST = HostInfo("6.12.117+deb13-amd64", "#1 SMP Debian 6.12.117-1", "AMD EPYC", {"avic": "N", "nested": "1"}, "bob")
STARTED = datetime(2026, 11, 22, 15, 0, 0, 987654, tzinfo=timezone.utc)


def outcome(calls: int, changed: int, access: str, exact: bool = True, refused: int = 0) -> Outcome:
    """The outcome of calls of which `changed` changed every bit that they named."""
    if not exact:
        return Outcome(calls)
    read, write = 0 if access == "write" else changed, 0 if access == "read" else changed
    return Outcome(calls, calls - changed, read, write, refused)


def times(count: int) -> Durations:
    """The durations of updates: all in the bucket of 8192 ns, except one each in the first and the last."""
    buckets = [0] * 25
    buckets[6] = count
    if count > 2:
        buckets[6], buckets[0], buckets[24] = count - 2, 1, 1
    return Durations(count, count * 6e-6, tuple(buckets))


def toggle(
    updates: int = 101,
    *,
    patched: bool = True,
    denied: Iterable[int] = (),
    exact: bool = True,
    pid: int = 0,
    vcpus: int = 1,
    **changes: Any,
) -> Snapshot:
    """What 5.15 to 6.16 count in filter updates that deny and allow FS_BASE in turn, and always deny `denied`."""
    calls: dict[Call, Outcome] = {}
    denied = set(denied)
    for index, access in sorted(PASSED):
        create = Call(
            index, "read_write" if index in BOTH_PASSED else access, "disable", "vcpu_create", "vmx_vcpu_create", pid
        )
        calls[create] = outcome(vcpus, vcpus, create.access, exact)
    for index in POSSIBLE:
        for access in ("read", "write"):
            if (index, access) in PASSED:
                changed = updates if index == FS_BASE and index not in denied else 0
                refused = updates if index in denied else updates // 2 if index == FS_BASE else 0
                call = Call(index, access, "disable", "filter_change", HOOK, pid)
                calls[call] = outcome(updates, changed, access, exact, refused)
            elif not patched:
                calls[Call(index, access, "enable", "filter_change", HOOK, pid)] = outcome(updates, 0, access, exact)
    made = Snapshot("toggle", "exact" if exact else "unknown", calls=calls, updates={pid: times(updates)})
    made = replace(made, vcpus_seen=vcpus, vmms_seen=1, by_vm=bool(pid), vms={pid: VmInfo(f"vm{pid}")} if pid else {})
    return replace(replace(made, vcpus_created=vcpus), **changes)


def recalc(updates: int = 101, **changes: Any) -> Snapshot:
    """What 6.18 and newer count: reads and writes in one call."""
    caller = "vmx_recalc_intercepts"
    calls = {Call(TSC, "read", "disable", "filter_change", caller): outcome(updates, 0, "read")}
    for index in BOTH_PASSED:
        changed = updates if index == FS_BASE else 0
        calls[Call(index, "read_write", "disable", "filter_change", caller)] = outcome(updates, changed, "read_write")
    calls[Call(XFD_ERR, "read", "enable", "filter_change", caller)] = outcome(updates, 0, "read")
    made = Snapshot("recalc", calls=calls, updates={0: times(updates)}, vcpus_seen=1, vmms_seen=1)
    return replace(made, **changes)


def svm_pass(
    updates: int = 101, *, exact: bool = True, pid: int = 0, vcpus: int = 1, denied: Iterable[int] = (), **changes: Any
) -> Snapshot:
    """What kvm_amd of 6.6 to 6.16 counts in filter updates that deny and allow FS_BASE in turn, and always `denied`.

    Each makes 47 calls, one of which changes something.
    """
    calls: dict[Call, Outcome] = {}
    denied = set(denied)
    for index in ALWAYS:
        create = Call(index, "read_write", "disable", "vcpu_create", "svm_vcpu_create", pid)
        calls[create] = outcome(vcpus, vcpus, "read_write", exact)
    written = Call(PRED_CMD, "read_write", "disable_write", "cpuid_update", "svm_vcpu_after_set_cpuid", pid)
    calls[written] = Outcome(vcpus, *((0, 0, vcpus, 0) if exact else ()))
    reset = Call(0xC0000080, "read_write", "enable", "vcpu_reset", "init_vmcb", pid)
    calls[reset] = outcome(vcpus, 0, "read_write", exact)
    for index in (*DIRECT, *X2APIC):
        action = "disable" if index in ALWAYS else "disable_write" if index == PRED_CMD else "enable"
        changed = updates if index == FS_BASE and index not in denied else 0
        refused = updates if index in denied and action != "enable" else updates // 2 if index == FS_BASE else 0
        call = Call(index, "read_write", action, "filter_change", SVM_HOOK, pid)
        calls[call] = outcome(updates, changed, "read_write", exact, refused)
    made = Snapshot("pass", "exact" if exact else "unknown", vendor="svm", calls=calls, updates={pid: times(updates)})
    made = replace(made, vcpus_seen=vcpus, vmms_seen=1, by_vm=bool(pid), vms={pid: VmInfo(f"vm{pid}")} if pid else {})
    return replace(replace(made, vcpus_created=vcpus), **changes)


def svm_recalc(updates: int = 101, **changes: Any) -> Snapshot:
    """What kvm_amd of 6.18 and newer counts: eleven calls an update, one of which changes something."""
    caller = "svm_recalc_intercepts"
    calls = {}
    for index in (*ALWAYS[:8], 0x175, 0x176, SPEC_CTRL):
        changed, action = updates if index == FS_BASE else 0, "enable" if index == SPEC_CTRL else "disable"
        calls[Call(index, "read_write", action, "filter_change", caller)] = outcome(updates, changed, "read_write")
    made = Snapshot("recalc", vendor="svm", calls=calls, updates={0: times(updates)}, vcpus_seen=1, vmms_seen=1)
    return replace(made, **changes)


def recalculated(recalculations: int = 7, *, exact: bool = True, **changes: Any) -> Snapshot:
    """As `recalc`, plus recalculations for other reasons, as at the creation of vCPUs: each makes eight calls."""
    made, caller = recalc(), "vmx_recalc_intercepts"
    calls = dict(made.calls)
    for index, access, action in (
        (TSC, "read", "disable"),
        *((index, "read_write", "disable") for index in BOTH_PASSED),
        (SPEC_CTRL, "read_write", "enable"),  # redundant
    ):
        changed = recalculations if action == "disable" else 0
        calls[Call(index, access, action, "recalc", caller)] = outcome(recalculations, changed, access, exact)
    if not exact:
        calls = {call: Outcome(made.calls) for call, made in calls.items()}
    recalcs = {0: Durations(recalculations, recalculations * 9e-6, (*[0] * 7, recalculations, *[0] * 17))}
    redundancy = "exact" if exact else "unknown"
    return replace(replace(made, calls=calls, recalcs=recalcs, redundancy=redundancy), **changes)


def created(vcpus: int = 3, *, recalculations: int = 2, **changes: Any) -> Snapshot:
    """As `recalc`, plus the creation of vCPUs, each in so many recalculations of eight calls; and one more."""
    made, creations = recalculated(1), recalculated(vcpus * recalculations)
    calls = dict(made.calls)
    for call, found in creations.calls.items():
        if call.cause == "recalc":
            changed = vcpus if call.action == "disable" else 0
            calls[replace(call, cause="vcpu_create")] = outcome(found.calls, changed, call.access)
    made = replace(made, calls=calls, recalcs=made.after(creations).recalcs, vcpus_seen=vcpus)
    return replace(replace(made, vcpus_created=vcpus, creation_recalcs=vcpus * recalculations), **changes)


def report(counted: Snapshot | None = None, host: HostInfo = HOST, **details: Any) -> Report:
    """The report on a trace of 2.5 seconds."""
    given: dict[str, Any] = {
        "started": STARTED,
        "duration": 2.5,
        "version": "0.1.0",
        "command": WORKLOAD,
        "exit_status": 0,
    }
    return make(counted or toggle(), host, **(given | details))


def patched(**details: Any) -> Report:
    return report(toggle(), label="patched", **details)


def unpatched(**details: Any) -> Report:
    return report(toggle(patched=False), label="unpatched", **details)


def amd(counted: Snapshot | None = None, **details: Any) -> Report:
    """The report on an AMD host."""
    return report(counted or svm_pass(), AMD_HOST, **details)


_Struct = TypeVar("_Struct", bound=msgspec.Struct)


def changed(made: _Struct, **fields: Any) -> _Struct:
    """A struct with other values, which are sanitized, as msgspec.structs.replace did not before 0.21."""
    return type(made)(**{**msgspec.structs.asdict(made), **fields})


def views(one: Report, other: Report | None = None) -> dict[str, str]:
    """Every view of a report, and of its comparisons with another one, both ways."""
    other = other or patched()
    found = {name: write_report(one, name).decode() for name in OF_REPORTS}
    for name, sides in {"base": ([one], [other]), "new": ([other], [one])}.items():
        comparison = compare(*sides, force=True)
        found |= {f"{name} {fmt}": write_comparison(comparison, fmt).decode() for fmt in OF_COMPARISONS}
    return found


# --- any report that can be read ---

HOSTILE = (
    *(
        "|",
        "a|b\\|c",
        "\\",
        "`x`",
        "two\nlines",
        "\r\n\r\n",
        "\x1b]0;owned\x07",
        "\x9b31m",
        "\u202egpj",
        "\x7f",
        "\x00",
    ),
    *("x" * 200, "y" * 4096, "word " * 100, "<script>alert(1)</script>", "---|---", "\u2028", "**a** [b](c) # d"),
    *("", " ", "-", "\x01", "\t", "&amp;", "\u6f22" * 90, "--", "'; rm -rf /", "\ufeff", "\u0301", "%s{}"),
)
names = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
counts = st.one_of(st.integers(0, 1000), st.integers(0, 2**63 - 1))
seconds = st.floats(0, 1e12)
rates = st.one_of(st.integers(0, 100), seconds)
maybe_counts = st.one_of(st.none(), counts)
by_name = st.dictionaries(names, counts, max_size=2)


@st.composite
def rows(draw: st.DrawFn) -> CallRow:
    calls = draw(counts)
    parts = st.one_of(st.none(), st.integers(0, calls))
    return CallRow(
        msr=f"{draw(st.one_of(st.sampled_from([TSC, FS_BASE]), st.integers(0, 2**32 - 1))):#x}",
        name=draw(names),
        access=draw(st.sampled_from(["read", "write", "read_write"])),
        action=draw(st.sampled_from(["enable", "disable", "disable_read", "disable_write"])),
        cause=draw(st.one_of(st.sampled_from(["filter_change", "recalc", "vcpu_create"]), names)),
        caller=draw(names),
        calls=calls,
        redundant=draw(parts),
        changed_read=draw(parts),
        changed_write=draw(parts),
        refused=draw(parts),
    )


said = st.sampled_from([*SAID, *NESTED_SAID])


@st.composite
def exit_rows(draw: st.DrawFn) -> ExitRow:
    exits = draw(counts)
    return ExitRow(
        msr=f"{draw(st.one_of(st.sampled_from([TSC, FS_BASE]), st.integers(0, 2**32 - 1))):#x}",
        name=draw(names),
        access=draw(st.sampled_from(["read", "write"])),
        path=draw(st.sampled_from(["fast", "slow"])),
        result=draw(st.one_of(st.sampled_from(["ok", "filtered"]), names)),
        guest=draw(st.sampled_from(["l1", "l2"])),
        exits=exits,
        exits_by_filter=(sure := draw(st.integers(0, exits))),
        exits_perhaps_by_filter=draw(st.integers(0, exits - sure)),
        intercepted_by=draw(st.one_of(st.none(), st.dictionaries(said, counts, max_size=3))),
    )


hosts = st.builds(
    Host,
    name=names,
    kernel=names,
    version=names,
    cpu=names,
    vcpus_seen=counts,
    vmms_seen=counts,
    vendor=st.sampled_from(["vmx", "svm"]),
    **{
        module: st.one_of(st.just(UNSET), st.dictionaries(names, names, max_size=2))
        for module in ("kvm_intel", "kvm_amd")
    },
    layout=st.one_of(st.sampled_from(["toggle", "recalc", "pass"]), names),
    backend=names,
    redundancy=st.sampled_from(["exact", "exact", "unknown"]),
)
buckets = st.builds(Bucket, le=st.one_of(st.none(), seconds), count=counts)
update_seconds = st.builds(UpdateSeconds, buckets=st.lists(buckets, max_size=4), sum=seconds, count=counts)
per_update = st.builds(
    PerUpdate,
    calls=rates,
    redundant=st.one_of(st.none(), rates),
    enable=rates,
    enable_redundant=st.one_of(st.none(), rates),
    disable=rates,
    disable_redundant=st.one_of(st.none(), rates),
)
losses = st.builds(
    Loss,
    dropped_updates=by_name,
    probe_missed=by_name,
    unpaired_returns=counts,
    read_failures=counts,
    module_unloads=counts,
    not_probed=st.lists(names, max_size=2),
)
vms = st.builds(
    Vm,
    pid=counts,
    name=names,
    uuid=names,
    vmm=names,
    calls=maybe_counts,
    redundant=maybe_counts,
    filter_updates=maybe_counts,
    recalculations=maybe_counts,
    filter_update_seconds_sum=seconds,
    exits=maybe_counts,
    exits_by_filter=maybe_counts,
    exits_perhaps_by_filter=maybe_counts,
)
any_reports = st.builds(
    Report,
    msrtrace=names,
    label=names,
    started=names,
    duration_seconds=seconds,
    host=hosts,
    command=st.one_of(st.none(), st.lists(names, max_size=3)),
    exit_status=st.one_of(st.none(), st.integers(0, 255)),
    totals=st.builds(
        Totals,
        calls=maybe_counts,
        redundant=maybe_counts,
        filter_updates=maybe_counts,
        recalculations=maybe_counts,
        creation_recalculations=maybe_counts,
        vcpus_seen=counts,
        vcpus_created=maybe_counts,
        exits=maybe_counts,
        exits_by_filter=maybe_counts,
        exits_perhaps_by_filter=maybe_counts,
    ),
    per_filter_update=st.one_of(st.none(), per_update),
    per_vcpu_creation=st.one_of(
        st.none(),
        st.builds(
            PerCreation, calls=rates, redundant=st.one_of(st.none(), rates), recalculations=st.one_of(st.none(), rates)
        ),
    ),
    calls=st.lists(rows(), max_size=4),
    filter_update_seconds=st.one_of(st.none(), update_seconds),
    recalculation_seconds=st.one_of(st.none(), update_seconds),
    vms=st.one_of(st.none(), st.lists(vms, max_size=3)),
    exits=st.one_of(st.none(), st.lists(exit_rows(), max_size=4)),
    state=st.one_of(st.none(), any_states(names)),
    loss=losses,
    lower_bound=st.booleans(),
    verdict=st.builds(Verdict, patched=st.sampled_from([True, False, None]), why=names),
    notes=st.lists(names, max_size=2),
)


def crowd(vms: int, updates: int = 1009) -> Snapshot:
    """The counts by VM of a host with so many VMs, each of which has 69 series."""
    counted = [toggle(updates + pid, pid=pid) for pid in range(1000, 1000 + vms)]
    return replace(
        counted[0],
        calls={call: outcome for one in counted for call, outcome in one.calls.items()},
        updates={pid: seen for one in counted for pid, seen in one.updates.items()},
        vms={pid: VmInfo(f"debian-{pid}") for one in counted for pid in one.vms},
    )

# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows on what KVM does: overview, by MSR, by cause, by VM."""

from __future__ import annotations

from dashboards.grafana import (
    BAD,
    BLUE,
    CALLS_PER_SECOND,
    GREEN,
    GREY,
    PER_SECOND,
    PLAIN,
    RED,
    SHARE,
    WASTE,
    WIDTH,
    Column,
    Json,
    Query,
    graph,
    names,
    stat,
    table,
    text,
)
from dashboards.queries import (
    BUILD,
    CALLS,
    GROUP,
    HOST,
    LOSSY,
    REDUNDANT,
    TITLED,
    UPDATES,
    VMS,
    by,
    host_count,
    most,
    most_vms,
    of_vms,
    per_update,
    rate,
    share,
)
from dashboards.verdict import (
    MISSING,
    MISSING_CODE,
    NEVER_PATCHED_CODE,
    PRESENT,
    PRESENT_CODE,
    SUPERSEDED_CODE,
    UNDECIDED_CODE,
    VERDICT,
)
from tracer.model.cause import CAUSES

VERDICTS = {
    MISSING_CODE: ("missing", RED),
    PRESENT_CODE: ("present", GREEN),
    SUPERSEDED_CODE: ("superseded (6.17+)", BLUE),
    UNDECIDED_CODE: ("undecided", GREY),
    NEVER_PATCHED_CODE: ("not applicable", PLAIN),
}
HOST_LEGEND = "{{instance}}"


READING = """\
KVM keeps one bitmap per vCPU that says which MSR accesses leave the guest. A **call** asks KVM to intercept one MSR \
or to pass it through; it is **redundant** if it changes none of the bits that it names. A **filter update** is one \
vCPU applying a changed MSR filter: on Intel (VMX), kernels before 6.0 lack the patch that skips its redundant \
enables; for AMD (SVM), KVM never had it. What a kernel cannot show is *absent* here, never 0: before 5.13 Intel's \
calls cannot be observed, and where KVM's module has no BTF, which calls are redundant may be unknown."""


def overview() -> list[Json]:
    """An overview of the fleet."""
    return [
        text("How to read this", "The terms on this dashboard.", READING, size=(WIDTH, 4)),
        stat(
            "Hosts traced",
            "Hosts whose msrtrace can be scraped.",
            f"count(group by ({HOST}) ({BUILD}))",
            unit="none",
            absent="none",
        ),
        stat(
            "Hosts without the patch",
            "Intel hosts (kernels 5.13 to 6.16) whose filter updates enable intercepts that are already enabled: they "
            "lack 'KVM: VMX: Skip filter updates for MSRs that KVM is already intercepting' (d895f28ed6da, v6.0). "
            "Counted since msrtrace started there. 'none known' if no host has shown either; see the table below. KVM "
            "never had this patch for AMD, whose hosts are not counted.",
            host_count(MISSING, PRESENT),
            unit="none",
            absent="none known",
            thresholds=BAD,
        ),
        stat(
            "Intercept calls",
            "Calls of the functions that enable or disable the interception of an MSR, summed over all hosts.",
            f"sum({rate(CALLS)})",
            unit=CALLS_PER_SECOND,
            absent="not observable",
        ),
        stat(
            "Redundant share",
            "The share of calls that changed nothing, of those whose outcome is known. Absent if there were no calls.",
            share(""),
            unit=SHARE,
            absent="unknown",
            thresholds=WASTE,
            decimals=1,
        ),
        stat(
            "Filter updates",
            "Changed MSR filters applied by vCPUs, summed over all hosts.",
            f"sum({UPDATES})",
            unit=PER_SECOND,
            absent="not observable",
        ),
        stat(
            "Incomplete counts",
            "Hosts on which counts were lost since msrtrace started: missed probes, full maps, unpaired returns, "
            "bitmaps that could not be read. Their counts are lower bounds; see the row Health of the tracers.",
            host_count(LOSSY, BUILD),
            unit="none",
            absent="none",
            thresholds=BAD,
        ),
        graph(
            "Calls by host",
            "Calls that enable or disable the interception of an MSR. Hosts whose calls cannot be observed are absent.",
            Query(by(HOST, rate(CALLS)), HOST_LEGEND),
            unit=CALLS_PER_SECOND,
        ),
        graph(
            "Redundant share by host",
            "The share of calls that changed nothing. Gaps: no calls. Hosts where it is unknown are absent.",
            Query(share(HOST), HOST_LEGEND),
            unit=SHARE,
            top=1,
        ),
        graph(
            "Filter updates by host",
            "Changed MSR filters applied by vCPUs.",
            Query(by(HOST, UPDATES), HOST_LEGEND),
            unit=PER_SECOND,
        ),
        table(
            "Hosts",
            "What each host runs and its rates now. Patch: whether its filter updates since msrtrace started show the "
            "patch of v6.0 missing or present; 'superseded' from 6.17 on, where every update recomputes all "
            "intercepts; 'undecided' if too little was seen, or something was lost; 'not applicable' on AMD, for which "
            "KVM never had it. Label: as set by the operator.",
            [
                f"group by ({HOST}, kernel, vendor, layout, redundancy, {GROUP}) ({TITLED})",
                VERDICT,
                by(HOST, UPDATES),
                by(HOST, rate(CALLS)),
                per_update(CALLS, HOST),
                per_update(REDUNDANT, HOST),
                share(HOST),
            ],
            [
                Column("instance", "Host"),
                Column("kernel", "Kernel"),
                Column("vendor", "Vendor", width=100),
                Column("Value #B", "Patch", mappings=names(VERDICTS), unit="none", width=145),
                Column(GROUP, "Label", width=95),
                Column("layout", "Layout", width=100),
                Column("redundancy", "Redundancy", width=118),
                Column("Value #C", "Filter updates", unit=PER_SECOND, decimals=1, width=120),
                Column("Value #D", "Calls", unit=CALLS_PER_SECOND, decimals=1, width=110),
                Column("Value #E", "Calls/update", unit="none", decimals=1, width=120),
                Column("Value #F", "Redundant/update", unit="none", decimals=1, width=155),
                Column("Value #G", "Redundant share", unit=SHARE, decimals=1, thresholds=WASTE, width=150),
            ],
            sort="Calls",
            size=(WIDTH, 12),
        ),
    ]


def per_msr() -> list[Json]:
    """The row by MSR."""
    labels = "msr, name, access, action, cause"
    return [
        graph(
            "Calls by MSR",
            "The ten MSRs with the most calls in the time shown.",
            Query(most(CALLS, "msr, name"), "{{name}}"),
            unit=CALLS_PER_SECOND,
            size=(12, 10),
        ),
        graph(
            "Redundant calls by MSR",
            "The ten MSRs with the most calls that changed nothing in the time shown. Without hosts where that is "
            "unknown.",
            Query(most(REDUNDANT, "msr, name"), "{{name}}"),
            unit=CALLS_PER_SECOND,
            size=(12, 10),
        ),
        table(
            "MSRs",
            "Every kind of call that is made now: its MSR and access, whether it enables or disables the interception, "
            "why, how often, and how many change nothing. The last two are of hosts where that is known; '-' if "
            "there are none.",
            [by(labels, rate(CALLS)) + " > 0", by(labels, rate(REDUNDANT)), share(labels)],
            [
                Column("name", "MSR"),
                Column("msr", "Index", width=130),
                Column("access", "Access", width=120),
                Column("action", "Action", width=120),
                Column("cause", "Cause", width=180),
                Column("Value #A", "Calls", unit=CALLS_PER_SECOND, decimals=1, width=160),
                Column("Value #B", "Redundant", unit=CALLS_PER_SECOND, decimals=1, width=160),
                Column("Value #C", "Redundant share", unit=SHARE, decimals=1, thresholds=WASTE, top=1, width=260),
            ],
            sort="Calls",
            size=(WIDTH, 10),
        ),
    ]


def per_cause() -> list[Json]:
    """The row by cause."""
    *causes, last = CAUSES.values()
    return [
        graph(
            "Calls by cause",
            f"Why KVM made the calls, stacked: {', '.join(causes)}, or {last}.",
            Query(by("cause", rate(CALLS)), "{{cause}}"),
            unit=CALLS_PER_SECOND,
            stacked=True,
        ),
        graph(
            "Redundant calls by cause",
            "Calls that changed nothing, stacked. Without hosts where that is unknown.",
            Query(by("cause", rate(REDUNDANT)), "{{cause}}"),
            unit=CALLS_PER_SECOND,
            stacked=True,
        ),
        graph(
            "Redundant share by cause",
            "The share of calls with this cause that changed nothing, of those whose outcome is known. Gaps: no calls.",
            Query(share("cause"), "{{cause}}"),
            unit=SHARE,
            top=1,
        ),
    ]


def per_vm() -> list[Json]:
    """The row by VM, for hosts with --by-vm."""
    needs = " Empty unless a host runs `msrtrace run --by-vm`."
    labels, legend = f"{HOST}, vm, pid", "{{vm}} ({{instance}})"
    updates = by(labels, of_vms("filter_updates_total"))
    return [
        graph(
            "Calls by VM",
            "The ten VMs with the most calls in the time shown." + needs,
            Query(most_vms(CALLS, labels), legend),
            unit=CALLS_PER_SECOND,
            size=(12, 8),
            absent="no host runs --by-vm",
        ),
        graph(
            "Filter updates by VM",
            "Changed MSR filters applied by vCPUs of the VM." + needs,
            Query(updates, legend),
            unit=PER_SECOND,
            size=(12, 8),
            absent="no host runs --by-vm",
        ),
        table(
            "VMs",
            "The VMs that run now, and their rates." + needs,
            [f"group by ({labels}, uuid, vmm) ({VMS})", by(labels, of_vms(CALLS)), share(labels, of_vms), updates],
            [
                Column("vm", "VM"),
                Column("pid", "PID", width=110),
                Column("uuid", "UUID", width=310),
                Column("vmm", "VMM", width=140),
                Column("instance", "Host"),
                Column("Value #B", "Calls", unit=CALLS_PER_SECOND, decimals=1, width=140),
                Column("Value #C", "Redundant share", unit=SHARE, decimals=0, thresholds=WASTE, width=160),
                Column("Value #D", "Filter updates", unit=PER_SECOND, decimals=1, width=140),
            ],
            sort="Calls",
            absent="no host runs --by-vm",
            size=(WIDTH, 6),
        ),
    ]

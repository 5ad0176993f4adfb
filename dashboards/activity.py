# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows on what KVM does: overview, by MSR, by cause, by VM."""

from __future__ import annotations

from functools import partial

from dashboards.grafana import (
    BAD,
    CALLS_PER_SECOND,
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
    steps,
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
    TEN_HIGHEST,
    TITLED,
    UPDATES,
    VMS,
    by,
    highest,
    host_count,
    joined,
    per_host,
    per_update,
    per_update_by,
    selected,
    share,
    total,
)
from dashboards.verdict import MISSING_CODE, PRESENT_CODE, UNDECIDED_CODE, VERDICT, VERDICTS
from tracer.model.cause import CAUSES

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
            f"count{selected(f'group by ({HOST}) ({BUILD})')}",
            unit="none",
            absent="none",
        ),
        stat(
            "Hosts without the patch",
            "Intel hosts (kernels 5.13 to 6.16) whose filter updates enable intercepts that are already enabled: they "
            "lack 'KVM: VMX: Skip filter updates for MSRs that KVM is already intercepting' (d895f28ed6da, v6.0). "
            "Counted since msrtrace started there. 'none known' if no host has shown either; see the table below. KVM "
            "never had this patch for AMD, whose hosts are not counted.",
            f"sum(({VERDICT} <= {PRESENT_CODE}) == bool {MISSING_CODE})",
            unit="none",
            absent="none known",
            thresholds=BAD,
        ),
        stat(
            "Intercept calls",
            "Calls of the functions that enable or disable the interception of an MSR, summed over all hosts.",
            total("", CALLS),
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
            total("", UPDATES),
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
            "Calls that enable or disable the interception of an MSR. Hosts whose calls cannot be observed are absent."
            + TEN_HIGHEST,
            Query(highest(partial(total, HOST, CALLS)), HOST_LEGEND),
            unit=CALLS_PER_SECOND,
        ),
        graph(
            "Redundant share by host",
            "The share of calls that changed nothing. Gaps: no calls. Hosts where it is unknown are absent."
            + TEN_HIGHEST,
            Query(highest(partial(share, HOST)), HOST_LEGEND),
            unit=SHARE,
            top=1,
        ),
        graph(
            "Filter updates by host",
            "Changed MSR filters applied by vCPUs." + TEN_HIGHEST,
            Query(highest(partial(total, HOST, UPDATES)), HOST_LEGEND),
            unit=PER_SECOND,
        ),
        _by_kernel(),
        table(
            "Hosts",
            "What each host runs and its rates now. Patch: whether its filter updates since msrtrace started show the "
            "patch of v6.0 missing or present; 'superseded' from 6.17 on, where every update recomputes all "
            "intercepts; 'undecided' if too little was seen, or something was lost; 'not applicable' on AMD, for which "
            "KVM never had it. Label: as set by the operator.",
            [
                selected(f"group by ({HOST}, kernel, vendor, layout, redundancy, {GROUP}) ({TITLED})"),
                VERDICT,
                total(HOST, UPDATES),
                total(HOST, CALLS),
                per_update(CALLS, HOST),
                per_update(REDUNDANT, HOST),
                share(HOST),
            ],
            [
                Column("instance", "Host", variable="instance"),
                Column("kernel", "Kernel", variable="kernel"),
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


def _by_kernel() -> Json:
    """The table of kernels."""
    labels = "kernel, vendor, layout"
    hosts = f"group by ({HOST}, {labels}) ({TITLED})"
    having = (
        f"{hosts} * on ({HOST}) group_left () ({VERDICT} == bool {code})" for code in (MISSING_CODE, UNDECIDED_CODE)
    )
    return table(
        "Hosts by kernel",
        "How many hosts run each kernel; how many are known to lack the patch by their filter updates since msrtrace "
        "started, and of how many too little was seen to tell; their rates now. The table of hosts explains the rest.",
        [
            *(by(labels, one) for one in (hosts, *having)),
            by(labels, joined(per_host("", UPDATES), labels)),
            per_update_by(labels),
            per_update_by(labels, REDUNDANT),
        ],
        [
            Column("kernel", "Kernel", variable="kernel"),
            Column("vendor", "Vendor", width=120),
            Column("layout", "Layout", width=120),
            Column("Value #A", "Hosts", unit="none", width=100),
            Column("Value #B", "Patch missing", unit="none", thresholds=steps((None, PLAIN), (1, RED)), width=140),
            Column("Value #C", "Undecided", unit="none", width=120),
            Column("Value #D", "Filter updates", unit=PER_SECOND, decimals=1, width=150),
            Column("Value #E", "Calls/update", unit="none", decimals=1, width=150),
            Column("Value #F", "Redundant/update", unit="none", decimals=1, width=170),
        ],
        sort="Hosts",
        size=(WIDTH, 8),
    )


def per_msr() -> list[Json]:
    """The row by MSR."""
    labels = "msr, name, access, action, cause"
    return [
        graph(
            "Calls by MSR",
            "The ten MSRs with the most calls in the time shown.",
            Query(highest(partial(total, "msr, name", CALLS)), "{{name}}"),
            unit=CALLS_PER_SECOND,
            size=(12, 10),
        ),
        graph(
            "Redundant calls by MSR",
            "The ten MSRs with the most calls that changed nothing in the time shown. Without hosts where that is "
            "unknown.",
            Query(highest(partial(total, "msr, name", REDUNDANT)), "{{name}}"),
            unit=CALLS_PER_SECOND,
            size=(12, 10),
        ),
        table(
            "MSRs",
            "Every kind of call that is made now: its MSR and access, whether it enables or disables the interception, "
            "why, how often, and how many change nothing. The last two are of hosts where that is known; '-' if "
            "there are none.",
            [total(labels, CALLS) + " > 0", total(labels, REDUNDANT), share(labels)],
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
            Query(total("cause", CALLS), "{{cause}}"),
            unit=CALLS_PER_SECOND,
            stacked=True,
        ),
        graph(
            "Redundant calls by cause",
            "Calls that changed nothing, stacked. Without hosts where that is unknown.",
            Query(total("cause", REDUNDANT), "{{cause}}"),
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
    by_vm = partial(total, labels, by_vm=True)
    calls = f"topk(100, {by_vm(CALLS)})"
    return [
        graph(
            "Calls by VM",
            "The ten VMs with the most calls in the time shown." + needs,
            Query(highest(partial(by_vm, CALLS)), legend),
            unit=CALLS_PER_SECOND,
            size=(12, 8),
            absent="no host runs --by-vm",
        ),
        graph(
            "Filter updates by VM",
            "Changed MSR filters applied by vCPUs, of the ten VMs with the most in the time shown." + needs,
            Query(highest(partial(by_vm, UPDATES)), legend),
            unit=PER_SECOND,
            size=(12, 8),
            absent="no host runs --by-vm",
        ),
        table(
            "VMs",
            "The VMs that run now, and their rates; at most the hundred with the most calls." + needs,
            [
                f"{selected(f'group by ({labels}, uuid, vmm) ({VMS})')} and on ({labels}) {calls}",
                calls,
                f"{share(labels, by_vm=True)} and {calls}",
                f"{by_vm(UPDATES)} and {calls}",
            ],
            [
                Column("vm", "VM"),
                Column("pid", "PID", width=110),
                Column("uuid", "UUID", width=310),
                Column("vmm", "VMM", width=140),
                Column("instance", "Host", variable="instance"),
                Column("Value #B", "Calls", unit=CALLS_PER_SECOND, decimals=1, width=140),
                Column("Value #C", "Redundant share", unit=SHARE, decimals=0, thresholds=WASTE, width=160),
                Column("Value #D", "Filter updates", unit=PER_SECOND, decimals=1, width=140),
            ],
            sort="Calls",
            absent="no host runs --by-vm",
            size=(WIDTH, 6),
        ),
    ]

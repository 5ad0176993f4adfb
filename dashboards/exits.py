# SPDX-License-Identifier: GPL-2.0-or-later
"""The row on exits of guests' RDMSR and WRMSR: how many, for which MSRs, and which of them only a filter causes."""

from __future__ import annotations

from functools import partial

from dashboards.grafana import SHARE, WIDTH, Column, Json, Query, graph, stat, table
from dashboards.patterns import label
from dashboards.queries import (
    EXITS,
    HOST,
    NOW,
    TEN_HIGHEST,
    Over,
    by,
    gauge,
    highest,
    metric,
    per_host,
    ratio,
    total,
)
from tracer.model.exits import FAST, FILTERED, INVALID, L1, L2, UNKNOWN

_PER_SECOND = "eps"
_NEEDS = " Empty unless a host runs `msrtrace run --exits`."
_ABSENT = "no host runs --exits"
_REFUSED = label("result", (FILTERED, UNKNOWN, INVALID))
_ALONE = (
    "Exits of accesses that the VM's filter denies and KVM would pass through: without the filter there would be "
    "none. Where some vCPUs intercept the access for KVM, too, or that is not known, they are left out, and so are "
    "those of nested guests."
)
#: A VM or, without --by-vm, a host; and an access of it.
_VM = f"{HOST}, vm, pid"
_ACCESS = f"{_VM}, msr, access"


def _with_host(labels: str) -> str:
    return labels if labels.startswith(HOST) else ", ".join(filter(None, (HOST, labels)))


def _intercepted(over: Over, *who: str) -> str:
    """The accesses that a vCPU intercepted for one of these, in the time over which exits are counted."""
    at = "max_over_time({}[$__rate_interval])" if over is NOW else over.gauge
    return at.format(metric("msr_intercepted_vcpus", label("by", who)))


#: Restricts sums by host to hosts on which the bitmap of every vCPU can be read.
_KNOWN = f" and on ({HOST}) sum by ({HOST}) ({metric('unreadable_vcpus')}) == 0"


def _alone(labels: str, over: Over = NOW, *, restriction: str = "") -> str:
    """Exits for a filter alone, by labels. See _ALONE.

    What is left out is not for all the time shown, which only chooses the lines of a graph: filters change.
    """
    denied = over.counter.format(metric(EXITS, label("result", (FILTERED,)), label("guest", (L1,))))
    found = f"sum by ({_ACCESS}, name) ({denied}) and on ({_ACCESS}) {_intercepted(over, 'filter')}"
    if over is NOW:
        found += f" unless on ({_ACCESS}) {_intercepted(over, 'both', 'unrecorded')}"
        found += f" unless on ({_VM}) {metric('unreadable_vcpus')} > 0"
    return by(labels, f"sum by ({_with_host(labels)}) ({found}){restriction}", over)


def _share(labels: str, over: Over = NOW) -> str:
    """The share of exits for a filter alone among those of the VMs that run."""
    known = _KNOWN if over is NOW else ""
    exits_ = by(labels, f"sum by ({HOST}) ({over.counter.format(metric(EXITS))}){known}", over)
    return ratio(f"({_alone(labels, over, restriction=known)} or 0 * {exits_})", exits_)


def _some(matcher: str, labels: str, over: Over = NOW, *, by_vm: bool = False) -> str:
    """The exits with this label, by labels."""
    return by(labels, per_host(labels, EXITS, matcher, over=over, by_vm=by_vm), over)


def exits() -> list[Json]:
    """The row."""
    return [
        stat(
            "Exits",
            "Exits of guests' RDMSR and WRMSR, summed over all hosts that count them." + _NEEDS,
            total("", EXITS),
            unit=_PER_SECOND,
            absent=_ABSENT,
            size=(6, 4),
        ),
        stat(
            "Exits for a filter alone",
            f"{_ALONE} Summed over all hosts. Empty unless there are such exits.",
            _alone(""),
            unit=_PER_SECOND,
            absent="none",
            size=(6, 4),
        ),
        stat(
            "Share for a filter alone",
            "The share of exits that there would certainly not be without a filter, of hosts where the bitmap of every "
            "vCPU can be read." + _NEEDS,
            _share(""),
            unit=SHARE,
            absent="unknown",
            decimals=1,
            size=(6, 4),
        ),
        stat(
            "Exits in progress",
            "Exits that are not counted yet: one is counted once its vCPU is known to have left it." + _NEEDS,
            by("", gauge("open_exits")),
            unit="none",
            absent=_ABSENT,
            decimals=0,
            size=(6, 4),
        ),
        graph(
            "Exits by MSR",
            "The ten MSRs and directions with the most exits in the time shown." + _NEEDS,
            Query(highest(partial(total, "msr, name, access", EXITS)), "{{name}}, {{access}}"),
            unit=_PER_SECOND,
            absent=_ABSENT,
            size=(12, 9),
        ),
        graph(
            "Exits for a filter alone, by MSR",
            f"{_ALONE} The ten MSRs and directions with the most in the time shown. Empty unless there are such exits.",
            Query(highest(partial(_alone, "msr, name, access")), "{{name}}, {{access}}"),
            unit=_PER_SECOND,
            absent="none",
            size=(12, 9),
        ),
        graph(
            "Exits by host",
            "Exits of guests' RDMSR and WRMSR." + TEN_HIGHEST + _NEEDS,
            Query(highest(partial(total, HOST, EXITS)), "{{instance}}"),
            unit=_PER_SECOND,
            absent=_ABSENT,
        ),
        graph(
            "Share for a filter alone, by host",
            "The share of a host's exits that there would certainly not be without a filter. Gaps: no exits. Hosts "
            "where the bitmap of a vCPU cannot be read are absent." + TEN_HIGHEST + _NEEDS,
            Query(highest(partial(_share, HOST)), "{{instance}}"),
            unit=SHARE,
            top=1,
            absent=_ABSENT,
        ),
        graph(
            "Refused accesses, by reason",
            "Exits of accesses that KVM did not perform, stacked: `filtered`, the VM's filter denies them; `unknown`, "
            "KVM does not know the MSR; `invalid`, KVM does not take the value. The guest gets an exception, or "
            "its VMM handles the access, which takes longer. Empty unless there are such exits.",
            Query(_some(_REFUSED, "result"), "{{result}}"),
            unit=_PER_SECOND,
            stacked=True,
            absent="none",
        ),
        table(
            "Exits by MSR and access",
            "Every access that exits now: how often, how often for a filter alone, how often it is refused, how often "
            "KVM handles it right after the exit, with interrupts off (fast), and how many come from guests of "
            "guests. `other` are MSRs after the first 512 that were accessed." + _NEEDS,
            [
                total("msr, name, access", EXITS) + " > 0",
                _alone("msr, name, access"),
                *(
                    f"{_some(matcher, 'msr, name, access')} > 0"
                    for matcher in (_REFUSED, label("path", (FAST,)), label("guest", (L2,)))
                ),
            ],
            [
                Column("name", "MSR"),
                Column("msr", "Index", width=150),
                Column("access", "Access", width=110),
                Column("Value #A", "Exits", unit=_PER_SECOND, decimals=1, width=150),
                Column("Value #B", "For a filter alone", unit=_PER_SECOND, decimals=1, width=170),
                Column("Value #C", "Refused", unit=_PER_SECOND, decimals=1, width=150),
                Column("Value #D", "Fast", unit=_PER_SECOND, decimals=1, width=150),
                Column("Value #E", "Nested", unit=_PER_SECOND, decimals=1, width=150),
            ],
            sort="Exits",
            absent=_ABSENT,
            size=(WIDTH, 10),
        ),
        _by_vm(),
    ]


def _by_vm() -> Json:
    most = f"topk(100, {total(_VM, EXITS, by_vm=True)})"
    return table(
        "Exits by VM",
        "The VMs that run now, at most the hundred with the most exits. Empty unless a host runs "
        "`msrtrace run --exits --by-vm`.",
        [most, f"{_alone(_VM)} and {most}", f"{_some(_REFUSED, _VM, by_vm=True)} > 0 and {most}"],
        [
            Column("vm", "VM"),
            Column("pid", "PID", width=110),
            Column("instance", "Host", variable="instance"),
            Column("Value #A", "Exits", unit=_PER_SECOND, decimals=1, width=170),
            Column("Value #B", "For a filter alone", unit=_PER_SECOND, decimals=1, width=170),
            Column("Value #C", "Refused", unit=_PER_SECOND, decimals=1, width=170),
        ],
        sort="Exits",
        absent="no host runs --exits --by-vm",
        size=(WIDTH, 8),
    )

# SPDX-License-Identifier: GPL-2.0-or-later
"""The row on what vCPUs intercept now, and who wants that."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from dashboards.grafana import WIDTH, Column, Json, Query, graph, table
from dashboards.queries import HOST, NOW, TEN_HIGHEST, Over, by, highest, metric, per_host

_INTERCEPTED = "msr_intercepted_vcpus"
#: By whom, as the label `by` has it, and in the legend.
_WHO = {
    "kvm": "KVM",
    "filter": "the filter alone",
    "both": "KVM and the filter",
    "pending": "a filter that is not applied yet",
    "unrecorded": "not recorded whether KVM, too",
}


def _accesses(who: str, labels: str, over: Over = NOW) -> str:
    """The vCPUs that intercept accesses, for each MSR and direction that WHO has intercepted, by labels."""
    return by(labels, _per_host(labels, _INTERCEPTED, f'by="{who}"', over=over), over)


def intercepted_now() -> list[Json]:
    """The row."""
    labels = "msr, name, access, by"
    return [
        graph(
            "Intercepted accesses, by who wants that",
            "Each MSR and direction of each vCPU counts as one: those of which the kernel records what KVM wants, and "
            "those that on some vCPU not KVM alone intercepts. All hosts, stacked. A line is empty unless there are "
            "such accesses.",
            *(Query(_accesses(by_whom, ""), legend) for by_whom, legend in _WHO.items()),
            unit="none",
            stacked=True,
            size=(12, 8),
        ),
        graph(
            "Denied by the filter alone",
            "The ten MSRs and directions that most vCPUs intercept although KVM would pass them through: each access "
            "exits, which costs the guest time if there are many. Empty unless a filter does that.",
            Query(highest(partial(_accesses, "filter", "name, access")), "{{name}}, {{access}}"),
            unit="none",
            absent="no filter denies what KVM passes through",
            size=(12, 8),
        ),
        graph(
            "Filters that are not applied yet, by host",
            "Accesses that a vCPU decides on by its filter before the last: each applies a new one when it next enters "
            "the guest. Those of idle or paused vCPUs may stay. Empty unless there are any." + TEN_HIGHEST,
            Query(highest(partial(_accesses, "pending", HOST)), "{{instance}}"),
            unit="none",
            absent="none",
            size=(12, 8),
        ),
        graph(
            "vCPUs, by host",
            "The vCPUs that exist, traced from their creation or not; and those whose bitmaps cannot be read, so that "
            "what they intercept is unknown." + TEN_HIGHEST,
            Query(highest(partial(_vcpus, "vcpus")), "{{instance}}"),
            Query(highest(partial(_vcpus, "unreadable_vcpus")), "{{instance}}, unreadable"),
            unit="none",
            size=(12, 8),
        ),
        table(
            "Intercepted now",
            "How many vCPUs intercept an access, and who wants that: `filter` is the VM's filter alone, `both` it and "
            "KVM, `pending` one that is not applied yet; with `unrecorded` the kernel does not record whether KVM "
            "wants it. `msrtrace state` on a host says it for each VM. Empty unless there are accesses of which the "
            "kernel records that, or that not KVM alone intercepts.",
            [f"{by(labels, metric(_INTERCEPTED))} > 0"],
            [
                Column("name", "MSR"),
                Column("msr", "Index", width=160),
                Column("access", "Access", width=140),
                Column("by", "By", width=160),
                Column("Value", "vCPUs", unit="none", width=160),
            ],
            sort="vCPUs",
            absent="nothing but what KVM intercepts",
            size=(WIDTH, 10),
        ),
    ]


def _vcpus(name: str, over: Over = NOW) -> str:
    return by(HOST, _per_host(HOST, name, over=over), over)


def _per_host(labels: str, name: str, *matchers: str, over: Over) -> str:
    """As per_host(), of a gauge, which with --by-vm each VM has."""
    return per_host(labels, name, *matchers, over=replace(over, counter=over.gauge))

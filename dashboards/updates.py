# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows on what a filter update costs, and what the patch saves."""

from __future__ import annotations

from functools import partial

from dashboards.grafana import PER_SECOND, SHARE, Json, Query, graph, stat, text
from dashboards.queries import (
    CALLS,
    GROUP,
    HOST,
    NOW,
    REDUNDANT,
    TEN_HIGHEST,
    TITLED,
    UPDATES,
    Over,
    by,
    comparable,
    highest,
    mean_update,
    per_host,
    per_update,
    per_update_by,
    quantile,
    ratio,
    selected,
    total,
)

HOST_LEGEND = "{{instance}}"
OF_CREATIONS = 'cause="vcpu_create"'
QUANTILES = {0.5: "median", 0.9: "90 %", 0.99: "99 %"}

LABELLING = f"""\
In the scrape configuration, label each host with what you believe (see `prometheus.yml` next to this dashboard):

```yaml
static_configs:
  - targets: [host1:9753]
    labels: {{{GROUP}: patched}}    # or: unpatched
```

Only kernels 5.13 to 6.16 on Intel are compared: newer ones update reads and writes in one call, so their calls are \
not comparable; and KVM never had this patch for AMD. *By kernel* needs no label."""


def filter_updates() -> list[Json]:
    """The row on what an update costs."""
    return [
        graph(
            "Filter update duration",
            "How long a vCPU took to apply a changed MSR filter, including the probes: half of the updates, 90 % and "
            "99 % took at most this long. The buckets are powers of two, so a quantile is accurate to a factor of "
            "two. All hosts. Gaps: no updates.",
            *(Query(quantile(part), name) for part, name in QUANTILES.items()),
            unit="s",
        ),
        graph(
            "99 % of filter updates, by host",
            "99 % of a host's filter updates took at most this long, accurate to a factor of two. Gaps: no updates."
            + TEN_HIGHEST,
            Query(highest(partial(quantile, 0.99, HOST)), HOST_LEGEND),
            unit="s",
        ),
        graph(
            "Mean filter update, by host",
            "The mean duration of filter updates; unlike the quantiles it is exact. Gaps: no updates." + TEN_HIGHEST,
            Query(highest(partial(mean_update, HOST)), HOST_LEGEND),
            unit="s",
        ),
        graph(
            "Calls per filter update, by host",
            "Calls with the cause filter_change, per filter update. On Intel, kernels 5.13 to 6.16 with the patch make "
            "13 where those without make 30 or more, depending on the CPU's features. On AMD, kernels before 6.17 make "
            "one for every MSR that KVM may pass through: 14 (5.10) to 47." + TEN_HIGHEST,
            Query(highest(partial(per_update, CALLS, HOST)), HOST_LEGEND),
            unit="none",
        ),
        graph(
            "Redundant calls per filter update, by host",
            "Of these calls, those that changed nothing. Hosts where that is unknown are absent." + TEN_HIGHEST,
            Query(highest(partial(per_update, REDUNDANT, HOST)), HOST_LEGEND),
            unit="none",
        ),
        graph(
            "CPU time in filter updates, by host",
            "Seconds per second that vCPUs spent in filter updates: 100 % is one full CPU." + TEN_HIGHEST,
            Query(highest(partial(total, HOST, "filter_update_duration_seconds_sum")), HOST_LEGEND),
            unit=SHARE,
        ),
    ]


def _per_creation(name: str, over: Over = NOW) -> str:
    """What creations of vCPUs take, per vCPU created on each host."""
    made = per_host(HOST, name, OF_CREATIONS, over=over)
    created = per_host(HOST, "vcpus_created_total", over=over)
    return ratio(by(HOST, made, over), by(HOST, f"{created} and on ({HOST}) {made}", over))


def recalculations() -> list[Json]:
    """The row on recalculations, and on what the creation of a vCPU takes."""
    all_, since_6_17 = "recalculations_total", " Empty unless a host has Linux 6.17 or newer."
    return [
        graph(
            "Filter updates and recalculations",
            "How often vCPUs recompute their bitmaps: for a changed filter; because a vCPU was created, by that or in "
            "its first KVM_RUN; and for other reasons, such as a new CPUID. All hosts, stacked. Recalculations are "
            "empty unless a host has Linux 6.17 or newer.",
            Query(total("", UPDATES), "filter updates"),
            Query(by("", per_host("", all_, OF_CREATIONS)), "creations of vCPUs"),
            Query(by("", per_host("", all_, 'cause="recalc"')), "other recalculations"),
            unit=PER_SECOND,
            stacked=True,
        ),
        graph(
            "Calls per vCPU created, by host",
            "Calls with the cause vcpu_create, per vCPU created. Gaps: none was created. Empty unless some were."
            + TEN_HIGHEST,
            Query(highest(partial(_per_creation, CALLS)), HOST_LEGEND),
            unit="none",
        ),
        graph(
            "Recalculations per vCPU created, by host",
            "Below 1 where vCPUs were created that have not run yet, or got a filter first." + since_6_17 + TEN_HIGHEST,
            Query(highest(partial(_per_creation, all_)), HOST_LEGEND),
            unit="none",
            absent="none",
        ),
        graph(
            "vCPUs created, by host",
            "The vCPUs that were created, also those of VMs that have ended." + TEN_HIGHEST,
            Query(highest(partial(total, HOST, "vcpus_created_total")), HOST_LEGEND),
            unit=PER_SECOND,
        ),
        graph(
            "Recalculation duration",
            "How long recalculations took, including the probes: half of them, 90 % and 99 % took at most this long, "
            "accurate to a factor of two. All hosts." + since_6_17,
            *(Query(quantile(part, of="recalculation"), name) for part, name in QUANTILES.items()),
            unit="s",
            absent="none",
        ),
        graph(
            "Mean recalculation, by host",
            "The mean duration of recalculations; unlike the quantiles it is exact." + since_6_17 + TEN_HIGHEST,
            Query(highest(partial(mean_update, HOST, of="recalculation")), HOST_LEGEND),
            unit="s",
            absent="none",
        ),
    ]


def by_vendor() -> list[Json]:
    """The row on what differs between vendors."""
    labels, legend = "vendor, layout", "{{vendor}} {{layout}}"
    return [
        graph(
            "Hosts by vendor",
            "Hosts whose msrtrace can be scraped, by the kind of hardware, stacked.",
            Query(f"count by (vendor) {selected(f'group by ({HOST}, vendor) ({TITLED})')}", "{{vendor}}"),
            unit="none",
            stacked=True,
        ),
        graph(
            "Calls per filter update, by vendor",
            "By the kind of hardware and the layout of KVM: toggle (Intel, 5.13 to 6.16) names one bit of an MSR in a "
            "call; pass (AMD, 5.10 to 6.16) and, since 6.17, set and recalc name both.",
            Query(per_update_by(labels), legend),
            unit="none",
        ),
        graph(
            "Redundant calls per filter update, by vendor",
            "Of these calls, those that changed nothing. Without hosts where that is unknown.",
            Query(per_update_by(labels, REDUNDANT), legend),
            unit="none",
        ),
    ]


def comparison() -> list[Json]:
    """The row that compares hosts with the patch and without, as labelled by the operator."""
    labelled = f" Empty unless targets have the label {GROUP}."
    both = f" Empty unless targets of both kinds have the label {GROUP}."
    legend, groups = f"{{{{{GROUP}}}}}", comparable("patched", "unpatched")
    patched, unpatched = comparable("patched"), comparable("unpatched")
    return [
        text("How to label hosts", "How to prepare this row.", LABELLING, size=(8, 8)),
        graph(
            "Calls per filter update",
            "Calls that KVM makes in one vCPU's filter update, with the patch and without." + labelled,
            Query(per_update(CALLS, GROUP, only=groups), legend),
            unit="none",
            absent="no labels",
        ),
        graph(
            "Redundant calls per filter update",
            "Of these calls, those that changed nothing." + labelled,
            Query(per_update(REDUNDANT, GROUP, only=groups), legend),
            unit="none",
            absent="no labels",
        ),
        stat(
            "Calls saved by the patch",
            "How many fewer calls each filter update makes." + both,
            f"{per_update(CALLS, '', only=unpatched)} - {per_update(CALLS, '', only=patched)}",
            unit="none",
            decimals=1,
            absent="no labels",
            size=(4, 8),
        ),
        stat(
            "Time saved by the patch",
            "How much less time each filter update takes on average, including the probes; below 0 the patched hosts "
            "are slower, for other reasons." + both,
            f"{mean_update('', only=unpatched)} - {mean_update('', only=patched)}",
            unit="s",
            absent="no labels",
            size=(4, 8),
        ),
        graph(
            "Mean filter update",
            "Time that a vCPU took to apply a changed filter, on average." + labelled,
            Query(mean_update(GROUP, only=groups), legend),
            unit="s",
            absent="no labels",
        ),
        graph(
            "Calls per filter update, by kernel",
            "The same by the kernel's release and the kind of hardware, for all kernels whose calls can be observed. "
            "From 6.17 on, and on AMD, one call updates reads and writes.",
            Query(per_update_by("kernel, vendor"), "{{kernel}} ({{vendor}})"),
            unit="none",
        ),
    ]

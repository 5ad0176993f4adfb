# SPDX-License-Identifier: GPL-2.0-or-later
"""The row on the health of the tracers: whether their counts are complete, and what they cost."""

from __future__ import annotations

from dashboards.grafana import BAD, GREEN, ORANGE, RED, SHARE, Column, Json, Query, graph, names, stat, steps, table
from dashboards.queries import BUILD, HOST, LOSSES, LOST, UNPROBED, by, host_count, increase, metric, rate

HOST_LEGEND = "{{instance}}"

UP = {0: ("down", RED), 1: ("up", GREEN)}
ATTACHED = {0: ("no", RED), 1: ("yes", GREEN)}
FULL = f"{metric('map_entries')} / {metric('map_capacity')}"


def health() -> list[Json]:
    """The row on the health of the tracers."""

    return [
        stat(
            "Tracers down",
            "Targets of the selected jobs that Prometheus cannot scrape now.",
            host_count(f"{metric('up')} == 0", metric("up")),
            unit="none",
            absent="no targets",
            thresholds=BAD,
        ),
        stat(
            "Hosts with probes missing",
            "Hosts on which a function that should be probed is not. The table says which.",
            host_count(UNPROBED, metric("probe_attached")),
            unit="none",
            absent="no hosts",
            thresholds=BAD,
        ),
        stat(
            "Fullest map",
            "How full the fullest BPF map is. When one is full, counts are dropped.",
            f"max({FULL})",
            unit=SHARE,
            absent="no maps",
            thresholds=steps((None, GREEN), (0.8, ORANGE), (1, RED)),
            decimals=1,
        ),
        stat(
            "Slowest scrape",
            "The longest time that a tracer took to read its counts at the last scrape.",
            f"max({metric('scrape_duration_seconds')})",
            unit="s",
            absent="no hosts",
            thresholds=steps((None, GREEN), (1, ORANGE), (5, RED)),
        ),
        stat(
            "Failed scrapes",
            "Scrapes within the last minutes that showed older counts, because reading failed.",
            f"sum({increase('scrape_failures_total')})",
            unit="none",
            absent="no hosts",
            decimals=0,
            thresholds=BAD,
        ),
        stat(
            "Calls in progress",
            "Calls that are not counted yet. A call is counted once its vCPU is known to have left it, so a few are "
            "normal.",
            f"sum({metric('open_calls')})",
            unit="none",
            absent="no hosts",
            decimals=0,
        ),
        stat(
            "Reloads of KVM's module",
            "Within the last minutes. msrtrace attaches again and keeps its counters; but whether the patch is missing "
            "is then undecided, as the counts may be of two modules.",
            f"sum({increase('module_unloads_total')})",
            unit="none",
            absent="no hosts",
            decimals=0,
        ),
        table(
            "Tracers",
            "The selected targets, those first that Prometheus cannot scrape now: what runs there, since when, and "
            "how many counts it has lost since then. Any loss makes the counts of that host lower bounds.",
            [
                metric("up"),
                f"group by ({HOST}, version, backend) ({BUILD})",
                f"time() - {metric('process_start_time_seconds')}",
                by(HOST, LOST),
            ],
            [
                Column("instance", "Host"),
                Column("Value #A", "State", unit="none", mappings=names(UP), width=110),
                Column("version", "Version", width=110),
                Column("backend", "Backend", width=110),
                Column("Value #C", "Running for", unit="s", decimals=1, width=130),
                Column("Value #D", "Lost counts", unit="none", decimals=0, thresholds=BAD, width=130),
            ],
            sort="State",
            descending=False,
            size=(12, 8),
        ),
        table(
            "Probes",
            "The functions that msrtrace probes. One that is not attached is not counted; one with missed runs makes "
            "every count of its host a lower bound.",
            [
                f"max by ({HOST}, function) ({metric('probe_attached')})",
                f"max by ({HOST}, function) (increase({metric('probe_missed_total')}[$__range])) "
                f"and on ({HOST}, function) {metric('probe_attached')}",
            ],
            [
                Column("instance", "Host"),
                Column("function", "Function"),
                Column("Value #A", "Attached", unit="none", mappings=names(ATTACHED), width=120),
                Column("Value #B", "Missed runs", unit="none", decimals=0, thresholds=BAD, width=130),
            ],
            sort="Attached",
            descending=False,
            size=(12, 8),
        ),
        graph(
            "Counts lost",
            "What was not counted, in each step of the graph: runs of a function that its probes missed, updates of a "
            "BPF map that was full, returns without an entry, bitmaps that could not be read. Normally 0.",
            *(Query(f"sum({increase(kind)})", what) for kind, what in LOSSES.items()),
            unit="none",
            size=(8, 8),
        ),
        graph(
            "Counts lost, by host",
            "The sum of these losses.",
            Query(" + ".join(by(HOST, increase(kind)) for kind in LOSSES), HOST_LEGEND),
            unit="none",
            size=(8, 8),
        ),
        graph(
            "Scrape time",
            "Time that msrtrace took to read its counts from the kernel.",
            Query(metric("scrape_duration_seconds"), HOST_LEGEND),
            unit="s",
            size=(8, 8),
        ),
        graph(
            "Fullest map, by host",
            "How full each host's fullest map is.",
            Query(f"max by ({HOST}) ({FULL})", HOST_LEGEND),
            unit=SHARE,
            size=(8, 8),
        ),
        graph(
            "Memory of msrtrace",
            "Resident memory of the tracer itself.",
            Query(metric("process_resident_memory_bytes"), HOST_LEGEND),
            unit="bytes",
            size=(8, 8),
        ),
        graph(
            "CPU of msrtrace",
            "CPU time of the tracer itself, without its probes in the kernel: 100 % is one full CPU.",
            Query(rate("process_cpu_seconds_total"), HOST_LEGEND),
            unit=SHARE,
            size=(8, 8),
        ),
    ]

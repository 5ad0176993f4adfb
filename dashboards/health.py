# SPDX-License-Identifier: GPL-2.0-or-later
"""The row that says whether the numbers can be trusted, and what taking them costs."""

from __future__ import annotations

from dashboards.grafana import BAD, GREEN, ORANGE, RED, SHARE, Column, Json, Query, graph, names, stat, steps, table
from dashboards.queries import BUILD, HOST, LOSSES, LOST, UNPROBED, by, host_count, increase, metric, rate

HOST_LEGEND = "{{instance}}"

UP = {0: ("down", RED), 1: ("up", GREEN)}
ATTACHED = {0: ("no", RED), 1: ("yes", GREEN)}
FULL = f"{metric('map_entries')} / {metric('map_capacity')}"


def health() -> list[Json]:
    """Whether the numbers above can be trusted, and what taking them costs."""

    return [
        stat(
            "Tracers down",
            "Targets of the chosen jobs that Prometheus cannot scrape now.",
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
            "How much of the fullest BPF map is taken. When one is full, counts are dropped.",
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
            "Scrapes within the last minutes that showed older counts, because reading the kernel's failed.",
            f"sum({increase('scrape_failures_total')})",
            unit="none",
            absent="no hosts",
            decimals=0,
            thresholds=BAD,
        ),
        stat(
            "Calls under way",
            "Calls that are not counted yet. A call is counted when its vCPU is known to have left it: that a few are "
            "open is as it should be.",
            f"sum({metric('open_calls')})",
            unit="none",
            absent="no hosts",
            decimals=0,
        ),
        stat(
            "Reloads of kvm_intel",
            "Within the last minutes. msrtrace attaches again and keeps its counters; whether the patch is missing is "
            "then not told any more, as the counts may be of two modules.",
            f"sum({increase('module_unloads_total')})",
            unit="none",
            absent="no hosts",
            decimals=0,
        ),
        table(
            "Tracers",
            "The chosen targets, those first that Prometheus cannot scrape now: what runs there, since when, and how "
            "many counts it has lost in that time. What is lost makes the counts of that host lower bounds.",
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
            "The functions that msrtrace probes. One that is not attached is not counted; one that misses runs makes "
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
            "BPF map that was full, returns without an entry, bitmaps that could not be read. 0 on a good day.",
            *(Query(f"sum({increase(kind)})", what) for kind, what in LOSSES.items()),
            unit="none",
            size=(8, 8),
        ),
        graph(
            "Counts lost, by host",
            "All of these together.",
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
            "Entries of each host's fullest map by its capacity.",
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
            "CPU time of the tracer itself, without its probes in the kernel: 100 % is one CPU fully taken.",
            Query(rate("process_cpu_seconds_total"), HOST_LEGEND),
            unit=SHARE,
            size=(8, 8),
        ),
    ]
